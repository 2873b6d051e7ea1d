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


CASES = {
    "softmax": Case(0.920, "0.9163", {"epochs": 10, "batch_size": 64}),
    "small": Case(0.945, "-", {"epochs": 10, "batch_size": 64}),
    "mlp": Case(0.975, "0.90", {"epochs": 12, "batch_size": 64}),
    "cnn": Case(0.992, "0.992", {"epochs": 5, "batch_size": 64, "lr_schedule": "cosine:5"}),
}


def accuracy(
    train: DataFrame, test: DataFrame, store: str, network: str, ranks: int, case: Case
) -> float:
    """Train afresh and measure all test rows."""
    name = f"{network}-{ranks}"
    spark_mnist.fit(
        train,
        name,
        network=network,
        num_proc=ranks,
        train_validation_ratio=1.0,
        store=store,
        **case.options,
    )
    (row,) = spark_mnist.evaluate(test, name, rate=1, batch_size=1024, store=store).collect()
    return float(row["metrics"]["accuracy"])


def main(names: list[str]) -> int:
    """Print the table; the exit code says whether every figure is where it should be."""
    spark = SparkSession.builder.master("local[2]").appName("accuracy").getOrCreate()
    train = spark_mnist.datasets.mnist(spark, "train").cache()
    test = spark_mnist.datasets.mnist(spark, "test").cache()
    lines = [
        "| network | epochs | 1 rank | 2 ranks | at least | tutorial |",
        "|---|---|---|---|---|---|",
    ]
    met = True
    with tempfile.TemporaryDirectory() as store:
        for name in names or CASES:
            case = CASES[name]
            one, two = (accuracy(train, test, store, name, ranks, case) for ranks in (1, 2))
            met = met and min(one, two) >= case.least and abs(one - two) <= 0.003
            figures = f"{one:.4f} | {two:.4f} | {case.least:.3f} | {case.tutorial}"
            lines.append(f"| `{name}` | {case.options['epochs']} | {figures} |")
            sys.stderr.write(f"{lines[-1]}\n")
    sys.stdout.write("\n".join(lines) + "\n")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
