"""What the rows of a DataFrame are: how many, of which classes, which of them cannot be used.

Runs on the driver, before any rank starts; all scans are Spark SQL on the JVM.
"""

from __future__ import annotations

import logging
import reprlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F
from pyspark.sql import types as T

from spark_mnist import errors, options
from spark_mnist.core import plan, sharding
from spark_mnist.data import feature_columns, labels

logger = logging.getLogger(__name__)

BUCKETS = 256
"""Parts in which rows are ordered."""
MOST_REASONS = 8
"""Reasons that a message lists."""
SAMPLE_COLUMNS = 5
"""Features of a row that a message shows."""


@dataclass(frozen=True)
class RowProfile:
    """What one scan of the input found."""

    rows: int
    """Rows that can be used."""
    source: feature_columns.Source
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
        return sharding.share_of_ratio(self.rows, ratio)


def profile_rows(
    df: DataFrame,
    input_spec: plan.InputSpec,
    mode: str = options.FAILFAST,
    validation_indicator: str | None = None,
    seed: int | None = None,
    *,
    standardized: bool = False,
) -> RowProfile:
    """Count the rows and check every one, in one pass of Spark SQL.

    Args:
        df: The input.
        input_spec: What is read of it.
        mode: What becomes of rows that cannot be used, a value of the option of that name.
        validation_indicator: The column that says which rows validate, if there is one.
        seed: Of an order in which rows can be counted, too.
        standardized: Whether the network standardises the features.

    Raises:
        errors.MissingColumn, errors.UnreadableColumn: The columns do not fit.
        errors.BadRows: Rows cannot be used; the message counts them by reason and shows a few.
        errors.TooFewRows: There is no row to use.
    """
    source = feature_columns.features(df, input_spec, standardized=standardized)
    target = labels.column(df, input_spec)
    faults = [feature_columns.fault(source), labels.fault(df, input_spec, target)]
    validates = None
    if validation_indicator:
        validates = _indicator(df, validation_indicator)
        missing = F.concat(F.lit(validation_indicator), F.lit(" is null"))
        faults.append(F.when(validates.isNull(), missing))
    fault = F.coalesce(*faults)
    key = None if seed is None else feature_columns.order_key(source, seed, target)
    part = F.lit(0) if key is None else F.shiftrightunsigned(key, 64 - BUCKETS.bit_length() + 1)
    last = F.lit(False) if validates is None else validates
    bucket = part.cast("int") + last.cast("int") * BUCKETS
    good_bucket = F.when(fault.isNull(), bucket)  # else reasons times buckets would be collected
    bad, good, buckets = _count(
        df.select(fault.alias("fault"), target.alias("class"), good_bucket.alias("bucket"))
    )
    given, counted = bad.total() + good.total(), _words(bad)
    if bad and mode == options.FAILFAST:
        message = f"{bad.total()} of {given} rows cannot be used: {counted}"
        shown = _samples(df.where(fault.isNotNull()), input_spec)
        raise errors.BadRows(f"{message}; for instance {shown}. {_remedy(source, bad)}", bad)
    if bad and not good:
        raise errors.BadRows(f"none of {given} rows can be used: {counted}", bad)
    if not good:
        raise errors.TooFewRows("the DataFrame has no rows")
    if bad:
        logger.warning("%d of %d rows are left out: %s", bad.total(), given, counted)
    if len(good) == 1:
        (only,) = good
        name = input_spec.names[only] if input_spec.names else only
        logger.warning("all rows have the label %s: there is nothing to tell apart", name)
    usable = df.where(fault.isNull()) if bad else df
    return RowProfile(
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


def _count(rows: DataFrame) -> tuple[Counter[str], Counter[int], Counter[int]]:
    """Rows that cannot be used by reason, and those that can by class and by bucket."""
    bad: Counter[str] = Counter()
    good: Counter[int] = Counter()
    buckets: Counter[int] = Counter()
    for row in rows.groupBy("fault", "class", "bucket").count().collect():
        if row["fault"] is None:
            good[row["class"]] += row["count"]
            buckets[row["bucket"]] += row["count"]
        else:
            bad[row["fault"]] += row["count"]
    return bad, good, buckets


def _indicator(df: DataFrame, name: str) -> Column:
    """The column that says which rows validate.

    Raises:
        errors.MissingColumn: There is none of that name.
        errors.UnreadableColumn: It is not boolean.
    """
    found, kind = feature_columns.column(df, name)
    if not isinstance(kind, T.BooleanType):
        raise errors.UnreadableColumn(
            f"column {name!r} is {kind.simpleString()}; what says which rows validate is boolean"
        )
    return found


def _words(counts: Mapping[str, int]) -> str:
    """Reasons with their numbers, the most frequent first."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    shown = "; ".join(f"{count} x {why}" for why, count in ordered[:MOST_REASONS])
    return shown if len(ordered) <= MOST_REASONS else f"{shown}; and more"


def _samples(bad: DataFrame, input_spec: plan.InputSpec) -> str:
    """A few of the rows that cannot be used, shortened."""
    columns = (*input_spec.features[:SAMPLE_COLUMNS], input_spec.label)
    names = [feature_columns.quoted(feature_columns.resolve(bad, name)) for name in columns]
    short = reprlib.Repr()
    short.maxlist, short.maxdict, short.maxstring, short.maxother = 3, SAMPLE_COLUMNS + 1, 40, 60
    return ", ".join(short.repr(row.asDict()) for row in bad.select(*names).limit(3).collect())


def _remedy(source: feature_columns.Source, counts: Mapping[str, int]) -> str:
    dropping = f"Mend them, or leave them out with mode={options.DROPMALFORMED}"
    if source.top == 1 and any(why.endswith("outside 0..1") for why in counts):
        return f"Pixels in 0..255 belong in bytes or integers. {dropping}"
    return dropping
