"""The way of the data through a fit: checked, counted, sharded, trained, published. On the driver.

Each step has a module of its own; here they follow each other.
"""

from __future__ import annotations

import logging
from typing import Any

from pyspark.sql import DataFrame, SparkSession

from spark_mnist import (
    catalog,
    census,
    cluster,
    errors,
    kinds,
    launch,
    lineage,
    manifests,
    options,
    plan,
    receipts,
    results,
    schema,
    shards,
    world,
)
from spark_mnist import store as stores

logger = logging.getLogger(__name__)


def fit(df: DataFrame, name: str, chosen: options.FitOptions) -> results.FitResult:
    """Train a model and publish it; see ``verbs.fit``."""
    spark = df.sparkSession
    store = catalog.open_store(chosen.store, spark)
    cache = _cache(spark, store)
    for place in {store.url: store, cache.url: cache}.values():
        if left := place.sweep(name):
            logger.warning("removed what fits left behind that were killed: %s", ", ".join(left))
    before = store.versions(name)
    begin = lineage.start(store, name, chosen)
    ranks = cluster.ranks(spark, chosen.num_proc)
    shards.check_url(cache.url)
    begin = begin.reading(begin.reads or _discovered(df, chosen))
    counted = _counted(df, begin, chosen.mode)
    if chosen.num_proc is None:  # a rank that cannot fill a batch would only cost
        training_rows = world.share_of_ratio(counted.rows, chosen.train_validation_ratio)
        ranks = max(1, min(ranks, training_rows // chosen.batch_size))
    _warn_of_few(counted.rows, ranks, chosen)
    with (
        cache.work(name) as work,
        shards.materialized(
            counted,
            url=work,
            ranks=ranks,
            ratio=chosen.train_validation_ratio,
            seed=begin.seed,
        ) as (train, validation),
    ):
        training = _training_plan(begin, chosen, ranks, train, validation, work)
        reports = launch.train(
            spark,
            training,
            title=name,
            visible=chosen.verbose > 0,
            max_restarts=chosen.max_restarts,
        )
        report = reports[0]
        assert report.progress is not None
        rows = receipts.write(training, report.progress, counted.dropped)
        version = _publish(store, name, begin, training, report, rows)
    meanwhile = [number for number in store.versions(name) if number not in (*before, version)]
    if meanwhile:
        logger.warning(
            "other fits published versions %s of model %r meanwhile; version %d does not go on "
            "from them, and both stay",
            *(meanwhile, name, version),
        )
    records = report.progress.history
    return results.FitResult(name, version, records, _history(spark, records), rows)


def _discovered(df: DataFrame, chosen: options.FitOptions) -> plan.Input:
    """What there is to read of a table."""
    label = chosen.label or plan.Input.label
    return census.discover(df, kinds.columns(chosen.features), label)


def _counted(df: DataFrame, begin: lineage.Start, mode: str) -> census.Census:
    """Check the rows. Where none is what a saved model reads, they are another model's."""
    assert begin.reads is not None
    try:
        return census.take(df, begin.reads, mode)
    except errors.BadRows as error:
        if begin.version is None or sum(error.counts.values()) < df.count():
            raise
        reads = begin.reads
        raise errors.ModelMismatch(
            f"version {begin.version} was trained on rows of {reads.width} numbers in "
            f"{', '.join(reads.features)}, with the classes {', '.join(reads.class_names)} in "
            f"{reads.label}, and these are others: {error}"
        ) from None


def _publish(
    store: stores.Store,
    name: str,
    begin: lineage.Start,
    training: plan.TrainingPlan,
    report: plan.RankReport,
    rows: receipts.Receipt,
) -> int:
    """Publish what a fit learned; returns the number of the new version."""
    assert report.progress is not None
    files = {**report.progress.kept.files, **report.logs}

    def describe(number: int) -> dict[str, Any]:
        assert begin.reads is not None
        return manifests.write(
            name,
            number,
            parent=begin.version,
            reads=begin.reads,
            training=training,
            report=report,
            rows=rows,
        )

    return store.publish(name, files, describe)


def _training_plan(
    begin: lineage.Start,
    chosen: options.FitOptions,
    ranks: int,
    train: plan.Shards,
    validation: plan.Shards,
    work: str,
) -> plan.TrainingPlan:
    return plan.TrainingPlan(
        network=begin.network,
        optimizer=begin.optimizer,
        world=world.World(size=ranks, rows=train.rows, batch_size=chosen.batch_size),
        train=train,
        validation=validation,
        first_epoch=begin.epochs,
        epochs=chosen.epochs,
        seed=begin.seed,
        standardize=begin.standardize,
        patience=chosen.patience,
        files=begin.files,
        make=begin.make,
        heartbeat_timeout=chosen.heartbeat_timeout,
        work=work if chosen.max_restarts else None,
    )


def _warn_of_few(rows: int, ranks: int, chosen: options.FitOptions) -> None:
    share = world.share_of_ratio(rows, chosen.train_validation_ratio) // ranks
    if chosen.batch_size > max(share, options.FitOptions.batch_size):
        logger.warning(
            "batch_size=%d is more than the %d training rows of a rank: an epoch is one step",
            *(chosen.batch_size, share),
        )


def _cache(spark: SparkSession, store: stores.Store) -> stores.Store:
    """Where the shards of a fit lie: Petastorm's cache directory where one is set."""
    directory = shards.cache_directory(spark)
    return stores.Store(directory) if directory else store


def _history(spark: SparkSession, records: tuple[plan.EpochRecord, ...]) -> DataFrame:
    rows = [(record.epoch, record.losses, record.metrics) for record in records]
    return spark.createDataFrame(rows, schema.FIT_RESULT)
