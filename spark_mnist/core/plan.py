"""Values that driver and ranks exchange: picklable, without TensorFlow and Spark.

Runs on: driver, rank, Spark task.
"""

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
"""Names of a checkpoint's files."""
LOSS_SCALE = "loss_scale.npz"
"""Name of one more file, for a model that was trained in ``mixed_float16``."""
CALLBACKS = "callbacks.npz"
"""Name of a checkpoint's file with the state of the user's callbacks."""
RANK_STATES = "ranks.bin"
"""Name of a file of a checkpoint within an epoch: what differs between ranks, as equal parts."""
LOGS = "logs/"
"""Folder of a version's TensorBoard files."""
CUSTOM = "own"
"""Name of a network, loss or optimizer that the user made."""
CLASSIFICATION, BINARY = "classification", "binary"
MULTILABEL, REGRESSION = "multilabel", "regression"
"""Tasks: one of several classes, one of two, any of several labels, or numbers."""
TASKS = (CLASSIFICATION, BINARY, MULTILABEL, REGRESSION)
CLASS_TASKS = (CLASSIFICATION, BINARY)
"""Tasks whose label is one class of a row."""
THRESHOLD = 0.5
"""Probability above which a label, or the second of two classes, is predicted."""
BALANCED = "balanced"
"""Class weights that give every class the same weight in the loss."""

INTEGER_PATTERN = re.compile(r"0|-?[1-9][0-9]*")
"""Pattern of an integer as text, without leading zeros or a plus sign."""
ModelFn = Callable[[], Any]
"""The user's function that makes a Keras model, an optimizer, metrics or callbacks."""
RowsByRank = tuple[tuple[int, int], ...]
"""Numbers of rows that each rank trained and validated on in one epoch."""


@dataclass(frozen=True, kw_only=True)
class Input:
    """One of several inputs of a network, and the columns that it reads."""

    name: str
    """Name of the model's input."""
    features: tuple[str, ...]
    """One column that holds all numbers of a row, or one column for each number."""
    pixels: bool = False
    """Whether the column holds bytes, which are divided by 255."""
    width: int
    """How many numbers a row has."""
    whole: bool = False
    """Whether the numbers must be whole, as the model's input has an integer dtype."""
    categories: int = 0
    """Number of categories of the Embedding that reads the numbers; 0 where none does."""


@dataclass(frozen=True, kw_only=True)
class InputSpec:
    """Columns and numbers that a model reads of a row, and the names of its classes."""

    features: tuple[str, ...] = ("image",)
    """One column that holds all numbers of a row, or one column for each number."""
    label: str = "label"
    pixels: bool = True
    """Whether the numbers are brightnesses: bytes are divided by 255, floats lie in 0..1."""
    width: int = 784
    """How many numbers a row has."""
    classes: int = 10
    names: tuple[str, ...] = ()
    """Names of the classes, by number; empty where the numbers are the names."""
    text_in_bytes: bool = False
    """Whether brightnesses that are text, one in each column, lie in 0..255."""
    inputs: tuple[Input, ...] = ()
    """Inputs of a network that has several; ``features`` and ``width`` are then those of all."""
    whole: bool = False
    """Whether the numbers must be whole, as the model's input has an integer dtype."""
    categories: int = 0
    """Number of categories of the Embedding that reads the numbers; 0 where none does."""

    @property
    def has_integer_names(self) -> bool:
        """Return whether the classes have names that are integers, for example 1, 2, 3."""
        return bool(self.names) and all(INTEGER_PATTERN.fullmatch(name) for name in self.names)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes; their numbers as text where they have no names."""
        return self.names or tuple(str(number) for number in range(self.classes))

    @property
    def output(self) -> Output:
        """The one output that learns the classes, for networks without ``outputs``."""
        return Output(size=self.classes, label=self.label, names=self.names)


@dataclass(frozen=True, kw_only=True)
class Output:
    """Output of a network: what it learns, from which column, and with which loss."""

    task: str = CLASSIFICATION
    size: int
    """Number of classes, of labels, or of numbers; 2 for a binary output."""
    name: str = ""
    """Name of the model's output; empty for a model with one output."""
    label: str = "label"
    """Column that the output learns."""
    names: tuple[str, ...] = ()
    """Names of the classes or labels, by number; empty where the numbers are the names."""
    loss: str = ""
    """Keras's name of the loss, or ``CUSTOM``; empty for the default of the task."""
    weight: float = 1.0
    """Factor of the loss in the sum over all outputs."""
    logits: bool = False
    """Whether the user's own model ends without the activation that makes probabilities."""
    mean: tuple[float, ...] = ()
    """Mean of each number over the training rows; empty where labels are not standardized."""
    deviation: tuple[float, ...] = ()
    """Standard deviation of each number over the training rows; empty as ``mean`` is."""

    @property
    def units(self) -> int:
        """Numbers that the network gives for a row: one for a binary output."""
        return 1 if self.task == BINARY else self.size

    @property
    def target_size(self) -> int:
        """How many numbers a row's target has: a class is one number."""
        return 1 if self.task in CLASS_TASKS else self.size

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes or labels; their numbers as text where they have no names."""
        return self.names or tuple(str(number) for number in range(self.size))

    @property
    def has_integer_names(self) -> bool:
        """Return whether the classes have names that are integers, for example 1, 2, 3."""
        return bool(self.names) and all(INTEGER_PATTERN.fullmatch(name) for name in self.names)

    def prefixed(self, name: str) -> str:
        """Return a name of this output's: ``loss``, or ``price_loss`` of an output ``price``."""
        return f"{self.name}_{name}" if self.name else name


