"""What the stages of Spark ML share: ``fit`` and ``predict`` as an Estimator and a Model.

The estimators have no training of their own: they call ``api.fit``, and their models are the
versions that ``api.fit`` published. Runs on: driver.
"""

from __future__ import annotations

import abc
import collections
import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from pyspark.ml import Estimator, Model
from pyspark.ml.util import (
    DefaultParamsReader,
    DefaultParamsWriter,
    MLReadable,
    MLReader,
    MLWritable,
    MLWriter,
)
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from spark_mnist import api, errors, options
from spark_mnist.cluster import session, signals, worker_checks
from spark_mnist.core import plan
from spark_mnist.fitting import results
from spark_mnist.launch import launcher
from spark_mnist.ml.params import FitParams
from spark_mnist.scoring import broadcast, score_columns
from spark_mnist.store import location, manifests, model_store

BATCH_ROWS = 1024
"""Rows of one call of the model."""
FILE_SCHEMA = "file string, content binary, part int"
"""Schema of the Parquet data of a saved model, one row for each part of a file.

Files are split into parts so that Spark's tasks can carry them. The first releases wrote each file
whole, without the column ``part``.
"""


ColumnFn = Callable[[Column], Column]
"""Function from the model's outputs of a row to a new column."""


class StoreModel(Model, FitParams, MLWritable, MLReadable["StoreModel"]):
    """Version of a model as a Transformer; a later fit or delete in the store does not change it.

    Args:
        manifest: Manifest of the version.
        weights: Content of the version's weights file.
        model_fn: The user's function, where only this function can make the network.
    """

    def __init__(
        self,
        manifest: model_store.Manifest | None = None,
        weights: bytes = b"",
        model_fn: plan.ModelFn | None = None,
    ) -> None:
        super().__init__()
        self._manifest, self._weights, self._model_fn = manifest or {}, weights, model_fn

    @property
    def info(self) -> results.ModelInfo:
        """Return the description of the version, as ``describe`` does."""
        return results.info(self._manifest)

    def write(self) -> MLWriter:
        """Return a writer of the data that ``load`` needs.

        Raises:
            errors.ModelMismatch: Only the user's function can make the network.
        """
        _, network, _ = manifests.parse(self._manifest)
        manifests.check_makeable(self._manifest["name"], network, None)
        return _ModelWriter(self)

    @classmethod
    def read(cls) -> MLReader[Any]:
        """Return a reader of the data that ``write`` wrote."""
        return _ModelReader(cls)

    def _transform(self, dataset: DataFrame) -> DataFrame:
        session.check_input(dataset, streams=True)
        worker_checks.check(dataset.sparkSession, worker_checks.SCORING)
        input_spec, network, _ = manifests.parse(self._manifest)
        if len(input_spec.features) == 1:
            input_spec = dataclasses.replace(input_spec, features=(self.getFeaturesCol(),))
        weights = {plan.WEIGHTS: self._weights}
        saved_version = manifests.SavedModel(input_spec, network, weights, self._model_fn)
        option_values = {"mode": self.getOrDefault("mode")} if self.isSet("mode") else {}
        settings = session.settings(dataset.sparkSession)
        mode = options.build(options.PredictOptions, option_values, settings).mode
        columns = self._columns(network.heads[0])
        columns.pop("", None)
        _check_free(dataset, columns)
        scores = score_columns.outputs(dataset, saved_version, BATCH_ROWS, mode)
        return _add_columns(dataset, scores, columns)

    @abc.abstractmethod
    def _columns(self, output: plan.Output) -> dict[str, ColumnFn]:
        """Return the functions that make the new columns from the outputs, by their names."""


ModelT = TypeVar("ModelT", bound=StoreModel)


class StoreEstimator(Estimator[ModelT], FitParams):
    """``spark_mnist.fit`` as an Estimator."""

    tasks: tuple[str, ...]
    """Tasks that the estimator trains, the default first."""
    model_class: type[ModelT]
    """Class of the models that it makes."""

    def __init__(self, **params: Any) -> None:
        super().__init__()
        self.setParams(**params)

    def _fit(self, dataset: DataFrame) -> ModelT:
        option_values = self.option_values()
        task = option_values.setdefault("task", self.tasks[0])
        if task not in self.tasks or isinstance(option_values.get("label"), dict):
            raise errors.OptionError(
                f"{type(self).__name__} learns one output with task={' or '.join(self.tasks)}; "
                "spark_mnist.fit learns the others"
            )
        session.check_input(dataset)
        store = location.open_store(option_values.get("store"), dataset.sparkSession)
        name = self.getModelName()
        # A fit of another thread with keep=1 could otherwise delete the version.
        with signals.interruptible(), launcher.exclusive_fit():
            result = api.fit(dataset, name, **option_values)
            network = option_values.get("network")
            saved_version = manifests.load(store, name, result.version, network)
            manifest = store.manifest(name, result.version)
        weights = saved_version.files[plan.WEIGHTS]
        model = self.model_class(manifest, weights, saved_version.model_fn)
        self._copyValues(model)
        for param in [param for param in model.params if model.isSet(param)]:
            if _holds_functions(model.getOrDefault(param)):
                model.clear(param)  # metadata is JSON, and scoring needs none of them
        return model


