"""The column of classes, as Spark SQL on the JVM, and what a table has of them.

Runs on the driver; a class is an int, whether the column has numbers, names or one-hot.
"""

from __future__ import annotations

import re

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F
from pyspark.sql import types as T

from spark_mnist import errors, plan, schema

MOST_CLASSES = 1000
"""More are taken for a mistake, say a column of numbers that count rows."""
ONE_HOT = re.compile(r"[01. ]+(,[01. ]+)+")
"""A label as text that is no class's name."""


def fault(df: DataFrame, reads: plan.Input, target: Column) -> Column:
    """Why a row's label cannot be used, or null when it can."""
    found, _ = schema.column(df, reads.label)
    missing = F.when(found.isNull(), F.lit(f"{reads.label} is null"))
    no_class = F.when(target.isNull(), F.lit(f"{reads.label} is {_allowed(reads)}"))
    return F.coalesce(missing, no_class)


def discover(df: DataFrame, features: tuple[str, ...], label: str) -> plan.Input:
    """Find out how wide a table is and which classes it has.

    Raises:
        errors.MissingColumn, errors.UnreadableColumn: The columns do not fit.
        errors.BadRows: There are no classes, or more than a network can tell apart.
        errors.TooFewRows: There is no row.
    """
    classes, names = _classes(df, label)
    pixels = isinstance(schema.column(df, features[0])[1], T.BinaryType)
    width = len(features)
    if width == 1:
        one, _ = schema.column(df, features[0])
        array = one if pixels else schema.numbers(df, features[0])
        width = 1 if array is None else _size(df, F.length(array) if pixels else F.size(array))
    return plan.Input(
        features=features, label=label, pixels=pixels, width=width, classes=classes, names=names
    )


def column(df: DataFrame, reads: plan.Input) -> Column:
    """The class as an int, null where it is none.

    Raises:
        errors.MissingColumn: There is no label column.
        errors.UnreadableColumn: Its type is no label's.
    """
    found, kind = schema.column(df, reads.label)
    if reads.names:
        names = F.array(*map(F.lit, reads.names))
        place = F.call_function("array_position", names, F.trim(found.cast("string")))
        return F.when(place > 0, place).cast("int") - 1
    if isinstance(kind, T.NumericType | T.BooleanType):
        return _whole(found.cast("double"), reads.classes)
    array = _array(df, reads.label)
    one_hot = _class_of_one_hot(array, reads.classes)
    if not isinstance(kind, T.StringType):
        return one_hot
    single = _whole(F.get(array, 0).cast("double"), reads.classes)
    return F.when(found.contains(","), one_hot).otherwise(single)


def _allowed(reads: plan.Input) -> str:
    if reads.names:
        return f"none of {', '.join(reads.names[:10])}{', ...' if len(reads.names) > 10 else ''}"
    return f"neither 0..{reads.classes - 1} nor one-hot of length {reads.classes}"


def _array(df: DataFrame, name: str) -> Column:
    """A label column of several numbers a row, or of text."""
    array = schema.numbers(df, name)
    if array is None:
        raise errors.UnreadableColumn(
            f"column {name!r} is {df.schema[name].dataType.simpleString()}; it may be an integer, "
            f"the name of a class, or one-hot as {schema.ARRAYS}"
        )
    return array


def _classes(df: DataFrame, name: str) -> tuple[int, tuple[str, ...]]:
    """The number of classes in a label column, and their names where they have any."""
    found, kind = schema.column(df, name)
    if isinstance(kind, T.StringType):
        words = df.select(F.trim(found).alias("word")).where("word != ''").distinct()
        names = sorted(row["word"] for row in words.limit(MOST_CLASSES + 1).collect())
        if names and all(ONE_HOT.fullmatch(word) for word in names):
            return _bounded(_size(df, F.size(_array(df, name))), name), ()
        if not all(word.isdecimal() for word in names):
            return _bounded(len(names), name), tuple(names)
        found = F.expr(f"try_cast(`{name}` AS double)")
    elif not isinstance(kind, T.NumericType | T.BooleanType):
        return _bounded(_size(df, F.size(_array(df, name))), name), ()
    largest = df.select(F.max(_whole(found.cast("double"), 2**31 - 1))).first()
    if largest is None or largest[0] is None:
        raise errors.BadRows(f"no row has a class in column {name!r}")
    return _bounded(largest[0] + 1, name), ()


def _bounded(classes: int, name: str) -> int:
    if classes > MOST_CLASSES:
        raise errors.BadRows(
            f"column {name!r} has classes up to {classes - 1}, at most {MOST_CLASSES} can be told "
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
