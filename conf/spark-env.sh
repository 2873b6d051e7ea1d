#!/usr/bin/env bash
# What the daemons of a standalone cluster, and their executors, start with. Copy into $SPARK_CONF_DIR.

# The Python that has this library, the same on all hosts; with --archives it is set by the job.
# export PYSPARK_PYTHON=/opt/spark_mnist/bin/python

# Ranks have the cores that Spark gives their task; OpenMP should not take all of the host.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# TensorFlow's information and warnings, not its errors, are for its developers.
export TF_CPP_MIN_LOG_LEVEL=${TF_CPP_MIN_LOG_LEVEL:-3}

# A worker finds the GPUs of its host, where there are any, and offers them.
if command -v nvidia-smi > /dev/null; then
  gpus=$(nvidia-smi --query-gpu=index --format=csv,noheader | wc -l)
  script=${SPARK_CONF_DIR:-$(dirname "${BASH_SOURCE[0]}")}/get_gpus_resources.sh
  export SPARK_WORKER_OPTS="${SPARK_WORKER_OPTS:-} -Dspark.worker.resource.gpu.amount=$gpus -Dspark.worker.resource.gpu.discoveryScript=$script"
fi
