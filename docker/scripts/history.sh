#!/bin/sh
# The history server in the foreground: pages of applications that have ended, read from their event logs.
#
#   SPARK_EVENTS     where the logs are; /tmp/spark-events
#   SPARK_UI_PORT    18080
set -eu
. "$(dirname "$0")/spark.sh"
mkdir -p "$SPARK_EVENTS"
export SPARK_HISTORY_OPTS="-Dspark.history.fs.logDirectory=file:$SPARK_EVENTS -Dspark.history.ui.port=${SPARK_UI_PORT:-18080} ${SPARK_HISTORY_OPTS:-}"
exec "$SPARK_HOME/bin/spark-class" org.apache.spark.deploy.history.HistoryServer "$@"
