"""MNIST, or as many random rows where it is not there, in the forms that the comparisons read."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

import spark_mnist

ROWS = 60_000


def as_floats(rows: DataFrame) -> DataFrame:
    """Return ``image`` as array<float> in 0..1, and ``label``."""
    # By way of hexadecimal, since the JVM's bytes are signed.
    pixels = F.expr(
        "transform(sequence(1, length(image)), "
        "i -> cast(conv(hex(substring(image, i, 1)), 16, 10) AS float) / 255.0F)"
    ).cast("array<float>")
    return rows.select(pixels.alias("image"), "label")


@dataclass(frozen=True)
class Data:
    """The same rows in files: for us, for those who want numbers, and for Keras alone."""

    spark: SparkSession
    home: Path

    @cached_property
    def is_mnist(self) -> bool:
        """Whether the rows are MNIST's."""
        return "MNIST_DIR" in os.environ

    @cached_property
    def pictures(self) -> DataFrame:
        """``image`` binary, ``label`` int."""
        path = str(self.home / "pictures")
        self._rows().write.parquet(path)
        return self.spark.read.parquet(path)

    @cached_property
    def test(self) -> DataFrame:
        """Rows that no side trains on."""
        path = str(self.home / "test")
        rows = spark_mnist.datasets.mnist(self.spark, "test") if self.is_mnist else self.pictures
        rows.write.parquet(path)
        return self.spark.read.parquet(path)

    @cached_property
    def tenfold(self) -> DataFrame:
        """Ten times the same rows."""
        _ = self.pictures
        return self.spark.read.parquet(*[str(self.home / "pictures")] * 10)

    @cached_property
    def floats(self) -> DataFrame:
        """``image`` array<float> in 0..1, ``label`` int."""
        path = str(self.home / "floats")
        as_floats(self.pictures).write.parquet(path)
        return self.spark.read.parquet(path)

    @cached_property
    def arrays(self) -> Path:
        """A file with ``images`` [N, 784] uint8 and ``labels`` [N] int32."""
        rows = self.pictures.collect()
        images = np.frombuffer(b"".join(bytes(row.image) for row in rows), np.uint8)
        labels = np.asarray([row.label for row in rows], np.int32)
        path = self.home / "arrays.npz"
        np.savez(path, images=images.reshape(len(rows), -1), labels=labels)
        return path

    def _rows(self) -> DataFrame:
        if self.is_mnist:
            return spark_mnist.datasets.mnist(self.spark, "train")
        random = np.random.default_rng(0)
        images = random.integers(0, 256, (ROWS, 784), np.uint8)
        labels = random.integers(0, 10, ROWS)
        rows = [(row.tobytes(), int(label)) for row, label in zip(images, labels, strict=True)]
        return self.spark.createDataFrame(rows, "image binary, label int")
