"""Keras models that users bring: described for the store, and made again from the description.

A description is Keras's own configuration. It comes from a store that others may write to, so it
is read by its own rules: every object must be one of Keras's, and none of those that run code or
open files. A model with other objects is trained and applied all the same, where the user gives
the function that makes it. Runs on the driver, if a model was made there, on ranks and executors.

Shape letters: B = rows of a batch.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
from keras import layers

from spark_mnist import errors
from spark_mnist.core import plan

MODULES = (
    "keras",
    "keras.activations",
    "keras.constraints",
    "keras.dtype_policies",
    "keras.initializers",
    "keras.layers",
    "keras.regularizers",
)
INNER_MODULES = (
    "keras.src.models.functional",
    "keras.src.models.sequential",
    "keras.src.ops.image",
    "keras.src.ops.math",
    "keras.src.ops.nn",
    "keras.src.ops.numpy",
)
"""Keras names these for its models and for what stands for ``x + y``."""
VALUES = {"__ellipsis__", "__keras_tensor__", "__numpy__", "__slice__", "__tensor__"}
"""Names under which Keras writes plain values."""
REFUSED = {
    "FlaxLayer",
    "IntegerLookup",
    "JaxLayer",
    "Lambda",
    "StringLookup",
    "TFSMLayer",
    "TextVectorization",
    "TorchModuleWrapper",
}
"""Layers of Keras that run code of their configuration, or open files that it names."""


def describe(model: keras.Model, network: plan.Network) -> plan.Network:
    """Describe a user's model.

    Args:
        model: Takes ``[B, ...]`` of ``network.inputs`` numbers a row, gives ``[B, classes]``.
        network: Its inputs and classes.

    Returns:
        ``network`` with the model's configuration, what in it only the user can make, and whether
        a softmax is missing at its end.

    Raises:
        errors.ModelMismatch: It does not take such rows, or does not give a number for each class.
    """
    if not isinstance(model, keras.Model):
        raise errors.ModelMismatch(
            f"network must make a Keras model, not {type(model).__name__} {model!r:.80}"
        )
    if isinstance(model, keras.Sequential) and not model.built:
        model.build((None, network.inputs))
    probe = np.random.default_rng(0).random((4, network.inputs), dtype="float32")
    parts = keras.tree.flatten(model(_shaped(model, probe), training=False))
    if len(parts) != 1:
        raise errors.ModelMismatch(
            f"the network has {len(parts)} outputs; it must have one, a number for each class"
        )
    outputs = np.asarray(parts[0])
    if outputs.shape != (4, network.classes):
        raise errors.ModelMismatch(
            f"the network gives {'x'.join(map(str, outputs.shape[1:])) or 1} numbers a row, and "
            f"there are {network.classes} classes (ten, unless features= names the columns)"
        )
    if model.layers and getattr(model.layers[-1], "activation", None) is keras.activations.sigmoid:
        raise errors.ModelMismatch(
            "the network ends with a sigmoid; end it with a softmax, or without an activation"
        )
    probabilities = bool((outputs >= 0).all() and np.allclose(outputs.sum(axis=1), 1, atol=1e-3))
    config, custom = _configuration(model)
    described = dataclasses.replace(network, config=config, custom=custom, logits=not probabilities)
    if not custom and not _same_outputs(described, model, probe, outputs):
        return dataclasses.replace(described, custom=("a function named like one of Keras's",))
    return described


def settle(model: keras.Model) -> None:
    """Let layers that compute with what they made of their weights make it anew."""
    for layer in model._flatten_layers(include_self=False):
        if isinstance(layer, layers.Normalization):
            layer.finalize_state()


def check_same(saved: plan.Network, described: plan.Network) -> None:
    """Compare a user's model with the saved one that it should be; names of layers may differ.

    Raises:
        errors.ModelMismatch: It is another.
    """
    if _canonical(saved.config) != _canonical(described.config):
        raise errors.ModelMismatch(
            f"the saved model has the layers {_layers(saved.config)}; network=... now makes "
            f"{_layers(described.config)}, or the same with other settings"
        )


def attach(
    x: keras.KerasTensor, network: plan.Network, user_model: keras.Model | None
) -> keras.KerasTensor:
    """Put the user's model, or its like, behind the inputs, up to class probabilities.

    Raises:
        errors.ModelMismatch: Only the user's function can make it, and there is none.
    """
    model = _rebuilt(network) if user_model is None else user_model
    shape = _row_shape(model, network.inputs)
    if shape != (network.inputs,):
        x = layers.Reshape(shape)(x)
    outputs = model(x)
    return layers.Softmax()(outputs) if network.logits else outputs


def _outputs(model: keras.Model, rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """What the model gives for rows ``[B, inputs]``."""
    return np.asarray(model(_shaped(model, rows), training=False))


def _shaped(model: keras.Model, rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return rows ``[B, inputs]`` in the shape in which the model takes them."""
    return rows.reshape(len(rows), *_row_shape(model, rows.shape[1]))


