"""What a fit starts from: a saved version, or nothing but the options. Runs on the driver."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from spark_mnist import errors, options
from spark_mnist.core import plan
from spark_mnist.data import feature_columns
from spark_mnist.networks import registry
from spark_mnist.options import value_types
from spark_mnist.store import manifests, model_store


@dataclass(frozen=True, kw_only=True)
class TrainingStart:
    """All that training begins with, and of what model it is."""

    network: plan.Network
    optimizer: plan.Optimizer
    seed: int
    input_spec: plan.InputSpec | None
    """None for a table whose width and classes have not been looked at."""
    standardize: bool
    version: int | None = None
    """Number of the saved version, None when training starts afresh."""
    epochs: int = 0
    """Epochs trained so far."""
    files: Mapping[str, bytes | model_store.StoredFile] = field(default_factory=dict)
    """Checkpoint of the saved version, or the weights of the user's model."""
    user_model: Any = None
    """The user's Keras model, or his function that makes it."""

    @property
    def model_fn(self) -> plan.ModelFn | None:
        """The user's function."""
        return (
            None
            if self.user_model is None or manifests.is_model(self.user_model)
            else self.user_model
        )

    def for_rows(self, input_spec: plan.InputSpec) -> TrainingStart:
        """The same start, with a network that fits the rows.

        Raises:
            errors.ModelMismatch: The user's model does not fit them, or is not the saved one.
        """
        if not self.version:
            sized = dataclasses.replace(
                self.network, inputs=input_spec.width, classes=input_spec.classes
            )
            start = dataclasses.replace(self, input_spec=input_spec, network=sized)
        else:
            start = self
        return start._with_user_model() if manifests.is_model(self.user_model) else start

    def _with_user_model(self) -> TrainingStart:
        from spark_mnist.networks import array_files, custom

        network = custom.describe(self.user_model, self.network)
        if network.custom:
            raise errors.ModelMismatch(
                f"the model has objects that are not Keras's own ({', '.join(network.custom)}); "
                "give network= the function that makes it in place of the model"
            )
        if self.version:
            custom.check_same(self.network, network)
            return self
        weights = array_files.pack_weights(registry.build(network, self.user_model))
        return dataclasses.replace(self, network=network, files={plan.WEIGHTS: weights})


def load(store: model_store.Store, name: str, fit_options: options.FitOptions) -> TrainingStart:
    """Find out what a fit starts from.

    Raises:
        errors.OptionError: Options do not go together.
        errors.ModelNotFound: The model to continue is not there.
        errors.ModelMismatch: It is, with another network or optimizer than the options ask for.
        errors.DamagedModel: Its files are not what was written.
    """
    start = _continued(store, name, fit_options) if fit_options.continuous else _new(fit_options)
    last = start.epochs + fit_options.epochs
    try:
        rate = start.optimizer.rate(last - 1, 1)
    except OverflowError:
        rate = math.inf
    if rate == 0 or math.isinf(rate):
        raise errors.OptionError(
            f"with lr_schedule={start.optimizer.schedule} nothing is learned any more in epoch "
            f"{last}, whose learning rate is {rate}: name another schedule, say constant, or fewer "
            "epochs"
        )
    return start


def _new(fit_options: options.FitOptions) -> TrainingStart:
    """Start with nothing but the options."""
    network = _network(fit_options)
    kind = fit_options.optimizer or next(iter(registry.OPTIMIZERS))
    table = registry.is_table(network.name)
    standardize = table if fit_options.standardize is None else fit_options.standardize
    return TrainingStart(
        network=network,
        optimizer=plan.Optimizer(
            name=kind,
            learning_rate=fit_options.learning_rate or registry.OPTIMIZERS[kind].learning_rate,
            warmup_epochs=fit_options.warmup_epochs or 0,
            schedule=fit_options.lr_schedule or "constant",
        ),
        seed=fit_options.seed or 0,
        input_spec=_pictures(network.name, fit_options),
        standardize=standardize,
        user_model=None if isinstance(fit_options.network, str) else fit_options.network,
    )


