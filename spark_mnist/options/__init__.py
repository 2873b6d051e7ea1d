"""The only list of options: names, types, defaults, bounds and the words that explain them.

The command, the keyword arguments, ``--help`` and the README's table all follow these classes.
Defaults that the manual gives are the manual's. Runs on: driver.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from spark_mnist import errors
from spark_mnist.networks import registry
from spark_mnist.options import value_types


def option(default: Any, kind: value_types.OptionType, doc: str, shown: str = "") -> Any:
    """Declare one field; ``shown`` is the default in words where the value says too little."""
    return dataclasses.field(default=default, metadata={"kind": kind, "doc": doc, "shown": shown})


SETTING = "spark.mnist."
"""What the Spark setting of an option begins with."""
SEED = (
    "of all that is random: split, shuffles, first weights, shares",
    "0; continuing, the saved model's",
)
NONE, FP16 = "none", "fp16"
"""The values of ``compression``."""
SPARK, IN_PROCESS = "spark", "in-process"
"""The values of ``launcher``."""
FAILFAST, DROPMALFORMED = "FAILFAST", "DROPMALFORMED"
"""The values of ``mode``, named as Spark names its own."""
VERSION = "which version of the model", "the newest; of delete, all; rollback needs one"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every operation takes. Checked on construction.

    Raises:
        errors.OptionError: A value is not allowed.
    """

    store: str | None = option(
        None, value_types.TEXT, "URL or path of the model store", "spark.mnist.store, else ./models"
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = value_types.plain(getattr(self, field.name))
            object.__setattr__(self, field.name, value)
            kind: value_types.OptionType = field.metadata["kind"]
            if not (kind.allows(value) or (value is None and field.default is None)):
                raise errors.OptionError(f"{field.name} must be {kind.words}, not {value!r}")


@dataclass(frozen=True, kw_only=True)
class RowOptions(Options):
    """What every operation on rows takes."""

    batch_size: int = option(32, value_types.POSITIVE_INT, "rows of one step, on each rank")
    network: str | Callable[..., Any] | None = option(
        None,
        value_types.NETWORK,
        "what is trained; for a saved model with objects of your own, the function that makes it",
        "mlp, with features dnn, or the saved model's",
    )
    verbose: int = option(1, value_types.NON_NEGATIVE_INT, "0 shows no progress")
    mode: str = option(
        FAILFAST,
        value_types.one_of(FAILFAST, DROPMALFORMED),
        "what becomes of rows that cannot be used: an error, or they are left out and counted, "
        "and predict gives them null",
    )


@dataclass(frozen=True, kw_only=True)
class FitOptions(RowOptions):
    """The options of ``fit``."""

    epochs: int = option(5, value_types.POSITIVE_INT, "passes over the training rows")
    train_validation_ratio: float = option(
        0.8,
        value_types.FRACTION,
        "share of the rows that trains; the rest validates after every epoch",
    )
    continuous: bool = option(False, value_types.BOOL, "go on from the saved model, with new rows")
    features: str | Sequence[str] | None = option(
        None, value_types.COLUMNS, "one column of arrays, or a column for each number", "image"
    )
    label: str | None = option(None, value_types.TEXT, "the column of classes", "label")
    validation_indicator: str | None = option(
        None,
        value_types.TEXT,
        "a boolean column: the rows in which it is true validate, and all others train",
        "as train_validation_ratio says",
    )
    standardize: bool | None = option(
        None,
        value_types.BOOL,
        "scale features to mean 0 and deviation 1, as the training rows have them",
        "true for dnn, else false",
    )
    hidden: str | None = option(
        None, value_types.UNITS, "units of the dense hidden layers, first to last", "the network's"
    )
    dropout: float | None = option(
        None,
        value_types.FRACTION_BELOW_ONE,
        "share of the last hidden units left out while training",
        "the network's",
    )
    optimizer: str | None = option(
        None,
        value_types.one_of(*registry.OPTIMIZERS),
        "how weights follow gradients",
        "adam, or the saved model's",
    )
    learning_rate: float | None = option(
        None,
        value_types.POSITIVE_FLOAT,
        "for one rank; scaled by the ranks while training",
        "the optimizer's",
    )
    warmup_epochs: int | None = option(
        None,
        value_types.NON_NEGATIVE_INT,
        "first epochs of a model, in which the rate climbs from one rank's to all ranks'",
        "0, or the saved model's",
    )
    lr_schedule: str | None = option(
        None,
        value_types.SCHEDULE,
        "how the rate falls over the epochs of a model",
        "constant, or the saved model's",
    )
    patience: int | None = option(
        None,
        value_types.POSITIVE_INT,
        "stop after so many epochs without a lower val_loss (or loss, where nothing validates), "
        "and keep the best",
        "train all epochs",
    )
    num_proc: int | None = option(
        None,
        value_types.POSITIVE_INT,
        "ranks, one Spark task each",
        "one for each slot of the session, busy or free, each with a batch or more",
    )
    cache: str = option(
        "1g",
        value_types.SIZE,
        "memory of a rank for its rows; more are read anew in every epoch, shuffled in parts",
    )
    precision: str = option(
        registry.FLOAT32,
        value_types.one_of(registry.FLOAT32, registry.MIXED_FLOAT16, registry.MIXED_BFLOAT16),
        "in what ranks compute; weights, and a Keras model that is given, stay as they are",
    )
    compression: str = option(
        NONE, value_types.one_of(NONE, FP16), "in what gradients travel between ranks"
    )
    sync_batch_norm: bool = option(
        False,
        value_types.BOOL,
        "let BatchNormalization take mean and variance over the batches of all ranks",
    )
    seed: int | None = option(None, value_types.SEED, *SEED)
    max_restarts: int = option(
        2,
        value_types.NON_NEGATIVE_INT,
        "how often all ranks start again from the last epoch when one is lost",
    )
    heartbeat_timeout: float = option(
        60.0,
        value_types.POSITIVE_FLOAT,
        "seconds after which a rank that gives no sign of life is lost",
    )
    keep: int | None = option(
        None,
        value_types.POSITIVE_INT,
        "versions that the model keeps; older ones are deleted",
        "all",
    )
    launcher: str = option(
        SPARK,
        value_types.one_of(SPARK, IN_PROCESS),
        "where ranks run: as Spark tasks, or one rank in this process, for tests and debuggers",
    )
    port: str | int | None = option(
        None,
        value_types.PORT,
        "where the driver listens for its ranks: a port, or a range of which it takes the first "
        "that is free",
        "any that is free",
    )
    secure: bool = option(
        False, value_types.BOOL, "start only where Spark authenticates and encrypts its connections"
    )
    mlflow: bool | None = option(
        None,
        value_types.BOOL,
        "log parameters, metrics by epoch and the model to MLflow",
        "true while a run is active",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.launcher == IN_PROCESS and (self.num_proc or 1) > 1:
            raise errors.OptionError(
                f"launcher={IN_PROCESS} runs one rank, not num_proc={self.num_proc}: leave "
                f"num_proc out, or use launcher={SPARK}"
            )


@dataclass(frozen=True, kw_only=True)
class PredictOptions(RowOptions):
    """The options of ``predict``."""

    interpret: bool = option(False, value_types.BOOL, "add the predicted label as people read it")
    version: int | None = option(None, value_types.POSITIVE_INT, *VERSION)


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(RowOptions):
    """The options of ``evaluate``."""

    rate: float = option(
        0.7, value_types.FRACTION, "random share of the rows that one evaluation uses"
    )
    repeat: int = option(
        1, value_types.POSITIVE_INT, "how many evaluations, each on a fresh random share"
    )
    details: bool = option(
        False, value_types.BOOL, "add counts, confusion matrix and figures by class"
    )
    by: str | None = option(
        None,
        value_types.TEXT,
        "a column whose values part the rows, each measured apart",
        "all rows",
    )
    seed: int | None = option(None, value_types.SEED, *SEED)
    version: int | None = option(None, value_types.POSITIVE_INT, *VERSION)


@dataclass(frozen=True, kw_only=True)
class VersionOptions(Options):
    """The options of ``describe``, ``delete``, ``rollback`` and ``export``."""

    version: int | None = option(None, value_types.POSITIVE_INT, *VERSION)


OPERATIONS: Mapping[str, type[Options]] = {
    "fit": FitOptions,
    "predict": PredictOptions,
    "eval": EvaluateOptions,
    "models": Options,
    "describe": VersionOptions,
    "delete": VersionOptions,
    "rollback": VersionOptions,
    "doctor": FitOptions,
}

MANUAL = (
    "epochs",
    "batch_size",
    "train_validation_ratio",
    "continuous",
    "rate",
    "repeat",
    "interpret",
)
"""The options of the manual, in its order; more follow in the order of the classes."""

_ALL = {
    field.name: field for options in OPERATIONS.values() for field in dataclasses.fields(options)
}

FIELDS: Mapping[str, dataclasses.Field[Any]] = {name: _ALL[name] for name in (*MANUAL, *_ALL)}
"""Every option of any operation, by name."""


def users(name: str) -> list[str]:
    """The operations that use an option."""
    return [
        operation
        for operation, kind in OPERATIONS.items()
        if name in {field.name for field in dataclasses.fields(kind)}
    ]


SAVED = (
    *("network", "features", "label", "standardize", "hidden", "dropout", "optimizer"),
    *("learning_rate", "warmup_epochs", "lr_schedule", "seed"),
)
"""What a saved model has: a session's settings of these are for models that are trained afresh."""

SYNONYMS = {
    "model": "network",
    "lr": "learning_rate",
    "num_epochs": "epochs",
    "epoch": "epochs",
    "batch": "batch_size",
    **dict.fromkeys(
        ("workers", "num_workers", "np", "ranks", "nproc", "num_processes"), "num_proc"
    ),
    **dict.fromkeys(("features_col", "feature_cols", "feature_columns", "columns"), "features"),
    **dict.fromkeys(("label_col", "label_cols", "target", "labels", "y"), "label"),
    **dict.fromkeys(
        ("validation_split", "validation", "validation_ratio"), "train_validation_ratio"
    ),
    "early_stopping": "patience",
    "random_state": "seed",
    "resume": "continuous",
    "path": "store",
    "normalize": "standardize",
}
"""What other libraries call an option."""

T = TypeVar("T", bound=Options)


def hint(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for a name that is no option, or ``""``."""
    names = [*known]
    if (meant := SYNONYMS.get(name.lower())) in names:
        return f"; did you mean {meant!r}?"
    return errors.did_you_mean(name, names)


def make(kind: type[T], given: Mapping[str, Any], settings: Mapping[str, str] | None = None) -> T:
    """Build the options of one operation from keyword arguments.

    Args:
        kind: Of the operation.
        given: Values by name.
        settings: Text by name, for what is not given.

    Raises:
        errors.UnknownOption: A name is not among the operation's options.
        errors.OptionError: A value is not allowed.
    """
    known = [field.name for field in dataclasses.fields(kind)]
    for name in given:
        if name not in known:
            raise errors.UnknownOption(
                f"no option {name!r}; the options are {', '.join(sorted(known))}{hint(name, known)}"
            )
    set_for_all = {
        name: _setting(name, text)
        for name, text in (settings or {}).items()
        if name in known and given.get(name) is None
    }
    goes_on = {**given, **set_for_all}.get("continuous")
    of_model = SAVED if goes_on else () if kind is FitOptions else ("network",)
    applied = {name: value for name, value in set_for_all.items() if name not in of_model}
    return kind(**{**given, **applied})


def _setting(name: str, text: str) -> Any:
    try:
        return read(name, text)
    except errors.OptionError as error:
        raise errors.OptionError(f"Spark's setting {SETTING}{name}: {error}") from None


def read(name: str, text: str) -> Any:
    """Read the text of an option's value.

    Raises:
        errors.OptionError: The text is not a value of the option's type.
    """
    kind: value_types.OptionType = FIELDS[name].metadata["kind"]
    try:
        value = kind.read(text)
    except ValueError:
        value = None
    if not kind.allows(value):
        raise errors.OptionError(f"{name} must be {kind.words}, not {text!r}")
    return value
