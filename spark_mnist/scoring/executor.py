"""Scoring inside a Python worker of Spark: the model, and its batches. Runs on: Spark task.

TensorFlow is imported once a worker, with the first batch. Shape letters: B = rows of a batch,
K = numbers of a target, U = units of all outputs, W = numbers of a row.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import cloudpickle
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from spark_mnist.cluster import task
from spark_mnist.core import keras_extras, plan
from spark_mnist.data import arrow_batches
from spark_mnist.scoring import broadcast

logger = logging.getLogger(__name__)

Model = Callable[[npt.NDArray[np.generic]], npt.NDArray[np.float32]]


@dataclass(frozen=True)
class ModelSpec:
    """All that executors need to make a model; equal to every other of the same content."""

    digest: str
    network: plan.Network = field(compare=False)
    model_fn: bytes = field(compare=False)
    """The user's function, pickled by the driver of this job."""
    weights: broadcast.Shipment = field(compare=False)
    encoding: plan.Encoding = field(compare=False)
    threads: int = field(compare=False)
    losses: bytes = field(compare=False, default=b"")
    """The user's losses by name of the output, pickled; empty where no loss is asked for."""

    @property
    def units(self) -> int:
        """Numbers of all outputs of a row."""
        return sum(output.units for output in self.network.heads)


@contextlib.contextmanager
def _hold_back_native_stderr() -> Iterator[None]:
    """Hold back what native code prints, and print it where an error follows.

    TensorFlow 2.21 prints lines that no setting turns off, on the terminal of a local session.
    """
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as buffer:
        os.dup2(buffer.fileno(), 2)
        try:
            yield
        except BaseException:
            buffer.seek(0)
            os.write(stderr, buffer.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def scores(
    batches: Iterable[tuple[pa.Array, ...]],
    spec: ModelSpec,
    *,
    read: Callable[[pa.Array], npt.NDArray[np.generic]],
    convert: Callable[[npt.NDArray[np.float32]], pa.Array],
    batch_size: int,
    drops_bad_rows: bool,
) -> Iterator[pa.Array]:
    """Score the batches of one partition.

    Args:
        batches: Features, in one column.
        spec: Specification of the model.
        read: Function that makes the features of a batch an array ``[B, W]``.
        convert: Function that makes outputs ``[B, U]`` a value for each row.
        batch_size: Rows of one call of the model.
        drops_bad_rows: Whether a row that is null gets null.
    """
    model = _model(spec, _gpu())
    for (rows,) in batches:
        usable_rows = rows.drop_null() if drops_bad_rows else rows
        features = read(usable_rows)
        outputs = np.empty((len(features), spec.units), np.float32)
        for start in range(0, len(features), batch_size):
            part = slice(start, start + batch_size)
            outputs[part] = model(features[part])
        values = convert(outputs)
        has_all_rows = len(usable_rows) == len(rows)
        yield values if has_all_rows else arrow_batches.spread(values, rows.is_valid())


def outputs_and_losses(
    batches: Iterable[tuple[pa.Array, ...]],
    spec: ModelSpec,
    *,
    read: Callable[[pa.Array], npt.NDArray[np.generic]],
    convert: Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float64]],
    batch_size: int,
) -> Iterator[pa.Array]:
    """Score the batches of one partition, and compute the loss of each output of each row.

    Args:
        batches: Features and targets, in a column each.
        spec: Specification of the model, with its losses.
        read: Function that makes the features of a batch an array ``[B, W]``.
        convert: Function that makes outputs ``[B, U]`` those in the units of the labels.
        batch_size: Rows of one call of the model.

    Yields:
        For each row the outputs, then the loss of each output; NaN where there is none.
    """
    model, row_losses = _model(spec, _gpu()), _row_losses(spec)
    num_values = spec.units + len(spec.network.heads)
    for rows, targets in batches:
        features = read(rows)
        labels = arrow_batches.numbers(targets).reshape(len(rows), -1)
        values = np.empty((len(rows), num_values))
        for start in range(0, len(features), batch_size):
            part = slice(start, start + batch_size)
            outputs = model(features[part])
            values[part] = np.hstack([convert(outputs), row_losses(outputs, labels[part])])
        yield arrow_batches.lists(values)