def _same_outputs(
    described: plan.Network,
    model: keras.Model,
    rows: npt.NDArray[np.float32],
    outputs: npt.NDArray[np.float32],
) -> bool:
    """Whether the model made from its description computes what the model does.

    It does not where a function of the user's bears the name of one of Keras's: Keras writes the
    name alone.
    """
    again = _rebuilt(described)
    again(_shaped(model, rows))
    again.set_weights(model.get_weights())
    settle(again)
    return bool(np.allclose(_outputs(again, rows), outputs, atol=1e-6, rtol=1e-5))


def _row_shape(model: keras.Model, inputs: int) -> tuple[int, ...]:
    """The shape in which the model takes the numbers of a row."""
    if not model.built or not getattr(model, "inputs", None):
        return (inputs,)
    shapes = [tuple(tensor.shape[1:]) for tensor in model.inputs]
    if len(shapes) != 1 or None in shapes[0] or math.prod(shapes[0]) != inputs:
        raise errors.ModelMismatch(
            f"the network takes rows of shape {', '.join(map(str, shapes))}; a row of the "
            f"features has {inputs} numbers (784, unless features= names the columns)"
        )
    return shapes[0]


def _configuration(model: keras.Model) -> tuple[Mapping[str, Any] | None, tuple[str, ...]]:
    """Keras's configuration as JSON values, and the names of objects in it that are not Keras's."""
    try:
        config = _plain(json.loads(model.to_json()))
    except (NotImplementedError, TypeError, ValueError):
        # A class of the user's: without get_config, or with one that gives what JSON cannot hold
        # (TypeError) or Keras cannot describe (ValueError). Only the user's function makes it.
        return None, (type(model).__name__,)
    return config, tuple(sorted(set(_foreign(config))))


def _plain(config: Any) -> Any:
    """A configuration without what ``compile`` added, and for batches of any size."""
    if isinstance(config, list):
        return [_plain(item) for item in config]
    if isinstance(config, dict):
        plain = {key: _plain(item) for key, item in config.items() if key != "compile_config"}
        for key in ("batch_shape", "build_input_shape"):
            if isinstance(shape := plain.get(key), list):
                plain[key] = [None, *shape[1:]]
        return plain
    return config


def _foreign(config: Any) -> Iterator[str]:
    """Names of all objects in a configuration that are not allowed."""
    if isinstance(config, list):
        for item in config:
            yield from _foreign(item)
    elif isinstance(config, dict):
        if "class_name" in config and not _allowed(config):
            name = config["class_name"]
            yield str(config.get("config") if name == "function" else name)
        for item in config.values():
            yield from _foreign(item)


def _allowed(config: Mapping[str, Any]) -> bool:
    name, module = str(config["class_name"]), str(config.get("module"))
    if name in VALUES:
        return True
    if (name, module) == ("Cast", "keras.src.ops.core"):  # its neighbours take functions
        return True
    registered = (None, name) if module in INNER_MODULES else (None,)
    known = module in MODULES or module in INNER_MODULES
    if not known or name in REFUSED or config.get("registered_name") not in registered:
        return False
    return isinstance(getattr(sys.modules.get(module), name, None), type)


def _canonical(config: Any) -> str:
    """A configuration as text, with the names of layers, which Keras counts up, as numbers."""
    names: dict[str, str] = {}

    def numbered(value: Any) -> Any:
        if isinstance(value, list):  # the names of a layer's predecessors stand in lists
            return [names.get(v, v) if isinstance(v, str) else numbered(v) for v in value]
        if not isinstance(value, dict) or value.get("class_name") == "DTypePolicy":
            return value
        kept = {key: item for key, item in value.items() if key != "build_config"}
        if isinstance(name := kept.get("name"), str):
            kept["name"] = names.setdefault(name, f"layer {len(names)}")
        return {key: numbered(item) for key, item in kept.items()}

    return json.dumps(numbered(config), sort_keys=True)


def _layers(config: Any) -> str:
    layers = config["config"].get("layers", ()) if config else ()
    return ", ".join(layer["class_name"] for layer in layers) or "of a class of the user's"


def _rebuilt(network: plan.Network) -> keras.Model:
    config = network.config
    foreign = sorted({*network.custom, *_foreign(config)})
    if foreign or not isinstance(config, dict):
        raise errors.ModelMismatch(
            f"the model has objects that are not Keras's own ({', '.join(foreign)}): give the "
            "function that makes it, network=..."
        )
    # Keras takes apart what it is given.
    return keras.saving.deserialize_keras_object(copy.deepcopy(config), safe_mode=True)
