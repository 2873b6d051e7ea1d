"""DataFrame to balanced Parquet row groups, through Petastorm. Runs on the driver.

Every row gets a place that depends on its content and the seed alone: rows are ordered by a
hash, the first share of them trains, the rest validates. So the same rows give the same split and
the same shards, however the DataFrame was partitioned or sorted.

Petastorm hands out row groups by ``index % ranks``, whatever their sizes. Here each file is one row
group and rows are dealt to the files in turn, so all ranks get the same number of rows, give or
take one; the footers are read back to prove it. A rank then opens its own files alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import math
import threading
import warnings
from collections.abc import Iterator
from urllib import parse

import fsspec
import pyarrow.parquet as pq
from pyspark import StorageLevel
from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from spark_mnist import census, errors, plan, schema, world

GROUP_BYTES = 32 << 20
"""Most bytes of features in one row group."""
BLOCK_BYTES = 128 << 20
"""Parquet's own bound on a row group: well above ours, so that a file never has two."""
BUCKETS = 256
"""Parts in which rows are ordered."""
SORT_BYTES = 64 << 20
"""Bytes of features that one task orders."""
CACHE_DIR = "petastorm.spark.converter.parentCacheDirUrl"
"""Spark setting by which Petastorm is told where to write."""
_ONE_CONVERTER = threading.Lock()
"""Held while that setting is ours: fits in several threads may share a session."""


def cache_directory(spark: SparkSession) -> str | None:
    """The directory that the user gave Petastorm, if any; not the one of a fit under way."""
    with _ONE_CONVERTER:
        return spark.conf.get(CACHE_DIR, None)


def check_url(url: str) -> None:
    """Refuse a directory whose files Petastorm could not open.

    Raises:
        errors.OptionError: The URL has characters that Spark encodes and Petastorm takes literally.
    """
    if parse.quote(url, safe=":/+=,@") != url:
        raise errors.OptionError(
            f"shards cannot lie in {url!r}: use a store, or a {CACHE_DIR}, without blanks and "
            "special characters in its path"
        )


def check_enough(counted: census.Census, ranks: int, ratio: float) -> None:
    """Refuse what leaves a rank without a row.

    Raises:
        errors.TooFewRows: Fewer rows would train than there are ranks.
    """
    training = counted.training(ratio)
    if training < ranks:
        how = (
            "the validation column"
            if counted.validates is not None
            else (f"train_validation_ratio={ratio}")
        )
        raise errors.TooFewRows(
            f"{counted.rows} rows with {how} leave {training} to train: fewer than the {ranks} "
            "ranks; use more rows, let fewer of them validate, or use fewer num_proc"
        )


@contextlib.contextmanager
def materialized(
    counted: census.Census, *, url: str, ranks: int, ratio: float, seed: int
) -> Iterator[tuple[plan.Shards, plan.Shards]]:
    """Write training and validation rows as Parquet; delete them at the end.

    Args:
        counted: The input.
        url: A directory of this fit alone, which all executors can reach.
        ranks: How many will read.
        ratio: Share of the rows that trains.
        seed: Of the order.

    Yields:
        Training shards and validation shards.
    """
    training = counted.training(ratio)
    features, label = schema.pack(counted.source), counted.label
    last = F.lit(False) if counted.validates is None else counted.validates
    packed = counted.usable.select(
        features.alias("features"), label.alias("label"), last.alias("last")
    )
    size = counted.rows * counted.source.encoding.row_bytes
    position = F.col("position")
    with contextlib.ExitStack() as stack:

        def write(rows: DataFrame, count: int) -> plan.Shards:
            part = _written(rows, count, counted.source.encoding, url=url, ranks=ranks)
            return stack.enter_context(part)

        with _ordered(packed, counted.rows, size, seed) as rows:
            train = write(rows.where(position < training), training)
            rest = rows.where(position >= training).withColumn("position", position - training)
            validation = write(rest, counted.rows - training)
        yield train, validation


