"""Exports of saved models to Keras files, SavedModels, TensorFlow Lite and ONNX. Runs on: driver.

The driver needs TensorFlow for an export. An exported model takes float32 ``[B, W]`` as the
networks do (pixels in 0..1), float64 where float32 cannot tell the values of a feature apart, or
integers where the network takes these, and returns probabilities of classes or labels ``[B, C]``,
or numbers in the units of the label; it standardizes its inputs itself. Several inputs and outputs
have their names. Shape letters: B = rows of a batch, W = numbers of a row, C = classes.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from spark_mnist import errors
from spark_mnist.catalog import versions
from spark_mnist.core import plan, requirements
from spark_mnist.networks import registry
from spark_mnist.store import manifests

SAVED_MODEL_FILE = "saved_model.pb"
"""File of a SavedModel's folder that TensorFlow reads first."""


def export(
    model_name: str,
    path: str | os.PathLike[str],
    format: str = "keras",
    *,
    version: int | None = None,
    store: str | None = None,
    network: plan.ModelFn | None = None,
) -> str:
    """Write a saved model to a file or folder that other tools can read.

    Args:
        model_name: A saved model.
        path: File, for ``savedmodel`` a folder, or the URL of one. An existing one is never
            replaced.
        format: ``keras``, ``savedmodel``, ``tflite`` or ``onnx``.
        version: Number of a version; else the newest.
        store: As for ``models``.
        network: The user's function, for a model that only this function can make.

    Returns:
        The path.

    Raises:
        errors.OptionError: There is no such format, the path exists already, or the format cannot
            hold the model.
        errors.VersionError: What writes ONNX files is missing or outside its range.
        errors.ModelNotFound: There is no such model or version.
        errors.DamagedModel: The version's files differ from those that were written.
        errors.ModelMismatch: Only the user's function can make the network.
    """
    if format not in FORMATS:
        hint = errors.did_you_mean(str(format), FORMATS)
        raise errors.OptionError(f"format must be {' or '.join(FORMATS)}, not {format!r}{hint}")
    if format == "keras" and not os.fspath(path).endswith(".keras"):
        raise errors.OptionError(f"Keras reads a model from a file *.keras, not from {path}")
    if format == "onnx":
        _check_onnx()
    fs, target = fsspec.core.url_to_fs(os.fspath(path))
    if fs.exists(target):
        raise errors.OptionError(f"{path} exists already; delete it, or name another path")
    store_handle = versions.open_for_version(version, store)
    saved_version = manifests.load(store_handle, model_name, version, network)
    if format == "tflite" and not registry.has_exact_floats(saved_version.network):
        raise errors.OptionError(
            f"format=tflite has floats, and features or labels of model {model_name!r} are so far "
            "from 0 that floats do not tell them apart: export it as keras, savedmodel or onnx"
        )
    model = build_model(saved_version)
    with tempfile.TemporaryDirectory() as directory:
        source = FORMATS[format](model, Path(directory))
        _copy(fs, source, target)
    return os.fspath(path)


def _check_onnx() -> None:
    """Check that the packages which write ONNX files are installed, without importing them.

    Raises:
        errors.VersionError: One of them is missing or outside its range.
    """
    try:
        requirements.check_extra("onnx")
    except errors.VersionError as error:
        raise errors.VersionError(f"format=onnx needs tf2onnx and onnx: {error}") from None
    for name in ("tf2onnx", "onnx"):  # also where the library is shipped as plain files
        if importlib.util.find_spec(name) is None:
            raise errors.VersionError(
                f"format=onnx needs {name}, which is missing; install spark-mnist[onnx]"
            )


