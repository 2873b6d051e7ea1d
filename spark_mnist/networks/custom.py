"""Keras models of users: their description for the store, and their reconstruction from it.

Runs on: driver, rank, Spark task. On the driver only where a model is made there.

A description is Keras's own configuration. The store may be writable for others, so the
configuration is read by strict rules: every object must be one of Keras's, and none of those that
run code or open files. A model with other objects can be trained and applied, too, where the user
gives the function that makes the model.

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

PUBLIC_MODULES = (
    "keras",
    "keras.activations",
    "keras.constraints",
    "keras.dtype_policies",
    "keras.initializers",
    "keras.layers",
    "keras.regularizers",
)
"""Public modules of Keras whose classes a configuration may name."""
INNER_MODULES = (
    "keras.src.models.functional",
    "keras.src.models.sequential",
    "keras.src.ops.image",
    "keras.src.ops.math",
    "keras.src.ops.nn",
    "keras.src.ops.numpy",
)
"""Inner modules of Keras that it names for its models, and for operations like ``x + y``."""
VALUE_CLASSES = {"__ellipsis__", "__keras_tensor__", "__numpy__", "__slice__", "__tensor__"}
"""Class names under which Keras writes plain values."""
UNSAFE_LAYERS = {
    "FlaxLayer",
    "IntegerLookup",
    "JaxLayer",
    "Lambda",
    "StringLookup",
    "TFSMLayer",
    "TextVectorization",
    "TorchModuleWrapper",
}
"""Layers of Keras that run code from their configuration, or open files that it names."""


def describe(model: keras.Model, network: plan.Network) -> plan.Network:
    """Describe a user's model.

    Args:
        model: Takes ``[B, ...]`` with ``network.inputs`` numbers a row, gives ``[B, classes]``.
        network: Numbers of inputs and classes of the model.

    Returns:
        ``network`` with the model's configuration, the objects in it that only the user can make,
        and whether a softmax is missing at the end.

    Raises:
        errors.ModelMismatch: The model does not take such rows, or does not give a number for each
            class.
    """
    if not isinstance(model, keras.Model):
        raise errors.ModelMismatch(
            f"network must make a Keras model, not {type(model).__name__} {model!r:.80}"
        )
    if isinstance(model, keras.Sequential) and not model.built:
        model.build((None, network.inputs))
    probe = np.random.default_rng(0).random((4, network.inputs), dtype="float32")
    output_arrays = keras.tree.flatten(model(_reshape_rows(model, probe), training=False))
    if len(output_arrays) != 1:
        raise errors.ModelMismatch(
            f"the network has {len(output_arrays)} outputs; it must have one, "
            "a number for each class"
        )
    outputs = np.asarray(output_arrays[0])
    if outputs.shape != (4, network.classes):
        raise errors.ModelMismatch(
            f"the network gives {'x'.join(map(str, outputs.shape[1:])) or 1} numbers a row, and "
            f"there are {network.classes} classes (ten, unless features= names the columns)"
        )
    if model.layers and getattr(model.layers[-1], "activation", None) is keras.activations.sigmoid:
        raise errors.ModelMismatch(
            "the network ends with a sigmoid; end it with a softmax, or without an activation"
        )
    is_softmax = bool((outputs >= 0).all() and np.allclose(outputs.sum(axis=1), 1, atol=1e-3))
    config, objects = _configuration(model)
    description = dataclasses.replace(network, config=config, custom=objects, logits=not is_softmax)
    if not objects and not _same_outputs(description, model, probe, outputs):
        return dataclasses.replace(description, custom=("a function named like one of Keras's",))
    return description


def settle(model: keras.Model) -> None:
    """Update the values that layers derive from their weights, after the weights were set."""
    for layer in model._flatten_layers(include_self=False):
        if isinstance(layer, layers.Normalization):
            layer.finalize_state()


def check_same(saved: plan.Network, described: plan.Network) -> None:
    """Compare a user's model with the saved model that it should be; names of layers may differ.

    Raises:
        errors.ModelMismatch: The two differ.
    """
    if _canonical_text(saved.config) != _canonical_text(described.config):
        raise errors.ModelMismatch(
            f"the saved model has the layers {_layer_classes(saved.config)}; network=... now makes "
            f"{_layer_classes(described.config)}, or the same with other settings"
        )


def attach(
    x: keras.KerasTensor, network: plan.Network, user_model: keras.Model | None
) -> keras.KerasTensor:
    """Connect the user's model to the inputs, and return its class probabilities.

    Args:
        x: Inputs ``[B, inputs]``.
        network: Description of the model.
        user_model: The user's model; None to rebuild it from the description.

    Raises:
        errors.ModelMismatch: Only the user's function can make the model, and there is none.
    """
    model = _rebuild(network) if user_model is None else user_model
    shape = _row_shape(model, network.inputs)
    if shape != (network.inputs,):
        x = layers.Reshape(shape)(x)
    outputs = model(x)
    return layers.Softmax()(outputs) if network.logits else outputs


def _outputs(model: keras.Model, rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return the model's outputs for rows ``[B, inputs]``."""
    return np.asarray(model(_reshape_rows(model, rows), training=False))


