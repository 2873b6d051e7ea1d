"""Feature columns: the checks of a DataFrame's columns, and the tensors that its rows become.

The conversion has two steps, the same for training and scoring, so that one row always gives one
tensor:

1. in Spark SQL, on the JVM: every allowed column type becomes one of a few (``Encoding``);
2. in numpy, on executors: those become ``[B, W]`` of an ``Encoding``, one byte a number where that
   is enough. The network's graph makes them float32 (``registry.numbers``), for pictures in 0..1.

Shape letters: B = rows of a batch, W = numbers of a row. This module does not import TensorFlow.
Runs on: driver, Spark task.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pyspark.ml.functions import vector_to_array
from pyspark.ml.linalg import VectorUDT
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql import types as T

from spark_mnist import errors
from spark_mnist.core import plan
from spark_mnist.data import arrow_batches, column_names

logger = logging.getLogger(__name__)

ARROW_ROWS = "spark.sql.execution.arrow.maxRecordsPerBatch"
"""Spark's setting for the number of rows that it sends to Python at once."""
ARROW_BATCH_BYTES = 128 << 20
"""Most bytes that these rows should have together."""
DECODE = "spark_mnist.datasets.decode"
"""Function that makes pixels of image files, for messages."""
IMAGE_FIELDS = {"height", "width", "nChannels", "mode", "data"}
"""Fields of the struct that ``spark.read.format("image")`` makes of a file."""
ARRAY_COLUMN = "spark_mnist_features"
"""Name of the column that ``with_array`` adds."""
MAX_SHOWN_FEATURES = 5
"""Most features of a row that a message shows."""
FILE_SIGNATURES_HEX = {
    "PNG": "^89504E470D0A1A0A",
    "JPEG": "^FFD8FF[CDE]",
    "GIF": "^47494638(37|39)61",
    "BMP": "^424D",
    "WebP": "^52494646.{8}57454250",
    "TIFF": "^(49492A00|4D4D002A)",
    "NumPy": "^934E554D5059",
}
"""First bytes, as patterns of hexadecimal digits, of files that people take for pixels.

A BMP file must also have its own size in its header.
"""
FILE_SIGNATURES = re.compile(
    rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff[\xc0-\xef]|GIF8[79]a|RIFF....WEBP|II\*\0|MM\0\*|\x93NUMPY",
    re.DOTALL,
)
"""The same signatures as bytes, without that of BMP."""
FIRST_BYTES, SIGNATURE_BYTES = b"\x89\xffGRIM\x93", 12
"""First byte of each of these signatures, and most bytes of one."""
MAX_WHOLE_FLOAT = 1 << 24
"""Largest number up to which float32 has all whole numbers."""
LARGE_WHOLE = f"a whole number above {MAX_WHOLE_FLOAT:,} as a float: cast the column to bigint"
"""Fault of a larger number that the network takes as an integer."""
ARRAYS = "an array of numbers, a Vector or a string of comma-separated numbers"
"""Forms of several numbers a row, for messages."""


@dataclass(frozen=True)
class Source:
    """The features of a DataFrame, converted to one of the few forms that cross to Python."""

    column: Column
    """Features of a row: binary, an array of an integer type, of floats or of doubles."""
    encoding: plan.Encoding
    input_spec: plan.InputSpec
    binary: bool = False
    parts: tuple[Source, ...] = ()
    """The features of each of several inputs, in order."""
    one_by_one: bool = False
    """Whether each number has a column of its own, and the array is made of these."""

    @property
    def top(self) -> float | None:
        """Largest stored number that is allowed; None allows all that are finite."""
        return self.encoding.scale if self.input_spec.pixels else None

    @property
    def size_text(self) -> str:
        """Size of one row as text, for messages."""
        noun = "pixels" if self.input_spec.pixels else "numbers"
        return f"{self.input_spec.width} {noun}"

    @property
    def number_text(self) -> str:
        """Kind of a stored number as text, for messages."""
        dtype = self.encoding.dtype
        return f"finite {dtype}" if dtype.startswith("float") else "whole number"


