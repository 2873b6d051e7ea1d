"""Outputs of the command line: files in a format of Spark's, written complete or not at all.

Runs on: driver.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from spark_mnist import errors

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

FORMATS = ("parquet", "csv", "json", "orc")


def format_of(path: str, format_name: str | None, flag: str) -> str:
    """Return the format of a path: ``format_name``, or the path's ending where that is None.

    Raises:
        errors.CommandError: The ending is not the name of a format.
    """
    ending = path.rstrip("/").rpartition(".")[2].lower()
    if format_name or ending in FORMATS:
        return format_name or ending
    raise errors.CommandError(
        f"the name {path!r} does not say its format: add {flag} {'|'.join(FORMATS)}"
    )


def check_format(path: str, format_name: str | None) -> None:
    """Refuse an output whose format is not clear; see ``format_of``."""
    format_of(path, format_name, "--output-format")


class Writer:
    """Writer of one result: writes to a temporary path in the same folder, then renames.

    Args:
        spark: The session.
        path: Path of the result.
        format_name: Format of the result, where the path's ending does not tell.
        overwrite: Whether to replace an existing path.

    Raises:
        errors.CommandError: The format is not clear, or the path exists already.
        errors.DatasetError: The path cannot be written.
    """

    def __init__(
        self, spark: SparkSession, path: str, format_name: str | None, *, overwrite: bool
    ) -> None:
        self._format = format_of(path, format_name, "--output-format")
        self._user_path, self._overwrite = path, overwrite
        jvm: Any = spark._jvm
        configuration = spark.sparkContext._jsc.hadoopConfiguration()
        try:
            path_class = jvm.org.apache.hadoop.fs.Path
            self._files = path_class(path).getFileSystem(configuration)
            self._path = self._files.makeQualified(path_class(path))
            self._temporary_path = path_class(
                self._path.getParent(), f".{self._path.getName()}.{uuid.uuid4().hex[:8]}"
            )
            if self._files.exists(self._path) and not overwrite:
                raise errors.CommandError(
                    f"--output {path} exists already: add --overwrite, or name another"
                )
            directory = self._path.getParent()
            while not self._files.exists(directory):
                directory = directory.getParent()
            probe = path_class(directory, self._temporary_path.getName())
            self._files.mkdirs(probe)
            self._files.delete(probe, True)
        except errors.SparkMnistError:
            raise
        except Exception as error:  # of any type: the JVM's, of a file system
            cause = str(getattr(error, "java_exception", error))
            raise errors.DatasetError(f"--output {path} cannot be written: {cause}") from error

    def write(self, result: DataFrame) -> None:
        """Write all rows.

        Raises:
            errors.DatasetError: Another process wrote to the path meanwhile, or the rename failed.
        """
        table = as_text(result) if self._format == "csv" else result
        writer = table.write.format(self._format)
        if self._format == "csv":
            writer = writer.option("header", True)
        if self._format == "json":
            writer = writer.option("ignoreNullFields", False)
        try:
            writer.save(self._temporary_path.toString())
            is_there = self._files.exists(self._path)
            if is_there and not self._overwrite:
                raise errors.DatasetError(
                    f"--output {self._user_path}: another process wrote there in the meantime; add "
                    "--overwrite"
                )
            former_path = self._temporary_path.suffix(".former")
            if is_there and not self._files.rename(self._path, former_path):
                raise errors.DatasetError(f"--output {self._user_path} cannot be replaced")
            if not self._files.rename(self._temporary_path, self._path):
                if is_there:
                    self._files.rename(former_path, self._path)
                raise errors.DatasetError(
                    f"--output {self._user_path}: {self._temporary_path.toString()} cannot be "
                    "moved there"
                )
            self._files.delete(former_path, True)
        finally:
            self._files.delete(self._temporary_path, True)


def _quote(name: str) -> str:
    """Return a column's name as SQL quotes it."""
    return f"`{name.replace('`', '``')}`"


def json_lines(result: DataFrame) -> Iterator[str]:
    """Yield each row as a JSON object, null fields included."""
    from pyspark.sql import functions as F

    columns = F.struct(*(result[_quote(name)] for name in result.columns))
    row = F.to_json(columns, {"ignoreNullFields": "false"})
    for line in result.select(row.alias("json")).toLocalIterator():
        yield line["json"]


def as_text(result: DataFrame) -> DataFrame:
    """Return a result for CSV: arrays as comma-separated text, maps and structs as JSON."""
    from pyspark.ml.functions import vector_to_array
    from pyspark.ml.linalg import VectorUDT
    from pyspark.sql import functions as F
    from pyspark.sql import types as T

    def text(field: T.StructField) -> Any:
        name = _quote(field.name)
        data_type = field.dataType
        is_array = isinstance(data_type, T.ArrayType)
        value_type = data_type.elementType if isinstance(data_type, T.ArrayType) else data_type
        if isinstance(value_type, T.ArrayType | T.MapType | T.StructType):
            return F.to_json(name).alias(field.name)
        if is_array:
            return F.array_join(name, ",", "").alias(field.name)  # a null keeps its place
        if isinstance(data_type, VectorUDT):
            return F.array_join(vector_to_array(F.col(name)), ",").alias(field.name)
        if isinstance(data_type, T.BinaryType):  # an image's bytes, as text that can be read again
            byte = f"conv(hex(substring({name}, i, 1)), 16, 10) / 255"
            numbers = F.expr(f"transform(sequence(1, length({name})), i -> {byte})")
            return F.array_join(numbers, ",").alias(field.name)
        return F.col(name)

    return result.select(*(text(field) for field in result.schema))
