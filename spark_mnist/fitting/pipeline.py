"""One fit: check, count rows, write shards, train, publish. Runs on: driver.

Each part has a module of its own; this module calls them in order.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import math
from collections.abc import Sequence
from typing import Any

from pyspark.sql import DataFrame, SparkSession

from spark_mnist import errors, options
from spark_mnist.cluster import signals
from spark_mnist.core import plan, retries, sharding
from spark_mnist.data import row_counts, shard_writer
from spark_mnist.fitting import preparation, results, timing
from spark_mnist.launch import failure_policy, launcher
from spark_mnist.networks import objectives
from spark_mnist.options import value_types
from spark_mnist.store import checkpoints, manifests, model_store

logger = logging.getLogger(__name__)


def fit(df: DataFrame, name: str, fit_options: options.FitOptions) -> results.FitResult:
    """Train a model and publish it; see ``api.fit``."""
    signals.check()
    spark = df.sparkSession
    clock = timing.Clock()
    setup = preparation.Preparation(spark, df, name, fit_options)
    logger.debug("checking the cluster, the store and the rows")
    with clock.add_time("prepare"):
        setup.check()
    row_profile = setup.row_profile
    _remove_abandoned(setup, name)
    signals.check()
    with setup.shard_store.work(name) as work:
        training, report = _train(spark, setup, fit_options, name, work, clock)
        rows = row_counts.verify(
            training, report.progress, row_profile.num_input_rows, row_profile.dropped
        )
        signals.check()
        with clock.add_time("publish"):
            version = _publish(setup, name, training, report, rows)
    _warn_of_concurrent_versions(setup, name, version)
    if fit_options.keep is not None:
        _delete_older(setup.store, name, version, fit_options.keep)
    fit_timing = timing.measure(clock, report.times, training)
    logger.log(logging.INFO if fit_options.verbose else logging.DEBUG, "%s", fit_timing)
    _log_compiled_losses(setup, report.network)
    records = report.progress.history
    return results.FitResult(name, version, records, _history(spark, records), rows, fit_timing)


def _log_compiled_losses(setup: preparation.Preparation, network: plan.Network) -> None:
    """Log losses that come from neither options nor tasks: what a model was compiled with."""
    for asked, output in zip(setup.start.network.outputs, network.outputs, strict=True):
        if not asked.loss and output.loss != objectives.LOSSES[output.task][0]:
            logger.info(
                "training with the loss that the network was compiled with: %s", output.loss
            )


def _remove_abandoned(setup: preparation.Preparation, name: str) -> None:
    """Remove the directories that killed fits of this model left behind."""
    is_unpublished = functools.partial(_is_unpublished, setup.store, name)
    for store in {store.url: store for store in (setup.store, setup.shard_store)}.values():
        if paths := store.remove_abandoned(name, is_unpublished):
            logger.warning("removed what killed fits left behind: %s", ", ".join(paths))


def _is_unpublished(store: model_store.Store, name: str, work: str) -> bool:
    """Return whether a work directory holds a trained model that is no version yet.

    True also where this cannot be determined, so that the caller does not remove the directory.
    """
    try:
        manifest, _ = checkpoints.read_unpublished(work)
        for version in store.versions(name):
            if store.manifest(name, version).get("created") == manifest["created"]:
                return False
    except errors.ModelNotFound:  # the fit was killed before its model was trained
        return False
    except (errors.DamagedModel, OSError) as error:
        logger.warning("%s is kept: whether it can be published is not known: %s", work, error)
        return True
    logger.warning(
        "%s holds a trained model that was not published: %s publishes it; or remove the directory",
        *(work, _publish_call(store, name, work)),
    )
    return True


def _publish_call(store: model_store.Store, name: str, work: str) -> str:
    """Return the call, as text, that publishes the trained model of a work directory."""
    return f"spark_mnist.publish({name!r}, {work!r}, store={store.url!r})"


def _warn_of_concurrent_versions(setup: preparation.Preparation, name: str, version: int) -> None:
    """Log a warning where other fits published versions of the model while this fit ran."""
    expected_versions = (*setup.earlier_versions, setup.start.version, version)
    try:
        versions = setup.store.versions(name)
    except OSError as error:  # the version is published, so the fit has not failed
        logger.warning("the versions of model %r could not be listed: %s", name, error)
        return
    concurrent_versions = [number for number in versions if number not in expected_versions]
    if concurrent_versions:
        logger.warning(
            "other fits published versions %s of model %r in the meantime; version %d does not "
            "continue them, and all are kept",
            *(concurrent_versions, name, version),
        )


def _delete_older(store: model_store.Store, name: str, version: int, keep: int) -> None:
    """Delete old versions so that ``keep`` versions stay, the new version among them.

    Versions newer than this fit's belong to other fits and are neither counted nor deleted. A store
    that refuses to delete does not fail the fit: a warning is logged.
    """
    try:
        if old_versions := [number for number in store.versions(name) if number <= version][:-keep]:
            store.remove(name, old_versions)
            logger.info("versions %s of model %r are deleted: keep=%d", old_versions, name, keep)
    except OSError as error:
        logger.warning("older versions of model %r could not be deleted: %s", name, error)


def _train(
    spark: SparkSession,
    setup: preparation.Preparation,
    fit_options: options.FitOptions,
    name: str,
    work: str,
    clock: timing.Clock,
) -> tuple[plan.TrainingPlan, plan.RankSuccess]:
    """Write shards and train on them; repeat both where shards are lost, or slots for ranks.

    Returns:
        The plan of the last start of the ranks, and the report of rank 0.

    Raises:
        errors.ShardsLost: Shards were lost each time that they were written.
        errors.RanksLost: Ranks were lost too often, or are fewer than may go on.
    """
    rewrites = 0
    for rounds in itertools.count():
        logger.debug("writing shards")
        with contextlib.ExitStack() as stack:
            with clock.add_time("prepare"):
                write_shards = shard_writer.write_shards(
                    setup.row_profile,
                    url=work,
                    ranks=setup.ranks,
                    ratio=fit_options.train_validation_ratio,
                )
                shards = stack.enter_context(write_shards)
            checkpoints.save_start(work, setup.start.files)
            logger.debug("starting %d ranks", setup.ranks)
            training = _training_plan(setup, fit_options, *shards, work)
            if rounds:
                attempt = rounds * (fit_options.max_restarts + 1)
                training = launcher.resume_plan(training, attempt)
            try:
                with clock.add_time("ranks"):
                    reports = _run_ranks(spark, fit_options, name, training)
                return training, reports[0]
            except (errors.RanksLost, errors.ShardsLost) as error:
                action = failure_policy.action(
                    error,
                    rewrites=rewrites,
                    max_restarts=fit_options.max_restarts,
                    min_proc=fit_options.min_proc or setup.ranks,
                )
                if action is failure_policy.Action.RAISE:
                    raise
                if isinstance(error, errors.RanksLost) and error.free_slots:
                    logger.warning(
                        "%d of %d slots for ranks are left: the fit goes on with as many ranks",
                        *(error.free_slots, setup.ranks),
                    )
                    setup.ranks = min(setup.ranks, error.free_slots)
                else:
                    rewrites += 1
                    logger.warning("%s; all shards are written once more", error)
    raise AssertionError("unreachable: the count has no end")


def _run_ranks(
    spark: SparkSession,
    fit_options: options.FitOptions,
    name: str,
    training: plan.TrainingPlan,
) -> Sequence[plan.RankSuccess]:
    """Train on Spark's ranks or in this process, and return the ranks' reports."""
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
    setup: preparation.Preparation,
    name: str,
    training: plan.TrainingPlan,
    report: plan.RankSuccess,
    rows: row_counts.RowCounts,
) -> int:
    """Publish the trained model and return the number of the new version.

    Raises:
        errors.DamagedModel: The last checkpoint is gone.
        errors.NotPublished: The store refused the files; the error says how to publish them later.
    """
    checkpoint = checkpoints.locate(training.work)
    if checkpoint is None or checkpoint[0].best.epoch != report.progress.best.epoch:
        raise errors.DamagedModel(f"the last checkpoint of the fit is no longer in {training.work}")
    logger.debug("publishing")
    files: dict[str, bytes | model_store.StoredFile] = {**checkpoint[1], **report.logs}

    manifest = manifests.compose(
        name,
        0,
        parent=setup.start.version,
        input_spec=setup.input_spec,
        training=training,
        report=report,
        rows=rows,
    )

    def describe(number: int) -> dict[str, Any]:
        return {**manifest, "version": number}

    try:
        checkpoints.save_unpublished(training.work, manifest, report.logs)
    except OSError as error:
        logger.warning("the files for publishing later could not be written: %s", error)
    try:
        publish = functools.partial(setup.store.publish, name, files, describe)
        return retries.call("publish", publish, retries.DELAYS_S[-2:])
    except errors.DamagedModel:
        raise
    except Exception as error:  # of any type: each store's client has its own exceptions
        call = _publish_call(setup.store, name, training.work)
        raise errors.NotPublished(
            f"the model is trained, and the store did not take it ({type(error).__name__}: "
            f"{error}): when the store can be written again, {call} publishes it",
            work=training.work,
        ) from error


def _training_plan(
    setup: preparation.Preparation,
    fit_options: options.FitOptions,
    train: plan.Shards,
    validation: plan.Shards,
    work: str,
) -> plan.TrainingPlan:
    start, ranks = setup.start, setup.ranks
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
        compresses_gradients=fit_options.compression == options.FP16,
        standardize=start.standardize,
        features=setup.input_spec.features,
        sync_batch_norm=fit_options.sync_batch_norm,
        patience=fit_options.patience,
        model_fn=start.model_fn,
        heartbeat_timeout=fit_options.heartbeat_timeout,
        work=work,
        checkpoints=fit_options.max_restarts > 0,
        checkpoint_every=fit_options.checkpoint_every if fit_options.max_restarts else math.inf,
        starts_from_files=bool(start.files),
        standardize_label=start.standardize_label,
        class_weight=setup.class_weight,
        losses=start.losses,
        metrics=start.metrics,
        optimizer_fn=start.optimizer_fn,
        callbacks_fn=fit_options.callbacks,
    )


def _history(spark: SparkSession, records: tuple[plan.EpochRecord, ...]) -> DataFrame:
    rows = [(record.epoch, record.losses, record.metrics) for record in records]
    return spark.createDataFrame(rows, results.HISTORY)
