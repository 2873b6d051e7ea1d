"""What a DataFrame must hold, and the tensors that its rows become.

Two steps, the same for training and scoring, so that one row always gives one tensor:

1. in Spark SQL, on the JVM: every column type a user may bring becomes one of few (``Encoding``);
2. in numpy, on executors: those become ``[B, W]`` of an ``Encoding``, one byte a number where that
   is enough; the network's graph makes them float32 (``registry.numbers``), for pictures in 0..1.

Shape letters: B = rows of a batch, W = numbers of a row. Nothing here imports TensorFlow.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import logging
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from pyspark.ml.functions import vector_to_array
from pyspark.ml.linalg import VectorUDT
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql import types as T
from pyspark.sql.pandas.functions import pandas_udf

from spark_mnist import errors
from spark_mnist.core import plan, requirements

logger = logging.getLogger(__name__)

FIT_RESULT = "epoch int, losses map<string,double>, metrics map<string,double>"
ARROW_ROWS = "spark.sql.execution.arrow.maxRecordsPerBatch"
"""Spark's setting of the rows that it sends to Python at once."""
ARROW_BYTES = 128 << 20
"""That they should have at most."""
PATTERN = "*"
"""What a name has that stands for several columns."""
MOST_NAMES = 10
"""Columns that a message names."""
FILES = {
    "PNG": "^89504E470D0A1A0A",
    "JPEG": "^FFD8FF[CDE]",
    "GIF": "^47494638(37|39)61",
    "BMP": "^424D",
    "WebP": "^52494646.{8}57454250",
    "TIFF": "^(49492A00|4D4D002A)",
    "NumPy": "^934E554D5059",
}
"""How files begin that people take for pixels, in hexadecimal digits; a BMP also has its size."""
FILE = re.compile(
    rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff[\xc0-\xef]|GIF8[79]a|RIFF....WEBP|II\*\0|MM\0\*|\x93NUMPY",
    re.DOTALL,
)
"""The same, but for BMP, as bytes."""
ARRAYS = "an array of numbers, a Vector or a string of comma-separated numbers"


@dataclass(frozen=True)
class Source:
    """The features of a DataFrame, brought into one of the few forms that cross to Python."""

    column: Column
    """Binary, an array of an integer type, or ``array<float>``."""
    encoding: plan.Encoding
    input_spec: plan.InputSpec
    binary: bool = False

    @property
    def top(self) -> float | None:
        """The largest stored number that is allowed; None allows all that are finite."""
        return self.encoding.scale if self.input_spec.pixels else None

    @property
    def words(self) -> str:
        """What one row must have, for messages."""
        noun = "pixels" if self.input_spec.pixels else "numbers"
        return f"{self.input_spec.width} {noun}"


def features(df: DataFrame, input_spec: plan.InputSpec, *, standardized: bool = False) -> Source:
    """Find the features and bring them into a form that crosses to Python.

    Args:
        df: Has them.
        input_spec: What is read of it.
        standardized: Whether the network standardises them: they stay doubles until then.

    Raises:
        errors.MissingColumn: A column is not there.
        errors.UnreadableColumn: A column's type has no tensor form.
    """
    double = standardized and not input_spec.pixels
    kind_of_number = "double" if double else "float"
    floats = plan.Encoding("float64" if double else "float32", 1.0, input_spec.width)
    in_bytes = plan.Encoding("uint8", 255.0, input_spec.width)
    if len(input_spec.features) > 1:
        if input_spec.pixels and _in_bytes(df, input_spec):
            pixels = (_whole_number(df, name) for name in input_spec.features)
            return Source(F.array(*pixels), in_bytes, input_spec)
        values = (_number(df, name, kind_of_number) for name in input_spec.features)
        return Source(F.array(*values), floats, input_spec)
    (name,) = input_spec.features
    found, kind = column(df, name)
    if isinstance(kind, T.BinaryType) and input_spec.pixels:
        return Source(found, in_bytes, input_spec, binary=True)
    integers = isinstance(kind, T.ArrayType) and isinstance(kind.elementType, T.IntegralType)
    if integers and input_spec.pixels:
        return Source(found, in_bytes, input_spec)
    array = numbers(df, name, kind_of_number)
    if array is None and not input_spec.pixels and isinstance(kind, T.NumericType):
        array = F.array(_number(df, name, kind_of_number))
    if array is None:
        allowed = f"binary, {ARRAYS}" if input_spec.pixels else f"a number, {ARRAYS}"
        raise errors.UnreadableColumn(
            f"column {name!r} is {kind.simpleString()}; it may be {allowed}"
        )
    return Source(array, floats, input_spec)