def features(df: DataFrame, input_spec: plan.InputSpec, *, standardized: bool = False) -> Source:
    """Find the feature columns and convert them to a form that crosses to Python.

    Args:
        df: The DataFrame that has the features.
        input_spec: The columns to read, and what they hold.
        standardized: Whether the network standardizes the features: they stay doubles until then.

    Raises:
        errors.MissingColumn: A column does not exist.
        errors.UnreadableColumn: The type of a column has no tensor form.
    """
    if input_spec.inputs:
        return _join_inputs(df, input_spec.inputs)
    if input_spec.whole and not standardized:
        integers = _integers(df, input_spec)
        if integers:
            return integers
    uses_doubles = standardized and not input_spec.pixels
    number_type = "double" if uses_doubles else "float"
    float_encoding = plan.Encoding("float64" if uses_doubles else "float32", 1.0, input_spec.width)
    byte_encoding = plan.Encoding("uint8", 255.0, input_spec.width)
    if len(input_spec.features) > 1:
        if input_spec.pixels and _pixels_are_bytes(df, input_spec):
            return Source(
                _whole_numbers(df, input_spec), byte_encoding, input_spec, one_by_one=True
            )
        values = _array(_number_sql(df, name, number_type) for name in input_spec.features)
        return Source(values, float_encoding, input_spec, one_by_one=True)
    (name,) = input_spec.features
    feature, data_type = column_names.column(df, name)
    if isinstance(data_type, T.BinaryType) and input_spec.pixels:
        return Source(feature, byte_encoding, input_spec, binary=True)
    is_integer_array = isinstance(data_type, T.ArrayType) and isinstance(
        data_type.elementType, T.IntegralType
    )
    if is_integer_array and input_spec.pixels:
        return Source(feature, byte_encoding, input_spec)
    array = numbers(df, name, number_type)
    is_number = isinstance(data_type, T.NumericType | T.BooleanType)
    if array is None and not input_spec.pixels and is_number:
        array = _array([_number_sql(df, name, number_type)])
        return Source(array, float_encoding, input_spec, one_by_one=True)
    if array is None:
        if is_image_struct(data_type):
            raise errors.UnreadableColumn(
                f"column {name!r} is an image struct of Spark, not pixels: decode it with {DECODE}"
            )
        allowed_types = f"binary, {ARRAYS}" if input_spec.pixels else f"a number, {ARRAYS}"
        raise errors.UnreadableColumn(
            f"column {name!r} is {data_type.simpleString()}; it may be {allowed_types}"
        )
    return Source(array, float_encoding, input_spec)


def _join_inputs(df: DataFrame, inputs: Sequence[plan.Input]) -> Source:
    """Return the features of several inputs as one binary column, their bytes in order."""
    specs = [
        plan.InputSpec(
            features=each.features,
            pixels=each.pixels,
            width=each.width,
            whole=each.whole,
            categories=each.categories,
        )
        for each in inputs
    ]
    parts = tuple(_integers(df, spec) or features(df, spec) for spec in specs)
    encodings = tuple((each.name, part.encoding) for each, part in zip(inputs, parts, strict=True))
    width = sum(encoding.row_bytes for _, encoding in encodings)
    encoding = plan.Encoding("uint8", 1.0, width, encodings)
    names = tuple(name for spec in specs for name in spec.features)
    spec = plan.InputSpec(features=names, pixels=False, width=width)
    return Source(_input_bytes(parts), encoding, spec, binary=True, parts=parts)


def _input_bytes(parts: Sequence[Source]) -> Column:
    """Return the bytes of several inputs, one after the other; null where one cannot be used."""
    dtypes = [part.encoding.dtype for part in parts]

    def join_rows(batches: Iterator[tuple[pa.Array, ...]]) -> Iterator[pa.Array]:
        for columns in batches:
            packed = map(arrow_batches.packed, columns, dtypes)
            yield pc.binary_join_element_wise(*packed, pa.scalar(b""))  # null where any is null

    # Spark calls the function for unusable rows, too, whatever condition stands around it.
    columns = (usable(part).column for part in parts)
    return arrow_batches.by_batch(join_rows, "binary")(*columns)


