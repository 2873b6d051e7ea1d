"""Compares this library with the other ways, side by side in one run.

    MNIST_DIR=/path/to/idx python -m benchmarks [--json] [--rounds 3] [NAME ...]

The sides of a comparison take turns; a figure is the median of its rounds, and only their ratio
means anything, since machines differ.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
from pyspark.sql import SparkSession

from benchmarks.data import Data
from benchmarks.sides import BIG, EPOCHS, PEERS, TORCH, Sides

Side = Callable[[Sides], float]


@dataclass(frozen=True)
class Comparison:
    """Two figures whose ratio, the first over the second, has a target."""

    what: str
    target: float
    ours: Side
    theirs: Side
    at_most: bool = False
    """Whether the ratio should be below the target, not above."""
    peers: bool = False
    """Whether it needs the peers' environment."""
    torch: bool = False
    """Whether it needs PyTorch's."""
    warm_ups: int = 0
    """Rounds that do not count, where the JVM would compile what it runs during the first ones."""

    def lacks(self) -> str | None:
        """Return the command that builds an environment which it needs and which is not there."""
        if self.peers and not PEERS.exists():
            return "make bench-peers"
        return "make bench-torch" if self.torch and not TORCH.exists() else None

    def met(self, ratio: float) -> bool:
        """Whether a ratio is as it should be."""
        return ratio <= self.target if self.at_most else ratio >= self.target


def _per_row(part: str) -> tuple[Side, Side]:
    """Seconds a row of one part of a fit, of ten times the rows and of the rows."""

    def seconds(sides: Sides, times: int) -> float:
        rows = sides.data.tenfold if times == 10 else sides.data.pictures
        return getattr(sides.fit(rows, epochs=2).timing, part) / times

    return lambda sides: seconds(sides, 10), lambda sides: seconds(sides, 1)


