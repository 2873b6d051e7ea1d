"""Manifests: what they say of a version, and how a saved version is read. Runs on: driver."""

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
"""Libraries whose versions are recorded in each manifest."""


@dataclass(frozen=True)
class SavedModel:
    """A saved version that is to be applied."""

    input_spec: plan.InputSpec
    network: plan.Network
    files: Mapping[str, bytes]
    """Weights of the version, by file name."""
    model_fn: plan.ModelFn | None
    """The user's function, if the network has custom objects."""


def load(
    store: model_store.Store, name: str, version: int | None, network_option: Any
) -> SavedModel:
    """Read a version that is to be applied: its input, its network, its weights.

    Args:
        store: The store that has it.
        name: Name of the model.
        version: Number of the version; None for the newest.
        network_option: The value of ``network=``, a name, a model or a function, or None.

    Raises:
        errors.ModelNotFound: The version does not exist.
        errors.ModelMismatch: Only the user's function can make the network.
        errors.DamagedModel: The files are not what was written.
    """
    manifest, files = store.read(name, store.resolve_version(name, version), (plan.WEIGHTS,))
    input_spec, network, _ = parse(manifest)
    check_makeable(name, network, network_option)
    return SavedModel(input_spec, network, files, network_option if network.custom else None)


def parse(
    manifest: model_store.Manifest,
) -> tuple[plan.InputSpec, plan.Network, plan.Optimizer]:
    """Return the input, the network and the optimizer that a manifest describes.

    A manifest without an input, as the first release wrote it, reads pictures.

    Raises:
        errors.DamagedModel: The manifest does not say what it should.
    """
    try:
        input_spec = _parse_input(manifest.get("input", {}))
        network = _parse_network(manifest["network"], input_spec)
        optimizer = plan.Optimizer(**manifest["optimizer"])
        if network.name not in (*registry.REGISTRY, plan.CUSTOM):
            raise KeyError(f"there is no network {network.name!r} in this release")
        wrong_fields = {"input": _wrong_input(input_spec), "network": _wrong_network(network)}
        wrong_fields["optimizer"] = _wrong_optimizer(optimizer)
        wrong_fields["outputs"] = _wrong_outputs(network)
        for part, names in wrong_fields.items():
            if names:
                raise ValueError(f"{part} has an invalid {', '.join(names)}")
        for field, value_type in (("epochs", value_types.POSITIVE_INT), ("seed", value_types.SEED)):
            if not value_type.allows(manifest[field]):
                raise ValueError(f"it has an invalid {field}")
        if (network.inputs, network.classes) != (input_spec.width, input_spec.classes):
            raise ValueError("its network is not for its input")
        return input_spec, network, optimizer
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise errors.DamagedModel(
            f"a version of model {manifest.get('name')!r} cannot be used: its manifest does not "
            f"say what was trained ({error!r})"
        ) from None


def _parse_input(fields: Mapping[str, Any]) -> plan.InputSpec:
    inputs = tuple(plan.Input(**_with_tuples(each)) for each in fields.get("inputs", ()))
    return plan.InputSpec(**{**_with_tuples(fields), "inputs": inputs})


def _parse_network(fields: Mapping[str, Any], input_spec: plan.InputSpec) -> plan.Network:
    """Return the network; before there were outputs, one learned classes."""
    values = _with_tuples(fields)
    has_logits = values.pop("logits", False)
    outputs = tuple(plan.Output(**_with_tuples(each)) for each in fields.get("outputs", ()))
    if not outputs:
        outputs = (dataclasses.replace(input_spec.output, logits=has_logits),)
    parts = tuple((name, width) for name, width in fields.get("parts", ()))
    return plan.Network(**{**values, "outputs": outputs, "parts": parts})


def _wrong_outputs(network: plan.Network) -> list[str]:
    """Return the names of the fields whose values no release writes."""
    wrong = []
    for output in network.outputs:
        statistics = {name: getattr(output, name) for name in ("mean", "deviation")}
        validity = {
            "task": output.task in plan.TASKS,
            "size": value_types.POSITIVE_INT.allows(output.size),
            "name": isinstance(output.name, str),
            "label": isinstance(output.label, str),
            "names": _is_tuple_of(str, output.names) and len(output.names) in (0, output.size),
            "loss": isinstance(output.loss, str),
            "weight": value_types.POSITIVE_FLOAT.allows(output.weight),
            "logits": isinstance(output.logits, bool),
            **{
                name: _is_tuple_of(float, values) and len(values) in (0, output.size)
                for name, values in statistics.items()
            },
        }
        wrong += [field for field, is_valid in validity.items() if not is_valid]
    if sum(output.size for output in network.outputs) != network.classes:
        wrong.append("size")
    if network.parts and (
        not all(
            isinstance(name, str) and value_types.POSITIVE_INT.allows(width)
            for name, width in network.parts
        )
        or sum(width for _, width in network.parts) != network.inputs
    ):
        wrong.append("parts")
    return wrong


