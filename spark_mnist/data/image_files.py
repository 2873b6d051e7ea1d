"""Image files: decode them with Pillow, in the executors, into the pixels that networks take.

Pillow is imported by the first batch that a worker decodes. Shape letters: H = height, W = width,
C = channels. Runs on: driver, Spark task.
"""

from __future__ import annotations

import importlib.util
import io
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql import types as T

from spark_mnist import errors
from spark_mnist.core import requirements
from spark_mnist.data import arrow_batches, column_names, feature_columns

if TYPE_CHECKING:
    from PIL.Image import Image

CHANNELS = {"L": 1, "RGB": 3, "RGBA": 4}
"""Bytes of a pixel by mode; the modes have Pillow's names."""
STRUCT_MODES = {0: "L", 16: "RGB", 24: "RGBA"}
"""Modes by the type that OpenCV gives to pixels, and Spark to the ``mode`` of an image struct."""
FILE_BYTES = 1 << 20
"""Bytes that a file is taken to have where Spark sends files to Python by their number alone."""
BYTE_LIMIT_RELEASE = (4, 1)
"""First release of Spark that limits the bytes of the rows that it sends to Python at once."""


@dataclass(frozen=True)
class PixelFormat:
    """Size and mode of pictures, which become ``[H, W, C]`` bytes, row by row."""

    height: int
    width: int
    mode: str

    @property
    def num_bytes(self) -> int:
        """Bytes of a picture."""
        return self.height * self.width * CHANNELS[self.mode]


def pixel_format(size: Any, mode: Any) -> PixelFormat:
    """Check size and mode of pictures.

    Args:
        size: Height and width.
        mode: A key of ``CHANNELS``.

    Raises:
        errors.OptionError: A value is not allowed.
    """
    if not isinstance(mode, str) or mode not in CHANNELS:
        raise errors.OptionError(f"mode must be one of {', '.join(CHANNELS)}, not {mode!r}")
    is_pair = isinstance(size, tuple | list) and len(size) == 2
    if not is_pair or not all(_is_positive_integer(length) for length in size):
        raise errors.OptionError(
            f"size must be height and width as positive integers, (28, 28), not {size!r}"
        )
    target = PixelFormat(int(size[0]), int(size[1]), mode)
    if target.num_bytes > feature_columns.ARROW_BATCH_BYTES:
        raise errors.OptionError(
            f"size {size!r} is {target.num_bytes:,} bytes a picture in mode {mode}; at most "
            f"{feature_columns.ARROW_BATCH_BYTES:,} are allowed"
        )
    return target


def _is_positive_integer(number: Any) -> bool:
    is_integer = isinstance(number, int | np.integer) and not isinstance(number, bool)
    return is_integer and bool(number > 0)


def check_pillow() -> None:
    """Check that Pillow is installed, without importing it.

    Raises:
        errors.VersionError: Pillow is missing or outside its range.
    """
    requirements.check_extra("images")
    if importlib.util.find_spec("PIL") is None:  # also where the library is shipped as plain files
        raise errors.VersionError(
            "pictures are decoded with Pillow, which is missing; install spark-mnist[images]"
        )


def pixels(df: DataFrame, name: str, target: PixelFormat) -> Column:
    """Return the pixels of a column of image files, or of Spark's image structs, as binary.

    A row is null where the column is null or cannot be decoded. Nothing is decoded before the rows
    are read.

    Raises:
        errors.MissingColumn: No column has that name.
        errors.UnreadableColumn: The column has another type, or several columns have that name.
    """
    content, data_type = column_names.column(df, name)
    if isinstance(data_type, T.BinaryType):
        _limit_batches(df.sparkSession, target)

        def decode_files(batches: Iterator[tuple[pa.Array, ...]]) -> Iterator[pa.Array]:
            for (files,) in batches:
                yield pa.array([decode_file(file.as_py(), target) for file in files], pa.binary())

        return arrow_batches.by_batch(decode_files, "binary")(content)
    if feature_columns.is_image_struct(data_type):
        _limit_batches(df.sparkSession, target)

        def decode_structs(batches: Iterator[tuple[pa.Array, ...]]) -> Iterator[pa.Array]:
            for columns in batches:
                heights, widths, modes, contents = (column.to_pylist() for column in columns)
                rows = zip(heights, widths, modes, contents, strict=True)
                yield pa.array([decode_struct(*row, target) for row in rows], pa.binary())

        sizes = (
            F.coalesce(content.getField(field), F.lit(-1)) for field in ("height", "width", "mode")
        )
        decode = arrow_batches.by_batch(decode_structs, "binary")
        return decode(*sizes, content.getField("data"))
    raise errors.UnreadableColumn(
        f"column {name!r} is {data_type.simpleString()}; it may be binary, with the content of "
        'image files, or the struct of spark.read.format("image")'
    )


