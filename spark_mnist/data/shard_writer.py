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
import functools
import itertools
import logging
import math
import re
import threading
import warnings
from collections.abc import Iterator, Sequence
from urllib import parse

import fsspec
import pyarrow.parquet as pq
from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from spark_mnist import errors
from spark_mnist.core import plan, retries, sharding
from spark_mnist.data import feature_columns, profile

GROUP_BYTES = 16 << 20
"""Most bytes of features in one row group, of which a rank that streams has a few in memory."""
ROW_OVERHEAD_BYTES = 8
"""Of a row in Parquet beside its features: their length, and the label."""
BLOCK_BYTES = 128 << 20
"""Parquet's own bound on a row group: well above ours, so that a file never has two."""
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


def check_writable(spark: SparkSession, url: str) -> None:
    """Refuse a directory on a file system that Spark, which writes the shards, cannot open.

    Raises:
        errors.ClusterError: Spark lacks the classes for the URL's scheme, or may not use it.
    """
    hadoop = spark.sparkContext._jsc.hadoopConfiguration()
    assert spark._jvm is not None
    try:
        spark._jvm.org.apache.hadoop.fs.Path(url).getFileSystem(hadoop)
    except (Py4JJavaError, PySparkException) as error:
        why = getattr(error, "java_exception", error)
        raise errors.ClusterError(
            f"Spark cannot write shards to {url} ({why}): add Hadoop's classes for it to Spark, or "
            f"set {CACHE_DIR} to a directory that all executors share"
        ) from error


def check_enough(counted: profile.RowProfile, ranks: int, ratio: float) -> None:
    """Refuse what leaves a rank without a row.

    Raises:
        errors.TooFewRows: Fewer rows would train than there are ranks.
    """
    training, by_column = counted.training(ratio), counted.validates is not None
    if training < ranks:
        how = "the validation column" if by_column else f"train_validation_ratio={ratio}"
        raise errors.TooFewRows(
            f"{counted.rows} rows with {how} leave {training} to train: fewer than the {ranks} "
            "ranks; use more rows, let fewer of them validate, or use fewer num_proc"
        )


@contextlib.contextmanager
def write_shards(
    counted: profile.RowProfile, *, url: str, ranks: int, ratio: float
) -> Iterator[tuple[plan.Shards, plan.Shards]]:
    """Write training and validation rows as Parquet; delete them at the end.

    Args:
        counted: The input, counted in the order of a seed.
        url: A directory of this fit alone, which all executors can reach.
        ranks: How many will read.
        ratio: Share of the rows that trains, where no column says which.

    Yields:
        Training shards and validation shards.

    Raises:
        errors.BadRows: The input is not what it was when it was counted.
    """
    training = counted.training(ratio)
    rows = (training, counted.rows - training)
    encoding = counted.source.encoding
    files = [_files(part, encoding, ranks) for part in rows]
    position = F.col("position")
    later = files[0] + (position - training) % max(1, files[1])
    file = F.when(position < training, position % files[0]).otherwise(later)
    keys = _numbers(_partition_keys(sum(files)))
    placed = (
        _ordered(counted)
        .repartition(sum(files), F.get(keys, file.cast("int")))
        .sortWithinPartitions("position")
        .select("features", "label")
    )
    rows_at_once = feature_columns.arrow_rows(placed.sparkSession, counted.source)
    with _written(placed, url, rows_at_once) as urls:
        sizes = [
            sharding.share(part, number, count)
            for part, count in zip(rows, files, strict=True)
            for number in range(count)
        ]
        _check_footers(urls, sizes)
        yield (
            _shards(urls[: files[0]], rows[0], encoding),
            _shards(urls[files[0] :], rows[1], encoding),
        )


def _files(rows: int, encoding: plan.Encoding, ranks: int) -> int:
    """In how many files, of one row group each, to write so many rows."""
    row_bytes = encoding.row_bytes + ROW_OVERHEAD_BYTES
    return min(rows, ranks * math.ceil(rows * row_bytes / ranks / GROUP_BYTES))