@contextlib.contextmanager
def _ordered(packed: DataFrame, rows: int, size: int, seed: int) -> Iterator[DataFrame]:
    """Give every row its ``position``, 0 to ``rows - 1``, by content and seed alone.

    Those that are to be ``last`` follow all others.
    """
    slots = packed.sparkSession.sparkContext.defaultParallelism
    tasks = min(BUCKETS, max(slots, math.ceil(size / SORT_BYTES)))
    key = F.xxhash64(F.lit(seed), "features", "label")
    bucket = F.shiftrightunsigned(key, 64 - int(math.log2(BUCKETS))).cast("int")
    bucket += F.col("last").cast("int") * BUCKETS
    window = Window.partitionBy("bucket").orderBy("key", "features", "label")
    numbered = (
        packed.withColumn("key", key)
        .withColumn("bucket", bucket)
        .repartition(tasks, "bucket")
        .withColumn("number", F.row_number().over(window) - 1)
        .persist(StorageLevel.MEMORY_AND_DISK)
    )
    try:
        counts = {
            row["bucket"]: row["count"] for row in numbered.groupBy("bucket").count().collect()
        }
        if sum(counts.values()) != rows:
            raise errors.BadRows(
                f"the DataFrame gave {rows} rows when counted and {sum(counts.values())} when "
                "written; its source changes or is random: persist or save it first"
            )
        sizes = (counts.get(bucket, 0) for bucket in range(2 * BUCKETS))
        starts = [0, *itertools.accumulate(sizes)]
        start = F.get(F.array(*(F.lit(s).cast("long") for s in starts)), F.col("bucket"))
        yield numbered.select("features", "label", (start + F.col("number")).alias("position"))
    finally:
        numbered.unpersist()


@contextlib.contextmanager
def _written(
    rows: DataFrame, count: int, encoding: schema.Encoding, *, url: str, ranks: int
) -> Iterator[plan.Shards]:
    if not count:
        yield _shards((), 0, encoding)
        return
    files = min(count, ranks * math.ceil(count * encoding.row_bytes / ranks / GROUP_BYTES))
    placed = (
        rows.repartition(
            files, _partition_keys(rows.sparkSession, files)[F.col("position") % files]
        )
        .sortWithinPartitions("position")
        .select("features", "label")
    )
    # Petastorm returns an earlier result for an equal plan under the same parent directory, even
    # when the source has changed since; a directory of this fit alone has no earlier result.
    # It asks the first session of the process for that directory, whichever made the DataFrame.
    conf = {CACHE_DIR: url, "spark.sql.files.maxRecordsPerFile": "0"}
    with _ONE_CONVERTER, _session_conf(SparkSession.builder.getOrCreate(), conf), _quiet():
        from petastorm.spark import make_spark_converter

        converter = make_spark_converter(placed, parquet_row_group_size_bytes=BLOCK_BYTES)
    try:
        urls = tuple(sorted(converter.file_urls))
        _check_footers(urls, count, files)
        yield _shards(urls, count, encoding)
    finally:
        converter.delete()


def _shards(urls: tuple[str, ...], rows: int, encoding: schema.Encoding) -> plan.Shards:
    return plan.Shards(urls=urls, rows=rows, **dataclasses.asdict(encoding))


def _partition_keys(spark: SparkSession, partitions: int) -> Column:
    """An array whose element ``i`` is an integer that ``repartition`` puts in partition ``i``.

    Spark's hash partitioning is ``pmod(hash(key), partitions)``, which sends several consecutive
    integers to one partition and none to another; with these keys every partition gets its own.
    """
    candidates = spark.range(64 * partitions + 1024).select(
        "id", F.pmod(F.hash("id"), F.lit(partitions)).alias("partition")
    )
    found = {
        row["partition"]: row["key"]
        for row in candidates.groupBy("partition").agg(F.min("id").alias("key")).collect()
    }
    assert len(found) == partitions, (
        f"{partitions - len(found)} of {partitions} partitions lack a key"
    )
    return F.array(*(F.lit(found[partition]).cast("long") for partition in range(partitions)))


def _check_footers(urls: tuple[str, ...], rows: int, files: int) -> None:
    """Prove by the footers that each file is one row group of its share of the rows."""
    expected = [(1, world.share(rows, index, files)) for index in range(files)]
    found = []
    for url in urls:
        with fsspec.open(url) as file:
            footer = pq.read_metadata(file)
        found.append((footer.num_row_groups, footer.num_rows))
    if found != expected:
        raise errors.RowsLost(f"Spark wrote files of (row groups, rows) {found}, not {expected}")


@contextlib.contextmanager
def _session_conf(spark: SparkSession, values: dict[str, str]) -> Iterator[None]:
    before = {key: spark.conf.get(key, None) for key in values}
    try:
        for key, value in values.items():
            spark.conf.set(key, value)
        yield
    finally:
        for key, old in before.items():
            if old is None:
                spark.conf.unset(key)
            else:
                spark.conf.set(key, old)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what Petastorm says of file sizes and precision, and of pyarrow for good."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="petastorm")
    logger = logging.getLogger("petastorm.spark.spark_dataset_converter")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
