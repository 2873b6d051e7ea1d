"""Spark ML: an estimator and its model for pipelines and cross-validation.

Runs on: driver.
"""

from spark_mnist.ml.classifier import MnistClassifier, MnistClassifierModel

__all__ = ["MnistClassifier", "MnistClassifierModel"]
