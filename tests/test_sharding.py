import math

from hypothesis import given
from hypothesis import strategies as st

from spark_mnist.core.sharding import RowSharding, share, share_of_ratio

worlds = st.builds(
    lambda size, extra, batch: RowSharding(size=size, rows=size + extra, batch_size=batch),
    st.integers(1, 9),
    st.integers(0, 500),
    st.integers(1, 70),
)


def test_the_manuals_example():
    assert RowSharding(size=1, rows=1000, batch_size=100).steps == 10


def test_the_worked_example():
    world = RowSharding(size=2, rows=1001, batch_size=100)
    assert [share(world.rows, rank, world.size) for rank in (0, 1)] == [501, 500]
    assert (world.steps, world.last_batch, world.last_weight) == (6, 1, 2.0)


@given(worlds)
def test_every_row_has_one_rank_and_shards_differ_by_one_at_most(world):
    shards = [share(world.rows, rank, world.size) for rank in range(world.size)]
    assert sum(shards) == world.rows
    assert max(shards) - min(shards) <= 1
    assert max(shards) == world.padded_rows


@given(worlds)
def test_steps_hold_the_longest_shard_and_no_step_is_empty(world):
    assert (world.steps - 1) * world.batch_size + world.last_batch == world.padded_rows
    assert 1 <= world.last_batch <= world.batch_size


@given(worlds)
def test_the_weights_of_the_last_step_make_the_averaged_gradient_a_mean_over_rows(world):
    before = (world.steps - 1) * world.batch_size
    real = sum(share(world.rows, rank, world.size) - before for rank in range(world.size))
    # each rank divides by its batch, the average divides by the ranks
    weight_of_a_row = world.last_weight / world.last_batch / world.size
    assert math.isclose(weight_of_a_row, 1 / real)


@given(st.integers(0, 1000), st.integers(1, 40))
def test_shares_add_up(rows, count):
    assert sum(share(rows, index, count) for index in range(count)) == rows


def test_share_of_ratio():
    assert share_of_ratio(1000, 0.8) == 800
    assert share_of_ratio(10, 0.05) == 1
    assert share_of_ratio(7, 1.0) == 7
    assert share_of_ratio(7, 0.0) == 0
