"""Real data sets as DataFrames, and your own image files. Runs on: driver.

``digits`` and ``mnist`` are handwritten digits: ``image`` binary(784), ``label`` int. ``iris`` is a
table: four measures, ``label`` int, ``species`` string. ``digits`` and ``iris`` need no download;
``mnist`` reads a directory, or downloads the files once and checks them. ``images`` reads image
files, and ``decode`` makes pixels of those that a DataFrame has in a column.
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
from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from spark_mnist import errors
from spark_mnist.cluster import session
from spark_mnist.data import column_names, image_files

MIRROR_URL = "https://storage.googleapis.com/cvdf-datasets/mnist/"
"""URL from which MNIST is downloaded where ``MNIST_MIRROR`` is not set."""
FILES = {
    "train-images-idx3-ubyte": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels-idx1-ubyte": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3-ubyte": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1-ubyte": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
}
"""SHA-256 of each original file as compressed, by its name without ``.gz``."""
FILE_PREFIXES = {"train": "train", "test": "t10k"}
"""Prefix of the names of a split's files."""
TEST_ROW_INTERVAL = 5
"""Rows of a class of which one is in the test split, in ``digits`` and ``iris``."""
MEASURES = ("sepal_length", "sepal_width", "petal_length", "petal_width")
"""Features of ``iris``, in centimetres."""
FOLDER_PATTERN = "^(?:[^/:]+:)?+(?://[^/]*)?+/(?:.*/)?([^/]+)/[^/]+$"
"""Java's pattern of a file's URL, with its folder as the group; the host is no folder."""

ByteArray = npt.NDArray[np.uint8]


def digits(spark: SparkSession, split: str) -> DataFrame:
    """Load scikit-learn's 1,797 handwritten digits of 8x8 pixels, in the form of MNIST's.

    Each digit is scaled to 20x20 and centred in 28x28, as MNIST's own digits are. Every fifth of
    the digits of each class is in the test split.

    Args:
        spark: Session that makes the DataFrame.
        split: ``train`` (1,433 rows) or ``test`` (364 rows).

    Raises:
        errors.DatasetError: There is no such split, or scikit-learn is not installed.
        errors.ClusterError: The session was stopped.
    """
    session.check_session(spark)
    _check_split(split)
    source = _load_scikit_learn("load_digits")
    from scipy import ndimage  # scikit-learn brings it

    labels = source.target.astype(np.uint8)
    in_split = _test_rows(labels) == (split == "test")
    digit_images = ndimage.zoom(
        source.images[in_split], (1, 2.5, 2.5), order=1, grid_mode=True, mode="nearest"
    )
    frames = np.pad(digit_images, ((0, 0), (4, 4), (4, 4)))
    return _image_frame(spark, np.rint(frames / 16 * 255).astype(np.uint8), labels[in_split])


def iris(spark: SparkSession, split: str | None = None) -> DataFrame:
    """Load Fisher's iris flowers: 150 rows, 50 of each species.

    Args:
        spark: Session that makes the DataFrame.
        split: ``train`` (120 rows), ``test`` (every fifth of each species: 30 rows), or None for
            all.

    Returns:
        Columns ``sepal_length``, ``sepal_width``, ``petal_length``, ``petal_width`` in cm,
        ``label`` (0, 1, 2) and ``species`` (setosa, versicolor, virginica).

    Raises:
        errors.DatasetError: There is no such split, or scikit-learn is not installed.
        errors.ClusterError: The session was stopped.
    """
    session.check_session(spark)
    if split is not None:
        _check_split(split)
    source = _load_scikit_learn("load_iris")
    in_split = np.ones(len(source.target), bool)
    if split is not None:
        in_split = _test_rows(source.target) == (split == "test")
    rows = [
        (*map(float, measures), int(label), str(source.target_names[label]))
        for measures, label in zip(source.data[in_split], source.target[in_split], strict=True)
    ]
    columns = ", ".join(f"{name} double" for name in MEASURES)
    return spark.createDataFrame(rows, f"{columns}, label int, species string")