def expand(
    columns: Sequence[str], names: Sequence[str], besides: Sequence[str | None] = ()
) -> tuple[str, ...]:
    """Put the columns that a pattern like ``pixel*`` matches in its place, in their order.

    Args:
        columns: That there are.
        names: With or without patterns.
        besides: Columns that are no features, in any spelling: patterns do not match them.

    Raises:
        errors.MissingColumn: A pattern matches none.
    """
    expanded: list[str] = []
    other_names = [_spelling(name) for name in besides if name]
    for name in names:
        if PATTERN not in name or name in columns:
            expanded.append(name)
            continue
        free = [other for other in columns if _spelling(other) not in other_names]
        matched = [other for other in free if fnmatch.fnmatchcase(other, name)]
        if not matched:
            raise errors.MissingColumn(f"no column matches {name!r} among {shown(columns)}")
        expanded += [other for other in matched if other not in names and other not in expanded]
    return tuple(expanded)


def _spelling(name: str) -> str:
    """Return what is alike for all spellings of a column's name."""
    return name.strip().lower()


def pixel_columns(
    df: DataFrame, input_spec: plan.InputSpec, besides: Sequence[str | None]
) -> tuple[str, ...]:
    """Return the columns of pixels of a table that has nothing else, or ().

    Args:
        df: The table.
        input_spec: Of pictures in one column.
        besides: Columns that are no features.
    """
    other_names = [_spelling(name) for name in besides if name]
    names = tuple(name for name in df.columns if _spelling(name) not in other_names)
    if (
        _spelling(input_spec.features[0]) in map(_spelling, df.columns)
        or len(names) != input_spec.width
    ):
        return ()
    logger.info("%s to %s are the pixels", names[0], names[-1])
    return names


def with_text(df: DataFrame, input_spec: plan.InputSpec) -> plan.InputSpec:
    """Note how pixels that are text, each in a column of its own, are to be understood."""
    if len(input_spec.features) == 1:
        return input_spec
    types = [column(df, name)[1] for name in input_spec.features]
    in_bytes = all(isinstance(kind, T.IntegralType) for kind in types)
    if any(isinstance(kind, T.StringType) for kind in types):
        # Of most rows: one that is damaged decides nothing.
        values = F.array(*(_number(df, name, "double") for name in input_spec.features))
        finite = F.filter(values, lambda value: ~_not_finite(value))
        above = F.exists(finite, lambda value: value > 1)
        between = F.exists(finite, lambda value: value != F.floor(value))
        counts = df.select(F.count_if(above).alias("above"), F.count_if(between).alias("between"))
        found = counts.first()
        in_bytes = found is not None and found["above"] > found["between"]
    return dataclasses.replace(input_spec, text_in_bytes=in_bytes)


def fault(source: Source) -> Column:
    """Say in words why a row's features cannot be used, or null when they can."""
    array, names = source.column, source.input_spec.features
    outside = F.lit(False)
    if not source.binary and source.top is not None:
        outside = (F.array_min(array) < 0) | (F.array_max(array) > source.top)
    if len(names) > 1:  # the columns are an array that is never null, of the right size
        wrong = F.array_position(F.transform(array, _not_finite), True)
        which = F.get(F.array(*map(F.lit, names)), (wrong - 1).cast("int"))
        missing = F.when(wrong > 0, F.concat(which, F.lit(" is missing or no finite number")))
        if source.top is None:
            return missing
        pixel = F.lit(f"{names[0]} ... {names[-1]} have a pixel outside 0..{source.top:.0f}")
        return F.coalesce(missing, F.when(outside, pixel))
    (name,) = names
    noun = "pixel" if source.input_spec.pixels else "number"
    size = F.length(array) if source.binary else F.size(array)
    sizes = F.concat(F.lit(f"{name} has "), size, F.lit(f" {noun}s, not {source.input_spec.width}"))
    rules = [(array.isNull(), F.lit(f"{name} is null")), (size != source.input_spec.width, sizes)]
    if source.binary:
        files = [(test, f"{name} is a {what} file, not pixels") for what, test in _files(array)]
        rules = [rules[0], *((test, F.lit(words)) for test, words in files), *rules[1:]]
    else:
        no_number = F.exists(array, lambda p: p.isNull() | F.isnan(p))
        infinite = F.exists(array, _infinite)
        rules += [
            (no_number, F.lit(f"{name} has a {noun} that is no number")),
            (infinite, F.lit(f"{name} has a {noun} that is infinite")),
        ]
    if not source.binary and source.top is not None:
        rules.append((outside, F.lit(f"{name} has a pixel outside 0..{source.top:.0f}")))
    return F.coalesce(*(F.when(condition, words) for condition, words in rules))


def usable(source: Source) -> Source:
    """The same features, null in rows where they cannot be used."""
    return dataclasses.replace(source, column=F.when(fault(source).isNull(), source.column))


