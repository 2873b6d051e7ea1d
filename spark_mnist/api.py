"""``fit``, ``preflight``, ``predict``, ``evaluate``, ``command``. Runs on: driver.

Each function calls the other modules in the order in which the data passes through them. The
session is the DataFrame's, and no function stops a session.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession

from spark_mnist import errors, options
from spark_mnist.catalog import mlflow_runs, versions
from spark_mnist.cluster import session, signals, worker_checks
from spark_mnist.core import plan, requirements
from spark_mnist.data import profile
from spark_mnist.fitting import pipeline, preparation, results, training_start
from spark_mnist.launch import job, launcher
from spark_mnist.networks import objectives
from spark_mnist.options import grammar
from spark_mnist.scoring import evaluation, measures, score_columns
from spark_mnist.store import location, manifests, model_store

logger = logging.getLogger(__name__)

PREFLIGHT_RESULT = "check string, ok boolean, detail string"
Function = TypeVar("Function", bound=Callable[..., Any])


def _with_options(options_class: type[options.Options]) -> Callable[[Function], Function]:
    """Return a decorator that puts options into a signature, where ``help`` and editors look."""

    def set_signature(function: Function) -> Function:
        signature = inspect.signature(function)
        positional = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        keyword_only = [
            inspect.Parameter(
                f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type
            )
            for f in dataclasses.fields(options_class)
        ]
        parameters = [*positional, *keyword_only]
        function.__dict__["__signature__"] = signature.replace(parameters=parameters)
        return function

    return set_signature


@_with_options(options.FitOptions)
def fit(df: DataFrame, model_name: str, **option_values: Any) -> results.FitResult:
    """Train a model on the rows of a DataFrame and publish it as a new version.

    Args:
        df: Columns ``image`` (784 pixels) and ``label`` (0..9 or one-hot), or those that
            ``features`` and ``label`` name, of the types that the page "Data" lists.
        model_name: The name to save the model under.
        **option_values: The fields of ``options.FitOptions``.

    Raises:
        errors.SparkMnistError: One of its subclasses, before any rank starts where the fault is in
            the options, the rows, the store or the cluster.
    """
    session.check_input(df)
    fit_options = options.build(
        options.FitOptions, option_values, session.settings(df.sparkSession)
    )
    name = model_store.validate_name(model_name)
    logs_to_mlflow = mlflow_runs.is_enabled(fit_options.mlflow)
    with signals.interruptible(), launcher.exclusive_fit():
        try:
            result = pipeline.fit(df, name, fit_options)
        except (Py4JJavaError, PySparkException) as error:
            if not job.CANCELLED.search(str(error)):
                raise
            raise errors.FitCancelled(
                "a job of the fit was cancelled in Spark; nothing was published"
            ) from error
        if logs_to_mlflow:
            store = location.open_store(fit_options.store, df.sparkSession)
            mlflow_runs.log(result, fit_options, store)
        return result


@_with_options(options.FitOptions)
def preflight(
    df: DataFrame | None = None, model_name: str = "preflight", **option_values: Any
) -> preparation.Preflight:
    """Check whether a fit could start, without starting it.

    Args:
        df: Input of the fit; without it only the packages, the cluster, the model and the store
            are checked.
        model_name: Name that the model would have.
        **option_values: The fields of ``options.FitOptions``.

    Returns:
        The result of each check: packages, Spark's settings, slots for ranks, Python workers, the
        model to start from, the store (a token that the driver writes, and every executor reads and
        writes back), and one scan of the rows. ``ok`` is whether all checks passed.

    Raises:
        errors.OptionError, errors.UnknownOption: The options are not understood.
        errors.NotADataFrame: ``df`` is something else.
        errors.ModelNameError: The name cannot be a model's.
        errors.ClusterError: The session is Spark Connect's, or was stopped.
    """
    if df is not None:
        session.check_input(df)
    spark = _session(df)
    fit_options = options.build(options.FitOptions, option_values, session.settings(spark))
    return preparation.preflight(spark, df, model_name, fit_options)


@_with_options(options.PredictOptions)
def predict(df: DataFrame, model_name: str, **option_values: Any) -> DataFrame:
    """Add a model's predictions to a DataFrame, lazily.

    Args:
        df: Rows with the features that the model was trained on; all columns and rows stay.
        model_name: A saved model.
        **option_values: The fields of ``options.PredictOptions``.

    Returns:
        The input's columns, then ``prediction``: of classes one-hot ``array<int>``; of two classes
        learned with ``task="binary"`` 0 or 1, an int; of labels ``array<int>`` of 0 and 1; of
        numbers a double, or ``array<double>`` where a row has several. With ``interpret=True`` then
        ``interpreted``: the class as an int, or its name as a string where classes have names, and
        of labels an array of these; with ``probabilities=True`` then ``probability``,
        ``array<float>``, one for each class or label. A model with several outputs has such columns
        for each, ``prediction_price`` of an output ``price``. All are null for a row that
        ``mode="DROPMALFORMED"`` leaves out. Training the model again later does not change the
        returned DataFrame.

    Raises:
        errors.SparkMnistError: One of its subclasses. A row whose features are missing or out of
            range makes Spark raise when the row is read, with the words of ``errors.BadRows``.
    """
    session.check_input(df, streams=True)
    requirements.check()
    predict_options = options.build(
        options.PredictOptions, option_values, session.settings(df.sparkSession)
    )
    model = _load_model(df, model_name, predict_options)
    outputs, batch_size = model.network.heads, predict_options.batch_size
    flags = {
        "interpret": predict_options.interpret,
        "probabilities": predict_options.probabilities,
    }
    _check_free(df, score_columns.output_columns(outputs, **flags))
    if not predict_options.probabilities and _learns_classes(outputs):
        classes = score_columns.classes(df, model, batch_size, predict_options.mode)
        return score_columns.predictions(
            df, classes, model.input_spec, interpret=predict_options.interpret
        )
    scores = score_columns.outputs(df, model, batch_size, predict_options.mode)
    return score_columns.output_predictions(df, scores, outputs, **flags)


@_with_options(options.EvaluateOptions)
def evaluate(df: DataFrame, model_name: str, **option_values: Any) -> DataFrame:
    """Measure a model on random samples of the rows of a DataFrame.

    Args:
        df: Rows with the features and the label that the model was trained on.
        model_name: A saved model.
        **option_values: The fields of ``options.EvaluateOptions``.

    Returns:
        One row for each of ``repeat`` evaluations: ``no`` int, ``losses`` and ``metrics``
        map<string,double>. Classes have ``accuracy``; two classes also ``precision``, ``recall``
        and ``auc``; labels ``accuracy``, ``f1_micro`` and ``f1_macro``; numbers ``mse``, ``rmse``,
        ``mae`` and ``r2``; those of one of several outputs have its name before theirs, as
        ``price_mae``. A sample without rows has null in place of numbers. With ``by``, one
        row for each evaluation and value of that column, which comes after ``no``. With
        ``details``, then ``num_examples`` and ``num_correct`` bigint, ``precision_at_1`` double,
        ``confusion`` array<array<bigint>> (rows by label and predicted class) and ``classes``, an
        array of
        structs: class, num_examples, precision, recall, f1.

    Raises:
        errors.SparkMnistError: One of its subclasses.
    """
    session.check_input(df)
    requirements.check()
    evaluate_options = options.build(
        options.EvaluateOptions, option_values, session.settings(df.sparkSession)
    )
    group = (
        evaluation.group_field(df, evaluate_options.by, details=evaluate_options.details)
        if evaluate_options.by
        else None
    )
    model = _load_model(df, model_name, evaluate_options)
    outputs, batch_size = model.network.heads, evaluate_options.batch_size
    if evaluate_options.details and (len(outputs) > 1 or outputs[0].task not in plan.CLASS_TASKS):
        raise errors.OptionError("details=true is for a model with one output that learns classes")
    training_start.check_loss_names(model_name, evaluate_options.loss, outputs)
    losses = training_start.custom_losses(evaluate_options.loss, outputs)
    row_profile = profile.profile_rows(
        df,
        model.input_spec,
        evaluate_options.mode,
        standardized=bool(model.network.mean),
        outputs=outputs,
    )
    sampling: dict[str, Any] = {
        "rate": evaluate_options.rate,
        "repeat": evaluate_options.repeat,
        "seed": evaluate_options.seed or 0,
    }
    shape: dict[str, Any] = {
        "repeat": evaluate_options.repeat,
        "group": group,
        "details": evaluate_options.details,
    }
    is_default_loss = outputs[0].loss in ("", objectives.CLASS_LOSS) and not losses
    if _learns_classes(outputs) and is_default_loss:
        scores = score_columns.probabilities(df, model, batch_size, evaluate_options.mode)
        cells = score_columns.evaluations(
            row_profile.usable, scores, row_profile.label, by=evaluate_options.by, **sampling
        )
        return evaluation.table(df.sparkSession, cells, model.input_spec, **shape)
    samples = score_columns.draw(
        score_columns.measurable(
            row_profile, model, batch_size, losses=losses, by=evaluate_options.by
        ),
        **sampling,
    )
    return evaluation.table(
        df.sparkSession,
        measures.cells(samples, outputs[0]) if evaluate_options.details else [],
        model.input_spec,
        **shape,
        measured=measures.measure(samples, outputs),
        names=measures.metric_names(outputs),
    )


def command(text: str, df: DataFrame | None = None) -> DataFrame:
    """Carry out a command's text on a DataFrame.

    Args:
        text: As on the command line: ``mymnist fit test_model batch_size=128 epochs=5``.
        df: Input of the command; ``models``, ``describe``, ``delete``, ``rollback`` and ``doctor``
            need none.

    Returns:
        The table of the operation. ``fit``: the history. ``predict`` and ``eval``: their result.
        ``delete``: the numbers of the deleted versions. ``rollback``: the number of the new
        version. ``doctor``: each check. ``models`` and ``describe``: descriptions of versions.

    Raises:
        errors.CommandError: The text is not understood.
        errors.SparkMnistError: The operation raised it.
    """
    return run(grammar.parse(text), df)


def run(parsed_command: grammar.Command, df: DataFrame | None) -> DataFrame:
    """Carry out a parsed command; see ``command``."""
    if parsed_command.operation in grammar.WITHOUT_ROWS:
        return _manage(_session(df), parsed_command)
    if parsed_command.operation == "doctor":
        result = preflight(df, parsed_command.model_name or "preflight", **parsed_command.options)
        rows = [(check.name, check.ok, check.detail) for check in result.checks]
        return _session(df).createDataFrame(rows, PREFLIGHT_RESULT)
    if df is None:
        raise errors.CommandError(f"{parsed_command.operation} needs a DataFrame to work on")
    if parsed_command.operation == "fit":
        return fit(df, parsed_command.model_name, **parsed_command.options).history
    function = {"predict": predict, "eval": evaluate}[parsed_command.operation]
    return function(df, parsed_command.model_name, **parsed_command.options)


def _learns_classes(outputs: Sequence[plan.Output]) -> bool:
    """Return whether a model has one output, without a name, that learns classes."""
    return len(outputs) == 1 and not outputs[0].name and outputs[0].task == plan.CLASSIFICATION


def _check_free(df: DataFrame, new_columns: Sequence[str]) -> None:
    """Refuse an input that has a column of a name that the result needs.

    Raises:
        errors.ColumnTaken: The input has such a column.
    """
    names = {name.lower() for name in new_columns}
    conflicts = [name for name in df.columns if name.lower() in names]
    if conflicts:
        raise errors.ColumnTaken(
            f"the input has a column {conflicts[0]!r} already; rename or drop it"
        )


def _session(df: DataFrame | None) -> SparkSession:
    """Return the DataFrame's session; without a DataFrame, the process's or a new one."""
    return SparkSession.builder.getOrCreate() if df is None else df.sparkSession


def _manage(spark: SparkSession, parsed_command: grammar.Command) -> DataFrame:
    """Carry out a command on saved models."""
    store = location.open_store(parsed_command.options.get("store"), spark)
    name, arguments = parsed_command.model_name, {**parsed_command.options, "store": store.url}
    if parsed_command.operation == "models":
        return versions.models_table(spark, versions.models(**arguments))
    if parsed_command.operation == "describe":
        return versions.info_table(spark, versions.describe(name, **arguments))
    if parsed_command.operation == "delete":
        numbers = versions.delete(name, **arguments)
    else:
        numbers = [versions.rollback(name, **{"version": None, **arguments})]
    return spark.createDataFrame([(number,) for number in numbers], "version int")


def _load_model(
    df: DataFrame, name: str, score_options: options.PredictOptions | options.EvaluateOptions
) -> manifests.SavedModel:
    """Check that Spark's Python workers can score, and load a saved model."""
    store = location.open_store(score_options.store, df.sparkSession)
    worker_checks.check(df.sparkSession, worker_checks.SCORING)
    return manifests.load(store, name, score_options.version, score_options.network)
