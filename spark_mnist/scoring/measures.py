"""Losses and metrics of outputs of any task, as sums that Spark adds up. Runs on: driver.

A row's scores are the model's outputs, numbers in the units of the label, and then the loss of each
output. Shape letters: K = numbers or labels of an output, U = units of all outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pyspark.sql import Column, DataFrame, Row, Window
from pyspark.sql import functions as F

from spark_mnist.core import figures, plan
from spark_mnist.networks import objectives

SCORES, TARGET = "scores", "target"
"""Names of intermediate columns."""
MetricsBySample = dict[tuple[int, Any], tuple[dict[str, float | None], dict[str, float | None]]]
"""Losses and metrics by number of the evaluation and by group."""


@dataclass(frozen=True, order=True)
class Cell:
    """Rows of one evaluation, group, label and predicted class."""

    no: int
    group: Any = field(compare=False)
    label: int
    predicted: int
    rows: int
    loss: float
    """Sum of the losses of the rows; NaN where they are not known."""


def measure(samples: DataFrame, outputs: Sequence[plan.Output]) -> MetricsBySample:
    """Measure the outputs of each evaluation and group.

    Args:
        samples: Rows with ``no``, ``group``, ``scores`` and ``target``, arrays of doubles.
        outputs: Outputs of the network.
    """
    slices = [*_slices(outputs)]
    columns = [F.count("*").alias("rows")]
    for number, (output, start, target_start) in enumerate(slices):
        columns += _sums(output, number, start, target_start)
        loss = _loss(sum(each.units for each in outputs) + number)
        is_known = F.count(loss) == F.count("*")  # a sum would skip null
        columns.append(F.when(is_known, F.sum(loss)).alias(f"loss_{number}"))
    rows = samples.groupBy("no", "group").agg(*columns).collect()
    areas = {
        number: _areas(samples, start, target_start)
        for number, (output, start, target_start) in enumerate(slices)
        if output.task == plan.BINARY
    }
    result: MetricsBySample = {}
    for row in rows:
        key = row["no"], row["group"]
        losses: dict[str, float | None] = {"loss": 0.0}
        metrics: dict[str, float | None] = {}
        for number, output in enumerate(outputs):
            mean_loss = _mean(row[f"loss_{number}"], row["rows"])
            total = losses["loss"]
            losses["loss"] = (
                None if total is None or mean_loss is None else total + output.weight * mean_loss
            )
            if output.name:
                losses[output.prefixed("loss")] = mean_loss
            output_metrics = _metrics(output, number, row)
            if number in areas:
                output_metrics["auc"] = areas[number].get(_key(key))
            metrics |= {output.prefixed(name): value for name, value in output_metrics.items()}
        result[key] = losses, metrics
    return result


def cells(samples: DataFrame, output: plan.Output) -> list[Cell]:
    """Count the rows of one output that learns classes by label and predicted class."""
    output_scores = F.slice(F.col(SCORES), 1, output.units)
    predicted = (
        (F.get(output_scores, 0) > plan.THRESHOLD).cast("int")
        if output.task == plan.BINARY
        else predicted_class(output_scores)
    )
    counts = (
        samples.select(
            *("no", "group"),
            F.get(F.col(TARGET), 0).cast("int").alias("label"),
            predicted.alias("predicted"),
            _loss(output.units).alias("loss"),
        )
        .groupBy("no", "group", "label", "predicted")
        .agg(
            F.count("*").alias("rows"),
            F.coalesce(F.sum("loss"), F.lit(float("nan"))).alias("loss"),
        )
    )
    return [Cell(**row.asDict()) for row in counts.collect()]


def _loss(index: int) -> Column:
    """Return the loss of an output at its place in ``SCORES``; null where it is not known."""
    loss = F.get(F.col(SCORES), index)
    return F.when(~F.isnan(loss), loss)


def predicted_class(scores: Column) -> Column:
    """Return the class of highest probability, the first of equals, as an int."""
    first = F.call_function("array_position", scores, F.array_max(scores))
    return (first - 1).cast("int")


def metric_names(outputs: Sequence[plan.Output]) -> tuple[list[str], list[str]]:
    """Return the names of the losses and of the metrics that ``measure`` gives."""
    names = objectives.REPORTED
    return objectives.loss_names(outputs), [
        output.prefixed(name) for output in outputs for name in names[output.task]
    ]


def _slices(outputs: Sequence[plan.Output]) -> Iterator[tuple[plan.Output, int, int]]:
    """Yield each output with the places of its first score and of its first target."""
    start = target_start = 0
    for output in outputs:
        yield output, start, target_start
        start += output.units
        target_start += output.target_size


def _sums(output: plan.Output, number: int, start: int, target_start: int) -> list[Column]:
    """Return the sums from which ``_metrics`` makes the metrics of an output."""
    scores, target = F.col(SCORES), F.col(TARGET)
    if output.task == plan.CLASSIFICATION:
        output_scores = F.slice(scores, start + 1, output.units)
        is_correct = predicted_class(output_scores) == F.get(target, target_start)
        return [F.count_if(is_correct).alias(f"correct_{number}")]
    columns = []
    for index in range(output.units):
        score, label = F.get(scores, start + index), F.get(target, target_start + index)
        if output.task == plan.REGRESSION:
            sums = {
                "squared_errors": F.sum((score - label) ** 2),
                "absolute_errors": F.sum(F.abs(score - label)),
                "variance": F.var_pop(label),
            }
        else:
            is_predicted, is_positive = score > plan.THRESHOLD, label > plan.THRESHOLD
            sums = {
                "true_positives": F.count_if(is_predicted & is_positive),
                "positives": F.count_if(is_positive),
                "predicted_positives": F.count_if(is_predicted),
            }
        columns += [column.alias(f"{name}_{number}_{index}") for name, column in sums.items()]
    return columns


def _metrics(output: plan.Output, number: int, row: Row) -> dict[str, float | None]:
    """Return the metrics of an output by name, from the sums of ``_sums``."""
    rows = row["rows"]
    if output.task == plan.CLASSIFICATION:
        return {"accuracy": row[f"correct_{number}"] / rows}

    def sums(name: str) -> Any:
        return np.array([row[f"{name}_{number}_{index}"] for index in range(output.units)], float)

    if output.task == plan.REGRESSION:
        squared_errors, absolute_errors, variance = map(
            sums, ("squared_errors", "absolute_errors", "variance")
        )
        return {
            **figures.regression_metrics(squared_errors, absolute_errors, variance * rows, rows)
        }
    true_positives, positives, predicted = map(
        sums, ("true_positives", "positives", "predicted_positives")
    )
    equal = rows * output.units - (positives + predicted - 2 * true_positives).sum()
    accuracy = float(equal) / (rows * output.units)
    if output.task == plan.MULTILABEL:
        return {"accuracy": accuracy, **figures.f1(true_positives, positives, predicted)}
    return {
        "accuracy": accuracy,
        **figures.precision_and_recall(true_positives[0], positives[0], predicted[0]),
    }


def _areas(samples: DataFrame, start: int, target_start: int) -> Mapping[tuple[int, Any], float]:
    """Return the exact area under the ROC curve of a binary output, by number and group.

    An evaluation whose rows have one class alone has none.
    """
    score, label = F.get(F.col(SCORES), start), F.get(F.col(TARGET), target_start)
    counts = (
        samples.groupBy("no", "group", score.alias("score"))
        .agg(F.sum(label).alias("ones"), F.sum(1 - label).alias("zeros"))
        .withColumn(
            "below",
            F.sum("zeros").over(Window.partitionBy("no", "group").orderBy("score"))
            - F.col("zeros"),
        )
    )
    sums = counts.groupBy("no", "group").agg(
        F.sum(F.col("ones") * (F.col("below") + F.col("zeros") / 2)).alias("pairs"),
        F.sum("ones").alias("ones"),
        F.sum("zeros").alias("zeros"),
    )
    return {
        _key((row["no"], row["group"])): row["pairs"] / (row["ones"] * row["zeros"])
        for row in sums.collect()
        if row["ones"] and row["zeros"]
    }


def _key(key: tuple[int, Any]) -> tuple[int, Any]:
    """Return a key that is equal for equal groups, NaN among them."""
    number, group = key
    return (number, "NaN") if group != group else key


def _mean(total: float | None, rows: int) -> float | None:
    """Return a mean loss; None where the losses of rows are not known: NaN, which Arrow nulls."""
    return None if total is None or total != total else float(total / rows)
