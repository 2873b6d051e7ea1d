"""Targets: what the outputs of a network learn of a row, as Spark SQL expressions.

The target of one output that learns classes is an int. The targets of other outputs are doubles, in
one array for all outputs: a class is one number, labels are 0 or 1 each, numbers stay as they are.
Runs on: driver.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F
from pyspark.sql import types as T

from spark_mnist import errors
from spark_mnist.core import plan
from spark_mnist.data import column_names, feature_columns, labels

MAX_FLOAT = 3.4e38
"""Largest number of a label or a weight; a larger one is infinite as a float32."""
TOO_LARGE = f"a number beyond {MAX_FLOAT:.1e}, with which no network computes"
"""Fault of a larger number."""
MAX_SHOWN_NAMES = 10
"""Most names of labels that a message shows."""


@dataclass(frozen=True)
class Target:
    """Targets of all outputs, of each row."""

    column: Column
    """An int, or an array of ``size`` doubles."""
    fault: Column
    """Why a row's labels cannot be used, or null where they can."""
    size: int
    """Numbers of a target; 0 where it is an int."""


def target(df: DataFrame, outputs: Sequence[plan.Output]) -> Target:
    """Return the targets of a network's outputs.

    Raises:
        errors.MissingColumn: There is no such label column.
        errors.UnreadableColumn: The type of a column is not one for its task.
    """
    columns = [_column(df, output) for output in outputs]
    fault = F.coalesce(
        *(_fault(df, output, column) for output, column in zip(outputs, columns, strict=True))
    )
    if len(outputs) == 1 and outputs[0].task in plan.CLASS_TASKS:
        return Target(columns[0], fault, 0)
    arrays = [
        F.array(column.cast("double")) if output.task in plan.CLASS_TASKS else column
        for output, column in zip(outputs, columns, strict=True)
    ]
    size = sum(output.target_size for output in outputs)
    return Target(F.concat(*arrays) if len(arrays) > 1 else arrays[0], fault, size)


def discover(df: DataFrame, output: plan.Output) -> plan.Output:
    """Return an output with its size and its names, as the label column has them.

    Raises:
        errors.MissingColumn, errors.UnreadableColumn: The column does not fit the task.
        errors.BadRows: The column has no classes, too many, or another number than the task takes.
        errors.TooFewRows: There is no row.
    """
    if output.task == plan.CLASSIFICATION:
        size, names = labels.classes(df, output.label)
    elif output.task == plan.BINARY:
        size, names = _two_classes(df, output.label)
    elif output.task == plan.MULTILABEL:
        size, names = _labels(df, output.label)
    else:
        size, names = labels.row_size(df, F.size(_numbers(df, output.label))), ()
    return dataclasses.replace(output, size=size, names=names)


def weight(df: DataFrame, name: str) -> tuple[Column, Column]:
    """Return the weight of each row in the loss, a double, and why it cannot be used, or null.

    Raises:
        errors.MissingColumn: No column has that name.
        errors.UnreadableColumn: The column has no numbers.
    """
    column, data_type = column_names.column(df, name)
    if not isinstance(data_type, T.NumericType):
        raise errors.UnreadableColumn(
            f"sample_weight={name}: column {name!r} is {data_type.simpleString()}; a weight is a "
            "number"
        )
    number = column.cast("double")
    is_finite = ~F.isnan(number) & (F.abs(number) != float("inf"))
    fault = (
        F.when(number.isNull(), F.lit(f"{name} is null"))
        .when(~is_finite, F.lit(f"{name} is no finite number"))
        .when(number > MAX_FLOAT, F.lit(f"{name} is {TOO_LARGE}"))
        .when(number < 0, F.lit(f"{name} is negative"))
    )
    return number, fault


def _column(df: DataFrame, output: plan.Output) -> Column:
    """Return the target of one output: an int for a class, else an array of doubles."""
    if output.task in plan.CLASS_TASKS:
        return labels.column(df, _class_spec(output))
    if output.task == plan.REGRESSION:
        return _numbers(df, output.label)
    if not output.names:
        return _multi_hot(df, output.label)
    present = _trimmed(df, output.label)
    flags = [F.array_contains(present, F.lit(name)).cast("double") for name in output.names]
    return F.when(present.isNotNull(), F.array(*flags))


def _class_spec(output: plan.Output) -> plan.InputSpec:
    """Return what ``labels`` reads of a class output."""
    return plan.InputSpec(label=output.label, classes=output.size, names=output.names)


