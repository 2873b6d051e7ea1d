"""Types of option values: the parser of their text, and the allowed values. Runs on: driver."""

from __future__ import annotations

import math
import numbers
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from spark_mnist import schedules
from spark_mnist.core import plan
from spark_mnist.networks import registry

DECIMAL = r"\d+(\.\d+)?"
SCHEDULE_PATTERN = rf"constant|cosine:[1-9]\d*|exponential:{DECIMAL}|step:[1-9]\d*:{DECIMAL}"
BYTES_BY_UNIT = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
SIZE_PATTERN = rf"none|[1-9]\d*[{''.join(BYTES_BY_UNIT)}]"


@dataclass(frozen=True)
class OptionType:
    """Type of an option's values: the parser of their text, and the check of a value."""

    words: str
    """Allowed values in words, as error messages and ``--help`` show them."""
    read: Callable[[str], Any]
    """Function from text to a value; raises ValueError."""
    allows: Callable[[Any], bool]
    """Function that returns whether a value is allowed."""
    to_text: Callable[[Any], Any] = lambda value: value
    """Function from a form that is for Python alone to the text; other values stay."""


def _read_bool(text: str) -> bool:
    values = {"true": True, "false": False}
    if text.lower() not in values:
        raise ValueError(text)
    return values[text.lower()]


def _read_int(text: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]+", text):
        raise ValueError(text)
    return int(text)


def _only_python(text: str) -> Any:
    raise ValueError(text)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_int(value) or (isinstance(value, float) and math.isfinite(value))


def plain(value: Any) -> Any:
    """Return the plain Python value of numbers and names of numpy or pandas, and of a path."""
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if isinstance(value, np.ndarray) or type(value).__module__.partition(".")[0] == "pandas":
        value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, np.floating):
        return float(value)
    return os.fspath(value) if isinstance(value, os.PathLike) else value


POSITIVE_INT = OptionType("int >= 1", _read_int, lambda v: _is_int(v) and v >= 1)
NON_NEGATIVE_INT = OptionType("int >= 0", _read_int, lambda v: _is_int(v) and v >= 0)
SEED = OptionType("int in 0..4294967295", _read_int, lambda v: _is_int(v) and 0 <= v < 2**32)
FRACTION = OptionType("float in [0, 1]", float, lambda v: _is_number(v) and 0 <= v <= 1)
POSITIVE_FLOAT = OptionType("float > 0", float, lambda v: _is_number(v) and v > 0)
PORT = OptionType(
    "a port like 35000, or a range like 35000-35015", str, lambda v: len(ports(v)) > 0
)
BOOL = OptionType("true or false", _read_bool, lambda v: isinstance(v, bool))
FRACTION_BELOW_ONE = OptionType("float in [0, 1)", float, lambda v: _is_number(v) and 0 <= v < 1)
UNITS = OptionType(
    "integers like 128,32, in Python also a tuple",
    str,
    lambda v: _matches(r"[1-9]\d*(,[1-9]\d*)*", v),
    lambda v: ",".join(map(str, v)) if isinstance(v, list | tuple) and all(map(_is_int, v)) else v,
)
SCHEDULE = OptionType(
    "constant, cosine:EPOCHS, exponential:FACTOR or step:EPOCHS:FACTOR, in Python also one of "
    "spark_mnist.schedules",
    str,
    lambda v: _matches(SCHEDULE_PATTERN, v),
    lambda v: str(v) if isinstance(v, schedules.Schedule) else v,
)
SIZE = OptionType(
    "none, or a size like 512m or 2g, in Python also a number of bytes",
    str,
    lambda v: _matches(SIZE_PATTERN, v) or (_is_int(v) and v >= 0),
)
TEXT = OptionType("text", str, lambda v: isinstance(v, str) and v != "")
COLUMNS = OptionType(
    "column names like a,b,c, in Python also a list, or a dictionary of these by the model's "
    "inputs",
    str,
    lambda v: _each(v, lambda value: bool(columns(value)) and all(columns(value))),
)
LABEL = OptionType(
    "a column name, in Python also a dictionary of these by the model's outputs",
    str,
    lambda v: _each(v, TEXT.allows),
)
TASK = OptionType(
    f"{', '.join(plan.TASKS)}, in Python also a dictionary by output",
    str,
    lambda v: _each(v, lambda value: value in plan.TASKS),
)
LOSS = OptionType(
    "a name of Keras's like huber, in Python also a loss, a function that makes one, or a "
    "dictionary by output",
    str,
    lambda v: _each(v, lambda value: TEXT.allows(value) or callable(value)),
)
METRICS = OptionType(
    "names of Keras's like auc,precision, in Python also a list, a function that makes one, or a "
    "dictionary by output",
    str,
    lambda v: _each(v, lambda value: callable(value) or bool(metrics(value))),
)
LOSS_WEIGHTS = OptionType(
    "in Python only: a dictionary of numbers > 0 by output",
    _only_python,
    lambda v: isinstance(v, dict) and bool(v) and all(map(POSITIVE_FLOAT.allows, v.values())),
)
CLASS_WEIGHT = OptionType(
    "balanced, or numbers by class like 0:1,1:2.5, in Python also a dictionary",
    lambda text: text if text == plan.BALANCED else _read_class_weights(text),
    lambda v: (
        v == plan.BALANCED or (isinstance(v, dict) and bool(v) and all(map(_is_weight, v.values())))
    ),
)
FUNCTION = OptionType("in Python only: a function", _only_python, callable)
OPTIMIZER = OptionType(
    f"{' or '.join(registry.OPTIMIZERS)}, in Python also a function that makes one of Keras's",
    str,
    lambda v: v in registry.OPTIMIZERS if isinstance(v, str) else callable(v),
)
NETWORK = OptionType(
    f"{', '.join(registry.REGISTRY)}; in Python also a Keras model or a function that makes one",
    str,
    lambda v: v in registry.REGISTRY if isinstance(v, str) else callable(v),
)


