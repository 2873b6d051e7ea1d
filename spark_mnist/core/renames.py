"""Former names of public attributes, which keep working for a release. Runs on: driver."""

from __future__ import annotations

import warnings


def warn(former: str, name: str) -> None:
    """Warn the caller of a deprecated property that it has a new name."""
    warnings.warn(f"{former} is now {name}", DeprecationWarning, stacklevel=3)
