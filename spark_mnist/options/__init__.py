"""The one table of options: names, types, defaults, bounds and descriptions. Runs on: driver.

The command, the keyword arguments, ``--help``, the Params of Spark ML and the table in the
documentation all follow these classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from spark_mnist import errors, schedules
from spark_mnist.networks import registry
from spark_mnist.options import value_types


def option(default: Any, option_type: value_types.OptionType, doc: str, shown: str = "") -> Any:
    """Declare one option.

    Args:
        default: Its value where neither the call nor a setting gives one.
        option_type: The values that it takes.
        doc: Its description.
        shown: The default in words, where the value alone does not explain it.
    """
    return dataclasses.field(
        default=default, metadata={"type": option_type, "doc": doc, "shown": shown}
    )


SETTING = "spark.mnist."
"""Prefix of the Spark setting of an option."""
SEED = (
    "seed of everything random: split, shuffling, initial weights, evaluation samples",
    "0; when continuing, the saved model's",
)
LOSS = (
    "loss that training lowers",
    "the one that a Keras model was compiled with, else sparse_categorical_crossentropy, "
    "binary_crossentropy or mean_squared_error; or the saved model's",
)
NONE, FP16 = "none", "fp16"
"""The values of ``compression``."""
SPARK, IN_PROCESS = "spark", "in-process"
"""The values of ``launcher``."""
FAILFAST, DROPMALFORMED = "FAILFAST", "DROPMALFORMED"
"""The values of ``mode``, named as in Spark's readers."""
VERSION = "version of the model", "the newest; delete removes all; rollback requires one"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of every operation, checked on construction.

    Raises:
        errors.OptionError: A value is not allowed.
    """

    store: str | None = option(
        None, value_types.TEXT, "URL or path of the model store", "spark.mnist.store, else ./models"
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            option_type: value_types.OptionType = field.metadata["type"]
            original = value_types.plain(getattr(self, field.name))
            value = option_type.to_text(original)
            object.__setattr__(self, field.name, value)
            if not (option_type.allows(value) or (value is None and field.default is None)):
                raise errors.OptionError(
                    f"{field.name} must be {option_type.words}, not {original!r}"
                )


@dataclass(frozen=True, kw_only=True)
class RowOptions(Options):
    """Options of every operation on rows."""

    batch_size: int = option(
        32,
        value_types.POSITIVE_INT,
        "rows of one step on each rank; for predict and eval, of one call of the model",
    )
    network: str | Callable[..., Any] | None = option(
        None,
        value_types.NETWORK,
        "network to train; for a saved model with layer classes of your own, the function that "
        "makes it",
        "mlp, or dnn with features; for a saved model, its own",
    )
    verbose: int = option(1, value_types.NON_NEGATIVE_INT, "0 hides the progress bar")
    mode: str = option(
        FAILFAST,
        value_types.one_of(FAILFAST, DROPMALFORMED),
        "what to do with rows that cannot be used: FAILFAST raises an error; DROPMALFORMED leaves "
        "them out and counts them, and predict gives them null",
    )


@dataclass(frozen=True, kw_only=True)
class FitOptions(RowOptions):
    """The options of ``fit``."""

    epochs: int = option(5, value_types.POSITIVE_INT, "passes over the training rows")
    train_validation_ratio: float = option(
        0.8,
        value_types.FRACTION,
        "fraction of the rows to train on; the others validate after each epoch",
    )
    continuous: bool = option(
        False, value_types.BOOL, "continue training the saved model, with these rows"
    )
    features: str | Sequence[str] | Mapping[str, Any] | None = option(
        None,
        value_types.COLUMNS,
        "columns to learn from: one column of arrays, or one column for each number",
        "image",
    )
    label: str | Mapping[str, str] | None = option(
        None, value_types.LABEL, "column that the model learns to predict", "label"
    )
    task: str | Mapping[str, str] | None = option(
        None,
        value_types.TASK,
        "what the label is: one of several classes, one of two, any of several labels, or numbers",
        "classification, or the saved model's",
    )
    loss: str | Callable[..., Any] | Mapping[str, Any] | None = option(
        None, value_types.LOSS, *LOSS
    )
    loss_weights: Mapping[str, float] | None = option(
        None, value_types.LOSS_WEIGHTS, "weight of each output's loss in the total loss", "1 each"
    )
    metrics: str | Sequence[Any] | Callable[..., Any] | Mapping[str, Any] | None = option(
        None,
        value_types.METRICS,
        "metrics of each epoch, besides those of the task",
        "those that a Keras model was compiled with",
    )
    sample_weight: str | None = option(
        None, value_types.TEXT, "column with the weight of each row in the loss", "1 each"
    )
    class_weight: str | Mapping[Any, float] | None = option(
        None,
        value_types.CLASS_WEIGHT,
        "weight of each class in the training loss; balanced gives all classes the same weight "
        "together",
        "1 each",
    )
    validation_indicator: str | None = option(
        None,
        value_types.TEXT,
        "boolean column: rows where it is true validate, all others train",
        "split by train_validation_ratio",
    )
    standardize: bool | None = option(
        None,
        value_types.BOOL,
        "scale each feature to mean 0 and standard deviation 1 over the training rows",
        "true for dnn, otherwise false",
    )
    standardize_label: bool | None = option(
        None,
        value_types.BOOL,
        "learn numbers scaled to mean 0 and standard deviation 1 over the training rows; "
        "predictions and metrics have the label's units, the loss has the scaled ones",
        "true for dnn and losses that allow it, otherwise false",
    )
    hidden: str | Sequence[int] | None = option(
        None,
        value_types.UNITS,
        "units of the dense hidden layers, first to last",
        "the network's own",
    )
    dropout: float | None = option(
        None,
        value_types.FRACTION_BELOW_ONE,
        "fraction of the last hidden units to drop while training",
        "the network's own",
    )
    optimizer: str | Callable[[], Any] | None = option(
        None,
        value_types.OPTIMIZER,
        "optimizer that updates the weights",
        "adam, or the saved model's",
    )
    clipnorm: float | None = option(
        None,
        value_types.POSITIVE_FLOAT,
        "largest norm of each variable's gradient, after the average over ranks",
        "gradients stay as they are, or the saved model's",
    )
    accumulate_steps: int | None = option(
        None,
        value_types.POSITIVE_INT,
        "number of steps whose mean gradient updates the weights once",
        "1, or the saved model's",
    )
    callbacks: Callable[[], Any] | None = option(
        None, value_types.FUNCTION, "function that makes Keras callbacks, on every rank", "none"
    )
    learning_rate: float | None = option(
        None,
        value_types.POSITIVE_FLOAT,
        "learning rate of one rank; training multiplies it by the number of ranks",
        "the optimizer's own",
    )
    warmup_epochs: int | None = option(
        None,
        value_types.NON_NEGATIVE_INT,
        "first epochs of a model, over which the learning rate climbs from that of one rank to "
        "that of all ranks",
        "0, or the saved model's",
    )
    lr_schedule: str | schedules.Schedule | None = option(
        None,
        value_types.SCHEDULE,
        "how the learning rate falls over the epochs of a model",
        "constant, or the saved model's",
    )
    patience: int | None = option(
        None,
        value_types.POSITIVE_INT,
        "stop after this many epochs without a lower val_loss (or loss, if no rows validate), and "
        "publish the best epoch",
        "train all epochs",
    )
    num_proc: int | None = option(
        None,
        value_types.POSITIVE_INT,
        "number of ranks, one Spark task each",
        "as many as the session has slots, busy or free, and no more than there are full batches",
    )
    min_proc: int | None = option(
        None,
        value_types.POSITIVE_INT,
        "least number of ranks with which a fit goes on where lost executors are not replaced",
        "as many as at the start",
    )
    cache: str | int = option(
        "1g",
        value_types.SIZE,
        "memory of each rank for its rows; rows that need more are read again in each epoch and "
        "shuffled in parts",
    )
    precision: str = option(
        registry.FLOAT32,
        value_types.one_of(registry.FLOAT32, registry.MIXED_FLOAT16, registry.MIXED_BFLOAT16),
        "number format in which ranks compute; weights, and a Keras model of yours, keep theirs",
    )
    compression: str = option(
        NONE,
        value_types.one_of(NONE, FP16),
        "number format in which gradients travel between ranks; none sends them unchanged",
    )
    sync_batch_norm: bool = option(
        False,
        value_types.BOOL,
        "compute mean and variance of BatchNormalization over the batches of all ranks",
    )
    seed: int | None = option(None, value_types.SEED, *SEED)
    max_restarts: int = option(
        2,
        value_types.NON_NEGATIVE_INT,
        "how many times to restart all ranks from the last checkpoint after one is lost",
    )
    checkpoint_every: float = option(
        600.0,
        value_types.POSITIVE_FLOAT,
        "seconds between checkpoints within an epoch, each after a multiple of 32 steps; there is "
        "one after each epoch, too",
    )
    heartbeat_timeout: float = option(
        60.0,
        value_types.POSITIVE_FLOAT,
        "seconds without a sign of life after which a rank counts as lost",
    )
    keep: int | None = option(
        None,
        value_types.POSITIVE_INT,
        "number of versions to keep; older ones are deleted",
        "all",
    )
    launcher: str = option(
        SPARK,
        value_types.one_of(SPARK, IN_PROCESS),
        "where ranks run: as Spark tasks, or one rank in this process, for tests and debugging",
    )
    port: str | int | None = option(
        None,
        value_types.PORT,
        "port on which the driver listens for its ranks, or a range, of which it takes the first "
        "free port",
        "any free port",
    )
    secure: bool = option(
        False,
        value_types.BOOL,
        "refuse to start unless Spark authenticates and encrypts its connections",
    )
    mlflow: bool | None = option(
        None,
        value_types.BOOL,
        "log parameters, metrics of each epoch and the model to MLflow",
        "true while a run is active",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.launcher == IN_PROCESS and (self.num_proc or 1) > 1:
            raise errors.OptionError(
                f"launcher={IN_PROCESS} runs one rank, not num_proc={self.num_proc}: leave "
                f"num_proc out, or use launcher={SPARK}"
            )
        if self.num_proc and (self.min_proc or 1) > self.num_proc:
            raise errors.OptionError(
                f"min_proc={self.min_proc} is more than num_proc={self.num_proc}: lower it"
            )


@dataclass(frozen=True, kw_only=True)
class PredictOptions(RowOptions):
    """The options of ``predict``."""

    interpret: bool = option(
        False, value_types.BOOL, "add a column with the predicted class in readable form"
    )
    probabilities: bool = option(
        False,
        value_types.BOOL,
        "add a column with the probability of each class or label",
    )
    version: int | None = option(None, value_types.POSITIVE_INT, *VERSION)


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(RowOptions):
    """The options of ``evaluate``."""

    loss: str | Callable[..., Any] | Mapping[str, Any] | None = option(
        None, value_types.LOSS, *LOSS
    )

    rate: float = option(
        0.7, value_types.FRACTION, "fraction of the rows, drawn at random, that one evaluation uses"
    )
    repeat: int = option(
        1, value_types.POSITIVE_INT, "number of evaluations, each on a sample of its own"
    )
    details: bool = option(
        False, value_types.BOOL, "add row counts, the confusion matrix and figures for each class"
    )
    by: str | None = option(
        None,
        value_types.TEXT,
        "group by this column and evaluate each group",
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

FIRST_OPTIONS = (
    "epochs",
    "batch_size",
    "train_validation_ratio",
    "continuous",
    "rate",
    "repeat",
    "interpret",
)
"""First options of the table; the others follow in the order of the classes."""

_ALL = {
    field.name: field for options in OPERATIONS.values() for field in dataclasses.fields(options)
}

FIELDS: Mapping[str, dataclasses.Field[Any]] = {
    name: _ALL[name] for name in (*FIRST_OPTIONS, *_ALL)
}
"""Every option of any operation, by name."""


def default_text(name: str) -> str:
    """Return the default of an option as the command writes it, or in words."""
    field = FIELDS[name]
    if field.metadata["shown"]:
        return str(field.metadata["shown"])
    if isinstance(field.default, bool):
        return str(field.default).lower()
    return f"{field.default:g}" if isinstance(field.default, float) else str(field.default)


def operations_with(name: str) -> list[str]:
    """Return the operations that use an option."""
    return [
        operation
        for operation, options_class in OPERATIONS.items()
        if name in {field.name for field in dataclasses.fields(options_class)}
    ]


SAVED = (
    *("network", "features", "label", "task", "loss", "loss_weights", "standardize"),
    *("standardize_label", "hidden", "dropout", "optimizer", "clipnorm", "accumulate_steps"),
    *("learning_rate", "warmup_epochs", "lr_schedule", "seed"),
)
"""Options that a saved model fixes: settings of a session apply only to new models."""

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
    "objective": "task",
    "loss_fn": "loss",
    "loss_function": "loss",
    "loss_weight": "loss_weights",
    "metric": "metrics",
    **dict.fromkeys(("weight", "weight_col", "sample_weight_col", "weights"), "sample_weight"),
    "class_weights": "class_weight",
    "callback": "callbacks",
    "gradient_accumulation_steps": "accumulate_steps",
    "backward_passes_per_step": "accumulate_steps",
    "probability": "probabilities",
}
"""Names that other libraries have for an option."""

OptionsT = TypeVar("OptionsT", bound=Options)


def hint(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for a name that is no option, or ``""``."""
    names = [*known]
    if (meant := SYNONYMS.get(name.lower())) in names:
        return f"; did you mean {meant!r}?"
    return errors.did_you_mean(name, names)


