"""What a DataFrame must hold, and the tensors that its rows become.

Two steps, the same for training and scoring, so that one row always gives one tensor:

1. in Spark SQL, on the JVM: every column type a user may bring becomes one of few (``Encoding``);
2. in numpy, on executors: those become ``[B, W]`` of an ``Encoding``, one byte a number where that
   is enough; the network's graph makes them float32 (``networks.numbers``), for pictures in 0..1.

Shape letters: B = rows of a batch, W = numbers of a row. Nothing here imports TensorFlow.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from pyspark.ml.functions import vector_to_array
from pyspark.ml.linalg import VectorUDT
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F
from pyspark.sql import types as T
from pyspark.sql.pandas.functions import pandas_udf

from spark_mnist import errors, plan, versions

FIT_RESULT = "epoch int, losses map<string,double>, metrics map<string,double>"
ARRAYS = "an array of numbers, a Vector or a string of comma-separated numbers"


@dataclass(frozen=True)
class Source:
    """The features of a DataFrame, brought into one of the few forms that cross to Python."""

    column: Column
    """Binary, an array of an integer type, or ``array<float>``."""
    encoding: plan.Encoding
    reads: plan.Input
    binary: bool = False

    @property
    def top(self) -> float | None:
        """The largest stored number that is allowed; None allows all that are finite."""
        return self.encoding.scale if self.reads.pixels else None

    @property
    def words(self) -> str:
        """What one row must have, for messages."""
        noun = "pixels" if self.reads.pixels else "numbers"
        return f"{self.reads.width} {noun}"


def features(df: DataFrame, reads: plan.Input) -> Source:
    """Find the features and bring them into a form that crosses to Python.

    Raises:
        errors.MissingColumn: A column is not there.
        errors.UnreadableColumn: A column's type has no tensor form.
    """
    floats = plan.Encoding("float32", 1.0, reads.width)
    if len(reads.features) > 1:
        return Source(F.array(*(_number(df, name) for name in reads.features)), floats, reads)
    (name,) = reads.features
    found, kind = column(df, name)
    in_bytes = plan.Encoding("uint8", 255.0, reads.width)
    if isinstance(kind, T.BinaryType) and reads.pixels:
        return Source(found, in_bytes, reads, binary=True)
    integers = isinstance(kind, T.ArrayType) and isinstance(kind.elementType, T.IntegralType)
    if integers and reads.pixels:
        return Source(found, in_bytes, reads)
    array = numbers(df, name)
    if array is None and not reads.pixels and isinstance(kind, T.NumericType):
        array = F.array(_number(df, name))
    if array is None:
        allowed = f"binary, {ARRAYS}" if reads.pixels else f"a number, {ARRAYS}"
        raise errors.UnreadableColumn(
            f"column {name!r} is {kind.simpleString()}; it may be {allowed}"
        )
    return Source(array, floats, reads)


def fault(source: Source) -> Column:
    """Say in words why a row's features cannot be used, or null when they can."""
    array, names = source.column, source.reads.features
    if len(names) > 1:  # the columns are an array that is never null, of the right size
        wrong = F.array_position(F.transform(array, _not_finite), True)
        which = F.get(F.array(*map(F.lit, names)), (wrong - 1).cast("int"))
        return F.when(wrong > 0, F.concat(which, F.lit(" is missing or no finite number")))
    (name,) = names
    noun = "pixel" if source.reads.pixels else "number"
    size = F.length(array) if source.binary else F.size(array)
    sizes = F.concat(F.lit(f"{name} has "), size, F.lit(f" {noun}s, not {source.reads.width}"))
    rules = [(array.isNull(), F.lit(f"{name} is null")), (size != source.reads.width, sizes)]
    if not source.binary:
        no_number = F.exists(array, lambda p: p.isNull() | F.isnan(p))
        infinite = F.exists(array, _infinite)
        rules += [
            (no_number, F.lit(f"{name} has a {noun} that is no number")),
            (infinite, F.lit(f"{name} has a {noun} that is infinite")),
        ]
    if not source.binary and source.top is not None:
        outside = (F.array_min(array) < 0) | (F.array_max(array) > source.top)
        rules.append((outside, F.lit(f"{name} has a pixel outside 0..{source.top:.0f}")))
    return F.coalesce(*(F.when(condition, words) for condition, words in rules))


