#!/bin/sh
# Runs a program on the cluster, in client mode: submit.sh [options of spark-submit] program.py [arguments]
# Its exit code is that of the program: not 0 where it ended in an error, whose traceback is then the last thing in its output (Spark
# brings stderr of the program to stdout, and has stderr for its own log).
#
#   SPARK_MASTER    spark://localhost:7077
#   SPARK_CORES     cores to wait for, up to 30 seconds, and to take; not set: the program takes what there is, as it comes
#   SPARK_EVENTS    where its event log goes, for the history server; /tmp/spark-events
set -eu
. "$(dirname "$0")/spark.sh"
mkdir -p "$SPARK_EVENTS"
set -- --conf spark.eventLog.enabled=true --conf "spark.eventLog.dir=file:$SPARK_EVENTS" "$@"
set -- --conf spark.python.unix.domain.socket.enabled=true "$@" # Spark 4.1 and later: half the cost of a short task
if [ -n "${SPARK_CORES:-}" ]; then # or a fit may begin before the executors are there, and find no slot
    set -- --conf "spark.cores.max=$SPARK_CORES" --conf spark.scheduler.minRegisteredResourcesRatio=1.0 "$@"
fi
# The daemon imports torch once an executor. It starts before --py-files are there, so the package must be installed.
if "$PYTHON" -c 'import bigdl_lite' 2>/dev/null; then
    set -- --conf spark.python.daemon.module=bigdl_lite.engine.daemon "$@"
fi
exec "$SPARK_HOME/bin/spark-submit" --master "${SPARK_MASTER:-spark://localhost:7077}" --deploy-mode client "$@"
