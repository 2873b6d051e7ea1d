"""Classifiers of Spark ML: in a ``Pipeline``, under a ``CrossValidator``. Runs on: driver."""

from __future__ import annotations

from typing import Any

from pyspark.ml.functions import array_to_vector
from pyspark.ml.util import DefaultParamsReadable, DefaultParamsWritable
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from spark_mnist import errors
from spark_mnist.core import plan
from spark_mnist.ml.params import ClassifierParams
from spark_mnist.ml.stages import ColumnFn, StoreEstimator, StoreModel
from spark_mnist.scoring import measures, score_columns


class MnistClassifierModel(StoreModel, ClassifierParams):
    """Trained classifier as a Transformer; a later fit or delete in the store does not change it.

    ``transform`` is lazy. It keeps all columns and rows and adds ``rawPredictionCol`` (Vector, the
    logarithms of the probabilities), ``probabilityCol`` (Vector) and ``predictionCol`` (double); a
    column whose name is set to ``""`` is left out. With ``thresholds`` the prediction is the class
    whose probability divided by its threshold is largest.

    Args:
        manifest: Manifest of the version.
        weights: Content of the version's weights file.
        model_fn: The user's function, where only this function can make the network.
    """

    def _columns(self, output: plan.Output) -> dict[str, ColumnFn]:
        _check_params(self)
        thresholds = self.getOrDefault("thresholds") if self.isSet("thresholds") else None
        if thresholds and len(thresholds) != output.size:
            raise errors.OptionError(
                f"thresholds has {len(thresholds)} numbers, and there are {output.size} classes"
            )
        return {
            self.getRawPredictionCol(): lambda scores: _log_vector(_probabilities(scores, output)),
            self.getProbabilityCol(): lambda scores: _vector(_probabilities(scores, output)),
            self.getPredictionCol(): lambda scores: _prediction(scores, output, thresholds),
        }


def _check_params(params: ClassifierParams) -> None:
    """Check Params that the result of ``transform`` depends on.

    Raises:
        errors.OptionError: Two columns have one name, or a threshold is not allowed.
    """
    columns = {
        "rawPredictionCol": params.getRawPredictionCol(),
        "probabilityCol": params.getProbabilityCol(),
        "predictionCol": params.getPredictionCol(),
    }
    names = [name for name in columns.values() if name]
    if len(set(names)) < len(names):
        raise errors.OptionError(f"the columns of a result need different names, not {columns}")
    thresholds = params.getOrDefault("thresholds") if params.isSet("thresholds") else []
    if any(limit < 0 for limit in thresholds) or [*thresholds].count(0) > 1:
        raise errors.OptionError(
            f"thresholds must be >= 0, and one of them at most 0, not {[*thresholds]}"
        )


class MnistClassifier(
    StoreEstimator[MnistClassifierModel],
    ClassifierParams,
    DefaultParamsWritable,
    DefaultParamsReadable["MnistClassifier"],
):
    """``spark_mnist.fit`` as an Estimator of classes, or with ``task="binary"`` of two.

    Its Params are Spark ML's ``featuresCol``, ``labelCol``, ``weightCol``, ``predictionCol``,
    ``probabilityCol``, ``rawPredictionCol``, ``thresholds``, ``validationIndicatorCol`` and
    ``seed``, ``modelName``, and the other options of ``fit`` as Spark ML writes names:
    ``batchSize``, ``learningRate``, ...

    Args:
        **params: Params by name, as for ``setParams``.
    """

    tasks = plan.CLASS_TASKS
    model_class = MnistClassifierModel

    def _fit(self, dataset: DataFrame) -> MnistClassifierModel:
        _check_params(self)
        return super()._fit(dataset)


def _probabilities(scores: Column, output: plan.Output) -> Column:
    return score_columns.probability(scores, output)


def _vector(numbers: Column) -> Column:
    return F.when(numbers.isNotNull(), array_to_vector(numbers))


def _prediction(scores: Column, output: plan.Output, thresholds: Any) -> Column:
    """Return the class as Spark's evaluators compare it: the label, where labels are numbers."""
    probabilities = _probabilities(scores, output)
    if thresholds:
        limits = F.array(*(F.lit(float(limit)) for limit in thresholds))
        scaled = F.zip_with(probabilities, limits, _scaled)
        class_index = measures.predicted_class(scaled)
    elif output.task == plan.BINARY:
        class_index = score_columns.prediction(scores, output)
    else:
        class_index = measures.predicted_class(probabilities)
    label = (
        score_columns.class_name(class_index, output) if output.has_integer_names else class_index
    )
    return label.cast("double")


def _scaled(probability: Column, limit: Column) -> Column:
    """Return a probability divided by its threshold; infinite where the threshold is 0."""
    quotient = F.when(limit > 0, probability / limit)
    return F.coalesce(quotient, F.when(probability > 0, F.lit(float("inf"))), F.lit(0.0))


def _log_vector(numbers: Column) -> Column:
    least = F.lit(score_columns.LEAST)
    return _vector(F.transform(numbers, lambda p: F.log(F.greatest(p, least))))