COMPARISONS = {
    "databricks": Comparison(
        "training, mlp, batch 128, 2 ranks: rows/s against the Databricks way",
        4.0, Sides.trains, Sides.trains_as_databricks,
    ),
    "databricks-own": Comparison(
        "the same against the Databricks way with the packages of its notebooks",
        4.0, Sides.trains, lambda s: s.peers("databricks"), peers=True,
    ),
    "bare-mlp": Comparison(
        "training, mlp, batch 128, 2 ranks: rows/s against a bare loop of the same ranks",
        0.85, lambda s: s.trains(epochs=20), Sides.bare,
    ),
    "bare-mlp-1": Comparison(
        "training, mlp, batch 128, 1 rank: rows/s against a bare loop of the same rank",
        0.85, lambda s: s.trains(num_proc=1, epochs=20), lambda s: s.bare(ranks=1),
    ),
    "bare-cnn": Comparison(
        "training, cnn, batch 64, 2 ranks: rows/s against a bare loop of the same ranks",
        0.85, Sides.trains_cnn, lambda s: s.bare("cnn", 64),
    ),
    "keras-thread": Comparison(
        "training, mlp, batch 128, 1 rank, 1 thread: rows/s against Keras in memory, 1 thread",
        2.0, lambda s: s.trains(num_proc=1), Sides.keras,
    ),
    "keras-machine": Comparison(
        "training, mlp, batch 128, 2 ranks: rows/s against Keras in memory, all cores",
        1.0, Sides.trains, lambda s: s.keras(threads=0),
    ),
    "bound-cnn": Comparison(
        "training, cnn, batch 64, 2 ranks: rows/s against two Keras processes at once",
        0.9, Sides.trains_cnn, lambda s: s.keras(network="cnn", batch=64, processes=2),
    ),
    "bound-mlp": Comparison(
        "training, mlp, batch 1,024, 2 ranks: rows/s against two Keras processes at once",
        0.9, lambda s: s.trains(batch_size=BIG), lambda s: s.keras(batch=BIG, processes=2),
    ),
    "ranks": Comparison(
        "training, mlp, batch 128: rows/s of 2 ranks against 1",
        0.6, Sides.trains, lambda s: s.trains(num_proc=1),
    ),
    "whole-fit": Comparison(
        "a whole fit, mlp, 5 epochs: seconds of KerasEstimator.fit against ours",
        2.5, lambda s: s.peers("fit"), Sides.whole_fit, peers=True,
    ),
    "torch-mlp": Comparison(
        "a whole fit, mlp, batch 128, 5 epochs, second of a session: seconds of TorchDistributor "
        "against ours",
        1.6, lambda s: s.torch("mlp")[0], lambda s: s.shaped("mlp")[0], torch=True, warm_ups=1,
    ),
    "torch-first": Comparison(
        "the same fit, first of a session: seconds of TorchDistributor against ours",
        1.2, lambda s: s.torch("mlp")[2], lambda s: s.first_fit(EPOCHS)[1], torch=True,
    ),
    "torch-cnn-64": Comparison(
        "a whole fit, cnn, batch 64, 6,000 rows, 3 epochs, second of a session: seconds of "
        "TorchDistributor against ours",
        1.6, lambda s: s.torch("cnn-64")[0], lambda s: s.shaped("cnn-64")[0], torch=True,
    ),
    "torch-cnn-512": Comparison(
        "the same fit, batch 512: seconds of TorchDistributor against ours",
        1.3, lambda s: s.torch("cnn-512")[0], lambda s: s.shaped("cnn-512")[0], torch=True,
    ),
    "ddp-mlp": Comparison(
        "training, mlp, batch 128, 2 ranks: rows/s against DistributedDataParallel",
        2.5, lambda s: s.shaped("mlp")[1], lambda s: s.torch("mlp")[1], torch=True,
    ),
    "ddp-cnn-64": Comparison(
        "training, cnn, batch 64, 2 ranks: rows/s against DistributedDataParallel",
        1.8, lambda s: s.shaped("cnn-64")[1], lambda s: s.torch("cnn-64")[1], torch=True,
    ),
    "ddp-cnn-512": Comparison(
        "training, cnn, batch 512, 2 ranks: rows/s against DistributedDataParallel",
        1.5, lambda s: s.shaped("cnn-512")[1], lambda s: s.torch("cnn-512")[1], torch=True,
    ),
    "spark-ml": Comparison(
        "the mlp on MNIST to 0.97 on the test rows: seconds of Spark's "
        "MultilayerPerceptronClassifier against ours",
        3.0, Sides.learns_as_spark_ml, Sides.learns, warm_ups=1,
    ),
    "start-first": Comparison(
        "first fit of a session: seconds until ranks train",
        3.0, lambda s: s.first_fit()[0], lambda s: 1.0, at_most=True,
    ),
    "start": Comparison(
        "second and later fits: seconds until ranks train",
        1.0, lambda s: s.fit(epochs=1).timing.start, lambda s: 1.0, at_most=True, warm_ups=1,
    ),
    "predict": Comparison(
        "prediction of 600,000 rows: rows/s against predict_on_batch of 1,024 in memory, all cores",
        0.7,
        lambda s: s.predicts(s.data.tenfold),
        lambda s: s.keras(verb="predict", batch=BIG, threads=0),
    ),
    "transform": Comparison(
        "prediction: rows/s against KerasModel.transform",
        500.0, lambda s: s.predicts(s.data.tenfold), lambda s: s.peers("transform"), peers=True,
    ),
    "evaluate": Comparison(
        "evaluate: seconds of repeat=10 against repeat=1",
        1.3, lambda s: s.evaluates(10), lambda s: s.evaluates(1), at_most=True,
    ),
    "bytes": Comparison(
        "shards: bytes on disk for a pixel",
        1.1, lambda s: s.writes()[1], lambda s: 1.0, at_most=True,
    ),
    "write": Comparison(
        "shards: seconds against make_spark_converter on array<float>",
        0.4, lambda s: s.writes()[0], Sides.writes_as_databricks, at_most=True, warm_ups=6,
    ),
    "prepare": Comparison(
        "preparing 60,000 rows, second and later fits: seconds",
        1.2, lambda s: s.fit(epochs=1).timing.prepare, lambda s: 1.0, at_most=True, warm_ups=2,
    ),
    "micro-batch": Comparison(
        "one more epoch on 1,000 new rows: seconds of the whole call",
        3.0, Sides.continues, lambda s: 1.0, at_most=True, warm_ups=2,
    ),
    "tenfold-prepare": Comparison(
        "600,000 rows against 60,000: seconds a row to prepare",
        1.1, *_per_row("prepare"), at_most=True,
    ),
    "tenfold-train": Comparison(
        "600,000 rows against 60,000: seconds a row to train",
        1.1, *_per_row("train"), at_most=True,
    ),
    "tenfold-predict": Comparison(
        "600,000 rows against 60,000: seconds a row to predict",
        1.1,
        lambda s: 1 / s.predicts(s.data.tenfold),
        lambda s: 1 / s.predicts(),
        at_most=True,
    ),
    "memory": Comparison(
        "600,000 rows against 60,000: most memory of a rank that streams",
        1.2, lambda s: s.memory(s.data.tenfold), lambda s: s.memory(s.data.pictures), at_most=True,
    ),
}  # fmt: skip


