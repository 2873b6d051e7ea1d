"""Shard writer: writes a DataFrame as balanced Parquet row groups, through Petastorm.

The place of every row depends on its content and the seed alone: rows are ordered by a hash, the
first share of them trains, the rest validates. So the same rows give the same split and the same
shards, however the DataFrame was partitioned or sorted.

Petastorm hands out row groups by ``index % ranks``, whatever their sizes. Here each file is one row
group, and rows are dealt to the files in turn, so the row counts of all ranks differ by at most
one; the footers are read back to prove it. Each rank then opens only its own files.
Runs on: driver.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from concurrent import futures
from urllib import parse

import fsspec
import pyarrow.parquet as pq
from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from spark_mnist import errors
from spark_mnist.cluster import session
from spark_mnist.core import plan, retries, sharding
from spark_mnist.data import feature_columns, profile

GROUP_BYTES = 16 << 20
"""Most bytes of features in one row group; a rank that streams holds a few row groups in memory."""
PARQUET_OVERHEAD_BYTES = 8
"""Bytes of a row in Parquet besides features, targets and weight: lengths, and the class."""
BLOCK_BYTES = 128 << 20
"""Parquet's own limit of a row group: well above ours, so that a file never has two."""
FOOTER_THREADS = 32
"""Threads that read the files' footers, each of which is a request to a store."""
SORT_TASK_BYTES = 64 << 20
"""Bytes of features that one task orders."""
CACHE_DIR = "petastorm.spark.converter.parentCacheDirUrl"
"""Spark setting that tells Petastorm where to write."""


def cache_directory(spark: SparkSession) -> str | None:
    """Return the directory that the user gave Petastorm, if any."""
    return spark.conf.get(CACHE_DIR, None)


