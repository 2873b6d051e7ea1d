"""Row profile of a DataFrame: how many rows it has, of which classes, and which cannot be used.

All scans are Spark SQL on the JVM, before any rank starts. Runs on: driver.
"""

from __future__ import annotations

import logging
import reprlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F
from pyspark.sql import types as T

from spark_mnist import errors, options
from spark_mnist.cluster import session
from spark_mnist.core import plan, sharding
from spark_mnist.data import column_names, feature_columns, targets

logger = logging.getLogger(__name__)

BUCKETS = 256
"""Number of parts in which rows are ordered."""
MAX_SHOWN_REASONS = 8
"""Most reasons that a message lists."""
PATH = "path"
"""Name of the column that says from which file a row comes, if a DataFrame has one."""


@dataclass(frozen=True)
class RowProfile:
    """The result of one scan of the input."""

    rows: int
    """Number of rows that can be used."""
    source: feature_columns.Source
    label: Column
    """Target of each row: its class as an int, or an array of ``target_size`` doubles."""
    usable: DataFrame
    """Rows of the input that can be used."""
    dropped: Mapping[str, int]
    """Number of rows that cannot be used, by reason."""
    is_validation: Column | None = None
    """Whether a row validates; None where no column says so."""
    num_validation_rows: int = 0
    """Number of rows that validate by that column."""
    key: Column | None = None
    """Hash of a row and the seed, by which rows are ordered; None where no seed is given."""
    bucket: Column | None = None
    """Part of that order in which a row is; rows that validate by a column come last."""
    buckets: Mapping[int, int] = field(default_factory=dict)
    """Number of rows by ``bucket``."""
    target_size: int = 0
    """Numbers of a target; 0 where it is a class."""
    weight: Column | None = None
    """Weight of each row in the loss; None where rows have none."""

    @property
    def num_input_rows(self) -> int:
        """Number of rows of the input."""
        return self.rows + sum(self.dropped.values())

    def num_training_rows(self, ratio: float) -> int:
        """Return how many rows train; ``ratio`` is their share where no column says which train."""
        if self.is_validation is not None:
            return self.rows - self.num_validation_rows
        return sharding.share_of_ratio(self.rows, ratio)


def profile_rows(
    df: DataFrame,
    input_spec: plan.InputSpec,
    mode: str = options.FAILFAST,
    validation_indicator: str | None = None,
    seed: int | None = None,
    *,
    standardized: bool = False,
    outputs: Sequence[plan.Output] = (),
    sample_weight: str | None = None,
) -> RowProfile:
    """Count the rows and check every one, in one pass of Spark SQL.

    Args:
        df: The input.
        input_spec: The columns to read, and what they hold.
        mode: What happens to rows that cannot be used: a value of the option ``mode``.
        validation_indicator: The column that says which rows validate, if there is one.
        seed: Seed of an order of the rows, in which they are counted, too; None for no order.
        standardized: Whether the network standardizes the features.
        outputs: What the labels are; without them one output learns the classes of ``input_spec``.
        sample_weight: The column with the weight of each row, if there is one.

    Raises:
        errors.MissingColumn, errors.UnreadableColumn: The columns do not fit.
        errors.BadRows: Rows cannot be used; the message counts them by reason and shows a few.
        errors.TooFewRows: There is no row to use.
    """
    df, source = feature_columns.with_array(
        df, feature_columns.features(df, input_spec, standardized=standardized)
    )
    outputs = outputs or (input_spec.output,)
    labels = targets.target(df, outputs)
    target, has_classes = labels.column, not labels.size
    faults = [feature_columns.fault(source), labels.fault]
    weight = is_validation = None
    if sample_weight:
        weight, weight_fault = targets.weight(df, sample_weight)
        faults.append(weight_fault)
    if validation_indicator:
        is_validation = _indicator_column(df, validation_indicator)
        missing = F.concat(F.lit(validation_indicator), F.lit(" is null"))
        faults.append(F.when(is_validation.isNull(), missing))
    fault = F.coalesce(*faults)
    key = None if seed is None else feature_columns.order_key(source, seed, target)
    part = F.lit(0) if key is None else F.shiftrightunsigned(key, 64 - BUCKETS.bit_length() + 1)
    in_validation = F.lit(False) if is_validation is None else is_validation
    bucket = part.cast("int") + in_validation.cast("int") * BUCKETS
    usable_bucket = F.when(fault.isNull(), bucket)  # else reasons times buckets would be collected
    class_number = target if has_classes else F.lit(0)
    has_weight = F.lit(True) if weight is None else weight > 0
    columns = {"fault": fault, "class": class_number, "bucket": usable_bucket}
    fault_counts, class_counts, bucket_counts, num_with_weight = _count_rows(
        df.select(
            *(column.alias(name) for name, column in columns.items()),
            has_weight.alias("has_weight"),
        )
    )
    num_rows, reasons = fault_counts.total() + class_counts.total(), _summarize(fault_counts)
    if fault_counts and mode == options.FAILFAST:
        message = f"{fault_counts.total()} of {num_rows} rows cannot be used: {reasons}"
        label_columns = [output.label for output in outputs]
        label_columns += [sample_weight] if sample_weight else []
        samples = _samples(df.where(fault.isNotNull()), input_spec.features, label_columns)
        raise errors.BadRows(
            f"{message}; for instance {samples}. {_remedy(df, source, fault_counts)}", fault_counts
        )
    if fault_counts and not class_counts:
        raise errors.BadRows(f"none of {num_rows} rows can be used: {reasons}", fault_counts)
    if not class_counts:
        raise errors.TooFewRows("the DataFrame has no rows")
    if not num_with_weight:
        raise errors.BadRows(
            f"sample_weight={sample_weight} is 0 in all rows: nothing would be learned"
        )
    if fault_counts:
        logger.warning("%d of %d rows are left out: %s", fault_counts.total(), num_rows, reasons)
    if has_classes and len(class_counts) == 1:
        (number,) = class_counts
        name = outputs[0].class_names[number]
        logger.warning("all rows have the label %s: a model learns nothing from one class", name)
    usable = df.where(fault.isNull()) if fault_counts else df
    return RowProfile(
        rows=sum(class_counts.values()),
        source=source,
        label=target,
        usable=usable,
        dropped=fault_counts,
        is_validation=is_validation,
        num_validation_rows=sum(
            count for bucket, count in bucket_counts.items() if bucket >= BUCKETS
        ),
        key=key,
        bucket=bucket,
        buckets=bucket_counts,
        target_size=labels.size,
        weight=weight,
    )


