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
    from spark_mnist import schedules as schedules
    from spark_mnist.api import command as command
    from spark_mnist.api import evaluate as eval  # noqa: F401  # the command's verb: ruff takes a re-export under another name for unused
    from spark_mnist.api import evaluate as evaluate
    from spark_mnist.api import fit as fit
    from spark_mnist.api import predict as predict
    from spark_mnist.api import preflight as preflight
    from spark_mnist.catalog.exports import export as export
    from spark_mnist.catalog.versions import delete as delete
    from spark_mnist.catalog.versions import describe as describe
    from spark_mnist.catalog.versions import models as models
    from spark_mnist.catalog.versions import publish as publish
    from spark_mnist.catalog.versions import rollback as rollback
    from spark_mnist.fitting.results import FitResult as FitResult
    from spark_mnist.fitting.results import ModelInfo as ModelInfo

_HOMES = {
    "FitResult": "fitting.results",
    "ModelInfo": "fitting.results",
    "command": "api",
    "datasets": "",
    "delete": "catalog.versions",
    "describe": "catalog.versions",
    "errors": "",
    "eval": "api",
    "evaluate": "api",
    "export": "catalog.exports",
    "fit": "api",
    "models": "catalog.versions",
    "plots": "",
    "predict": "api",
    "preflight": "api",
    "publish": "catalog.versions",
    "rollback": "catalog.versions",
    "schedules": "",
}
"""The module of each public name; a name without one is a module itself."""

__all__ = ["__version__", *_HOMES]


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
