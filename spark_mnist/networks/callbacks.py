"""Keras callbacks of users: which are taken, and the state that checkpoints keep of them.

Runs on: driver, rank.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from spark_mnist import errors
from spark_mnist.core import plan

REFUSED = {
    "BackupAndRestore": "a fit keeps checkpoints and restarts by itself, see max_restarts",
    "History": "fit returns the history",
    "ProgbarLogger": "fit shows its progress, see verbose",
}
"""Callbacks of Keras that a fit does not take, and why."""
RISING = ("acc", "auc", "precision", "recall", "f1", "r2", "true", "top_k")
"""Parts of the names of metrics of which more is better."""


COMPARISONS = ("greater", "greater_equal", "less", "less_equal")
"""Functions that a callback may have as an attribute, by which it compares figures."""


def make(callbacks_fn: plan.ModelFn) -> list[Any]:
    """Return the callbacks that the user's function makes.

    Raises:
        errors.OptionError: The function makes something else, or a callback that a fit refuses.
    """
    import keras

    user_callbacks = callbacks_fn()
    items = [*user_callbacks] if isinstance(user_callbacks, list | tuple) else [user_callbacks]
    for item in items:
        if not isinstance(item, keras.callbacks.Callback):
            raise errors.OptionError(f"callbacks= must make callbacks of Keras, not {item!r:.80}")
        for base in type(item).__mro__:
            if base.__module__.partition(".")[0] == "keras" and base.__name__ in REFUSED:
                raise errors.OptionError(
                    f"callbacks= makes a {base.__name__}, which a fit does not take: "
                    f"{REFUSED[base.__name__]}"
                )
        if getattr(item, "mode", None) == "auto" and isinstance(
            monitor := getattr(item, "monitor", None), str
        ):
            is_rising = any(part in monitor for part in RISING) and not monitor.endswith("loss")
            item.mode = "max" if is_rising else "min"
    return items


def has_batch_hooks(callback: Any) -> bool:
    """Return whether a callback does anything at the begin or end of a training batch."""
    import keras

    base = keras.callbacks.Callback
    names = ("on_batch_begin", "on_batch_end", "on_train_batch_begin", "on_train_batch_end")
    return any(
        name in vars(callback) or getattr(type(callback), name) is not getattr(base, name)
        for name in names
    )


def save(callbacks: Sequence[Any]) -> bytes:
    """Return the state of callbacks: their attributes that are numbers, text and arrays."""
    arrays: dict[str, Any] = {}
    states = []
    for number, callback in enumerate(callbacks):
        values: dict[str, Any] = {}
        for name, value in vars(callback).items():
            if name.startswith("_") or name in ("params", "model"):
                continue
            if _is_arrays(value):
                values[name] = {"arrays": len(value)}
                for index, array in enumerate(value):
                    arrays[f"{number}/{name}/{index}"] = array
            elif (plain_value := _plain(value)) is not _UNKNOWN:
                values[name] = {"value": plain_value}
            elif module := _module_of_function(value):
                values[name] = {"function": value.__name__, "module": module}
        states.append(values)
    text = np.frombuffer(json.dumps(states).encode(), np.uint8)
    buffer = io.BytesIO()
    np.savez(buffer, state=text, **arrays)
    return buffer.getvalue()


def restore(callbacks: Sequence[Any], content: bytes) -> None:
    """Give callbacks the state that ``save`` returned of others that the same function made."""
    with np.load(io.BytesIO(content), allow_pickle=False) as archive:
        states = json.loads(archive["state"].tobytes())
        for number, (callback, values) in enumerate(zip(callbacks, states, strict=True)):
            for name, entry in values.items():
                if not hasattr(callback, name):
                    continue
                if "arrays" in entry:
                    value = [archive[f"{number}/{name}/{i}"] for i in range(entry["arrays"])]
                elif entry.get("function") in COMPARISONS:
                    value = getattr(_function_modules()[entry["module"]], entry["function"])
                else:
                    value = entry.get("value")
                setattr(callback, name, value)


def _function_modules() -> dict[str, Any]:
    """Return the modules whose comparisons Keras's callbacks have as attributes, by name."""
    import keras

    return {"keras.ops": keras.ops, "numpy": np}


def _module_of_function(value: Any) -> str:
    """Return the name of the module that has a comparison, or ``""`` for other values."""
    name = getattr(value, "__name__", "")
    if name not in COMPARISONS:
        return ""
    modules = _function_modules().items()
    return next((key for key, module in modules if getattr(module, name, None) is value), "")


_UNKNOWN = object()
"""Result of ``_plain`` for a value that JSON cannot hold."""


def _plain(value: Any) -> Any:
    """Return a value as JSON holds it, or ``_UNKNOWN``."""
    if hasattr(value, "numpy") and not callable(getattr(value, "call", None)):
        value = value.numpy()
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0):
        value = value.item()
    try:
        return value if json.loads(json.dumps(value)) == value or value != value else _UNKNOWN
    except (TypeError, ValueError):
        return _UNKNOWN


def _is_arrays(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, np.ndarray) and item.dtype != object for item in value)
    )
