"""What a DataFrame must hold, and the tensors that its rows become.

Two steps, the same for training and scoring, so that one picture always gives one tensor:

1. in Spark SQL, on the JVM: every column type a user may bring becomes one of three (``Pixels``);
2. in numpy, on executors: those become float32 ``[B, 784]`` in 0..1.

Shape letters: B = rows of a batch. Nothing here imports TensorFlow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
from pyspark.ml.functions import vector_to_array
from pyspark.ml.linalg import VectorUDT
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F
from pyspark.sql import types as T
from pyspark.sql.pandas.functions import pandas_udf

from spark_mnist import errors

IMAGE = "image"
LABEL = "label"
WIDTH = 784
CLASSES = 10

FIT_RESULT = "epoch int, losses map<string,double>, metrics map<string,double>"
EVALUATE_RESULT = "no int, losses map<string,double>, metrics map<string,double>"


@dataclass(frozen=True)
class Pixels:
    """How one row's pixels lie in bytes, and what makes them 0..1."""

    dtype: str
    """``uint8``, or ``float32`` in little-endian order."""
    scale: float
    """What a stored value is divided by."""
    values: str
    """The allowed values, in words."""

    @property
    def row_bytes(self) -> int:
        """Size of a packed row."""
        return WIDTH * np.dtype(self.dtype).itemsize


BYTES = Pixels("uint8", 255.0, "0..255")
FLOATS = Pixels("float32", 1.0, "0..1")


@dataclass(frozen=True)
class Source:
    """An image column, brought into one of the few forms that cross to Python."""

    column: Column
    """Binary, an array of an integer type, or ``array<float>``."""
    pixels: Pixels
    binary: bool


def image(df: DataFrame) -> Source:
    """Find the image column and bring it into a form that crosses to Python.

    Raises:
        errors.MissingColumn: There is none.
        errors.UnreadableColumn: Its type has no tensor form.
    """
    column, kind = _column(df, IMAGE)
    if isinstance(kind, T.BinaryType):
        return Source(column, BYTES, binary=True)
    if isinstance(kind, VectorUDT):
        return Source(_elements(column), FLOATS, binary=False)
    if isinstance(kind, T.StringType):
        return Source(_numbers(IMAGE), FLOATS, binary=False)
    if isinstance(kind, T.ArrayType) and isinstance(kind.elementType, T.IntegralType):
        return Source(column, BYTES, binary=False)
    if isinstance(kind, T.ArrayType) and isinstance(kind.elementType, T.NumericType):
        return Source(column.cast("array<float>"), FLOATS, binary=False)
    raise errors.UnreadableColumn(
        f"column {IMAGE!r} is {kind.simpleString()}; it may be binary, an array of numbers, "
        "a Vector or a string of comma-separated numbers"
    )


def label(df: DataFrame) -> Column:
    """The label as an int, null where it is none of 0..9.

    Raises:
        errors.MissingColumn: There is no label column.
        errors.UnreadableColumn: Its type is no label's.
    """
    column, kind = _column(df, LABEL)
    if isinstance(kind, T.NumericType):
        return _class(column)
    if isinstance(kind, VectorUDT):
        return _class_of_one_hot(_elements(column))
    if isinstance(kind, T.ArrayType) and isinstance(kind.elementType, T.NumericType):
        return _class_of_one_hot(column.cast("array<float>"))
    if isinstance(kind, T.StringType):
        numbers = _numbers(LABEL)
        one_hot = column.contains(",")
        return F.when(one_hot, _class_of_one_hot(numbers)).otherwise(_class(F.get(numbers, 0)))
    raise errors.UnreadableColumn(
        f"column {LABEL!r} is {kind.simpleString()}; it may be an integer 0..9 or one-hot of "
        f"length {CLASSES}, as an array, a Vector or a string of comma-separated numbers"
    )


def fault(source: Source, label: Column | None) -> Column:
    """Say in words why a row cannot be used, or null when it can."""
    column, pixels = source.column, source.pixels
    size = F.length(column) if source.binary else F.size(column)
    rules = [
        (column.isNull(), f"{IMAGE} is null"),
        (size != WIDTH, f"{IMAGE} does not have {WIDTH} pixels"),
    ]
    if not source.binary:
        top = int(pixels.scale)
        rules += [
            (
                F.exists(column, lambda p: p.isNull() | F.isnan(p)),
                f"{IMAGE} has a pixel that is no number",
            ),
            (
                (F.array_min(column) < 0) | (F.array_max(column) > top),
                f"{IMAGE} has a pixel outside {pixels.values}",
            ),
        ]
    if label is not None:
        rules.append((label.isNull(), f"{LABEL} is neither 0..9 nor one-hot of length {CLASSES}"))
    return F.coalesce(*(F.when(condition, F.lit(words)) for condition, words in rules))


