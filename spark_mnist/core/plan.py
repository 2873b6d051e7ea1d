"""The values that cross between driver and ranks: picklable, no TensorFlow, no Spark."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from spark_mnist.core import channel, sharding

WEIGHTS = "weights.npz"
OPTIMIZER = "optimizer.npz"
"""The files of a checkpoint."""
LOSS_SCALE = "loss_scale.npz"
"""One more, of a model that was trained in ``mixed_float16``."""
LOGS = "logs/"
"""Where a version's TensorBoard files lie."""
CUSTOM = "own"
"""The name of a network that the user made."""

WHOLE = re.compile(r"0|-?[1-9][0-9]*")
"""A whole number as text, in its only form."""
ModelFn = Callable[[], Any]
"""The user's function that makes a Keras model."""
Rows = tuple[tuple[int, int], ...]
"""For each rank, the rows that it trained and validated on in one epoch."""


@dataclass(frozen=True, kw_only=True)
class InputSpec:
    """What a model reads of a row, and what its classes are called."""

    features: tuple[str, ...] = ("image",)
    """One column that holds all numbers of a row, or a column for each of them."""
    label: str = "label"
    pixels: bool = True
    """Whether the numbers are brightnesses: bytes are divided by 255, floats lie in 0..1."""
    width: int = 784
    """Numbers of a row."""
    classes: int = 10
    names: tuple[str, ...] = ()
    """What the classes are called, by number; empty where the numbers are their names."""
    text_in_bytes: bool = False
    """Whether brightnesses that are text, each in a column of its own, lie in 0..255."""

    @property
    def has_integer_names(self) -> bool:
        """Whether the classes have names that are whole numbers, say 1, 2, 3."""
        return bool(self.names) and all(WHOLE.fullmatch(name) for name in self.names)

    @property
    def class_names(self) -> tuple[str, ...]:
        """What the classes are called, be it by their numbers."""
        return self.names or tuple(str(number) for number in range(self.classes))


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network, as the store describes it."""

    name: str
    """Key of ``registry.REGISTRY``, or ``CUSTOM``."""
    inputs: int
    """Numbers of one row."""
    classes: int
    hidden: tuple[int, ...] = ()
    """Units of the dense hidden layers, first to last."""
    dropout: float = 0.0
    """Share of the last hidden units left out while training."""
    mean: tuple[float, ...] = ()
    """Of each feature of the training rows, where features are standardised."""
    deviation: tuple[float, ...] = ()
    """The standard deviation of each, as ``mean``."""
    config: Mapping[str, Any] | None = None
    """Keras configuration of the user's own model."""
    custom: tuple[str, ...] = ()
    """Objects in it that are not Keras's own: only the user's function makes them."""
    logits: bool = False
    """Whether the user's own model ends without a softmax."""


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """How weights follow gradients, for one rank."""

    name: str
    """Key of ``registry.OPTIMIZERS``."""
    learning_rate: float
    """For one rank: never scaled here, nor in the store."""
    warmup_epochs: int = 0
    """Epochs in which the rate climbs from one rank's to all ranks'."""
    schedule: str = "constant"
    """How the rate goes on: a value of the option ``lr_schedule``."""

    def rate(self, epoch: float, ranks: int) -> float:
        """The rate after so many epochs of the model's life, parts of an epoch included."""
        climbed = min(1.0, epoch / self.warmup_epochs) if self.warmup_epochs else 1.0
        return self.learning_rate * (1 + (ranks - 1) * climbed) * self._decay(epoch)

    def _decay(self, epoch: float) -> float:
        name, *words = self.schedule.split(":")
        numbers = [float(word) for word in words]
        if name == "cosine":
            return (1 + math.cos(math.pi * min(1.0, epoch / numbers[0]))) / 2
        if name == "exponential":
            return math.pow(numbers[0], epoch)
        if name == "step":
            return math.pow(numbers[1], epoch // numbers[0])
        return 1.0


@dataclass(frozen=True)
class Encoding:
    """How the numbers of one row lie in bytes, and what makes them the network's."""

    dtype: str
    """``uint8``, or ``float32`` or ``float64`` in little-endian order."""
    scale: float
    """What a stored number is divided by."""
    width: int
    """Numbers of a row."""

    @property
    def row_bytes(self) -> int:
        """Size of a packed row."""
        return self.width * int(np.dtype(self.dtype).itemsize)

    def unpack(self, rows: Iterable[bytes]) -> npt.NDArray[np.generic]:
        """Join packed rows to one array ``[B, W]``."""
        return np.frombuffer(b"".join(rows), self.dtype).reshape(-1, self.width)


@dataclass(frozen=True, kw_only=True)
class Shards:
    """Rows in Parquet: file ``i``, of one row group, belongs to rank ``i % ranks``."""

    urls: tuple[str, ...]
    """Files in order; none when there are no rows."""
    rows: int
    """Rows of all files, as their footers say."""
    encoding: Encoding
    """Of the features of a row."""


@dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """One row of the table that ``fit`` returns. Values are means over rows of all ranks."""

    epoch: int
    """Counted from 1, over all fits of the model."""
    losses: dict[str, float]
    metrics: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class BestEpoch:
    """The epoch that would be published now."""

    epoch: int = 0
    """0 before the first."""
    loss: float = math.inf
    """The least so far, by which ``patience`` judges."""
    digest: str = ""
    """sha256 over all weights and optimizer variables of that epoch; equal on all ranks."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Its checkpoint, on rank 0."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a fit is: what all ranks need to go on after an epoch."""

    epoch: int
    """Epochs of the model's life."""
    history: tuple[EpochRecord, ...] = ()
    """Of this fit."""
    read: tuple[Rows, ...] = ()
    """For each epoch of this fit, the rows that each rank trained and validated on."""
    best: BestEpoch = field(default_factory=BestEpoch)
    not_finite: bool = False
    """Whether the last epoch ended with a loss or a weight that is no number."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """The checkpoint of ``epoch``; none before the first."""


@dataclass(frozen=True, kw_only=True)
class Slot:
    """What is decided for a rank once the agents of all ranks are there."""

    rank: int
    environment: Mapping[str, str]
    """Horovod's settings: rank, size, the rendezvous, the network interface."""
    gpus: tuple[str, ...] = ()
    """Addresses of the GPUs that Spark gave the rank's task."""


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """All that a rank needs to know."""

    network: Network
    optimizer: Optimizer
    sharding: sharding.RowSharding
    train: Shards
    validation: Shards
    first_epoch: int
    """Epochs that the saved model already has."""
    epochs: int
    """Epochs to train now, at most."""
    seed: int
    threads: int | None = 1
    """Cores that one rank may use; None leaves TensorFlow as it is."""
    cache: int
    """Bytes of features that one rank keeps in memory; more are read anew in every epoch."""
    precision: str = "float32"
    """Keras' dtype policy in which ranks compute."""
    compressed: bool = False
    """Whether gradients travel in half their precision."""
    standardize: bool = False
    """Whether to learn mean and deviation of the features before training."""
    features: tuple[str, ...] = ()
    """The names of the features, for messages."""
    sync_batch_norm: bool = False
    """Whether layers that normalise a batch do so over all ranks."""
    patience: int | None = None
    """Epochs without a better loss after which training stops; None never stops it."""
    inbox: channel.Address | None = None
    """Where the driver hears of progress."""
    heartbeat_timeout: float = 60.0
    """Seconds without the driver after which a rank ends itself."""
    work: str
    """URL of the store that takes checkpoints, and has the one to start from."""
    checkpoints: bool = True
    """Whether to write one after each epoch, and not at the end alone."""
    attempt: int = 0
    """Which start of the ranks in this fit this is, from 0."""
    resume: Progress | None = None
    """Where an earlier attempt of this fit was; None where there was none. Its files lie in
    ``work``."""
    starts_from_files: bool = False
    """Whether ``work`` has a saved model's checkpoint to start from."""
    model_fn: ModelFn | None = None
    """The user's function that makes the network."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """What a rank raised."""

    type: str
    message: str
    traceback: str
    time: float
    """Seconds since 1970 on the rank's clock."""
    collective: bool
    """Raised by Horovod because another rank went away: an effect, not the cause."""


@dataclass(frozen=True, kw_only=True)
class RankTimes:
    """Where the time of the ranks went since they started; seconds, means over the ranks."""

    attempt: int
    """Which start of the ranks this was, from 0."""
    epochs: int
    """In that time."""
    train: float
    """In training steps, waiting included."""
    input: float
    """In training steps, waiting for rows."""
    allreduce: float
    """In training steps, from a rank's last gradient until all ranks' are averaged."""
    validate: float
    memory: int
    """Most bytes that a rank's process had in memory; of the one that had most."""


@dataclass(frozen=True, kw_only=True)
class RankReport:
    """What a rank returns."""

    rank: int
    failure: Failure | None = None
    progress: Progress | None = None
    """How the fit ended; without files, which rank 0 writes, and with history from rank 0 alone."""
    network: Network | None = None
    """What was trained, with all that was learned of it on the ranks."""
    logs: Mapping[str, bytes] = field(default_factory=dict)
    """TensorBoard files, from rank 0."""
    times: RankTimes | None = None
