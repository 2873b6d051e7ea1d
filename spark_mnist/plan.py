"""The values that cross between driver and ranks: picklable, no TensorFlow, no Spark."""

from __future__ import annotations

from dataclasses import dataclass, field

from spark_mnist import events, world

WEIGHTS = "weights.npz"
OPTIMIZER = "optimizer.npz"
"""The files of a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network of ours, as the store describes it."""

    name: str
    """Key of ``networks.REGISTRY``."""
    inputs: int
    """Numbers of one row."""
    classes: int
    hidden: tuple[int, ...]
    """Units of the dense hidden layers, first to last."""
    dropout: float
    """Share of the last hidden units left out while training."""


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """How weights follow gradients, for one rank."""

    name: str
    """Key of ``networks.OPTIMIZERS``."""
    learning_rate: float
    """For one rank: never scaled here, nor in the store."""


@dataclass(frozen=True, kw_only=True)
class Shards:
    """Rows in Parquet: file ``i``, of one row group, belongs to rank ``i % ranks``."""

    urls: tuple[str, ...]
    """Files in order; none when there are no rows."""
    rows: int
    """Rows of all files, as their footers say."""
    dtype: str
    """Type of a pixel in the packed image."""
    scale: float
    """What a pixel is divided by."""


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """All that a rank needs to know."""

    network: Network
    optimizer: Optimizer
    world: world.World
    train: Shards
    validation: Shards
    first_epoch: int
    """Epochs that the saved model already has."""
    epochs: int
    """Epochs to train now."""
    seed: int
    threads: int
    """Cores that one rank may use."""
    inbox: events.Address | None = None
    """Where the driver hears of progress."""
    files: dict[str, bytes] = field(default_factory=dict)
    """The checkpoint to go on from; empty when training starts afresh."""


@dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """One row of the table that ``fit`` returns. Values are means over rows of all ranks."""

    epoch: int
    """Counted from 1, over all fits of the model."""
    losses: dict[str, float]
    metrics: dict[str, float]


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
class RankReport:
    """What a rank returns."""

    rank: int
    failure: Failure | None = None
    history: tuple[EpochRecord, ...] = ()
    weights_digest: str = ""
    """sha256 over all weights and optimizer variables; equal on all ranks."""
    files: dict[str, bytes] = field(default_factory=dict)
    """The new checkpoint, from rank 0."""
