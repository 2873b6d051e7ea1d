"""Training on one rank: build, restore, broadcast, train, report. Runs on: rank.

A rank is a process of its own, or the driver's process where a fit runs without Spark tasks. A rank
never lets an exception escape: it reports the exception, so that the driver can name the rank that
failed first and not the ranks that Horovod stopped after it.
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
from typing import Any

import horovod.tensorflow as hvd
import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from spark_mnist import errors
from spark_mnist.core import channel, plan, retries
from spark_mnist.networks import array_files, custom, objectives, registry
from spark_mnist.ranks import (
    batches,
    collectives,
    gpus,
    hooks,
    loop,
    metrics,
    objective,
    pace,
    summaries,
)
from spark_mnist.store import checkpoints

logger = logging.getLogger(__name__)


def run(
    training: plan.TrainingPlan, heartbeat: channel.HeartbeatClient, task_gpus: Sequence[str] = ()
) -> plan.RankReport:
    """Train on this rank's shard.

    Args:
        training: Plan of the training.
        heartbeat: Client that sends progress to the driver.
        task_gpus: Addresses of the GPUs that Spark gave the rank's task.

    Returns:
        The result of the fit, or the failure of this rank.
    """
    is_connected = False
    try:
        if training.threads:
            tf.config.threading.set_intra_op_parallelism_threads(training.threads)
            tf.config.threading.set_inter_op_parallelism_threads(training.threads)
        collectives.start()
        is_connected = True
        device = gpus.claim(task_gpus, hvd.local_rank())
        heartbeat.send(device=device)
        return _train(training, heartbeat)
    except Exception as error:
        return plan.RankFailure(
            rank=heartbeat.rank,
            type=type(error).__name__,
            message=str(error),
            traceback=traceback.format_exc(),
            time=time.time(),
            collective=not is_connected
            or ("Horovod" in str(error) and isinstance(error, tf.errors.OpError)),
        )
    finally:
        hvd.shutdown()


@dataclass(frozen=True)
class Trainer:
    """A compiled model and everything that it is trained with on this rank."""

    training: plan.TrainingPlan
    network: plan.Network
    model: keras.Model
    row_metrics: metrics.Metrics
    training_shard: batches.Shard
    validation_shard: batches.Shard
    train_loop: loop.Loop
    test_loop: loop.Loop
    allreduce_wait_s: tf.Variable
    """Seconds that steps waited for the other ranks' gradients."""
    user_hooks: hooks.Hooks
    heartbeat: channel.HeartbeatClient
    start: plan.Progress
    """Progress to go on from, without files, but for those of the best epoch on rank 0."""
    rank_states: bytes
    """What differs between ranks within the epoch to go on with; on rank 0 alone."""
    checkpoint_pace: pace.Pace

    def epoch(self, progress: plan.Progress) -> plan.Progress:
        """Train and validate for one epoch, or what is left of it, and return the new progress."""
        epoch = progress.epoch
        with self.train_loop.timer(), _reader_errors(self.training_shard):
            self._train(progress)
        training_rows, validation_rows = self.row_metrics.rows(), 0
        means = self.row_metrics.means()
        if self.training.validation.rows:
            with self.test_loop.timer(), _reader_errors(self.validation_shard):
                self._validate()
            validation_rows = self.row_metrics.rows()
            means |= self.row_metrics.means("val_")
        self.heartbeat.tick()
        rows = tuple(
            zip(
                collectives.allgather_int(training_rows),
                collectives.allgather_int(validation_rows),
                strict=True,
            )
        )
        # One object for all epochs that are alike, which a report then holds once.
        if progress.rows_by_epoch and progress.rows_by_epoch[-1] == rows:
            rows = progress.rows_by_epoch[-1]
        last_step = self.training.sharding.steps
        self.heartbeat.send(epoch=epoch + 1, step=last_step, done=True, means=means)
        record = metrics.record(epoch + 1, means, self.network.heads)
        stopped = self.user_hooks.epoch_end(epoch, means)
        is_last = stopped or epoch + 1 == self.training.first_epoch + self.training.epochs
        if is_last:
            if self.training.patience is None:
                collectives.finalize_average(self.model)
            self.user_hooks.train_end()  # may give back the weights of another epoch, as in Keras
        is_finite = math.isfinite(sum(record.losses.values())) and collectives.finite(self.model)
        return plan.Progress(
            epoch=epoch + 1,
            history=(*progress.history, record),
            rows_by_epoch=(*progress.rows_by_epoch, rows),
            best=self._best_epoch(progress.best, record, is_last) if is_finite else progress.best,
            stopped=stopped,
            rate_factor=self.user_hooks.rate_factor,
            not_finite=not is_finite,
        )

    def _train(self, progress: plan.Progress) -> None:
        sharding, seed, rank = self.training.sharding, self.training.seed, hvd.rank()
        epoch, first = progress.epoch, progress.step
        self.row_metrics.reset()
        collectives.seed_random_layers(self.model, (seed, epoch, rank))
        order = {"rank": rank, "seed": seed, "epoch": epoch, "first": first}
        data = self.training_shard.training(sharding, **order)
        self._set_rate(epoch + first / sharding.steps)
        if not first:
            self.user_hooks.epoch_begin(epoch)
        self.user_hooks.batch_begin(first)
        statistics = collectives.statistics(self.model)
        if first:
            statistics = self._restore_rank_state(len(statistics))
        self.checkpoint_pace.begin(first)
        block = 1 if self.user_hooks.has_batch_hooks else loop.BLOCK
        for step in self.train_loop.run(data, block):
            means = {"loss": self.row_metrics.loss_here()}
            self.heartbeat.send_throttled(epoch=epoch + 1, step=step, means=means)
            self.user_hooks.batch_end(step - 1, self.row_metrics.loss_means)
            if step < sharding.steps:
                if step % loop.BLOCK == 0:
                    self._set_rate(epoch + step / sharding.steps)
                    if self.checkpoint_pace.is_due(step):
                        self._save_within_epoch(progress, step, statistics)
                        self.checkpoint_pace.begin(step)
                self.user_hooks.batch_begin(step)
        collectives.average_statistics(self.model, statistics)

    def _save_within_epoch(
        self, progress: plan.Progress, step: int, statistics: Sequence[npt.NDArray[Any]]
    ) -> None:
        """Write a checkpoint of a step, with what differs between ranks.

        Args:
            progress: Progress before the epoch.
            step: Steps of the epoch so far.
            statistics: Result of ``collectives.statistics`` before the epoch.
        """
        rank_state = array_files.pack_arrays([*self._rank_state(), *statistics])
        rank_states = collectives.gather_bytes(rank_state)
        if hvd.rank() == 0:
            files = {**array_files.save(self.model), **self.user_hooks.save()}
            state = dataclasses.replace(
                progress,
                step=step,
                ranks=hvd.size(),
                rate_factor=self.user_hooks.rate_factor,
                files={**files, plan.RANK_STATES: rank_states},
            )
            with self.heartbeat.long_operation():
                _save(self.training, state, last=False)

    def _restore_rank_state(self, num_statistics: int) -> list[npt.NDArray[Any]]:
        """Restore what differs between ranks within an epoch; return the statistics before it."""
        rank_states = collectives.broadcast_bytes(self.rank_states)
        size = len(rank_states) // hvd.size()
        start = hvd.rank() * size
        arrays = array_files.read_arrays(rank_states[start : start + size])
        end = len(arrays) - num_statistics
        sums, others = self.row_metrics.state, self._unshared_variables()
        for variable, array in zip([*sums, *others], arrays[:end], strict=True):
            variable.assign(array)
        return arrays[end:]

    def _rank_state(self) -> list[npt.NDArray[Any]]:
        """Return copies of all that differs between ranks within an epoch."""
        sums = [np.asarray(variable) for variable in self.row_metrics.state]
        return sums + [keras.ops.convert_to_numpy(v) for v in self._unshared_variables()]

    def _unshared_variables(self) -> list[keras.Variable]:
        """Return the model's variables that differ between ranks within an epoch."""
        return [*self.model.non_trainable_weights, *collectives.random_states(self.model)]

    def _set_rate(self, epoch: float) -> None:
        self.user_hooks.set_rate(self.training.optimizer.rate(epoch, hvd.size()))

    def _validate(self) -> None:
        self.row_metrics.reset()
        for _ in self.test_loop.run(self.validation_shard.validation()):
            self.heartbeat.tick()

    def _best_epoch(
        self, best: plan.BestEpoch, record: plan.EpochRecord, is_last: bool
    ) -> plan.BestEpoch:
        """Return the epoch to publish: the last, or with ``patience`` that of the lowest loss.

        Every rank returns the same epoch, since the losses are means over all ranks.
        """
        loss = record.losses.get("val_loss", record.losses["loss"])
        is_better = is_last if self.training.patience is None else loss < best.loss
        if not is_better:
            return best
        files = array_files.save(self.model) if hvd.rank() == 0 else {}
        digest = collectives.digest(self.model)
        return plan.BestEpoch(epoch=record.epoch, loss=loss, digest=digest, files=files)

    def is_finished(self, progress: plan.Progress) -> bool:
        """Return whether training is complete: last epoch, patience used up, or not finite."""
        patience, first_epoch = self.training.patience, self.training.first_epoch
        last_epoch = first_epoch + self.training.epochs
        best_epoch = max(progress.best.epoch, first_epoch)
        is_out_of_patience = patience is not None and progress.epoch - best_epoch >= patience
        has_reached_end = progress.epoch >= last_epoch or progress.stopped
        return has_reached_end or is_out_of_patience or progress.not_finite

    def times(self, epochs: int) -> plan.RankTimes:
        """Return how all ranks spent their time, on average, in a number of epochs."""
        train, test = self.train_loop, self.test_loop
        seconds = [train.seconds, train.wait_s, float(self.allreduce_wait_s), test.seconds]
        means = (value / hvd.size() for value in collectives.allreduce_sum(seconds))
        names = ("train", "input", "allreduce", "validate")
        kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        max_kibibytes = max(collectives.allgather_int(kibibytes))
        times = dict(zip(names, means, strict=True))
        attempt = self.training.attempt
        return plan.RankTimes(attempt=attempt, epochs=epochs, memory=max_kibibytes * 1024, **times)


