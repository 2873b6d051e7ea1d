"""Start of a training run: a saved version, or only the options. Runs on: driver."""

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
    """State from which training starts, and the saved version that it comes from."""

    network: plan.Network
    optimizer: plan.Optimizer
    seed: int
    input_spec: plan.InputSpec | None
    """Specification of the input; None for a table whose rows were not profiled yet."""
    standardize: bool
    version: int | None = None
    """Number of the saved version; None when training starts from scratch."""
    epochs: int = 0
    """Epochs of the model's training so far."""
    files: Mapping[str, bytes | model_store.StoredFile] = field(default_factory=dict)
    """Checkpoint of the saved version, or the weights of the user's model."""
    user_model: Any = None
    """The user's Keras model, or the user's function that makes it."""

    @property
    def model_fn(self) -> plan.ModelFn | None:
        """Return the user's function; None for a Keras model or a network of the library."""
        return (
            None
            if self.user_model is None or manifests.is_model(self.user_model)
            else self.user_model
        )

    def for_rows(self, input_spec: plan.InputSpec) -> TrainingStart:
        """Return the same start, with a network that fits the rows.

        Raises:
            errors.ModelMismatch: The user's model does not fit the rows, or is not the saved one.
        """
        if not self.version:
            network = dataclasses.replace(
                self.network, inputs=input_spec.width, classes=input_spec.classes
            )
            start = dataclasses.replace(self, input_spec=input_spec, network=network)
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
    """Return the state from which a fit starts.

    Raises:
        errors.OptionError: Options contradict each other.
        errors.ModelNotFound: There is no model to continue.
        errors.ModelMismatch: The saved model was trained with other options, say another network.
        errors.DamagedModel: The files of the saved model differ from those that were written.
    """
    start = (
        _from_saved_version(store, name, fit_options)
        if fit_options.continuous
        else _from_options(fit_options)
    )
    last_epoch = start.epochs + fit_options.epochs
    try:
        rate = start.optimizer.rate(last_epoch - 1, 1)
    except OverflowError:
        rate = math.inf
    if rate == 0 or math.isinf(rate):
        raise errors.OptionError(
            f"with lr_schedule={start.optimizer.schedule} nothing is learned any more in epoch "
            f"{last_epoch}, whose learning rate is {rate}: name another schedule, say constant, or "
            "fewer epochs"
        )
    return start


def _from_options(fit_options: options.FitOptions) -> TrainingStart:
    """Return the start of a new model, which has only the options."""
    network = _describe_network(fit_options)
    optimizer_name = fit_options.optimizer or next(iter(registry.OPTIMIZERS))
    is_table = registry.is_table(network.name)
    standardize = is_table if fit_options.standardize is None else fit_options.standardize
    return TrainingStart(
        network=network,
        optimizer=plan.Optimizer(
            name=optimizer_name,
            learning_rate=fit_options.learning_rate
            or registry.OPTIMIZERS[optimizer_name].learning_rate,
            warmup_epochs=fit_options.warmup_epochs or 0,
            schedule=str(fit_options.lr_schedule or "constant"),
        ),
        seed=fit_options.seed or 0,
        input_spec=_picture_input_spec(network.name, fit_options),
        standardize=standardize,
        user_model=None if isinstance(fit_options.network, str) else fit_options.network,
    )


def _from_saved_version(
    store: model_store.Store, name: str, fit_options: options.FitOptions
) -> TrainingStart:
    """Return a start from the newest version of a saved model."""
    version = store.resolve_version(name)
    manifest = store.manifest(name, version)
    input_spec, network, optimizer = manifests.parse(manifest)
    _check_unchanged(name, network, optimizer, input_spec, fit_options)
    manifests.check_makeable(name, network, fit_options.network)
    loss_scale = (plan.LOSS_SCALE,) if plan.LOSS_SCALE in manifest["files"] else ()
    files = store.references(name, version, (plan.WEIGHTS, plan.OPTIMIZER, *loss_scale))
    optimizer_options: dict[str, Any] = {
        "learning_rate": fit_options.learning_rate,
        "warmup_epochs": fit_options.warmup_epochs,
        "schedule": fit_options.lr_schedule,
    }
    overrides = {name: value for name, value in optimizer_options.items() if value is not None}
    return TrainingStart(
        network=network,
        optimizer=dataclasses.replace(optimizer, **overrides),
        seed=manifest["seed"] if fit_options.seed is None else fit_options.seed,
        input_spec=input_spec,
        standardize=bool(network.mean),
        version=version,
        epochs=manifest["epochs"],
        files=files,
        user_model=None if isinstance(fit_options.network, str) else fit_options.network,
    )


def _describe_network(fit_options: options.FitOptions) -> plan.Network:
    """Return the network that the options describe.

    Its ``inputs`` and ``classes`` are 0, since only the rows tell them; see ``for_rows``.
    """
    name = fit_options.network or (registry.TABLE if fit_options.features else registry.PICTURES)
    if not isinstance(name, str):
        if fit_options.hidden or fit_options.dropout is not None:
            raise errors.OptionError("hidden and dropout are not for a model of your own")
        return plan.Network(name=plan.CUSTOM, inputs=0, classes=0)
    architecture = registry.REGISTRY[name]
    hidden = _parse_units(str(fit_options.hidden)) if fit_options.hidden else architecture.hidden
    dropout = architecture.dropout if fit_options.dropout is None else fit_options.dropout
    if not architecture.hidden and (hidden or dropout):
        raise errors.OptionError(f"{name} has no hidden layers: leave out hidden and dropout")
    return plan.Network(name=name, inputs=0, classes=0, hidden=hidden, dropout=dropout)


def _picture_input_spec(network: str, fit_options: options.FitOptions) -> plan.InputSpec | None:
    """Return the specification of the input of a network for pictures, or None for a table."""
    columns = value_types.columns(fit_options.features) or ("image",)
    is_table = registry.is_table(network)
    if is_table and not fit_options.features:
        raise errors.OptionError(f"{network} reads a table: name its columns, features=a,b,c")
    if is_table or (network == plan.CUSTOM and fit_options.features):
        return None
    if not any(feature_columns.PATTERN in name for name in columns):
        check_pixels(network, columns)
    return plan.InputSpec(features=columns, label=fit_options.label or "label")


def check_pixels(network: str, columns: tuple[str, ...]) -> None:
    """Refuse columns that cannot hold a picture.

    Raises:
        errors.OptionError: There is neither one column nor one for each pixel.
    """
    if len(columns) not in (1, plan.InputSpec.width):
        raise errors.OptionError(
            f"{network} reads pictures of 784 pixels, from one column or from 784, not from "
            f"{len(columns)}; network={registry.TABLE} reads a table"
        )


def _parse_units(text: str) -> tuple[int, ...]:
    return tuple(int(units) for units in text.split(","))


def _check_unchanged(
    name: str,
    network: plan.Network,
    optimizer: plan.Optimizer,
    input_spec: plan.InputSpec,
    fit_options: options.FitOptions,
) -> None:
    saved_values = {
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
    option_values = dataclasses.asdict(
        dataclasses.replace(
            fit_options,
            features=",".join(columns) or None,
            network=fit_options.network if isinstance(fit_options.network, str) else None,
        )
    )
    for option, value in saved_values.items():
        if option_values[option] not in (None, value):
            raise manifests.mismatch(name, option, value, option_values[option])
