"""The command line.

    mymnist fit|predict|eval MODEL key=value ... --input DATA
    mymnist models|describe|delete|rollback [MODEL] [key=value ...]
    mymnist doctor [MODEL] [key=value ...] [--input DATA]

Only results go to stdout; logs and progress go to stderr. Exit codes: 0 success, 1 failure, 2
command not understood, 130 interrupted, 143 terminated.

Runs on: driver.
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

from spark_mnist import errors, options
from spark_mnist._version import __version__
from spark_mnist.cli import outputs
from spark_mnist.cluster import signals
from spark_mnist.core import requirements
from spark_mnist.options import grammar

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

DATASETS = ("digits", "iris", "mnist")
MAX_TABLE_ROWS = 20
"""Most rows of a prediction that the table on stdout has."""
EXAMPLES = """\
examples:
  mymnist fit test_model batch_size=128 epochs=5 --input digits:train
  mymnist predict test_model batch_size=128 interpret=true --input digits:test --output out.parquet
  mymnist eval test_model repeat=2 batch_size=128 rate=0.8 --input digits:test
  mymnist fit flowers features=petal_length,petal_width label=species --input iris:train
  mymnist fit widths features=sepal_* label=petal_width task=regression --input iris:train
  mymnist rollback test_model version=1
  mymnist doctor num_proc=2 --input digits:train
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    _open_closed_streams()
    parser = _parser()
    arguments = parser.parse_intermixed_args(argv)
    logging.basicConfig(stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    level = "DEBUG" if arguments.verbose else "WARNING" if arguments.quiet else "INFO"
    logging.getLogger("spark_mnist").setLevel(level)
    requirements.ignore_new_pandas()
    try:
        command = grammar.parse_words([*arguments.words, *_flag_words(arguments)])
        with signals.interruptible(), _only_results_on_stdout() as stdout:
            return _run(command, arguments, stdout)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except Exception as error:
        if arguments.debug:
            raise
        is_usage_error = isinstance(error, errors.CommandError)
        return _fail(_message(error), 2 if is_usage_error else 1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mymnist",
        usage="mymnist fit|predict|eval MODEL [key=value ...] --input DATA [--output PATH]\n"
        "       mymnist models|describe|delete|rollback [MODEL] [key=value ...]\n"
        "       mymnist doctor [MODEL] [key=value ...] [--input DATA]",
        description="Train a Keras model on the rows of a Spark DataFrame, predict with it, or "
        "evaluate it.",
        epilog=f"key=value:\n{_options_help()}\n\n{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("words", nargs="*", metavar="WORD", help="operation, model name, then key=value")
    add("--input", metavar="DATA", help="digits|iris|mnist:train|test, or a path for Spark")
    add(
        "--format",
        choices=outputs.FORMATS,
        help="format of the input, if its name does not end with it",
    )
    add(
        "--read",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="option of Spark's reader, like sep=; or header=false; may be given several times",
    )
    add("--output", metavar="PATH", help="write the result to this path instead of stdout")
    add(
        "--output-format",
        choices=outputs.FORMATS,
        help="format of the output, if its name does not end with it",
    )
    add("--overwrite", action="store_true", help="replace the output if it exists")
    add("--json", action="store_true", help="write one JSON object a line to stdout")
    add("--store", metavar="URL", help="the same as store=URL")
    add("--num-proc", metavar="N", help="the same as num_proc=N")
    add("--master", help="Spark master; not with spark-submit")
    verbosity = parser.add_mutually_exclusive_group()
    verbosity.add_argument("--verbose", action="store_true", help="log the output of the ranks")
    verbosity.add_argument(
        "--quiet", action="store_true", help="hide progress, and log warnings and errors alone"
    )
    add("--debug", action="store_true", help="show the traceback of an error")
    add("--version", action="version", version=f"mymnist {__version__}")
    return parser


def _options_help() -> str:
    """Return the options of all operations as lines of ``--help``."""
    lines = []
    for name, field in options.FIELDS.items():
        operations = options.operations_with(name)
        default = options.default_text(name)
        scope = "" if len(operations) == len(options.OPERATIONS) else f" ({', '.join(operations)})"
        text = f"{field.metadata['doc']}{scope}; {field.metadata['type'].words}; default {default}"
        lines += textwrap.wrap(text, 96, initial_indent=f"  {name:24}", subsequent_indent=" " * 26)
    return "\n".join(lines)


def _flag_words(arguments: argparse.Namespace) -> list[str]:
    """Return ``key=value`` for each flag that is another way to write an option."""
    shows_progress = arguments.words[:1] in [[name] for name in options.operations_with("verbose")]
    flags = {
        "store": arguments.store,
        "num_proc": arguments.num_proc,
        "verbose": "0" if arguments.quiet and shows_progress else None,
    }
    return [f"{name}={value}" for name, value in flags.items() if value is not None]


def _open_closed_streams() -> None:
    """Open stdout and stderr where they are closed, so that no other file gets their numbers."""
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_WRONLY)
            if null != descriptor:
                os.dup2(null, descriptor)
                os.close(null)
            os.set_inheritable(descriptor, True)  # the JVM inherits it, too
            setattr(sys, name, os.fdopen(descriptor, "w", encoding="utf-8"))


@contextlib.contextmanager
def _only_results_on_stdout() -> Iterator[TextIO]:
    """Yield stdout, and send to stderr what other code, the JVM included, prints to stdout."""
    sys.stdout.flush()
    stdout_descriptor = os.dup(1)
    os.dup2(2, 1)
    stdout = os.fdopen(os.dup(stdout_descriptor), "w", encoding="utf-8")
    try:
        yield stdout
        with contextlib.suppress(BrokenPipeError):  # the reader stops early, as head does
            stdout.flush()
    finally:
        sys.stdout.flush()
        with contextlib.suppress(OSError):
            stdout.close()
        os.dup2(stdout_descriptor, 1)
        os.close(stdout_descriptor)


def _run(command: grammar.Command, arguments: argparse.Namespace, stdout: TextIO) -> int:
    """Carry out the command and return the exit code."""
    needs_rows = command.operation not in grammar.WITHOUT_ROWS
    is_doctor = command.operation == "doctor"
    if is_doctor and not arguments.input:
        needs_rows = False
    if needs_rows and not arguments.input:
        raise errors.CommandError("--input is missing: name digits:train, mnist:train or a path")
    reader = _reader(arguments) if needs_rows else None
    if arguments.output:
        outputs.check_format(arguments.output, arguments.output_format)

    from spark_mnist import api

    spark = _session(arguments)
    with signals.interruptible():  # a second time, since a new session installs Spark's own handler
        writer = None
        if arguments.output:
            writer = outputs.Writer(
                spark, arguments.output, arguments.output_format, overwrite=arguments.overwrite
            )
        rows = reader(spark) if reader else None
        if rows is not None and command.operation == "predict" and not (writer or arguments.json):
            rows = rows.limit(MAX_TABLE_ROWS + 1)  # the extra row tells whether there are more
        result = api.run(command, rows)
        with contextlib.suppress(BrokenPipeError):  # the reader stops early, as head does
            if writer:
                writer.write(result)
            elif arguments.json:
                for line in outputs.json_lines(result):
                    stdout.write(f"{line}\n")
            else:
                _show(result, stdout, whole=command.operation != "predict")
        return int(is_doctor and result.where("NOT ok").count() > 0)


def _show(result: DataFrame, stdout: TextIO, *, whole: bool) -> None:
    """Print a result as a table, all of it or its first rows."""
    # Collect all rows: a worker of PySpark 4.3 prints a traceback when its reader stops early.
    rows = result.sparkSession.createDataFrame(result.collect(), result.schema)
    count = rows.count() if whole else MAX_TABLE_ROWS
    with contextlib.redirect_stdout(stdout):
        rows.show(count, truncate=not whole, vertical="confusion" in result.columns)


def _session(arguments: argparse.Namespace) -> SparkSession:
    from pyspark.sql import SparkSession

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # Horovod imports TensorFlow to inspect it
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


def _reader(arguments: argparse.Namespace) -> Any:
    """Return a function that reads the input with a session.

    The arguments are checked here, before a session starts.

    Raises:
        errors.CommandError: The arguments for the input are not understood.
    """
    source = arguments.input
    name, colon, split = source.partition(":")
    if colon and name in DATASETS:
        if split not in ("train", "test"):
            raise errors.CommandError(f"--input {source}: {name} has the splits train and test")
        if arguments.read:
            raise errors.CommandError(f"--read is for files, and {source} is a data set")
        from spark_mnist import datasets

        return lambda spark: getattr(datasets, name)(spark, split)
    file_format = outputs.format_of(source, arguments.format, "--format")
    read_options = {"header": "true"} if file_format == "csv" else {}
    for word in arguments.read:
        key, equals, value = word.partition("=")
        if not (key and equals):
            raise errors.CommandError(f"--read {word}: write KEY=VALUE, say sep=;")
        read_options[key] = value.replace("\\t", "\t")

    def read(spark: SparkSession) -> DataFrame:
        try:
            return spark.read.format(file_format).options(**read_options).load(source)
        except Exception as error:  # of any type: Spark's, or the JVM's
            raise errors.DatasetError(
                f"--input {source} cannot be read as {file_format}: {_cause(error)}"
            ) from error

    return read


def _message(error: Exception) -> str:
    if isinstance(error, errors.SparkMnistError):
        return str(error)
    text = str(error).strip()
    if match := re.search(r"spark_mnist\.errors\.\w+: (.*)", text):  # raised on an executor
        return match[1]
    return f"{type(error).__name__}: {_cause(error)}"


def _cause(error: Exception) -> str:
    """Return the first line of the JVM's root exception, or of the error if it has none."""
    exception = getattr(error, "java_exception", None)
    text = str(error).strip()
    while exception is not None:
        text = exception.getMessage() or exception.getClass().getSimpleName()
        exception = exception.getCause()
    return text.strip().partition("\n")[0]


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"mymnist: {message}\n")
    return code