def _reshape_rows(model: keras.Model, rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return rows ``[B, inputs]`` in the shape that the model takes."""
    return rows.reshape(len(rows), *_row_shape(model, rows.shape[1]))


def _same_outputs(
    description: plan.Network,
    model: keras.Model,
    rows: npt.NDArray[np.float32],
    outputs: npt.NDArray[np.float32],
) -> bool:
    """Return whether a model that is rebuilt from the description has the model's outputs.

    The outputs differ where a function of the user has the name of one of Keras's, since Keras
    writes only the name.
    """
    replica = _rebuild(description)
    replica(_reshape_rows(model, rows))
    replica.set_weights(model.get_weights())
    settle(replica)
    return bool(np.allclose(_outputs(replica, rows), outputs, atol=1e-6, rtol=1e-5))


def _row_shape(model: keras.Model, inputs: int) -> tuple[int, ...]:
    """Return the shape in which the model takes the numbers of a row."""
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
    """Return the model's configuration as JSON values, and the names of foreign objects in it.

    The configuration is None where only the user's function can make the model.
    """
    try:
        config = _strip(json.loads(model.to_json()))
    except (NotImplementedError, TypeError, ValueError):
        # A class of the user's: without get_config, or with a get_config whose result JSON cannot
        # hold (TypeError) or Keras cannot describe (ValueError). Only the user's function makes it.
        return None, (type(model).__name__,)
    return config, tuple(sorted(set(_foreign_names(config))))


def _strip(config: Any) -> Any:
    """Return a configuration without the entry of ``compile``, and for batches of any size."""
    if isinstance(config, list):
        return [_strip(item) for item in config]
    if isinstance(config, dict):
        items = {key: _strip(item) for key, item in config.items() if key != "compile_config"}
        for key in ("batch_shape", "build_input_shape"):
            if isinstance(shape := items.get(key), list):
                items[key] = [None, *shape[1:]]
        return items
    return config


def _foreign_names(config: Any) -> Iterator[str]:
    """Yield the names of all objects in a configuration that are not allowed."""
    if isinstance(config, list):
        for item in config:
            yield from _foreign_names(item)
    elif isinstance(config, dict):
        if "class_name" in config and not _is_allowed(config):
            name = config["class_name"]
            yield str(config.get("config") if name == "function" else name)
        for item in config.values():
            yield from _foreign_names(item)


def _is_allowed(config: Mapping[str, Any]) -> bool:
    name, module = str(config["class_name"]), str(config.get("module"))
    if name in VALUE_CLASSES:
        return True
    if (name, module) == (
        "Cast",
        "keras.src.ops.core",
    ):  # other operations of this module take functions
        return True
    registered_names = (None, name) if module in INNER_MODULES else (None,)
    is_keras = module in PUBLIC_MODULES or module in INNER_MODULES
    if (
        not is_keras
        or name in UNSAFE_LAYERS
        or config.get("registered_name") not in registered_names
    ):
        return False
    return isinstance(getattr(sys.modules.get(module), name, None), type)


def _canonical_text(config: Any) -> str:
    """Return a configuration as text, with layers named by their order of appearance.

    Keras numbers layers over all models of a process, so the names of equal models differ.
    """
    names: dict[str, str] = {}

    def renumber(value: Any) -> Any:
        if isinstance(value, list):  # the names of a layer's predecessors stand in lists
            return [names.get(v, v) if isinstance(v, str) else renumber(v) for v in value]
        if not isinstance(value, dict) or value.get("class_name") == "DTypePolicy":
            return value
        items = {key: item for key, item in value.items() if key != "build_config"}
        if isinstance(name := items.get("name"), str):
            items["name"] = names.setdefault(name, f"layer {len(names)}")
        return {key: renumber(item) for key, item in items.items()}

    return json.dumps(renumber(config), sort_keys=True)


def _layer_classes(config: Any) -> str:
    entries = config["config"].get("layers", ()) if config else ()
    return ", ".join(entry["class_name"] for entry in entries) or "of a class of the user's"


def _rebuild(network: plan.Network) -> keras.Model:
    config = network.config
    names = sorted({*network.custom, *_foreign_names(config)})
    if names or not isinstance(config, dict):
        raise errors.ModelMismatch(
            f"the model has objects that are not Keras's own ({', '.join(names)}): give the "
            "function that makes it, network=..."
        )
    # A copy, since Keras removes entries of the configuration.
    return keras.saving.deserialize_keras_object(copy.deepcopy(config), safe_mode=True)
