"""Where the command line writes results: files in a format of Spark's, whole or not at all.

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


def format_of(path: str, given: str | None, flag: str) -> str:
    """Return the format of a path, by its ending where none is given.

    Raises:
        errors.CommandError: The ending does not tell.
    """
    ending = path.rstrip("/").rpartition(".")[2].lower()
    if given or ending in FORMATS:
        return given or ending
    raise errors.CommandError(
        f"the format of {path!r} is not clear: add {flag} {'|'.join(FORMATS)}"
    )


def check_format(path: str, given: str | None) -> None:
    """Refuse an output whose format is not clear; see ``format_of``."""
    format_of(path, given, "--output-format")


class Writer:
    """Writes one result beside its place, then moves it there.

    Args:
        spark: The session.
        path: Where the result will be.
        given: Its format, where the path's ending does not tell.
        overwrite: Whether to replace what is there.

    Raises:
        errors.CommandError: The format is not clear, or something is there already.
        errors.DatasetError: The path cannot be written.
    """

    def __init__(
        self, spark: SparkSession, path: str, given: str | None, *, overwrite: bool
    ) -> None:
        self._format = format_of(path, given, "--output-format")
        self._shown, self._overwrite = path, overwrite
        jvm: Any = spark._jvm
        configuration = spark.sparkContext._jsc.hadoopConfiguration()
        try:
            path_class = jvm.org.apache.hadoop.fs.Path
            self._files = path_class(path).getFileSystem(configuration)
            self._path = self._files.makeQualified(path_class(path))
            self._part = path_class(
                self._path.getParent(), f".{self._path.getName()}.{uuid.uuid4().hex[:8]}"
            )
            if self._files.exists(self._path) and not overwrite:
                raise errors.CommandError(
                    f"--output {path} is there already: add --overwrite, or name another"
                )
            directory = self._path.getParent()
            while not self._files.exists(directory):
                directory = directory.getParent()
            probe = path_class(directory, self._part.getName())
            self._files.mkdirs(probe)
            self._files.delete(probe, True)
        except errors.SparkMnistError:
            raise
        except Exception as error:  # the JVM's, of a file system
            why = str(getattr(error, "java_exception", error))
            raise errors.DatasetError(f"--output {path} cannot be written: {why}") from error

    def write(self, result: DataFrame) -> None:
        """Write all rows."""
        table = as_text(result) if self._format == "csv" else result
        written = table.write.format(self._format)
        if self._format == "csv":
            written = written.option("header", True)
        if self._format == "json":
            written = written.option("ignoreNullFields", False)
        try:
            written.save(self._part.toString())
            if self._overwrite:
                self._files.delete(self._path, True)
            elif self._files.exists(self._path):
                raise errors.DatasetError(
                    f"--output {self._shown}: another has written there meanwhile; add --overwrite"
                )
            if not self._files.rename(self._part, self._path):
                raise errors.DatasetError(
                    f"--output {self._shown}: {self._part.toString()} cannot be moved there"
                )
        finally:
            self._files.delete(self._part, True)


def json_lines(result: DataFrame) -> Iterator[str]:
    """Yield each row as a JSON object, null fields included."""
    from pyspark.sql import functions as F

    columns = F.struct(*(result[f"`{name.replace('`', '``')}`"] for name in result.columns))
    row = F.to_json(columns, {"ignoreNullFields": "false"})
    for line in result.select(row.alias("json")).toLocalIterator():
        yield line["json"]


def as_text(result: DataFrame) -> DataFrame:
    """Return a result for CSV, whose arrays are the manual's text, and maps and structs JSON."""
    from pyspark.ml.functions import vector_to_array
    from pyspark.ml.linalg import VectorUDT
    from pyspark.sql import functions as F
    from pyspark.sql import types as T

    def text(field: T.StructField) -> Any:
        name = f"`{field.name}`"
        kind = field.dataType
        array = isinstance(kind, T.ArrayType)
        inner = kind.elementType if isinstance(kind, T.ArrayType) else kind
        if isinstance(inner, T.ArrayType | T.MapType | T.StructType):
            return F.to_json(name).alias(field.name)
        if array:
            return F.array_join(name, ",", "").alias(field.name)  # a null keeps its place
        if isinstance(kind, VectorUDT):
            return F.array_join(vector_to_array(F.col(name)), ",").alias(field.name)
        if isinstance(kind, T.BinaryType):  # an image's bytes, as text that reads back
            byte = f"conv(hex(substring({name}, i, 1)), 16, 10) / 255"
            numbers = F.expr(f"transform(sequence(1, length({name})), i -> {byte})")
            return F.array_join(numbers, ",").alias(field.name)
        return F.col(name)

    return result.select(*(text(field) for field in result.schema))