def _row_losses(
    spec: ModelSpec,
) -> Callable[[npt.NDArray[np.float32], npt.NDArray[np.float64]], npt.NDArray[np.float64]]:
    """Return a function of outputs ``[B, U]`` and targets ``[B, K]`` that gives losses."""
    from spark_mnist.networks import objectives

    heads, custom_losses = spec.network.heads, cloudpickle.loads(spec.losses)
    losses = [
        None
        if output.loss == plan.CUSTOM and output.name not in custom_losses
        else objectives.make_loss(output, custom_losses.get(output.name))
        for output in heads
    ]
    ends = np.cumsum([output.units for output in heads])[:-1]

    def row_losses(
        outputs: npt.NDArray[np.float32], labels: npt.NDArray[np.float64]
    ) -> npt.NDArray[np.float64]:
        targets = objectives.targets(heads, labels)
        columns = [
            np.full(len(outputs), np.nan) if loss is None else np.asarray(loss(target, values))
            for loss, target, values in zip(
                losses, targets, np.split(outputs, ends, axis=1), strict=True
            )
        ]
        return np.stack(columns, axis=1).astype(np.float64)

    return row_losses


def _gpu() -> str | None:
    """Return the address of the GPU that Spark gave this task; None where it gave none."""
    return next(iter(task.gpus()), None)


def _device(gpu: str | None) -> str | None:
    """Return TensorFlow's name of a GPU; None where TensorFlow should choose.

    All GPUs of the host stay visible, since a worker's next task may have another.

    Args:
        gpu: Address of the GPU: its number on the host, or what ``CUDA_VISIBLE_DEVICES`` lists.
    """
    import tensorflow as tf

    devices = tf.config.list_logical_devices("GPU")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    addresses = visible.split(",") if visible else [*map(str, range(len(devices)))]
    by_address = dict(zip(addresses, devices, strict=False))
    if gpu is not None and gpu not in by_address:
        logger.warning(
            "Spark gave this task GPU %s on %s, and TensorFlow sees %s: it scores where it chooses",
            *(gpu, socket.gethostname(), ", ".join(by_address) or "none"),
        )
    return by_address[gpu].name if gpu in by_address else None


@functools.lru_cache(maxsize=2)
def _model(spec: ModelSpec, gpu: str | None) -> Model:
    """Build the model, once for each Python worker and GPU.

    Spark uses a worker again for later tasks.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")  # other workers use the GPU, too
    with _hold_back_native_stderr(), keras_extras.hidden():
        import tensorflow as tf

    from spark_mnist.networks import array_files, objectives, registry

    with contextlib.suppress(RuntimeError):  # already running: another model came first
        tf.config.threading.set_intra_op_parallelism_threads(spec.threads)
        tf.config.threading.set_inter_op_parallelism_threads(spec.threads)
    files, device = {plan.WEIGHTS: spec.weights.unpack()}, _device(gpu)
    with tf.device(device):
        model = array_files.build_model(spec.network, files, cloudpickle.loads(spec.model_fn))
    encoding = spec.encoding

    def call(batch: tf.Tensor) -> tf.Tensor:
        dtype = registry.input_dtype(spec.network)
        values = model(registry.inputs(batch, encoding, dtype), training=False)
        return tf.concat(objectives.by_output(spec.network.heads, values), axis=1)

    signature = [tf.TensorSpec((None, encoding.width), encoding.dtype)]
    predict = tf.function(call, input_signature=signature)

    def predict_array(batch: npt.NDArray[np.generic]) -> npt.NDArray[np.float32]:
        with tf.device(device):
            return np.asarray(predict(batch))

    return predict_array
