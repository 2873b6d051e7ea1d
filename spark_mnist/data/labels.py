"""Class labels: the label column as a Spark SQL expression, and the classes that a table has.

A class is an int, whether the column has numbers, names or one-hot vectors. Runs on: driver.
"""

from __future__ import annotations

import dataclasses
import logging
import re

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F
from pyspark.sql import types as T

from spark_mnist import errors
from spark_mnist.core import plan
from spark_mnist.data import column_names, feature_columns

logger = logging.getLogger(__name__)

MAX_CLASSES = 1000
"""Most classes of a label; more are taken for a mistake, say a column of row numbers."""
FEW_CLASSES = 20
"""Most whole numbers that are taken for classes however few rows each has."""
MIN_ROWS_PER_CLASS = 20
"""Least mean number of rows of a class, where there are more whole numbers than ``FEW_CLASSES``.

With fewer the label is a quantity.
"""
MAX_FRACTIONAL_SHARE = 0.2
"""Largest share of rows with a fraction as label that still counts as damaged rows.

With a larger share the label is a quantity.
"""
EXACT_WHOLE_LIMIT = 2.0**53
"""Limit below which doubles tell whole numbers apart."""
NUMBER_TEXT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", re.ASCII)
"""Text that is a number."""
ONE_HOT_TEXT = re.compile(r"[01. ]+(,[01. ]+)+")
"""Text of a one-hot label, which is not the name of a class."""


def fault(df: DataFrame, input_spec: plan.InputSpec, target: Column) -> Column:
    """Return a column that states why a row's label cannot be used, or null where it can."""
    label, _ = column_names.column(df, input_spec.label)
    missing = F.when(label.isNull(), F.lit(f"{input_spec.label} is null"))
    mismatch = F.when(
        target.isNull(), F.lit(f"{input_spec.label} is {_describe_mismatch(input_spec)}")
    )
    return F.coalesce(missing, mismatch)


def discover(df: DataFrame, features: tuple[str, ...], label: str) -> plan.InputSpec:
    """Determine how wide a table's features are and which classes its label has.

    Raises:
        errors.MissingColumn, errors.UnreadableColumn: The columns do not fit.
        errors.BadRows: There are no classes, or more than a network can tell apart, or the label
            looks like a quantity.
        errors.TooFewRows: There is no row.
    """
    num_classes, names = classes(df, label)
    input_spec = dataclasses.replace(discover_features(df, features), label=label)
    return dataclasses.replace(input_spec, classes=num_classes, names=names)


def discover_features(df: DataFrame, features: tuple[str, ...]) -> plan.InputSpec:
    """Determine how wide a table's features are; the result says nothing of labels.

    Raises:
        errors.MissingColumn, errors.UnreadableColumn: The columns do not fit.
        errors.TooFewRows: There is no row.
    """
    feature, data_type = column_names.column(df, features[0])
    pixels = isinstance(data_type, T.BinaryType)
    width = len(features)
    if width == 1:
        array = feature if pixels else feature_columns.numbers(df, features[0])
        width = 1 if array is None else row_size(df, F.length(array) if pixels else F.size(array))
    return plan.InputSpec(features=features, pixels=pixels, width=width)


def column(df: DataFrame, input_spec: plan.InputSpec) -> Column:
    """Return the class of each row as an int, null where the label is no class.

    Raises:
        errors.MissingColumn: There is no label column.
        errors.UnreadableColumn: The type of the column is not a label's.
    """
    label, data_type = column_names.column(df, input_spec.label)
    if input_spec.names:
        names = F.array(*map(F.lit, input_spec.names))
        has_integer_names = input_spec.has_integer_names and isinstance(
            data_type, T.NumericType | T.StringType
        )
        class_text = (
            whole_as_text(df, input_spec.label)
            if has_integer_names
            else F.trim(label.cast("string"))
        )
        position = F.call_function("array_position", names, class_text)
        return F.when(position > 0, position).cast("int") - 1
    if isinstance(data_type, T.NumericType | T.BooleanType):
        return _class_number(label.cast("double"), input_spec.classes)
    array = _label_array(df, input_spec.label)
    one_hot = _class_of_one_hot(array, input_spec.classes)
    if not isinstance(data_type, T.StringType):
        return one_hot
    scalar = _class_number(F.get(array, 0).cast("double"), input_spec.classes)
    return F.when(label.contains(","), one_hot).otherwise(scalar)


def _describe_mismatch(input_spec: plan.InputSpec) -> str:
    if input_spec.names:
        more = ", ..." if len(input_spec.names) > 10 else ""
        return f"none of {', '.join(input_spec.names[:10])}{more}"
    return f"neither 0..{input_spec.classes - 1} nor one-hot of length {input_spec.classes}"


def _label_array(df: DataFrame, name: str) -> Column:
    """Return the array of a label column that has several numbers a row, or text."""
    array = feature_columns.numbers(df, name)
    if array is None:
        data_type = column_names.column(df, name)[1].simpleString()
        raise errors.UnreadableColumn(
            f"column {name!r} is {data_type}; it may be an integer, "
            f"the name of a class, or one-hot as {feature_columns.ARRAYS}"
        )
    return array


