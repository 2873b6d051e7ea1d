"""Spark ML: estimators and their models for pipelines and cross-validation.

Runs on: driver.
"""

from spark_mnist.ml.classifier import MnistClassifier, MnistClassifierModel
from spark_mnist.ml.regressor import MnistRegressor, MnistRegressorModel

__all__ = ["MnistClassifier", "MnistClassifierModel", "MnistRegressor", "MnistRegressorModel"]