def order_key(source: Source, seed: int, label: Column) -> Column:
    """Return a hash of a row and a seed that is alike for all forms in which the row may come.

    Of pictures it is that of their bytes, also where integers hold these, or floats that are their
    255th parts; of other numbers that of floats, also where doubles are learned from, with what
    floats leave out of large ones: seconds since 1970 of the same minute are one float.
    """

    def key(content: Column) -> Column:
        return F.xxhash64(F.lit(seed), content, label)

    numbers = source.column
    if source.binary:
        return key(numbers)
    if not source.input_spec.pixels:
        floats = numbers.cast("array<float>")
        if source.encoding.dtype != "float64":
            return key(floats)
        rest = F.zip_with(numbers, floats, lambda one, other: F.round(one - other, 3))
        none = F.forall(rest, lambda number: number == 0)
        return F.when(none, key(floats)).otherwise(key(F.concat(numbers, rest)))
    if source.encoding.dtype == "uint8":
        return key(_bytes(numbers))
    by_255 = F.transform(numbers, lambda number: F.round(number.cast("double") * 255))
    whole = F.zip_with(numbers, by_255, lambda one, other: one == (other / 255).cast("float"))
    return F.when(F.forall(whole, lambda same: same), key(_bytes(by_255))).otherwise(key(numbers))


def _bytes(numbers: Column) -> Column:
    """Return an array of whole numbers in 0..255 as binary."""
    characters = F.transform(numbers, lambda number: F.char(number.cast("int")))
    return F.encode(F.array_join(characters, ""), "ISO-8859-1")


