"""What one rank does: build, restore, broadcast, train, report. Runs in a process of its own.

A rank never lets an exception out: it reports what was raised, so that the driver can name the
rank that failed first and not the ones that Horovod stopped after it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
import traceback
from dataclasses import dataclass
from typing import Any

import horovod.tensorflow as hvd
import keras
import tensorflow as tf

from spark_mnist import (
    averaging,
    batches,
    checkpoint,
    events,
    meters,
    networks,
    own,
    plan,
    recovery,
    tensorboard,
)

STEPS_PER_CALL = 32
"""Steps that TensorFlow runs without coming back to Python."""


def run(training: plan.TrainingPlan, outbox: events.Outbox) -> plan.RankReport:
    """Train on this rank's shard.

    Returns:
        How the fit ended, or the failure of this rank.
    """
    tf.config.threading.set_intra_op_parallelism_threads(training.threads)
    tf.config.threading.set_inter_op_parallelism_threads(training.threads)
    try:
        hvd.init()
        return _train(training, outbox)
    except Exception as error:
        failure = plan.Failure(
            type=type(error).__name__,
            message=str(error),
            traceback=traceback.format_exc(),
            time=time.time(),
            collective="Horovod" in str(error) and isinstance(error, tf.errors.OpError),
        )
        return plan.RankReport(rank=outbox.rank, failure=failure)
    finally:
        hvd.shutdown()


@dataclass(frozen=True)
class Learner:
    """A compiled model and all that it learns from on this rank."""

    training: plan.TrainingPlan
    network: plan.Network
    model: keras.Model
    meters: meters.Meters
    rows: batches.Shard
    held_out: batches.Shard
    outbox: events.Outbox

    def epoch(self, before: plan.Progress) -> plan.Progress:
        """Train and validate once."""
        epoch, division, seed = before.epoch, self.training.world, self.training.seed
        averaging.seed_dropout(self.model, (seed, epoch, hvd.rank()))
        data = batches.training(self.rows, division, rank=hvd.rank(), seed=seed, epoch=epoch)
        self.model.fit(data, shuffle=False, verbose=0, callbacks=[self._between_calls(epoch)])
        averaging.average_statistics(self.model)
        means, trained, validated = self.meters.means(), self.meters.rows(), 0
        if self.training.validation.rows:
            self.model.reset_metrics()
            if len(self.held_out):
                moving = keras.callbacks.LambdaCallback(
                    on_test_batch_end=lambda step, logs: self.outbox.move()
                )
                data = batches.validation(self.held_out)
                self.model.evaluate(data, verbose=0, callbacks=[moving])
            means |= self.meters.means("val_")
            validated = self.meters.rows()
        self.outbox.move()
        self.outbox.send(epoch=epoch + 1, step=division.steps, done=True, means=means)
        record = meters.record(epoch + 1, means)
        sound = math.isfinite(sum(record.losses.values())) and averaging.finite(self.model)
        return plan.Progress(
            epoch=epoch + 1,
            history=(*before.history, record),
            read=(*before.read, averaging.gathered((trained, validated))),
            kept=self._kept(before.kept, record) if sound else before.kept,
            broken=not sound,
        )

    def _kept(self, before: plan.Kept, record: plan.EpochRecord) -> plan.Kept:
        """The epoch to publish: the last, or with ``patience`` the one of the lowest loss.

        Every rank decides alike, since the losses are means over all ranks.
        """
        loss = record.losses.get("val_loss", record.losses["loss"])
        last = record.epoch == self.training.first_epoch + self.training.epochs
        better = last if self.training.patience is None else loss < before.loss
        if not better:
            return before
        files = checkpoint.save(self.model) if hvd.rank() == 0 else {}
        digest = averaging.digest(self.model)
        return plan.Kept(epoch=record.epoch, loss=loss, digest=digest, files=files)

    def ended(self, progress: plan.Progress) -> bool:
        """Whether nothing more is to be learned."""
        patience, last = self.training.patience, self.training.first_epoch + self.training.epochs
        waited = patience is not None and progress.epoch - progress.kept.epoch >= patience
        return progress.epoch >= last or waited or progress.broken

    def _between_calls(self, epoch: int) -> keras.callbacks.Callback:
        """What is done before and after TensorFlow runs ``STEPS_PER_CALL`` steps."""
        spec, steps = self.training.optimizer, self.training.world.steps

        def set_rate(step: int, logs: Any) -> None:
            rate = spec.rate(epoch + step / steps, hvd.size())
            self.model.optimizer.learning_rate.assign(rate)

        def tell_driver(step: int, logs: Any) -> None:
            done = min(step + 1, steps)
            means = {"loss": float(logs["loss"])}
            self.outbox.send_seldom(epoch=epoch + 1, step=done, means=means)

        changing = spec.warmup_epochs or spec.schedule != "constant"
        return keras.callbacks.LambdaCallback(
            on_train_batch_begin=set_rate if changing else None, on_train_batch_end=tell_driver
        )


def _train(training: plan.TrainingPlan, outbox: events.Outbox) -> plan.RankReport:
    learner = _learner(training, outbox)
    progress = training.resume or plan.Progress(epoch=training.first_epoch)
    first = hvd.rank() == 0
    with tensorboard.Journal() if first else contextlib.nullcontext() as journal:
        if journal:
            journal.graph(learner.model)
            for record in progress.history:
                journal.epoch(record, training.optimizer.rate(record.epoch, hvd.size()))
        while not learner.ended(progress):
            progress = learner.epoch(progress)
            if journal:
                rate = float(learner.model.optimizer.learning_rate)
                journal.epoch(progress.history[-1], rate)
            if first and training.work:
                files = checkpoint.save(learner.model)
                state = dataclasses.replace(progress, files=files)
                with outbox.busy():
                    recovery.save(training.work, training.attempt, state)
        logs = journal.files() if journal else {}
    if not first:  # after a restart every rank has what was kept before
        kept = dataclasses.replace(progress.kept, files={})
        progress = dataclasses.replace(progress, kept=kept)
    return plan.RankReport(rank=hvd.rank(), progress=progress, network=learner.network, logs=logs)


def _described(training: plan.TrainingPlan, made: keras.Model | None) -> plan.Network:
    """The network with what only the model tells, if a function of the user's made it."""
    if training.make is None:
        return training.network
    network = own.describe(made, training.network)
    if training.first_epoch:
        own.check_same(training.network, network)
    return network


