"""What the rows of a DataFrame are: their classes, their number, which of them cannot be used.

Runs on the driver, before any rank starts; all scans are Spark SQL on the JVM.
"""

from __future__ import annotations

import collections
import logging
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F
from pyspark.sql import types as T

from spark_mnist import errors, options, plan, schema, world

logger = logging.getLogger(__name__)

BUCKETS = 256
"""Parts in which rows are ordered."""
MOST_REASONS = 8
"""Reasons that a message lists."""
SAMPLE_COLUMNS = 5
"""Features of a row that a message shows."""
MOST_CLASSES = 1000
"""More are taken for a mistake, say a column of numbers that count rows."""
ONE_HOT = re.compile(r"[01. ]+(,[01. ]+)+")
"""A label as text that is no class's name."""


@dataclass(frozen=True)
class Census:
    """What one scan of the input found."""

    rows: int
    """Rows that can be used."""
    source: schema.Source
    label: Column
    """The class of a row as an int."""
    usable: DataFrame
    """The input's rows that can be used."""
    dropped: Mapping[str, int]
    """The number of the other rows, by reason."""
    validates: Column | None = None
    """Whether a row validates, where a column says so."""
    validating: int = 0
    """Rows of which it says so."""
    key: Column | None = None
    """A hash of the row and the seed, by which rows are ordered; None where no seed is given."""
    bucket: Column | None = None
    """The part of that order in which a row is; those that validate by a column come last."""
    buckets: Mapping[int, int] = field(default_factory=dict)
    """The number of rows by ``bucket``."""

    @property
    def given(self) -> int:
        """Rows of the input."""
        return self.rows + sum(self.dropped.values())

    def training(self, ratio: float) -> int:
        """How many rows train, of which ``ratio`` do where no column says which."""
        if self.validates is not None:
            return self.rows - self.validating
        return world.share_of_ratio(self.rows, ratio)


def take(
    df: DataFrame,
    reads: plan.Input,
    mode: str = options.FAILFAST,
    validation_indicator: str | None = None,
    seed: int | None = None,
) -> Census:
    """Count the rows and check every one, in one pass of Spark SQL.

    Args:
        df: The input.
        reads: What is read of it.
        mode: What becomes of rows that cannot be used, a value of the option of that name.
        validation_indicator: The column that says which rows validate, if there is one.
        seed: Of an order in which rows can be counted, too.

    Raises:
        errors.MissingColumn, errors.UnreadableColumn: The columns do not fit.
        errors.BadRows: Rows cannot be used; the message counts them by reason and shows a few.
        errors.TooFewRows: There is no row to use.
    """
    source, target = schema.features(df, reads), label(df, reads)
    faults = [schema.fault(source), _label_fault(df, reads, target)]
    validates = None
    if validation_indicator:
        validates = _indicator(df, validation_indicator)
        missing = F.concat(F.lit(validation_indicator), F.lit(" is null"))
        faults.append(F.when(validates.isNull(), missing))
    fault = F.coalesce(*faults)
    key = None if seed is None else F.xxhash64(F.lit(seed), source.column, target)
    part = F.lit(0) if key is None else F.shiftrightunsigned(key, 64 - BUCKETS.bit_length() + 1)
    last = F.lit(False) if validates is None else validates
    bucket = part.cast("int") + last.cast("int") * BUCKETS
    good_bucket = F.when(fault.isNull(), bucket)  # else reasons times buckets would be collected
    kinds = df.select(fault.alias("fault"), target.alias("class"), good_bucket.alias("bucket"))
    bad: collections.Counter[str] = collections.Counter()
    good: collections.Counter[int] = collections.Counter()
    buckets: collections.Counter[int] = collections.Counter()
    for row in kinds.groupBy("fault", "class", "bucket").count().collect():
        if row["fault"] is None:
            good[row["class"]] += row["count"]
            buckets[row["bucket"]] += row["count"]
        else:
            bad[row["fault"]] += row["count"]
    counted, given = _words(bad), sum(good.values()) + sum(bad.values())
    if bad and mode == options.FAILFAST:
        message = f"{sum(bad.values())} of {given} rows cannot be used: {counted}"
        shown = _samples(df.where(fault.isNotNull()), reads)
        raise errors.BadRows(f"{message}; for instance {shown}. {_remedy(source, bad)}", bad)
    if bad and not good:
        raise errors.BadRows(f"none of {given} rows can be used: {counted}", bad)
    if not good:
        raise errors.TooFewRows("the DataFrame has no rows")
    if bad:
        logger.warning("%d of %d rows are left out: %s", sum(bad.values()), given, counted)
    if len(good) == 1:
        name = reads.names[next(iter(good))] if reads.names else next(iter(good))
        logger.warning("all rows have the label %s: there is nothing to tell apart", name)
    usable = df.where(fault.isNull()) if bad else df
    return Census(
        rows=sum(good.values()),
        source=source,
        label=target,
        usable=usable,
        dropped=bad,
        validates=validates,
        validating=sum(count for bucket, count in buckets.items() if bucket >= BUCKETS),
        key=key,
        bucket=bucket,
        buckets=buckets,
    )


def _indicator(df: DataFrame, name: str) -> Column:
    """The column that says which rows validate.

    Raises:
        errors.MissingColumn: There is none of that name.
        errors.UnreadableColumn: It is not boolean.
    """
    found, kind = schema.column(df, name)
    if not isinstance(kind, T.BooleanType):
        raise errors.UnreadableColumn(
            f"column {name!r} is {kind.simpleString()}; what says which rows validate is boolean"
        )
    return found


def _label_fault(df: DataFrame, reads: plan.Input, target: Column) -> Column:
    """Why a row's label cannot be used, or null when it can."""
    found, _ = schema.column(df, reads.label)
    missing = F.when(found.isNull(), F.lit(f"{reads.label} is null"))
    no_class = F.when(target.isNull(), F.lit(f"{reads.label} is {_allowed(reads)}"))
    return F.coalesce(missing, no_class)


def _words(counts: Mapping[str, int]) -> str:
    """Reasons with their numbers, the most frequent first."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    shown = "; ".join(f"{count} x {why}" for why, count in ordered[:MOST_REASONS])
    return shown if len(ordered) <= MOST_REASONS else f"{shown}; and more"


def _samples(bad: DataFrame, reads: plan.Input) -> str:
    """A few of the rows that cannot be used, shortened."""
    names = [f"`{name}`" for name in (*reads.features[:SAMPLE_COLUMNS], reads.label)]
    short = reprlib.Repr()
    short.maxlist, short.maxdict, short.maxstring, short.maxother = 3, SAMPLE_COLUMNS + 1, 40, 60
    return ", ".join(short.repr(row.asDict()) for row in bad.select(*names).limit(3).collect())


def _remedy(source: schema.Source, counts: Mapping[str, int]) -> str:
    dropping = f"Mend them, or leave them out with mode={options.DROPMALFORMED}"
    if source.top == 1 and any(why.endswith("outside 0..1") for why in counts):
        return f"Pixels in 0..255 belong in bytes or integers. {dropping}"
    return dropping


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


def label(df: DataFrame, reads: plan.Input) -> Column:
    """The class as an int, null where it is none.

    Raises:
        errors.MissingColumn: There is no label column.
        errors.UnreadableColumn: Its type is no label's.
    """
    found, kind = schema.column(df, reads.label)
    if reads.names:
        names = F.array(*map(F.lit, reads.names))
        place = F.call_function("array_position", names, F.trim(found.cast("string")))
        return F.nullif(place, F.lit(0)).cast("int") - 1
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
