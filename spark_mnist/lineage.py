"""What a fit starts from: a saved version, or nothing but the options. Runs on the driver."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from spark_mnist import errors, kinds, manifests, networks, options, plan, schema
from spark_mnist import store as stores


@dataclass(frozen=True, kw_only=True)
class Start:
    """All that training begins with, and of what model it is."""

    network: plan.Network
    optimizer: plan.Optimizer
    seed: int
    reads: plan.Input | None
    """None for a table whose width and classes have not been looked at."""
    standardize: bool
    version: int | None = None
    """Number of the saved version, None when training starts afresh."""
    epochs: int = 0
    """Epochs trained so far."""
    files: Mapping[str, bytes | stores.StoredFile] = field(default_factory=dict)
    """Checkpoint of the saved version, or the weights of the user's model."""
    own: Any = None
    """The user's Keras model, or his function that makes it."""

    @property
    def make(self) -> plan.Maker | None:
        """The user's function."""
        return None if self.own is None or manifests.is_model(self.own) else self.own

    def reading(self, reads: plan.Input) -> Start:
        """The same start, with a network that fits the rows.

        Raises:
            errors.ModelMismatch: The user's model does not fit them, or is not the saved one.
        """
        if not self.version:
            sized = dataclasses.replace(self.network, inputs=reads.width, classes=reads.classes)
            begin = dataclasses.replace(self, reads=reads, network=sized)
        else:
            begin = self
        return begin._with_model() if manifests.is_model(self.own) else begin

    def _with_model(self) -> Start:
        from spark_mnist import checkpoint, own

        network = own.describe(self.own, self.network)
        if network.custom:
            raise errors.ModelMismatch(
                f"the model has objects that are not Keras's own ({', '.join(network.custom)}); "
                "give network= the function that makes it in place of the model"
            )
        if self.version:
            own.check_same(self.network, network)
            return self
        weights = checkpoint.pack_weights(networks.build(network, self.own))
        return dataclasses.replace(self, network=network, files={plan.WEIGHTS: weights})


def start(store: stores.Store, name: str, chosen: options.FitOptions) -> Start:
    """Find out what a fit starts from.

    Raises:
        errors.OptionError: Options do not go together.
        errors.ModelNotFound: The model to continue is not there.
        errors.ModelMismatch: It is, with another network or optimizer than the options ask for.
        errors.DamagedModel: Its files are not what was written.
    """
    begin = _continued(store, name, chosen) if chosen.continuous else _afresh(chosen)
    last = begin.epochs + chosen.epochs
    try:
        rate = begin.optimizer.rate(last - 1, 1)
    except OverflowError:
        rate = math.inf
    if rate == 0 or math.isinf(rate):
        raise errors.OptionError(
            f"with lr_schedule={begin.optimizer.schedule} nothing is learned any more in epoch "
            f"{last}, whose learning rate is {rate}: name another schedule, say constant, or fewer "
            "epochs"
        )
    return begin


def _afresh(chosen: options.FitOptions) -> Start:
    """Start with nothing but the options."""
    network = _network(chosen)
    kind = chosen.optimizer or next(iter(networks.OPTIMIZERS))
    table = networks.is_table(network.name)
    standardize = table if chosen.standardize is None else chosen.standardize
    return Start(
        network=network,
        optimizer=plan.Optimizer(
            name=kind,
            learning_rate=chosen.learning_rate or networks.OPTIMIZERS[kind].learning_rate,
            warmup_epochs=chosen.warmup_epochs or 0,
            schedule=chosen.lr_schedule or "constant",
        ),
        seed=chosen.seed or 0,
        reads=_pictures(network.name, chosen),
        standardize=standardize,
        own=None if isinstance(chosen.network, str) else chosen.network,
    )


