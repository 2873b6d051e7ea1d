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
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    "JaxLayer",
    "Lambda",
    "TFSMLayer",
    "TextVectorization",
    "TorchModuleWrapper",
}
"""Layers of Keras that run code from their configuration, or open files that it names."""
LOOKUP_LAYERS = {"IntegerLookup", "StringLookup"}
"""Layers of Keras that open a file where their configuration names one as the vocabulary."""


def describe(model: keras.Model, network: plan.Network) -> plan.Network:
    """Describe a user's model.

    Args:
        model: Takes ``[B, ...]`` with ``network.inputs`` numbers a row, or a dictionary of such,
            and gives ``[B, units]`` for each output.
        network: Numbers of inputs of the model, and its outputs.

    Returns:
        ``network`` with the model's configuration, the objects in it that only the user can make,
        and for each output whether the activation that makes probabilities is missing.

    Raises:
        errors.ModelMismatch: The model does not take such rows, or does not give such outputs.
    """
    if not isinstance(model, keras.Model):
        raise errors.ModelMismatch(
            f"network must make a Keras model, not {type(model).__name__} {model!r:.80}"
        )
    if isinstance(model, keras.Sequential) and not model.built:
        model.build((None, network.inputs))
    probe = _probe(network)
    arrays = _select(model, network.heads, model(_reshape_rows(model, probe), training=False))
    heads = []
    for output, array in zip(network.heads, arrays, strict=True):
        _check_shape(output, array.shape)
        activation = _activation(model, output)
        has_logits = _has_logits(output, array, activation)
        heads.append(dataclasses.replace(output, logits=has_logits))
    config, objects = _configuration(model)
    description = dataclasses.replace(
        network, config=config, custom=objects, outputs=tuple(heads) if network.outputs else ()
    )
    if not network.outputs and heads[0].logits:
        description = dataclasses.replace(description, outputs=tuple(heads))
    if not objects and not _same_outputs(description, model, probe, arrays):
        return dataclasses.replace(description, custom=("a function named like one of Keras's",))
    return description


def _check_shape(output: plan.Output, shape: tuple[int, ...]) -> None:
    """Refuse an output that has not one number a row for each unit.

    Raises:
        errors.ModelMismatch: The shape is another.
    """
    if shape == (len(_PROBE_ROWS), output.units):
        return
    size_text = f"{'x'.join(map(str, shape[1:])) or 1} numbers a row"
    name = f"output {output.name!r} of the network" if output.name else "the network"
    if output.task == plan.CLASSIFICATION:
        hint = ""
        if shape[1:] == (1,) and output.size == 2:
            hint = f"; one unit learns two classes with task={plan.BINARY}"
        raise errors.ModelMismatch(
            f"{name} gives {size_text}, and there are {output.size} classes (ten, unless features= "
            f"names the columns){hint}"
        )
    if output.task == plan.BINARY:
        raise errors.ModelMismatch(
            f"{name} gives {size_text}, and task={plan.BINARY} takes one; leave task out for "
            "one unit a class"
        )
    noun = "labels" if output.task == plan.MULTILABEL else "numbers to predict"
    raise errors.ModelMismatch(f"{name} gives {size_text}, and there are {output.size} {noun}")


def _has_logits(output: plan.Output, values: npt.NDArray[np.float32], activation: Any) -> bool:
    """Return whether an output lacks the activation that makes probabilities.

    Raises:
        errors.ModelMismatch: The output ends with an activation of another task.
    """
    if output.task == plan.REGRESSION:
        return False
    if output.task == plan.CLASSIFICATION:
        if activation is keras.activations.sigmoid:
            raise errors.ModelMismatch(
                "the network ends with a sigmoid; end it with a softmax, or without an activation, "
                f"or learn with task={plan.BINARY} or task={plan.MULTILABEL}"
            )
        is_softmax = (values >= 0).all() and np.allclose(values.sum(axis=1), 1, atol=1e-3)
        return not is_softmax
    if activation is keras.activations.softmax and output.units > 1:
        raise errors.ModelMismatch(
            f"the network ends with a softmax; with task={output.task} end it with a sigmoid, or "
            "without an activation"
        )
    if activation is not None:
        return activation is not keras.activations.sigmoid
    return bool((values < 0).any() or (values > 1).any())


def _activation(model: keras.Model, output: plan.Output) -> Any:
    """Return the activation function of the layer that makes an output; None where unknown."""
    if isinstance(model, keras.Sequential) and model.layers:
        # Once such a model is part of another, its output is that of the model itself.
        layer = model.layers[-1]
        is_nested = isinstance(layer, keras.Model)
        return _activation(layer, output) if is_nested else getattr(layer, "activation", None)
    try:
        tensors = model.output if output.name else keras.tree.flatten(model.output)[0]
    except (AttributeError, ValueError):  # a model without a graph of its layers
        return getattr(model.layers[-1], "activation", None) if model.layers else None
    if output.name:
        names = _output_names(model)
        tensors = keras.tree.flatten(tensors)[names.index(output.name)]
    layer = tensors._keras_history.operation
    if isinstance(layer, keras.Model):
        return _activation(layer, dataclasses.replace(output, name="")) if layer.layers else None
    return getattr(layer, "activation", None)


