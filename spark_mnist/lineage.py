"""What a fit starts from and what it leaves: from manifest to manifest. Runs on the driver."""

from __future__ import annotations

import dataclasses
import datetime
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from spark_mnist import errors, kinds, networks, options, plan
from spark_mnist import store as stores

LIBRARIES = ("spark-mnist", "keras", "horovod", "petastorm", "pyspark", "pyarrow", "numpy")
"""Their versions are noted in each manifest."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a fit starts from: a saved version, or nothing but the options."""

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
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Checkpoint of the saved version, or the weights of the user's model."""
    own: Any = None
    """The user's Keras model, or his function that makes it."""

    @property
    def make(self) -> plan.Maker | None:
        """The user's function."""
        return None if self.own is None or _is_model(self.own) else self.own

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
        return begin._with_model() if _is_model(self.own) else begin

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


@dataclass(frozen=True)
class Saved:
    """A saved version that is to be applied."""

    reads: plan.Input
    network: plan.Network
    files: Mapping[str, bytes]
    """Its weights."""
    make: plan.Maker | None
    """The user's function, if the network has objects of his own."""


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
    if begin.optimizer.rate(last - 1, 1) == 0:
        raise errors.OptionError(
            f"with lr_schedule={begin.optimizer.schedule} nothing is learned any more in epoch "
            f"{last}: name another schedule, say constant, or fewer epochs"
        )
    return begin


def saved(store: stores.Store, name: str, version: int | None, given: Any) -> Saved:
    """Read a version that is to be applied: what it reads, its network, its weights.

    Args:
        store: Where it is.
        name: Of the model.
        version: Its number; None for the newest.
        given: The value of ``network=``, a name, a model or a function, or None.

    Raises:
        errors.ModelNotFound: It is not there.
        errors.ModelMismatch: Only the user's function can make its network.
        errors.DamagedModel: Its files are not what was written.
    """
    manifest, files = store.read(name, store.newest(name, version), (plan.WEIGHTS,))
    reads, network, _ = described(manifest)
    _check_makeable(name, network, given)
    return Saved(reads, network, files, given if network.custom else None)


def described(manifest: stores.Manifest) -> tuple[plan.Input, plan.Network, plan.Optimizer]:
    """What a manifest says; one without an input, as the first release wrote, reads pictures.

    Raises:
        errors.DamagedModel: It does not say what it should.
    """
    try:
        return (
            plan.Input(**_with_tuples(manifest.get("input", {}))),
            plan.Network(**_with_tuples(manifest["network"])),
            plan.Optimizer(**manifest["optimizer"]),
        )
    except (AttributeError, KeyError, TypeError) as error:
        raise errors.DamagedModel(
            f"a version of model {manifest.get('name')!r} cannot be used: its manifest does not "
            f"say what was trained ({error!r})"
        ) from None


def _afresh(chosen: options.FitOptions) -> Start:
    """Start with nothing but the options."""
    network = _network(chosen)
    kind = chosen.optimizer or next(iter(networks.OPTIMIZERS))
    standardize = _is_table(network.name) if chosen.standardize is None else chosen.standardize
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
    manifest, files = store.read(name, version, (plan.WEIGHTS, plan.OPTIMIZER))
    reads, network, optimizer = described(manifest)
    _check_unchanged(name, network, optimizer, reads, chosen)
    _check_makeable(name, network, chosen.network)
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


def _check_makeable(name: str, network: plan.Network, given: Any) -> None:
    """Refuse a saved network that only the user's function can make, without that function."""
    if isinstance(given, str) or (given is not None and network.name != plan.OWN):
        if given != network.name:
            raise _mismatch(name, "network", network.name, given)
    elif network.custom and (given is None or _is_model(given)):
        raise errors.ModelMismatch(
            f"model {name!r} has objects that are not Keras's own ({', '.join(network.custom)}): "
            "give the function that makes it, network=..."
        )


def _with_tuples(described: Mapping[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in described.items()}


def _is_model(value: Any) -> bool:
    """Whether this is a Keras model, without importing Keras where nobody has made one."""
    keras = sys.modules.get("keras")
    return keras is not None and isinstance(value, keras.Model)


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
    table = _is_table(network)
    if table and not chosen.features:
        raise errors.OptionError(f"{network} reads a table: name its columns, features=a,b,c")
    if table or (network == plan.OWN and chosen.features):
        return None
    if len(columns) > 1:
        raise errors.OptionError(
            f"{network} reads pictures of 784 pixels, from one column, not from {len(columns)}; "
            f"network={networks.TABLE} reads a table"
        )
    return plan.Input(features=columns, label=chosen.label or "label")


def _is_table(network: str) -> bool:
    return network in networks.REGISTRY and networks.REGISTRY[network].table


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
    wanted = dataclasses.asdict(
        dataclasses.replace(
            chosen,
            features=",".join(columns) or None,
            network=chosen.network if isinstance(chosen.network, str) else None,
        )
    )
    for option, value in saved.items():
        if wanted[option] not in (None, value):
            raise _mismatch(name, option, value, wanted[option])


def _mismatch(name: str, option: str, saved: Any, wanted: Any) -> errors.ModelMismatch:
    return errors.ModelMismatch(
        f"model {name!r} has {option}={saved}, and cannot be continued or applied with "
        f"{option}={wanted}; leave {option} out, or train afresh"
    )


def manifest(
    name: str,
    version: int,
    begin: Start,
    training: plan.TrainingPlan,
    report: plan.RankReport,
) -> dict[str, Any]:
    """Describe a version that is about to be published, as JSON values."""
    assert begin.reads is not None
    assert report.network is not None
    return {
        "name": name,
        "version": version,
        "parent": begin.version,
        "created": datetime.datetime.now(datetime.UTC).isoformat(),
        "input": dataclasses.asdict(begin.reads),
        "network": dataclasses.asdict(report.network),
        "optimizer": dataclasses.asdict(training.optimizer),
        "epochs": report.epoch,
        "history": [dataclasses.asdict(record) for record in report.history],
        "ranks": training.world.size,
        "batch_size": training.world.batch_size,
        "seed": training.seed,
        "rows": {"train": training.train.rows, "validation": training.validation.rows},
        "libraries": {library: _version(library) for library in LIBRARIES},
    }


def _version(library: str) -> str | None:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None
