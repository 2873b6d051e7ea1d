"""The options of ``fit`` as Params of Spark ML. Runs on the driver."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from pyspark.ml.param import Param, Params
from pyspark.ml.param.shared import (
    HasFeaturesCol,
    HasLabelCol,
    HasPredictionCol,
    HasProbabilityCol,
    HasRawPredictionCol,
    HasSeed,
    HasValidationIndicatorCol,
)

from spark_mnist import errors, options
from spark_mnist.core import plan
from spark_mnist.networks import registry
from spark_mnist.options import value_types

COLUMNS = {
    "features": "featuresCol",
    "label": "labelCol",
    "validation_indicator": "validationIndicatorCol",
}
"""Params that Spark ML has for options of ours."""


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(word.title() for word in rest)


OPTIONS: Mapping[str, dataclasses.Field[Any]] = {
    COLUMNS.get(field.name, _camel(field.name)): field
    for field in dataclasses.fields(options.FitOptions)
}
"""The options of ``fit`` by the name of their Param."""


class FitParams(
    HasFeaturesCol,
    HasLabelCol,
    HasPredictionCol,
    HasProbabilityCol,
    HasRawPredictionCol,
    HasValidationIndicatorCol,
    HasSeed,
):
    """The Params of estimator and model: Spark ML's own, and one for each other option of ``fit``.

    Each has ``getX``, an error where nothing is set and there is no default, and ``setX``.
    """

    modelName: Param[str] = Param(
        Params._dummy(), "modelName", "name that the model is saved under; else the uid"
    )

    def __init__(self) -> None:
        super().__init__()
        defaults = {name: field.default for name, field in OPTIONS.items()}
        known = {name: value for name, value in defaults.items() if value is not None}
        columns = {"featuresCol": plan.InputSpec.features[0], "labelCol": plan.InputSpec.label}
        self._setDefault(**{**known, **columns, "seed": 0})

    def setParams(self, **given: Any) -> Any:
        """Set Params by name.

        Raises:
            errors.UnknownOption: There is none of that name.
            TypeError: A value is not allowed.
        """
        known = [param.name for param in self.params]
        for name in given:
            if name not in known:
                hint = errors.did_you_mean(name, known)
                raise errors.UnknownOption(f"no Param {name!r}; there are {', '.join(known)}{hint}")
        return self._set(**given)

    def getModelName(self) -> str:
        """The name that the model is saved under."""
        return self.getOrDefault("modelName") if self.isSet("modelName") else self.uid

    def given(self) -> dict[str, Any]:
        """The options that were set, by their own names."""
        found = {
            field.name: self.getOrDefault(param)
            for param, field in OPTIONS.items()
            if self.isSet(param)
        }
        table = registry.is_table(found.get("network"))
        if self.getFeaturesCol() == plan.InputSpec.features[0] and not table:
            found.pop("features", None)  # a picture's pixels, not any column's numbers
        return found


def _converter(field: dataclasses.Field[Any]) -> Callable[[Any], Any]:
    """Let values of an option through, and nothing else."""

    def convert(value: Any) -> Any:
        kind, value = field.metadata["kind"], value_types.plain(value)
        if not kind.allows(value):
            raise TypeError(f"{field.name} must be {kind.words}, not {value!r}")
        return value

    return convert


def _accessors(name: str) -> dict[str, Callable[..., Any]]:
    """``getX`` and ``setX`` of a Param."""

    def get(self: FitParams) -> Any:
        return self.getOrDefault(name)

    def put(self: FitParams, value: Any) -> Any:
        return self._set(**{name: value})

    return {f"{verb}{name[0].upper()}{name[1:]}": f for verb, f in (("get", get), ("set", put))}


def _complete() -> None:
    """Give ``FitParams`` what follows from the options."""
    for name, field in OPTIONS.items():
        if not hasattr(FitParams, name):
            param = Param(Params._dummy(), name, field.metadata["doc"], _converter(field))
            setattr(FitParams, name, param)
    for name in [name for name in dir(FitParams) if isinstance(getattr(FitParams, name), Param)]:
        for accessor, function in _accessors(name).items():
            if not hasattr(FitParams, accessor):
                setattr(FitParams, accessor, function)


_complete()