def _fault(df: DataFrame, output: plan.Output, column: Column) -> Column:
    """Return why an output's label cannot be used, or null where it can."""
    name = output.label
    if output.task in plan.CLASS_TASKS:
        return labels.fault(df, _class_spec(output), column)
    label, _ = column_names.column(df, name)
    fault = F.when(label.isNull(), F.lit(f"{name} is null"))
    if output.task == plan.MULTILABEL and output.names:
        present = _trimmed(df, name)
        strangers = F.array_except(present, F.array(*map(F.lit, output.names)))
        shown = ", ".join(output.names[:MAX_SHOWN_NAMES])
        more = ", ..." if len(output.names) > MAX_SHOWN_NAMES else ""
        message = f"{name} has a label that is none of {shown}{more}"
        return fault.when(F.size(strangers) > 0, F.lit(message))
    size = F.size(column)
    size_fault = F.concat(F.lit(f"{name} has "), size, F.lit(f" numbers, not {output.size}"))
    if output.task == plan.MULTILABEL:
        is_flag = F.forall(column, lambda number: F.coalesce(number.isin(0.0, 1.0), F.lit(False)))
        no_number = F.when(~is_flag, F.lit(f"{name} has a label that is neither 0 nor 1"))
    else:
        not_finite = F.exists(
            column,
            lambda number: number.isNull() | F.isnan(number) | (F.abs(number) == float("inf")),
        )
        too_large = F.exists(column, lambda number: F.abs(number) > MAX_FLOAT)
        no_number = F.when(not_finite, F.lit(f"{name} is no finite number")).when(
            too_large, F.lit(f"{name} is {TOO_LARGE}")
        )
    return F.coalesce(
        fault,
        F.when(column.isNull(), F.lit(f"{name} is null")),
        F.when(size != output.size, size_fault),
        no_number,
    )


def _numbers(df: DataFrame, name: str) -> Column:
    """Return a label column of numbers as an array of doubles, also where it has one a row."""
    label, data_type = column_names.column(df, name)
    if isinstance(data_type, T.NumericType):
        return F.when(label.isNotNull(), F.array(label.cast("double")))
    array = feature_columns.numbers(df, name, "double")
    if array is None:
        raise errors.UnreadableColumn(
            f"column {name!r} is {data_type.simpleString()}; with task={plan.REGRESSION} the label "
            f"is a number, or {feature_columns.ARRAYS}"
        )
    return array


def _multi_hot(df: DataFrame, name: str) -> Column:
    """Return a label column of zeros and ones as an array of doubles."""
    label, data_type = column_names.column(df, name)
    if isinstance(data_type, T.ArrayType) and isinstance(data_type.elementType, T.BooleanType):
        return label.cast("array<double>")
    array = feature_columns.numbers(df, name, "double")
    if array is None:
        raise errors.UnreadableColumn(
            f"column {name!r} is {data_type.simpleString()}; with task={plan.MULTILABEL} the label "
            "is an array of names, or of a 0 or 1 for each label"
        )
    return array


def _trimmed(df: DataFrame, name: str) -> Column:
    """Return an array of names without blanks around them."""
    label, data_type = column_names.column(df, name)
    if not isinstance(data_type, T.ArrayType):
        raise errors.UnreadableColumn(
            f"column {name!r} is {data_type.simpleString()}; the model was trained on arrays of "
            "names"
        )
    return F.transform(label.cast("array<string>"), lambda word: F.trim(word))


def _two_classes(df: DataFrame, name: str) -> tuple[int, tuple[str, ...]]:
    """Return 2, and the names of the two classes where they have any.

    Raises:
        errors.BadRows: There are more than two classes, or one that is neither 0 nor 1.
    """
    size, names = labels.classes(df, name)
    if names == ("1",):
        return 2, ()
    if size > 2 or (names and size != 2):
        description = f"{size} classes" if size > 2 else f"the one class {names[0]}"
        raise errors.BadRows(
            f"column {name!r} has {description}, and task={plan.BINARY} takes two: 0 and 1, "
            "false and true, or two names"
        )
    return 2, names


def _labels(df: DataFrame, name: str) -> tuple[int, tuple[str, ...]]:
    """Return the number of labels that rows can have, and their names where they have any.

    Raises:
        errors.BadRows: No row has a label, or there are more than can be learned.
    """
    data_type = column_names.column(df, name)[1]
    has_names = isinstance(data_type, T.ArrayType) and isinstance(
        data_type.elementType, T.StringType
    )
    if not has_names:
        width = labels.row_size(df, F.size(_multi_hot(df, name)))
        return labels.check_class_count(width, name), ()
    words = df.select(F.explode(_trimmed(df, name)).alias("word")).where("word != ''").distinct()
    names = sorted(row["word"] for row in words.limit(labels.MAX_CLASSES + 1).collect())
    if not names:
        if df.isEmpty():
            raise errors.TooFewRows("the DataFrame has no rows")
        raise errors.BadRows(f"no row has a label in column {name!r}")
    return labels.check_class_count(len(names), name), tuple(names)
