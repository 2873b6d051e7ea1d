"""What one rank does: build, restore, broadcast, train, report. Runs in a process of its own.

A rank never lets an exception out: it reports what was raised, so that the driver can name the
rank that failed first and not the ones that Horovod stopped after it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import resource
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import horovod.tensorflow as hvd
import keras
import tensorflow as tf

from spark_mnist import (
    averaging,
    batches,
    checkpoint,
    errors,
    events,
    gpus,
    meters,
    networks,
    own,
    plan,
    recovery,
    retries,
    steps,
    tensorboard,
)

logger = logging.getLogger(__name__)


def run(
    training: plan.TrainingPlan, outbox: events.Outbox, task_gpus: Sequence[str] = ()
) -> plan.RankReport:
    """Train on this rank's shard.

    Args:
        training: What to do.
        outbox: Tells the driver how it goes.
        task_gpus: Addresses of the GPUs that Spark gave the rank's task.

    Returns:
        How the fit ended, or the failure of this rank.
    """
    started = False
    try:
        if training.threads:
            tf.config.threading.set_intra_op_parallelism_threads(training.threads)
            tf.config.threading.set_inter_op_parallelism_threads(training.threads)
        averaging.start()
        started = True
        device = gpus.claim(task_gpus, hvd.local_rank())
        outbox.send(device=device)
        return _train(training, outbox)
    except Exception as error:
        failure = plan.Failure(
            type=type(error).__name__,
            message=str(error),
            traceback=traceback.format_exc(),
            time=time.time(),
            collective=not started
            or ("Horovod" in str(error) and isinstance(error, tf.errors.OpError)),
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
    train_loop: steps.Loop
    test_loop: steps.Loop
    allreduce: tf.Variable
    """Seconds that steps waited for the other ranks' gradients."""
    outbox: events.Outbox

    def epoch(self, before: plan.Progress) -> plan.Progress:
        """Train and validate once."""
        epoch = before.epoch
        with self.train_loop.timed(), _as_raised(self.rows):
            self._train(epoch)
        means, trained, validated = self.meters.means(), self.meters.rows(), 0
        if self.training.validation.rows:
            with self.test_loop.timed(), _as_raised(self.held_out):
                self._validate()
            means |= self.meters.means("val_")
            validated = self.meters.rows()
        self.outbox.move()
        read = tuple(zip(averaging.gathered(trained), averaging.gathered(validated), strict=True))
        if before.read and before.read[-1] == read:
            read = before.read[-1]  # one object for all epochs, which a report then holds once
        done = self.training.world.steps
        self.outbox.send(epoch=epoch + 1, step=done, done=True, means=means)
        record = meters.record(epoch + 1, means)
        sound = math.isfinite(sum(record.losses.values())) and averaging.finite(self.model)
        return plan.Progress(
            epoch=epoch + 1,
            history=(*before.history, record),
            read=(*before.read, read),
            kept=self._kept(before.kept, record) if sound else before.kept,
            broken=not sound,
        )

    def _train(self, epoch: int) -> None:
        division, seed, rank = self.training.world, self.training.seed, hvd.rank()
        self.model.reset_metrics()
        averaging.seed_random_layers(self.model, (seed, epoch, rank))
        data = self.rows.training(division, rank=rank, seed=seed, epoch=epoch)
        self._set_rate(epoch)
        before = averaging.statistics(self.model)
        for done in self.train_loop.run(data, division.steps):
            means = {"loss": self.meters.loss_here()}
            self.outbox.send_seldom(epoch=epoch + 1, step=done, means=means)
            if done < division.steps and done % steps.BLOCK == 0:
                self._set_rate(epoch + done / division.steps)
        averaging.average_statistics(self.model, before)

    def _set_rate(self, epoch: float) -> None:
        rate = self.training.optimizer.rate(epoch, hvd.size())
        self.model.optimizer.learning_rate.assign(rate)

    def _validate(self) -> None:
        self.model.reset_metrics()
        count = math.ceil(len(self.held_out) / batches.VALIDATION_BATCH)
        for _ in self.test_loop.run(self.held_out.validation(), count):
            self.outbox.move()

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
        patience, begun = self.training.patience, self.training.first_epoch
        last = begun + self.training.epochs
        best = max(progress.kept.epoch, begun)
        waited = patience is not None and progress.epoch - best >= patience
        return progress.epoch >= last or waited or progress.broken

    def spent(self, epochs: int) -> plan.Spent:
        """Where the time of all ranks went in so many epochs."""
        train, test = self.train_loop, self.test_loop
        seconds = [train.seconds, train.waited, float(self.allreduce), test.seconds]
        means = (value / hvd.size() for value in averaging.total(seconds))
        names = ("train", "input", "allreduce", "validate")
        kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        most = max(averaging.gathered(kibibytes))
        times = dict(zip(names, means, strict=True))
        attempt = self.training.attempt
        return plan.Spent(attempt=attempt, epochs=epochs, memory=most * 1024, **times)


