"""Options of ``fit`` as Params of Spark ML. Runs on: driver."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from pyspark.ml.param import Param, Params
from pyspark.ml.param.shared import (
    HasFeaturesCol,
    HasLabelCol,
    HasPredictionCol,
    HasProbabilityCol,
    HasRawPredictionCol,
    HasSeed,
    HasThresholds,
    HasValidationIndicatorCol,
    HasWeightCol,
)

from spark_mnist import errors, options
from spark_mnist.core import plan
from spark_mnist.networks import registry
from spark_mnist.options import value_types

SPARK_PARAM_NAMES = {
    "features": "featuresCol",
    "label": "labelCol",
    "validation_indicator": "validationIndicatorCol",
    "sample_weight": "weightCol",
}
"""Names of the Params that Spark ML has already for options of ``fit``, by option."""


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(word.title() for word in rest)


OPTIONS: Mapping[str, dataclasses.Field[Any]] = {
    SPARK_PARAM_NAMES.get(field.name, _camel(field.name)): field
    for field in dataclasses.fields(options.FitOptions)
}
"""Options of ``fit`` by the name of their Param."""


class FitParams(
    HasFeaturesCol,
    HasLabelCol,
    HasPredictionCol,
    HasValidationIndicatorCol,
    HasWeightCol,
    HasSeed,
):
    """Params of estimators and models: Spark ML's own, and one for each other option of ``fit``.

    Each Param has a getter ``getX``, which raises where there is neither a value nor a default, and
    a setter ``setX``.
    """

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Say that Params, getters and setters are made when the class is."""

    modelName: Param[str] = Param(
        Params._dummy(), "modelName", "name that the model is saved under; else the uid"
    )

    def __init__(self) -> None:
        super().__init__()
        values = {name: field.default for name, field in OPTIONS.items()}
        defaults = {name: value for name, value in values.items() if value is not None}
        columns = {"featuresCol": plan.InputSpec.features[0], "labelCol": plan.InputSpec.label}
        self._setDefault(**{**defaults, **columns, "seed": 0})

    def setParams(self, **params: Any) -> Any:
        """Set Params by name.

        Raises:
            errors.UnknownOption: There is no Param of that name.
            TypeError: A value is not allowed.
        """
        names = [param.name for param in self.params]
        for name in params:
            if name not in names:
                hint = errors.did_you_mean(name, names)
                raise errors.UnknownOption(
                    f"no Param {name!r}; the Params are {', '.join(names)}{hint}"
                )
        return self._set(**params)

    def getModelName(self) -> str:
        """Return the name that the model is saved under."""
        return self.getOrDefault("modelName") if self.isSet("modelName") else self.uid

    def option_values(self) -> dict[str, Any]:
        """Return the options that were set, by their names in ``fit``."""
        values = {
            field.name: self.getOrDefault(param)
            for param, field in OPTIONS.items()
            if self.isSet(param)
        }
        if not values.get("sample_weight"):
            values.pop("sample_weight", None)  # Spark ML takes "" for no column
        is_table = registry.is_table(values.get("network"))
        if self.getFeaturesCol() == plan.InputSpec.features[0] and not is_table:
            values.pop("features", None)  # the default: one column with the pixels of a picture
        return values


class ClassifierParams(FitParams, HasProbabilityCol, HasRawPredictionCol, HasThresholds):
    """Params of classifiers: those of ``FitParams``, and Spark ML's own for classes."""


def _converter(field: dataclasses.Field[Any]) -> Callable[[Any], Any]:
    """Return a function that returns an allowed value of an option, and refuses any other."""

    def convert(value: Any) -> Any:
        option_type = field.metadata["type"]
        allowed = option_type.to_text(value_types.plain(value))
        if not option_type.allows(allowed):
            raise TypeError(f"{field.name} must be {option_type.words}, not {value!r}")
        return allowed

    return convert


def _accessors(name: str) -> dict[str, Callable[..., Any]]:
    """Return the getter ``getX`` and the setter ``setX`` of a Param, by name."""

    def get_value(self: FitParams) -> Any:
        return self.getOrDefault(name)

    def set_value(self: FitParams, value: Any) -> Any:
        return self._set(**{name: value})

    functions = (("get", get_value), ("set", set_value))
    return {f"{verb}{name[0].upper()}{name[1:]}": function for verb, function in functions}


def _add_params() -> None:
    """Add to the classes the Params of the options, and a getter and setter for each Param."""
    for name, field in OPTIONS.items():
        if not hasattr(FitParams, name):
            param = Param(Params._dummy(), name, field.metadata["doc"], _converter(field))
            setattr(FitParams, name, param)
    for owner in (FitParams, ClassifierParams):
        for name in [name for name in dir(owner) if isinstance(getattr(owner, name), Param)]:
            for accessor, function in _accessors(name).items():
                if not hasattr(owner, accessor):
                    setattr(owner, accessor, function)


_add_params()
