"""Callbacks of users, on two ranks."""

import json
import os
import signal
from pathlib import Path

import keras
import pytest

import spark_mnist
from tests.conftest import arrays
from tests.faults.harness import Saboteur, nothing_left, send, trained

OPTIONS = {"batch_size": 16, "verbose": 0, "seed": 2}


class Diary(keras.callbacks.Callback):
    """Write what each hook was called with to a file of the rank."""

    def __init__(self, folder, batches=False):
        super().__init__()
        self._folder = folder
        self.epochs_seen = 0
        if batches:
            self.on_train_batch_end = lambda step, logs: self.write("batch", step, logs)

    def write(self, *entry):
        with open(Path(self._folder, str(os.getpid())), "a") as file:
            print(json.dumps(entry, default=float), file=file)

    def on_train_begin(self, logs=None):
        self.write("begin", self.epochs_seen)

    def on_epoch_end(self, epoch, logs=None):
        self.epochs_seen += 1
        self.write("epoch", epoch, logs)

    def on_train_end(self, logs=None):
        self.write("end", self.epochs_seen)


def diaries(folder):
    files = [*Path(folder).iterdir()]
    return [[json.loads(line) for line in path.read_text().splitlines()] for path in files]


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "diaries"
    path.mkdir()
    return str(path)


@pytest.mark.ranks
def test_every_rank_calls_the_same_hooks_with_the_same_logs(digits, store, folder):
    def make():
        return [Diary(folder, batches=True), StopOfOneRank(folder)]

    class StopOfOneRank(keras.callbacks.Callback):
        """Stop the training after the third epoch, on the rank that is first to say so."""

        def __init__(self, folder):
            super().__init__()
            self._path = Path(folder).parent / "stopped"

        def on_epoch_end(self, epoch, logs=None):
            if epoch == 2:
                try:
                    self._path.touch(exist_ok=False)
                except FileExistsError:
                    return
                self.model.stop_training = True

    result = spark_mnist.fit(
        digits, "m", num_proc=2, epochs=9, callbacks=make, store=store, **OPTIONS
    )
    first, second = diaries(folder)
    assert first == second
    assert [entry[:2] for entry in first if entry[0] != "batch"] == [
        *(["begin", 0], ["epoch", 0], ["epoch", 1], ["epoch", 2], ["end", 3])
    ]
    steps = -(-result.rows.train // 32)
    assert len([entry for entry in first if entry[0] == "batch"]) == 3 * steps
    for record, (_, _, logs) in zip(
        result.records, [entry for entry in first if entry[0] == "epoch"], strict=True
    ):
        assert logs == {**record.losses, **record.metrics}
    last_batch = [entry for entry in first if entry[0] == "batch"][-1]
    assert last_batch[2]["loss"] == pytest.approx(result.records[-1].losses["loss"])


def stopping():
    return [
        keras.callbacks.ReduceLROnPlateau(monitor="loss", factor=0.5, patience=1, min_delta=0.05),
        keras.callbacks.EarlyStopping(
            monitor="val_accuracy", patience=6, restore_best_weights=True
        ),
        keras.callbacks.TerminateOnNaN(),
    ]


@pytest.mark.ranks
def test_a_restart_goes_on_with_the_state_of_callbacks(digits, tmp_path):
    options = {**OPTIONS, "num_proc": 2, "epochs": 25, "callbacks": stopping}
    quiet, broken = str(tmp_path / "quiet"), str(tmp_path / "broken")
    expected = spark_mnist.fit(digits, "m", store=quiet, **options)
    with (
        nothing_left(broken),
        Saboteur(lambda: trained(broken, "m", 6), send(signal.SIGKILL, 1)),
    ):
        found = spark_mnist.fit(digits, "m", store=broken, **options)
    assert found.records == expected.records
    assert len(found.records) < 25
    for mine, other in zip(arrays(broken, "m", 1), arrays(quiet, "m", 1), strict=True):
        assert (mine == other).all()


def test_early_stopping_gives_back_the_best_weights(digits, held_out, store):
    def make():
        return [
            keras.callbacks.EarlyStopping(monitor="val_loss", patience=2, restore_best_weights=True)
        ]

    options = {"optimizer": "sgd", "learning_rate": 2.0, "callbacks": make, **OPTIONS}
    result = spark_mnist.fit(
        digits, "m", epochs=40, train_validation_ratio=0.5, store=store, **options
    )
    losses = [record.losses["val_loss"] for record in result.records]
    best = losses.index(min(losses))
    assert len(losses) == best + 3
    again = spark_mnist.fit(
        digits, "n", epochs=best + 1, train_validation_ratio=0.5, store=store,
        **{**options, "callbacks": None},
    )  # fmt: skip
    assert again.records == result.records[: best + 1]
    for mine, other in zip(arrays(store, "m", 1), arrays(store, "n", 1), strict=True):
        assert (mine == other).all()


def test_callbacks_set_the_learning_rate(digits, store):
    rates = []

    class Note(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            rates.append(float(self.model.optimizer.learning_rate))

    def make():
        halve = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2)
        return [Note(), halve, keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: None)]

    spark_mnist.fit(
        digits, "m", epochs=4, learning_rate=0.08, callbacks=make, store=store, **OPTIONS
    )
    assert rates == pytest.approx([0.08, 0.04, 0.02, 0.01])