def _matches(pattern: str, value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(pattern, value) is not None


def _each(value: Any, allows: Callable[[Any], bool]) -> bool:
    """Return whether a value, or each value of a dictionary by name, is allowed."""
    if not isinstance(value, dict):
        return allows(value)
    return bool(value) and all(map(TEXT.allows, value)) and all(map(allows, value.values()))


def _is_weight(value: Any) -> bool:
    return _is_number(value) and value >= 0


def _read_class_weights(text: str) -> dict[str, float]:
    """Read ``0:1,1:2.5``; the classes stay text."""
    pairs = [item.rpartition(":") for item in text.split(",")]
    if not all(name and weight for name, _, weight in pairs):
        raise ValueError(text)
    return {name.strip(): float(weight) for name, _, weight in pairs}


def metrics(value: Any) -> tuple[Any, ...]:
    """Return the items of a value of the option ``metrics``; () for other values."""
    if isinstance(value, str):
        names = tuple(name.strip() for name in value.split(","))
        return names if all(names) else ()
    if callable(value):
        return (value,)
    if not isinstance(value, list | tuple):
        return ()
    is_valid = all((isinstance(item, str) and item) or callable(item) for item in value)
    return tuple(value) if is_valid else ()


def columns(value: Any) -> tuple[str, ...]:
    """Return the column names in a value of the option ``features``; () for other values."""
    if isinstance(value, str):
        return tuple(name.strip() for name in value.split(","))
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        return ()
    return tuple(map(str, value))  # not stripped, since blanks may belong to the names


def ports(value: object) -> range:
    """Return the ports in a value of type ``PORT``, in order; an empty range for other values."""
    if _is_int(value):
        value = str(value)
    if not _matches(r"[1-9]\d{0,4}(-[1-9]\d{0,4})?", value):
        return range(0)
    first, _, last = str(value).partition("-")
    port_range = range(int(first), int(last or first) + 1)
    return port_range if port_range and port_range[-1] < 1 << 16 else range(0)


def size(value: str | int) -> int:
    """Return the number of bytes of a value of type ``SIZE``."""
    if isinstance(value, int):
        return value
    return 0 if value == "none" else int(value[:-1]) * BYTES_BY_UNIT[value[-1]]


def one_of(*names: str) -> OptionType:
    """Make the type of an option whose value is one of a few words."""
    return OptionType(" or ".join(names), str, lambda v: v in names)
