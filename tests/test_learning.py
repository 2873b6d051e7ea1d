"""Warm-up, schedules, early stopping, TensorBoard: what happens over the epochs of a fit."""

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing import event_accumulator

import spark_mnist
from spark_mnist import errors
from spark_mnist.core import plan
from spark_mnist.ranks import metrics
from tests.conftest import arrays, manifest

QUIET = {"verbose": 0, "batch_size": 16}


def spec(schedule="constant", warmup=0):
    return plan.Optimizer(name="sgd", learning_rate=0.1, warmup_epochs=warmup, schedule=schedule)


@pytest.mark.parametrize(
    ("optimizer", "ranks", "rates"),
    [
        (spec(), 1, {0: 0.1, 7.5: 0.1}),
        (spec(), 4, {0: 0.4, 7.5: 0.4}),
        (spec(warmup=2), 4, {0: 0.1, 1: 0.25, 2: 0.4, 9: 0.4}),
        (spec(warmup=2), 1, {0: 0.1, 1: 0.1}),
        (spec("cosine:10"), 1, {0: 0.1, 5: 0.05, 10: 0, 11: 0}),
        (spec("cosine:4"), 2, {1: 0.1 * (1 + math.cos(math.pi / 4))}),
        (spec("exponential:0.5"), 1, {0: 0.1, 1: 0.05, 1.5: 0.1 * 0.5**1.5, 2: 0.025}),
        (spec("step:3:0.1"), 1, {0: 0.1, 2.9: 0.1, 3: 0.01, 6: 0.001}),
        (spec("step:2:0.5", warmup=4), 3, {2: 0.1}),
    ],
)
def test_the_rate_by_epoch_and_ranks(optimizer, ranks, rates):
    for epoch, rate in rates.items():
        assert optimizer.rate(epoch, ranks) == pytest.approx(rate)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("lr_schedule", "cosine", "constant, cosine:EPOCHS, exponential:FACTOR or step"),
        ("lr_schedule", "cosine:0", "cosine:EPOCHS"),
        ("lr_schedule", "step:2", "step:EPOCHS:FACTOR"),
        ("lr_schedule", "exponential:-1", "exponential:FACTOR"),
        ("warmup_epochs", -1, "int >= 0"),
        ("warmup_epochs", 1.5, "int >= 0"),
        ("patience", 0, "int >= 1"),
    ],
)
def test_bad_values_name_what_is_allowed(digits, store, name, value, allowed):
    with pytest.raises(errors.OptionError, match=f"{name} must be .*{allowed}.*, not {value!r}"):
        spark_mnist.fit(digits, "m", store=store, **{name: value})


def test_epochs_beyond_a_cosine_are_refused(digits, store):
    with pytest.raises(errors.OptionError, match=r"cosine:2 nothing more is learned in epoch 3"):
        spark_mnist.fit(digits, "m", epochs=3, lr_schedule="cosine:2", store=store)
    few = digits.limit(40)
    spark_mnist.fit(few, "m", epochs=2, lr_schedule="cosine:2", store=store, **QUIET)
    options = {"continuous": True, "epochs": 1, "store": store, **QUIET}
    with pytest.raises(errors.OptionError, match="name another schedule, say constant"):
        spark_mnist.fit(few, "m", **options)
    assert spark_mnist.fit(few, "m", lr_schedule="constant", **options).version == 2


