"""The way of the data through a fit: checked, counted, sharded, trained, published. On the driver.

Each step has a module of its own; here they follow each other.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from typing import Any

from pyspark.sql import DataFrame, SparkSession

from spark_mnist import errors, options
from spark_mnist.cluster import signals
from spark_mnist.core import plan, retries, sharding
from spark_mnist.data import feature_columns, row_counts, shard_writer
from spark_mnist.fitting import preparation, results, timing, training_start
from spark_mnist.launch import launcher
from spark_mnist.options import value_types
from spark_mnist.store import checkpoints, manifests, model_store

logger = logging.getLogger(__name__)


def fit(df: DataFrame, name: str, fit_options: options.FitOptions) -> results.FitResult:
    """Train a model and publish it; see ``api.fit``."""
    signals.check()
    spark = df.sparkSession
    clock = timing.Clock()
    ready = preparation.Preparation(spark, df, name, fit_options)
    logger.debug("looking at the cluster, the store and the rows")
    with clock.of("prepare"):
        ready.check()
    counted = ready.counted
    _sweep(ready, name)
    signals.check()
    with ready.shard_store.work(name) as work:
        training, report = _trained(spark, ready, fit_options, name, work, clock)
        assert report.progress is not None
        assert report.times is not None
        rows = row_counts.verify(training, report.progress, counted.given, counted.dropped)
        signals.check()
        with clock.of("publish"):
            version = _publish(ready.store, name, ready.start, training, report, rows)
    _tell_of_others(ready, name, version)
    if fit_options.keep is not None:
        _delete_older(ready.store, name, version, fit_options.keep)
    took = timing.measure(clock, report.times, training)
    logger.log(logging.INFO if fit_options.verbose else logging.DEBUG, "%s", took)
    records = report.progress.history
    return results.FitResult(name, version, records, _history(spark, records), rows, took)


def _sweep(ready: preparation.Preparation, name: str) -> None:
    """Remove what fits of this model left behind that were killed."""
    spare = functools.partial(_is_unpublished, ready.store, name)
    for place in {store.url: store for store in (ready.store, ready.shard_store)}.values():
        if left := place.remove_abandoned(name, spare):
            logger.warning("removed what killed fits left behind: %s", ", ".join(left))


def _is_unpublished(store: model_store.Store, name: str, work: str) -> bool:
    """Return whether a work directory holds a trained model that is no version yet."""
    try:
        manifest, _ = checkpoints.read_unpublished(work)
        for version in store.versions(name):
            if store.manifest(name, version).get("created") == manifest["created"]:
                return False
    except errors.ModelNotFound:  # killed before it was trained
        return False
    except (errors.DamagedModel, OSError) as error:
        logger.warning("%s is left: it is not known whether it can be published: %s", work, error)
        return True
    logger.warning(
        "%s holds a trained model that was not published: %s publishes it; or remove the directory",
        *(work, _publish_call(store, name, work)),
    )
    return True


def _publish_call(store: model_store.Store, name: str, work: str) -> str:
    """Return the call that publishes what a fit has trained."""
    return f"spark_mnist.publish({name!r}, {work!r}, store={store.url!r})"


def _tell_of_others(ready: preparation.Preparation, name: str, version: int) -> None:
    """Say that a version does not go on from those that other fits published meanwhile."""
    known = (*ready.before, ready.start.version, version)
    meanwhile = [number for number in ready.store.versions(name) if number not in known]
    if meanwhile:
        logger.warning(
            "other fits published versions %s of model %r meanwhile; version %d does not go on "
            "from them, and all stay",
            *(meanwhile, name, version),
        )


def _delete_older(store: model_store.Store, name: str, version: int, keep: int) -> None:
    """Delete versions before the new one, which is among those that stay.

    A store that refuses is no failure of the fit. Newer ones are another fit's.
    """
    try:
        if older := [number for number in store.versions(name) if number <= version][:-keep]:
            store.remove(name, older)
            logger.info("versions %s of model %r are deleted: keep=%d", older, name, keep)
    except OSError as error:
        logger.warning("older versions of model %r could not be deleted: %s", name, error)


def _trained(
    spark: SparkSession,
    ready: preparation.Preparation,
    fit_options: options.FitOptions,
    name: str,
    work: str,
    clock: timing.Clock,
) -> tuple[plan.TrainingPlan, plan.RankReport]:
    """Write shards and train on them; once more where shards got lost before they were read."""
    written = functools.partial(
        shard_writer.write_shards,
        ready.counted,
        url=work,
        ranks=ready.ranks,
        ratio=fit_options.train_validation_ratio,
    )
    rounds = max(1, fit_options.max_restarts)
    for number in range(rounds + 1):
        logger.debug("writing shards")
        with contextlib.ExitStack() as stack:
            with clock.of("prepare"):
                parts = stack.enter_context(written())
            checkpoints.save_start(work, ready.start.files)
            logger.debug("starting %d ranks", ready.ranks)
            training = _training_plan(ready.start, fit_options, ready.ranks, *parts, work)
            if number:
                training = launcher.resumed(training, number * (fit_options.max_restarts + 1))
            try:
                with clock.of("ranks"):
                    reports = _reports(spark, fit_options, name, training)
                return training, reports[0]
            except errors.ShardsLost as error:
                if number == rounds:
                    raise
                logger.warning("%s; all shards are written once more", error)
    raise AssertionError("unreachable: the last round returns or raises")


def _reports(
    spark: SparkSession, fit_options: options.FitOptions, name: str, training: plan.TrainingPlan
) -> list[plan.RankReport]:
    if fit_options.launcher == options.IN_PROCESS:
        return launcher.train_in_process(training)
    return launcher.train(
        spark,
        training,
        title=name,
        visible=fit_options.verbose > 0,
        max_restarts=fit_options.max_restarts,
        ports=value_types.ports(fit_options.port) or (0,),
    )


def _publish(
    store: model_store.Store,
    name: str,
    start: training_start.TrainingStart,
    training: plan.TrainingPlan,
    report: plan.RankReport,
    rows: row_counts.RowCounts,
) -> int:
    """Publish what a fit learned; returns the number of the new version."""
    checkpoint = checkpoints.locate(training.work)
    assert report.progress is not None
    if checkpoint is None or checkpoint[0].best.epoch != report.progress.best.epoch:
        raise errors.DamagedModel(
            f"the last checkpoint of the fit is not in {training.work} any more"
        )
    logger.debug("publishing")
    files: dict[str, bytes | model_store.StoredFile] = {**checkpoint[1], **report.logs}

    assert start.input_spec is not None
    manifest = manifests.compose(
        name,
        0,
        parent=start.version,
        input_spec=start.input_spec,
        training=training,
        report=report,
        rows=rows,
    )

    def describe(number: int) -> dict[str, Any]:
        return {**manifest, "version": number}

    try:
        checkpoints.save_unpublished(training.work, manifest, report.logs)
    except OSError as error:
        logger.warning("should publishing fail, it cannot be done later: %s", error)
    try:
        write = functools.partial(store.publish, name, files, describe)
        return retries.call("publish", write, retries.DELAYS_S[-2:])
    except errors.DamagedModel:
        raise
    except Exception as error:  # of any type, as stores' clients have their own
        call = _publish_call(store, name, training.work)
        raise errors.NotPublished(
            f"the model is trained, and the store did not take it ({type(error).__name__}: "
            f"{error}): when the store can be written again, {call} publishes it",
            work=training.work,
        ) from error


def _training_plan(
    start: training_start.TrainingStart,
    fit_options: options.FitOptions,
    ranks: int,
    train: plan.Shards,
    validation: plan.Shards,
    work: str,
) -> plan.TrainingPlan:
    assert start.input_spec is not None
    return plan.TrainingPlan(
        network=start.network,
        optimizer=start.optimizer,
        sharding=sharding.RowSharding(
            size=ranks, rows=train.rows, batch_size=fit_options.batch_size
        ),
        train=train,
        validation=validation,
        first_epoch=start.epochs,
        epochs=fit_options.epochs,
        seed=start.seed,
        cache=value_types.size(fit_options.cache),
        precision=fit_options.precision,
        compressed=fit_options.compression == options.FP16,
        standardize=start.standardize,
        features=start.input_spec.features,
        sync_batch_norm=fit_options.sync_batch_norm,
        patience=fit_options.patience,
        model_fn=start.model_fn,
        heartbeat_timeout=fit_options.heartbeat_timeout,
        work=work,
        checkpoints=fit_options.max_restarts > 0,
        starts_from_files=bool(start.files),
    )


def _history(spark: SparkSession, records: tuple[plan.EpochRecord, ...]) -> DataFrame:
    rows = [(record.epoch, record.losses, record.metrics) for record in records]
    return spark.createDataFrame(rows, feature_columns.FIT_RESULT)
