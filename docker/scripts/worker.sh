#!/bin/sh
# A standalone worker in the foreground: what sbin/start-worker.sh starts. Executors inherit its environment.
#
#   SPARK_MASTER                                        spark://localhost:7077, as the master's log tells it
#   SPARK_WORKER_CORES, SPARK_WORKER_MEMORY             what it gives to executors; all cores, all memory but 1 GB
#   SPARK_WORKER_PORT, SPARK_WORKER_WEBUI_PORT          a free one; 8081
#   SPARK_WORKER_DIR                                    logs and files of executors; /tmp/spark-work
#   SPARK_WORKER_OPTS                                   "-Dspark.shuffle.service.enabled=true": an external shuffle service beside it
set -eu
. "$(dirname "$0")/spark.sh"
export SPARK_WORKER_DIR="${SPARK_WORKER_DIR:-/tmp/spark-work}" # the default lies in site-packages
exec "$SPARK_HOME/bin/spark-class" org.apache.spark.deploy.worker.Worker "${SPARK_MASTER:-spark://localhost:7077}" "$@"