@contextlib.contextmanager
def _reader_errors(shard: batches.Shard) -> Iterator[None]:
    """Raise the error that reading the shard raised, and not TensorFlow's error for it."""
    try:
        yield
    except tf.errors.OpError:
        if shard.error:
            raise shard.error from None
        raise


def _train(training: plan.TrainingPlan, heartbeat: channel.HeartbeatClient) -> plan.RankSuccess:
    trainer = _build_trainer(training, heartbeat)
    progress = trainer.start
    first_epoch = progress.epoch
    is_first_rank = hvd.rank() == 0

    def rate(record: plan.EpochRecord, factor: float = 1.0) -> float:
        return training.optimizer.rate(record.epoch - 1, hvd.size()) * factor

    with summaries.SummaryWriter() if is_first_rank else contextlib.nullcontext() as writer:
        if writer:
            writer.graph(trainer.model)
            for record in progress.history:
                writer.epoch(record, rate(record))
        while not trainer.is_finished(progress):
            rate_factor = progress.rate_factor
            progress = trainer.epoch(progress)
            if writer:
                writer.epoch(progress.history[-1], rate(progress.history[-1], rate_factor))
            if is_first_rank and (training.checkpoints or trainer.is_finished(progress)):
                best = progress.best
                is_best_now = best.epoch == progress.epoch
                files = best.files if is_best_now else array_files.save(trainer.model)
                files = {**files, **trainer.user_hooks.save()}
                state = dataclasses.replace(progress, files=files)
                with heartbeat.long_operation():
                    _save(training, state, last=trainer.is_finished(progress))
        logs = writer.files() if writer else {}
    times = trainer.times(progress.epoch - first_epoch)
    best = dataclasses.replace(progress.best, files={})
    progress = dataclasses.replace(progress, best=best, files={})
    if not is_first_rank:  # rank 0 alone reports what is equal on all ranks
        progress = dataclasses.replace(progress, history=(), rows_by_epoch=())
    return plan.RankSuccess(
        rank=hvd.rank(), progress=progress, network=trainer.network, logs=logs, times=times
    )


