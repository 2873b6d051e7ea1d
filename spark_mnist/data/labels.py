"""The column of classes, as Spark SQL on the JVM, and what a table has of them.

Runs on the driver; a class is an int, whether the column has numbers, names or one-hot.
"""

from __future__ import annotations

import logging
import re

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F
from pyspark.sql import types as T

from spark_mnist import errors
from spark_mnist.core import plan
from spark_mnist.data import feature_columns

logger = logging.getLogger(__name__)

MOST_CLASSES = 1000
"""More are taken for a mistake, say a column of numbers that count rows."""
FEW_CLASSES = 20
"""So many whole numbers are classes, however few rows each has."""
ROWS_OF_A_CLASS = 20
"""Of more whole numbers, each has so many rows on average, or they are a quantity."""
MOST_FRACTIONS = 0.2
"""Of more rows whose label is no whole number, the label is a quantity and not damaged."""
LARGEST_WHOLE = 2.0**53
"""Below it, doubles tell whole numbers apart."""
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", re.ASCII)
ONE_HOT = re.compile(r"[01. ]+(,[01. ]+)+")
"""A label as text that is no class's name."""


def fault(df: DataFrame, input_spec: plan.InputSpec, target: Column) -> Column:
    """Why a row's label cannot be used, or null when it can."""
    found, _ = feature_columns.column(df, input_spec.label)
    missing = F.when(found.isNull(), F.lit(f"{input_spec.label} is null"))
    no_class = F.when(target.isNull(), F.lit(f"{input_spec.label} is {_allowed(input_spec)}"))
    return F.coalesce(missing, no_class)


def discover(df: DataFrame, features: tuple[str, ...], label: str) -> plan.InputSpec:
    """Find out how wide a table is and which classes it has.

    Raises:
        errors.MissingColumn, errors.UnreadableColumn: The columns do not fit.
        errors.BadRows: There are no classes, or more than a network can tell apart, or the label
            looks like a quantity.
        errors.TooFewRows: There is no row.
    """
    classes, names = _classes(df, label)
    one, kind = feature_columns.column(df, features[0])
    pixels = isinstance(kind, T.BinaryType)
    width = len(features)
    if width == 1:
        array = one if pixels else feature_columns.numbers(df, features[0])
        width = 1 if array is None else _size(df, F.length(array) if pixels else F.size(array))
    return plan.InputSpec(
        features=features, label=label, pixels=pixels, width=width, classes=classes, names=names
    )


def column(df: DataFrame, input_spec: plan.InputSpec) -> Column:
    """The class as an int, null where it is none.

    Raises:
        errors.MissingColumn: There is no label column.
        errors.UnreadableColumn: Its type is no label's.
    """
    found, kind = feature_columns.column(df, input_spec.label)
    if input_spec.names:
        names = F.array(*map(F.lit, input_spec.names))
        has_integer_names = input_spec.has_integer_names and isinstance(
            kind, T.NumericType | T.StringType
        )
        word = (
            whole_as_text(df, input_spec.label)
            if has_integer_names
            else F.trim(found.cast("string"))
        )
        place = F.call_function("array_position", names, word)
        return F.when(place > 0, place).cast("int") - 1
    if isinstance(kind, T.NumericType | T.BooleanType):
        return _whole(found.cast("double"), input_spec.classes)
    array = _array(df, input_spec.label)
    one_hot = _class_of_one_hot(array, input_spec.classes)
    if not isinstance(kind, T.StringType):
        return one_hot
    single = _whole(F.get(array, 0).cast("double"), input_spec.classes)
    return F.when(found.contains(","), one_hot).otherwise(single)


def _allowed(input_spec: plan.InputSpec) -> str:
    if input_spec.names:
        more = ", ..." if len(input_spec.names) > 10 else ""
        return f"none of {', '.join(input_spec.names[:10])}{more}"
    return f"neither 0..{input_spec.classes - 1} nor one-hot of length {input_spec.classes}"


def _array(df: DataFrame, name: str) -> Column:
    """A label column of several numbers a row, or of text."""
    array = feature_columns.numbers(df, name)
    if array is None:
        kind = feature_columns.column(df, name)[1].simpleString()
        raise errors.UnreadableColumn(
            f"column {name!r} is {kind}; it may be an integer, "
            f"the name of a class, or one-hot as {feature_columns.ARRAYS}"
        )
    return array


