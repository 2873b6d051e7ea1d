"""Regressors of Spark ML: in a ``Pipeline``, under a ``CrossValidator``. Runs on: driver."""

from __future__ import annotations

from pyspark.ml.functions import array_to_vector
from pyspark.ml.util import DefaultParamsReadable, DefaultParamsWritable
from pyspark.sql import Column
from pyspark.sql import functions as F

from spark_mnist.core import plan
from spark_mnist.ml.stages import ColumnFn, StoreEstimator, StoreModel


class MnistRegressorModel(StoreModel):
    """Trained regressor as a Transformer; a later fit or delete in the store does not change it.

    ``transform`` is lazy. It keeps all columns and rows and adds ``predictionCol``: a double, or a
    Vector where a row has several numbers.

    Args:
        manifest: Manifest of the version.
        weights: Content of the version's weights file.
        model_fn: The user's function, where only this function can make the network.
    """

    def _columns(self, output: plan.Output) -> dict[str, ColumnFn]:
        def predict(scores: Column) -> Column:
            if output.size == 1:
                return F.get(scores, 0)
            return F.when(scores.isNotNull(), array_to_vector(scores))

        return {self.getPredictionCol(): predict}


class MnistRegressor(
    StoreEstimator[MnistRegressorModel],
    DefaultParamsWritable,
    DefaultParamsReadable["MnistRegressor"],
):
    """``spark_mnist.fit`` with ``task="regression"`` as an Estimator.

    Its Params are Spark ML's ``featuresCol``, ``labelCol``, ``weightCol``, ``predictionCol``,
    ``validationIndicatorCol`` and ``seed``, ``modelName``, and the other options of ``fit`` as
    Spark ML writes names: ``batchSize``, ``learningRate``, ...

    Args:
        **params: Params by name, as for ``setParams``.
    """

    tasks = (plan.REGRESSION,)
    model_class = MnistRegressorModel
