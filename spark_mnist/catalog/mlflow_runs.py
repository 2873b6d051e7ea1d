"""A fit in MLflow: its parameters, its metrics by epoch, and the model with its signature.

Runs on the driver, since executors have neither the run nor its credentials, after the version is
published. Where a run is active, the fit is logged in it; a second fit of that run, and each
further, in a run below it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from spark_mnist import errors, options
from spark_mnist.catalog import exports
from spark_mnist.core import requirements
from spark_mnist.fitting import results
from spark_mnist.networks import registry
from spark_mnist.store import manifests, model_store

logger = logging.getLogger(__name__)

MODEL, VERSION, STORE = "spark_mnist.model", "spark_mnist.version", "spark_mnist.store"
"""The tags of a fit's run."""
NO_PARAMS = ("store", "network", "verbose", "mlflow")
"""Options that say nothing of how a model was trained, or are told otherwise."""


def wanted(asked: bool | None) -> bool:
    """Whether a fit is to be logged: where it is asked for, and else where a run is active.

    Raises:
        errors.VersionError: It is asked for, and MLflow is missing or outside its range.
    """
    if asked is False or not (asked or _active_run()):
        return False
    try:
        requirements.check_extra("mlflow")
    except errors.VersionError as error:
        if asked:
            raise errors.VersionError(f"mlflow=true cannot be: {error}") from None
        logger.warning("the fit is not logged in the active run of MLflow: %s", error)
        return False
    return True


def log(
    result: results.FitResult, fit_options: options.FitOptions, store: model_store.Store
) -> None:
    """Log a fit that was published. What MLflow refuses is a warning: nothing of the fit is lost.

    Args:
        result: Of the fit.
        fit_options: Its options.
        store: Where it was published.
    """
    try:
        with _run(result), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # MLflow's of itself and of what it imports
            _log(result, fit_options, store)
    except Exception as error:  # whatever a tracking server or its client raises
        logger.warning(
            "version %d of model %r is published, but MLflow did not take all of it: %s: %s",
            *(result.version, result.model_name, type(error).__name__, error),
        )


@contextlib.contextmanager
def _run(result: results.FitResult) -> Iterator[None]:
    """The active run of this thread if no fit is in it yet, or a new one, below an active one."""
    import mlflow

    active, here = _active_run(), mlflow.active_run()
    if here and MODEL not in mlflow.get_run(here.info.run_id).data.tags:
        yield
        return
    name = f"{result.model_name} v{result.version}"
    # Of another thread's run only a run below it can be ours: ours to end.
    parent = active.info.run_id if active and not here else None
    with mlflow.start_run(run_name=name, nested=active is not None, parent_run_id=parent):
        yield


def _active_run() -> Any:
    """Return the run that is active in this thread, or else in another: MLflow keeps one a thread.

    Spark calls ``foreachBatch``, and fits under a ``CrossValidator``, in threads of their own.
    """
    mlflow = sys.modules.get("mlflow")  # a run can be active only where somebody has imported it
    if mlflow is None:
        return None
    if run := mlflow.active_run():
        return run
    in_any_thread = getattr(mlflow.tracking.fluent, "_get_latest_active_run", None)
    return in_any_thread() if in_any_thread else None


def _log(
    result: results.FitResult, fit_options: options.FitOptions, store: model_store.Store
) -> None:
    import mlflow

    info = results.info(store.manifest(result.model_name, result.version))
    mlflow.set_tags({MODEL: result.model_name, VERSION: result.version, STORE: store.url})
    for record in result.epochs:
        mlflow.log_metrics({**record.losses, **record.metrics}, step=record.epoch)
    mlflow.log_metric("rows_per_second", result.timing.rows_per_second)
    _log_model(manifests.saved(store, result.model_name, result.version, fit_options.network))
    # Last, since it refuses a value other than one that the user has logged by that name.
    mlflow.log_params(_params(info, fit_options))


def _params(info: results.ModelInfo, fit_options: options.FitOptions) -> dict[str, Any]:
    """How a version was trained: what was asked for, and what was used where nothing was."""
    asked = {
        field.name: value
        for field in dataclasses.fields(fit_options)
        if (value := getattr(fit_options, field.name)) is not None and field.name not in NO_PARAMS
    }
    used = {
        "network": info.network.name,
        "ranks": info.ranks,
        "seed": info.seed,
        "optimizer": info.optimizer.name,
        "learning_rate": info.optimizer.learning_rate,
    }
    return {**asked, **used}


def _log_model(saved: manifests.Saved) -> None:
    """Log the Keras model: ``[B, W]`` in, mostly float32, and probabilities ``[B, C]`` out."""
    import mlflow
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    def tensor(width: int, dtype: str = registry.FLOAT32) -> Schema:
        return Schema([TensorSpec(np.dtype(dtype), (-1, width))])

    network = saved.network
    inputs = tensor(network.inputs, registry.exported_dtype(network))

    mlflow.tensorflow.log_model(
        exports.built(saved),
        name="model",
        signature=ModelSignature(inputs, tensor(network.classes)),
        # Named, since MLflow would load the model in a process of its own to find them.
        pip_requirements=mlflow.tensorflow.get_default_pip_requirements(),
    )
