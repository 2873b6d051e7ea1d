"""Accuracy on MNIST's 10,000 test images, with one rank and with two: a table in Markdown.

    MNIST_DIR=/path/to/idx python benchmarks/accuracy.py [NETWORK ...]

Without MNIST_DIR the files are downloaded. All 60,000 training rows train; nothing is chosen by
the test images. One step is ``batch_size`` rows a rank, and the learning rate grows with the ranks.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from typing import Any

from pyspark.sql import DataFrame, SparkSession

import spark_mnist


@dataclass(frozen=True)
class Case:
    """One network, how it is trained, and what its tutorial reports."""

    least: float
    tutorial: str
    options: dict[str, Any]
    seeds: int = 1
    """Runs whose mean is shown: a network with few units ends now here, now there."""


CASES = {
    "softmax": Case(0.920, "0.9163", {"epochs": 10}),
    "small": Case(
        0.945,
        "-",
        {"epochs": 12, "optimizer": "momentum", "lr_schedule": "cosine:12"},
        seeds=3,
    ),
    "mlp": Case(0.975, "0.90", {"epochs": 12, "lr_schedule": "cosine:12"}),
    "cnn": Case(0.992, "0.992", {"epochs": 5, "lr_schedule": "cosine:5"}),
}


def accuracy(
    train: DataFrame, test: DataFrame, store: str, network: str, ranks: int, case: Case
) -> float:
    """Train afresh with each seed and measure all test rows; the mean."""
    total = 0.0
    for seed in range(case.seeds):
        spark_mnist.fit(
            train,
            network,
            network=network,
            num_proc=ranks,
            batch_size=64,
            train_validation_ratio=1.0,
            seed=seed,
            store=store,
            **case.options,
        )
        found = spark_mnist.evaluate(test, network, rate=1, batch_size=1024, store=store)
        total += found.first()["metrics"]["accuracy"]
    return total / case.seeds


def main(names: list[str]) -> int:
    """Print the table; the exit code says whether every figure is where it should be."""
    spark = SparkSession.builder.master("local[2]").appName("accuracy").getOrCreate()
    train = spark_mnist.datasets.mnist(spark, "train").cache()
    test = spark_mnist.datasets.mnist(spark, "test").cache()
    lines = [
        "| network | epochs | runs | 1 rank | 2 ranks | at least | tutorial |",
        "|---|---|---|---|---|---|---|",
    ]
    met = True
    with tempfile.TemporaryDirectory() as store:
        for name in names or CASES:
            case = CASES[name]
            one, two = (accuracy(train, test, store, name, ranks, case) for ranks in (1, 2))
            met = met and min(one, two) >= case.least and abs(one - two) <= 0.003
            figures = f"{one:.4f} | {two:.4f} | {case.least:.3f} | {case.tutorial}"
            lines.append(f"| `{name}` | {case.options['epochs']} | {case.seeds} | {figures} |")
            sys.stderr.write(f"{lines[-1]}\n")
    sys.stdout.write("\n".join(lines) + "\n")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
