#!/bin/sh
# What the scripts here have in common: which Python, and where its pyspark keeps Spark. Sourced, not run.

PYSPARK_PYTHON=${PYSPARK_PYTHON:-$(command -v python3)}
PYTHON=${PYSPARK_DRIVER_PYTHON:-$PYSPARK_PYTHON} # the one of this machine; executors may have theirs from an archive
if [ -z "${SPARK_HOME:-}" ]; then
    SPARK_HOME=$("$PYTHON" -c 'import importlib.util as u, pathlib as p; print(p.Path(u.find_spec("pyspark").origin).parent)')
fi
SPARK_EVENTS=${SPARK_EVENTS:-/tmp/spark-events} # a folder that the driver writes to and the history server reads
export PYSPARK_PYTHON SPARK_HOME SPARK_EVENTS