def _classes(df: DataFrame, name: str) -> tuple[int, tuple[str, ...]]:
    """Return the number of classes in a label column, and their names where they have any.

    Names are what text says, or whole numbers where these are not 0, 1, ... without a gap.
    """
    found, kind = feature_columns.column(df, name)
    if isinstance(kind, T.BooleanType):
        _check_any(df.where(found.isNotNull()), name)
        return 2, ()
    if isinstance(kind, T.StringType):
        words = df.select(F.trim(found).alias("word")).where("word != ''").distinct()
        texts = sorted(row["word"] for row in words.limit(MOST_CLASSES + 1).collect())
        if texts and all(ONE_HOT.fullmatch(word) for word in texts):
            return _bounded(_size(df, F.size(_array(df, name))), name), ()
        if texts and not all(NUMBER.fullmatch(word) for word in texts):
            return _bounded(len(texts), name), tuple(texts)
    elif not isinstance(kind, T.NumericType):
        return _bounded(_size(df, F.size(_array(df, name))), name), ()
    return _numbered_classes(df, name)


def _numbered_classes(df: DataFrame, name: str) -> tuple[int, tuple[str, ...]]:
    """Return the same of a column of numbers, or of text that has numbers alone."""
    number = _number(df, name)
    counts = (
        df.where(number.isNotNull() & ~F.isnan(number))
        .groupBy(whole_as_text(df, name).alias("text"))
        .agg(F.count("*").alias("rows"))
    )
    rows = counts.orderBy(F.desc("rows")).limit(MOST_CLASSES + 2).collect()
    whole = sorted(int(row["text"]) for row in rows if row["text"] is not None)
    of_whole = sum(row["rows"] for row in rows if row["text"] is not None)
    of_parts = sum(row["rows"] for row in rows if row["text"] is None)
    if not rows:
        raise errors.BadRows(f"no row has a class in column {name!r}")
    quantity = of_parts > MOST_FRACTIONS * (of_whole + of_parts) or (
        len(whole) > FEW_CLASSES and of_whole < ROWS_OF_A_CLASS * len(whole)
    )
    if quantity or not whole:
        numbers = f"{len(whole)} whole numbers" if not of_parts else "numbers that are not whole"
        raise errors.BadRows(
            f"column {name!r} looks like a quantity to predict ({numbers} in "
            f"{of_whole + of_parts} rows), and only classes can be learned: is it the label? "
            f"Divide it into classes, or, if these are classes, name them: "
            f"concat('class ', {name})"
        )
    _bounded(len(whole), name)
    if len(whole) > FEW_CLASSES:
        logger.warning(
            "column %r has %d whole numbers, which are taken for as many classes; if it is a "
            "quantity, divide it into classes",
            *(name, len(whole)),
        )
    if whole == list(range(len(whole))):
        return len(whole), ()
    logger.info("the classes of column %r are %s", name, feature_columns.shown([*map(str, whole)]))
    return len(whole), tuple(map(str, whole))


def _check_any(labelled: DataFrame, name: str) -> None:
    if labelled.isEmpty():
        raise errors.BadRows(f"no row has a class in column {name!r}")


def _number(df: DataFrame, name: str) -> Column:
    """Return a column of numbers, or of text that has numbers, as doubles."""
    found, kind = feature_columns.column(df, name)
    if isinstance(kind, T.NumericType):
        return found.cast("double")
    return F.expr(
        f"try_cast(trim({feature_columns.quoted(feature_columns.resolve(df, name))}) AS double)"
    )


def whole_as_text(df: DataFrame, name: str) -> Column:
    """Return a whole number in its only form as text, null for anything else."""
    found, kind = feature_columns.column(df, name)
    if isinstance(kind, T.IntegralType):
        return found.cast("string")
    number = _number(df, name)
    whole = (number == F.floor(number)) & (F.abs(number) < LARGEST_WHOLE)
    return F.when(whole, number.cast("bigint").cast("string"))


def _bounded(classes: int, name: str) -> int:
    if classes > MOST_CLASSES:
        raise errors.BadRows(
            f"column {name!r} has {classes} classes or more, at most {MOST_CLASSES} can be told "
            "apart: is it the label?"
        )
    return classes


def _size(df: DataFrame, size: Column) -> int:
    """The count of numbers that most rows have."""
    sizes = df.select(size.alias("size")).where("size > 0").groupBy("size").count()
    first = sizes.orderBy(F.desc("count"), "size").first()
    if first is None:
        raise errors.TooFewRows("the DataFrame has no rows, or only empty ones")
    found: int = first["size"]
    return found


def _whole(number: Column, classes: int) -> Column:
    """A double that is 0, 1, ... below ``classes`` as an int, null for anything else."""
    fits = (number >= 0) & (number < classes) & (number == F.floor(number))
    return F.when(fits, number.cast("int"))


def _class_of_one_hot(array: Column, classes: int) -> Column:
    ones = F.filter(array, lambda x: x == 1)
    zeros = F.filter(array, lambda x: x == 0)
    proper = (F.size(ones) == 1) & (F.size(zeros) == classes - 1) & (F.size(array) == classes)
    return F.when(proper, F.array_position(array, 1.0).cast("int") - 1)
