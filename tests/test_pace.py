"""When checkpoints within an epoch are due, by a clock that the tests set."""

import math

import pytest

from spark_mnist import options
from spark_mnist.ranks import loop, pace


class Clock:
    """Time that passes by the step."""

    def __init__(self, seconds, first_seconds=0.0):
        self.seconds, self.first_seconds, self.step = seconds, first_seconds, 0

    def __call__(self):
        return self.step * self.seconds + self.first_seconds * (self.step > 0)


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    compared = []

    def compare(values):
        compared.append(values)
        return values

    monkeypatch.setattr(pace.collectives, "allreduce_sum", compare)
    return compared


def due(seconds, clock, steps=3200):
    """Steps of an epoch at which a checkpoint is due."""
    checkpoints = pace.Pace(seconds, clock)
    checkpoints.begin(0)
    found = []
    for clock.step in range(32, steps, 32):
        if checkpoints.is_due(clock.step):
            found.append(clock.step)
            checkpoints.begin(clock.step)
    return found


def test_checkpoints_are_as_far_apart_as_asked(one_rank):
    assert due(10.0, Clock(0.01)) == [992, 1984, 2976]
    assert len(one_rank) == 4  # at the first block, and at each checkpoint


def test_a_slow_first_step_makes_no_early_checkpoint():
    first, second, *_ = due(10.0, Clock(0.01, first_seconds=5.0))
    assert 0.9 * 10.0 <= 5.0 + first * 0.01 <= 10.0 + 32 * 0.01
    assert second - first == 992


def test_long_steps_have_a_checkpoint_after_each_block():
    assert due(1.0, Clock(0.5), steps=320) == [*range(32, 320, 32)]


def test_the_option_names_the_steps_of_a_block():
    assert f"a multiple of {loop.BLOCK} steps" in options.FIELDS["checkpoint_every"].metadata["doc"]


def test_short_epochs_have_none_and_compare_no_time_again(one_rank):
    checkpoints = pace.Pace(600.0, clock := Clock(0.001))
    for _ in range(5):
        clock.step = 0
        checkpoints.begin(0)
        for clock.step in range(32, 320, 32):
            assert not checkpoints.is_due(clock.step)
    assert len(one_rank) == 1


def test_none_are_asked_for(one_rank):
    assert due(math.inf, Clock(1.0)) == []
    assert not one_rank
