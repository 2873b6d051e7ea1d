"""What one rank does: build, restore, broadcast, train, report. Runs in a process of its own.

A rank never lets an exception out: it reports what was raised, so that the driver can name the
rank that failed first and not the ones that Horovod stopped after it.
"""

from __future__ import annotations

import contextlib
import dataclasses
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
    tensorboard,
)

STEPS_PER_CALL = 32
"""Steps that TensorFlow runs without coming back to Python."""


def run(training: plan.TrainingPlan) -> plan.RankReport:
    """Train on this rank's shard.

    Returns:
        The history and the checkpoint from rank 0, a digest of the weights from every rank, or the
        failure of this one.
    """
    tf.config.threading.set_intra_op_parallelism_threads(training.threads)
    tf.config.threading.set_inter_op_parallelism_threads(training.threads)
    hvd.init()
    try:
        return _train(training)
    except Exception as error:
        failure = plan.Failure(
            type=type(error).__name__,
            message=str(error),
            traceback=traceback.format_exc(),
            time=time.time(),
            collective="Horovod" in str(error) and isinstance(error, tf.errors.OpError),
        )
        return plan.RankReport(rank=hvd.rank(), failure=failure)
    finally:
        hvd.shutdown()


class Kept:
    """The epoch that is published: the last, or with ``patience`` the one of the lowest loss.

    Every rank decides alike, since the losses are means over all ranks.
    """

    def __init__(self, training: plan.TrainingPlan) -> None:
        self._patience = training.patience
        self._last = training.first_epoch + training.epochs
        self._loss = float("inf")
        self.epoch = 0
        self.digest = ""
        self.files: dict[str, bytes] = {}

    def consider(self, model: keras.Model, record: plan.EpochRecord) -> None:
        """Keep this epoch in place of the one before, if it is the last or better."""
        loss = record.losses.get("val_loss", record.losses["loss"])
        if self._patience is None:
            keep = record.epoch == self._last
        else:
            keep = loss < self._loss or not self.epoch
        if keep:
            self._loss = min(self._loss, loss)  # a first loss that is NaN leaves infinity
            self.epoch = record.epoch
            self.digest = averaging.digest(model)
            self.files = checkpoint.save(model) if hvd.rank() == 0 else {}

    def waited_enough(self, epoch: int) -> bool:
        """Whether no epoch was better for as long as the user wants to wait."""
        return self._patience is not None and epoch - self.epoch >= self._patience


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

    def epoch(self, epoch: int) -> plan.EpochRecord:
        """Train and validate once; ``epoch`` counts from 0 over the model's life."""
        division, seed = self.training.world, self.training.seed
        averaging.seed_dropout(self.model, (seed, epoch, hvd.rank()))
        data = batches.training(self.rows, division, rank=hvd.rank(), seed=seed, epoch=epoch)
        self.model.fit(data, shuffle=False, verbose=0, callbacks=[self._between_calls(epoch)])
        averaging.average_statistics(self.model)
        means = self.meters.means()
        if self.training.validation.rows:
            self.model.reset_metrics()
            if len(self.held_out):
                self.model.evaluate(batches.validation(self.held_out), verbose=0)
            means |= self.meters.means("val_")
        self.outbox.send(epoch=epoch + 1, step=division.steps, done=True, **means)
        return meters.record(epoch + 1, means)

    def _between_calls(self, epoch: int) -> keras.callbacks.Callback:
        """What is done before and after TensorFlow runs ``STEPS_PER_CALL`` steps."""
        spec, steps = self.training.optimizer, self.training.world.steps

        def set_rate(step: int, logs: Any) -> None:
            rate = spec.rate(epoch + step / steps, hvd.size())
            self.model.optimizer.learning_rate.assign(rate)

        def tell_driver(step: int, logs: Any) -> None:
            done = min(step + 1, steps)
            self.outbox.send_seldom(epoch=epoch + 1, step=done, loss=float(logs["loss"]))

        changing = spec.warmup_epochs or spec.schedule != "constant"
        return keras.callbacks.LambdaCallback(
            on_train_batch_begin=set_rate if changing else None, on_train_batch_end=tell_driver
        )


def _train(training: plan.TrainingPlan) -> plan.RankReport:
    learner = _learner(training)
    kept = Kept(training)
    history = []
    with tensorboard.Journal() if hvd.rank() == 0 else contextlib.nullcontext() as journal:
        if journal:
            journal.graph(learner.model)
        for epoch in range(training.first_epoch, training.first_epoch + training.epochs):
            record = learner.epoch(epoch)
            history.append(record)
            if journal:
                journal.epoch(record, float(learner.model.optimizer.learning_rate))
            kept.consider(learner.model, record)
            if kept.waited_enough(record.epoch):
                break
        report = plan.RankReport(
            rank=hvd.rank(), epoch=kept.epoch, weights_digest=kept.digest, network=learner.network
        )
        if journal:
            files = {**kept.files, **journal.files()}
            report = dataclasses.replace(report, history=tuple(history), files=files)
        return report


def _described(training: plan.TrainingPlan, made: keras.Model | None) -> plan.Network:
    """The network with what only the model tells, if a function of the user's made it."""
    if training.make is None:
        return training.network
    network = own.describe(made, training.network)
    if training.first_epoch:
        own.check_same(training.network, network)
    return network


def _learner(training: plan.TrainingPlan) -> Learner:
    """Read the shard, build, compile, restore and broadcast: all ranks start with one model."""
    rank, ranks = hvd.rank(), hvd.size()
    rows = batches.read(training.train, rank=rank, ranks=ranks)
    held_out = batches.read(training.validation, rank=rank, ranks=ranks)
    keras.utils.set_random_seed(training.seed)
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
    checkpoint.restore(model, training.files)
    averaging.broadcast(model)
    outbox = events.Outbox(training.inbox if rank == 0 else None)
    return Learner(training, network, model, measured, rows, held_out, outbox)
