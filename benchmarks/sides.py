"""Sides of the comparisons: each function does its work once and returns one figure."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pyspark.ml.classification import MultilayerPerceptronClassifier
from pyspark.ml.functions import array_to_vector
from pyspark.sql import DataFrame

import spark_mnist
from benchmarks import databricks
from benchmarks.data import Data, as_floats
from spark_mnist.core import plan
from spark_mnist.data import profile, shard_writer

EPOCHS, CNN_EPOCHS = 5, 3
ACCURACY, ACCURATE_EPOCHS, ACCURATE_ITERATIONS = 0.97, 5, 100
"""Accuracy on test rows that both networks must reach; epochs of ours, iterations of Spark ML's."""
BIG, SMALL = 1024, 128
"""Rows of a batch."""
PEERS = Path(__file__).parent.parent / ".venv-peers" / "bin" / "python"
"""The environment that ``make bench-peers`` builds."""
TORCH = Path(__file__).parent.parent / ".venv-torch" / "bin" / "python"
"""The environment that ``make bench-torch`` builds."""
SHAPES = {
    "mlp": {"batch_size": SMALL, "epochs": EPOCHS},
    "cnn-64": {"network": "cnn", "batch_size": 64, "epochs": CNN_EPOCHS},
    "cnn-512": {"network": "cnn", "batch_size": 512, "epochs": CNN_EPOCHS},
}
"""Workloads that are compared with TorchDistributor; the cnn trains on a tenth of the rows."""


