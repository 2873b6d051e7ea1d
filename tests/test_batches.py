import numpy as np
import pytest
import tensorflow as tf

from spark_mnist import batches, census, plan, shards
from spark_mnist.world import World


def shard(rows):
    images = np.repeat(np.arange(rows, dtype=np.uint8)[:, None], 784, axis=1)
    return batches.Shard(tf.constant(images), tf.range(rows), 255.0)


def epoch(world, rank, number, seed=0):
    data = batches.training(shard(world.rows_of(rank)), world, rank=rank, seed=seed, epoch=number)
    return [tuple(t.numpy() for t in batch) for batch in data]


@pytest.mark.parametrize(
    ("size", "rows", "batch_size"), [(1, 10, 3), (2, 11, 4), (3, 7, 2), (2, 5, 99), (2, 9, 4)]
)
def test_every_row_once_in_equal_steps(size, rows, batch_size):
    world = World(size=size, rows=rows, batch_size=batch_size)
    for rank in range(size):
        found = epoch(world, rank, 0)
        assert len(found) == world.steps
        labels = np.concatenate([labels[weights > 0] for _, labels, weights in found])
        assert sorted(labels) == list(range(world.rows_of(rank)))
        for features, labels, _ in found:
            np.testing.assert_allclose(features[:, 0], labels / 255, rtol=1e-6)
        assert all(len(labels) == batch_size for _, labels, _ in found[:-1])
        assert len(found[-1][1]) == world.last_batch


def test_the_order_is_new_each_epoch_and_the_same_each_time():
    world = World(size=1, rows=50, batch_size=50)
    orders = [epoch(world, 0, number)[0][1].tolist() for number in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1]
    assert orders[0] != epoch(world, 0, 0, seed=1)[0][1].tolist()


def test_validation_is_every_row_once():
    found = list(batches.validation(shard(200)))
    assert np.concatenate([labels for _, labels, _ in found]).tolist() == list(range(200))
    assert all((weights.numpy() == 1).all() for _, _, weights in found)


def test_a_shard_that_lost_rows_is_an_error(digits, tmp_path, monkeypatch):
    with shards.materialized(
        census.take(digits, plan.Input()),
        url=f"file://{tmp_path}",
        ranks=2,
        ratio=1.0,
        seed=0,
    ) as (train, _):
        assert [len(batches.read(train, rank=r, ranks=2)) for r in (0, 1)] == [128, 128]
        real = batches.make_batch_reader
        monkeypatch.setattr(
            batches,
            "make_batch_reader",
            lambda urls, **rest: real(urls, **{**rest, "num_epochs": 2}),
        )
        with pytest.raises(
            RuntimeError, match="rank 0 read 256 rows of its shard; its files' footers say 128"
        ):
            batches.read(train, rank=0, ranks=2)


def test_no_rows_are_no_rows():
    nothing = plan.Shards(urls=(), rows=0, width=784, dtype="float32", scale=1.0)
    found = batches.read(nothing, rank=1, ranks=2)
    assert len(found) == 0
    assert found.features.shape == (0, 784)
    assert found.scale == 1.0