def _continued(store: stores.Store, name: str, chosen: options.FitOptions) -> Start:
    """Start from the newest version of a saved model."""
    version = store.newest(name)
    manifest = store.manifest(name, version)
    reads, network, optimizer = manifests.described(manifest)
    _check_unchanged(name, network, optimizer, reads, chosen)
    manifests.check_makeable(name, network, chosen.network)
    perhaps = (plan.LOSS_SCALE,) if plan.LOSS_SCALE in manifest["files"] else ()
    files = store.stored(name, version, (plan.WEIGHTS, plan.OPTIMIZER, *perhaps))
    changes: dict[str, Any] = {
        "learning_rate": chosen.learning_rate,
        "warmup_epochs": chosen.warmup_epochs,
        "schedule": chosen.lr_schedule,
    }
    changed = {name: value for name, value in changes.items() if value is not None}
    return Start(
        network=network,
        optimizer=dataclasses.replace(optimizer, **changed),
        seed=manifest["seed"] if chosen.seed is None else chosen.seed,
        reads=reads,
        standardize=bool(network.mean),
        version=version,
        epochs=manifest["epochs"],
        files=files,
        own=None if isinstance(chosen.network, str) else chosen.network,
    )


def _network(chosen: options.FitOptions) -> plan.Network:
    """The network that options describe; how wide it is, only the rows tell."""
    name = chosen.network or (networks.TABLE if chosen.features else networks.PICTURES)
    if not isinstance(name, str):
        if chosen.hidden or chosen.dropout is not None:
            raise errors.OptionError("hidden and dropout are not for a model of your own")
        return plan.Network(name=plan.OWN, inputs=0, classes=0)
    known = networks.REGISTRY[name]
    hidden = _units(chosen.hidden) if chosen.hidden else known.hidden
    dropout = known.dropout if chosen.dropout is None else chosen.dropout
    if not known.hidden and (hidden or dropout):
        raise errors.OptionError(f"{name} has no hidden layers: leave out hidden and dropout")
    return plan.Network(name=name, inputs=0, classes=0, hidden=hidden, dropout=dropout)


def _pictures(network: str, chosen: options.FitOptions) -> plan.Input | None:
    """What a network of pictures reads; None for a table."""
    columns = kinds.columns(chosen.features) or ("image",)
    table = networks.is_table(network)
    if table and not chosen.features:
        raise errors.OptionError(f"{network} reads a table: name its columns, features=a,b,c")
    if table or (network == plan.OWN and chosen.features):
        return None
    if not any(schema.PATTERN in name for name in columns):
        check_pixels(network, columns)
    return plan.Input(features=columns, label=chosen.label or "label")


def check_pixels(network: str, columns: tuple[str, ...]) -> None:
    """Refuse columns that are no picture's.

    Raises:
        errors.OptionError: They are neither one nor one for each pixel.
    """
    if len(columns) not in (1, plan.Input.width):
        raise errors.OptionError(
            f"{network} reads pictures of 784 pixels, from one column or from 784, not from "
            f"{len(columns)}; network={networks.TABLE} reads a table"
        )


def _units(text: str) -> tuple[int, ...]:
    return tuple(int(units) for units in text.split(","))


def _check_unchanged(
    name: str,
    network: plan.Network,
    optimizer: plan.Optimizer,
    reads: plan.Input,
    chosen: options.FitOptions,
) -> None:
    saved = {
        "network": network.name,
        "hidden": ",".join(map(str, network.hidden)),
        "dropout": network.dropout,
        "optimizer": optimizer.name,
        "features": ",".join(reads.features),
        "label": reads.label,
        "standardize": bool(network.mean),
    }
    columns = kinds.columns(chosen.features)
    if schema.expand(reads.features, columns) == reads.features:
        columns = reads.features
    wanted = dataclasses.asdict(
        dataclasses.replace(
            chosen,
            features=",".join(columns) or None,
            network=chosen.network if isinstance(chosen.network, str) else None,
        )
    )
    for option, value in saved.items():
        if wanted[option] not in (None, value):
            raise manifests.mismatch(name, option, value, wanted[option])
