"""``fit``, ``predict``, ``evaluate``, ``command``, ``models``. Runs on the driver.

Each body reads as the way of the data. The session is the DataFrame's; none is made or stopped.
"""

from __future__ import annotations

import dataclasses
import datetime
import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pyspark.sql import DataFrame, SparkSession

from spark_mnist import (
    errors,
    grammar,
    launch,
    lineage,
    options,
    plan,
    schema,
    scoring,
    shards,
    versions,
    world,
)
from spark_mnist import store as stores

logger = logging.getLogger(__name__)

STORE_CONF = "spark.mnist.store"
DEFAULT_STORE = "models"

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class FitResult:
    """What ``fit`` returns."""

    model_name: str
    version: int
    """Number of the version that this fit published."""
    epochs: tuple[plan.EpochRecord, ...] = field(repr=False)
    """One record for each epoch of this fit."""
    history: DataFrame = field(repr=False)
    """The same as a table: ``epoch`` int, ``losses`` and ``metrics`` map<string,double>."""


@dataclass(frozen=True)
class ModelInfo:
    """The newest version of a named model."""

    name: str
    version: int
    epochs: int
    """Epochs of training so far, over all versions."""
    losses: Mapping[str, float]
    """Of the last epoch."""
    metrics: Mapping[str, float]
    created: datetime.datetime


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
def fit(df: DataFrame, model_name: str, **given: Any) -> FitResult:
    """Train a model on the rows of a DataFrame and publish it as a new version.

    Args:
        df: Columns ``image`` (784 pixels) and ``label`` (0..9 or one-hot); ``schema`` says in
            which types.
        model_name: What it is saved under.
        **given: The fields of ``options.FitOptions``.

    Raises:
        errors.SparkMnistError: One of its leaves, before any rank starts where the fault is in the
            options, the rows, the store or the cluster.
    """
    versions.check()
    chosen = options.make(options.FitOptions, given)
    spark = df.sparkSession
    store = _store(spark, chosen.store)
    begin = lineage.start(store, stores.checked_name(model_name), chosen)
    ranks = launch.ranks(spark, chosen.num_proc)
    cache = _cache(spark, store)
    shards.check_url(cache.url)
    census = schema.inspect(df)
    if chosen.num_proc is None:  # a rank that cannot fill a batch would only cost
        training_rows = world.share_of_ratio(census.rows, chosen.train_validation_ratio)
        ranks = max(1, min(ranks, training_rows // chosen.batch_size))
    with (
        cache.work(model_name) as work,
        shards.materialized(
            df,
            census,
            url=work,
            ranks=ranks,
            ratio=chosen.train_validation_ratio,
            seed=begin.seed,
        ) as (train, validation),
    ):
        training = plan.TrainingPlan(
            network=begin.network,
            optimizer=begin.optimizer,
            world=world.World(size=ranks, rows=train.rows, batch_size=chosen.batch_size),
            train=train,
            validation=validation,
            first_epoch=begin.epochs,
            epochs=chosen.epochs,
            seed=begin.seed,
            threads=int(spark.sparkContext.getConf().get("spark.task.cpus", "1")),
            files=begin.files,
        )
        reports = launch.train(spark, training, title=model_name, visible=chosen.verbose > 0)
        records = reports[0].history
        version = store.publish(
            model_name,
            reports[0].files,
            lambda number: lineage.manifest(model_name, number, training, begin, records),
        )
    return FitResult(model_name, version, records, _history(spark, records))


@_takes(options.PredictOptions)
def predict(df: DataFrame, model_name: str, **given: Any) -> DataFrame:
    """Add a model's predictions to a DataFrame, lazily.

    Args:
        df: Has a column ``image``; all its columns and rows stay as they are.
        model_name: A saved model.
        **given: The fields of ``options.PredictOptions``.

    Returns:
        The input's columns, then ``prediction`` (one-hot ``array<int>``), with
        ``interpret=True`` then ``interpreted`` (int). A model trained again later does not
        change it.

    Raises:
        errors.SparkMnistError: One of its leaves. A row without 784 pixels in their range makes
            Spark raise when it is read, with the words of ``errors.BadRows``.
    """
    versions.check()
    chosen = options.make(options.PredictOptions, given)
    added = ["prediction", "interpreted"] if chosen.interpret else ["prediction"]
    taken = [name for name in df.columns if name.lower() in added]
    if taken:
        raise errors.ColumnTaken(f"the input has a column {taken[0]!r} already; rename or drop it")
    network, scores = _scores(df, model_name, chosen)
    return scoring.predictions(df, scores, network.classes, interpret=chosen.interpret)


@_takes(options.EvaluateOptions)
def evaluate(df: DataFrame, model_name: str, **given: Any) -> DataFrame:
    """Measure a model on random shares of the rows of a DataFrame.

    Args:
        df: Columns ``image`` and ``label``, as for ``fit``.
        model_name: A saved model.
        **given: The fields of ``options.EvaluateOptions``.

    Returns:
        One row for each of ``repeat`` evaluations: ``no`` int, ``losses`` and ``metrics``
        map<string,double>. A share that drew no row has null in place of numbers.

    Raises:
        errors.SparkMnistError: One of its leaves.
    """
    versions.check()
    chosen = options.make(options.EvaluateOptions, given)
    _, scores = _scores(df, model_name, chosen)
    census = schema.inspect(df)
    measured = scoring.evaluations(
        df, scores, census.label, rate=chosen.rate, repeat=chosen.repeat, seed=chosen.seed or 0
    )
    rows = [
        (number, {"loss": loss}, {"accuracy": accuracy})
        for number, (loss, accuracy) in enumerate(measured, start=1)
    ]
    return df.sparkSession.createDataFrame(rows, schema.EVALUATE_RESULT)


def command(text: str, df: DataFrame) -> DataFrame:
    """Carry out a command's text on a DataFrame.

    Args:
        text: As on the command line: ``mymnist fit test_model batch_size=128 epochs=5``.
        df: Its input.

    Returns:
        The operation's table: of ``fit`` the history, of ``predict`` and ``eval`` their result.

    Raises:
        errors.CommandError: The text is not understood.
        errors.SparkMnistError: As the operation raises it.
    """
    return run(grammar.parse(text), df)


def run(parsed: grammar.Command, df: DataFrame) -> DataFrame:
    """Carry out a command that was parsed; see ``command``."""
    if parsed.operation == "fit":
        return fit(df, parsed.model_name, **parsed.options).history
    verb = {"predict": predict, "eval": evaluate}[parsed.operation]
    return verb(df, parsed.model_name, **parsed.options)


def models(store: str | None = None) -> list[ModelInfo]:
    """List the saved models, each by its newest version.

    Args:
        store: URL or path; else ``spark.mnist.store`` of the active session, else ``./models``.
    """
    saved = _store(SparkSession.getActiveSession(), store)
    infos = []
    for name in saved.names():
        version = saved.newest(name)
        try:
            manifest = saved.manifest(name, version)
        except errors.DamagedModel as error:
            logger.warning("%s", error)
            continue
        last = manifest["history"][-1]
        created = datetime.datetime.fromisoformat(manifest["created"])
        infos.append(
            ModelInfo(name, version, manifest["epochs"], last["losses"], last["metrics"], created)
        )
    return infos


def _store(spark: SparkSession | None, given: str | None) -> stores.Store:
    conf = spark.conf.get(STORE_CONF, None) if spark else None
    return stores.Store(given or conf or DEFAULT_STORE)


def _cache(spark: SparkSession, store: stores.Store) -> stores.Store:
    """Where the shards of a fit lie: Petastorm's cache directory where one is set."""
    directory = shards.cache_directory(spark)
    return stores.Store(directory) if directory else store


def _scores(
    df: DataFrame, name: str, chosen: options.PredictOptions | options.EvaluateOptions
) -> tuple[plan.Network, Any]:
    store = _store(df.sparkSession, chosen.store)
    manifest, files = store.read(name, store.newest(name, chosen.version))
    network = lineage.saved_network(manifest)
    return network, scoring.probabilities(df, network, files, chosen.batch_size)


def _history(spark: SparkSession, records: tuple[plan.EpochRecord, ...]) -> DataFrame:
    rows = [(record.epoch, record.losses, record.metrics) for record in records]
    return spark.createDataFrame(rows, schema.FIT_RESULT)