def _integers(df: DataFrame, input_spec: plan.InputSpec) -> Source | None:
    """Return features that are integers without rounding; None where they are other numbers."""
    encoding = plan.Encoding("int64", 1.0, input_spec.width)
    data_types = [column_names.field(df, name)[1] for name in input_spec.features]
    if all(isinstance(data_type, T.IntegralType) for data_type in data_types):
        names = [column_names.quote(column_names.resolve(df, name)) for name in input_spec.features]
        values = _array(f"CAST({name} AS bigint)" for name in names)
        return Source(values, encoding, input_spec, one_by_one=True)
    (data_type, *others) = data_types
    if (
        not others
        and isinstance(data_type, T.ArrayType)
        and isinstance(data_type.elementType, T.IntegralType)
    ):
        values = column_names.column(df, input_spec.features[0])[0].cast("array<bigint>")
        return Source(values, encoding, input_spec)
    return None


def is_image_struct(data_type: T.DataType) -> bool:
    """Return whether a type is the struct that ``spark.read.format("image")`` makes of a file."""
    return isinstance(data_type, T.StructType) and set(data_type.names) >= IMAGE_FIELDS


def detect_text_pixels(df: DataFrame, input_spec: plan.InputSpec) -> plan.InputSpec:
    """Return the specification with ``text_in_bytes`` as the types and values of columns say."""
    if len(input_spec.features) == 1:
        return input_spec
    data_types = [column_names.field(df, name)[1] for name in input_spec.features]
    text_in_bytes = all(isinstance(data_type, T.IntegralType) for data_type in data_types)
    if any(isinstance(data_type, T.StringType) for data_type in data_types):
        # The majority of the rows decides, so that one damaged row does not.
        values = _array(_number_sql(df, name, "double") for name in input_spec.features)
        finite = F.filter(values, lambda value: ~_not_finite(value))
        above_one = F.exists("finite", lambda value: value > 1)
        fractional = F.exists("finite", lambda value: value != F.floor(value))
        counts = df.select(finite.alias("finite")).select(
            F.count_if(above_one).alias("above"), F.count_if(fractional).alias("between")
        )
        row = counts.first()
        text_in_bytes = row is not None and row["above"] > row["between"]
    return dataclasses.replace(input_spec, text_in_bytes=text_in_bytes)


def with_array(df: DataFrame, source: Source) -> tuple[DataFrame, Source]:
    """Add arrays of features that have a column each to the DataFrame, as columns of their own.

    Spark computes such a column once. Without it, each expression that uses the array has all of
    its casts, and to optimize hundreds of them again and again takes Spark half a minute.
    """
    if source.parts:
        parts = []
        for part in source.parts:
            df, part_with_array = with_array(df, part)
            parts.append(part_with_array)
        return df, dataclasses.replace(source, column=_input_bytes(parts), parts=tuple(parts))
    if not source.one_by_one:
        return df, source
    name = ARRAY_COLUMN
    while name in map(column_names.canonical, df.columns):
        name += "_"
    df = df.withColumn(name, source.column)
    return df, dataclasses.replace(source, column=df[name])


def fault(source: Source) -> Column:
    """Return a column that states why a row's features cannot be used, or null where they can."""
    if source.parts:
        return F.coalesce(*map(fault, source.parts))
    array, names = source.column, source.input_spec.features
    outside = F.lit(False)
    if not source.binary and source.top is not None:
        outside = (F.array_min(array) < 0) | (F.array_max(array) > source.top)
    if source.one_by_one:  # the array is never null, and of the right size
        position = F.array_position(F.transform(array, _not_finite), True)
        wrong_name = F.get(F.array(*map(F.lit, names)), (position - 1).cast("int"))
        missing = F.when(
            position > 0,
            F.concat(wrong_name, F.lit(f" is missing or no {source.number_text}")),
        )
        if source.input_spec.whole:
            return F.coalesce(missing, _whole_fault(source))
        if source.top is None:
            return missing
        outside_fault = F.lit(
            f"{names[0]} ... {names[-1]} have a pixel outside 0..{source.top:.0f}"
        )
        return F.coalesce(missing, F.when(outside, outside_fault))
    (name,) = names
    noun = "pixel" if source.input_spec.pixels else "number"
    size = F.length(array) if source.binary else F.size(array)
    size_fault = F.concat(
        F.lit(f"{name} has "), size, F.lit(f" {noun}s, not {source.input_spec.width}")
    )
    rules = [
        (array.isNull(), F.lit(f"{name} is null")),
        (size != source.input_spec.width, size_fault),
    ]
    if source.binary:
        file_rules = [
            (test, f"{name} is a {kind} file, not pixels{_decode_hint(kind)}")
            for kind, test in _file_tests(array)
        ]
        rules = [rules[0], *((test, F.lit(message)) for test, message in file_rules), *rules[1:]]
    else:
        no_number = F.exists(array, lambda p: p.isNull() | F.isnan(p))
        infinite = F.exists(array, _infinite)
        rules += [
            (no_number, F.lit(f"{name} has a {noun} that is no number")),
            (infinite, F.lit(f"{name} has a {noun} that is infinite as a {source.encoding.dtype}")),
        ]
    if source.input_spec.whole:
        return F.coalesce(*(F.when(*rule) for rule in rules), _whole_fault(source))
    if not source.binary and source.top is not None:
        rules.append((outside, F.lit(f"{name} has a pixel outside 0..{source.top:.0f}")))
    return F.coalesce(*(F.when(condition, message) for condition, message in rules))


