"""Environment variables that ranks inherit from executors, or get from the driver.

Runs on: driver.
"""

from __future__ import annotations

import os
import re

from pyspark.sql import SparkSession

RANK_PATTERN = (
    "PATH|HOME|USER|LOGNAME|LANG|LC_.*|TZ|TMPDIR|LD_LIBRARY_PATH|JAVA_HOME|CLASSPATH|"
    "SSL_CERT_.*|REQUESTS_CA_BUNDLE|(?i:(http|https|no|all)_proxy)|KRB5.*|ARROW_LIBHDFS_DIR|"
    "PYTHON.*|(SPARK|PYSPARK|HADOOP|HOROVOD|CUDA|NVIDIA|NCCL|GLOO|TF|KERAS|XLA|OMP|MKL)_.*"
)
"""Pattern of the variables that a rank keeps of its executor's environment, secrets excepted."""
SECRET_PATTERN = ".*(SECRET|PASS|CREDENTIAL|_KEY|TOKEN(?!_FILE)).*"
"""Pattern of the names of secrets, which a rank does not keep even if another pattern matches."""
EXECUTOR_ENV_PREFIX = "spark.executorEnv."
"""Prefix of the Spark settings that set variables of executors; ranks keep these variables."""
CREDENTIAL_PREFIXES = {
    **dict.fromkeys(("s3", "s3a"), "AWS_"),
    **dict.fromkeys(("gs", "gcs"), "GOOGLE_"),
    **dict.fromkeys(("abfs", "abfss", "az", "adl"), "AZURE_"),
}
"""Prefix of the variables with which ranks open shards on an object store, by URL scheme."""


def settings() -> dict[str, str]:
    """Return the variables that a rank gets from the driver's environment."""
    name = "TF_CPP_MIN_LOG_LEVEL"
    return {name: os.environ.get(name, "3")}


def pattern(spark: SparkSession, url: str) -> str:
    """Return a pattern for the variables that ranks keep of their executor's environment.

    Args:
        spark: The session.
        url: URL of the shards.
    """
    pairs = spark.sparkContext.getConf().getAll()
    names = [
        k.removeprefix(EXECUTOR_ENV_PREFIX) for k, _ in pairs if k.startswith(EXECUTOR_ENV_PREFIX)
    ]
    prefix = CREDENTIAL_PREFIXES.get(url.partition(":")[0])
    patterns = [*map(re.escape, names), *([f"{prefix}.*"] if prefix else [])]
    return "|".join([f"(?!{SECRET_PATTERN})({RANK_PATTERN})", *patterns])
