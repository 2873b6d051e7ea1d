"""``fit`` and ``predict`` as stages of Spark ML: in a ``Pipeline``, under a ``CrossValidator``.

The estimator has no training of its own: it calls ``api.fit``, and its model is the version that
``api.fit`` published. Runs on: driver.
"""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

from pyspark.ml import Estimator, Model
from pyspark.ml.functions import array_to_vector
from pyspark.ml.util import (
    DefaultParamsReadable,
    DefaultParamsReader,
    DefaultParamsWritable,
    DefaultParamsWriter,
    MLReadable,
    MLReader,
    MLWritable,
    MLWriter,
)
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from spark_mnist import api, errors, options
from spark_mnist.cluster import session, signals
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


class MnistClassifierModel(Model, FitParams, MLWritable, MLReadable["MnistClassifierModel"]):
    """Trained model as a Transformer; a later fit or delete in the store does not change it.

    ``transform`` is lazy. It keeps all columns and rows and adds ``rawPredictionCol`` (Vector, the
    logarithms of the probabilities), ``probabilityCol`` (Vector) and ``predictionCol`` (double); a
    column whose name is set to ``""`` is left out.

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
    def read(cls) -> MLReader[MnistClassifierModel]:
        """Return a reader of the data that ``write`` wrote."""
        return _ModelReader()

    def _transform(self, dataset: DataFrame) -> DataFrame:
        session.check_input(dataset, streams=True)
        input_spec, network, _ = manifests.parse(self._manifest)
        if len(input_spec.features) == 1:
            input_spec = dataclasses.replace(input_spec, features=(self.getFeaturesCol(),))
        weights = {plan.WEIGHTS: self._weights}
        saved_version = manifests.SavedModel(input_spec, network, weights, self._model_fn)
        option_values = {"mode": self.getOrDefault("mode")} if self.isSet("mode") else {}
        settings = session.settings(dataset.sparkSession)
        mode = options.build(options.PredictOptions, option_values, settings).mode
        scores = score_columns.probabilities(dataset, saved_version, BATCH_ROWS, mode)
        return _add_columns(dataset, scores, self._output_columns(dataset, input_spec))

    def _output_columns(
        self, dataset: DataFrame, input_spec: plan.InputSpec
    ) -> dict[str, Callable[[Column], Column]]:
        """Return the names of the columns to add, each with its function of the probabilities.

        Raises:
            errors.ColumnTaken: The input has a column of such a name.
        """
        columns = {
            self.getRawPredictionCol(): _log_vector,
            self.getProbabilityCol(): _vector,
            self.getPredictionCol(): lambda scores: _prediction(scores, input_spec),
        }
        columns.pop("", None)
        input_names = {name.lower() for name in dataset.columns}
        conflicts = [name for name in columns if name.lower() in input_names]
        if conflicts:
            raise errors.ColumnTaken(
                f"the input has a column {conflicts[0]!r} already; rename or drop it, or set "
                "another name for what the model adds"
            )
        return columns


class MnistClassifier(
    Estimator[MnistClassifierModel],
    FitParams,
    DefaultParamsWritable,
    DefaultParamsReadable["MnistClassifier"],
):
    """``spark_mnist.fit`` as an Estimator.

    Its Params are Spark ML's ``featuresCol``, ``labelCol``, ``predictionCol``, ``probabilityCol``,
    ``rawPredictionCol``, ``validationIndicatorCol`` and ``seed``, ``modelName``, and the other
    options of ``fit`` as Spark ML writes names: ``batchSize``, ``learningRate``, ...

    Args:
        **params: Params by name, as for ``setParams``.
    """

    def __init__(self, **params: Any) -> None:
        super().__init__()
        self.setParams(**params)

    def _fit(self, dataset: DataFrame) -> MnistClassifierModel:
        option_values = self.option_values()
        session.check_input(dataset)
        store = location.open_store(option_values.get("store"), dataset.sparkSession)
        name = self.getModelName()
        with (
            signals.interruptible(),
            launcher.turn(),
        ):  # without the turn, a fit of another thread with keep=1 could delete the version
            result = api.fit(dataset, name, **option_values)
            network = option_values.get("network")
            saved_version = manifests.load(store, name, result.version, network)
            manifest = store.manifest(name, result.version)
        weights = saved_version.files[plan.WEIGHTS]
        model = MnistClassifierModel(manifest, weights, saved_version.model_fn)
        self._copyValues(model)
        if not isinstance(option_values.get("network", ""), str):
            model.clear(model.getParam("network"))  # metadata is JSON, and the model has it already
        return model


class _ModelWriter(MLWriter):
    """Writer of Spark ML's metadata, and of a version's manifest and weights as Parquet."""

    def __init__(self, model: MnistClassifierModel) -> None:
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


class _ModelReader(MLReader[MnistClassifierModel]):
    """Reader of the data that ``_ModelWriter`` wrote; it checks sizes and hashes."""

    def load(self, path: str) -> MnistClassifierModel:
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
        model = MnistClassifierModel(manifest, weights)
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


def _vector(scores: Column) -> Column:
    return F.when(scores.isNotNull(), array_to_vector(scores))


def _prediction(scores: Column, input_spec: plan.InputSpec) -> Column:
    """Return the class as Spark's evaluators compare it: the label, where labels are numbers."""
    class_index = score_columns.predicted_class(scores)
    label = (
        score_columns.class_name(class_index, input_spec)
        if input_spec.has_integer_names
        else class_index
    )
    return label.cast("double")


def _log_vector(scores: Column) -> Column:
    return _vector(F.transform(scores, lambda p: F.log(F.greatest(p, F.lit(score_columns.LEAST)))))
