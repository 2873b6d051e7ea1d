"""Progress of a fit, as the user sees it while the fit runs. Runs on: driver.

A terminal or a notebook shows a bar; elsewhere stderr gets one line an epoch.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any

from tqdm.auto import tqdm

from spark_mnist.core import channel


class Bar(contextlib.AbstractContextManager["Bar"]):
    """Progress bar that follows rank 0 through the epochs.

    Args:
        title: Title in front of the bar.
        first: Number of epochs trained before this fit.
        epochs: Number of the last epoch of this fit.
        steps: Steps of an epoch.
        visible: Whether the user wants to see progress.
    """

    def __init__(self, title: str, *, first: int, epochs: int, steps: int, visible: bool) -> None:
        self._first, self._epochs, self._steps = first, epochs, steps
        has_bar = visible and (sys.stderr.isatty() or _in_notebook())
        total = (epochs - first) * steps
        self._bar: Any = tqdm(total=total, desc=title, unit="step") if has_bar else None
        self._has_lines = visible and not has_bar
        self.visible = visible
        """Whether the user wants to see progress."""

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, event: channel.Event) -> None:
        """Show the progress of rank 0.

        Args:
            event: Event with ``epoch``, ``step``, ``means`` so far, and ``done`` at an epoch's end.
        """
        means = ", ".join(f"{name} {value:.4f}" for name, value in event["means"].items())
        text = f"epoch {event['epoch']}/{self._epochs}: {means}"
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(
                (event["epoch"] - self._first - 1) * self._steps + event["step"] - self._bar.n
            )
        elif self._has_lines and event.get("done"):
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()


def _in_notebook() -> bool:
    """Return whether a Jupyter kernel runs this code."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return "IPKernelApp" in getattr(shell, "config", {})
