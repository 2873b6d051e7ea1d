import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from spark_mnist import errors
from spark_mnist.compat import petastorm
from spark_mnist.core import plan
from spark_mnist.core.sharding import RowSharding, share
from spark_mnist.data import profile, shard_writer
from spark_mnist.ranks import batches
from tests.conftest import PROGRAMS, read_shard

SHARDS = plan.Shards(urls=(), rows=0, encoding=plan.Encoding("uint8", 255.0, 784))


def kept(rows):
    """Rows whose pixels are all their number."""
    images = np.repeat(np.arange(rows, dtype=np.uint8)[:, None], 784, axis=1)
    return batches.InMemory(SHARDS, (images, np.arange(rows, dtype=np.int32)))


def prefetched(rows):
    """The same in memory, gathered ahead as for a GPU."""
    shard = kept(rows)
    rows = shard.features.numpy(), shard.labels.numpy()
    return batches.InMemory(SHARDS, rows, prefetch=True)


class Streamed(batches.Streamed):
    """The same rows in files of three, which need no disk."""

    def __init__(self, rows, part):
        everything = kept(rows)
        features, labels = everything.features.numpy(), everything.labels.numpy()

        class RowGroups:
            shards = SHARDS
            urls = tuple(range(0, len(labels), 3))

            def __init__(self):
                self.rows = rows

            def parts(self, urls):
                return ((features[u : u + 3], labels[u : u + 3]) for u in urls)

        super().__init__(RowGroups(), 4 * part * 784)


def streamed(rows):
    return Streamed(rows, part=4)


def epoch(make, world, rank, number, seed=0):
    shard = make(share(world.rows, rank, world.size))
    data = shard.training(world, rank=rank, seed=seed, epoch=number)
    return [tuple(t.numpy() for t in batch) for batch in data]


@pytest.mark.parametrize("make", [kept, prefetched, streamed])
@pytest.mark.parametrize(
    ("size", "rows", "batch_size"),
    [(1, 10, 3), (2, 11, 4), (3, 7, 2), (2, 5, 99), (2, 9, 4), (2, 9, 1), (1, 50, 7)],
)
def test_every_row_once_in_equal_steps(make, size, rows, batch_size):
    world = RowSharding(size=size, rows=rows, batch_size=batch_size)
    for rank in range(size):
        found = epoch(make, world, rank, 0)
        assert len(found) == world.steps
        labels = np.concatenate([labels[weights > 0] for _, labels, weights in found])
        assert sorted(labels) == list(range(share(world.rows, rank, world.size)))
        for features, labels, _ in found:
            np.testing.assert_allclose(features[:, 0], labels / 255, rtol=1e-6)
        assert all(len(labels) == batch_size for _, labels, _ in found[:-1])
        assert len(found[-1][1]) == world.last_batch


@pytest.mark.parametrize("make", [kept, prefetched, streamed])
def test_the_order_is_new_each_epoch_and_the_same_each_time(make):
    world = RowSharding(size=1, rows=50, batch_size=50)
    orders = [epoch(make, world, 0, number)[0][1].tolist() for number in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1]
    assert orders[0] != epoch(make, world, 0, 0, seed=1)[0][1].tolist()


def test_a_stream_mixes_rows_of_several_files():
    world = RowSharding(size=1, rows=60, batch_size=60)
    ((_, labels, _),) = epoch(lambda rows: Streamed(rows, part=30), world, 0, 0)
    files = labels // 3
    assert np.mean(files[1:] == files[:-1]) < 0.3


@pytest.mark.parametrize("make", [kept, prefetched, streamed])
def test_validation_is_every_row_once(make):
    found = list(make(200).validation())
    assert np.concatenate([labels for _, labels, _ in found]).tolist() == list(range(200))
    assert all((weights.numpy() == 1).all() for _, _, weights in found)


@pytest.mark.parametrize("make", [kept, prefetched, streamed])
def test_graphs_divide_as_numpy_does(make):
    data = make(200).validation()
    features, *_ = tf.function(data.take)(data.source, tf.constant(0))
    expected = np.arange(200, dtype=np.float32) / np.float32(255)
    np.testing.assert_array_equal(np.sort(features.numpy()[:, 0]), expected)


def test_a_shard_that_lost_rows_is_an_error(digits, tmp_path, monkeypatch):
    with shard_writer.write_shards(
        profile.profile_rows(digits, plan.InputSpec(), seed=0),
        url=f"file://{tmp_path}",
        ranks=2,
        ratio=1.0,
    ) as (train, _):
        assert [len(read_shard(train, rank=r, ranks=2)) for r in (0, 1)] == [
            128,
            128,
        ]
        real = petastorm.module().make_batch_reader
        monkeypatch.setattr(
            petastorm.module(),
            "make_batch_reader",
            lambda urls, **rest: real(urls, **{**rest, "num_epochs": 2}),
        )
        words = "rank 0 read 256 rows of its shard; its files' footers say 128"
        with pytest.raises(errors.RowsLost, match=words):
            read_shard(train, rank=0, ranks=2)
        stream = batches.read(train, rank=0, ranks=2, memory=0)
        world = RowSharding(size=2, rows=256, batch_size=64)
        data = stream.training(world, rank=0, seed=0, epoch=0)
        with pytest.raises(tf.errors.OpError):
            list(data)
        assert isinstance(stream.error, errors.RowsLost)
        assert words in str(stream.error)


def test_a_shard_that_does_not_fit_is_streamed(digits, tmp_path):
    source = profile.profile_rows(digits, plan.InputSpec(), seed=0)
    options = {"url": f"file://{tmp_path}", "ranks": 2, "ratio": 1.0}
    with shard_writer.write_shards(source, **options) as (train, _):
        size = 128 * (784 + batches.ROW_OVERHEAD_BYTES)
        kept, streamed = (
            batches.read(train, rank=1, ranks=2, memory=memory) for memory in (size, size - 1)
        )
        assert isinstance(kept, batches.InMemory)
        assert isinstance(streamed, batches.Streamed)
        rows = [
            {row.tobytes() for part, _ in shard.parts() for row in part}
            for shard in (kept, streamed)
        ]
        assert rows[0] == rows[1]
        world = RowSharding(size=2, rows=256, batch_size=50)
        data = streamed.training(world, rank=1, seed=0, epoch=0)
        labels = np.concatenate([labels.numpy() for _, labels, _ in data])
        assert sorted(labels) == sorted(kept.labels.numpy())


def test_no_rows_are_no_rows():
    nothing = plan.Shards(urls=(), rows=0, encoding=plan.Encoding("float32", 1.0, 784))
    found = read_shard(nothing, rank=1, ranks=2)
    assert len(found) == 0
    assert found.features.shape == (0, 784)
    assert found.shards.encoding.scale == 1.0


@pytest.mark.ranks
def test_rows_take_no_more_memory_than_they_may():
    """Of four features, where labels, weights and places in the order are most of a row."""
    done = subprocess.run(
        [sys.executable, PROGRAMS / "batch_memory.py"], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 1.1