def _copy(fs: fsspec.AbstractFileSystem, source: Path, target: str) -> None:
    """Copy a local file or folder to its target, which can be read once all of it is there.

    A file, and a folder on a local file system, appear by a rename. Of a folder elsewhere, the file
    without which TensorFlow reads none of it comes last.
    """
    fs.makedirs(fs._parent(target), exist_ok=True)
    if source.is_dir() and not isinstance(fs, LocalFileSystem):
        files = [path for path in source.rglob("*") if path.is_file()]
        for path in sorted(files, key=lambda path: path.name == SAVED_MODEL_FILE):
            copy = f"{target}/{path.relative_to(source).as_posix()}"
            fs.makedirs(fs._parent(copy), exist_ok=True)
            fs.put_file(str(path), copy)
        return
    temporary = f"{target}.{uuid.uuid4().hex}.tmp"
    fs.put(str(source), temporary, recursive=source.is_dir())
    if isinstance(fs, LocalFileSystem):
        os.rename(temporary, target)
    else:
        fs.mv(temporary, target)


def build_model(saved_version: manifests.SavedModel) -> Any:
    """Build the Keras model of a saved version, with weights, from the units of the columns.

    Its outputs are probabilities of classes and labels, and numbers in the units of the label.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")  # ranks may need the rest
    from spark_mnist.networks import array_files

    dtype = registry.exported_dtype(saved_version.network)
    return array_files.build_model(
        saved_version.network,
        saved_version.files,
        saved_version.model_fn,
        dtype,
        original_units=True,
    )


def _keras(model: Any, directory: Path) -> Path:
    path = directory / "model.keras"
    model.save(path)
    return path


def _saved_model(model: Any, directory: Path) -> Path:
    path = directory / "model"
    model.export(path, verbose=False)
    return path


def _tflite(model: Any, directory: Path) -> Path:
    import tensorflow as tf

    converter = tf.lite.TFLiteConverter.from_saved_model(str(_saved_model(model, directory)))
    path = directory / "model.tflite"
    path.write_bytes(converter.convert())
    return path


def _onnx(model: Any, directory: Path) -> Path:
    """Write an ONNX file, with the model's names of inputs and outputs, for batches of any size.

    Raises:
        errors.OptionError: ONNX cannot hold the model.
    """
    import onnx
    import tensorflow as tf
    import tf2onnx.convert
    from tensorflow.python.framework import convert_to_constants

    several = isinstance(model.input, Mapping)
    inputs = {tensor.name: tensor for tensor in model.inputs}
    outputs = sorted(model.output) if isinstance(model.output, Mapping) else model.output_names
    if both := sorted({*inputs} & {*outputs}):
        raise errors.OptionError(
            f"ONNX takes a name once, and {', '.join(both)} is the name of an input and of an "
            "output of the model: export it as keras or savedmodel"
        )
    shapes = {
        name: tf.TensorSpec((None, *tensor.shape[1:]), tensor.dtype, name)
        for name, tensor in inputs.items()
    }

    def call(rows: Any) -> Any:
        return tf.nest.flatten(model(rows if several else rows[model.input.name], training=False))

    # Constants, since arrays that layers hold beside their weights would become inputs of the file.
    frozen = convert_to_constants.convert_variables_to_constants_v2(
        tf.function(call).get_concrete_function(shapes),
        lower_control_flow=False,
        aggressive_inlining=True,
    )

    def call_with_names(rows: Any) -> Any:
        return dict(zip(outputs, tf.nest.flatten(frozen(*tf.nest.flatten(rows))), strict=True))

    try:
        written, _ = tf2onnx.convert.from_function(tf.function(call_with_names), [shapes])
        onnx.checker.check_model(written, full_check=True)  # the converter leaves what it cannot do
    except (onnx.checker.ValidationError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise errors.OptionError(
            f"ONNX cannot hold the model ({reason}): export it as keras or savedmodel"
        ) from error
    path = directory / "model.onnx"
    onnx.save(written, path)
    return path


FORMATS: dict[str, Callable[[Any, Path], Path]] = {
    "keras": _keras,
    "savedmodel": _saved_model,
    "tflite": _tflite,
    "onnx": _onnx,
}
"""Functions that write a model into a folder, by format; each returns the path it wrote."""