@dataclass(frozen=True)
class Census:
    """What one scan of the input found."""

    rows: int
    source: Source
    label: Column


def inspect(df: DataFrame) -> Census:
    """Count the rows and check every one, in one pass of Spark SQL.

    Raises:
        errors.MissingColumn, errors.UnreadableColumn: The columns do not fit.
        errors.BadRows: Rows cannot be learned from; the message counts them by reason.
        errors.TooFewRows: There is no row.
    """
    source, target = image(df), label(df)
    by_fault = df.select(fault(source, target).alias("fault")).groupBy("fault").count().collect()
    counts = {row["fault"]: row["count"] for row in by_fault}
    good = counts.pop(None, 0)
    bad = sum(counts.values())
    if bad:
        found = "; ".join(f"{count} x {why}" for why, count in sorted(counts.items()))
        raise errors.BadRows(f"{bad} of {good + bad} rows cannot be used: {found}")
    if not good:
        raise errors.TooFewRows("the DataFrame has no rows")
    return Census(good, source, target)


def pack(source: Source) -> Column:
    """The image as the bytes of ``source.pixels``."""
    if source.binary:
        return source.column
    dtype = source.pixels.dtype

    # PySpark types neither a return type given as text nor the function that it makes.
    @pandas_udf("binary")  # type: ignore[call-overload,untyped-decorator]
    def packed(images: pd.Series) -> pd.Series:
        return pd.Series([np.asarray(row, dtype).tobytes() for row in images])

    column: Column = packed(source.column)
    return column


def unpack(images: Iterable[bytes], pixels: Pixels) -> npt.NDArray[np.generic]:
    """Join packed rows to one array ``[B, 784]`` of ``pixels.dtype``."""
    return np.frombuffer(b"".join(images), pixels.dtype).reshape(-1, WIDTH)


def tensor_reader(source: Source) -> Callable[[pd.Series], npt.NDArray[np.float32]]:
    """A function for executors: a batch of ``source.column`` to float32 ``[B, 784]`` in 0..1.

    The function raises ``errors.BadRows`` on a row that has no such tensor.
    """
    pixels, binary = source.pixels, source.binary

    def read(images: pd.Series) -> npt.NDArray[np.float32]:
        if any(image is None or len(image) != WIDTH for image in images):
            raise errors.BadRows(f"a row to predict has no {IMAGE} of {WIDTH} pixels")
        stored = unpack(images, pixels) if binary else np.stack(list(images)).astype("float32")
        values = stored.astype("float32") / np.float32(pixels.scale)
        if not (values.min(initial=0) >= 0 and values.max(initial=1) <= 1):  # refuses NaN, too
            raise errors.BadRows(f"a row to predict has a pixel outside {pixels.values}")
        return values

    return read


def _column(df: DataFrame, name: str) -> tuple[Column, T.DataType]:
    if name not in df.columns:
        hint = errors.did_you_mean(name, df.columns)
        raise errors.MissingColumn(f"no column {name!r} among {df.columns}{hint}")
    return df[name], df.schema[name].dataType


def _numbers(name: str) -> Column:
    """Text of comma-separated numbers as ``array<float>``; null in place of what is no number."""
    return F.expr(f"transform(split(`{name}`, ','), word -> try_cast(trim(word) AS float))")


def _elements(vector: Column) -> Column:
    """A Vector's numbers as ``array<float>``; Spark's own function fails on a null."""
    return F.when(vector.isNotNull(), vector_to_array(vector, "float32"))


def _class(number: Column) -> Column:
    """0..9 as an int, and null for anything else, without a cast that could overflow."""
    digits = F.array(*(F.lit(float(digit)) for digit in range(CLASSES)))
    place = F.call_function("array_position", digits, number.cast("double"))
    return F.nullif(place, F.lit(0)).cast("int") - 1


def _class_of_one_hot(array: Column) -> Column:
    ones = F.filter(array, lambda x: x == 1)
    zeros = F.filter(array, lambda x: x == 0)
    proper = (F.size(ones) == 1) & (F.size(zeros) == CLASSES - 1) & (F.size(array) == CLASSES)
    return F.when(proper, F.array_position(array, 1.0).cast("int") - 1)
