"""Location of a call's store: its argument, else the session's setting, else ``./models``.

Runs on: driver.
"""

from __future__ import annotations

import contextlib

from pyspark.errors import PySparkRuntimeError
from pyspark.sql import SparkSession

from spark_mnist import errors, options
from spark_mnist.store import model_store

DEFAULT_STORE = "models"
"""Default path of the store: a directory below the current one."""


def open_store(store_url: str | None, spark: SparkSession | None = None) -> model_store.Store:
    """Open the store at a URL, else at that of the session's setting, else ``./models``.

    The session is ``spark``, else the thread's, else the process's, where there is one.
    """
    if spark is None:
        with contextlib.suppress(PySparkRuntimeError):
            spark = SparkSession.active()
    setting = spark.conf.get(f"{options.SETTING}store", None) if spark else None
    url = store_url or setting or DEFAULT_STORE
    try:
        return model_store.Store(url)
    except (ImportError, ValueError) as error:  # what fsspec raises for a URL that it cannot open
        raise errors.OptionError(f"store {url!r} cannot be opened: {error}") from error
