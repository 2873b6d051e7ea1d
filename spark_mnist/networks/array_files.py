"""Arrays of a model as files of a saved version. Runs on: driver, rank, Spark task.

    weights.npz    the weights, in the model's order
    optimizer.npz  the optimizer's variables, in its order, without the learning rate
    loss_scale.npz in mixed_float16: the steps since the last change of the loss's scale, and the
                   scale

Nothing is pickled. The learning rate is not among the arrays, because a rank trains with a rate
that is scaled by the number of ranks; the manifest keeps the rate that the user gave.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from spark_mnist import errors
from spark_mnist.core import plan
from spark_mnist.networks import custom, registry


def save(model: keras.Model) -> dict[str, bytes]:
    """Return the checkpoint of a compiled model as file contents by name."""
    files = {
        plan.WEIGHTS: pack_weights(model),
        plan.OPTIMIZER: _pack(_optimizer_variables(model.optimizer)),
    }
    if scale := _loss_scale(model.optimizer):
        files[plan.LOSS_SCALE] = _pack(scale)
    return files


def restore(model: keras.Model, files: Mapping[str, bytes]) -> None:
    """Assign the arrays of a checkpoint to a compiled model with a built optimizer.

    Args:
        model: The model; it keeps its weights, or its optimizer's variables, where ``files`` has
            no file for them.
        files: File contents of a checkpoint, by name.

    Raises:
        errors.ModelMismatch: The arrays do not fit the model or its optimizer.
    """
    if plan.WEIGHTS in files:
        _restore_weights(model, files)
    if plan.OPTIMIZER in files:
        _unpack(files[plan.OPTIMIZER], _optimizer_variables(model.optimizer))
    scale = _loss_scale(model.optimizer)
    if plan.LOSS_SCALE in files and scale:
        _unpack(files[plan.LOSS_SCALE], scale)


def _restore_weights(model: keras.Model, files: Mapping[str, bytes]) -> None:
    """Assign saved weights to a model.

    Raises:
        errors.ModelMismatch: The arrays do not fit the model.
    """
    _unpack(files[plan.WEIGHTS], model.weights)
    custom.finalize_layers(model)


def build_model(
    network: plan.Network,
    files: Mapping[str, bytes],
    model_fn: plan.ModelFn | None,
    dtype: str | None = None,
    *,
    original_units: bool = False,
) -> keras.Model:
    """Build a saved network with its weights.

    Args:
        network: Description of the network.
        files: File contents of a checkpoint, by name.
        model_fn: The user's function, for a network that only this function can make.
        dtype: Dtype of the inputs; ``registry.input_dtype`` where None.
        original_units: Whether numbers come in the units of the label.

    Raises:
        errors.ModelMismatch: The function is missing, or makes another network.
    """
    user_model = model_fn() if model_fn else None
    model = registry.build(network, user_model, dtype, original_units=original_units)
    _restore_weights(model, files)
    return model


def pack_weights(model: keras.Model) -> bytes:
    """Return the content of the weights file."""
    return _pack(model.weights)


def _optimizer_variables(optimizer: keras.optimizers.Optimizer) -> list[keras.Variable]:
    """Return the optimizer's variables to save.

    Those of the loss's scale have a file of their own, so that the precision may change.
    """
    is_scaled = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    inner = optimizer.inner_optimizer if is_scaled else optimizer
    return [v for v in inner.variables if v is not inner.learning_rate]


def _loss_scale(optimizer: keras.optimizers.Optimizer) -> list[keras.Variable]:
    """Return the variables of the loss's scale, or none without such a scale."""
    if not isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return []
    return [optimizer.step_counter, optimizer.dynamic_scale]


def _pack(variables: Sequence[keras.Variable]) -> bytes:
    return pack_arrays([*map(keras.ops.convert_to_numpy, variables)])


def pack_arrays(arrays: Sequence[npt.NDArray[np.generic]]) -> bytes:
    """Return arrays as the content of a file."""
    buffer = io.BytesIO()
    named: dict[str, Any] = {f"{number:04d}": array for number, array in enumerate(arrays)}
    np.savez(buffer, **named)
    return buffer.getvalue()


def read_arrays(content: bytes) -> list[npt.NDArray[np.generic]]:
    """Read the arrays of a file; refuse code, and compression, which could fill the memory."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as file:
            compressed_names = [entry.filename for entry in file.infolist() if entry.compress_type]
        if compressed_names:
            raise ValueError(f"{compressed_names} are compressed, which this library never does")
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            arrays = [archive[name] for name in sorted(archive.files, key=int)]
        if not all(isinstance(array, np.ndarray) for array in arrays):
            raise ValueError("it has entries that are no arrays")
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise errors.DamagedModel(f"a file of arrays cannot be read: {error}") from None
    return arrays


def _unpack(content: bytes, variables: Sequence[keras.Variable]) -> None:
    arrays = read_arrays(content)
    shapes, model_shapes = [a.shape for a in arrays], [tuple(v.shape) for v in variables]
    if shapes != model_shapes:
        raise errors.ModelMismatch(
            f"the saved arrays have shapes {shapes}, the model {model_shapes}"
        )
    for variable, array in zip(variables, arrays, strict=True):
        variable.assign(array)
