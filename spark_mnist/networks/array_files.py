"""What is saved of a model and restored: plain arrays, as files of a version.

    weights.npz    the weights, in the model's order
    optimizer.npz  the optimizer's variables, in its order, without the learning rate
    loss_scale.npz in mixed_float16: the steps since the loss's scale has changed, and the scale

Nothing is pickled. The learning rate is not among the arrays because the one that a rank trains
with is scaled by the number of ranks; the manifest keeps the one that the user gave.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping, Sequence

import keras
import numpy as np
import numpy.typing as npt

from spark_mnist import errors
from spark_mnist.core import plan
from spark_mnist.networks import custom, registry


def save(model: keras.Model) -> dict[str, bytes]:
    """Return the checkpoint of a compiled model, as contents by file name."""
    files = {plan.WEIGHTS: pack_weights(model), plan.OPTIMIZER: _pack(_slots(model.optimizer))}
    if scale := _loss_scale(model.optimizer):
        files[plan.LOSS_SCALE] = _pack(scale)
    return files


def restore(model: keras.Model, files: Mapping[str, bytes]) -> None:
    """Put what is saved into a compiled model whose optimizer is built.

    Args:
        model: Keeps its own weights, or the optimizer's, where there is no file of them.
        files: A checkpoint.

    Raises:
        errors.ModelMismatch: The arrays do not fit the model or its optimizer.
    """
    if plan.WEIGHTS in files:
        restore_weights(model, files)
    if plan.OPTIMIZER in files:
        _unpack(files[plan.OPTIMIZER], _slots(model.optimizer))
    scale = _loss_scale(model.optimizer)
    if plan.LOSS_SCALE in files and scale:
        _unpack(files[plan.LOSS_SCALE], scale)


def restore_weights(model: keras.Model, files: Mapping[str, bytes]) -> None:
    """Put saved weights into a model.

    Raises:
        errors.ModelMismatch: The arrays do not fit the model.
    """
    _unpack(files[plan.WEIGHTS], model.weights)
    custom.settle(model)


def built(
    network: plan.Network,
    files: Mapping[str, bytes],
    model_fn: plan.ModelFn | None,
    dtype: str | None = None,
) -> keras.Model:
    """Build a saved network with its weights.

    Args:
        network: What to build.
        files: A checkpoint.
        model_fn: The user's function, for a network that only it can make.
        dtype: Of the inputs, where not ``registry.input_dtype``.

    Raises:
        errors.ModelMismatch: The function is missing, or makes another network.
    """
    model = registry.build(network, model_fn() if model_fn else None, dtype)
    restore_weights(model, files)
    return model


def pack_weights(model: keras.Model) -> bytes:
    """The content of the weights' file."""
    return _pack(model.weights)


def _slots(optimizer: keras.optimizers.Optimizer) -> list[keras.Variable]:
    """The variables to save; those of the loss's scale lie apart, so precision may change."""
    scaled = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    inner = optimizer.inner_optimizer if scaled else optimizer
    return [v for v in inner.variables if v is not inner.learning_rate]


def _loss_scale(optimizer: keras.optimizers.Optimizer) -> list[keras.Variable]:
    """How far the scale of the loss has come, where there is one."""
    if not isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return []
    return [optimizer.step_counter, optimizer.dynamic_scale]


def _pack(variables: Sequence[keras.Variable]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **{f"{i:04d}": keras.ops.convert_to_numpy(v) for i, v in enumerate(variables)})
    return buffer.getvalue()


def _arrays(content: bytes) -> list[npt.NDArray[np.generic]]:
    """Read the arrays of a file, and nothing that could be code or blow up in memory."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as file:
            packed = [entry.filename for entry in file.infolist() if entry.compress_type]
        if packed:
            raise ValueError(f"{packed} are compressed, which this library never does")
        with np.load(io.BytesIO(content), allow_pickle=False) as saved:
            arrays = [saved[name] for name in sorted(saved.files, key=int)]
        if not all(isinstance(array, np.ndarray) for array in arrays):
            raise ValueError("it has entries that are no arrays")
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise errors.DamagedModel(f"a file of arrays cannot be read: {error}") from None
    return arrays


def _unpack(content: bytes, variables: Sequence[keras.Variable]) -> None:
    arrays = _arrays(content)
    shapes, wanted = [a.shape for a in arrays], [tuple(v.shape) for v in variables]
    if shapes != wanted:
        raise errors.ModelMismatch(f"the saved arrays have shapes {shapes}, the model {wanted}")
    for variable, array in zip(variables, arrays, strict=True):
        variable.assign(array)
