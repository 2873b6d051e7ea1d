"""Learning-rate schedules, for the option ``lr_schedule`` in Python. Runs on: driver.

Each is the value that its text is in the command: ``Cosine(20)`` is ``cosine:20``. ``fit`` raises
``errors.OptionError`` where a factor is not above 0 or a number of epochs is below 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal


@dataclass(frozen=True)
class Cosine:
    """Let the learning rate fall to 0 along half a cosine."""

    epochs: int
    """Epochs of the model after which the rate is 0."""

    def __str__(self) -> str:
        return f"cosine:{self.epochs}"


@dataclass(frozen=True)
class Exponential:
    """Multiply the learning rate by a factor in each epoch."""

    factor: float
    """Factor above 0; 0.95 lowers the rate by 5 % an epoch."""

    def __str__(self) -> str:
        return f"exponential:{_decimal(self.factor)}"


@dataclass(frozen=True)
class Step:
    """Multiply the learning rate by a factor every few epochs."""

    epochs: int
    """Epochs between two steps."""
    factor: float
    """Factor above 0; 0.5 halves the rate at each step."""

    def __str__(self) -> str:
        return f"step:{self.epochs}:{_decimal(self.factor)}"


Schedule = Cosine | Exponential | Step


def _decimal(number: float) -> str:
    """Return a number without an exponent."""
    return format(Decimal(repr(number)), "f")
