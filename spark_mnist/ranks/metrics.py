"""Loss and accuracy as sums over rows, which merge exactly over ranks. Runs on: rank."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from spark_mnist.core import plan
from spark_mnist.ranks import collectives


# Keras ships no types, so mypy takes its Metric for Any; strict mode forbids inheriting from Any.
class RowMean(keras.metrics.Metric):  # type: ignore[misc]
    """Mean of a value over real rows, stored as sum and count so that ranks can be merged."""

    def __init__(self, name: str, value: Any) -> None:
        super().__init__(name=name)
        self.value = value
        self.sum = self.add_variable((), "zeros", dtype="float64", name="sum")
        self.count = self.add_variable((), "zeros", dtype="float64", name="count")

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        """Count each row whose weight is not zero once."""
        mask = tf.cast(sample_weight > 0, tf.float64)
        self.sum.assign_add(tf.reduce_sum(tf.cast(self.value(y_true, y_pred), tf.float64) * mask))
        self.count.assign_add(tf.reduce_sum(mask))

    def result(self) -> Any:
        """Return the mean over the rows counted so far on this rank."""
        return tf.math.divide_no_nan(self.sum.value, self.count.value)


class Metrics:
    """Loss and accuracy, the two metrics that every fit reports."""

    def __init__(self) -> None:
        cross_entropy = keras.losses.sparse_categorical_crossentropy
        accuracy = keras.metrics.sparse_categorical_accuracy
        self.loss = RowMean("cross_entropy", cross_entropy)
        self.accuracy = RowMean("accuracy", accuracy)

    def rows(self) -> int:
        """Return the number of rows counted on this rank since the last reset, each once."""
        return int(self.loss.count.numpy())

    def loss_here(self) -> float:
        """Return the loss over the rows counted on this rank since the last reset."""
        return float(self.loss.result())

    def means(self, prefix: str = "") -> dict[str, float]:
        """Return loss and accuracy over the rows of all ranks: sums over rows divided by rows."""
        sums = [self.loss.sum, self.accuracy.sum, self.loss.count]
        loss, correct, rows = collectives.allreduce_sum([float(value.numpy()) for value in sums])
        return {f"{prefix}loss": loss / rows, f"{prefix}accuracy": correct / rows}


def record(epoch: int, means: dict[str, float]) -> plan.EpochRecord:
    """Make one row of the table that ``fit`` returns."""
    losses = {name: value for name, value in means.items() if name.endswith("loss")}
    metrics = {name: value for name, value in means.items() if name not in losses}
    return plan.EpochRecord(epoch=epoch, losses=losses, metrics=metrics)
