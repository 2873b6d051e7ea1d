"""``models``, ``describe``, ``delete``, ``rollback``: what is done with saved models.

Runs on the driver and touches no row. A session is asked for its setting of the store, where one
is active.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import logging
from typing import Any

from pyspark.sql import DataFrame, SparkSession

from spark_mnist import errors, options
from spark_mnist.fitting import results
from spark_mnist.store import checkpoints, location, model_store

logger = logging.getLogger(__name__)

MODELS_RESULT = (
    "name string, version int, epochs int, losses map<string,double>, "
    "metrics map<string,double>, created timestamp"
)


def open_for_version(version: int | None, store: str | None) -> model_store.Store:
    """The store, after a look at the arguments of a function on one version.

    Raises:
        errors.OptionError: A value is not allowed.
    """
    parsed = options.make(options.VersionOptions, {"version": version, "store": store})
    return location.open_store(parsed.store)


def models(store: str | None = None) -> list[results.ModelInfo]:
    """List the saved models, each by its newest version.

    Args:
        store: URL or path; else ``spark.mnist.store`` of the active session, else ``./models``.
    """
    parsed = options.make(options.Options, {"store": store})
    saved = location.open_store(parsed.store)
    found = []
    for name in saved.names():
        try:
            found.append(results.info(saved.manifest(name, saved.resolve_version(name))))
        except errors.DamagedModel as error:
            logger.warning("%s", error)
    return found


def describe(
    model_name: str, version: int | None = None, store: str | None = None
) -> results.ModelInfo:
    """Tell what a version is: network, columns, classes, how it was trained.

    Args:
        model_name: A saved model.
        version: Number of a version; else the newest.
        store: As for ``models``.

    Raises:
        errors.ModelNotFound: There is no such model or version.
        errors.DamagedModel: It cannot be understood.
    """
    saved = open_for_version(version, store)
    return results.info(saved.manifest(model_name, saved.resolve_version(model_name, version)))


def delete(model_name: str, version: int | None = None, store: str | None = None) -> list[int]:
    """Delete a version, or a model with all its versions. DataFrames made before stay valid.

    Args:
        model_name: A saved model.
        version: Number of a version; else all.
        store: As for ``models``.

    Returns:
        The numbers of the versions that are gone.

    Raises:
        errors.ModelNotFound: There is no such model or version.
    """
    saved = open_for_version(version, store)
    saved.resolve_version(model_name, version)
    gone = saved.versions(model_name) if version is None else [version]
    saved.remove(model_name, gone)
    return gone


def rollback(model_name: str, version: int, store: str | None = None) -> int:
    """Make an older version the newest again, by publishing a copy of it.

    Args:
        model_name: A saved model.
        version: Number of the version to go back to.
        store: As for ``models``.

    Returns:
        The number of the copy. Nothing is deleted.

    Raises:
        errors.ModelNotFound: There is no such model or version.
        errors.DamagedModel: The version is not what was written.
        errors.OptionError: No version is named.
    """
    if version is None:
        raise errors.OptionError("rollback needs the version to go back to, version=1")
    saved = open_for_version(version, store)
    manifest, files = saved.read(model_name, saved.resolve_version(model_name, version))
    same = {k: v for k, v in manifest.items() if k not in ("format", "files", model_store.DIGEST)}
    now = datetime.datetime.now(datetime.UTC).isoformat()

    def copy(number: int) -> dict[str, Any]:
        return {**same, "version": number, "parent": version, "created": now}

    return saved.publish(model_name, files, copy)


def publish(model_name: str, work: str, store: str | None = None) -> int:
    """Publish a trained model that ``fit`` could not, as ``errors.NotPublished`` tells.

    Args:
        model_name: What it is saved under.
        work: URL of the fit's work directory, as the error has it; it is removed afterwards.
        store: As for ``models``.

    Returns:
        The number of the new version.

    Raises:
        errors.ModelNotFound: There is no trained model in that directory.
        errors.DamagedModel: It is not what was written.
    """
    saved, work = open_for_version(None, store), model_store.validate_work_url(work)
    manifest, files = checkpoints.read_unpublished(work)
    parent = manifest["parent"] if manifest["name"] == model_name else None
    same = {**manifest, "name": model_name, "parent": parent}
    version = saved.publish(model_name, files, lambda number: {**same, "version": number})
    model_store.remove_work(work)
    return version


def models_table(spark: SparkSession, found: list[results.ModelInfo]) -> DataFrame:
    """Models as a DataFrame."""
    rows = [(m.name, m.version, m.epochs, m.losses, m.metrics, m.created) for m in found]
    return spark.createDataFrame(rows, MODELS_RESULT)


def info_table(spark: SparkSession, found: results.ModelInfo) -> DataFrame:
    """What is told of a version, as a DataFrame of properties."""
    described = dataclasses.asdict(found)
    text = {
        k: v if isinstance(v, str) else json.dumps(v, default=str) for k, v in described.items()
    }
    return spark.createDataFrame([*text.items()], "property string, value string")