def _save(training: plan.TrainingPlan, state: plan.Progress, *, last: bool) -> None:
    """Write a checkpoint; only the last checkpoint, which is published, must not fail."""
    try:
        operation = f"write the checkpoint of epoch {state.epoch}"
        write = functools.partial(checkpoints.save, training.work, training.attempt, state)
        retries.call(operation, write, retries.DELAYS_S[-2:] if last else ())
    except OSError as error:
        if last:
            raise
        logger.warning("epoch %d has no checkpoint: %s", state.epoch, error)


@contextlib.contextmanager
def _precision(policy: str) -> Iterator[None]:
    """Make layers that are created in this block compute in one of Keras's dtype policies."""
    outer_policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(outer_policy)


def _read_start(training: plan.TrainingPlan) -> plan.Progress:
    """Read the checkpoint of an earlier attempt, or of the saved model, with their files."""
    if training.resume:
        checkpoint = checkpoints.read(training.work, training.resume)
        if checkpoint is None:
            raise errors.DamagedModel(f"the checkpoint of epoch {training.resume.epoch} is gone")
        return checkpoint
    files = checkpoints.read_start(training.work) if training.starts_from_files else {}
    return plan.Progress(epoch=training.first_epoch, files=files)


def _network_spec(training: plan.TrainingPlan, user_model: keras.Model | None) -> plan.Network:
    """Return the network, completed from the user's model where a user's function made it."""
    if training.model_fn is None:
        return training.network
    network = custom.describe(user_model, training.network)
    if training.first_epoch:
        custom.check_same(training.network, network)
    return network


