"""The command line.

    mymnist fit|predict|eval MODEL key=value ... --input DATA
    mymnist models|describe|delete|rollback [MODEL] [key=value ...]
    mymnist doctor [MODEL] [key=value ...] [--input DATA]

Results go to stdout and nothing else does; logs and progress go to stderr. Exit codes: 0 done, 1
failed, 2 not understood, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from spark_mnist import errors, grammar, interrupts, options, versions
from spark_mnist._version import __version__

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

DATASETS = ("digits", "iris", "mnist")
SHOWN_ROWS = 20
"""Rows of a prediction that are shown on stdout."""
FORMATS = ("parquet", "csv", "json", "orc")
EXAMPLES = """\
examples:
  mymnist fit test_model batch_size=128 epochs=5 --input digits:train
  mymnist predict test_model batch_size=128 interpret=true --input digits:test --output out.parquet
  mymnist eval test_model repeat=2 batch_size=128 rate=0.8 --input digits:test
  mymnist fit flowers features=petal_length,petal_width label=species --input iris:train
  mymnist rollback test_model version=1
  mymnist doctor num_proc=2 --input digits:train
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = _parser()
    arguments = parser.parse_intermixed_args(argv)
    logging.basicConfig(stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    level = "DEBUG" if arguments.verbose else "WARNING" if arguments.quiet else "INFO"
    logging.getLogger("spark_mnist").setLevel(level)
    versions.ignore_new_pandas()
    try:
        command = grammar.parse_words([*arguments.words, *_settings(arguments)])
        with interrupts.unwound(), _only_results_on_stdout() as stdout:
            return _run(command, arguments, stdout)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:
        return 1
    except Exception as error:
        if arguments.debug:
            raise
        usage = isinstance(error, errors.CommandError)
        return _fail(_message(error), 2 if usage else 1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mymnist",
        usage="mymnist fit|predict|eval MODEL [key=value ...] --input DATA [--output PATH]\n"
        "       mymnist models|describe|delete|rollback [MODEL] [key=value ...]\n"
        "       mymnist doctor [MODEL] [key=value ...] [--input DATA]",
        description="Train a Keras model on rows of a Spark DataFrame, apply it, or measure it.",
        epilog=f"key=value:\n{_table()}\n\n{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("words", nargs="*", metavar="WORD", help="operation, model name, then key=value")
    add("--input", metavar="DATA", help="digits|iris|mnist:train|test, or a path for Spark")
    add("--format", choices=FORMATS, help="of the input, where its ending does not tell")
    add("--output", metavar="PATH", help="write the result there instead of showing it")
    add("--output-format", choices=FORMATS, help="of the output, where its ending does not tell")
    add("--overwrite", action="store_true", help="replace an output that is there")
    add("--json", action="store_true", help="one JSON object a line on stdout")
    add("--store", metavar="URL", help="the same as store=URL")
    add("--num-proc", metavar="N", help="the same as num_proc=N")
    add("--master", help="Spark master, outside spark-submit only")
    volume = parser.add_mutually_exclusive_group()
    volume.add_argument("--verbose", action="store_true", help="log what the ranks say")
    volume.add_argument("--quiet", action="store_true", help="the same as verbose=0")
    add("--debug", action="store_true", help="show the traceback of an error")
    add("--version", action="version", version=f"mymnist {__version__}")
    return parser


def _table() -> str:
    """The options of all operations as lines of ``--help``."""
    lines = []
    for name, field in options.FIELDS.items():
        users = options.users(name)
        default = field.metadata["shown"] or field.default
        for_all = "" if len(users) == len(options.OPERATIONS) else f" ({', '.join(users)})"
        words = (
            f"{field.metadata['doc']}{for_all}; {field.metadata['kind'].words}; default {default}"
        )
        lines += textwrap.wrap(words, 96, initial_indent=f"  {name:24}", subsequent_indent=" " * 26)
    return "\n".join(lines)


def _settings(arguments: argparse.Namespace) -> list[str]:
    """The flags that are another way to write an option."""
    shows_progress = arguments.words[:1] in [[name] for name in options.users("verbose")]
    flags = {
        "store": arguments.store,
        "num_proc": arguments.num_proc,
        "verbose": "0" if arguments.quiet and shows_progress else None,
    }
    return [f"{name}={value}" for name, value in flags.items() if value is not None]


@contextlib.contextmanager
def _only_results_on_stdout() -> Iterator[TextIO]:
    """Yield stdout, and send to stderr what anyone else, the JVM included, prints on it."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with os.fdopen(os.dup(kept), "w", encoding="utf-8") as stdout:
            yield stdout
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def _run(command: grammar.Command, arguments: argparse.Namespace, stdout: TextIO) -> int:
    """Carry out the command; returns the exit code."""
    with_rows = command.operation not in grammar.WITHOUT_ROWS
    doctor = command.operation == "doctor"
    if doctor and not arguments.input:
        with_rows = False
    if with_rows and not arguments.input:
        raise errors.CommandError("--input is missing: name digits:train, mnist:train or a path")
    reader = _reader(arguments.input, arguments.format) if with_rows else None
    write = _writer(arguments) if arguments.output else None

    from spark_mnist import verbs

    spark = _session(arguments)
    with interrupts.unwound():  # once more: with its session Spark has put its own handler
        rows = reader(spark) if reader else None
        if rows is not None and command.operation == "predict" and not (write or arguments.json):
            rows = rows.limit(SHOWN_ROWS + 1)  # one more tells that there are more
        result = verbs.run(command, rows)
        if write:
            write(result)
        elif arguments.json:
            for line in result.toJSON().toLocalIterator():
                stdout.write(f"{line}\n")
        else:
            _show(result, stdout, whole=command.operation != "predict")
        return int(doctor and result.where("NOT ok").count() > 0)


def _show(result: DataFrame, stdout: TextIO, *, whole: bool) -> None:
    """Print a result as a table, all of it or its first rows."""
    # Read to its end: a worker of PySpark 4.3 prints a traceback when somebody stops before.
    rows = result.sparkSession.createDataFrame(result.collect(), result.schema)
    count = rows.count() if whole else SHOWN_ROWS
    with contextlib.redirect_stdout(stdout):
        rows.show(count, truncate=not whole, vertical="confusion" in result.columns)


def _session(arguments: argparse.Namespace) -> SparkSession:
    from pyspark.sql import SparkSession

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # Horovod imports TensorFlow to look at it
    builder = SparkSession.builder.appName("mymnist")
    if "PYSPARK_GATEWAY_PORT" in os.environ:  # spark-submit started this process
        if arguments.master:
            raise errors.CommandError("--master is for use outside spark-submit; give it there")
        return builder.getOrCreate()
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    if arguments.master:
        builder = builder.master(arguments.master)
    spark = builder.config("spark.ui.showConsoleProgress", "false").getOrCreate()
    spark.sparkContext.setLogLevel("WARN" if arguments.verbose else "ERROR")
    return spark


def _reader(source: str, given: str | None) -> Any:
    """A function from a session to the input; checks the words before a session starts."""
    name, colon, split = source.partition(":")
    if colon and name in DATASETS:
        if split not in ("train", "test"):
            raise errors.CommandError(f"--input {source}: {name} has the splits train and test")
        from spark_mnist import datasets

        return lambda spark: getattr(datasets, name)(spark, split)
    kind = _format(source, given, "--format")
    read_options = {"header": True} if kind == "csv" else {}
    return lambda spark: spark.read.format(kind).options(**read_options).load(source)


def _writer(arguments: argparse.Namespace) -> Any:
    kind = _format(arguments.output, arguments.output_format, "--output-format")
    mode = "overwrite" if arguments.overwrite else "error"

    def write(result: DataFrame) -> None:
        table = _as_text(result) if kind == "csv" else result
        write_options = {"header": True} if kind == "csv" else {}
        table.write.mode(mode).format(kind).options(**write_options).save(arguments.output)

    return write


def _format(path: str, given: str | None, flag: str) -> str:
    ending = path.rstrip("/").rpartition(".")[2].lower()
    if given or ending in FORMATS:
        return given or ending
    raise errors.CommandError(
        f"the format of {path!r} is not clear: add {flag} {'|'.join(FORMATS)}"
    )


def _as_text(result: DataFrame) -> DataFrame:
    """CSV holds no arrays or maps: write them as the manual does, and as JSON."""
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


def _message(error: Exception) -> str:
    if isinstance(error, errors.SparkMnistError):
        return str(error)
    text = str(error).strip()
    if ours := re.search(r"spark_mnist\.errors\.\w+: (.*)", text):  # raised on an executor
        return ours[1]
    return f"{type(error).__name__}: {text.partition(chr(10))[0]}"


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"mymnist: {message}\n")
    return code
