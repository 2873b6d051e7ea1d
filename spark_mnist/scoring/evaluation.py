"""From counted cells to the table of an evaluation: losses, metrics, details. On the driver.

A cell is a number of rows of one label for which one class was predicted, with the sum of their
losses. Shape letter: C = classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import types as T

from spark_mnist import errors
from spark_mnist.core import plan
from spark_mnist.data import feature_columns

NUMBERS = T.MapType(T.StringType(), T.DoubleType())
LOSSES_AND_METRICS = T.StructType().add("losses", NUMBERS).add("metrics", NUMBERS)
FIGURES = T.StructType().add("class", "string").add("num_examples", "long")
FIGURES = FIGURES.add("precision", "double").add("recall", "double").add("f1", "double")
DETAILS = (
    T.StructType()
    .add("num_examples", "long")
    .add("num_correct", "long")
    .add("precision_at_1", "double")
    .add("confusion", T.ArrayType(T.ArrayType(T.LongType())))
    .add("classes", T.ArrayType(FIGURES))
)


@dataclass(frozen=True, order=True)
class Cell:
    """Rows of one evaluation, group, label and predicted class."""

    no: int
    group: Any = field(compare=False)
    label: int
    predicted: int
    rows: int
    loss: float
    """Sum over the rows."""


def group_field(df: DataFrame, by: str, *, details: bool) -> T.StructField:
    """The column whose values are measured apart.

    Raises:
        errors.MissingColumn: There is none of that name.
        errors.UnreadableColumn: Its values cannot be told apart by Spark and Python alike.
        errors.ColumnTaken: A column of the result has that name.
    """
    _, kind = feature_columns.column(df, by)
    if not isinstance(kind, T.AtomicType) or isinstance(kind, T.BinaryType):
        raise errors.UnreadableColumn(
            f"by={by}: column {by!r} is {kind.simpleString()}; use numbers, text, dates or booleans"
        )
    result = table_schema(None, details=details)
    if by.lower() in result.names:
        raise errors.ColumnTaken(f"by={by}: the result has a column {by!r} already; rename it")
    return T.StructField(by, kind)


def table_schema(group: T.StructField | None, *, details: bool) -> T.StructType:
    """The columns of an evaluation."""
    number = T.StructField("no", T.IntegerType())
    groups = [group] if group else []
    added = DETAILS.fields if details else []
    return T.StructType([number, *groups, *LOSSES_AND_METRICS.fields, *added])


def table(
    spark: SparkSession,
    cells: Sequence[Cell],
    input_spec: plan.InputSpec,
    *,
    repeat: int,
    group: T.StructField | None,
    details: bool,
) -> DataFrame:
    """Make the DataFrame that ``evaluate`` returns.

    Args:
        spark: Makes it.
        cells: Of all evaluations.
        input_spec: Of the model.
        repeat: How many evaluations there were.
        group: The column of ``by``; without it every evaluation has one row, drawn rows or none.
        details: Whether to add the columns of ``DETAILS``.
    """
    shares: dict[tuple[int, Any], list[Cell]] = {}
    if group is None:
        shares = {(number, None): [] for number in range(1, repeat + 1)}
    for cell in cells:
        nan = isinstance(cell.group, float) and math.isnan(cell.group)
        shares.setdefault((cell.no, math.nan if nan else cell.group), []).append(cell)
    rows = []
    for (number, value), counted in sorted(shares.items(), key=_place):
        share = Share(input_spec, counted)
        named = (value,) if group else ()
        rows.append((number, *named, *share.means(), *(share.details() if details else ())))
    return spark.createDataFrame(rows, table_schema(group, details=details))


def _place(item: tuple[tuple[int, Any], Any]) -> tuple[Any, ...]:
    """Order of the rows: by number, then nulls, values in their order, and NaN last."""
    (number, value), _ = item
    kind = 0 if value is None else 2 if value != value else 1
    return (number, kind, value) if kind == 1 else (number, kind)


class Share:
    """All cells of one evaluation and group."""

    def __init__(self, input_spec: plan.InputSpec, cells: Iterable[Cell] = ()) -> None:
        self._names = input_spec.class_names
        self._loss = 0.0
        self.confusion = np.zeros((input_spec.classes, input_spec.classes), np.int64)
        """Rows by [label, predicted class], ``[C, C]``."""
        for cell in sorted(cells):  # so that sums are the same each time
            self._loss += cell.loss
            self.confusion[cell.label, cell.predicted] += cell.rows

    @property
    def rows(self) -> int:
        """Rows that were drawn."""
        return int(self.confusion.sum())

    @property
    def correct(self) -> int:
        """Rows whose label was predicted."""
        return int(np.trace(self.confusion))

    def means(self) -> tuple[dict[str, float | None], dict[str, float | None]]:
        """``losses`` and ``metrics``; null where no row was drawn."""
        loss = _quotient(self._loss, self.rows)
        return {"loss": loss}, {"accuracy": _quotient(self.correct, self.rows)}

    def details(self) -> tuple[Any, ...]:
        """The values of ``DETAILS``."""
        precision_at_1 = _quotient(self.correct, self.rows)
        classes = [self._of_class(number) for number in range(len(self._names))]
        return self.rows, self.correct, precision_at_1, self.confusion.tolist(), classes

    def _of_class(self, number: int) -> tuple[Any, ...]:
        """Figures of one class; a quotient of no rows is null."""
        hits = int(self.confusion[number, number])
        labelled = int(self.confusion[number].sum())
        predicted = int(self.confusion[:, number].sum())
        return (
            self._names[number],
            labelled,
            _quotient(hits, predicted),
            _quotient(hits, labelled),
            _quotient(2 * hits, labelled + predicted),
        )


def _quotient(part: float, whole: int) -> float | None:
    return part / whole if whole else None