@contextlib.contextmanager
def _as_raised(rows: batches.Shard) -> Iterator[None]:
    """Raise what reading rows raised, and not TensorFlow's words for it."""
    try:
        yield
    except tf.errors.OpError:
        if isinstance(rows, batches.Streamed) and rows.error:
            raise rows.error from None
        raise


def _train(training: plan.TrainingPlan, outbox: events.Outbox) -> plan.RankReport:
    learner = _learner(training, outbox)
    progress = training.resume or plan.Progress(epoch=training.first_epoch)
    begun = progress.epoch
    first = hvd.rank() == 0

    def rate(record: plan.EpochRecord) -> float:
        return training.optimizer.rate(record.epoch - 1, hvd.size())

    with tensorboard.Journal() if first else contextlib.nullcontext() as journal:
        if journal:
            journal.graph(learner.model)
            for record in progress.history:
                journal.epoch(record, rate(record))
        while not learner.ended(progress):
            progress = learner.epoch(progress)
            if journal:
                journal.epoch(progress.history[-1], rate(progress.history[-1]))
            if first and (training.checkpoints or learner.ended(progress)):
                kept = progress.kept
                now = kept.epoch == progress.epoch
                files = kept.files if now else checkpoint.save(learner.model)
                state = dataclasses.replace(progress, files=files)
                with outbox.busy():
                    _save(training, state, last=learner.ended(progress))
        logs = journal.files() if journal else {}
    spent = learner.spent(progress.epoch - begun)
    kept = dataclasses.replace(progress.kept, files={})
    progress = dataclasses.replace(progress, kept=kept, files={})
    if not first:  # rank 0 tells what is alike
        progress = dataclasses.replace(progress, history=(), read=())
    return plan.RankReport(
        rank=hvd.rank(), progress=progress, network=learner.network, logs=logs, spent=spent
    )


def _save(training: plan.TrainingPlan, state: plan.Progress, *, last: bool) -> None:
    """Write a checkpoint; only the last one, which is published, must not fail."""
    try:
        what = f"write the checkpoint of epoch {state.epoch}"
        write = functools.partial(recovery.save, training.work, training.attempt, state)
        retries.call(what, write, retries.DELAYS_S[-2:] if last else ())
    except OSError as error:
        if last:
            raise
        logger.warning("epoch %d has no checkpoint: %s", state.epoch, error)


