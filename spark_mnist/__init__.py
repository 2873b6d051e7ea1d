"""Train, apply and measure Keras models on Spark DataFrames.

``import spark_mnist`` loads neither Spark nor TensorFlow; each verb brings what it needs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from spark_mnist._version import __version__

if TYPE_CHECKING:
    from spark_mnist import datasets as datasets
    from spark_mnist import errors as errors
    from spark_mnist import plots as plots
    from spark_mnist.catalog import delete as delete
    from spark_mnist.catalog import describe as describe
    from spark_mnist.catalog import models as models
    from spark_mnist.catalog import publish as publish
    from spark_mnist.catalog import rollback as rollback
    from spark_mnist.exports import export as export
    from spark_mnist.results import FitResult as FitResult
    from spark_mnist.results import ModelInfo as ModelInfo
    from spark_mnist.verbs import command as command
    from spark_mnist.verbs import evaluate as eval
    from spark_mnist.verbs import evaluate as evaluate
    from spark_mnist.verbs import fit as fit
    from spark_mnist.verbs import predict as predict
    from spark_mnist.verbs import preflight as preflight

_HOMES = {
    "FitResult": "results",
    "ModelInfo": "results",
    "command": "verbs",
    "datasets": "",
    "delete": "catalog",
    "describe": "catalog",
    "errors": "",
    "eval": "verbs",
    "evaluate": "verbs",
    "export": "exports",
    "fit": "verbs",
    "models": "catalog",
    "plots": "",
    "predict": "verbs",
    "preflight": "verbs",
    "publish": "catalog",
    "rollback": "catalog",
}
"""The module of each public name; a name without one is a module itself."""

__all__ = [
    "FitResult",
    "ModelInfo",
    "__version__",
    "command",
    "datasets",
    "delete",
    "describe",
    "errors",
    "eval",
    "evaluate",
    "export",
    "fit",
    "models",
    "plots",
    "predict",
    "preflight",
    "publish",
    "rollback",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if not _HOMES[name]:
        return importlib.import_module(f"spark_mnist.{name}")
    home = importlib.import_module(f"spark_mnist.{_HOMES[name]}")
    value = getattr(home, "evaluate" if name == "eval" else name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