@dataclass(frozen=True, kw_only=True)
class Network:
    """Description of a network, as the store keeps it."""

    name: str
    """Key of ``registry.REGISTRY``, or ``CUSTOM``."""
    inputs: int
    """Numbers of one row."""
    classes: int
    """Number of classes; for other tasks and several outputs, the sum of the outputs' sizes."""
    hidden: tuple[int, ...] = ()
    """Units of the dense hidden layers, first to last."""
    dropout: float = 0.0
    """Share of the last hidden units that training leaves out."""
    mean: tuple[float, ...] = ()
    """Mean of each feature over the training rows; empty where features are not standardized."""
    deviation: tuple[float, ...] = ()
    """Standard deviation of each feature over the training rows; empty as ``mean`` is."""
    config: Mapping[str, Any] | None = None
    """Keras configuration of the user's own model."""
    custom: tuple[str, ...] = ()
    """Objects in ``config`` that are not Keras's own: only the user's function makes them."""
    outputs: tuple[Output, ...] = ()
    """Outputs, in order; empty for one output that learns classes by their cross-entropy."""
    parts: tuple[tuple[str, int], ...] = ()
    """Name and numbers of a row of each input; empty for a network with one input."""

    @property
    def heads(self) -> tuple[Output, ...]:
        """Outputs of the network, also where ``outputs`` is empty."""
        return self.outputs or (Output(size=self.classes),)


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """An optimizer and its learning rate over the epochs."""

    name: str
    """Key of ``registry.OPTIMIZERS``, or ``CUSTOM``."""
    learning_rate: float
    """Learning rate for one rank: never scaled here, nor in the store."""
    warmup_epochs: int = 0
    """Epochs in which the rate climbs from that of one rank to that of all ranks."""
    schedule: str = "constant"
    """Course of the rate over the epochs: a value of the option ``lr_schedule``."""
    clipnorm: float | None = None
    """Largest norm of each variable's gradient; None leaves gradients as they are."""
    accumulate_steps: int = 1
    """Number of steps whose mean gradient updates the weights once."""

    def rate(self, epoch: float, ranks: int) -> float:
        """Return the learning rate at a point of the model's life.

        Args:
            epoch: Epochs since the model's life began, parts of an epoch included.
            ranks: Number of ranks.
        """
        warmup_share = min(1.0, epoch / self.warmup_epochs) if self.warmup_epochs else 1.0
        return self.learning_rate * (1 + (ranks - 1) * warmup_share) * self._decay(epoch)

    def _decay(self, epoch: float) -> float:
        name, *arguments = self.schedule.split(":")
        numbers = [float(argument) for argument in arguments]
        if name == "cosine":
            return (1 + math.cos(math.pi * min(1.0, epoch / numbers[0]))) / 2
        if name == "exponential":
            return math.pow(numbers[0], epoch)
        if name == "step":
            return math.pow(numbers[1], epoch // numbers[0])
        return 1.0


@dataclass(frozen=True)
class Encoding:
    """Layout of the numbers of one row in bytes, and their scale."""

    dtype: str
    """``uint8``, or ``float32``, ``float64`` or ``int64`` in little-endian order."""
    scale: float
    """Divisor that turns a stored number into the network's."""
    width: int
    """How many numbers a row has; how many bytes, where there are ``parts``."""
    parts: tuple[tuple[str, Encoding], ...] = ()
    """Name and encoding of each of several inputs, whose bytes follow each other."""

    @property
    def row_bytes(self) -> int:
        """Bytes of a packed row."""
        return self.width * int(np.dtype(self.dtype).itemsize)

    def unpack(self, rows: Iterable[bytes]) -> npt.NDArray[np.generic]:
        """Join packed rows into one array ``[B, W]``: B rows of W numbers."""
        return np.frombuffer(b"".join(rows), self.dtype).reshape(-1, self.width)


@dataclass(frozen=True, kw_only=True)
class Shards:
    """Rows in Parquet files of one row group each: file ``i`` belongs to rank ``i % ranks``."""

    urls: tuple[str, ...]
    """URLs of the files, in order; empty where there are no rows."""
    rows: int
    """Number of rows of all files, as their footers say."""
    encoding: Encoding
    """Encoding of the features of a row."""
    target_size: int = 0
    """How many numbers a row's target has, as doubles; 0 where it is one class, an integer."""
    weighted: bool = False
    """Whether each row has a weight in the loss."""

    @property
    def label_bytes(self) -> int:
        """Bytes of a row beside its features: its target and its weight."""
        return 8 * self.target_size + 8 * self.weighted


@dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """One row of the table that ``fit`` returns; values are means over the rows of all ranks."""

    epoch: int
    """Number of the epoch, from 1, over all fits of the model."""
    losses: dict[str, float]
    """Mean losses by name; those of validation rows begin with ``val_``."""
    metrics: dict[str, float]
    """Metrics by name, likewise."""


@dataclass(frozen=True, kw_only=True)
class BestEpoch:
    """The best epoch so far, which would be published now."""

    epoch: int = 0
    """Number of the epoch; 0 before the first."""
    loss: float = math.inf
    """Lowest loss so far, by which ``patience`` judges."""
    digest: str = ""
    """SHA-256 of all weights and optimizer variables of that epoch; equal on all ranks."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Checkpoint of that epoch, on rank 0."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """State of a fit at a checkpoint: the values that all ranks need to go on."""

    epoch: int
    """Number of whole epochs of the model's life."""
    step: int = 0
    """Number of steps taken in the epoch that follows."""
    ranks: int = 0
    """Number of ranks that took these steps; 0 where there are none."""
    history: tuple[EpochRecord, ...] = ()
    """Records of the epochs of this fit."""
    rows_by_epoch: tuple[RowsByRank, ...] = ()
    """Numbers of rows that each rank trained and validated on, for each epoch of this fit."""
    best: BestEpoch = field(default_factory=BestEpoch)
    stopped: bool = False
    """Whether a callback of the user ended the training."""
    rate_factor: float = 1.0
    """Factor of the learning rate that callbacks of the user have set."""
    not_finite: bool = False
    """Whether the last epoch ended with a loss or a weight that is not finite."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Checkpoint of ``epoch`` and ``step``; empty before the first."""


@dataclass(frozen=True, kw_only=True)
class Slot:
    """Place of one rank in a fit, which is assigned once the agents of all ranks are there."""

    rank: int
    environment: Mapping[str, str]
    """Horovod's settings: rank, size, rendezvous, network interface."""
    gpus: tuple[str, ...] = ()
    """Addresses of the GPUs that Spark gave the rank's task."""


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """All values that a rank needs for training."""

    network: Network
    optimizer: Optimizer
    sharding: sharding.RowSharding
    train: Shards
    validation: Shards
    first_epoch: int
    """Number of epochs that the saved model already has."""
    epochs: int
    """Most epochs to train in this fit."""
    seed: int
    threads: int | None = 1
    """Number of cores that one rank may use; None keeps TensorFlow's default."""
    cache: int
    """Bytes that a rank's rows may take in memory; a larger shard is read again in every epoch."""
    precision: str = "float32"
    """Keras's dtype policy in which ranks compute."""
    compresses_gradients: bool = False
    """Whether ranks exchange gradients in half precision."""
    standardize: bool = False
    """Whether to compute mean and deviation of the features before training."""
    features: tuple[str, ...] = ()
    """Names of the features, for messages."""
    sync_batch_norm: bool = False
    """Whether batch normalization layers normalize over the batches of all ranks."""
    patience: int | None = None
    """Epochs without a better loss after which training stops; None means never."""
    driver_address: channel.Address | None = None
    """Address of the driver's ``HeartbeatServer``."""
    heartbeat_timeout: float = 60.0
    """Seconds without contact to the driver after which a rank ends itself."""
    work: str
    """URL of the store for checkpoints, which also has the one to start from."""
    checkpoints: bool = True
    """Whether to write a checkpoint after each epoch, and not only at the end."""
    checkpoint_every: float = math.inf
    """Seconds between checkpoints within an epoch."""
    attempt: int = 0
    """Number of this start of the ranks in the fit, from 0."""
    resume: Progress | None = None
    """Progress of an earlier attempt of this fit, with files in ``work``; None without progress."""
    starts_from_files: bool = False
    """Whether ``work`` has a saved model's checkpoint to start from."""
    model_fn: ModelFn | None = None
    """The user's function that makes the network, if any."""
    standardize_label: bool = False
    """Whether to compute mean and deviation of numbers to predict before training."""
    class_weight: str | Mapping[int, float] = field(default_factory=dict)
    """``BALANCED``, or factors of the training rows' losses by class."""
    losses: Mapping[str, Any] = field(default_factory=dict)
    """The user's own losses, or functions that make them, by name of the output."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """Further metrics, names or functions that make them, by name of the output."""
    optimizer_fn: ModelFn | None = None
    """The user's function that makes the optimizer, if any."""
    callbacks_fn: ModelFn | None = None
    """The user's function that makes Keras callbacks, if any."""


@dataclass(frozen=True, kw_only=True)
class RankTimes:
    """Seconds that the ranks spent in each activity since their start; means over the ranks."""

    attempt: int
    """Number of that start of the ranks in the fit, from 0."""
    epochs: int
    """Number of epochs since that start."""
    train: float
    """Seconds in training steps, waiting included."""
    input: float
    """Seconds in training steps that were spent waiting for rows."""
    allreduce: float
    """Seconds in training steps from a rank's last gradient to the average over all ranks."""
    validate: float
    """Seconds in validation."""
    memory: int
    """Peak memory of a rank's process in bytes; the greatest of all ranks."""


@dataclass(frozen=True, kw_only=True)
class RankSuccess:
    """Report of a rank that trained to the end."""

    rank: int
    progress: Progress
    """State at the end of the fit, without files, which rank 0 writes; history only from rank 0."""
    network: Network
    """The network that was trained, with the values that the ranks computed for it."""
    times: RankTimes
    logs: Mapping[str, bytes] = field(default_factory=dict)
    """TensorBoard files, from rank 0."""


@dataclass(frozen=True, kw_only=True)
class RankFailure:
    """Report of a rank that raised an exception."""

    rank: int
    type: str
    message: str
    traceback: str
    time: float
    """Time of the exception, in seconds since 1970 on the rank's clock."""
    collective: bool
    """Whether Horovod raised it because another rank went away: an effect, not the cause."""


RankReport = RankSuccess | RankFailure
