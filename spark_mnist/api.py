"""``fit``, ``preflight``, ``predict``, ``evaluate``, ``command``. Runs on the driver.

Each body reads as the way of the data. The session is the DataFrame's, and none is stopped.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections.abc import Callable
from typing import Any, TypeVar

from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession

from spark_mnist import errors, options
from spark_mnist.catalog import mlflow_runs, versions
from spark_mnist.cluster import session, signals, worker_checks
from spark_mnist.core import requirements
from spark_mnist.data import profile
from spark_mnist.fitting import pipeline, preparation, results
from spark_mnist.launch import job, launcher
from spark_mnist.options import grammar
from spark_mnist.scoring import evaluation, score_columns
from spark_mnist.store import location, manifests, model_store

logger = logging.getLogger(__name__)

PREFLIGHT_RESULT = "check string, ok boolean, detail string"
F = TypeVar("F", bound=Callable[..., Any])


def _takes(kind: type[options.Options]) -> Callable[[F], F]:
    """Show a verb's options in its signature, where ``help`` and editors look for them."""

    def sign(verb: F) -> F:
        signature = inspect.signature(verb)
        fixed = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        named = [
            inspect.Parameter(
                f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type
            )
            for f in dataclasses.fields(kind)
        ]
        verb.__dict__["__signature__"] = signature.replace(parameters=[*fixed, *named])
        return verb

    return sign


@_takes(options.FitOptions)
def fit(df: DataFrame, model_name: str, **given: Any) -> results.FitResult:
    """Train a model on the rows of a DataFrame and publish it as a new version.

    Args:
        df: Columns ``image`` (784 pixels) and ``label`` (0..9 or one-hot), or those that
            ``features`` and ``label`` name; ``feature_columns`` and ``profile`` say in which types.
        model_name: What it is saved under.
        **given: The fields of ``options.FitOptions``.

    Raises:
        errors.SparkMnistError: One of its leaves, before any rank starts where the fault is in the
            options, the rows, the store or the cluster.
    """
    session.check_input(df)
    chosen = options.make(options.FitOptions, given, session.settings(df.sparkSession))
    name = model_store.validate_name(model_name)
    tracked = mlflow_runs.wanted(chosen.mlflow)
    with signals.unwound(), launcher.turn():
        try:
            result = pipeline.fit(df, name, chosen)
        except (Py4JJavaError, PySparkException) as error:
            if not job.CANCELLED.search(str(error)):
                raise
            raise errors.FitCancelled(
                "a job of the fit was cancelled in Spark; nothing was published"
            ) from error
        if tracked:
            mlflow_runs.log(result, chosen, location.open_store(chosen.store, df.sparkSession))
        return result


@_takes(options.FitOptions)
def preflight(
    df: DataFrame | None = None, model_name: str = "preflight", **given: Any
) -> preparation.Preflight:
    """Find out whether a fit could start, without starting it.

    Args:
        df: Its input; without it the packages, the cluster and the store are looked at.
        model_name: What the model would be called.
        **given: The fields of ``options.FitOptions``.

    Returns:
        Each check with what was found: packages, Spark's settings, slots for ranks, the model to
        start from, the store (a token that the driver writes, and every executor reads and writes
        back), and one scan of the rows. ``ok`` is whether all hold.

    Raises:
        errors.OptionError, errors.UnknownOption: The options are not understood.
    """
    if df is not None:
        session.check_input(df)
    spark = _session(df)
    chosen = options.make(options.FitOptions, given, session.settings(spark))
    return preparation.preflight(spark, df, model_name, chosen)


@_takes(options.PredictOptions)
def predict(df: DataFrame, model_name: str, **given: Any) -> DataFrame:
    """Add a model's predictions to a DataFrame, lazily.

    Args:
        df: Has the features that the model was trained on; all its columns and rows stay.
        model_name: A saved model.
        **given: The fields of ``options.PredictOptions``.

    Returns:
        The input's columns, then ``prediction`` (one-hot ``array<int>``), with
        ``interpret=True`` then ``interpreted``: the class as an int, or its name as a string where
        classes have names; null for a row that ``mode="DROPMALFORMED"`` leaves out. A model trained
        again later does not change it.

    Raises:
        errors.SparkMnistError: One of its leaves. A row without features in their range makes
            Spark raise when it is read, with the words of ``errors.BadRows``.
    """
    session.check_input(df, streams=True)
    requirements.check()
    chosen = options.make(options.PredictOptions, given, session.settings(df.sparkSession))
    added = ["prediction", "interpreted"] if chosen.interpret else ["prediction"]
    taken = [name for name in df.columns if name.lower() in added]
    if taken:
        raise errors.ColumnTaken(f"the input has a column {taken[0]!r} already; rename or drop it")
    saved = _saved(df, model_name, chosen)
    found = score_columns.classes(df, saved, chosen.batch_size, chosen.mode)
    return score_columns.predictions(df, found, saved.input_spec, interpret=chosen.interpret)