def measured(name: str, sides: Sides, rounds: int) -> dict[str, object]:
    """Run one comparison."""
    comparison = COMPARISONS[name]
    every = rounds + comparison.warm_ups
    pairs = [(comparison.ours(sides), comparison.theirs(sides)) for _ in range(every)][-rounds:]
    ours, theirs = ([pair[side] for pair in pairs] for side in (0, 1))
    ratio = statistics.median(ours) / statistics.median(theirs)
    return {
        "name": name,
        "what": comparison.what,
        "ratio": ratio,
        "target": comparison.target,
        "at_most": comparison.at_most,
        "met": comparison.met(ratio),
        "ours": ours,
        "theirs": theirs,
    }


def main(words: list[str]) -> int:
    """Print the results; the exit code says whether all targets were met."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    # argparse looks for the default, no names at all, among the choices.
    parser.add_argument("names", nargs="*", choices=[[], *COMPARISONS], metavar="NAME")
    parser.add_argument("--json", action="store_true", help="one JSON object a comparison")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args(words)
    met = True
    with tempfile.TemporaryDirectory() as home:
        data = Data(session(), Path(home))
        if arguments.json:
            today = datetime.date.today().isoformat()
            sys.stdout.write(f"{json.dumps({'date': today, 'machine': machine(data)})}\n")
        else:
            sys.stdout.write(f"{machine(data)}\n\n{HEAD}\n")
        for name in arguments.names or COMPARISONS:
            if lacking := COMPARISONS[name].lacks():
                sys.stderr.write(f"{name} is left out: `{lacking}` builds what it needs\n")
                continue
            found = measured(name, Sides(data), arguments.rounds)
            met = met and bool(found["met"])
            sys.stdout.write(f"{json.dumps(found) if arguments.json else _line(found)}\n")
            sys.stdout.flush()
    return 0 if met else 1


HEAD = "| comparison | ratio | target | met |\n|---|---|---|---|"


def _line(found: dict[str, object]) -> str:
    sign = "<=" if found["at_most"] else ">="
    verdict = "yes" if found["met"] else "no"
    return f"| {found['what']} | {found['ratio']:.2f} | {sign} {found['target']:g} | {verdict} |"


def session(memory: str = "4g") -> SparkSession:
    """Two slots on this machine, with so much memory, without noise."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    spark = SparkSession.builder.master("local[2]").config("spark.driver.memory", memory)
    return spark.config("spark.ui.showConsoleProgress", "false").getOrCreate()


def machine(data: Data) -> str:
    """Describe the machine and the rows of the measurements."""
    memory = psutil.virtual_memory().total / 2**30
    rows = "MNIST" if data.is_mnist else "random rows of MNIST's shape"
    return (
        f"{psutil.cpu_count()} cores, {memory:.0f} GiB, {platform.platform()}, "
        f"Python {platform.python_version()}; {rows}"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
