#!/bin/sh
# What the image begins with: the driver or the executor that Spark on Kubernetes asks for by name, else the command that is given.
#
#   entrypoint.sh executor                     the driver has put all that it needs into the environment of the pod
#   entrypoint.sh driver --properties-file ... --class ... program.py [arguments]           spark-submit --deploy-mode cluster
#   entrypoint.sh docker/scripts/worker.sh     anything else is run as it is
#
# Both work in a folder of their own: Spark brings --py-files, --files and --archives to the current one, which must be writable.
set -eu
role=${1:-}
case $role in
    driver | executor) shift ;;
    *) exec "$@" ;;
esac
. "$(dirname "$0")/spark.sh"
cd "$(mktemp -d)"

if [ "$role" = driver ]; then
    exec "$SPARK_HOME/bin/spark-submit" --deploy-mode client \
        --conf "spark.driver.bindAddress=$SPARK_DRIVER_BIND_ADDRESS" \
        --conf "spark.executorEnv.SPARK_DRIVER_POD_IP=$SPARK_DRIVER_BIND_ADDRESS" "$@"
fi

set --
i=0
while eval "[ -n \"\${SPARK_JAVA_OPT_$i+set}\" ]"; do # each is one option, whatever stands in it
    eval "set -- \"\$@\" \"\$SPARK_JAVA_OPT_$i\""
    i=$((i + 1))
done
exec "${JAVA_HOME:+$JAVA_HOME/bin/}java" "$@" "-Xms$SPARK_EXECUTOR_MEMORY" "-Xmx$SPARK_EXECUTOR_MEMORY" \
    -cp "${SPARK_CONF_DIR:+$SPARK_CONF_DIR:}${SPARK_CLASSPATH:+$SPARK_CLASSPATH:}$SPARK_HOME/jars/*" \
    org.apache.spark.scheduler.cluster.k8s.KubernetesExecutorBackend \
    --driver-url "$SPARK_DRIVER_URL" --executor-id "$SPARK_EXECUTOR_ID" --cores "$SPARK_EXECUTOR_CORES" \
    --app-id "$SPARK_APPLICATION_ID" --hostname "$SPARK_EXECUTOR_POD_IP" \
    --resourceProfileId "$SPARK_RESOURCE_PROFILE_ID" --podName "$SPARK_EXECUTOR_POD_NAME"