def _count_rows(rows: DataFrame) -> tuple[Counter[str], Counter[int], Counter[int], int]:
    """Count unusable rows by reason, others by class and by bucket, and those with a weight."""
    fault_counts: Counter[str] = Counter()
    class_counts: Counter[int] = Counter()
    bucket_counts: Counter[int] = Counter()
    num_with_weight = 0
    counts = rows.groupBy("fault", "class", "bucket", "has_weight").count()
    if not session.has_shuffles(rows):
        slots = rows.sparkSession.sparkContext.defaultParallelism
        partitions = min(slots, int(str(rows.sparkSession.conf.get(session.SHUFFLE_PARTITIONS))))
        few = {session.SHUFFLE_PARTITIONS: str(partitions), session.ADAPTIVE: "false"}
        with session.temporary_settings(rows.sparkSession, few):
            session.make_plan(counts)
    for row in counts.collect():
        if row["fault"] is None:
            class_counts[row["class"]] += row["count"]
            bucket_counts[row["bucket"]] += row["count"]
            num_with_weight += row["count"] * row["has_weight"]
        else:
            fault_counts[row["fault"]] += row["count"]
    return fault_counts, class_counts, bucket_counts, num_with_weight


def _indicator_column(df: DataFrame, name: str) -> Column:
    """Return the column that says which rows validate.

    Raises:
        errors.MissingColumn: No column has that name.
        errors.UnreadableColumn: The column is not boolean.
    """
    indicator, data_type = column_names.column(df, name)
    if not isinstance(data_type, T.BooleanType):
        raise errors.UnreadableColumn(
            f"column {name!r} is {data_type.simpleString()}; validation_indicator "
            "takes a boolean column"
        )
    return indicator


def _summarize(counts: Mapping[str, int]) -> str:
    """Return reasons with their counts as text, the most frequent first."""
    reasons = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    text = "; ".join(f"{count} x {reason}" for reason, count in reasons[:MAX_SHOWN_REASONS])
    return text if len(reasons) <= MAX_SHOWN_REASONS else f"{text}; and more"


def _samples(rows: DataFrame, features: Sequence[str], others: Sequence[str]) -> str:
    """Return a few of the rows that cannot be used as shortened text.

    Where a column of text is named ``path``, the text names the file of each row in full.
    """
    columns = dict.fromkeys((*features[: feature_columns.MAX_SHOWN_FEATURES], *others))
    names = [column_names.quote(column_names.resolve(rows, name)) for name in columns]
    shortener = reprlib.Repr()
    shortener.maxlist, shortener.maxdict = 3, feature_columns.MAX_SHOWN_FEATURES + 1
    shortener.maxstring, shortener.maxother = 40, 60
    has_path = (PATH, "string") in rows.dtypes
    path = F.concat(F.lit(" of "), F.col(PATH)) if has_path else F.lit("")
    samples = rows.select(F.struct(*names).alias("row"), path.alias("origin")).limit(3).collect()
    return ", ".join(
        f"{shortener.repr(sample['row'].asDict())}{sample['origin'] or ''}" for sample in samples
    )


def _remedy(df: DataFrame, source: feature_columns.Source, counts: Mapping[str, int]) -> str:
    words = [
        name
        for name in source.input_spec.features
        if isinstance(column_names.column(df, name)[1], T.StringType)
        and any(reason.startswith(f"{name} ") and "numb" in reason for reason in counts)
    ]
    if words and sum(counts.values()) * 2 > df.count():
        name, index = words[0], f"{words[0]}_index"
        return (
            f"{name} is text, and features are numbers: index it, with\n"
            f"    indexer = StringIndexer(inputCol={name!r}, outputCol={index!r})\n"
            f"    df = indexer.fit(df).transform(df)\n"
            f"and learn from {index}, say through an Embedding"
        )
    strangers = [count for reason, count in counts.items() if "is neither 0..9 nor" in reason]
    if source.input_spec.pixels and sum(strangers) * 2 > df.count():
        return (
            "Without features= the networks for pictures learn the digits 0 to 9. For other "
            "classes name the column, features='image', and give a network of your own, network=..."
        )
    advice = f"Correct them, or leave them out with mode={options.DROPMALFORMED}"
    if source.top == 1 and any(reason.endswith("outside 0..1") for reason in counts):
        return f"Pixels in 0..255 belong in bytes or integers. {advice}"
    return advice
