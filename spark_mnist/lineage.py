"""What a fit starts from and what it leaves: from manifest to manifest. Runs on the driver."""

from __future__ import annotations

import dataclasses
import datetime
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from spark_mnist import errors, options, plan, schema
from spark_mnist import store as stores

HIDDEN: dict[str, tuple[int, ...]] = {
    "softmax": (),
    "mlp": (128, 32),
    "small": (20, 20),
    "cnn": (1024,),
}
"""Dense hidden layers of each network, where none are given."""
DROPOUT = {"softmax": 0.0, "mlp": 0.0, "small": 0.0, "cnn": 0.5}
"""Dropout of each network, where none is given."""
LEARNING_RATES = {"adam": 0.001, "sgd": 0.1, "momentum": 0.02}
"""For one rank, where none is given."""
LIBRARIES = ("spark-mnist", "keras", "horovod", "petastorm", "pyspark", "pyarrow", "numpy")
"""Their versions are noted in each manifest."""


@dataclass(frozen=True)
class Start:
    """What a fit starts from: a saved version, or nothing but the options."""

    network: plan.Network
    optimizer: plan.Optimizer
    seed: int
    version: int | None = None
    """Number of the saved version, None when training starts afresh."""
    epochs: int = 0
    """Epochs trained so far."""
    files: dict[str, bytes] = field(default_factory=dict)
    """Checkpoint of the saved version."""


def start(store: stores.Store, name: str, chosen: options.FitOptions) -> Start:
    """Find out what a fit starts from.

    Raises:
        errors.ModelNotFound: The model to continue is not there.
        errors.ModelMismatch: It is, with another network or optimizer than the options ask for.
        errors.DamagedModel: Its files are not what was written.
    """
    if not chosen.continuous:
        kind = chosen.optimizer or "adam"
        rate = chosen.learning_rate or LEARNING_RATES[kind]
        optimizer = plan.Optimizer(name=kind, learning_rate=rate)
        return Start(_network(chosen), optimizer, chosen.seed or 0)
    version = store.newest(name)
    manifest, files = store.read(name, version)
    network, saved = saved_network(manifest), plan.Optimizer(**manifest["optimizer"])
    _check_unchanged(name, network, saved, chosen)
    rate = chosen.learning_rate or saved.learning_rate
    seed = manifest["seed"] if chosen.seed is None else chosen.seed
    optimizer = dataclasses.replace(saved, learning_rate=rate)
    return Start(network, optimizer, seed, version, manifest["epochs"], files)


def saved_network(manifest: stores.Manifest) -> plan.Network:
    """The network of a saved version."""
    described = manifest["network"]
    return plan.Network(**{**described, "hidden": tuple(described["hidden"])})


def _network(chosen: options.FitOptions) -> plan.Network:
    name = chosen.network or "mlp"
    hidden = _units(chosen.hidden) if chosen.hidden else HIDDEN[name]
    dropout = DROPOUT[name] if chosen.dropout is None else chosen.dropout
    if name == "softmax" and (hidden or dropout):
        raise errors.OptionError("softmax has no hidden layers: leave out hidden and dropout")
    return plan.Network(
        name=name, inputs=schema.WIDTH, classes=schema.CLASSES, hidden=hidden, dropout=dropout
    )


def _units(text: str) -> tuple[int, ...]:
    return tuple(int(units) for units in text.split(","))


def _check_unchanged(
    name: str, network: plan.Network, optimizer: plan.Optimizer, chosen: options.FitOptions
) -> None:
    saved = {
        "network": network.name,
        "hidden": ",".join(map(str, network.hidden)),
        "dropout": network.dropout,
        "optimizer": optimizer.name,
    }
    for option, value in saved.items():
        wanted = getattr(chosen, option)
        if wanted not in (None, value):
            raise errors.ModelMismatch(
                f"model {name!r} has {option}={value}, and continuous=true cannot make it "
                f"{wanted}; leave {option} out, or train afresh"
            )


def manifest(
    name: str,
    version: int,
    training: plan.TrainingPlan,
    begin: Start,
    records: tuple[plan.EpochRecord, ...],
) -> dict[str, Any]:
    """Describe a version that is about to be published, as JSON values."""
    return {
        "name": name,
        "version": version,
        "parent": begin.version,
        "created": datetime.datetime.now(datetime.UTC).isoformat(),
        "network": dataclasses.asdict(training.network),
        "optimizer": dataclasses.asdict(training.optimizer),
        "epochs": begin.epochs + training.epochs,
        "history": [dataclasses.asdict(record) for record in records],
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