def _whole_fault(source: Source) -> Column:
    """Return a column that states that a number is none of those that the network takes."""
    spec = source.input_spec

    def is_wrong(number: Column) -> Column:
        is_fraction = number != F.floor(number)
        if not spec.categories:
            return is_fraction
        return is_fraction | (number < 0) | (number >= spec.categories)

    name = _shown(spec.features)
    fault = F.when(F.exists(source.column, is_wrong), f"{name} has {_whole_text(spec)}")
    if source.encoding.dtype == "int64":
        return fault
    is_large = F.exists(source.column, lambda number: F.abs(number) > MAX_WHOLE_FLOAT)
    return fault.when(is_large, f"{name} has {LARGE_WHOLE}")


def _whole_text(input_spec: plan.InputSpec) -> str:
    """Return what is wrong with a number that is not whole, or not one of the categories."""
    if not input_spec.categories:
        return "a number that is not whole, as the network's input is"
    return (
        f"a number that is none of the {input_spec.categories} categories of the network's "
        f"Embedding, 0 to {input_spec.categories - 1}"
    )


def _shown(features: Sequence[str]) -> str:
    """Return the names of the first of many features as text."""
    return ", ".join(features[:MAX_SHOWN_FEATURES])


def _decode_hint(kind: str) -> str:
    """Return the end of a message on a kind of file: how to decode it, where it is a picture."""
    return "" if kind == "NumPy" else f": decode it with {DECODE}"


def usable(source: Source) -> Source:
    """Return the same features, null in rows where they cannot be used."""
    return dataclasses.replace(source, column=F.when(fault(source).isNull(), source.column))


def order_key(source: Source, seed: int, label: Column) -> Column:
    """Return a hash of a row and a seed that is equal for all forms in which the row may come.

    Pictures are hashed as bytes, also where they come as integers, or as floats that are a 255th of
    these. Other numbers are hashed as floats, also where training uses doubles. What floats leave
    out of large doubles is hashed, too: seconds since 1970 of the same minute are one float.
    """

    def key(*content: Column) -> Column:
        return F.xxhash64(F.lit(seed), *content, label)

    if source.parts:
        return key(*(order_key(part, seed, label) for part in source.parts))
    array = source.column
    if source.binary:
        return key(array)
    if not source.input_spec.pixels:
        floats = array.cast("array<float>")
        if source.encoding.dtype != "float64":
            return key(floats)
        remainder = F.zip_with(array, floats, lambda one, other: F.round(one - other, 3))
        is_float = F.forall(remainder, lambda number: number == 0)
        return F.when(is_float, key(floats)).otherwise(key(F.concat(array, remainder)))
    if source.encoding.dtype == "uint8":
        return key(_as_binary(array))
    byte_values = F.transform(array, lambda number: F.round(number.cast("double") * 255))
    is_byte = F.zip_with(array, byte_values, lambda one, other: one == (other / 255).cast("float"))
    return F.when(F.forall(is_byte, lambda equal: equal), key(_as_binary(byte_values))).otherwise(
        key(array)
    )


