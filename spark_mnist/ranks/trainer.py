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

from spark_mnist import errors
from spark_mnist.core import channel, plan, retries
from spark_mnist.networks import array_files, custom, registry
from spark_mnist.ranks import batches, collectives, gpus, loop, metrics, summaries
from spark_mnist.store import checkpoints

logger = logging.getLogger(__name__)


def run(
    training: plan.TrainingPlan, outbox: channel.HeartbeatClient, task_gpus: Sequence[str] = ()
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
        collectives.start()
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
class Trainer:
    """A compiled model and all that it learns from on this rank."""

    training: plan.TrainingPlan
    network: plan.Network
    model: keras.Model
    row_metrics: metrics.Metrics
    rows: batches.Shard
    held_out: batches.Shard
    train_loop: loop.Loop
    test_loop: loop.Loop
    allreduce: tf.Variable
    """Seconds that steps waited for the other ranks' gradients."""
    outbox: channel.HeartbeatClient

    def epoch(self, before: plan.Progress) -> plan.Progress:
        """Train and validate once."""
        epoch = before.epoch
        with self.train_loop.timed(), _as_raised(self.rows):
            self._train(epoch)
        means, trained, validated = self.row_metrics.means(), self.row_metrics.rows(), 0
        if self.training.validation.rows:
            with self.test_loop.timed(), _as_raised(self.held_out):
                self._validate()
            means |= self.row_metrics.means("val_")
            validated = self.row_metrics.rows()
        self.outbox.tick()
        read = tuple(
            zip(
                collectives.allgather_int(trained),
                collectives.allgather_int(validated),
                strict=True,
            )
        )
        if before.read and before.read[-1] == read:
            read = before.read[-1]  # one object for all epochs, which a report then holds once
        last_step = self.training.sharding.steps
        self.outbox.send(epoch=epoch + 1, step=last_step, done=True, means=means)
        record = metrics.record(epoch + 1, means)
        sound = math.isfinite(sum(record.losses.values())) and collectives.finite(self.model)
        return plan.Progress(
            epoch=epoch + 1,
            history=(*before.history, record),
            read=(*before.read, read),
            best=self._best_epoch(before.best, record) if sound else before.best,
            not_finite=not sound,
        )

    def _train(self, epoch: int) -> None:
        sharding, seed, rank = self.training.sharding, self.training.seed, hvd.rank()
        self.model.reset_metrics()
        collectives.seed_random_layers(self.model, (seed, epoch, rank))
        data = self.rows.training(sharding, rank=rank, seed=seed, epoch=epoch)
        self._set_rate(epoch)
        before = collectives.statistics(self.model)
        for step in self.train_loop.run(data, sharding.steps):
            means = {"loss": self.row_metrics.loss_here()}
            self.outbox.send_throttled(epoch=epoch + 1, step=step, means=means)
            if step < sharding.steps and step % loop.BLOCK == 0:
                self._set_rate(epoch + step / sharding.steps)
        collectives.average_statistics(self.model, before)

    def _set_rate(self, epoch: float) -> None:
        rate = self.training.optimizer.rate(epoch, hvd.size())
        self.model.optimizer.learning_rate.assign(rate)

    def _validate(self) -> None:
        self.model.reset_metrics()
        count = math.ceil(len(self.held_out) / batches.VALIDATION_BATCH)
        for _ in self.test_loop.run(self.held_out.validation(), count):
            self.outbox.tick()

    def _best_epoch(self, before: plan.BestEpoch, record: plan.EpochRecord) -> plan.BestEpoch:
        """The epoch to publish: the last, or with ``patience`` the one of the lowest loss.

        Every rank decides alike, since the losses are means over all ranks.
        """
        loss = record.losses.get("val_loss", record.losses["loss"])
        last = record.epoch == self.training.first_epoch + self.training.epochs
        better = last if self.training.patience is None else loss < before.loss
        if not better:
            return before
        files = array_files.save(self.model) if hvd.rank() == 0 else {}
        digest = collectives.digest(self.model)
        return plan.BestEpoch(epoch=record.epoch, loss=loss, digest=digest, files=files)

    def is_finished(self, progress: plan.Progress) -> bool:
        """Whether nothing more is to be learned."""
        patience, first_epoch = self.training.patience, self.training.first_epoch
        last = first_epoch + self.training.epochs
        best = max(progress.best.epoch, first_epoch)
        waited = patience is not None and progress.epoch - best >= patience
        return progress.epoch >= last or waited or progress.not_finite

    def times(self, epochs: int) -> plan.RankTimes:
        """Where the time of all ranks went in so many epochs."""
        train, test = self.train_loop, self.test_loop
        seconds = [train.seconds, train.waited, float(self.allreduce), test.seconds]
        means = (value / hvd.size() for value in collectives.allreduce_sum(seconds))
        names = ("train", "input", "allreduce", "validate")
        kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        most = max(collectives.allgather_int(kibibytes))
        times = dict(zip(names, means, strict=True))
        attempt = self.training.attempt
        return plan.RankTimes(attempt=attempt, epochs=epochs, memory=most * 1024, **times)


@contextlib.contextmanager
def _as_raised(rows: batches.Shard) -> Iterator[None]:
    """Raise what reading rows raised, and not TensorFlow's words for it."""
    try:
        yield
    except tf.errors.OpError:
        if isinstance(rows, batches.Streamed) and rows.error:
            raise rows.error from None
        raise


def _train(training: plan.TrainingPlan, outbox: channel.HeartbeatClient) -> plan.RankReport:
    trainer = _build_trainer(training, outbox)
    progress = training.resume or plan.Progress(epoch=training.first_epoch)
    first_epoch = progress.epoch
    first = hvd.rank() == 0

    def rate(record: plan.EpochRecord) -> float:
        return training.optimizer.rate(record.epoch - 1, hvd.size())

    with summaries.SummaryWriter() if first else contextlib.nullcontext() as journal:
        if journal:
            journal.graph(trainer.model)
            for record in progress.history:
                journal.epoch(record, rate(record))
        while not trainer.is_finished(progress):
            progress = trainer.epoch(progress)
            if journal:
                journal.epoch(progress.history[-1], rate(progress.history[-1]))
            if first and (training.checkpoints or trainer.is_finished(progress)):
                best = progress.best
                is_best_now = best.epoch == progress.epoch
                files = best.files if is_best_now else array_files.save(trainer.model)
                state = dataclasses.replace(progress, files=files)
                with outbox.long_operation():
                    _save(training, state, last=trainer.is_finished(progress))
        logs = journal.files() if journal else {}
    times = trainer.times(progress.epoch - first_epoch)
    best = dataclasses.replace(progress.best, files={})
    progress = dataclasses.replace(progress, best=best, files={})
    if not first:  # rank 0 tells what is alike
        progress = dataclasses.replace(progress, history=(), read=())
    return plan.RankReport(
        rank=hvd.rank(), progress=progress, network=trainer.network, logs=logs, times=times
    )


def _save(training: plan.TrainingPlan, state: plan.Progress, *, last: bool) -> None:
    """Write a checkpoint; only the last one, which is published, must not fail."""
    try:
        what = f"write the checkpoint of epoch {state.epoch}"
        write = functools.partial(checkpoints.save, training.work, training.attempt, state)
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
        reached = checkpoints.newest(training.work)
        if reached is None or reached.epoch != training.resume.epoch:
            raise errors.DamagedModel(f"the checkpoint of epoch {training.resume.epoch} is gone")
        return reached.files
    return checkpoints.read_start(training.work) if training.starts_from_files else {}


def _remaining_memory(memory: int, rows: batches.Shard) -> int:
    """What the training rows leave of the memory for rows."""
    return memory - rows.nbytes if isinstance(rows, batches.InMemory) else 0


def _network_spec(training: plan.TrainingPlan, user_model: keras.Model | None) -> plan.Network:
    """The network with what only the model tells, if a function of the user's made it."""
    if training.model_fn is None:
        return training.network
    network = custom.describe(user_model, training.network)
    if training.first_epoch:
        custom.check_same(training.network, network)
    return network


def _in_precision(
    training: plan.TrainingPlan, user_model: keras.Model | None
) -> keras.Model | None:
    """The user's model in the precision that holds now; what is saved is the first, in its own."""
    if user_model is None or training.model_fn is None or training.precision == registry.FLOAT32:
        return user_model
    again = training.model_fn()
    again.set_weights(user_model.get_weights())
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


def _build_trainer(training: plan.TrainingPlan, outbox: channel.HeartbeatClient) -> Trainer:
    """Read the shard, build, compile, restore and broadcast: all ranks start with one model."""
    rank, ranks = hvd.rank(), hvd.size()
    with outbox.long_operation():
        dtype = "float64" if training.standardize else registry.FLOAT32
        read_options = {"rank": rank, "ranks": ranks, "moved": outbox.tick, "dtype": dtype}
        rows = batches.read(training.train, memory=training.cache, **read_options)
        held_out = batches.read(
            training.validation, memory=_remaining_memory(training.cache, rows), **read_options
        )
    keras.utils.set_random_seed(training.seed)
    with outbox.long_operation():
        user_model = training.model_fn() if training.model_fn else None
    network = _network_spec(training, user_model)
    if training.standardize and not network.mean:
        with outbox.long_operation():
            mean, deviation = collectives.moments(
                lambda: (part for part, _ in rows.parts()), training.train.encoding.scale
            )
            _warn_of_constants(training, deviation)
        deviation = tuple(value or 1.0 for value in deviation)
        network = dataclasses.replace(network, mean=mean, deviation=deviation)
    with outbox.long_operation(), _precision(training.precision):
        model = registry.build(network, _in_precision(training, user_model))
    if training.sync_batch_norm and ranks > 1:
        collectives.synchronize_batch_norm(model)
    row_metrics, allreduce = metrics.Metrics(), tf.Variable(0.0, dtype=tf.float64)
    spec = training.optimizer
    optimizer = registry.optimizer(spec, spec.rate(training.first_epoch, ranks))
    if training.precision == registry.MIXED_FLOAT16:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    model.compile(
        optimizer=collectives.distributed_optimizer(
            optimizer, allreduce, compressed=training.compressed
        ),
        loss="sparse_categorical_crossentropy",
        weighted_metrics=[row_metrics.loss, row_metrics.accuracy],
    )
    model.optimizer.build(model.trainable_variables)
    if rank == 0:
        with outbox.long_operation():
            array_files.restore(model, _files_to_start_from(training))
    collectives.broadcast(model)
    custom.settle(model)
    return Trainer(
        training=training,
        network=network,
        model=model,
        row_metrics=row_metrics,
        rows=rows,
        held_out=held_out,
        train_loop=loop.Loop(model.train_step),
        test_loop=loop.Loop(model.test_step),
        allreduce=allreduce,
        outbox=outbox,
    )