def _objectives(
    training: plan.TrainingPlan, user_model: keras.Model | None
) -> tuple[plan.Network, list[objectives.Loss], dict[str, list[Any]]]:
    """Return the network, and the loss and the further metrics of each output.

    The network's outputs name the losses. Those that the options do not give are the saved model's,
    or what the user's model was compiled with.

    Raises:
        errors.OptionError: A function made no loss or no metric, or two of one name.
        errors.ModelMismatch: The saved model has a loss of the user's, and none is given.
    """
    network = _network_spec(training, user_model)
    compiled = objectives.compiled(user_model, network.heads) if user_model else ({}, {})
    user_metrics = training.metrics or compiled[1]
    outputs, losses, further_metrics = [], [], {}
    for output in network.heads:
        user_loss = training.losses.get(output.name)
        if user_loss is None and output.loss in ("", plan.CUSTOM):
            user_loss = compiled[0].get(output.name)
        if user_loss is None and output.loss == plan.CUSTOM:
            raise errors.ModelMismatch(
                "the saved model was trained with a loss of your own: give it again, loss=..."
            )
        loss = objectives.resolve_loss(output, user_loss)
        losses.append(objectives.make_loss(output, loss))
        changes: dict[str, Any] = {"loss": objectives.describe_loss(output, loss)}
        if training.model_fn and not output.name and output.weight == 1:
            weights = objectives.compiled_weights(user_model, network.heads)
            changes["weight"] = weights.get("", 1.0)
        outputs.append(dataclasses.replace(output, **changes))
        if output.name in user_metrics:
            output_metrics = objectives.make_metrics(output, user_metrics[output.name])
            further_metrics[output.name] = output_metrics
    names = {
        name: [metric.name for metric in output_metrics]
        for name, output_metrics in further_metrics.items()
    }
    objectives.check_result_names(outputs, names)
    return dataclasses.replace(network, outputs=tuple(outputs)), losses, further_metrics


def _standardize_labels(
    training: plan.TrainingPlan, network: plan.Network, shard: batches.Shard
) -> plan.Network:
    """Return the network with mean and deviation of the numbers that it learns, where asked.

    Raises:
        errors.OptionError: A loss that the user made compares with 0, which the mean moves.
    """
    if not training.standardize_label or any(output.mean for output in network.outputs):
        return network
    for output in network.outputs:
        if output.loss in objectives.UNSCALED_LOSSES:
            raise errors.OptionError(
                f"loss={output.loss} compares with 0, which standardize_label=true moves: set "
                "standardize_label=false"
            )
    mean, deviation = collectives.moments(lambda: (labels for _, labels, *_ in shard.parts()), 1.0)
    outputs, start = [], 0
    for output in network.outputs:
        end = start + output.target_size
        if output.task == plan.REGRESSION:
            scale = tuple(value or 1.0 for value in deviation[start:end])
            output = dataclasses.replace(output, mean=mean[start:end], deviation=scale)
        outputs.append(output)
        start = end
    return dataclasses.replace(network, outputs=tuple(outputs))


def _class_weight(
    training: plan.TrainingPlan, network: plan.Network, shard: batches.Shard
) -> Mapping[int, float]:
    """Return factors of the rows' losses by class; {} where all are 1."""
    if isinstance(training.class_weight, str):
        classes = (labels for _, labels, *_ in shard.parts())
        return objective.balanced_weights(classes, network.heads[0].size)
    return training.class_weight


def _center(shard: batches.Shard) -> npt.NDArray[Any] | None:
    """Return the mean target of some rows of all ranks; None where targets are classes."""
    if not shard.shards.target_size:
        return None
    labels = next(shard.parts())[1]
    sums = collectives.allreduce_sum([*labels.sum(axis=0), len(labels)])
    return np.asarray(sums[:-1]) / sums[-1]