def _ordered(counted: profile.RowProfile) -> DataFrame:
    """``features``, ``label`` and ``position`` of each row: 0 to ``rows - 1``, by ``key``."""
    assert counted.key is not None
    assert counted.bucket is not None
    slots = counted.usable.sparkSession.sparkContext.defaultParallelism
    size = counted.rows * counted.source.encoding.row_bytes
    tasks = min(profile.BUCKETS, max(slots, math.ceil(size / SORT_BYTES)))
    sizes = (counted.buckets.get(bucket, 0) for bucket in range(2 * profile.BUCKETS))
    starts = _numbers([0, *itertools.accumulate(sizes)])
    # Rows may share a key that are no equals: doubles that are nearly the same.
    order = ("key", F.xxhash64("features"), "features", "label")
    within = Window.partitionBy("bucket").orderBy(*order)
    return (
        counted.usable.select(
            feature_columns.pack(counted.source).alias("features"),
            counted.label.alias("label"),
            counted.key.alias("key"),
            counted.bucket.alias("bucket"),
        )
        .repartition(tasks, "bucket")
        .withColumn("position", F.get(starts, F.col("bucket")) + F.row_number().over(within) - 1)
    )


@contextlib.contextmanager
def _written(placed: DataFrame, url: str, rows: int | None) -> Iterator[tuple[str, ...]]:
    """Let Petastorm write partitions as files; yields their URLs in order.

    Args:
        placed: In the partitions that become files.
        url: A directory of this fit alone.
        rows: That Spark may send to Python at once, where not as many as it would.
    """
    # Petastorm returns an earlier result for an equal plan under the same parent directory, even
    # when the source has changed since; a directory of this fit alone has no earlier result.
    # It asks the first session of the process for that directory, whichever made the DataFrame.
    # Pictures are hardly ever the same, so that Parquet would build dictionaries in vain.
    first, cache = SparkSession.builder.getOrCreate(), {CACHE_DIR: url}
    files = {"spark.sql.files.maxRecordsPerFile": "0", "parquet.enable.dictionary": "false"}
    if rows:
        files[feature_columns.ARROW_ROWS] = str(rows)
    with (
        _ONE_CONVERTER,
        _session_conf(first, cache),
        _session_conf(placed.sparkSession, files),
        _quiet(),
    ):
        from spark_mnist.compat import petastorm

        spark = petastorm.module("petastorm.spark")
        converter = spark.make_spark_converter(placed, parquet_row_group_size_bytes=BLOCK_BYTES)
    try:
        yield tuple(sorted(converter.file_urls, key=_part_number))
    finally:
        converter.delete()


def _part_number(url: str) -> tuple[int, str]:
    """Return a key by which files sort as the partitions that they hold.

    Their names do so up to 99,999: Spark writes five digits, and more where it needs more.
    """
    match = re.match(r"part-(\d+)", url.rpartition("/")[2])
    return (int(match[1]) if match else -1), url


def _shards(urls: tuple[str, ...], rows: int, encoding: plan.Encoding) -> plan.Shards:
    return plan.Shards(urls=urls, rows=rows, encoding=encoding)


@functools.cache
def _partition_keys(partitions: int) -> tuple[int, ...]:
    """Of each partition an integer that ``repartition`` puts there.

    Spark's hash partitioning is ``pmod(hash(key), partitions)``, which sends several consecutive
    integers to one partition and none to another; with these keys every partition gets its own.
    """
    last = 64 * partitions + 1024
    numbers = F.sequence(F.lit(0).cast("long"), F.lit(last).cast("long"))
    hashed = F.transform(numbers, lambda number: F.pmod(F.hash(number), F.lit(partitions)))
    row = SparkSession.builder.getOrCreate().range(1).select(hashed).first()
    assert row is not None
    found = {partition: key for key, partition in reversed([*enumerate(row[0])])}
    assert len(found) == partitions, (
        f"{partitions - len(found)} of {partitions} partitions lack a key"
    )
    return tuple(found[partition] for partition in range(partitions))


def _numbers(values: Sequence[int]) -> Column:
    """An array of bigints; a call to the JVM for each would take seconds."""
    return F.expr(f"array({', '.join(f'{value}L' for value in values)})")


def _check_footers(urls: tuple[str, ...], sizes: list[int]) -> None:
    """Prove by the footers that each file is one row group of its share of the rows."""
    found = []
    for url in urls:
        footer = retries.call(f"read {url}", functools.partial(_footer, url))
        found.append((footer.num_row_groups, footer.num_rows))
    if found != [(1, size) for size in sizes]:
        written = sum(rows for _, rows in found)
        raise errors.BadRows(
            f"the DataFrame gave {sum(sizes)} rows when counted and {written} when written, in "
            f"files of (row groups, rows) {found[:10]}, not of {sizes[:10]} rows; its source "
            "changes or is random: persist or save it first"
        )


def _footer(url: str) -> pq.FileMetaData:
    with fsspec.open(url) as file:
        return pq.read_metadata(file)


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
