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
    from spark_mnist.verbs import FitResult as FitResult
    from spark_mnist.verbs import ModelInfo as ModelInfo
    from spark_mnist.verbs import command as command
    from spark_mnist.verbs import evaluate as eval
    from spark_mnist.verbs import evaluate as evaluate
    from spark_mnist.verbs import fit as fit
    from spark_mnist.verbs import models as models
    from spark_mnist.verbs import predict as predict

__all__ = [
    "FitResult",
    "ModelInfo",
    "__version__",
    "command",
    "datasets",
    "errors",
    "eval",
    "evaluate",
    "fit",
    "models",
    "predict",
]

_MODULES = ("datasets", "errors")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _MODULES:
        return importlib.import_module(f"spark_mnist.{name}")
    verbs = importlib.import_module("spark_mnist.verbs")
    value = getattr(verbs, "evaluate" if name == "eval" else name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
