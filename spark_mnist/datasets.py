"""Real data sets as DataFrames. On the driver.

``digits`` and ``mnist`` are handwritten digits: ``image`` binary(784), ``label`` int. ``iris`` is a
table: four measures, ``label`` int, ``species`` string. ``digits`` and ``iris`` need no download;
``mnist`` reads a directory, or downloads once and checks what came.
"""

from __future__ import annotations

import gzip
import math
import os
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pyspark.sql import DataFrame, SparkSession

from spark_mnist import errors
from spark_mnist.cluster import session

MIRROR = "https://storage.googleapis.com/cvdf-datasets/mnist/"
FILES = {
    "train-images-idx3-ubyte": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels-idx1-ubyte": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3-ubyte": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1-ubyte": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
}
"""The original files, by name without ``.gz``, with the sha256 of the compressed file."""
PREFIX = {"train": "train", "test": "t10k"}
HELD_OUT = 5
"""One row of a class in so many is in the test split of ``digits`` and ``iris``."""
MEASURES = ("sepal_length", "sepal_width", "petal_length", "petal_width")
"""The features of ``iris``, in centimetres."""

Bytes = npt.NDArray[np.uint8]


def digits(spark: SparkSession, split: str) -> DataFrame:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels, brought into MNIST's frame.

    Each is scaled to 20x20 and centred in 28x28, as MNIST's own digits are. Every fifth of the
    digits of each class is in the test split.

    Args:
        spark: Makes the DataFrame.
        split: ``train`` (1,433 rows) or ``test`` (364 rows).

    Raises:
        errors.DatasetError: There is no such split, or scikit-learn is not installed.
    """
    session.check_session(spark)
    _check_split(split)
    source = _scikit_learn("load_digits")
    from scipy import ndimage  # scikit-learn brings it

    labels = source.target.astype(np.uint8)
    chosen = _held_out(labels) == (split == "test")
    scaled = ndimage.zoom(
        source.images[chosen], (1, 2.5, 2.5), order=1, grid_mode=True, mode="nearest"
    )
    frames = np.pad(scaled, ((0, 0), (4, 4), (4, 4)))
    return _frame(spark, np.rint(frames / 16 * 255).astype(np.uint8), labels[chosen])


def iris(spark: SparkSession, split: str | None = None) -> DataFrame:
    """Fisher's iris flowers: 150 rows, 50 of each species.

    Args:
        spark: Makes the DataFrame.
        split: ``train`` (120 rows), ``test`` (every fifth of each species: 30 rows), or None for
            all.

    Returns:
        Columns ``sepal_length``, ``sepal_width``, ``petal_length``, ``petal_width`` in cm,
        ``label`` (0, 1, 2) and ``species`` (setosa, versicolor, virginica).

    Raises:
        errors.DatasetError: There is no such split, or scikit-learn is not installed.
    """
    session.check_session(spark)
    if split is not None:
        _check_split(split)
    source = _scikit_learn("load_iris")
    chosen = np.ones(len(source.target), bool)
    if split is not None:
        chosen = _held_out(source.target) == (split == "test")
    rows = [
        (*map(float, measures), int(label), str(source.target_names[label]))
        for measures, label in zip(source.data[chosen], source.target[chosen], strict=True)
    ]
    columns = ", ".join(f"{name} double" for name in MEASURES)
    return spark.createDataFrame(rows, f"{columns}, label int, species string")


def mnist(spark: SparkSession, split: str, path: str | os.PathLike[str] | None = None) -> DataFrame:
    """MNIST: 60,000 rows in ``train``, 10,000 in ``test``.

    Args:
        spark: Makes the DataFrame.
        split: ``train`` or ``test``.
        path: A directory with the IDX files, compressed or not, or with Keras' ``mnist.npz``;
            else the environment variable ``MNIST_DIR``; else the files are downloaded once.

    Raises:
        errors.DatasetError: There is no such split, or the files are missing or not MNIST's.
    """
    session.check_session(spark)
    _check_split(split)
    directory = path or os.environ.get("MNIST_DIR")
    images, labels = _read(Path(directory), split) if directory else _download(split)
    if len(images) != len(labels) or images.shape[1:] != (28, 28):
        raise errors.DatasetError(
            f"{split} has images of shape {images.shape} and labels of shape {labels.shape}"
        )
    return _frame(spark, images, labels)


def _check_split(split: str) -> None:
    if split not in PREFIX:
        raise errors.DatasetError(f"no split {split!r}; there is train and test")


def _scikit_learn(name: str) -> Any:
    """One of the data sets that come with scikit-learn."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise errors.DatasetError(
            "digits and iris come with scikit-learn; install spark-mnist[datasets]"
        ) from error
    return getattr(datasets, name)()


def _held_out(labels: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Which rows are in the test split."""
    nth = np.zeros(len(labels), int)
    for label in np.unique(labels):
        nth[labels == label] = np.arange((labels == label).sum())
    held_out: npt.NDArray[np.bool_] = nth % HELD_OUT == 0
    return held_out


def _frame(spark: SparkSession, images: Bytes, labels: Bytes) -> DataFrame:
    rows = [(image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True)]
    slices = max(1, min(len(rows), spark.sparkContext.defaultParallelism))
    parallel = spark.sparkContext.parallelize(rows, slices)
    return spark.createDataFrame(parallel, "image binary, label int", verifySchema=False)


def _read(directory: Path, split: str) -> tuple[Bytes, Bytes]:
    archive = directory / "mnist.npz"
    if archive.exists():
        try:
            with np.load(archive, allow_pickle=False) as arrays:
                return arrays[f"x_{split}"], arrays[f"y_{split}"]
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise errors.DatasetError(f"{archive} is not Keras' mnist.npz: {error}") from error
    images, labels = (name for name in FILES if name.startswith(PREFIX[split]))
    return _idx(_existing(directory, images)), _idx(_existing(directory, labels))


def _existing(directory: Path, name: str) -> Path:
    for candidate in (directory / f"{name}.gz", directory / name):
        if candidate.exists():
            return candidate
    raise errors.DatasetError(f"{directory} has neither {name}.gz, unpacked or not, nor mnist.npz")


def _idx(path: Path) -> Bytes:
    """Read an IDX file of bytes: magic number, one big-endian int32 a dimension, the bytes."""
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise errors.DatasetError(f"{path} cannot be read: {error}") from error
    dimensions = content[3] if content[:3] == b"\0\0\x08" else 0
    header = 4 + 4 * dimensions
    whole = dimensions and len(content) >= header
    shape = tuple(np.frombuffer(content[4:header], ">i4")) if whole else ()
    if not shape or len(content) - header != math.prod(shape):
        raise errors.DatasetError(f"{path} is not an IDX file of bytes, or it is cut off")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _download(split: str) -> tuple[Bytes, Bytes]:
    try:
        import pooch
    except ImportError as error:
        raise errors.DatasetError(
            "mnist is downloaded with pooch; install spark-mnist[datasets], or name a directory"
        ) from error
    base = os.environ.get("MNIST_MIRROR", MIRROR)
    registry = {f"{name}.gz": f"sha256:{digest}" for name, digest in FILES.items()}
    store = pooch.create(pooch.os_cache("spark_mnist"), base, registry=registry, retry_if_failed=2)
    names = [name for name in registry if name.startswith(PREFIX[split])]
    try:
        images, labels = (_idx(Path(store.fetch(name, progressbar=True))) for name in names)
    except (OSError, ValueError) as error:
        raise errors.DatasetError(
            f"MNIST could not be downloaded from {base} ({error}); "
            "set MNIST_DIR to a directory that has its files"
        ) from error
    return images, labels