def arrow_rows(spark: SparkSession, source: Source) -> int | None:
    """Return how many rows Spark may send to Python at once, where its own setting is too high.

    Spark counts rows, ten thousand by default, and not bytes: that many pictures of 150,000 numbers
    are more than Arrow can hold, let alone an executor.
    """
    size = 1 if source.binary else 8
    most = max(1, ARROW_BYTES // (source.encoding.width * size))
    now = int(str(spark.conf.get(ARROW_ROWS)))  # 0 and less are all
    return most if now > most or now <= 0 else None


def pack(source: Source) -> Column:
    """The features as bytes of ``source.encoding``."""
    if source.binary:
        return source.column
    dtype = source.encoding.dtype

    def packed(rows: pd.Series) -> pd.Series:
        return pd.Series([np.asarray(row, dtype).tobytes() for row in rows])

    return by_batch(packed, "binary")(source.column)


def reader(source: Source) -> Callable[[pd.Series], npt.NDArray[np.generic]]:
    """A function for executors: a batch of ``source.column`` to ``[B, W]`` of its encoding.

    The function raises ``errors.BadRows`` on a row that cannot be a network's.
    """
    encoding, binary, top, words = source.encoding, source.binary, source.top, source.words
    name = ", ".join(source.input_spec.features[:5])

    def read(rows: pd.Series) -> npt.NDArray[np.generic]:
        if any(row is None or len(row) != encoding.width for row in rows):
            raise errors.BadRows(f"a row to predict has no {name} of {words}")
        if binary and any(FILE.match(row) for row in rows):
            raise errors.BadRows(f"a row to predict has a file in {name}, not pixels: decode it")
        if binary or rows.empty:  # every byte is a pixel
            return encoding.unpack(rows)
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
        requirements.ignore_new_pandas()
        udf: Callable[[Column], Column] = pandas_udf(function, returns)  # type: ignore[call-overload]
    return udf


def resolve(df: DataFrame, name: str) -> str:
    """Return the column that a name means: its own, or the only one that Spark would find.

    Case counts where ``spark.sql.caseSensitive`` is true; blanks around a name, as headers of
    CSV files have them, count where that tells two columns apart.

    Raises:
        errors.MissingColumn: There is none of that name.
        errors.UnreadableColumn: There are several.
    """
    columns = df.columns
    alike = [other for other in columns if other.lower().strip() == name.lower().strip()]
    if alike == [name]:
        return name
    if str(df.sparkSession.conf.get("spark.sql.caseSensitive")).lower() == "true":
        spellings: tuple[Callable[[str], str], ...] = (str, str.strip)
    else:
        spellings = (str.lower, lambda text: text.lower().strip())
    for spelling in spellings:
        found = [other for other in alike if spelling(other) == spelling(name)]
        if len(found) == 1:
            return found[0]
        if found:
            raise errors.UnreadableColumn(
                f"the DataFrame has {len(found)} columns called {name!r} ({', '.join(found)}): "
                "rename all but one"
            )
    raise errors.MissingColumn(_no_column(df, name))


def _no_column(df: DataFrame, name: str) -> str:
    """Say that a column is not there, and what may be the reason."""
    names = df.columns
    if not names:
        return f"no column {name!r}: the DataFrame has no columns at all; is the file empty?"
    message = f"no column {name!r} among {shown(names)}{errors.did_you_mean(name, names)}"
    if names == ["_corrupt_record"]:
        return f"{message}; the JSON has not one object a line: read it with multiLine=true"
    if len(names) == 1 and (mark := next((m for m in ";\t|" if m in names[0]), None)):
        return f"{message}; the file is separated by {mark!r}: read it with sep={mark!r}"
    values = [other for other in names if re.fullmatch(r"[-+]?\d+(\.\d+)*(_\d+)?", other)]
    if len(values) > len(names) / 2:
        return f"{message}; these look like values: without a header, read it with header=false"
    if all(re.fullmatch(r"_c\d+", other) for other in names):
        return f"{message}; if the file has a header, read it with header=true"
    if name == plan.InputSpec.features[0]:
        return f"{message}; name the columns to learn from with features="
    return message


def shown(names: Sequence[str]) -> str:
    """Return the first of many names, and how many there are."""
    if len(names) <= MOST_NAMES:
        return str(list(names))
    return f"{str(list(names[:MOST_NAMES])).removesuffix(']')}, ...], {len(names)} in all"


def quoted(name: str) -> str:
    """Return a column's name as SQL writes it."""
    return f"`{name.replace('`', '``')}`"


def column(df: DataFrame, name: str) -> tuple[Column, T.DataType]:
    """Return a column and its type.

    Raises:
        errors.MissingColumn: There is none of that name.
        errors.UnreadableColumn: There are several.
    """
    found = resolve(df, name)
    return df[quoted(found)], df.schema[df.columns.index(found)].dataType


def numbers(df: DataFrame, name: str, kind_of_number: str = "float") -> Column | None:
    """Return a column as an array of floats, or doubles, if it holds several numbers a row.

    A word of a string that is no number becomes null, as does a Vector that is null.

    Returns:
        None where it holds no numbers, or one.
    """
    found, kind = column(df, name)
    if isinstance(kind, VectorUDT):  # Spark's own function fails on a null
        dtype = "float64" if kind_of_number == "double" else "float32"
        return F.when(found.isNotNull(), vector_to_array(found, dtype))
    if isinstance(kind, T.StringType):
        words = f"split({quoted(resolve(df, name))}, ',')"
        return F.expr(f"transform({words}, word -> try_cast(trim(word) AS {kind_of_number}))")
    if isinstance(kind, T.ArrayType) and isinstance(kind.elementType, T.NumericType):
        return found.cast(f"array<{kind_of_number}>")
    return None


def _in_bytes(df: DataFrame, input_spec: plan.InputSpec) -> bool:
    """Whether pixels, each a column, are whole numbers up to 255."""
    kinds = [column(df, name)[1] for name in input_spec.features]
    if any(isinstance(kind, T.StringType) for kind in kinds):
        return input_spec.text_in_bytes
    return all(isinstance(kind, T.IntegralType) for kind in kinds)


def _number(df: DataFrame, name: str, kind_of_number: str) -> Column:
    """Return a column of one number a row, null where text is no number."""
    found, kind = column(df, name)
    if isinstance(kind, T.StringType):
        return F.expr(f"try_cast(trim({quoted(resolve(df, name))}) AS {kind_of_number})")
    if isinstance(kind, T.NumericType | T.BooleanType):
        return found.cast(kind_of_number)
    raise errors.UnreadableColumn(
        f"column {name!r} is {kind.simpleString()}; of several features each must be a number"
    )


def _whole_number(df: DataFrame, name: str) -> Column:
    """Return a column of one whole number a row, null where it is none."""
    found, kind = column(df, name)
    if isinstance(kind, T.IntegralType):
        return found.cast("bigint")
    number = _number(df, name, "double")
    return F.when(number == F.floor(number), number.cast("bigint"))


def _files(content: Column) -> list[tuple[str, Column]]:
    """Return tests by which files of pictures are told from raw pixels, by their kind."""
    start = F.hex(F.substring(content, 1, 12))
    size = F.conv(F.concat(*(F.substring(start, place, 2) for place in (11, 9, 7, 5))), 16, 10)
    own_size = size.cast("bigint") == F.length(content)
    return [
        (what, start.rlike(pattern) & (own_size if what == "BMP" else F.lit(True)))
        for what, pattern in FILES.items()
    ]


def _not_finite(number: Column) -> Column:
    return number.isNull() | F.isnan(number) | _infinite(number)


def _infinite(number: Column) -> Column:
    # Not by abs, which overflows on the least of the integers.
    return (number == float("inf")) | (number == float("-inf"))