def _output_names(model: keras.Model) -> list[str]:
    """Return the names of a model's outputs: keys of a dictionary, else names of layers."""
    if isinstance(model.output, Mapping):
        return sorted(model.output)  # the order in which Keras flattens a dictionary
    return [*model.output_names]


def _select(
    model: keras.Model, outputs: Sequence[plan.Output], values: Any
) -> list[npt.NDArray[np.float32]]:
    """Return what a model gives for each output, as arrays.

    Raises:
        errors.ModelMismatch: The model has other outputs.
    """
    return [np.asarray(value) for value in _by_output(model, outputs, values)]


def _by_output(model: keras.Model, outputs: Sequence[plan.Output], values: Any) -> list[Any]:
    """Return what a model gives for each output.

    Raises:
        errors.ModelMismatch: The model has other outputs.
    """
    flat: list[Any] = keras.tree.flatten(values)
    if len(outputs) == 1 and not outputs[0].name:
        if len(flat) != 1:
            raise errors.ModelMismatch(
                f"the network has {len(flat)} outputs; it must have one, or label= must name a "
                "column for each, as label={'output': 'column', ...}"
            )
        return flat
    if isinstance(values, Mapping):
        by_name = dict(values)
    else:
        names = _output_names(model) if getattr(model, "output_names", None) else []
        by_name = dict(zip(names, flat, strict=False))
    wanted = [output.name for output in outputs]
    if sorted(by_name) != sorted(wanted):
        output_names = ", ".join(map(str, by_name)) or f"{len(flat)}, without names"
        raise errors.ModelMismatch(
            f"the network has the outputs {output_names}, and label= names {', '.join(wanted)}"
        )
    return [by_name[name] for name in wanted]


def finalize_layers(model: keras.Model) -> None:
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


def model(network: plan.Network, user_model: keras.Model | None) -> keras.Model:
    """Return the user's model; without it, the model that the description rebuilds.

    Raises:
        errors.ModelMismatch: Only the user's function can make the model, and there is none.
    """
    return _rebuild(network) if user_model is None else user_model


def attach(x: Any, network: plan.Network, user_model: keras.Model) -> list[keras.KerasTensor]:
    """Connect the user's model to the inputs, and return its outputs, classes as probabilities.

    Args:
        x: Inputs ``[B, inputs]``, or a dictionary of several.
        network: Description of the model.
        user_model: The model.
    """
    if isinstance(x, Mapping):
        shapes = _input_shapes(user_model, network.parts)
        x = {name: layers.Reshape(shapes[name])(tensor) for name, tensor in x.items()}
    else:
        shape = _row_shape(user_model, network.inputs)
        if shape != (network.inputs,):
            x = layers.Reshape(shape)(x)
    outputs = _by_output(user_model, network.heads, user_model(x))
    return [
        layers.Softmax()(tensor)
        if output.logits and output.task == plan.CLASSIFICATION
        else layers.Activation("sigmoid")(tensor)
        if output.logits
        else tensor
        for output, tensor in zip(network.heads, outputs, strict=True)
    ]


def input_dtypes(user_model: keras.Model) -> dict[str, str]:
    """Return the dtype of each input of a model with several, by name."""
    return {tensor.name: tensor.dtype for tensor in user_model.inputs}


def integer_dtype(user_model: keras.Model | None) -> str | None:
    """Return the dtype of a model's one input where it takes integers; else None."""
    tensors = getattr(user_model, "inputs", None) or ()
    dtypes = {tensor.dtype for tensor in tensors if "int" in tensor.dtype}
    return dtypes.pop() if len(tensors) == 1 and dtypes else None


def whole_inputs(user_model: keras.Model) -> dict[str, int]:
    """Return the inputs that take whole numbers alone, by name, and how many categories each has.

    The number is that of the Embedding that reads the input, and 0 where none does.
    """
    tensors = getattr(user_model, "inputs", None) or ()
    sizes = {}
    for tensor in tensors:
        readers = [
            layer.input_dim
            for layer in user_model.layers
            if isinstance(layer, layers.Embedding) and _reads(layer, tensor)
        ]
        if readers or "int" in tensor.dtype:
            sizes[tensor.name if len(tensors) > 1 else ""] = min(readers, default=0)
    return sizes


def _reads(layer: keras.Layer, tensor: keras.KerasTensor) -> bool:
    """Return whether a layer is called on a tensor, alone or among others."""
    calls = (node.input_tensors for node in layer._inbound_nodes)
    return any(found is tensor for tensors in calls for found in tensors)