def build(
    options_class: type[OptionsT],
    call: Mapping[str, Any],
    settings: Mapping[str, str] | None = None,
) -> OptionsT:
    """Build the options of one operation.

    Three sources, the first that has a value wins: the call, the saved model for the options that
    it fixes, and the settings of the session. What remains has its default.

    Args:
        options_class: Class of the operation's options.
        call: Values of the call, by name.
        settings: Text of the session's settings, by name.

    Raises:
        errors.UnknownOption: A name is not among the operation's options.
        errors.OptionError: A value is not allowed.
    """
    names = [field.name for field in dataclasses.fields(options_class)]
    _check_names(call, names)
    of_call = {name: value for name, value in call.items() if value is not None}
    of_session = {
        name: _setting(name, text)
        for name, text in (settings or {}).items()
        if name in names and name not in of_call
    }
    for name in _of_saved_model(options_class, {**of_session, **of_call}):
        of_session.pop(name, None)
    return options_class(**{**call, **of_session})


def _check_names(used: Iterable[str], names: Sequence[str]) -> None:
    for name in used:
        if name not in names:
            listed = ", ".join(sorted(names))
            raise errors.UnknownOption(
                f"no option {name!r}; the options are {listed}{hint(name, names)}"
            )


def _of_saved_model(options_class: type[Options], values: Mapping[str, Any]) -> Sequence[str]:
    """Return the options that a saved model fixes for this operation."""
    if options_class is FitOptions:
        return SAVED if values.get("continuous") else ()
    return ("network",)


def _setting(name: str, text: str) -> Any:
    """Read the value of a session's setting."""
    try:
        return read(name, text)
    except errors.OptionError as error:
        raise errors.OptionError(f"Spark's setting {SETTING}{name}: {error}") from None


def read(name: str, text: str) -> Any:
    """Read the text of an option's value.

    Raises:
        errors.OptionError: The text is not a value of the option's type.
    """
    option_type: value_types.OptionType = FIELDS[name].metadata["type"]
    try:
        value = option_type.read(text)
    except ValueError:
        value = None
    if not option_type.allows(value):
        raise errors.OptionError(f"{name} must be {option_type.words}, not {text!r}")
    return value
