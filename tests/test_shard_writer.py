import collections
import dataclasses
import threading

import numpy as np
import pyarrow.parquet as pq
import pytest
from pyspark.sql import functions as F

from spark_mnist import errors
from spark_mnist.core import plan, sharding
from spark_mnist.data import profile, shard_writer
from tests.conftest import read_shard


def count(df, seed=0):
    return profile.profile_rows(df, plan.InputSpec(), seed=seed)


def written(df, tmp_path, *, ranks, ratio=0.8, seed=0):
    """Sizes of the row groups and the rows of every rank, training and validation."""
    with shard_writer.write_shards(
        count(df, seed), url=f"file://{tmp_path}", ranks=ranks, ratio=ratio
    ) as parts:
        sizes = [
            [pq.read_metadata(url.removeprefix("file:")).num_rows for url in part.urls]
            for part in parts
        ]
        rows = [
            [
                [
                    (i.tobytes(), int(n))
                    for i, n in zip(shard.features.numpy(), shard.labels.numpy(), strict=True)
                ]
                for shard in ranked
            ]
            for ranked in (
                [read_shard(part, rank=r, ranks=ranks) for r in range(ranks)] for part in parts
            )
        ]
    return sizes, rows


def rows_of(df):
    return collections.Counter((bytes(r["image"]), r["label"]) for r in df.collect())


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_every_row_is_once_in_training_or_validation_and_shards_are_balanced(
    digits, tmp_path, ranks
):
    sizes, (train, validation) = written(digits, tmp_path, ranks=ranks)
    for ranked in (train, validation):
        counts = [len(rows) for rows in ranked]
        assert counts == [sharding.share(sum(counts), rank, ranks) for rank in range(ranks)]
    everything = collections.Counter(
        row for part in (train, validation) for rank in part for row in rank
    )
    assert everything == rows_of(digits)
    assert (sum(sizes[0]), sum(sizes[1])) == (205, 51)


def test_split_and_shards_depend_on_content_and_seed_alone(digits, tmp_path):
    first = written(digits, tmp_path, ranks=2)
    for same in (
        digits.repartition(5),
        digits.orderBy("label"),
        digits.coalesce(1).orderBy(F.desc("image")),
    ):
        assert written(same, tmp_path, ranks=2) == first
    assert written(digits, tmp_path, ranks=2, seed=1)[1] != first[1]


def test_a_row_that_trains_still_trains_when_other_rows_come_along(digits, tmp_path):
    _, (train, _) = written(digits.limit(200), tmp_path, ranks=1)
    _, (more, _) = written(digits, tmp_path, ranks=1)
    trained, again = set(train[0]), set(more[0])
    known = rows_of(digits.limit(200))
    assert len(trained - again) <= 0.1 * len(known)


def test_sorted_input_gives_mixed_shards(digits, tmp_path):
    _, (train, validation) = written(digits.orderBy("label"), tmp_path, ranks=2)
    for rank in (*train, *validation):
        assert len({label for _, label in rank}) >= 9