def _as_binary(array: Column) -> Column:
    """Return an array of whole numbers in 0..255 as binary."""
    characters = F.transform(array, lambda number: F.char(number.cast("int")))
    return F.encode(F.array_join(characters, ""), "ISO-8859-1")


def arrow_rows(spark: SparkSession, source: Source) -> int | None:
    """Return the most rows to send to Python at once; None where Spark's setting is low enough.

    Spark counts rows, ten thousand by default, and not bytes: that many pictures of 150,000 numbers
    are more than Arrow can hold, let alone an executor.
    """
    number_bytes = 1 if source.binary and not source.parts else 8
    return rows_at_once(spark, source.encoding.width * number_bytes)


def rows_at_once(spark: SparkSession, row_bytes: int) -> int | None:
    """Return the most rows of ``row_bytes`` each to send to Python at once; see ``arrow_rows``."""
    max_rows = max(1, ARROW_BATCH_BYTES // row_bytes)
    current_rows = int(str(spark.conf.get(ARROW_ROWS)))  # 0 or less means all
    return max_rows if current_rows > max_rows or current_rows <= 0 else None


def limit_batches(spark: SparkSession, max_rows: int | None) -> None:
    """Lower the session's rows of a batch where executors could not hold a batch of such wide rows.

    The setting stays lower: the rows are read after this function returns.

    Args:
        spark: The session.
        max_rows: The rows of a batch, see ``rows_at_once``; None leaves the setting as it is.
    """
    if max_rows:
        logger.info("%s is %d from now on, as rows are wide", ARROW_ROWS, max_rows)
        spark.conf.set(ARROW_ROWS, max_rows)


def pack(source: Source) -> Column:
    """Return the features as bytes of ``source.encoding``."""
    if source.binary:
        return source.column
    dtype = source.encoding.dtype

    def pack_rows(batches: Iterator[tuple[pa.Array, ...]]) -> Iterator[pa.Array]:
        return (arrow_batches.packed(rows, dtype) for (rows,) in batches)

    return arrow_batches.by_batch(pack_rows, "binary")(source.column)


def reader(source: Source) -> Callable[[pa.Array], npt.NDArray[np.generic]]:
    """Return a function for executors that converts a batch of ``source.column`` to ``[B, W]``.

    The numbers have the type of the encoding. The function raises ``errors.BadRows`` on a row that
    the network cannot take.
    """
    encoding, binary, top, size_text = source.encoding, source.binary, source.top, source.size_text
    name, spec = _shown(source.input_spec.features), source.input_spec
    source_parts = bool(source.parts)
    holds_pixels = binary and not source_parts

    def read(rows: pa.Array) -> npt.NDArray[np.generic]:
        if source_parts and rows.null_count:
            raise errors.BadRows(f"a row to predict has null, or too few numbers, in {name}")
        if rows.null_count or (arrow_batches.row_lengths(rows) != encoding.width).any():
            raise errors.BadRows(f"a row to predict has no {name} of {size_text}")
        values = arrow_batches.numbers(rows).reshape(-1, encoding.width)
        if holds_pixels and _has_files(values):
            raise errors.BadRows(
                f"a row to predict has a file in {name}, not pixels: decode it with {DECODE}"
            )
        if binary or not len(rows):  # every byte is a pixel
            return values.astype(encoding.dtype, copy=False)
        if top is None and not np.isfinite(values).all():
            raise errors.BadRows(f"a row to predict has a number in {name} that is not finite")
        if spec.whole and not _all_whole(values, spec.categories):
            raise errors.BadRows(f"a row to predict has, in {name}, {_whole_text(spec)}")
        if spec.whole and encoding.dtype != "int64" and np.abs(values).max() > MAX_WHOLE_FLOAT:
            raise errors.BadRows(f"a row to predict has, in {name}, {LARGE_WHOLE}")
        in_range = top is None or (values.min() >= 0 and values.max() <= top)
        if not in_range:  # also where a value is NaN
            raise errors.BadRows(f"a row to predict has a pixel outside 0..{top:.0f}")
        array: npt.NDArray[np.generic] = values.astype(encoding.dtype)
        return array

    return read


def _has_files(pixels: npt.NDArray[np.uint8]) -> bool:
    """Return whether any row ``[B, W]`` begins as a file does."""
    candidates = pixels[np.isin(pixels[:, 0], [*FIRST_BYTES])]
    return any(FILE_SIGNATURES.match(row[:SIGNATURE_BYTES].tobytes()) for row in candidates)


def _all_whole(values: npt.NDArray[Any], categories: int) -> bool:
    """Return whether all numbers are whole, and are categories where there are any."""
    is_fitting = values == np.floor(values)
    if categories:
        is_fitting &= (values >= 0) & (values < categories)
    return bool(is_fitting.all())


def numbers(df: DataFrame, name: str, number_type: str = "float") -> Column | None:
    """Return a column as an array of floats, or doubles, if it holds several numbers a row.

    A word of a text that is no number becomes null, as does a Vector that is null.

    Returns:
        The array; None where the column holds no numbers, or one a row.
    """
    values, data_type = column_names.column(df, name)
    if isinstance(data_type, VectorUDT):  # Spark's own function fails on a null
        dtype = "float64" if number_type == "double" else "float32"
        return F.when(values.isNotNull(), vector_to_array(values, dtype))
    if isinstance(data_type, T.StringType):
        words = f"split({column_names.quote(column_names.resolve(df, name))}, ',')"
        return F.expr(f"transform({words}, word -> try_cast(trim(word) AS {number_type}))")
    if isinstance(data_type, T.ArrayType) and isinstance(
        data_type.elementType, T.NumericType | T.BooleanType
    ):
        return values.cast(f"array<{number_type}>")
    return None


def _pixels_are_bytes(df: DataFrame, input_spec: plan.InputSpec) -> bool:
    """Return whether pixels, each in a column of its own, are whole numbers up to 255."""
    data_types = [column_names.field(df, name)[1] for name in input_spec.features]
    if any(isinstance(data_type, T.StringType) for data_type in data_types):
        return input_spec.text_in_bytes
    return all(isinstance(data_type, T.IntegralType) for data_type in data_types)


def _array(elements: Iterable[str]) -> Column:
    """Return an array of SQL expressions; of hundreds, one text is made sooner than columns."""
    return F.expr(f"array({', '.join(elements)})")


def _number_sql(df: DataFrame, name: str, number_type: str) -> str:
    """Return the SQL of one number a row, null where text is no number."""
    exact_name, data_type = column_names.field(df, name)
    if isinstance(data_type, T.StringType):
        return f"try_cast(trim({column_names.quote(exact_name)}) AS {number_type})"
    if isinstance(data_type, T.NumericType | T.BooleanType):
        return f"CAST({column_names.quote(exact_name)} AS {number_type})"
    raise errors.UnreadableColumn(
        f"column {name!r} is {data_type.simpleString()}; of several features each must be a number"
    )


def _whole_numbers(df: DataFrame, input_spec: plan.InputSpec) -> Column:
    """Return an array of columns of a whole number each, with null for what is none."""
    data_types = [column_names.field(df, name)[1] for name in input_spec.features]
    if all(isinstance(data_type, T.IntegralType) for data_type in data_types):
        return _array(_number_sql(df, name, "bigint") for name in input_spec.features)
    values = _array(_number_sql(df, name, "double") for name in input_spec.features)
    return F.transform(values, lambda value: F.when(value == F.floor(value), value.cast("bigint")))


def _file_tests(content: Column) -> list[tuple[str, Column]]:
    """Return tests that tell files of pictures from raw pixels, by the kind of file."""
    header = F.hex(F.substring(content, 1, 12))
    size_field = F.conv(
        F.concat(*(F.substring(header, position, 2) for position in (11, 9, 7, 5))), 16, 10
    )
    size_matches = size_field.cast("bigint") == F.length(content)
    return [
        (kind, header.rlike(pattern) & (size_matches if kind == "BMP" else F.lit(True)))
        for kind, pattern in FILE_SIGNATURES_HEX.items()
    ]


def _not_finite(number: Column) -> Column:
    return number.isNull() | F.isnan(number) | _infinite(number)


def _infinite(number: Column) -> Column:
    # Not by abs, which overflows on the least of the integers.
    return (number == float("inf")) | (number == float("-inf"))