_PROBE_ROWS = range(4)
"""Rows for which a model is called to see what it gives."""


def _probe(network: plan.Network) -> Any:
    """Return random rows ``[4, inputs]`` between 0 and 1, or a dictionary of several inputs."""
    random = np.random.default_rng(0)
    if not network.parts:
        return random.random((len(_PROBE_ROWS), network.inputs), dtype="float32")
    return {
        name: random.random((len(_PROBE_ROWS), width), dtype="float32")
        for name, width in network.parts
    }


def _reshape_rows(model: keras.Model, rows: Any) -> Any:
    """Return rows ``[B, inputs]``, or of several inputs, in the shapes that the model takes."""
    if not isinstance(rows, Mapping):
        return rows.reshape(len(rows), *_row_shape(model, rows.shape[1]))
    shapes = _input_shapes(model, [(name, array.shape[1]) for name, array in rows.items()])
    dtypes = input_dtypes(model)
    return {
        name: array.reshape(len(array), *shapes[name]).astype(dtypes[name])
        for name, array in rows.items()
    }


def _input_shapes(
    model: keras.Model, parts: Iterable[tuple[str, int]]
) -> dict[str, tuple[int, ...]]:
    """Return the shape of a row of each of several inputs, by name.

    Raises:
        errors.ModelMismatch: The model has other inputs, or takes rows of other sizes.
    """
    widths = dict(parts)
    shapes = {
        tensor.name: tuple(tensor.shape[1:]) for tensor in getattr(model, "inputs", None) or ()
    }
    if sorted(shapes) != sorted(widths):
        raise errors.ModelMismatch(
            f"the network has the inputs {', '.join(shapes) or 'of a model without names'}, and "
            f"features= names {', '.join(widths)}"
        )
    _refuse_text(model)
    for name, shape in shapes.items():
        if None in shape or math.prod(shape) != widths[name]:
            raise errors.ModelMismatch(
                f"input {name!r} of the network takes rows of shape {shape}, and its columns have "
                f"{widths[name]} numbers"
            )
    return shapes


def _refuse_text(model: keras.Model) -> None:
    """Refuse a model that takes text, which rows of numbers are not.

    Raises:
        errors.ModelMismatch: An input takes text.
    """
    for tensor in model.inputs:
        if tensor.dtype == "string":
            raise errors.ModelMismatch(
                f"input {tensor.name!r} of the network takes text: index the column, with "
                "StringIndexer, and let the network take the number"
            )


def _same_outputs(
    description: plan.Network,
    model: keras.Model,
    rows: Any,
    outputs: Sequence[npt.NDArray[np.float32]],
) -> bool:
    """Return whether a model that is rebuilt from the description has the model's outputs.

    The outputs differ where a function of the user has the name of one of Keras's, since Keras
    writes only the name.
    """
    replica = _rebuild(description)
    replica(_reshape_rows(model, rows))
    replica.set_weights(model.get_weights())
    finalize_layers(replica)
    values = replica(_reshape_rows(replica, rows), training=False)
    return all(
        np.allclose(value, output, atol=1e-6, rtol=1e-5)
        for value, output in zip(_select(replica, description.heads, values), outputs, strict=True)
    )


def _row_shape(model: keras.Model, inputs: int) -> tuple[int, ...]:
    """Return the shape in which the model takes the numbers of a row."""
    if not model.built or not getattr(model, "inputs", None):
        return (inputs,)
    _refuse_text(model)
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
        _add_vocabularies(model, config)
    except (NotImplementedError, TypeError, ValueError):
        # A class of the user's: without get_config, or with a get_config whose result JSON cannot
        # hold (TypeError) or Keras cannot describe (ValueError). Only the user's function makes it.
        return None, (type(model).__name__,)
    return config, tuple(sorted(set(_foreign_names(config))))


def _add_vocabularies(model: keras.Model, config: Any) -> None:
    """Put the vocabularies that layers have learned into a configuration, which lacks them."""
    vocabularies = {
        layer.name: [*map(_plain, layer.get_vocabulary(include_special_tokens=False))]
        for layer in model._flatten_layers(include_self=False)
        if type(layer).__name__ in LOOKUP_LAYERS
    }
    if not vocabularies:
        return

    def add(value: Any) -> None:
        for item in value.values() if isinstance(value, dict) else value:
            if isinstance(item, dict | list):
                add(item)
        if isinstance(value, dict) and value.get("class_name") in LOOKUP_LAYERS:
            value["config"]["vocabulary"] = vocabularies[value["config"]["name"]]

    add(config)


def _plain(value: Any) -> int | str:
    """Return an item of a vocabulary as JSON holds it."""
    return value if isinstance(value, str) else int(value)


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
    if name in LOOKUP_LAYERS and not isinstance(config["config"].get("vocabulary"), list):
        return False
    # Other operations of this module take functions.
    if (name, module) == ("Cast", "keras.src.ops.core"):
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
