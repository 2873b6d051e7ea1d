"""What only a machine with GPUs can show, on the digits of scikit-learn; `make test-gpu` runs it.

    python -m tests.on_gpus [--cpu]

Prints a line for each check. With one GPU the checks of two ranks are left out, and named. With
``--cpu`` the same runs without GPUs, in float32, to look at the checks themselves.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from pyspark.sql import SparkSession

import spark_mnist
from tests.conftest import arrays

COMPILE_S = 60.0
"""Seconds in which a rank seems to do nothing, as one that compiles on its GPU."""
SETTINGS = {"batch_size": 32, "epochs": 6, "seed": 1, "verbose": 1, "train_validation_ratio": 0.8}


class Devices(logging.Handler):
    """Collect what the driver logs of the ranks' devices."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the text of one record."""
        self.text += record.getMessage()


class Checks:
    """The checks, in the order in which they run; each raises ``AssertionError``, or returns text.

    Args:
        spark: A session with two slots.
        home: Directory of the stores.
        gpus: Number of GPUs of this machine; 0 for a trial on its CPU.
    """

    def __init__(self, spark: SparkSession, home: str, gpus: int) -> None:
        self._home, self._gpus = home, gpus
        self._train = spark_mnist.datasets.digits(spark, "train")
        self._test = spark_mnist.datasets.digits(spark, "test")
        self._precision = "mixed_float16" if gpus else "float32"
        self._devices = Devices()
        logging.getLogger("spark_mnist").addHandler(self._devices)

    def __iter__(self) -> Iterator[tuple[str, int, Callable[[], str]]]:
        """Yield what each check shows, how many ranks it has, and its function."""
        yield "one rank trains, on a GPU", 1, lambda: self._learns("one", 1)
        yield "two ranks train, each on its own GPU", 2, lambda: self._learns("two", 2)
        yield "two ranks learn what one learns from both batches", 2, self._same_gradients
        yield "the same fit gives the same weights", 1, self._deterministic
        yield "predictions are those of the CPU", 1, self._predicts
        yield "a rank that compiles for a minute is not lost", 1, self._compiles

    def _fit(self, name: str, ranks: int, **options: Any) -> spark_mnist.FitResult:
        self._devices.text = ""
        values = {**SETTINGS, "num_proc": ranks, "store": self._home, **options}
        return spark_mnist.fit(self._train, name, **values)

    def _learns(self, name: str, ranks: int) -> str:
        result = self._fit(name, ranks, precision=self._precision)
        if self._gpus:
            names = {line.rpartition("GPU ")[2] for line in self._devices.text.splitlines()[1:]}
            assert len(names) == ranks, self._devices.text
        accuracy = result.records[-1].metrics["val_accuracy"]
        assert accuracy > 0.85, accuracy
        return f"{accuracy:.3f} of the rows held out, {result.timing.rows_per_second:,.0f} rows/s"

    def _same_gradients(self) -> str:
        options = {"optimizer": "sgd", "epochs": 1, "train_validation_ratio": 1.0}
        options |= {"precision": "float32"}
        rows = self._train.count()
        self._fit("whole", 1, batch_size=rows, learning_rate=0.1, **options)
        self._fit("halves", 2, batch_size=-(-rows // 2), learning_rate=0.05, **options)
        pairs = zip(arrays(self._home, "whole", 1), arrays(self._home, "halves", 1), strict=True)
        distance = max(float(np.abs(one - other).max()) for one, other in pairs)
        assert distance < 1e-4, distance
        return f"weights differ by {distance:.1e} at most"

    def _deterministic(self) -> str:
        for _ in range(2):
            self._fit("again", 1, precision=self._precision)
        pairs = zip(arrays(self._home, "again", 1), arrays(self._home, "again", 2), strict=True)
        assert all(np.array_equal(one, other) for one, other in pairs)
        return "to the last bit, with TF_DETERMINISTIC_OPS=1"

    def _predicts(self) -> str:
        (row,) = spark_mnist.evaluate(self._test, "one", rate=1.0, store=self._home).collect()
        accuracy = row["metrics"]["accuracy"]
        model = spark_mnist.export("one", f"{self._home}/one.keras", store=self._home)
        import keras
        import tensorflow as tf

        rows = self._test.select("image", "label").collect()
        images = np.frombuffer(b"".join(bytes(row["image"]) for row in rows), np.uint8)
        with tf.device("CPU"):
            scores = keras.models.load_model(model)(images.reshape(len(rows), -1) / 255.0)
        classes = np.asarray(scores).argmax(axis=1)
        expected = float(np.mean(classes == [row["label"] for row in rows]))
        assert abs(accuracy - expected) < 0.01, (accuracy, expected)
        return f"{accuracy:.3f} right, {expected:.3f} on the CPU"

    def _compiles(self) -> str:
        if not self._gpus:
            return "left out: a rank without a GPU would be lost, as it should"
        begun = time.monotonic()
        self._fit("slow", 1, epochs=1, heartbeat_timeout=10.0, callbacks=waiting, max_restarts=0)
        seconds = time.monotonic() - begun
        assert seconds > COMPILE_S, seconds
        return f"after {seconds:.0f} s, with heartbeat_timeout=10"


def waiting() -> list[Any]:
    """Make a callback that waits before the first step, without CPU time."""
    import keras

    class Wait(keras.callbacks.Callback):
        def on_train_begin(self, logs: Any = None) -> None:
            time.sleep(COMPILE_S)

    return [Wait()]


def main(words: list[str]) -> int:
    """Run the checks; the exit code says whether all passed."""
    os.environ |= {"TF_DETERMINISTIC_OPS": "1", "PYSPARK_PYTHON": sys.executable}
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    is_trial = "--cpu" in words
    import tensorflow as tf

    gpus = 0 if is_trial else len(tf.config.list_physical_devices("GPU"))
    if not gpus and not is_trial:
        sys.stderr.write("TensorFlow sees no GPU here: install the extra gpu, and a driver\n")
        return 1
    spark = SparkSession.builder.master("local[2]").getOrCreate()
    spark.sparkContext.setLogLevel("ERROR")
    failures = 0
    with tempfile.TemporaryDirectory() as home:
        for what, ranks, check in Checks(spark, home, gpus):
            if not is_trial and ranks > gpus:
                sys.stdout.write(f"left out  {what}: it takes {ranks} GPUs, and there is one\n")
                continue
            try:
                sys.stdout.write(f"ok        {what}: {check()}\n")
            except Exception as error:  # of any type: the other checks tell more
                failures += 1
                sys.stdout.write(f"FAILED    {what}: {type(error).__name__}: {error}\n")
    spark.stop()
    return int(failures > 0)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
