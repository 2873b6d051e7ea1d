"""What one rank does: build, restore, broadcast, train, report. Runs in a process of its own.

A rank never lets an exception out: it reports what was raised, so that the driver can name the
rank that failed first and not the ones that Horovod stopped after it.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Sequence
from typing import Any

import horovod.tensorflow as hvd
import keras
import tensorflow as tf

from spark_mnist import averaging, batches, checkpoint, events, networks, plan

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


# Keras ships no types, so mypy takes its classes for Any; hence the two ignores below.
class RowMean(keras.metrics.Metric):  # type: ignore[misc]
    """The mean of a value over real rows, kept as sum and count so that ranks can be merged."""

    def __init__(self, name: str, value: Any) -> None:
        super().__init__(name=name)
        self.value = value
        self.sum = self.add_variable((), "zeros", dtype="float64", name="sum")
        self.count = self.add_variable((), "zeros", dtype="float64", name="count")

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        """Count rows whose weight is not zero once each."""
        real = tf.cast(sample_weight > 0, tf.float64)
        self.sum.assign_add(tf.reduce_sum(tf.cast(self.value(y_true, y_pred), tf.float64) * real))
        self.count.assign_add(tf.reduce_sum(real))

    def result(self) -> Any:
        """Mean over the rows counted so far on this rank."""
        return tf.math.divide_no_nan(self.sum.value, self.count.value)


class Announce(keras.callbacks.Callback):  # type: ignore[misc]
    """Tells the driver how far this rank is, a few times a second at most."""

    def __init__(self, outbox: events.Outbox, steps: int) -> None:
        super().__init__()
        self.outbox = outbox
        self.steps = steps
        self.epoch = 0
        self.next = 0.0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Send the step and the running loss."""
        if time.monotonic() >= self.next:
            self.next = time.monotonic() + 0.2
            step = min(batch + 1, self.steps)
            self.outbox.send(epoch=self.epoch, step=step, loss=float(logs["loss"]))


def _train(training: plan.TrainingPlan) -> plan.RankReport:
    rank, ranks = hvd.rank(), hvd.size()
    train = batches.read(training.train, rank=rank, ranks=ranks)
    held_out = batches.read(training.validation, rank=rank, ranks=ranks)
    keras.utils.set_random_seed(training.seed)
    meters = (
        RowMean("cross_entropy", keras.losses.sparse_categorical_crossentropy),
        RowMean("accuracy", keras.metrics.sparse_categorical_accuracy),
    )
    model = _model(training, ranks, meters)
    outbox = events.Outbox(training.inbox if rank == 0 else None)
    announce = Announce(outbox, training.world.steps)
    history = []
    for epoch in range(training.first_epoch, training.first_epoch + training.epochs):
        announce.epoch = epoch + 1
        averaging.seed_dropout(model, (training.seed, epoch, rank))
        data = batches.training(train, training.world, rank=rank, seed=training.seed, epoch=epoch)
        model.fit(data, verbose=0, callbacks=[announce])
        learned = _means(*meters)
        if training.validation.rows:
            model.reset_metrics()
            if len(held_out):
                model.evaluate(batches.validation(held_out), verbose=0)
            learned |= {f"val_{name}": value for name, value in _means(*meters).items()}
        history.append(_record(epoch + 1, learned))
        outbox.send(epoch=epoch + 1, step=training.world.steps, done=True, **learned)
    return plan.RankReport(
        rank=rank,
        history=tuple(history) if rank == 0 else (),
        weights_digest=averaging.digest(model),
        files=checkpoint.save(model) if rank == 0 else {},
    )


def _model(training: plan.TrainingPlan, ranks: int, meters: Sequence[RowMean]) -> keras.Model:
    """Build, compile, restore and broadcast: the same weights on every rank when it returns."""
    spec = training.optimizer
    optimizer = networks.optimizer(spec, spec.learning_rate * ranks)
    model = networks.build(training.network)
    model.compile(
        optimizer=averaging.averaged(optimizer),
        loss="sparse_categorical_crossentropy",
        weighted_metrics=list(meters),
        steps_per_execution=min(STEPS_PER_CALL, training.world.steps),
        jit_compile=False,  # Horovod's operations have no XLA kernels
    )
    model.optimizer.build(model.trainable_variables)
    if training.files and hvd.rank() == 0:
        checkpoint.restore_weights(model, training.files)
        checkpoint.restore_optimizer(model, training.files)
    averaging.broadcast(model)
    return model


def _means(loss: RowMean, accuracy: RowMean) -> dict[str, float]:
    """Loss and accuracy over the rows of all ranks: sums over rows divided by rows."""
    sums = averaging.total([float(v.numpy()) for v in (loss.sum, accuracy.sum, loss.count)])
    return {"loss": sums[0] / sums[2], "accuracy": sums[1] / sums[2]}


def _record(epoch: int, means: dict[str, float]) -> plan.EpochRecord:
    losses = {name: value for name, value in means.items() if name.endswith("loss")}
    metrics = {name: value for name, value in means.items() if name not in losses}
    return plan.EpochRecord(epoch=epoch, losses=losses, metrics=metrics)