@pytest.mark.ranks
def test_two_and_two_epochs_equal_four_with_a_schedule(digits, store):
    options = {**QUIET, "store": store, "num_proc": 2, "optimizer": "momentum"}
    changing = {"warmup_epochs": 2, "lr_schedule": "cosine:5"}
    whole = spark_mnist.fit(digits, "whole", epochs=4, **options, **changing)
    spark_mnist.fit(digits, "parts", epochs=2, **options, **changing)
    spark_mnist.fit(digits, "parts", epochs=2, continuous=True, **options)
    for a, b in zip(arrays(store, "whole", 1), arrays(store, "parts", 2), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    saved = manifest(store, "parts", 2)["optimizer"]
    assert saved == {
        "name": "momentum",
        "learning_rate": 0.02,
        "warmup_epochs": 2,
        "schedule": "cosine:5",
        "clipnorm": None,
        "accumulate_steps": 1,
    }
    train, validation = (events(store, "whole", folder) for folder in ("train", "validation"))
    rates = [event.value for event in train["epoch_learning_rate"]]
    assert rates[0] < rates[1] > rates[2] > rates[3] > 0  # up with the warm-up, then down
    assert [event.step for event in train["epoch_loss"]] == [1, 2, 3, 4]
    for record, loss, accuracy in zip(
        whole.records, train["epoch_loss"], validation["epoch_accuracy"], strict=True
    ):
        assert loss.value == pytest.approx(record.losses["loss"], rel=1e-6)
        assert accuracy.value == pytest.approx(record.metrics["val_accuracy"], rel=1e-6)


def events(store, name, folder, version=1):
    """The scalars by tag that TensorBoard reads in a version's logs."""
    directory = Path(store) / name / f"v{version:06d}" / "logs" / folder
    guidance = {"tensors": 0, "graph": 1}
    read = event_accumulator.EventAccumulator(str(directory), guidance).Reload()
    if folder == "train":
        names = {node.name for node in read.Graph().node}
        assert any("classes" in name for name in names), names
    values = {}
    for tag in read.Tags()["tensors"]:
        found = read.Tensors(tag)
        values[tag] = [
            dataclasses.make_dataclass("Event", ["step", "value"])(
                event.step, float(np.frombuffer(event.tensor_proto.tensor_content, "<f4")[0])
                if event.tensor_proto.tensor_content else event.tensor_proto.float_val[0]
            )
            for event in found
        ]  # fmt: skip
    return values


def test_patience_stops_and_keeps_the_best_epoch(digits, store):
    options = {**QUIET, "store": store, "optimizer": "sgd", "learning_rate": 2.0, "seed": 1}
    result = spark_mnist.fit(digits.limit(80), "m", epochs=200, patience=3, **options)
    losses = [record.losses["val_loss"] for record in result.records]
    best = int(np.argmin(losses)) + 1
    assert len(losses) == best + 3 < 200
    assert manifest(store, "m")["epochs"] == best
    assert len(manifest(store, "m")["history"]) == best + 3
    again = spark_mnist.fit(digits.limit(80), "again", epochs=best, **options)
    assert again.records == result.records[:best]
    for a, b in zip(arrays(store, "m", 1), arrays(store, "again", 1), strict=True):
        np.testing.assert_array_equal(a, b)
    info = spark_mnist.describe("m", store=store)
    assert info.losses["val_loss"] == min(losses)
    more = spark_mnist.fit(
        digits.limit(80), "m", continuous=True, epochs=2, patience=1, store=store, **QUIET
    )
    assert more.records[0].epoch == best + 1


def test_without_validation_patience_looks_at_the_training_loss(digits, store):
    options = {**QUIET, "train_validation_ratio": 1, "store": store, "learning_rate": 1e-9}
    result = spark_mnist.fit(digits.limit(64), "m", epochs=30, patience=2, **options)
    losses = [record.losses["loss"] for record in result.records]
    best = int(np.argmin(losses)) + 1
    assert manifest(store, "m")["epochs"] == best
    assert len(losses) == min(30, best + 2)


def test_training_that_comes_to_no_number_saves_nothing(digits, store):
    options = {**QUIET, "store": store, "optimizer": "sgd", "learning_rate": 1e30}
    with pytest.raises(errors.NotFinite, match=r"training failed in epoch 1.*Lower learning_rate"):
        spark_mnist.fit(digits.limit(64), "m", epochs=3, **options)
    assert spark_mnist.models(store) == []


def test_with_patience_what_was_best_before_there_were_no_numbers_is_kept(
    digits, store, monkeypatch
):
    real = metrics.Metrics.means
    losses = iter([3.0, 3.0, 2.0, 2.0, math.nan, math.nan])

    def means(self, prefix=""):
        return {**real(self, prefix), f"{prefix}loss": next(losses)}

    monkeypatch.setattr(metrics.Metrics, "means", means)
    result = spark_mnist.fit(digits.limit(64), "m", epochs=9, patience=4, store=store, **QUIET)
    assert len(result.records) == 3
    assert manifest(store, "m")["epochs"] == 2


def test_a_rate_that_grows_beyond_all_numbers_is_refused(digits, store):
    message = r"exponential:10 .* epoch 400, whose learning rate is inf"
    with pytest.raises(errors.OptionError, match=message):
        spark_mnist.fit(digits, "m", epochs=400, lr_schedule="exponential:10", store=store)


def test_curves_are_written_without_tensorboard():
    program = [sys.executable, "-W", "ignore", "-m", "tests.programs.curves_without_tensorboard"]
    subprocess.run(program, check=True, timeout=120)


def test_a_quiet_fit_in_this_process_prints_nothing(digits, store, capsys):
    spark_mnist.fit(digits.limit(64), "m", epochs=1, store=store, **QUIET)
    assert capsys.readouterr().out == ""
