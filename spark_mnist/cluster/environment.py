"""Environment variables that ranks keep of their executor, or get. Runs on: driver."""

from __future__ import annotations

import os
import re

from pyspark.sql import SparkSession

RANK_ENVIRONMENT = (
    "PATH|HOME|USER|LOGNAME|LANG|LC_.*|TZ|TMPDIR|LD_LIBRARY_PATH|JAVA_HOME|CLASSPATH|"
    "SSL_CERT_.*|REQUESTS_CA_BUNDLE|(?i:(http|https|no|all)_proxy)|KRB5.*|ARROW_LIBHDFS_DIR|"
    "PYTHON.*|(SPARK|PYSPARK|HADOOP|HOROVOD|CUDA|NVIDIA|NCCL|GLOO|TF|KERAS|XLA|OMP|MKL)_.*"
)
"""What a rank keeps of its executor's environment, where the name is not that of a secret."""
SECRET = ".*(SECRET|PASS|CREDENTIAL|_KEY|TOKEN(?!_FILE)).*"
"""Names of what a rank does not keep, whatever else they match."""
EXECUTOR_ENV = "spark.executorEnv."
"""Spark settings that give executors more, which ranks keep."""
CREDENTIALS = {
    **dict.fromkeys(("s3", "s3a"), "AWS_"),
    **dict.fromkeys(("gs", "gcs"), "GOOGLE_"),
    **dict.fromkeys(("abfs", "abfss", "az", "adl"), "AZURE_"),
}
"""What variables begin with by which ranks open shards on an object store, by its scheme."""


def settings() -> dict[str, str]:
    """What a rank gets of the driver's environment."""
    name = "TF_CPP_MIN_LOG_LEVEL"
    return {name: os.environ.get(name, "3")}


def pattern(spark: SparkSession, url: str) -> str:
    """A pattern for the variables that ranks keep of their executor's environment.

    Args:
        spark: The session.
        url: Where the shards lie.
    """
    configured = spark.sparkContext.getConf().getAll()
    given = [k.removeprefix(EXECUTOR_ENV) for k, _ in configured if k.startswith(EXECUTOR_ENV)]
    prefix = CREDENTIALS.get(url.partition(":")[0])
    named = [*map(re.escape, given), *([f"{prefix}.*"] if prefix else [])]
    return "|".join([f"(?!{SECRET})({RANK_ENVIRONMENT})", *named])
