#!/bin/sh
# A standalone master in the foreground: what sbin/start-master.sh starts, which the pyspark of pip lacks.
#
#   SPARK_MASTER_HOST         the name or address that workers and drivers call; this host's name
#   SPARK_MASTER_PORT         7077; with 0 a free one, told in the log: "Starting Spark master at spark://..."
#   SPARK_MASTER_WEBUI_PORT   8080
set -eu
. "$(dirname "$0")/spark.sh"
exec "$SPARK_HOME/bin/spark-class" org.apache.spark.deploy.master.Master "$@"
