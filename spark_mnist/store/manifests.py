"""What a manifest says of a version, and what it takes to apply one. Runs on the driver."""

from __future__ import annotations

import dataclasses
import datetime
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from spark_mnist import errors
from spark_mnist.core import plan
from spark_mnist.data import row_counts
from spark_mnist.networks import registry
from spark_mnist.options import value_types
from spark_mnist.store import model_store

LIBRARIES = ("spark-mnist", "keras", "horovod", "petastorm", "pyspark", "pyarrow", "numpy")
"""Their versions are noted in each manifest."""


@dataclass(frozen=True)
class Saved:
    """A saved version that is to be applied."""

    input_spec: plan.InputSpec
    network: plan.Network
    files: Mapping[str, bytes]
    """Its weights."""
    model_fn: plan.ModelFn | None
    """The user's function, if the network has objects of his own."""


def saved(store: model_store.Store, name: str, version: int | None, given: Any) -> Saved:
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
    manifest, files = store.read(name, store.resolve_version(name, version), (plan.WEIGHTS,))
    input_spec, network, _ = described(manifest)
    check_makeable(name, network, given)
    return Saved(input_spec, network, files, given if network.custom else None)


def described(
    manifest: model_store.Manifest,
) -> tuple[plan.InputSpec, plan.Network, plan.Optimizer]:
    """What a manifest says; one without an input, as the first release wrote, reads pictures.

    Raises:
        errors.DamagedModel: It does not say what it should.
    """
    try:
        input_spec = plan.InputSpec(**_with_tuples(manifest.get("input", {})))
        network = plan.Network(**_with_tuples(manifest["network"]))
        optimizer = plan.Optimizer(**manifest["optimizer"])
        if network.name not in (*registry.REGISTRY, plan.CUSTOM):
            raise KeyError(f"there is no network {network.name!r} in this release")
        found = {"input": _wrong_input(input_spec), "network": _wrong_network(network)}
        found["optimizer"] = _wrong_optimizer(optimizer)
        for part, wrong in found.items():
            if wrong:
                raise ValueError(f"{part} has no sound {', '.join(wrong)}")
        for field, kind in (("epochs", value_types.POSITIVE_INT), ("seed", value_types.SEED)):
            if not kind.allows(manifest[field]):
                raise ValueError(f"it has no sound {field}")
        if (network.inputs, network.classes) != (input_spec.width, input_spec.classes):
            raise ValueError("its network is not for its input")
        return input_spec, network, optimizer
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise errors.DamagedModel(
            f"a version of model {manifest.get('name')!r} cannot be used: its manifest does not "
            f"say what was trained ({error!r})"
        ) from None


def _wrong_input(input_spec: plan.InputSpec) -> list[str]:
    """Fields that no release writes so."""
    names = _are(str, input_spec.names) and len(input_spec.names) in (0, input_spec.classes)
    sound = {
        "features": _are(str, input_spec.features) and len(input_spec.features) > 0,
        "label": isinstance(input_spec.label, str),
        "pixels": isinstance(input_spec.pixels, bool),
        "text_in_bytes": isinstance(input_spec.text_in_bytes, bool),
        "width": value_types.POSITIVE_INT.allows(input_spec.width),
        "classes": value_types.POSITIVE_INT.allows(input_spec.classes),
        "names": names,
    }
    return [field for field, right in sound.items() if not right]


def _wrong_network(network: plan.Network) -> list[str]:
    """Fields that no release writes so."""
    learned = {name: getattr(network, name) for name in ("mean", "deviation")}
    sound = {
        "inputs": value_types.POSITIVE_INT.allows(network.inputs),
        "classes": value_types.POSITIVE_INT.allows(network.classes),
        "hidden": all(map(value_types.POSITIVE_INT.allows, network.hidden)),
        "dropout": value_types.FRACTION_BELOW_ONE.allows(network.dropout),
        **{
            name: _are(float, values) and len(values) in (0, network.inputs)
            for name, values in learned.items()
        },
        "config": network.config is None or isinstance(network.config, dict),
        "custom": _are(str, network.custom),
        "logits": isinstance(network.logits, bool),
    }
    return [field for field, right in sound.items() if not right]


def _wrong_optimizer(optimizer: plan.Optimizer) -> list[str]:
    """Fields that no release writes so."""
    sound = {
        "name": optimizer.name in registry.OPTIMIZERS,
        "learning_rate": value_types.POSITIVE_FLOAT.allows(optimizer.learning_rate),
        "warmup_epochs": value_types.NON_NEGATIVE_INT.allows(optimizer.warmup_epochs),
        "schedule": value_types.SCHEDULE.allows(optimizer.schedule),
    }
    return [field for field, right in sound.items() if not right]


def _are(kind: type, values: Any) -> bool:
    return isinstance(values, tuple) and all(isinstance(value, kind) for value in values)


def compose(
    name: str,
    version: int,
    *,
    parent: int | None,
    input_spec: plan.InputSpec,
    training: plan.TrainingPlan,
    report: plan.RankReport,
    rows: row_counts.RowCounts,
) -> dict[str, Any]:
    """Describe a version that is about to be published, as JSON values."""
    assert report.network is not None
    assert report.progress is not None
    return {
        "name": name,
        "version": version,
        "parent": parent,
        "created": datetime.datetime.now(datetime.UTC).isoformat(),
        "input": dataclasses.asdict(input_spec),
        "network": dataclasses.asdict(report.network),
        "optimizer": dataclasses.asdict(training.optimizer),
        "epochs": report.progress.best.epoch,
        "history": [dataclasses.asdict(record) for record in report.progress.history],
        "ranks": training.sharding.size,
        "batch_size": training.sharding.batch_size,
        "seed": training.seed,
        "rows": dataclasses.asdict(rows),
        "libraries": {library: _version(library) for library in LIBRARIES},
    }


def check_makeable(name: str, network: plan.Network, given: Any) -> None:
    """Refuse a saved network that only the user's function can make, without that function.

    Raises:
        errors.ModelMismatch: The function is missing, or there is one for a network of ours.
    """
    if isinstance(given, str) or (given is not None and network.name != plan.CUSTOM):
        if given != network.name:
            raise mismatch(name, "network", network.name, given)
    elif network.custom and (given is None or is_model(given)):
        raise errors.ModelMismatch(
            f"model {name!r} has objects that are not Keras's own ({', '.join(network.custom)}): "
            "give the function that makes it, network=..."
        )


def mismatch(name: str, option: str, saved: Any, wanted: Any) -> errors.ModelMismatch:
    """The error that names an option's saved value and the one that was asked for."""
    return errors.ModelMismatch(
        f"model {name!r} has {option}={saved}, and cannot be continued or applied with "
        f"{option}={wanted}; leave {option} out, or train afresh"
    )


def is_model(value: Any) -> bool:
    """Whether this is a Keras model, without importing Keras where nobody has made one."""
    keras = sys.modules.get("keras")
    return keras is not None and isinstance(value, keras.Model)


def _with_tuples(described: Mapping[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in described.items()}


def _version(library: str) -> str | None:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None