def _limit_batches(spark: SparkSession, target: PixelFormat) -> None:
    """Lower the session's rows of a batch where files or pictures are too much for executors."""
    row_bytes = target.num_bytes
    if not _limits_bytes(spark.version):
        row_bytes = max(row_bytes, FILE_BYTES)
    feature_columns.limit_batches(spark, feature_columns.rows_at_once(spark, row_bytes))


def _limits_bytes(version: str) -> bool:
    """Return whether a release of Spark limits the bytes that it sends to Python at once."""
    return tuple(map(int, re.findall(r"\d+", version)[:2])) >= BYTE_LIMIT_RELEASE


def decode_file(content: bytes | None, target: PixelFormat) -> bytes | None:
    """Return the pixels of an image file, turned upright as its EXIF orientation says.

    Of a file with several pictures it is the first.

    Returns:
        The pixels; None where there is no file, or Pillow cannot decode it, or holds it for a
        decompression bomb.

    Raises:
        errors.VersionError: Pillow cannot be imported.
    """
    pil_image, image_ops = _import_pillow()
    if content is None:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", pil_image.DecompressionBombWarning)
            with pil_image.open(io.BytesIO(content)) as image:
                upright = image_ops.exif_transpose(image)
                return _fit(_as_bytes(upright, image.format), target)
    except MemoryError:  # says nothing about the file
        raise
    except Exception:  # Pillow's decoders raise exceptions of many classes
        return None


def decode_struct(
    height: int, width: int, mode: int, content: bytes | None, target: PixelFormat
) -> bytes | None:
    """Return the pixels of an image struct, whose channels are in the order blue, green, red.

    Args:
        height: Rows of pixels.
        width: Pixels of a row.
        mode: OpenCV's type of a pixel.
        content: The pixels of the struct, ``[H, W, C]`` bytes.
        target: Size and mode of the result.

    Returns:
        The pixels; None where the struct is null, or that of a file that Spark could not decode, or
        where its numbers are not bytes.

    Raises:
        errors.VersionError: Pillow cannot be imported.
    """
    pil_image, _ = _import_pillow()
    source_mode = STRUCT_MODES.get(mode)
    if source_mode is None or content is None or height <= 0 or width <= 0:
        return None
    channels = CHANNELS[source_mode]
    if len(content) != height * width * channels:
        return None
    array: npt.NDArray[np.uint8] = np.frombuffer(content, np.uint8).reshape(height, width, channels)
    in_order = array[..., [2, 1, 0, 3][:channels]] if channels > 1 else array[..., 0]
    return _fit(pil_image.fromarray(np.ascontiguousarray(in_order)), target)


def _import_pillow() -> tuple[Any, Any]:
    """Return Pillow's modules ``Image`` and ``ImageOps``."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise errors.VersionError(
            "the Python of Spark's workers cannot import Pillow, which decodes pictures "
            f"({error}): install spark-mnist[images] there, or let PYSPARK_PYTHON name a Python "
            "that has it before the session is made"
        ) from error
    return Image, ImageOps


def _as_bytes(image: Image, file_format: str | None) -> Image:
    """Return a picture of 16 bits a pixel as one of 8 bits, and any other as it is.

    Args:
        image: A picture in any of Pillow's modes.
        file_format: Pillow's name of the kind of its file: old releases give PNG's 16 bits as 32.

    Raises:
        ValueError: The pixels have no range, being floats or 32 bits.
    """
    pil_image, _ = _import_pillow()
    if image.mode.startswith("I;16") or (image.mode == "I" and file_format == "PNG"):
        array = np.asarray(image).astype(np.int64) >> 8  # Pillow itself would cut off above 255
        result: Image = pil_image.fromarray(array.astype(np.uint8))
        return result
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no range")
    return image


def _fit(image: Image, target: PixelFormat) -> bytes:
    """Return the pixels of a picture after conversion to the target's mode and size."""
    pil_image, _ = _import_pillow()
    converted = image if image.mode == target.mode else image.convert(target.mode)
    if converted.size != (target.width, target.height):
        converted = converted.resize((target.width, target.height), pil_image.Resampling.BILINEAR)
    return converted.tobytes()