def mnist(spark: SparkSession, split: str, path: str | os.PathLike[str] | None = None) -> DataFrame:
    """Load MNIST: 60,000 rows in ``train``, 10,000 in ``test``.

    Args:
        spark: Session that makes the DataFrame.
        split: ``train`` or ``test``.
        path: A directory with the IDX files, compressed or not, or with Keras' ``mnist.npz``;
            else the environment variable ``MNIST_DIR``; else the files are downloaded once.

    Raises:
        errors.DatasetError: There is no such split, or the files are missing or not MNIST's.
        errors.ClusterError: The session was stopped.
    """
    session.check_session(spark)
    _check_split(split)
    directory = path or os.environ.get("MNIST_DIR")
    images, labels = _read_directory(Path(directory), split) if directory else _download(split)
    if len(images) != len(labels) or images.shape[1:] != (28, 28):
        raise errors.DatasetError(
            f"{split} has images of shape {images.shape} and labels of shape {labels.shape}"
        )
    return _image_frame(spark, images, labels)


def images(
    spark: SparkSession,
    path: str | os.PathLike[str],
    size: tuple[int, int] = (28, 28),
    mode: str = "L",
) -> DataFrame:
    """Read image files, each labelled with the name of its folder.

    The files are decoded by Pillow in the executors, each time that Spark reads the DataFrame. A
    picture is turned upright as its EXIF orientation says, converted to ``mode``, in which
    transparency is dropped but in RGBA, and stretched to ``size`` by Pillow's bilinear filter.

    Args:
        spark: Session that makes the DataFrame.
        path: A folder, whose files are read at any depth, or a glob such as ``pictures/*/*.png``,
            on any file system that Spark reads.
        size: Height and width of all pictures, in pixels.
        mode: ``L`` (grey, a byte a pixel), ``RGB`` (3 bytes) or ``RGBA`` (4 bytes).

    Returns:
        Columns ``path`` (string), ``image`` (binary: height x width x channels bytes, row by row)
        and ``label`` (string). ``image`` is null for a file that is no picture, or is damaged, or
        has more pixels than Pillow's limit. ``label`` is null for a file in no folder.

    Raises:
        errors.OptionError: ``size`` or ``mode`` has a value that is not allowed.
        errors.DatasetError: Nothing matches the path, or Spark cannot read there.
        errors.VersionError: Pillow is not installed.
        errors.ClusterError: The session was stopped.
    """
    session.check_session(spark)
    target = image_files.pixel_format(size, mode)
    image_files.check_pillow()
    reader = spark.read.format("binaryFile").option("recursiveFileLookup", True)
    try:
        files = reader.load(os.fspath(path))
    except (PySparkException, Py4JJavaError) as error:
        reason = next(filter(str.strip, str(error).splitlines()), type(error).__name__)
        raise errors.DatasetError(f"{path} cannot be read: {reason}") from error
    folder = F.regexp_extract("path", FOLDER_PATTERN, 1)
    return files.select(
        "path",
        image_files.pixels(files, "content", target).alias("image"),
        F.when(folder != "", folder).alias("label"),
    )


def decode(
    df: DataFrame, column: str, size: tuple[int, int] = (28, 28), mode: str = "L"
) -> DataFrame:
    """Replace the image files in a column by their pixels, lazily.

    The files are decoded as those of ``images``.

    Args:
        df: A DataFrame, or that of a stream.
        column: A column of image files, PNG or JPEG for instance, as binary; or of the structs that
            ``spark.read.format("image")`` makes.
        size: Height and width of all pictures, in pixels.
        mode: ``L`` (grey, a byte a pixel), ``RGB`` (3 bytes) or ``RGBA`` (4 bytes).

    Returns:
        The DataFrame with the column as binary: height x width x channels bytes, row by row; null
        where the column is null or cannot be decoded.

    Raises:
        errors.NotADataFrame: ``df`` is something else.
        errors.OptionError: ``size`` or ``mode`` has a value that is not allowed.
        errors.MissingColumn: There is no such column.
        errors.UnreadableColumn: The column has another type.
        errors.VersionError: Pillow is not installed.
    """
    session.check_input(df, streams=True)
    target = image_files.pixel_format(size, mode)
    image_files.check_pillow()
    pixels = image_files.pixels(df, column, target)
    return df.withColumn(column_names.resolve(df, column), pixels)


