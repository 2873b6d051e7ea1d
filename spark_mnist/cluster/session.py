"""Checks of a session, its settings and a DataFrame before any work starts. Runs on: driver."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator, Mapping

from pyspark.sql import DataFrame, SparkSession

from spark_mnist import errors, options
from spark_mnist.cluster import slots

logger = logging.getLogger(__name__)

INPUT_HINTS = {
    "pandas.": "use spark.createDataFrame(...)",
    "pyspark.pandas": "use .to_spark()",
    "pyspark.core.rdd": "use .toDF()",
    "pyspark.rdd": "use .toDF()",
    "pyspark.sql.group": "aggregate it first",
    "builtins.str": "the DataFrame comes first, then the model's name; read a path with spark.read",
    "builtins.list": "use spark.createDataFrame(...)",
    "builtins.dict": "use spark.createDataFrame(...)",
    "numpy.": "use spark.createDataFrame(...)",
    "builtins.NoneType": "read or make one first",
}
"""Advice for objects that are not DataFrames, by the beginning of their type's name."""
SECURITY_SETTINGS = ("spark.authenticate", "spark.network.crypto.enabled")
"""Settings that keep others on the network from reading or forging Spark's messages."""
ADAPTIVE = "spark.sql.adaptive.enabled"
"""Spark's setting that lets it plan a query again after each shuffle."""
SHUFFLE_PARTITIONS = "spark.sql.shuffle.partitions"
"""Spark's setting for the number of partitions after a shuffle."""
SETTINGS_LOCK = threading.RLock()
"""Lock to hold while a setting has a temporary value: fits in several threads share a session."""


def check_settings(spark: SparkSession, *, secure: bool) -> None:
    """Check that ranks can run in a session, and that it is as secure as the user wants.

    Args:
        spark: The session.
        secure: Whether Spark must authenticate and encrypt its connections.

    Raises:
        errors.ClusterError: A setting must change; the message names it.
    """
    conf = spark.sparkContext.getConf()
    if slots.is_on(conf, "spark.speculation"):
        raise errors.ClusterError(
            "spark.speculation=true makes Spark start slow tasks twice, and a rank is a task that "
            "must run once: set it to false for this session"
        )
    gpus = conf.get(slots.TASK_GPUS)
    if gpus and 0 < float(gpus) < 1:
        raise errors.ClusterError(
            f"{slots.TASK_GPUS}={gpus} lets Spark give one GPU to several ranks: set it to 1"
        )
    missing_settings = [setting for setting in SECURITY_SETTINGS if not slots.is_on(conf, setting)]
    if secure and missing_settings:
        raise errors.ClusterError(
            f"secure=true needs {' and '.join(f'{setting}=true' for setting in missing_settings)}: "
            "set it where the session is made, since Spark's connections carry the keys of a fit"
        )


def check_input(df: object, *, streams: bool = False) -> None:
    """Check that an object is a DataFrame that can be read now.

    Args:
        df: The user's input.
        streams: Whether the DataFrame may be a stream's.

    Raises:
        errors.NotADataFrame: The input is something else, or a stream.
        errors.ClusterError: The session of the DataFrame was stopped.
    """
    type_name = f"{type(df).__module__}.{type(df).__qualname__}"
    if type_name.startswith("pyspark.sql.connect"):  # ``settings`` refuses its session
        return
    if not isinstance(df, DataFrame):
        hints = [hint for prefix, hint in INPUT_HINTS.items() if type_name.startswith(prefix)]
        hint = hints[0] if hints else "give a Spark DataFrame"
        raise errors.NotADataFrame(f"the input must be a Spark DataFrame, not {type_name}: {hint}")
    check_session(df.sparkSession)
    if df.isStreaming and not streams:
        raise errors.NotADataFrame(
            "the DataFrame is a stream, which has no end: train and evaluate on its parts with "
            "writeStream.foreachBatch, as examples/learn_from_stream.py does"
        )


def check_session(spark: object) -> None:
    """Check that an object is a session, and that it was not stopped.

    A session of Spark Connect passes: ``settings`` refuses it.

    Raises:
        errors.ClusterError: The object is not a session, or the session was stopped.
    """
    if type(spark).__module__.startswith("pyspark.sql.connect"):
        return
    if not isinstance(spark, SparkSession):
        raise errors.ClusterError(
            f"a SparkSession is needed, not {type(spark).__qualname__}: pass spark="
        )
    context = spark.sparkContext
    if context._jsc is None or context._jsc.sc().isStopped():
        raise errors.ClusterError(
            "the Spark session was stopped: make a new one, and read the data again with it"
        )


def settings(spark: SparkSession) -> dict[str, str]:
    """Return the options in the session's settings, as text by name.

    Raises:
        errors.UnknownOption: A setting names no option.
        errors.ClusterError: The session is a Spark Connect session.
    """
    if type(spark).__module__.startswith("pyspark.sql.connect"):
        raise errors.ClusterError(
            "this session is Spark Connect's, as serverless and shared compute have it: it has no "
            "tasks for ranks to run in. Use classic compute, on Databricks with dedicated access"
        )
    # A query of all settings, ``SET``, takes a tenth of a second.
    keys = spark._jsparkSession.conf().getAll().keysIterator().mkString("\n").split("\n")
    names = [key.removeprefix(options.SETTING) for key in keys if key.startswith(options.SETTING)]
    for name in names:
        if name not in options.FIELDS:
            hint = options.hint(name, options.FIELDS)
            raise errors.UnknownOption(
                f"Spark's setting {options.SETTING}{name}: no option {name!r}{hint}"
            )
    return {name: str(spark.conf.get(f"{options.SETTING}{name}")) for name in names}


def make_plan(df: DataFrame) -> str:
    """Make Spark plan a DataFrame, with the settings of now, and return the plan as text."""
    plan: str = df._jdf.queryExecution().executedPlan().toString()
    return plan


def has_shuffles(df: DataFrame) -> bool:
    """Return whether Spark shuffles rows to compute a DataFrame, or has done so for its cache.

    The settings of shuffles are then the user's: joins may need many partitions.
    """
    return "Exchange" in make_plan(df)


@contextlib.contextmanager
def temporary_settings(spark: SparkSession, values: Mapping[str, str]) -> Iterator[None]:
    """Change settings of a session within a block; no other such block runs meanwhile."""
    with SETTINGS_LOCK:
        old_values = {key: spark.conf.get(key, None) for key in values}
        try:
            for key, value in values.items():
                spark.conf.set(key, value)
            yield
        finally:
            for key, old_value in old_values.items():
                if old_value is None:
                    spark.conf.unset(key)
                else:
                    spark.conf.set(key, old_value)