def _learner(training: plan.TrainingPlan, outbox: events.Outbox) -> Learner:
    """Read the shard, build, compile, restore and broadcast: all ranks start with one model."""
    rank, ranks = hvd.rank(), hvd.size()
    with outbox.busy():
        rows = batches.read(training.train, rank=rank, ranks=ranks)
        held_out = batches.read(training.validation, rank=rank, ranks=ranks)
    keras.utils.set_random_seed(training.seed)
    with outbox.busy():
        made = training.make() if training.make else None
    network = _described(training, made)
    if training.standardize and not network.mean:
        mean, deviation = averaging.moments(rows.features, rows.scale)
        network = dataclasses.replace(network, mean=mean, deviation=deviation)
    model = networks.build(network, made)
    measured = meters.Meters()
    spec = training.optimizer
    optimizer = networks.optimizer(spec, spec.rate(training.first_epoch, ranks))
    model.compile(
        optimizer=averaging.averaged(optimizer),
        loss="sparse_categorical_crossentropy",
        weighted_metrics=[measured.loss, measured.accuracy],
        steps_per_execution=min(STEPS_PER_CALL, training.world.steps),
        jit_compile=False,  # Horovod's operations have no XLA kernels
    )
    model.optimizer.build(model.trainable_variables)
    checkpoint.restore(model, training.resume.files if training.resume else training.files)
    averaging.broadcast(model)
    return Learner(training, network, model, measured, rows, held_out, outbox)