def classes(df: DataFrame, name: str) -> tuple[int, tuple[str, ...]]:
    """Return the number of classes in a label column, and their names where they have any.

    Names are the texts of the column, or its whole numbers if these are not 0, 1, ... in turn.

    Raises:
        errors.MissingColumn, errors.UnreadableColumn: The column cannot be a label.
        errors.BadRows, errors.TooFewRows: As for ``discover``.
    """
    label, data_type = column_names.column(df, name)
    if isinstance(data_type, T.BooleanType):
        if df.where(label.isNotNull()).isEmpty():
            raise _no_classes(df, name)
        return 2, ()
    if isinstance(data_type, T.StringType):
        words = df.select(F.trim(label).alias("word")).where("word != ''").distinct()
        texts = sorted(row["word"] for row in words.limit(MAX_CLASSES + 1).collect())
        if texts and all(ONE_HOT_TEXT.fullmatch(word) for word in texts):
            return check_class_count(row_size(df, F.size(_label_array(df, name))), name), ()
        if texts and not all(NUMBER_TEXT.fullmatch(word) for word in texts):
            return check_class_count(len(texts), name), tuple(texts)
    elif not isinstance(data_type, T.NumericType):
        return check_class_count(row_size(df, F.size(_label_array(df, name))), name), ()
    return _numbered_classes(df, name)


def _numbered_classes(df: DataFrame, name: str) -> tuple[int, tuple[str, ...]]:
    """Return number and names of the classes of a column of numbers, which may be text."""
    number = _number_column(df, name)
    counts = (
        df.where(number.isNotNull() & ~F.isnan(number))
        .groupBy(whole_as_text(df, name).alias("text"))
        .agg(F.count("*").alias("rows"))
    )
    rows = counts.orderBy(F.desc("rows")).limit(MAX_CLASSES + 2).collect()
    whole_numbers = sorted(int(row["text"]) for row in rows if row["text"] is not None)
    whole_rows = sum(row["rows"] for row in rows if row["text"] is not None)
    fractional_rows = sum(row["rows"] for row in rows if row["text"] is None)
    if not rows:
        raise _no_classes(df, name)
    is_quantity = fractional_rows > MAX_FRACTIONAL_SHARE * (whole_rows + fractional_rows) or (
        len(whole_numbers) > FEW_CLASSES and whole_rows < MIN_ROWS_PER_CLASS * len(whole_numbers)
    )
    if is_quantity or not whole_numbers:
        description = (
            f"{len(whole_numbers)} whole numbers"
            if not fractional_rows
            else "numbers that are not whole"
        )
        raise errors.BadRows(
            f"column {name!r} looks like a quantity to predict ({description} in "
            f"{whole_rows + fractional_rows} rows): is it the label? Learn it with "
            f"task={plan.REGRESSION}, or, if these are classes, name them: "
            f"concat('class ', {name})"
        )
    check_class_count(len(whole_numbers), name)
    if len(whole_numbers) > FEW_CLASSES:
        logger.warning(
            "column %r has %d whole numbers, which are taken as classes; if it is a "
            "quantity, learn it with task=%s",
            *(name, len(whole_numbers), plan.REGRESSION),
        )
    if whole_numbers == list(range(len(whole_numbers))):
        return len(whole_numbers), ()
    logger.info(
        "the classes of column %r are %s",
        name,
        column_names.abbreviate([*map(str, whole_numbers)]),
    )
    return len(whole_numbers), tuple(map(str, whole_numbers))


def _no_classes(df: DataFrame, name: str) -> errors.SparkMnistError:
    """Return the error of a table in which no row has a class."""
    if df.isEmpty():
        return errors.TooFewRows("the DataFrame has no rows")
    return errors.BadRows(f"no row has a class in column {name!r}")


def _number_column(df: DataFrame, name: str) -> Column:
    """Return a column of numbers, or of text that has numbers, as doubles."""
    label, data_type = column_names.column(df, name)
    if isinstance(data_type, T.NumericType):
        return label.cast("double")
    return F.expr(f"try_cast(trim({column_names.quote(column_names.resolve(df, name))}) AS double)")


def whole_as_text(df: DataFrame, name: str) -> Column:
    """Return a whole number in its only form as text, null for anything else."""
    label, data_type = column_names.column(df, name)
    if isinstance(data_type, T.IntegralType):
        return label.cast("string")
    number = _number_column(df, name)
    is_whole = (number == F.floor(number)) & (F.abs(number) < EXACT_WHOLE_LIMIT)
    return F.when(is_whole, number.cast("bigint").cast("string"))


def check_class_count(classes: int, name: str) -> int:
    """Return a number of classes, unless it is more than a label has.

    Raises:
        errors.BadRows: There are more than ``MAX_CLASSES``.
    """
    if classes > MAX_CLASSES:
        raise errors.BadRows(
            f"column {name!r} has at least {classes} classes, and at most {MAX_CLASSES} are "
            "allowed: is it the label?"
        )
    return classes


def row_size(df: DataFrame, size: Column) -> int:
    """Return the count of numbers that most rows have."""
    sizes = df.select(size.alias("size")).where("size > 0").groupBy("size").count()
    first = sizes.orderBy(F.desc("count"), "size").first()
    if first is None:
        raise errors.TooFewRows("the DataFrame has no rows, or only empty ones")
    most_frequent: int = first["size"]
    return most_frequent


def _class_number(number: Column, classes: int) -> Column:
    """Return a double that is 0, 1, ... below ``classes`` as an int, null for anything else."""
    fits = (number >= 0) & (number < classes) & (number == F.floor(number))
    return F.when(fits, number.cast("int"))


def _class_of_one_hot(array: Column, classes: int) -> Column:
    ones = F.filter(array, lambda x: x == 1)
    zeros = F.filter(array, lambda x: x == 0)
    is_one_hot = (F.size(ones) == 1) & (F.size(zeros) == classes - 1) & (F.size(array) == classes)
    return F.when(is_one_hot, F.array_position(array, 1.0).cast("int") - 1)