def _optimizer(training: plan.TrainingPlan, ranks: int) -> keras.optimizers.Optimizer:
    """Make the optimizer, with the learning rate of the first epoch."""
    spec = training.optimizer
    rate = spec.rate(training.first_epoch, ranks)
    if training.optimizer_fn is None:
        return registry.optimizer(spec, rate)
    optimizer = training.optimizer_fn()
    if optimizer.built:
        raise errors.OptionError("optimizer= must make a new optimizer each time it is called")
    optimizer.learning_rate = rate
    return optimizer


def _in_precision(
    training: plan.TrainingPlan, user_model: keras.Model | None
) -> keras.Model | None:
    """Return the user's model in the current dtype policy.

    The network that is saved describes ``user_model``, which has its own precision.
    """
    if user_model is None or training.model_fn is None or training.precision == registry.FLOAT32:
        return user_model
    model = training.model_fn()
    model.set_weights(user_model.get_weights())
    return model


def _warn_of_constants(training: plan.TrainingPlan, deviation: Sequence[float]) -> None:
    """Log a warning with the features that have the same value in all training rows."""
    names = training.features if len(training.features) == len(deviation) else ()
    constants = [number for number, value in enumerate(deviation) if value == 0]
    if constants and names and hvd.rank() == 0:  # no names for pictures, whose corners are black
        text = ", ".join(names[number] for number in constants[:10])
        more = ", ..." if len(constants) > 10 else ""
        logger.warning(
            "%s%s: the same value in all training rows, from which nothing is learned", text, more
        )


def _build_trainer(training: plan.TrainingPlan, heartbeat: channel.HeartbeatClient) -> Trainer:
    """Read the shards; build, compile, restore and broadcast the model, equal on all ranks."""
    rank, ranks = hvd.rank(), hvd.size()
    with heartbeat.long_operation():
        dtype = "float64" if training.standardize else registry.FLOAT32
        read_options = {
            "rank": rank,
            "ranks": ranks,
            "on_row_group": heartbeat.tick,
            "dtype": dtype,
        }
        read_options["prefetch"] = bool(tf.config.get_visible_devices("GPU"))
        training_shard = batches.read(training.train, memory=training.cache, **read_options)
        validation_shard = batches.read(
            training.validation,
            memory=training.cache - training_shard.nbytes,
            **read_options,
        )
    keras.utils.set_random_seed(training.seed)
    with heartbeat.long_operation():
        user_model = training.model_fn() if training.model_fn else None
    network, losses, further_metrics = _objectives(training, user_model)
    if training.standardize and not network.mean:
        with heartbeat.long_operation():
            mean, deviation = collectives.moments(
                lambda: (part for part, *_ in training_shard.parts()), training.train.encoding.scale
            )
            _warn_of_constants(training, deviation)
        deviation = tuple(value or 1.0 for value in deviation)
        network = dataclasses.replace(network, mean=mean, deviation=deviation)
    with heartbeat.long_operation():
        network = _standardize_labels(training, network, training_shard)
        class_weight = _class_weight(training, network, training_shard)
    with heartbeat.long_operation(), _precision(training.precision):
        model = registry.build(network, _in_precision(training, user_model))
    if training.sync_batch_norm and ranks > 1:
        collectives.synchronize_batch_norm(model)
    allreduce_wait_s = tf.Variable(0.0, dtype=tf.float64)
    row_metrics = metrics.Metrics(network.heads, further_metrics, _center(training_shard))
    optimizer = _optimizer(training, ranks)
    if training.precision == registry.MIXED_FLOAT16:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    model.compile(
        optimizer=collectives.distributed_optimizer(
            optimizer, allreduce_wait_s, compressed=training.compresses_gradients
        ),
    )
    model.optimizer.build(model.trainable_variables)
    start = training.resume or plan.Progress(epoch=training.first_epoch)
    if rank == 0:
        with heartbeat.long_operation():
            start = _read_start(training)
            array_files.restore(model, start.files)
    files, start = start.files, dataclasses.replace(start, files={})  # which may be large
    collectives.broadcast(model)
    custom.finalize_layers(model)
    steps = objective.Objective(model, network.heads, losses, row_metrics, class_weight)
    return Trainer(
        training=training,
        network=network,
        model=model,
        row_metrics=row_metrics,
        training_shard=training_shard,
        validation_shard=validation_shard,
        train_loop=loop.Loop(steps.train_step),
        test_loop=loop.Loop(steps.test_step),
        allreduce_wait_s=allreduce_wait_s,
        user_hooks=hooks.Hooks(training, model, files.get(plan.CALLBACKS, b"")),
        heartbeat=heartbeat,
        start=start,
        rank_states=files.get(plan.RANK_STATES, b""),
        checkpoint_pace=pace.Pace(training.checkpoint_every),
    )
