"""Logging of a fit to MLflow: parameters, metrics by epoch, the model. Runs on: driver.

A fit is logged after its version is published, on the driver, since executors have neither the
MLflow run nor its credentials. Where a run is active, the first fit is logged in this run; the
second fit and each further fit get a child run of it.
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
from spark_mnist.store import manifests, model_store

logger = logging.getLogger(__name__)

MODEL_TAG, VERSION_TAG, STORE_TAG = "spark_mnist.model", "spark_mnist.version", "spark_mnist.store"
"""Tags of a fit's run."""
UNLOGGED_OPTIONS = ("store", "network", "verbose", "mlflow")
"""Options that are no parameters of the training, or that are logged in another form."""


def is_enabled(option: bool | None) -> bool:
    """Return whether to log a fit to MLflow.

    Args:
        option: Value of the option ``mlflow``; with None a fit is logged where a run is active.

    Raises:
        errors.VersionError: The option is true, and MLflow is missing or outside its range.
    """
    if option is False or not (option or _active_run()):
        return False
    try:
        requirements.check_extra("mlflow")
    except errors.VersionError as error:
        if option:
            raise errors.VersionError(f"mlflow=true needs MLflow: {error}") from None
        logger.warning("the fit is not logged in the active run of MLflow: %s", error)
        return False
    return True


def log(
    result: results.FitResult, fit_options: options.FitOptions, store: model_store.Store
) -> None:
    """Log a published fit.

    Errors of MLflow are logged as a warning, since the version is published all the same.

    Args:
        result: Result of the fit.
        fit_options: Options of the fit.
        store: Store in which the version was published.
    """
    try:
        with _fit_run(result), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings of MLflow and of the libraries it imports
            _log(result, fit_options, store)
    except Exception as error:  # of any type: a tracking server's client has its own exceptions
        logger.warning(
            "version %d of model %r is published, but MLflow did not take all of it: %s: %s",
            *(result.version, result.model_name, type(error).__name__, error),
        )


@contextlib.contextmanager
def _fit_run(result: results.FitResult) -> Iterator[None]:
    """Use this thread's active run if no fit is logged in it yet, else a new run.

    The new run is a child of the active run, where there is one.
    """
    import mlflow

    active_run, thread_run = _active_run(), mlflow.active_run()
    if thread_run and MODEL_TAG not in mlflow.get_run(thread_run.info.run_id).data.tags:
        yield
        return
    name = f"{result.model_name} v{result.version}"
    # A run of another thread is not ours to end: the fit gets a child run, which it ends itself.
    parent_id = active_run.info.run_id if active_run and not thread_run else None
    with mlflow.start_run(run_name=name, nested=active_run is not None, parent_run_id=parent_id):
        yield


def _active_run() -> Any:
    """Return the active run of this thread, else of another thread, else None.

    MLflow keeps one active run for each thread. Spark calls ``foreachBatch``, and fits under a
    ``CrossValidator``, in threads of their own.
    """
    mlflow = sys.modules.get("mlflow")  # a run can be active only where MLflow was imported
    if mlflow is None:
        return None
    if run := mlflow.active_run():
        return run
    latest_active_run = getattr(mlflow.tracking.fluent, "_get_latest_active_run", None)
    return latest_active_run() if latest_active_run else None


def _log(
    result: results.FitResult, fit_options: options.FitOptions, store: model_store.Store
) -> None:
    import mlflow

    info = results.info(store.manifest(result.model_name, result.version))
    mlflow.set_tags(
        {MODEL_TAG: result.model_name, VERSION_TAG: result.version, STORE_TAG: store.url}
    )
    for record in result.records:
        mlflow.log_metrics({**record.losses, **record.metrics}, step=record.epoch)
    mlflow.log_metric("rows_per_second", result.timing.rows_per_second)
    _log_model(manifests.load(store, result.model_name, result.version, fit_options.network))
    # Last, since MLflow raises where the user has logged another value under the same name.
    mlflow.log_params(_params(info, fit_options))


def _params(info: results.ModelInfo, fit_options: options.FitOptions) -> dict[str, Any]:
    """Return a fit's parameters: all options with a value, and the values that training used."""
    option_values = {
        field.name: _param(value)
        for field in dataclasses.fields(fit_options)
        if (value := getattr(fit_options, field.name)) is not None
        and field.name not in UNLOGGED_OPTIONS
    }
    effective_values = {
        "network": info.network.name,
        "ranks": info.ranks,
        "seed": info.seed,
        "optimizer": info.optimizer.name,
        "learning_rate": info.optimizer.learning_rate,
    }
    return {**option_values, **effective_values}


def _param(value: Any) -> Any:
    """Return the value of an option as a parameter: functions by their names."""
    if isinstance(value, dict):
        return {key: _param(item) for key, item in value.items()}
    return getattr(value, "__name__", value) if callable(value) else value


def _log_model(saved_version: manifests.SavedModel) -> None:
    """Log the Keras model.

    Its inputs are ``[B, W]``, mostly float32, and its outputs are those of its tasks; several have
    names.
    """
    import mlflow
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    model = exports.build_model(saved_version)

    def schema(tensors: Any) -> Schema:
        named = tensors if isinstance(tensors, dict) else {None: tensors}
        return Schema(
            [
                TensorSpec(np.dtype(tensor.dtype), (-1, *tensor.shape[1:]), name)
                for name, tensor in named.items()
            ]
        )

    mlflow.tensorflow.log_model(
        model,
        name="model",
        signature=ModelSignature(schema(model.input), schema(model.output)),
        # Passed here, since MLflow would load the model in another process to find them.
        pip_requirements=mlflow.tensorflow.get_default_pip_requirements(),
    )
