"""What values options take: how their text is read, and which are allowed."""

from __future__ import annotations

import math
import numbers
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from spark_mnist.networks import registry

NUMBER = r"\d+(\.\d+)?"
SCHEDULES = rf"constant|cosine:[1-9]\d*|exponential:{NUMBER}|step:[1-9]\d*:{NUMBER}"
UNITS_OF_BYTES = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
SIZES = rf"none|[1-9]\d*[{''.join(UNITS_OF_BYTES)}]"


@dataclass(frozen=True)
class OptionType:
    """What values an option takes: how its text is read and its value checked."""

    words: str
    """The allowed values in words, as error messages and ``--help`` show them."""
    read: Callable[[str], Any]
    """Text to value; raises ValueError."""
    allows: Callable[[Any], bool]


def _read_bool(text: str) -> bool:
    values = {"true": True, "false": False}
    if text.lower() not in values:
        raise ValueError(text)
    return values[text.lower()]


def _read_int(text: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]+", text):
        raise ValueError(text)
    return int(text)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_int(value) or (isinstance(value, float) and math.isfinite(value))


def plain(value: Any) -> Any:
    """Return the plain Python value of numbers and names of numpy's and pandas', and of a path."""
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
UNITS = OptionType("integers like 128,32", str, lambda v: _matches(r"[1-9]\d*(,[1-9]\d*)*", v))
SCHEDULE = OptionType(
    "constant, cosine:EPOCHS, exponential:FACTOR or step:EPOCHS:FACTOR",
    str,
    lambda v: _matches(SCHEDULES, v),
)
SIZE = OptionType("none, or a size like 512m or 2g", str, lambda v: _matches(SIZES, v))
TEXT = OptionType("text", str, lambda v: isinstance(v, str) and v != "")
COLUMNS = OptionType(
    "column names like a,b,c, in Python also a list",
    str,
    lambda v: bool(columns(v)) and all(columns(v)),
)
NETWORK = OptionType(
    f"{', '.join(registry.REGISTRY)}; in Python also a Keras model or a function that makes one",
    str,
    lambda v: v in registry.REGISTRY if isinstance(v, str) else callable(v),
)


def _matches(pattern: str, value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(pattern, value) is not None


def columns(value: Any) -> tuple[str, ...]:
    """The column names in a value of the option ``features``; none where it has none."""
    if isinstance(value, str):
        return tuple(name.strip() for name in value.split(","))
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        return ()
    return tuple(map(str, value))  # as they are: blanks may belong to them


def ports(value: object) -> range:
    """Return the ports of a value of the kind ``PORT``, in order; none where it has none."""
    if _is_int(value):
        value = str(value)
    if not _matches(r"[1-9]\d{0,4}(-[1-9]\d{0,4})?", value):
        return range(0)
    first, _, last = str(value).partition("-")
    numbers = range(int(first), int(last or first) + 1)
    return numbers if numbers and numbers[-1] < 1 << 16 else range(0)


def size(value: str) -> int:
    """The bytes of a value of the kind ``SIZE``."""
    return 0 if value == "none" else int(value[:-1]) * UNITS_OF_BYTES[value[-1]]


def one_of(*names: str) -> OptionType:
    """Make the kind of an option that is one of a few words."""
    return OptionType(" or ".join(names), str, lambda v: v in names)