@contextlib.contextmanager
def _precision(policy: str) -> Iterator[None]:
    """Let layers that are made here compute in a dtype policy of Keras's."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def _files_to_start_from(training: plan.TrainingPlan) -> Mapping[str, bytes]:
    """Read the checkpoint of an earlier attempt, or of the saved model; {} to start afresh."""
    if training.resume:
        reached = recovery.newest(training.work)
        if reached is None or reached.epoch != training.resume.epoch:
            raise errors.DamagedModel(f"the checkpoint of epoch {training.resume.epoch} is gone")
        return reached.files
    return recovery.read_start(training.work) if training.starts_from_files else {}


def _left(memory: int, rows: batches.Shard) -> int:
    """What the training rows leave of the memory for rows."""
    return memory - rows.nbytes if isinstance(rows, batches.InMemory) else 0


def _described(training: plan.TrainingPlan, made: keras.Model | None) -> plan.Network:
    """The network with what only the model tells, if a function of the user's made it."""
    if training.make is None:
        return training.network
    network = own.describe(made, training.network)
    if training.first_epoch:
        own.check_same(training.network, network)
    return network


def _made_again(training: plan.TrainingPlan, made: keras.Model | None) -> keras.Model | None:
    """The user's model in the precision that holds now; what is saved is the first, in its own."""
    if made is None or training.make is None or training.precision == networks.FLOAT32:
        return made
    again = training.make()
    again.set_weights(made.get_weights())
    return again


def _warn_of_constants(training: plan.TrainingPlan, deviation: Sequence[float]) -> None:
    """Name the features that have the same value in all training rows."""
    names = training.features if len(training.features) == len(deviation) else ()
    constant = [number for number, value in enumerate(deviation) if value == 0]
    if constant and names and hvd.rank() == 0:  # of pictures, corners are black
        shown = ", ".join(names[number] for number in constant[:10])
        more = ", ..." if len(constant) > 10 else ""
        logger.warning(
            "%s%s: the same value in all training rows, nothing can be learned of it", shown, more
        )


def _learner(training: plan.TrainingPlan, outbox: events.Outbox) -> Learner:
    """Read the shard, build, compile, restore and broadcast: all ranks start with one model."""
    rank, ranks = hvd.rank(), hvd.size()
    with outbox.busy():
        dtype = "float64" if training.standardize else networks.FLOAT32
        given = {"rank": rank, "ranks": ranks, "moved": outbox.move, "dtype": dtype}
        rows = batches.read(training.train, memory=training.cache, **given)
        held_out = batches.read(training.validation, memory=_left(training.cache, rows), **given)
    keras.utils.set_random_seed(training.seed)
    with outbox.busy():
        made = training.make() if training.make else None
    network = _described(training, made)
    if training.standardize and not network.mean:
        with outbox.busy():
            mean, deviation = averaging.moments(
                lambda: (part for part, _ in rows.parts()), training.train.encoding.scale
            )
            _warn_of_constants(training, deviation)
        deviation = tuple(value or 1.0 for value in deviation)
        network = dataclasses.replace(network, mean=mean, deviation=deviation)
    with outbox.busy(), _precision(training.precision):
        model = networks.build(network, _made_again(training, made))
    if training.sync_batch_norm and ranks > 1:
        averaging.synchronize_batch_norm(model)
    measured, allreduce = meters.Meters(), tf.Variable(0.0, dtype=tf.float64)
    spec = training.optimizer
    optimizer = networks.optimizer(spec, spec.rate(training.first_epoch, ranks))
    if training.precision == networks.MIXED_FLOAT16:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    model.compile(
        optimizer=averaging.averaged(optimizer, allreduce, compressed=training.compressed),
        loss="sparse_categorical_crossentropy",
        weighted_metrics=[measured.loss, measured.accuracy],
    )
    model.optimizer.build(model.trainable_variables)
    if rank == 0:
        with outbox.busy():
            checkpoint.restore(model, _files_to_start_from(training))
    averaging.broadcast(model)
    own.settle(model)
    return Learner(
        training=training,
        network=network,
        model=model,
        meters=measured,
        rows=rows,
        held_out=held_out,
        train_loop=steps.Loop(model.train_step),
        test_loop=steps.Loop(model.test_step),
        allreduce=allreduce,
        outbox=outbox,
    )