def _check_split(split: str) -> None:
    if split not in FILE_PREFIXES:
        raise errors.DatasetError(f"no split {split!r}; there is train and test")


def _load_scikit_learn(name: str) -> Any:
    """Load one of the data sets that come with scikit-learn."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise errors.DatasetError(
            "digits and iris come with scikit-learn; install spark-mnist[datasets]"
        ) from error
    return getattr(datasets, name)()


def _test_rows(labels: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Return for each row whether it is in the test split."""
    position = np.zeros(len(labels), int)
    for label in np.unique(labels):
        position[labels == label] = np.arange((labels == label).sum())
    in_test: npt.NDArray[np.bool_] = position % TEST_ROW_INTERVAL == 0
    return in_test


def _image_frame(spark: SparkSession, images: ByteArray, labels: ByteArray) -> DataFrame:
    rows = [(image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True)]
    slices = max(1, min(len(rows), spark.sparkContext.defaultParallelism))
    rdd = spark.sparkContext.parallelize(rows, slices)
    return spark.createDataFrame(rdd, "image binary, label int", verifySchema=False)


def _read_directory(directory: Path, split: str) -> tuple[ByteArray, ByteArray]:
    archive = directory / "mnist.npz"
    if archive.exists():
        try:
            with np.load(archive, allow_pickle=False) as arrays:
                return arrays[f"x_{split}"], arrays[f"y_{split}"]
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise errors.DatasetError(f"{archive} is not Keras' mnist.npz: {error}") from error
    images, labels = (name for name in FILES if name.startswith(FILE_PREFIXES[split]))
    return _read_idx(_find_file(directory, images)), _read_idx(_find_file(directory, labels))


def _find_file(directory: Path, name: str) -> Path:
    for candidate in (directory / f"{name}.gz", directory / name):
        if candidate.exists():
            return candidate
    raise errors.DatasetError(f"{directory} has neither {name}.gz, unpacked or not, nor mnist.npz")


def _read_idx(path: Path) -> ByteArray:
    """Read an IDX file of bytes: magic number, one big-endian int32 a dimension, the bytes."""
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise errors.DatasetError(f"{path} cannot be read: {error}") from error
    dimensions = content[3] if content[:3] == b"\0\0\x08" else 0
    header = 4 + 4 * dimensions
    is_complete = dimensions and len(content) >= header
    shape = tuple(np.frombuffer(content[4:header], ">i4")) if is_complete else ()
    if not shape or len(content) - header != math.prod(shape):
        raise errors.DatasetError(f"{path} is not an IDX file of bytes, or it is cut off")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _download(split: str) -> tuple[ByteArray, ByteArray]:
    try:
        import pooch
    except ImportError as error:
        raise errors.DatasetError(
            "mnist is downloaded with pooch; install spark-mnist[datasets], or name a directory"
        ) from error
    mirror_url = os.environ.get("MNIST_MIRROR", MIRROR_URL)
    registry = {f"{name}.gz": f"sha256:{digest}" for name, digest in FILES.items()}
    fetcher = pooch.create(
        pooch.os_cache("spark_mnist"), mirror_url, registry=registry, retry_if_failed=2
    )
    names = [name for name in registry if name.startswith(FILE_PREFIXES[split])]
    try:
        images, labels = (_read_idx(Path(fetcher.fetch(name, progressbar=True))) for name in names)
    except (OSError, ValueError) as error:
        raise errors.DatasetError(
            f"MNIST could not be downloaded from {mirror_url} ({error}); "
            "set MNIST_DIR to a directory that has its files"
        ) from error
    return images, labels
