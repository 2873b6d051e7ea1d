"""Find the store of a call: its argument, the session's setting, or ``./models``. On: driver."""

from __future__ import annotations

import contextlib

from pyspark.errors import PySparkRuntimeError
from pyspark.sql import SparkSession

from spark_mnist import errors, options
from spark_mnist.store import model_store

DEFAULT_STORE = "models"
"""A directory below the current one."""


def open_store(given: str | None, spark: SparkSession | None = None) -> model_store.Store:
    """Open the store of that URL, else of the session's setting, else ``./models``.

    The session is the given one, else the thread's, else the process's, where there is one.
    """
    if spark is None:
        with contextlib.suppress(PySparkRuntimeError):
            spark = SparkSession.active()
    conf = spark.conf.get(f"{options.SETTING}store", None) if spark else None
    url = given or conf or DEFAULT_STORE
    try:
        return model_store.Store(url)
    except (ImportError, ValueError) as error:  # what fsspec raises of a URL that it cannot open
        raise errors.OptionError(f"store {url!r} cannot be opened: {error}") from error
