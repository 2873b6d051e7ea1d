"""Steps of training and validation: losses of all outputs, their gradients. Runs on: rank.

A step's loss is the mean over the rows of the step of all ranks: padding rows have weight 0, and
the weights of the other rows make up for them (see ``sharding``). Weights of rows and of classes
multiply a row's loss, as in Keras, and are not divided by their sum. Shape letters: B = rows of a
batch, K = numbers of a target.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from spark_mnist.core import plan
from spark_mnist.networks import objectives
from spark_mnist.ranks import collectives, metrics


class Objective:
    """Losses of a compiled model, and the steps that lower them.

    Args:
        model: The model, compiled with its optimizer.
        outputs: Outputs of the model.
        losses: Loss of each output, without a mean over rows.
        row_metrics: Metrics that each step updates.
        class_weight: Factors of the training rows' losses by class; {} where all are 1.
    """

    def __init__(
        self,
        model: keras.Model,
        outputs: Sequence[plan.Output],
        losses: Sequence[objectives.Loss],
        row_metrics: metrics.Metrics,
        class_weight: Mapping[int, float],
    ) -> None:
        self._model, self._outputs, self._losses = model, outputs, losses
        self._row_metrics = row_metrics
        self._class_weights: Any = None
        if class_weight:
            weights = [class_weight.get(number, 1.0) for number in range(outputs[0].size)]
            self._class_weights = tf.constant(weights, tf.float32)

    def train_step(self, batch: tuple[Any, ...]) -> None:
        """Update the weights by the gradient of one batch, as ``Shard.training`` gives it."""
        features, labels, step_weights, *row_weights = batch
        factors = [*row_weights]
        if self._class_weights is not None:
            classes = tf.cast(tf.reshape(labels, (-1,)), tf.int32)
            factors.append(tf.gather(self._class_weights, classes))
        targets = objectives.targets(self._outputs, labels)
        optimizer = self._model.optimizer
        with tf.GradientTape() as tape:
            values = objectives.by_output(self._outputs, self._model(features, training=True))
            losses = self._row_losses(targets, values, factors)
            total = sum(
                output.weight * loss for output, loss in zip(self._outputs, losses, strict=True)
            )
            mean = tf.reduce_sum(total * step_weights) / tf.cast(tf.size(step_weights), tf.float32)
            penalty = self._penalty()
            scaled = optimizer.scale_loss(mean + penalty)
        variables = self._model.trainable_weights
        optimizer.apply_gradients(zip(tape.gradient(scaled, variables), variables, strict=True))
        self._row_metrics.update(targets, values, losses, step_weights, penalty)

    def test_step(self, batch: tuple[Any, ...]) -> None:
        """Update the metrics with one batch, as ``Shard.validation`` gives it."""
        features, labels, step_weights, *row_weights = batch
        targets = objectives.targets(self._outputs, labels)
        values = objectives.by_output(self._outputs, self._model(features, training=False))
        losses = self._row_losses(targets, values, row_weights)
        self._row_metrics.update(targets, values, losses, step_weights, self._penalty())

    def _penalty(self) -> Any:
        """Return the sum of what the model's layers added to the loss in its last call."""
        return sum((tf.cast(loss, tf.float32) for loss in self._model.losses), tf.constant(0.0))

    def _row_losses(
        self, targets: Sequence[Any], values: Sequence[Any], factors: Sequence[Any]
    ) -> list[Any]:
        """Return the weighted loss of each row, ``[B]`` of each output."""
        losses = [
            loss(target, value)
            for loss, target, value in zip(self._losses, targets, values, strict=True)
        ]
        for factor in factors:
            losses = [loss * factor for loss in losses]
        return losses


def balanced_weights(classes: Iterable[npt.NDArray[Any]], count: int) -> dict[int, float]:
    """Return factors that give every class of the training rows the same weight together.

    Args:
        classes: Classes of this rank's training rows, part by part.
        count: Number of classes.

    Returns:
        Rows of all ranks divided by the number of classes and the rows of each class, by class.
    """
    local = sum(
        (np.bincount(part.astype(np.int64).ravel(), minlength=count) for part in classes),
        np.zeros(count, np.int64),
    )
    rows = collectives.allreduce_sum(local)
    present = sum(1 for number in rows if number)
    return {
        number: sum(rows) / (present * class_rows)
        for number, class_rows in enumerate(rows)
        if class_rows
    }