def usable(source: Source) -> Source:
    """The same features, null in rows where they cannot be used."""
    return dataclasses.replace(source, column=F.when(fault(source).isNull(), source.column))


def pack(source: Source) -> Column:
    """The features as bytes of ``source.encoding``."""
    if source.binary:
        return source.column
    dtype = source.encoding.dtype

    def packed(rows: pd.Series) -> pd.Series:
        return pd.Series([np.asarray(row, dtype).tobytes() for row in rows])

    return by_batch(packed, "binary")(source.column)


def unpack(rows: Iterable[bytes], encoding: plan.Encoding) -> npt.NDArray[np.generic]:
    """Join packed rows to one array ``[B, W]`` of ``encoding.dtype``."""
    return np.frombuffer(b"".join(rows), encoding.dtype).reshape(-1, encoding.width)


def reader(source: Source) -> Callable[[pd.Series], npt.NDArray[np.generic]]:
    """A function for executors: a batch of ``source.column`` to ``[B, W]`` of its encoding.

    The function raises ``errors.BadRows`` on a row that cannot be a network's.
    """
    encoding, binary, top, words = source.encoding, source.binary, source.top, source.words
    name = ", ".join(source.reads.features[:5])

    def read(rows: pd.Series) -> npt.NDArray[np.generic]:
        if any(row is None or len(row) != encoding.width for row in rows):
            raise errors.BadRows(f"a row to predict has no {name} of {words}")
        if binary or rows.empty:  # every byte is a pixel
            return unpack(rows, encoding)
        numbers: npt.NDArray[Any] = np.concatenate(rows.to_numpy()).reshape(-1, encoding.width)
        if top is None and not np.isfinite(numbers).all():
            raise errors.BadRows(f"a row to predict has a number in {name} that is not finite")
        inside = top is None or (numbers.min() >= 0 and numbers.max() <= top)
        if not inside:  # NaN, too
            raise errors.BadRows(f"a row to predict has a pixel outside 0..{top:.0f}")
        stored: npt.NDArray[np.generic] = numbers.astype(encoding.dtype)
        return stored

    return read


def by_batch(function: Callable[..., Any], returns: str) -> Callable[[Column], Column]:
    """Make a function on columns of one on batches.

    Args:
        function: Takes and gives a pandas Series, or iterators of them, as its annotations say.
        returns: Spark type of what it gives.
    """
    # The stubs want functionType=, with which Spark would warn that annotations took its place.
    with warnings.catch_warnings():
        versions.ignore_new_pandas()
        made: Callable[[Column], Column] = pandas_udf(function, returns)  # type: ignore[call-overload]
    return made


def column(df: DataFrame, name: str) -> tuple[Column, T.DataType]:
    """A column and its type.

    Raises:
        errors.MissingColumn: There is none of that name.
    """
    if name not in df.columns:
        hint = errors.did_you_mean(name, df.columns)
        raise errors.MissingColumn(f"no column {name!r} among {df.columns}{hint}")
    return df[f"`{name}`"], df.schema[name].dataType


def numbers(df: DataFrame, name: str) -> Column | None:
    """A column as ``array<float>`` if it holds several numbers a row, else None.

    A word of a string that is no number becomes null, as does a Vector that is null.
    """
    found, kind = column(df, name)
    if isinstance(kind, VectorUDT):  # Spark's own function fails on a null
        return F.when(found.isNotNull(), vector_to_array(found, "float32"))
    if isinstance(kind, T.StringType):
        words = f"split(`{name}`, ',')"
        return F.expr(f"transform({words}, word -> try_cast(trim(word) AS float))")
    if isinstance(kind, T.ArrayType) and isinstance(kind.elementType, T.NumericType):
        return found.cast("array<float>")
    return None


def _number(df: DataFrame, name: str) -> Column:
    """A column of one number a row, as a float; null where text is no number."""
    found, kind = column(df, name)
    if isinstance(kind, T.StringType):
        return F.expr(f"try_cast(trim(`{name}`) AS float)")
    if isinstance(kind, T.NumericType | T.BooleanType):
        return found.cast("float")
    raise errors.UnreadableColumn(
        f"column {name!r} is {kind.simpleString()}; of several features each must be a number"
    )


def _not_finite(number: Column) -> Column:
    return number.isNull() | F.isnan(number) | _infinite(number)


def _infinite(number: Column) -> Column:
    # Not by abs, which overflows on the least of the integers.
    return (number == float("inf")) | (number == float("-inf"))