@_takes(options.EvaluateOptions)
def evaluate(df: DataFrame, model_name: str, **given: Any) -> DataFrame:
    """Measure a model on random shares of the rows of a DataFrame.

    Args:
        df: Has the features and the label that the model was trained on.
        model_name: A saved model.
        **given: The fields of ``options.EvaluateOptions``.

    Returns:
        One row for each of ``repeat`` evaluations: ``no`` int, ``losses`` and ``metrics``
        map<string,double>. A share that drew no row has null in place of numbers. With ``by``, one
        row for each evaluation and value of that column, which follows ``no``. With ``details``,
        then ``num_examples`` and ``num_correct`` bigint, ``precision_at_1`` double, ``confusion``
        array<array<bigint>> (rows by label and predicted class) and ``classes``, an array of
        structs: class, num_examples, precision, recall, f1.

    Raises:
        errors.SparkMnistError: One of its leaves.
    """
    session.check_input(df)
    requirements.check()
    chosen = options.make(options.EvaluateOptions, given, session.settings(df.sparkSession))
    group = evaluation.group_field(df, chosen.by, details=chosen.details) if chosen.by else None
    saved = _saved(df, model_name, chosen)
    input_spec, scores = (
        saved.input_spec,
        score_columns.probabilities(df, saved, chosen.batch_size, chosen.mode),
    )
    counted = profile.profile_rows(df, input_spec, chosen.mode)
    cells = score_columns.evaluations(
        counted.usable,
        scores,
        counted.label,
        by=chosen.by,
        rate=chosen.rate,
        repeat=chosen.repeat,
        seed=chosen.seed or 0,
    )
    return evaluation.table(
        df.sparkSession,
        cells,
        input_spec,
        repeat=chosen.repeat,
        group=group,
        details=chosen.details,
    )


def command(text: str, df: DataFrame | None = None) -> DataFrame:
    """Carry out a command's text on a DataFrame.

    Args:
        text: As on the command line: ``mymnist fit test_model batch_size=128 epochs=5``.
        df: Its input; ``models``, ``describe``, ``delete``, ``rollback``, ``doctor`` need none.

    Returns:
        The operation's table: of ``fit`` the history, of ``predict`` and ``eval`` their result, of
        ``delete`` and ``rollback`` the numbers of the versions that are gone, or new, of ``doctor``
        each check, of ``models`` and ``describe`` what is told of each version.

    Raises:
        errors.CommandError: The text is not understood.
        errors.SparkMnistError: As the operation raises it.
    """
    return run(grammar.parse(text), df)


def run(parsed: grammar.Command, df: DataFrame | None) -> DataFrame:
    """Carry out a command that was parsed; see ``command``."""
    if parsed.operation in grammar.WITHOUT_ROWS:
        return _manage(_session(df), parsed)
    if parsed.operation == "doctor":
        found = preflight(df, parsed.model_name or "preflight", **parsed.options)
        rows = [(check.name, check.ok, check.detail) for check in found.checks]
        return _session(df).createDataFrame(rows, PREFLIGHT_RESULT)
    if df is None:
        raise errors.CommandError(f"{parsed.operation} needs a DataFrame to work on")
    if parsed.operation == "fit":
        return fit(df, parsed.model_name, **parsed.options).history
    verb = {"predict": predict, "eval": evaluate}[parsed.operation]
    return verb(df, parsed.model_name, **parsed.options)


def _session(df: DataFrame | None) -> SparkSession:
    """The DataFrame's session; without one the process's, made where there is none."""
    return SparkSession.builder.getOrCreate() if df is None else df.sparkSession


def _manage(spark: SparkSession, parsed: grammar.Command) -> DataFrame:
    """Carry out a command on saved models."""
    store = location.open_store(parsed.options.get("store"), spark)
    name, given = parsed.model_name, {**parsed.options, "store": store.url}
    if parsed.operation == "models":
        return versions.models_table(spark, versions.models(**given))
    if parsed.operation == "describe":
        return versions.info_table(spark, versions.describe(name, **given))
    if parsed.operation == "delete":
        numbers = versions.delete(name, **given)
    else:
        numbers = [versions.rollback(name, **{"version": None, **given})]
    return spark.createDataFrame([(number,) for number in numbers], "version int")


def _saved(
    df: DataFrame, name: str, chosen: options.PredictOptions | options.EvaluateOptions
) -> manifests.Saved:
    store = location.open_store(chosen.store, df.sparkSession)
    worker_checks.check(df.sparkSession, worker_checks.SCORING)
    return manifests.saved(store, name, chosen.version, chosen.network)
