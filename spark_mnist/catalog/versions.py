"""``models``, ``describe``, ``delete``, ``rollback``, ``publish``: operations on saved models.

No operation reads rows. The setting of the store comes from the active Spark session, where there
is one. Runs on: driver.
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
    """Check the arguments of a function on one version, and return the store.

    Raises:
        errors.OptionError: A value is not allowed.
    """
    version_options = options.build(options.VersionOptions, {"version": version, "store": store})
    return location.open_store(version_options.store)


def models(store: str | None = None) -> list[results.ModelInfo]:
    """List the saved models, each by its newest version.

    Args:
        store: URL or path; else ``spark.mnist.store`` of the active session, else ``./models``.
    """
    store_options = options.build(options.Options, {"store": store})
    store_handle = location.open_store(store_options.store)
    infos = []
    for name in store_handle.names():
        try:
            version = store_handle.resolve_version(name)
            infos.append(results.info(store_handle.manifest(name, version)))
        except errors.DamagedModel as error:
            logger.warning("%s", error)
    return infos


def describe(
    model_name: str, version: int | None = None, store: str | None = None
) -> results.ModelInfo:
    """Describe a version: its network, columns and classes, and how it was trained.

    Args:
        model_name: A saved model.
        version: Number of a version; else the newest.
        store: As for ``models``.

    Raises:
        errors.ModelNameError: The name cannot be a model's.
        errors.ModelNotFound: There is no such model or version.
        errors.DamagedModel: The manifest of the version cannot be understood.
    """
    store_handle = open_for_version(version, store)
    number = store_handle.resolve_version(model_name, version)
    return results.info(store_handle.manifest(model_name, number))


def delete(model_name: str, version: int | None = None, store: str | None = None) -> list[int]:
    """Delete a version, or a model with all its versions.

    DataFrames that ``predict`` returned before stay valid.

    Args:
        model_name: A saved model.
        version: Number of a version; else all.
        store: As for ``models``.

    Returns:
        The numbers of the deleted versions.

    Raises:
        errors.ModelNameError: The name cannot be a model's.
        errors.ModelNotFound: There is no such model or version.
    """
    store_handle = open_for_version(version, store)
    store_handle.resolve_version(model_name, version)
    numbers = store_handle.versions(model_name) if version is None else [version]
    store_handle.remove(model_name, numbers)
    return numbers


def rollback(model_name: str, version: int, store: str | None = None) -> int:
    """Publish a copy of an older version, which makes the copy the newest version.

    Args:
        model_name: A saved model.
        version: Number of the version to go back to.
        store: As for ``models``.

    Returns:
        The number of the copy. Nothing is deleted.

    Raises:
        errors.ModelNameError: The name cannot be a model's.
        errors.ModelNotFound: There is no such model or version.
        errors.DamagedModel: The version's files differ from those that were written.
        errors.OptionError: ``version`` is missing.
    """
    if version is None:
        raise errors.OptionError("rollback needs the version to go back to, version=1")
    store_handle = open_for_version(version, store)
    source = store_handle.resolve_version(model_name, version)
    manifest = store_handle.manifest(model_name, source)
    files = store_handle.references(model_name, source)
    fields = {k: v for k, v in manifest.items() if k not in ("format", "files", model_store.DIGEST)}
    now = datetime.datetime.now(datetime.UTC).isoformat()

    def describe_copy(number: int) -> dict[str, Any]:
        return {**fields, "version": number, "parent": version, "created": now}

    return store_handle.publish(model_name, files, describe_copy)


def publish(model_name: str, work: str, store: str | None = None) -> int:
    """Publish a trained model that ``fit`` could not publish; see ``errors.NotPublished``.

    Args:
        model_name: The name to save the model under.
        work: URL of the fit's work directory, from the error. The directory is removed afterwards.
        store: As for ``models``.

    Returns:
        The number of the new version.

    Raises:
        errors.ModelNameError: The name cannot be a model's.
        errors.ModelNotFound: There is no trained model in that directory.
        errors.DamagedModel: The model's files differ from those that were written.
    """
    store_handle, work = open_for_version(None, store), model_store.validate_work_url(work)
    manifest, files = checkpoints.read_unpublished(work)
    parent = manifest["parent"] if manifest["name"] == model_name else None
    fields = {**manifest, "name": model_name, "parent": parent}
    version = store_handle.publish(model_name, files, lambda number: {**fields, "version": number})
    model_store.remove_work(work)
    return version


def models_table(spark: SparkSession, infos: list[results.ModelInfo]) -> DataFrame:
    """Return models as a DataFrame with one row for each."""
    rows = [(m.name, m.version, m.num_epochs, m.losses, m.metrics, m.created) for m in infos]
    return spark.createDataFrame(rows, MODELS_RESULT)


def info_table(spark: SparkSession, info: results.ModelInfo) -> DataFrame:
    """Return the description of a version as a DataFrame with one row for each property."""
    properties = dataclasses.asdict(info)
    properties["epochs"] = properties.pop("num_epochs")
    texts = {
        k: v if isinstance(v, str) else json.dumps(v, default=str) for k, v in properties.items()
    }
    return spark.createDataFrame([*texts.items()], "property string, value string")