def check_url(url: str) -> None:
    """Refuse a directory whose files Petastorm could not open.

    Raises:
        errors.OptionError: The URL has characters that Spark encodes and Petastorm takes literally.
    """
    if parse.quote(url, safe=":/+=,@") != url:
        raise errors.OptionError(
            f"shards cannot be written to {url!r}: use a store, or a {CACHE_DIR}, whose "
            "path has no blanks and no special characters"
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
        reason = getattr(error, "java_exception", error)
        raise errors.ClusterError(
            f"Spark cannot write shards to {url} ({reason}): add Hadoop's classes for it to Spark, "
            f"or set {CACHE_DIR} to a directory that all executors share"
        ) from error


def check_row_count(row_profile: profile.RowProfile, ranks: int, ratio: float) -> None:
    """Refuse an input that leaves a rank without a training row.

    Raises:
        errors.TooFewRows: There are fewer training rows than ranks.
    """
    train_rows, by_column = (
        row_profile.num_training_rows(ratio),
        row_profile.is_validation is not None,
    )
    if train_rows < ranks:
        split = "the validation column" if by_column else f"train_validation_ratio={ratio}"
        raise errors.TooFewRows(
            f"{row_profile.rows} rows with {split} leave {train_rows} to train: fewer than the "
            f"{ranks} ranks; use more rows, let fewer of them validate, or lower num_proc"
        )


@contextlib.contextmanager
def write_shards(
    row_profile: profile.RowProfile, *, url: str, ranks: int, ratio: float
) -> Iterator[tuple[plan.Shards, plan.Shards]]:
    """Write training and validation rows as Parquet; delete them at the end.

    Args:
        row_profile: Profile of the input, in the order of a seed.
        url: A directory of this fit alone, which all executors can reach.
        ranks: Number of ranks that read the shards.
        ratio: Share of the rows that trains, where no column says which.

    Yields:
        Training shards and validation shards.

    Raises:
        errors.BadRows: The input has changed since it was counted.
    """
    train_rows = row_profile.num_training_rows(ratio)
    split_rows = (train_rows, row_profile.rows - train_rows)
    layout = plan.Shards(
        urls=(),
        rows=0,
        encoding=row_profile.source.encoding,
        target_size=row_profile.target_size,
        weighted=row_profile.weight is not None,
    )
    split_files = [_num_files(row_count, layout, ranks) for row_count in split_rows]
    position = F.col("position")
    validation_file = split_files[0] + (position - train_rows) % max(1, split_files[1])
    file_index = F.when(position < train_rows, position % split_files[0]).otherwise(validation_file)
    keys = _bigint_array(_partition_keys(sum(split_files)))
    shards = (
        _order_rows(row_profile)
        .repartition(sum(split_files), F.get(keys, file_index.cast("int")))
        .sortWithinPartitions("position")
        .select("features", "label", *["weight"] * layout.weighted)
    )
    rows_at_once = feature_columns.arrow_rows(shards.sparkSession, row_profile.source)
    has_shuffles = session.has_shuffles(row_profile.usable)
    with _parquet_files(shards, url, rows_at_once, has_shuffles=has_shuffles) as urls:
        sizes = [
            sharding.share(row_count, index, file_count)
            for row_count, file_count in zip(split_rows, split_files, strict=True)
            for index in range(file_count)
        ]
        _check_footers(urls, sizes)
        yield (
            dataclasses.replace(layout, urls=urls[: split_files[0]], rows=split_rows[0]),
            dataclasses.replace(layout, urls=urls[split_files[0] :], rows=split_rows[1]),
        )


def _num_files(rows: int, layout: plan.Shards, ranks: int) -> int:
    """Return the number of files, of one row group each, for a number of rows."""
    row_bytes = layout.encoding.row_bytes + layout.label_bytes + PARQUET_OVERHEAD_BYTES
    return min(rows, ranks * math.ceil(rows * row_bytes / ranks / GROUP_BYTES))


def _order_rows(row_profile: profile.RowProfile) -> DataFrame:
    """Return ``features``, ``label`` and ``position`` of each row, 0 to ``rows - 1`` by ``key``."""
    assert row_profile.key is not None
    assert row_profile.bucket is not None
    slots = row_profile.usable.sparkSession.sparkContext.defaultParallelism
    feature_bytes = row_profile.rows * row_profile.source.encoding.row_bytes
    tasks = min(profile.BUCKETS, max(slots, math.ceil(feature_bytes / SORT_TASK_BYTES)))
    bucket_sizes = (row_profile.buckets.get(bucket, 0) for bucket in range(2 * profile.BUCKETS))
    starts = _bigint_array([0, *itertools.accumulate(bucket_sizes)])
    # Rows that are not equal may share a key: doubles that are nearly the same.
    sort_columns: list[Column | str] = ["key", F.xxhash64("features"), "features", "label"]
    sort_columns += ["weight"] if row_profile.weight is not None else []
    window = Window.partitionBy("bucket").orderBy(*sort_columns)
    return (
        row_profile.usable.select(
            feature_columns.pack(row_profile.source).alias("features"),
            row_profile.label.alias("label"),
            row_profile.key.alias("key"),
            row_profile.bucket.alias("bucket"),
            *([] if row_profile.weight is None else [row_profile.weight.alias("weight")]),
        )
        .repartition(tasks, "bucket")
        .withColumn("position", F.get(starts, F.col("bucket")) + F.row_number().over(window) - 1)
    )


@contextlib.contextmanager
def _parquet_files(
    shards: DataFrame, url: str, rows_at_once: int | None, *, has_shuffles: bool
) -> Iterator[tuple[str, ...]]:
    """Write partitions as files through Petastorm, and yield the URLs of the files in order.

    Args:
        shards: The rows, in the partitions that become files.
        url: A directory of this fit alone.
        rows_at_once: Rows that Spark may send to Python at once; None leaves its own setting.
        has_shuffles: Whether the user's DataFrame has shuffles of its own.
    """
    from spark_mnist.compat import petastorm

    # Pictures are hardly ever equal, so Parquet's dictionaries save nothing.
    write_settings = {
        "spark.sql.files.maxRecordsPerFile": "0",
        "parquet.enable.dictionary": "false",
    }
    if not has_shuffles:
        write_settings[session.ADAPTIVE] = "false"  # to plan again between our shuffles costs time
    if rows_at_once:
        write_settings[feature_columns.ARROW_ROWS] = str(rows_at_once)
    # ``make_spark_converter`` does more: it returns the files of an earlier equal plan, even when
    # the source has changed since, and two jobs of its own count what the footers say.
    warnings.filterwarnings("ignore", category=FutureWarning, module="petastorm")  # on pyarrow 14
    converters = petastorm.module("petastorm.spark.spark_dataset_converter")
    with session.temporary_settings(shards.sparkSession, write_settings):
        cached = converters.CachedDataFrameMeta.create_cached_dataframe_meta(
            shards, url, BLOCK_BYTES, "uncompressed", None
        )
    names = sorted(_part_names(cached.cache_dir_url), key=_part_number)
    urls = tuple(f"{cached.cache_dir_url}/{name}" for name in names)
    try:
        yield urls
    finally:
        converters.SparkDatasetConverter(cached.cache_dir_url, urls, None).delete()


def _part_names(url: str) -> list[str]:
    """Return the names of the Parquet files in a directory that Spark has written."""

    def list_directory() -> list[str]:
        filesystem, path = fsspec.core.url_to_fs(url)
        return [path.rpartition("/")[2] for path in filesystem.ls(path, detail=False)]

    names = retries.call(f"list {url}", list_directory)
    return [name for name in names if name.startswith("part-")]


def _part_number(name: str) -> tuple[int, str]:
    """Return a key that sorts files as the partitions that they hold.

    Names of files sort so up to 99,999: Spark writes five digits, and more where it needs more.
    """
    match = re.match(r"part-(\d+)", name)
    return (int(match[1]) if match else -1), name


@functools.cache
def _partition_keys(partitions: int) -> tuple[int, ...]:
    """Return for each partition an integer that ``repartition`` puts there.

    Spark's hash partitioning is ``pmod(hash(key), partitions)``, which sends several consecutive
    integers to one partition and none to another; with these keys every partition gets its own.
    """
    max_key = 64 * partitions + 1024
    candidates = F.sequence(F.lit(0).cast("long"), F.lit(max_key).cast("long"))
    candidate_partitions = F.transform(
        candidates, lambda number: F.pmod(F.hash(number), F.lit(partitions))
    )
    row = SparkSession.builder.getOrCreate().range(1).select(candidate_partitions).first()
    assert row is not None
    key_by_partition = {partition: key for key, partition in reversed([*enumerate(row[0])])}
    assert len(key_by_partition) == partitions, (
        f"{partitions - len(key_by_partition)} of {partitions} partitions lack a key"
    )
    return tuple(key_by_partition[partition] for partition in range(partitions))


def _bigint_array(values: Sequence[int]) -> Column:
    """Return an array of bigints; a call to the JVM for each would take seconds."""
    return F.expr(f"array({', '.join(f'{value}L' for value in values)})")


def _check_footers(urls: tuple[str, ...], sizes: list[int]) -> None:
    """Check by the footers that each file is one row group of its share of the rows."""
    with futures.ThreadPoolExecutor(FOOTER_THREADS) as pool:
        groups = [*pool.map(_groups_and_rows, urls)]
    if groups != [(1, size) for size in sizes]:
        total_rows = sum(rows for _, rows in groups)
        raise errors.BadRows(
            f"the DataFrame gave {sum(sizes)} rows when counted and {total_rows} when written, in "
            f"files of (row groups, rows) {groups[:10]}, not of {sizes[:10]} rows; its source "
            "changes or is random: persist or save it first"
        )


def _groups_and_rows(url: str) -> tuple[int, int]:
    """Return the numbers of row groups and of rows of a file, from its footer."""

    def read() -> pq.FileMetaData:
        with fsspec.open(url) as file:
            return pq.read_metadata(file)

    footer = retries.call(f"read {url}", read)
    return footer.num_row_groups, footer.num_rows
