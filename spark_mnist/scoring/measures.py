"""Losses and metrics of outputs of any task, as sums that Spark adds up. Runs on: driver.

A row's scores are the model's outputs, numbers in the units of the label, and then the loss of each
output. Shape letters: K = numbers or labels of an output, U = units of all outputs.
"""

from __future__ import annotations

import math
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
WHOLE_ROW = -1
"""Number, in place of a unit's, of the sums over whole rows."""
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
    sums: dict[tuple[int, Any], dict[tuple[int, int], Row]] = {}
    for row in _sums(samples, slices).collect():
        sums.setdefault(_key(row), {})[row["output"], row["unit"]] = row
    areas = {
        number: _areas(samples, start, target_start)
        for number, (output, start, target_start) in enumerate(slices)
        if output.task == plan.BINARY
    }
    result: MetricsBySample = {}
    for key, rows in sums.items():
        losses: dict[str, float | None] = {"loss": 0.0}
        metrics: dict[str, float | None] = {}
        for number, output in enumerate(outputs):
            row = rows[number, WHOLE_ROW]
            mean_loss = _mean_loss(row)
            total = losses["loss"]
            losses["loss"] = (
                None if total is None or mean_loss is None else total + output.weight * mean_loss
            )
            if output.name:
                losses[output.prefixed("loss")] = mean_loss
            units = [] if output.task == plan.CLASSIFICATION else range(output.units)
            output_metrics = _metrics(output, row, [rows[number, unit] for unit in units])
            if number in areas:
                output_metrics["auc"] = areas[number].get(key)
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


def _sums(samples: DataFrame, slices: Sequence[tuple[plan.Output, int, int]]) -> DataFrame:
    """Return the sums from which the means are made, a row for each output and for each unit.

    Each row of the samples becomes an element for itself and one for each unit, so that there are
    as many aggregates for a thousand labels as for one: Spark is slow to plan thousands.
    """
    num_scores = sum(output.units for output, _, _ in slices)
    elements = []
    for number, (output, start, target_start) in enumerate(slices):
        elements.append(F.array(_row_element(number, output, start, target_start, num_scores)))
        if output.task != plan.CLASSIFICATION:
            elements.append(_unit_elements(number, output, start, target_start))
    score, label = F.col("score"), F.col("label")
    is_predicted, is_positive = score > plan.THRESHOLD, label > plan.THRESHOLD
    return (
        samples.select("no", "group", F.inline(F.concat(*elements)))
        .groupBy("no", "group", "output", "unit")
        .agg(
            F.count("*").alias("rows"),
            F.count_if("is_correct").alias("correct"),
            F.sum("loss").alias("loss"),
            F.count("loss").alias("known_losses"),
            F.sum((score - label) ** 2).alias("squared_errors"),
            F.sum(F.abs(score - label)).alias("absolute_errors"),
            F.var_pop(label).alias("variance"),
            F.count_if(is_predicted & is_positive).alias("true_positives"),
            F.count_if(is_positive).alias("positives"),
            F.count_if(is_predicted).alias("predicted_positives"),
        )
    )


def _row_element(
    number: int, output: plan.Output, start: int, target_start: int, num_scores: int
) -> Column:
    """Return what is known of a whole row: its loss, and whether its class was predicted."""
    is_correct = F.lit(None).cast("boolean")
    if output.task == plan.CLASSIFICATION:
        output_scores = F.slice(F.col(SCORES), start + 1, output.units)
        is_correct = predicted_class(output_scores) == F.get(F.col(TARGET), target_start)
    null = F.lit(None).cast("double")
    return _element(number, F.lit(WHOLE_ROW), is_correct, _loss(num_scores + number), null, null)


def _unit_elements(number: int, output: plan.Output, start: int, target_start: int) -> Column:
    """Return the score and the label of each unit, an array."""
    no_flag, no_loss = F.lit(None).cast("boolean"), F.lit(None).cast("double")
    output_scores = F.slice(F.col(SCORES), start + 1, output.units)
    return F.transform(
        output_scores,
        lambda score, unit: _element(
            number, unit, no_flag, no_loss, score, F.get(F.col(TARGET), target_start + unit)
        ),
    )


def _element(
    number: int, unit: Column, is_correct: Column, loss: Column, score: Column, label: Column
) -> Column:
    return F.struct(
        F.lit(number).alias("output"),
        unit.alias("unit"),
        is_correct.alias("is_correct"),
        loss.alias("loss"),
        score.cast("double").alias("score"),
        label.cast("double").alias("label"),
    )


def _metrics(output: plan.Output, row: Row, units: Sequence[Row]) -> dict[str, float | None]:
    """Return the metrics of an output by name, from the sums of its rows and of each unit."""
    rows = row["rows"]
    if output.task == plan.CLASSIFICATION:
        return {"accuracy": row["correct"] / rows}

    def sums(name: str) -> Any:
        return np.array([unit[name] for unit in units], float)

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
        _key(row): row["pairs"] / (row["ones"] * row["zeros"])
        for row in sums.collect()
        if row["ones"] and row["zeros"]
    }


def _mean_loss(row: Row) -> float | None:
    """Return a mean loss; None where the loss of a row, or the sum of all, is not known."""
    total = row["loss"]
    is_known = row["known_losses"] == row["rows"] and not math.isnan(total)
    return total / row["rows"] if is_known else None


def _key(row: Row) -> tuple[int, Any]:
    return row["no"], one_nan(row["group"])


def one_nan(group: Any) -> Any:
    """Return a group, every NaN as the same object, so that keys with it are equal."""
    return math.nan if group != group else group
