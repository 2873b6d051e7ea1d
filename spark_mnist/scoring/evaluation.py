"""Evaluation tables: losses, metrics and details from counted cells. Runs on: driver.

A cell is a number of rows of one label for which one class was predicted, with the sum of their
losses. Shape letter: C = classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import types as T

from spark_mnist import errors
from spark_mnist.core import plan
from spark_mnist.data import column_names
from spark_mnist.scoring import measures

NUMBER_MAP = T.MapType(T.StringType(), T.DoubleType())
"""Spark type of losses and of metrics, by name."""
LOSSES_AND_METRICS = T.StructType().add("losses", NUMBER_MAP).add("metrics", NUMBER_MAP)
"""Columns of means that every evaluation has."""
CLASS_FIGURES = T.StructType().add("class", "string").add("num_examples", "long")
CLASS_FIGURES = CLASS_FIGURES.add("precision", "double").add("recall", "double").add("f1", "double")
"""Figures of one class, an element of the column ``classes``."""
DETAILS = (
    T.StructType()
    .add("num_examples", "long")
    .add("num_correct", "long")
    .add("precision_at_1", "double")
    .add("confusion", T.ArrayType(T.ArrayType(T.LongType())))
    .add("classes", T.ArrayType(CLASS_FIGURES))
)
"""Columns that ``details=True`` adds."""


def group_field(df: DataFrame, by: str, *, details: bool) -> T.StructField:
    """Return the column whose values are measured apart.

    Raises:
        errors.MissingColumn: No column has that name.
        errors.UnreadableColumn: Spark and Python cannot tell its values apart alike.
        errors.ColumnTaken: A column of the result has that name.
    """
    _, data_type = column_names.column(df, by)
    if not isinstance(data_type, T.AtomicType) or isinstance(data_type, T.BinaryType):
        raise errors.UnreadableColumn(
            f"by={by}: column {by!r} is {data_type.simpleString()}; use numbers, text, dates or "
            "booleans"
        )
    result = _table_schema(None, details=details)
    if by.lower() in result.names:
        raise errors.ColumnTaken(f"by={by}: the result has a column {by!r} already; rename it")
    return T.StructField(by, data_type)


def _table_schema(group: T.StructField | None, *, details: bool) -> T.StructType:
    """Return the schema of an evaluation table."""
    number = T.StructField("no", T.IntegerType())
    group_fields = [group] if group else []
    detail_fields = DETAILS.fields if details else []
    return T.StructType([number, *group_fields, *LOSSES_AND_METRICS.fields, *detail_fields])


def table(
    spark: SparkSession,
    cells: Sequence[measures.Cell],
    input_spec: plan.InputSpec,
    *,
    repeat: int,
    group: T.StructField | None,
    details: bool,
    measured: measures.MetricsBySample | None = None,
    names: tuple[Sequence[str], Sequence[str]] = (("loss",), ("accuracy",)),
) -> DataFrame:
    """Make the DataFrame that ``evaluate`` returns.

    Args:
        spark: Session that makes the DataFrame.
        cells: Cells of all evaluations.
        input_spec: What the model reads.
        repeat: Number of evaluations.
        group: Column of ``by``; without it every evaluation has one row, even if it drew no rows.
        details: Whether to add the columns of ``DETAILS``.
        measured: Losses and metrics by number and group; without it, those of the cells.
        names: Names of the losses and of the metrics in ``measured``.
    """
    samples: dict[tuple[int, Any], list[measures.Cell]] = {}
    if group is None:
        samples = {(number, None): [] for number in range(1, repeat + 1)}
    for key in measured or ():
        samples.setdefault(key, [])
    for cell in cells:
        samples.setdefault((cell.no, measures.one_nan(cell.group)), []).append(cell)
    missing = tuple(dict.fromkeys(each) for each in names)
    rows = []
    for (number, value), sample_cells in sorted(samples.items(), key=_sort_key):
        sample = Sample(input_spec, sample_cells)
        group_values = (value,) if group else ()
        key = number, value
        sample_means = sample.means() if measured is None else measured.get(key, missing)
        rows.append((number, *group_values, *sample_means, *(sample.details() if details else ())))
    return spark.createDataFrame(rows, _table_schema(group, details=details))


def _sort_key(item: tuple[tuple[int, Any], Any]) -> tuple[Any, ...]:
    """Return the key that orders rows: by number, then nulls, sorted values, and NaN last."""
    (number, value), _ = item
    value_class = 0 if value is None else 2 if value != value else 1
    return (number, value_class, value) if value_class == 1 else (number, value_class)


class Sample:
    """The cells of one evaluation and group."""

    def __init__(self, input_spec: plan.InputSpec, cells: Iterable[measures.Cell] = ()) -> None:
        self._names = input_spec.class_names
        self._loss = 0.0
        self.confusion = np.zeros((input_spec.classes, input_spec.classes), np.int64)
        """Number of rows by [label, predicted class], ``[C, C]``."""
        for cell in sorted(cells):  # so that sums are the same each time
            self._loss += cell.loss
            self.confusion[cell.label, cell.predicted] += cell.rows

    @property
    def rows(self) -> int:
        """Number of rows that were drawn."""
        return int(self.confusion.sum())

    @property
    def correct(self) -> int:
        """Number of rows whose label was predicted."""
        return int(np.trace(self.confusion))

    def means(self) -> tuple[dict[str, float | None], dict[str, float | None]]:
        """Return ``losses`` and ``metrics``; null where no row was drawn."""
        loss = _quotient(self._loss, self.rows)
        return {"loss": loss}, {"accuracy": _quotient(self.correct, self.rows)}

    def details(self) -> tuple[Any, ...]:
        """Return the values of ``DETAILS``."""
        precision_at_1 = _quotient(self.correct, self.rows)
        classes = [self._class_figures(number) for number in range(len(self._names))]
        return self.rows, self.correct, precision_at_1, self.confusion.tolist(), classes

    def _class_figures(self, number: int) -> tuple[Any, ...]:
        """Return the figures of one class; a quotient of no rows is null."""
        hits = int(self.confusion[number, number])
        label_rows = int(self.confusion[number].sum())
        predicted_rows = int(self.confusion[:, number].sum())
        return (
            self._names[number],
            label_rows,
            _quotient(hits, predicted_rows),
            _quotient(hits, label_rows),
            _quotient(2 * hits, label_rows + predicted_rows),
        )


def _quotient(part: float, whole: int) -> float | None:
    return part / whole if whole else None
