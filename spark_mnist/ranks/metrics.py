"""Metrics of an epoch as sums over rows, which merge exactly over ranks. Runs on: rank.

Shape letters: B = rows of a batch, C = classes or labels, K = numbers of a target.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from spark_mnist.core import figures, plan
from spark_mnist.networks import objectives
from spark_mnist.ranks import collectives


class RowMetric(Protocol):
    """Figures of one output as sums over rows."""

    @property
    def state(self) -> list[tf.Variable]:
        """Sums over the rows so far; those of several ranks add up."""

    def update(self, target: Any, value: Any) -> None:
        """Add rows: targets and outputs ``[B, ...]``."""

    def results(self, sums: Sequence[npt.NDArray[Any]]) -> Mapping[str, float]:
        """Return the figures of the sums of all ranks, in the order of ``state``."""


class _Sums:
    """State of a metric: one vector of float64."""

    def __init__(self, size: int) -> None:
        self._sums = tf.Variable(tf.zeros(size, tf.float64))

    @property
    def state(self) -> list[tf.Variable]:
        """Return the vector."""
        return [self._sums]

    def add(self, *values: Any) -> None:
        """Add values, which together have the size of the vector."""
        flat = [tf.reshape(tf.cast(value, tf.float64), (-1,)) for value in values]
        self._sums.assign_add(tf.concat(flat, 0))


class ClassAccuracy(_Sums):
    """Share of the rows whose class is predicted."""

    def __init__(self, output: plan.Output) -> None:
        super().__init__(2)

    def update(self, target: Any, value: Any) -> None:
        """Add classes ``[B]`` and probabilities ``[B, C]``."""
        hits = tf.argmax(value, axis=1, output_type=tf.int32) == target
        self.add(tf.math.count_nonzero(hits), tf.size(target))

    def results(self, sums: Sequence[npt.NDArray[Any]]) -> Mapping[str, float]:
        """Return ``accuracy``."""
        correct, rows = sums[0]
        return {"accuracy": correct / rows}


class BinaryCounts(_Sums):
    """Accuracy, precision and recall of one of two classes."""

    def __init__(self, output: plan.Output) -> None:
        super().__init__(4)

    def update(self, target: Any, value: Any) -> None:
        """Add flags and probabilities, ``[B, 1]`` each."""
        is_positive, is_predicted = target > plan.THRESHOLD, value > plan.THRESHOLD
        both, either = is_positive & is_predicted, is_positive | is_predicted
        counts = [
            tf.math.count_nonzero(flags) for flags in (both, is_positive, is_predicted, either)
        ]
        rows = tf.size(target, tf.int64)
        self.add(counts[0], counts[1], counts[2], rows - counts[3] + counts[0])

    def results(self, sums: Sequence[npt.NDArray[Any]]) -> Mapping[str, float]:
        """Return ``accuracy``, ``precision`` and ``recall``; a quotient of no rows is 0."""
        true_positives, positives, predicted, equal = sums[0]
        true_negatives = equal - true_positives
        rows = positives + predicted - true_positives + true_negatives
        return {
            "accuracy": equal / rows,
            **figures.precision_and_recall(true_positives, positives, predicted),
        }


class LabelCounts(_Sums):
    """Accuracy and F1 of labels, of which a row can have any."""

    def __init__(self, output: plan.Output) -> None:
        super().__init__(3 * output.size + 2)

    def update(self, target: Any, value: Any) -> None:
        """Add flags and probabilities, ``[B, C]`` each."""
        is_positive, is_predicted = target > plan.THRESHOLD, value > plan.THRESHOLD
        counts = [
            tf.math.count_nonzero(flags, axis=0)
            for flags in (is_positive & is_predicted, is_positive, is_predicted)
        ]
        equal = tf.math.count_nonzero(is_positive == is_predicted)
        self.add(*counts, equal, tf.size(target))

    def results(self, sums: Sequence[npt.NDArray[Any]]) -> Mapping[str, float]:
        """Return ``accuracy`` over all labels of all rows, ``f1_micro`` and ``f1_macro``."""
        true_positives, positives, predicted = np.split(sums[0][:-2], 3)
        equal, flags = sums[0][-2:]
        return {"accuracy": equal / flags, **figures.f1(true_positives, positives, predicted)}


class NumberErrors(_Sums):
    """Errors of numbers, in the units of the label.

    Args:
        output: The output.
        center: Numbers near those of the rows, from which they are counted, so that squares of
            large numbers keep their differences.
    """

    def __init__(self, output: plan.Output, center: npt.NDArray[Any] | None = None) -> None:
        super().__init__(4 * output.size + 1)
        self._deviation = np.asarray(output.deviation or [1.0] * output.size)
        self._center = np.zeros(output.size) if center is None or output.mean else center

    def update(self, target: Any, value: Any) -> None:
        """Add numbers and predictions, ``[B, K]`` each, as they are learned."""
        target, value = tf.cast(target, tf.float64), tf.cast(value, tf.float64)
        error, target = value - target, target - self._center
        sums = [
            tf.reduce_sum(numbers, axis=0)
            for numbers in (error**2, tf.abs(error), target, target**2)
        ]
        self.add(*sums, tf.shape(target)[0])

    def results(self, sums: Sequence[npt.NDArray[Any]]) -> Mapping[str, float]:
        """Return ``mse``, ``rmse``, ``mae`` and ``r2``, means over the numbers of a row."""
        squares, sizes, targets, target_squares = np.split(sums[0][:-1], 4)
        rows, unit = sums[0][-1], self._deviation
        spread = target_squares - targets**2 / rows
        return figures.regression_metrics(squares * unit**2, sizes * unit, spread * unit**2, rows)


class KerasMetric:
    """A metric of Keras, whose state adds up over ranks.

    Args:
        output: The output that it measures.
        metric: The metric.
    """

    def __init__(self, output: plan.Output, metric: keras.metrics.Metric) -> None:
        self._output, self._metric = output, metric
        # Some metrics make their variables with the first rows.
        shape = (1, output.units)
        target = (1,) if output.task == plan.CLASSIFICATION else shape
        self.update(tf.zeros(target, tf.int32 if len(target) == 1 else tf.float32), tf.zeros(shape))
        metric.reset_state()

    @property
    def state(self) -> list[Any]:
        """Variables of the metric."""
        return [variable.value for variable in self._metric.variables]

    def update(self, target: Any, value: Any) -> None:
        """Add rows; numbers come in the units of the label."""
        target = objectives.metric_target(self._output, self._metric, target)
        if self._output.mean:
            target, value = (
                tf.cast(objectives.original(self._output, tf.cast(each, tf.float64)), tf.float32)
                for each in (target, value)
            )
        self._metric.update_state(target, value)

    def results(self, sums: Sequence[npt.NDArray[Any]]) -> Mapping[str, float]:
        """Return the metric under its name; each number under a name of its own, if several."""
        for variable, value in zip(self._metric.variables, sums, strict=True):
            variable.assign(value)
        result = self._metric.result()
        name = self._metric.name
        if isinstance(result, Mapping):
            return {key: float(value) for key, value in result.items()}
        values = np.asarray(result)
        if values.ndim == 0:
            return {name: float(values)}
        return {f"{name}_{number}": float(value) for number, value in enumerate(values.ravel())}


TASK_METRICS: Mapping[str, Callable[[plan.Output], RowMetric]] = {
    plan.CLASSIFICATION: ClassAccuracy,
    plan.BINARY: BinaryCounts,
    plan.MULTILABEL: LabelCounts,
}
"""Metrics that every fit of a task reports; numbers have ``NumberErrors``."""


class Metrics:
    """Losses and metrics of all outputs.

    Args:
        outputs: The outputs.
        further: Further metrics of Keras, by name of the output.
        center: Target of a row, ``[K]`` of all outputs, see ``NumberErrors``.
    """

    def __init__(
        self,
        outputs: Sequence[plan.Output],
        further: Mapping[str, Sequence[Any]],
        center: npt.NDArray[Any] | None = None,
    ) -> None:
        self._outputs = outputs
        self._losses = _Sums(len(outputs) + 2)
        self._metrics: list[list[RowMetric]] = []
        start = 0
        for output in outputs:
            output_metrics: list[RowMetric] = []
            if output.task == plan.REGRESSION:
                end = start + output.target_size
                output_metrics.append(
                    NumberErrors(output, None if center is None else center[start:end])
                )
            else:
                output_metrics.append(TASK_METRICS[output.task](output))
            start += output.target_size
            if output.task == plan.BINARY:
                output_metrics.append(KerasMetric(output, keras.metrics.AUC(name="auc")))
            output_metrics += [
                KerasMetric(output, metric) for metric in further.get(output.name, ())
            ]
            self._metrics.append(output_metrics)

    def update(
        self,
        targets: Sequence[Any],
        values: Sequence[Any],
        losses: Sequence[Any],
        weights: Any,
        penalty: Any,
    ) -> None:
        """Add the rows of a batch, except padding rows, which come last and have weight 0.

        Args:
            targets: Targets of each output.
            values: What the network gives for each output.
            losses: Losses ``[B]`` of each output.
            weights: Weight of each row in the step, ``[B]``.
            penalty: Sum of the losses that the network's layers add, for the whole batch.
        """
        rows = tf.math.count_nonzero(weights, dtype=tf.int32)
        sums = [tf.reduce_sum(tf.cast(loss[:rows], tf.float64)) for loss in losses]
        penalties = tf.cast(penalty, tf.float64) * tf.cast(rows, tf.float64)
        self._losses.add(*sums, penalties, rows)
        for metrics, target, value in zip(self._metrics, targets, values, strict=True):
            for metric in metrics:
                metric.update(target[:rows], value[:rows])

    def reset(self) -> None:
        """Forget all rows."""
        for variable in self.state:
            variable.assign(tf.zeros_like(variable))

    def rows(self) -> int:
        """Return the number of rows counted on this rank since the last reset, each once."""
        return int(self._losses.state[0][-1])

    def loss_here(self) -> float:
        """Return the loss over the rows counted on this rank since the last reset."""
        *sums, rows = self._losses.state[0].numpy()
        return self._total(sums) / max(float(rows), 1.0)

    def loss_means(self) -> dict[str, float]:
        """Return the loss over the rows of all ranks since the last reset, by name."""
        *sums, rows = collectives.allreduce_sum(self._losses.state[0].numpy())
        return {"loss": self._total(sums) / max(rows, 1.0)}

    def means(self, prefix: str = "") -> dict[str, float]:
        """Return losses and metrics over the rows of all ranks, by name.

        Those of one of several outputs have its name before theirs; ``loss`` is the sum of all
        outputs' losses, each times its weight, and of the losses that layers add.
        """
        local = [np.asarray(variable) for variable in self.state]
        flat = np.concatenate([array.astype(np.float64).ravel() for array in local])
        total = np.asarray(collectives.allreduce_sum(flat))
        ends = np.cumsum([array.size for array in local])[:-1]
        sums = iter(
            part.reshape(array.shape)
            for part, array in zip(np.split(total, ends), local, strict=True)
        )
        *losses, penalties, rows = next(sums)
        means: dict[str, float] = {"loss": self._total([*losses, penalties]) / float(rows)}
        for output, loss in zip(self._outputs, losses, strict=True):
            if output.name:
                means[output.prefixed("loss")] = float(loss / rows)
        for output, metrics in zip(self._outputs, self._metrics, strict=True):
            for metric in metrics:
                results = metric.results([next(sums) for _ in metric.state])
                means |= {output.prefixed(name): float(v) for name, v in results.items()}
        return {f"{prefix}{name}": value for name, value in means.items()}

    def _total(self, sums: Sequence[float]) -> float:
        """Return the loss of all outputs together, of their losses and of the penalties."""
        *losses, penalties = sums
        weighted = (
            output.weight * loss for output, loss in zip(self._outputs, losses, strict=True)
        )
        return float(sum(weighted) + penalties)

    @property
    def state(self) -> list[tf.Variable]:
        """Return the sums over the rows of this rank since the last reset."""
        variables = [
            variable for row in self._metrics for metric in row for variable in metric.state
        ]
        return [*self._losses.state, *variables]


def record(epoch: int, means: dict[str, float], outputs: Sequence[plan.Output]) -> plan.EpochRecord:
    """Make one row of the table that ``fit`` returns."""
    names = objectives.loss_names(outputs)
    losses = {n: value for n, value in means.items() if n.removeprefix("val_") in names}
    metrics = {name: value for name, value in means.items() if name not in losses}
    return plan.EpochRecord(epoch=epoch, losses=losses, metrics=metrics)
