import dataclasses
import re

import pytest

from spark_mnist.core import plan
from spark_mnist.core.sharding import RowSharding
from spark_mnist.fitting import timing
from spark_mnist.ranks import batches, collectives, loop

QUICK = timing.Timing(
    prepare=2.0, start=3.0, train=10.0, validate=1.0, publish=0.1, rows_per_second=48000.0,
    input_share=0.01, allreduce_share=0.2, memory=1 << 29, hint=None,
)  # fmt: skip
TWO = RowSharding(size=2, rows=48000, batch_size=32)
SHARDS = plan.Shards(urls=("a",), rows=48000, encoding=plan.Encoding("uint8", 255.0, 784))
TRAINING = plan.TrainingPlan(
    network=plan.Network(name="mlp", inputs=784, classes=10),
    optimizer=plan.Optimizer(name="adam", learning_rate=0.001),
    sharding=TWO,
    train=SHARDS,
    validation=SHARDS,
    first_epoch=0,
    epochs=5,
    seed=0,
    cache=1 << 30,
    work="memory://work",
)


def test_seconds_add_up_to_the_fit():
    clock = timing.Clock()
    clock.seconds = {"prepare": 4.0, "ranks": 20.0, "publish": 0.5}
    times = plan.RankTimes(
        attempt=0, epochs=5, train=8.0, input=0.8, allreduce=2.0, validate=2.0, memory=7
    )
    found = timing.measure(clock, times, TRAINING)
    parts = found.prepare, found.start, found.train, found.validate, found.publish
    assert parts == (4.0, 10.0, 8.0, 2.0, 0.5)
    assert found.memory == 7
    assert found.rows_per_second == 5 * 48000 / 8.0
    assert (found.input_share, found.allreduce_share) == (0.1, 0.25)
    assert str(found) == (
        "30,000 rows/s; seconds: prepare 4.0, start 10.0, train 8.0, validate 2.0, publish 0.5; "
        "of a step 10% waited for rows and 25% for other ranks"
    )


def test_after_a_restart_there_is_no_hint():
    clock = timing.Clock()
    clock.seconds = {"prepare": 1.0, "ranks": 200.0, "publish": 0.5}
    for attempt, hinted in ((0, True), (1, False)):
        times = plan.RankTimes(
            attempt=attempt, epochs=5, train=8.0, input=0.8, allreduce=2.0, validate=2.0, memory=7
        )
        assert bool(timing.measure(clock, times, TRAINING).hint) == hinted


def test_a_clock_adds_up_what_is_done_twice():
    clock = timing.Clock()
    for _ in range(2):
        with clock.add_time("prepare"):
            pass
    assert list(clock.seconds) == ["prepare"]
    assert clock.seconds["prepare"] > 0


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, None),
        ({"allreduce_share": 0.4}, "ranks wait much: .* raise batch_size=32"),
        ({"allreduce_share": 0.7}, "2 ranks are slower than one would be: .* raise batch_size=32"),
        ({"input_share": 0.5}, "steps wait for rows: raise cache"),
        ({"prepare": 60.0}, "went into the rows: persist"),
        ({"start": 60.0}, "went into starting ranks"),
        ({"train": 60.0}, None),
    ],
)
def test_what_dominates_gets_a_hint(changed, words):
    found = timing.hint(dataclasses.replace(QUICK, **changed), TWO)
    if words is None:
        assert found is None
    else:
        assert found is not None
        assert re.search(words, found)
        assert str(dataclasses.replace(QUICK, hint=found)).endswith(found)


class Clock:
    """A clock on which each call of a step's graph takes its seconds."""

    def __init__(self, seconds):
        self.seconds, self.now, self.counts = seconds, 0.0, []

    def call(self, _, first, end):
        self.counts.append(int(end - first))
        self.now += self.seconds * self.counts[-1]
        return 0.0


@pytest.mark.parametrize(
    ("seconds", "counts"),
    [
        (0.001, [1, 31, 32, 6]),
        (0.125, [1, 8, 8, 8, 7, 8, 8, 8, 8, 6]),
        (3.0, [1] * 70),
    ],
)
def test_calls_are_as_short_as_their_steps_are_long(monkeypatch, seconds, counts):
    clock = Clock(seconds)
    calls = loop.Loop(lambda _: None, clock=lambda: clock.now)
    monkeypatch.setattr(calls, "_call", clock.call)
    done = list(calls.run(batches.Batches(None, lambda source, step: (), 70)))
    assert clock.counts == counts
    assert {32, 64, 70} <= set(done)


@pytest.mark.parametrize(("value", "has_clock"), [("1", False), ("true", False), ("0", True)])
def test_a_step_has_no_clock_where_tensorflow_allows_none(monkeypatch, value, has_clock):
    monkeypatch.setenv("TF_DETERMINISTIC_OPS", value)
    assert (float(collectives.timestamp()) > 0) == has_clock
