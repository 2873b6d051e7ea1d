"""``fit`` and ``predict`` as stages of Spark ML: in a ``Pipeline``, under a ``CrossValidator``.

No second way to train: the estimator calls ``api.fit``, and its model is the version that this
published. Runs on the driver.
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

from spark_mnist import api, errors
from spark_mnist.cluster import session, signals
from spark_mnist.core import plan
from spark_mnist.fitting import results
from spark_mnist.launch import launcher
from spark_mnist.ml.params import FitParams
from spark_mnist.scoring import broadcast, score_columns
from spark_mnist.store import location, manifests, model_store

BATCH = 1024
"""Rows of one call of the model."""
CONTENT = "file string, content binary, part int"
"""How a saved model's files lie in its Parquet: in parts, as Spark's tasks can carry them.

The first releases wrote each file whole, and no ``part``.
"""


class MnistClassifierModel(Model, FitParams, MLWritable, MLReadable["MnistClassifierModel"]):
    """A trained model as a Transformer; a later fit or delete in the store does not change it.

    ``transform`` is lazy. It keeps all columns and rows and adds ``rawPredictionCol`` (Vector, the
    logarithms of the probabilities), ``probabilityCol`` (Vector) and ``predictionCol`` (double); a
    column whose name is set to ``""`` is left out.

    Args:
        manifest: Of the version.
        weights: Its file of that name.
        model_fn: The user's function, where only that can make the network.
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
        """What is told of the version, as ``describe`` does."""
        return results.info(self._manifest)

    def write(self) -> MLWriter:
        """A writer of all that ``load`` needs.

        Raises:
            errors.ModelMismatch: Only the user's function can make the network.
        """
        _, network, _ = manifests.described(self._manifest)
        manifests.check_makeable(self._manifest["name"], network, None)
        return _ModelWriter(self)

    @classmethod
    def read(cls) -> MLReader[MnistClassifierModel]:
        """A reader of what ``write`` wrote."""
        return _ModelReader()

    def _transform(self, dataset: DataFrame) -> DataFrame:
        session.check_input(dataset, streams=True)
        input_spec, network, _ = manifests.described(self._manifest)
        if len(input_spec.features) == 1:
            input_spec = dataclasses.replace(input_spec, features=(self.getFeaturesCol(),))
        saved = manifests.Saved(input_spec, network, {plan.WEIGHTS: self._weights}, self._model_fn)
        scores = score_columns.probabilities(dataset, saved, BATCH, self.getOrDefault("mode"))
        return _added(dataset, scores, self._outputs(dataset, input_spec))

    def _outputs(
        self, dataset: DataFrame, input_spec: plan.InputSpec
    ) -> dict[str, Callable[[Column], Column]]:
        """The columns to add, each with what makes it of the probabilities."""
        columns = {
            self.getRawPredictionCol(): _raw,
            self.getProbabilityCol(): _vector,
            self.getPredictionCol(): lambda scores: _prediction(scores, input_spec),
        }
        columns.pop("", None)
        there = {name.lower() for name in dataset.columns}
        taken = [name for name in columns if name.lower() in there]
        if taken:
            raise errors.ColumnTaken(
                f"the input has a column {taken[0]!r} already; rename or drop it, or set another "
                "name for what the model adds"
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
        given = self.given()
        session.check_input(dataset)
        store = location.open_store(given.get("store"), dataset.sparkSession)
        name = self.getModelName()
        with (
            signals.unwound(),
            launcher.turn(),
        ):  # else a fit of another thread with keep=1 could delete the version
            result = api.fit(dataset, name, **given)
            saved = manifests.saved(store, name, result.version, given.get("network"))
            manifest = store.manifest(name, result.version)
        model = MnistClassifierModel(manifest, saved.files[plan.WEIGHTS], saved.model_fn)
        self._copyValues(model)
        if not isinstance(given.get("network", ""), str):
            model.clear(model.getParam("network"))  # metadata is JSON, and the model has it already
        return model


class _ModelWriter(MLWriter):
    """Writes Spark ML's metadata, and a version's manifest and weights as Parquet."""

    def __init__(self, model: MnistClassifierModel) -> None:
        super().__init__()
        self._model = model

    def saveImpl(self, path: str) -> None:
        """Write below ``path``."""
        DefaultParamsWriter.saveMetadata(self._model, path, self.sparkSession.sparkContext)
        manifest = json.dumps(self._model._manifest).encode()
        for file, content in (
            (model_store.MANIFEST, manifest),
            (plan.WEIGHTS, self._model._weights),
        ):
            for number, part in enumerate(broadcast.split(content)):
                row = self.sparkSession.createDataFrame([(file, part, number)], CONTENT)
                row.coalesce(1).write.mode("append").parquet(f"{path}/data")


class _ModelReader(MLReader[MnistClassifierModel]):
    """Reads what ``_ModelWriter`` wrote, and checks it."""

    def load(self, path: str) -> MnistClassifierModel:
        """Read a model.

        Raises:
            errors.DamagedModel: Its files are not what was written.
        """
        metadata = DefaultParamsReader.loadMetadata(path, self.sparkSession.sparkContext)
        data = self.sparkSession.read.schema(CONTENT).parquet(f"{path}/data")
        parts: dict[str, list[bytes]] = collections.defaultdict(list)
        # Part by part: Spark holds what one job collects in the driver's heap, several times.
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


def _added(
    dataset: DataFrame, scores: Column, columns: Mapping[str, Callable[[Column], Column]]
) -> DataFrame:
    """Score once, whatever is made of the scores."""
    found = dataset.select("*", scores.alias(score_columns.SCORES))
    added = [make(F.col(score_columns.SCORES)).alias(name) for name, make in columns.items()]
    return found.select("*", *added).drop(score_columns.SCORES)


def _vector(scores: Column) -> Column:
    return F.when(scores.isNotNull(), array_to_vector(scores))


def _prediction(scores: Column, input_spec: plan.InputSpec) -> Column:
    """Return the class as Spark's evaluators compare it: the label's number where it is one."""
    predicted = score_columns.predicted(scores)
    label = (
        score_columns.class_name(predicted, input_spec)
        if input_spec.has_integer_names
        else predicted
    )
    return label.cast("double")


def _raw(scores: Column) -> Column:
    return _vector(F.transform(scores, lambda p: F.log(F.greatest(p, F.lit(score_columns.LEAST)))))