def _holds_functions(value: Any) -> bool:
    """Return whether a value is, or has among its items, something that JSON cannot hold."""
    if isinstance(value, Mapping):
        return any(map(_holds_functions, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_holds_functions, value))
    return not isinstance(value, str | int | float | bool | None)


def _check_free(dataset: DataFrame, columns: Iterable[str]) -> None:
    """Refuse an input that has a column of a name that the model adds.

    Raises:
        errors.ColumnTaken: The input has a column of such a name.
    """
    input_names = {name.lower() for name in dataset.columns}
    conflicts = [name for name in columns if name.lower() in input_names]
    if conflicts:
        raise errors.ColumnTaken(
            f"the input has a column {conflicts[0]!r} already; rename or drop it, or set "
            "another name for what the model adds"
        )


class _ModelWriter(MLWriter):
    """Writer of Spark ML's metadata, and of a version's manifest and weights as Parquet."""

    def __init__(self, model: StoreModel) -> None:
        super().__init__()
        self._model = model

    def saveImpl(self, path: str) -> None:
        """Write the model below ``path``."""
        DefaultParamsWriter.saveMetadata(self._model, path, self.sparkSession.sparkContext)
        manifest = json.dumps(self._model._manifest).encode()
        for file, content in (
            (model_store.MANIFEST, manifest),
            (plan.WEIGHTS, self._model._weights),
        ):
            for number, part in enumerate(broadcast.split(content)):
                row = self.sparkSession.createDataFrame([(file, part, number)], FILE_SCHEMA)
                row.coalesce(1).write.mode("append").parquet(f"{path}/data")


class _ModelReader(MLReader[StoreModel]):
    """Reader of the data that ``_ModelWriter`` wrote; it checks sizes and hashes.

    Args:
        model_class: Class of the model.
    """

    def __init__(self, model_class: type[StoreModel]) -> None:
        super().__init__()
        self._model_class = model_class

    def load(self, path: str) -> StoreModel:
        """Read a model.

        Raises:
            errors.DamagedModel: The files differ from those that were written.
        """
        metadata = DefaultParamsReader.loadMetadata(path, self.sparkSession.sparkContext)
        data = self.sparkSession.read.schema(FILE_SCHEMA).parquet(f"{path}/data")
        parts: dict[str, list[bytes]] = collections.defaultdict(list)
        # One job for each part: the driver's heap holds several copies of a job's result.
        for key in data.select("file", "part").orderBy("file", "part").collect():
            part = F.col("part").eqNullSafe(F.lit(key.part).cast("int"))
            (row,) = data.where((F.col("file") == key.file) & part).select("content").collect()
            parts[key.file].append(bytes(row.content))
        files = {file: b"".join(content) for file, content in parts.items()}
        if not {model_store.MANIFEST, plan.WEIGHTS} <= files.keys():
            raise errors.DamagedModel(f"{path} is no saved model: it has only {sorted(files)}")
        manifest, weights = json.loads(files[model_store.MANIFEST]), files[plan.WEIGHTS]
        try:
            model_store.check_digest(manifest)
        except errors.DamagedModel as error:
            raise errors.DamagedModel(f"{path}: {error}") from None
        if model_store.stamp(weights) != manifest["files"][plan.WEIGHTS]:
            raise errors.DamagedModel(f"{path}: {plan.WEIGHTS} differs from its sha256")
        model = self._model_class(manifest, weights)
        model._resetUid(metadata["uid"])
        DefaultParamsReader.getAndSetParams(model, metadata)
        return model


def _add_columns(
    dataset: DataFrame, scores: Column, columns: Mapping[str, Callable[[Column], Column]]
) -> DataFrame:
    """Add columns that are functions of the scores; each row is scored once for all of them."""
    scored_rows = dataset.select("*", scores.alias(score_columns.SCORES))
    new_columns = [
        column_fn(F.col(score_columns.SCORES)).alias(name) for name, column_fn in columns.items()
    ]
    return scored_rows.select("*", *new_columns).drop(score_columns.SCORES)
