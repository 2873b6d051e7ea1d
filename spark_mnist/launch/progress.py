"""What the user sees of a fit while it runs. Runs on the driver.

A bar where a terminal or a notebook shows it, one line an epoch on stderr elsewhere.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any

from tqdm.auto import tqdm

from spark_mnist.core import channel


class Bar(contextlib.AbstractContextManager["Bar"]):
    """Follows rank 0 through the epochs.

    Args:
        title: What is being trained.
        first: Epochs trained before this fit.
        epochs: The number of the last epoch of this fit.
        steps: Steps of an epoch.
        visible: Whether the user wants to see anything.
    """

    def __init__(self, title: str, *, first: int, epochs: int, steps: int, visible: bool) -> None:
        self._first, self._epochs, self._steps = first, epochs, steps
        live = visible and (sys.stderr.isatty() or _in_notebook())
        total = (epochs - first) * steps
        self._bar: Any = tqdm(total=total, desc=title, unit="step") if live else None
        self._lines = visible and not live
        self.visible = visible
        """Whether the user wants to see anything."""

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, event: channel.Event) -> None:
        """Show where rank 0 is: ``epoch``, ``step``, means so far, ``done`` at an epoch's end."""
        means = ", ".join(f"{name} {value:.4f}" for name, value in event["means"].items())
        text = f"epoch {event['epoch']}/{self._epochs}: {means}"
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(
                (event["epoch"] - self._first - 1) * self._steps + event["step"] - self._bar.n
            )
        elif self._lines and event.get("done"):
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()


def _in_notebook() -> bool:
    """Whether a Jupyter kernel runs this code."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return "IPKernelApp" in getattr(shell, "config", {})
