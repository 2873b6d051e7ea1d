"""Packages that Keras imports where they are installed, and how to leave them out.

Runs on: rank, Spark task.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

PACKAGES = ("sklearn", "matplotlib")
"""Packages for Keras's wrappers and pictures, a quarter of the time of TensorFlow's import."""


@contextlib.contextmanager
def hidden() -> Iterator[None]:
    """Let imports in this block find none of ``PACKAGES`` that is not imported already."""
    names = [name for name in PACKAGES if name not in sys.modules]
    for name in names:
        sys.modules[name] = None  # type: ignore[assignment]  # the import system takes it as absent
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]