class Sides:
    """All that can be measured on some data."""

    def __init__(self, data: Data) -> None:
        self.data = data
        self.store = str(data.home / "models")

    def fit(self, rows: DataFrame | None = None, **options: Any) -> spark_mnist.FitResult:
        """Train; without anything else the mlp, on all rows, in batches of ``SMALL``."""
        given = {"epochs": EPOCHS, "batch_size": SMALL, "train_validation_ratio": 1.0}
        given |= {"num_proc": 2, "verbose": 0, "store": self.store, **options}
        name = str(given.get("network", "mlp"))
        return spark_mnist.fit(self.data.pictures if rows is None else rows, name, **given)

    def trains(self, **options: Any) -> float:
        """Rows/s of all ranks in training steps."""
        return self.fit(**options).timing.rows_per_second

    def trains_cnn(self) -> float:
        """Measure the same for the cnn, on a tenth of the rows."""
        few = self.data.pictures.limit(6_000)
        fitted = self.fit(few, network="cnn", batch_size=64, epochs=CNN_EPOCHS)
        return fitted.timing.rows_per_second

    def keras(
        self,
        *,
        network: str = "mlp",
        batch: int = SMALL,
        threads: int = 1,
        processes: int = 1,
        verb: str = "fit",
    ) -> float:
        """Rows/s of Keras in memory, in so many processes at once that share the rows."""
        epochs, share = (CNN_EPOCHS, 10) if network == "cnn" else (EPOCHS, 1)
        words = (self.data.arrays, verb, network, batch, threads, epochs, share * processes)
        command = [sys.executable, "-m", "benchmarks.keras_alone", *map(str, words)]
        running = [
            subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(processes)
        ]
        said = [process.communicate()[0] for process in running]
        if any(process.returncode for process in running):
            raise RuntimeError(f"{' '.join(command)} failed")
        return sum(map(float, said))

    def bare(self, network: str = "mlp", batch: int = SMALL, ranks: int = 2) -> float:
        """Rows/s of the same ranks in ``bare_loop.py``."""
        words = (self.data.arrays, network, batch, ranks)
        command = [sys.executable, "-m", "benchmarks.bare_loop", *map(str, words)]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
        return float(done.stdout)

    def trains_as_databricks(self) -> float:
        """Rows/s of two ranks in training steps."""
        with self._directory() as directory:
            converter = databricks.converted(self.data.floats, directory)
            return databricks.throughput(converter, ranks=2, batch=SMALL, epochs=EPOCHS)

    def whole_fit(self) -> float:
        """Seconds of a whole call."""
        begun = time.perf_counter()
        self.fit()
        return time.perf_counter() - begun

    def learns(self) -> float:
        """Seconds of a whole call that trains the mlp to ``ACCURACY`` on the test rows."""
        begun = time.perf_counter()
        self.fit(network="mlp", epochs=ACCURATE_EPOCHS)
        seconds = time.perf_counter() - begun
        row = spark_mnist.evaluate(self.data.test, "mlp", rate=1, store=self.store).first()
        self._check_accuracy(row["metrics"]["accuracy"])
        return seconds

    def learns_as_spark_ml(self) -> float:
        """Seconds in which Spark ML's own network of the same layers learns as much."""
        layers = [784, 128, 32, 10]
        rows = self._vectors("floats", self.data.floats)
        network = MultilayerPerceptronClassifier(layers=layers, maxIter=ACCURATE_ITERATIONS, seed=0)
        begun = time.perf_counter()
        model = network.fit(rows)
        seconds = time.perf_counter() - begun
        pixels = as_floats(self.data.test)
        found = model.transform(self._vectors("test_floats", pixels))
        correct = found.where("prediction = label").count() / found.count()
        self._check_accuracy(correct)
        return seconds

    def _vectors(self, name: str, floats: DataFrame) -> DataFrame:
        """Write rows with ``features``, a Vector of pixels, once; and read them into memory."""
        path = self.data.home / f"{name}_vectors"
        if not path.exists():
            vectors = array_to_vector("image").alias("features")
            floats.select(vectors, "label").write.parquet(str(path))
        rows = self.data.spark.read.parquet(str(path)).persist()
        rows.count()
        return rows

    def _check_accuracy(self, accuracy: float) -> None:
        if self.data.is_mnist and accuracy < ACCURACY:
            raise RuntimeError(f"test accuracy {accuracy:.4f} is below {ACCURACY}")

    def continues(self) -> float:
        """Seconds of a whole call that continues for one epoch on new rows, as a stream does."""
        self._trained()
        rows = self.data.pictures.limit(1_000).cache()
        rows.count()
        begun = time.perf_counter()
        self.fit(rows, epochs=1, continuous=True)
        return time.perf_counter() - begun

    def shaped(self, shape: str) -> tuple[float, float]:
        """Seconds of a whole call of one of ``SHAPES``, and its rows/s in training steps."""
        options = SHAPES[shape]
        rows = self.data.pictures.limit(6_000) if "network" in options else self.data.pictures
        begun = time.perf_counter()
        fit = self.fit(rows, **options)
        return time.perf_counter() - begun, fit.timing.rows_per_second

    def torch(self, shape: str) -> tuple[float, float, float]:
        """Measure the same for TorchDistributor, and the seconds of a session's first call."""
        options: dict[str, Any] = dict(SHAPES[shape])
        network = str(options.get("network", "mlp"))
        count = 6_000 if network == "cnn" else 60_000
        words = (network, options["batch_size"], options["epochs"], count)
        seconds, rate, first = self._elsewhere(TORCH, "torch_peer.py", *words)
        return seconds, rate, first

    def peers(self, what: str) -> float:
        """One figure of what needs the peers' environment; see ``peers.py``."""
        return self._elsewhere(PEERS, "peers.py", what)[0]

    def first_fit(self, epochs: int = 1) -> tuple[float, float]:
        """Seconds until ranks train, and of the whole call, in the first fit of a session."""
        _ = self.data.pictures
        words = (self.data.home / "pictures", epochs)
        command = [sys.executable, "-m", "benchmarks.first_fit", *map(str, words)]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        start, seconds = map(float, done.stdout.split())
        return start, seconds

    def _elsewhere(self, python: Path, script: str, *words: object) -> list[float]:
        """Run a script of this folder in another environment; returns what it prints last."""
        folder = Path(__file__).parent
        command = [str(python), str(folder / script), str(self.data.arrays), *map(str, words)]
        environment = {k: v for k, v in os.environ.items() if k != "SPARK_HOME"}
        environment |= {"PYSPARK_PYTHON": str(python), "PYTHONPATH": str(folder)}
        found = subprocess.run(
            command, stdout=subprocess.PIPE, check=True, text=True, env=environment
        )
        return [*map(float, found.stdout.splitlines()[-1].split())]

    def predicts(self, rows: DataFrame | None = None) -> float:
        """Rows/s of reading, predicting and dropping all rows."""
        rows = self.data.pictures if rows is None else rows
        self._trained()
        found = spark_mnist.predict(rows, "mlp", batch_size=BIG, store=self.store)
        found.write.format("noop").mode("overwrite").save()  # all workers start
        begun = time.perf_counter()
        found.write.format("noop").mode("overwrite").save()
        seconds = time.perf_counter() - begun
        return rows.count() / seconds

    def evaluates(self, repeat: int) -> float:
        """Seconds of so many evaluations."""
        self._trained()
        options = {"repeat": repeat, "batch_size": BIG, "store": self.store}
        spark_mnist.evaluate(self.data.pictures, "mlp", **options).collect()  # all workers start
        begun = time.perf_counter()
        spark_mnist.evaluate(self.data.pictures, "mlp", **options).collect()
        return time.perf_counter() - begun

    def writes(self) -> tuple[float, float]:
        """Seconds of writing shards for two ranks, and their bytes for a pixel."""
        with self._directory() as directory:
            counted = profile.profile_rows(self.data.pictures, plan.InputSpec(), seed=0)
            begun = time.perf_counter()
            with shard_writer.write_shards(counted, url=f"file://{directory}", ranks=2, ratio=1.0):
                seconds = time.perf_counter() - begun
                return seconds, _bytes(directory) / (counted.rows * 784)

    def writes_as_databricks(self) -> float:
        """Seconds of the converter on array<float>."""
        rows = self.data.floats
        with self._directory() as directory:
            begun = time.perf_counter()
            databricks.converted(rows, directory).delete()
            return time.perf_counter() - begun

    def memory(self, rows: DataFrame) -> float:
        """Most bytes in memory of a rank that streams."""
        return self.fit(rows, cache="none", epochs=1).timing.memory

    def _trained(self) -> None:
        if "mlp" not in [model.name for model in spark_mnist.models(self.store)]:
            self.fit(epochs=1)

    @contextlib.contextmanager
    def _directory(self) -> Iterator[str]:
        with tempfile.TemporaryDirectory(dir=self.data.home) as directory:
            yield directory


def _bytes(directory: str) -> int:
    return sum(path.stat().st_size for path in Path(directory).rglob("*.parquet") if path.is_file())