def _wrong_input(input_spec: plan.InputSpec) -> list[str]:
    """Return the names of the fields whose values no release writes."""
    names_fit = _is_tuple_of(str, input_spec.names) and len(input_spec.names) in (
        0,
        input_spec.classes,
    )
    validity = {
        "features": _is_tuple_of(str, input_spec.features) and len(input_spec.features) > 0,
        "label": isinstance(input_spec.label, str),
        "pixels": isinstance(input_spec.pixels, bool),
        "text_in_bytes": isinstance(input_spec.text_in_bytes, bool),
        "width": value_types.POSITIVE_INT.allows(input_spec.width),
        "classes": value_types.POSITIVE_INT.allows(input_spec.classes),
        "names": names_fit,
        "whole": isinstance(input_spec.whole, bool),
        "categories": value_types.NON_NEGATIVE_INT.allows(input_spec.categories),
        "inputs": all(
            isinstance(each.name, str)
            and _is_tuple_of(str, each.features)
            and isinstance(each.pixels, bool)
            and value_types.POSITIVE_INT.allows(each.width)
            and isinstance(each.whole, bool)
            and value_types.NON_NEGATIVE_INT.allows(each.categories)
            for each in input_spec.inputs
        ),
    }
    return [field for field, is_valid in validity.items() if not is_valid]


def _wrong_network(network: plan.Network) -> list[str]:
    """Return the names of the fields whose values no release writes."""
    statistics = {name: getattr(network, name) for name in ("mean", "deviation")}
    validity = {
        "inputs": value_types.POSITIVE_INT.allows(network.inputs),
        "classes": value_types.POSITIVE_INT.allows(network.classes),
        "hidden": all(map(value_types.POSITIVE_INT.allows, network.hidden)),
        "dropout": value_types.FRACTION_BELOW_ONE.allows(network.dropout),
        **{
            name: _is_tuple_of(float, values) and len(values) in (0, network.inputs)
            for name, values in statistics.items()
        },
        "config": network.config is None or isinstance(network.config, dict),
        "custom": _is_tuple_of(str, network.custom),
    }
    return [field for field, is_valid in validity.items() if not is_valid]


def _wrong_optimizer(optimizer: plan.Optimizer) -> list[str]:
    """Return the names of the fields whose values no release writes."""
    validity = {
        "name": optimizer.name in (*registry.OPTIMIZERS, plan.CUSTOM),
        "learning_rate": value_types.POSITIVE_FLOAT.allows(optimizer.learning_rate),
        "warmup_epochs": value_types.NON_NEGATIVE_INT.allows(optimizer.warmup_epochs),
        "schedule": value_types.SCHEDULE.allows(optimizer.schedule),
        "clipnorm": optimizer.clipnorm is None
        or value_types.POSITIVE_FLOAT.allows(optimizer.clipnorm),
        "accumulate_steps": value_types.POSITIVE_INT.allows(optimizer.accumulate_steps),
    }
    return [field for field, is_valid in validity.items() if not is_valid]


def _is_tuple_of(kind: type, values: Any) -> bool:
    return isinstance(values, tuple) and all(isinstance(value, kind) for value in values)


def compose(
    name: str,
    version: int,
    *,
    parent: int | None,
    input_spec: plan.InputSpec,
    training: plan.TrainingPlan,
    report: plan.RankSuccess,
    rows: row_counts.RowCounts,
) -> dict[str, Any]:
    """Return the manifest of a version that is about to be published, as JSON values."""
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
        "rows": rows.as_manifest(),
        "libraries": {library: _version(library) for library in LIBRARIES},
    }


def check_makeable(name: str, network: plan.Network, network_option: Any) -> None:
    """Refuse a saved network that only the user's function can make, without that function.

    Raises:
        errors.ModelMismatch: The function is missing, or is given for a network of this library.
    """
    if isinstance(network_option, str) or (
        network_option is not None and network.name != plan.CUSTOM
    ):
        if network_option != network.name:
            raise mismatch(name, "network", network.name, network_option)
    elif network.custom and (network_option is None or is_model(network_option)):
        raise errors.ModelMismatch(
            f"model {name!r} has objects that are not Keras's own ({', '.join(network.custom)}): "
            "give the function that makes it, network=..."
        )


def mismatch(name: str, option: str, saved_value: Any, new_value: Any) -> errors.ModelMismatch:
    """Return the error that names an option's saved value and the new one."""
    return errors.ModelMismatch(
        f"model {name!r} has {option}={saved_value}, and cannot be continued or applied with "
        f"{option}={new_value}; leave {option} out, or train from scratch"
    )


def is_model(value: Any) -> bool:
    """Return whether a value is a Keras model; Keras is not imported where nobody has made one."""
    keras = sys.modules.get("keras")
    return keras is not None and isinstance(value, keras.Model)


def _with_tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()
    }


def _version(library: str) -> str | None:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None