def test_many_row_groups_are_balanced_too(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(shard_writer, "GROUP_BYTES", 20 * 784)
    (train, _), (ranked, _) = written(digits, tmp_path, ranks=2)
    assert len(train) == 12
    assert max(train) - min(train) <= 1
    assert [len(rows) for rows in ranked] == [103, 102]


def test_no_validation(digits, tmp_path):
    (_, validation), _ = written(digits, tmp_path, ranks=2, ratio=1.0)
    assert validation == []


def test_fewer_validation_rows_than_ranks(digits, tmp_path):
    _, (_, validation) = written(digits.limit(10), tmp_path, ranks=3, ratio=0.9)
    assert [len(rows) for rows in validation] == [1, 0, 0]


def test_fewer_training_rows_than_ranks():
    def counted(rows, is_validation=None, num_validation_rows=0):
        return profile.RowProfile(rows, None, None, None, {}, is_validation, num_validation_rows)

    with pytest.raises(
        errors.TooFewRows, match=r"4 rows with .*=0.5 leave 2 to train: fewer than the 3 ranks"
    ):
        shard_writer.check_row_count(counted(4), ranks=3, ratio=0.5)
    shard_writer.check_row_count(counted(6), ranks=3, ratio=0.5)
    with pytest.raises(errors.TooFewRows, match="with the validation column leave 2 to train"):
        shard_writer.check_row_count(counted(6, "a column", 4), ranks=3, ratio=0.5)


def test_nothing_is_left_behind(spark, digits, tmp_path):
    written(digits, tmp_path, ranks=2)
    assert list(tmp_path.iterdir()) == []
    assert spark.conf.get(shard_writer.CACHE_DIR, None) is None
    part = shard_writer.write_shards(count(digits), url=f"file://{tmp_path}", ranks=2, ratio=0.5)
    with pytest.raises(RuntimeError, match="the fit failed"), part:
        fail_if_written(tmp_path)
    assert list(tmp_path.iterdir()) == []


def fail_if_written(directory):
    if list(directory.iterdir()):
        raise RuntimeError("the fit failed")


def test_a_source_that_changes_is_noticed(spark, digits, tmp_path):
    digits.coalesce(1).write.parquet(str(tmp_path / "source"))
    df = spark.read.parquet(str(tmp_path / "source"))
    counted = dataclasses.replace(count(df), usable=df.where("label < 5"))
    with (
        pytest.raises(errors.BadRows, match="gave 256 rows when counted"),
        shard_writer.write_shards(counted, url=f"file://{tmp_path}", ranks=2, ratio=0.5),
    ):
        pass


def test_overwritten_sources_are_read_anew(spark, digits, tmp_path):
    source = str(tmp_path / "source")
    work = tmp_path / "work"
    for count in (20, 50):
        digits.limit(count).write.mode("overwrite").parquet(source)
        _, (train, _) = written(spark.read.parquet(source), work, ranks=1, ratio=1.0)
        assert len(train[0]) == count


def test_pixels_are_stored_as_bytes(digits, tmp_path):
    with shard_writer.write_shards(count(digits), url=f"file://{tmp_path}", ranks=1, ratio=1.0) as (
        train,
        _,
    ):
        assert (train.encoding.dtype, train.encoding.scale) == ("uint8", 255.0)
        assert read_shard(train, rank=0, ranks=1).features.dtype == np.uint8


def test_a_session_of_its_own_and_a_limit_on_files(spark, digits, tmp_path):
    other = spark.newSession()
    digits.coalesce(1).write.parquet(str(tmp_path / "source"))
    other.conf.set("spark.sql.files.maxRecordsPerFile", "10")
    sizes, _ = written(other.read.parquet(str(tmp_path / "source")), tmp_path / "work", ranks=2)
    assert other.conf.get("spark.sql.files.maxRecordsPerFile") == "10"
    assert sizes == [[103, 102], [26, 25]]


def test_fits_in_several_threads_do_not_take_each_others_directory(spark, digits, tmp_path):
    done = []

    def write(name):
        done.append(written(digits, tmp_path / name, ranks=2)[0])

    threads = [threading.Thread(target=write, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done == [[[103, 102], [26, 25]]] * 3
    assert shard_writer.cache_directory(spark) is None


@pytest.mark.parametrize(
    "url", ["file:///my models", "file:///a%20b", "file:///a#b", "file:///a?b"]
)
def test_a_directory_that_petastorm_cannot_read_is_refused(url):
    with pytest.raises(errors.OptionError, match="no blanks and no special characters"):
        shard_writer.check_url(url)
    shard_writer.check_url("s3a://bucket/models_1.2-x/m")


def test_a_file_system_that_spark_lacks_is_refused_before_it_writes(spark):
    message = r'cannot write shards to s3://bucket/work .*No FileSystem for scheme "s3"'
    with pytest.raises(errors.ClusterError, match=message):
        shard_writer.check_writable(spark, "s3://bucket/work")
    shard_writer.check_writable(spark, "file:///tmp")


def test_files_keep_the_order_of_partitions_above_a_hundred_thousand():
    names = [f"part-{number:05d}-uuid.parquet" for number in (7, 99_999, 100_000)]
    assert sorted(sorted(names), key=shard_writer._part_number) == names


def test_narrow_rows_fit_into_one_row_group():
    layout = plan.Shards(urls=(), rows=0, encoding=plan.Encoding("uint8", 255.0, 1))
    for rows in (10**7, 10**8):
        files = shard_writer._num_files(rows, layout, ranks=2)
        assert files % 2 == 0
        # A row has a byte of features, and four each of its length and its label.
        assert rows / files * 9 < shard_writer.BLOCK_BYTES / 2