def _continued(
    store: model_store.Store, name: str, fit_options: options.FitOptions
) -> TrainingStart:
    """Start from the newest version of a saved model."""
    version = store.resolve_version(name)
    manifest = store.manifest(name, version)
    input_spec, network, optimizer = manifests.described(manifest)
    _check_unchanged(name, network, optimizer, input_spec, fit_options)
    manifests.check_makeable(name, network, fit_options.network)
    perhaps = (plan.LOSS_SCALE,) if plan.LOSS_SCALE in manifest["files"] else ()
    files = store.stored(name, version, (plan.WEIGHTS, plan.OPTIMIZER, *perhaps))
    changes: dict[str, Any] = {
        "learning_rate": fit_options.learning_rate,
        "warmup_epochs": fit_options.warmup_epochs,
        "schedule": fit_options.lr_schedule,
    }
    changed = {name: value for name, value in changes.items() if value is not None}
    return TrainingStart(
        network=network,
        optimizer=dataclasses.replace(optimizer, **changed),
        seed=manifest["seed"] if fit_options.seed is None else fit_options.seed,
        input_spec=input_spec,
        standardize=bool(network.mean),
        version=version,
        epochs=manifest["epochs"],
        files=files,
        user_model=None if isinstance(fit_options.network, str) else fit_options.network,
    )


def _network(fit_options: options.FitOptions) -> plan.Network:
    """The network that options describe; how wide it is, only the rows tell."""
    name = fit_options.network or (registry.TABLE if fit_options.features else registry.PICTURES)
    if not isinstance(name, str):
        if fit_options.hidden or fit_options.dropout is not None:
            raise errors.OptionError("hidden and dropout are not for a model of your own")
        return plan.Network(name=plan.CUSTOM, inputs=0, classes=0)
    known = registry.REGISTRY[name]
    hidden = _units(fit_options.hidden) if fit_options.hidden else known.hidden
    dropout = known.dropout if fit_options.dropout is None else fit_options.dropout
    if not known.hidden and (hidden or dropout):
        raise errors.OptionError(f"{name} has no hidden layers: leave out hidden and dropout")
    return plan.Network(name=name, inputs=0, classes=0, hidden=hidden, dropout=dropout)


def _pictures(network: str, fit_options: options.FitOptions) -> plan.InputSpec | None:
    """What a network of pictures reads; None for a table."""
    columns = value_types.columns(fit_options.features) or ("image",)
    table = registry.is_table(network)
    if table and not fit_options.features:
        raise errors.OptionError(f"{network} reads a table: name its columns, features=a,b,c")
    if table or (network == plan.CUSTOM and fit_options.features):
        return None
    if not any(feature_columns.PATTERN in name for name in columns):
        check_pixels(network, columns)
    return plan.InputSpec(features=columns, label=fit_options.label or "label")


def check_pixels(network: str, columns: tuple[str, ...]) -> None:
    """Refuse columns that are no picture's.

    Raises:
        errors.OptionError: They are neither one nor one for each pixel.
    """
    if len(columns) not in (1, plan.InputSpec.width):
        raise errors.OptionError(
            f"{network} reads pictures of 784 pixels, from one column or from 784, not from "
            f"{len(columns)}; network={registry.TABLE} reads a table"
        )


def _units(text: str) -> tuple[int, ...]:
    return tuple(int(units) for units in text.split(","))


def _check_unchanged(
    name: str,
    network: plan.Network,
    optimizer: plan.Optimizer,
    input_spec: plan.InputSpec,
    fit_options: options.FitOptions,
) -> None:
    saved = {
        "network": network.name,
        "hidden": ",".join(map(str, network.hidden)),
        "dropout": network.dropout,
        "optimizer": optimizer.name,
        "features": ",".join(input_spec.features),
        "label": input_spec.label,
        "standardize": bool(network.mean),
    }
    columns = value_types.columns(fit_options.features)
    if feature_columns.expand(input_spec.features, columns) == input_spec.features:
        columns = input_spec.features
    wanted = dataclasses.asdict(
        dataclasses.replace(
            fit_options,
            features=",".join(columns) or None,
            network=fit_options.network if isinstance(fit_options.network, str) else None,
        )
    )
    for option, value in saved.items():
        if wanted[option] not in (None, value):
            raise manifests.mismatch(name, option, value, wanted[option])
