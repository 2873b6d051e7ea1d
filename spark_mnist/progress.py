"""What the user sees of a fit while it runs. Runs on the driver.

The ranks' output comes here line by line over Horovod's own connection. Rank 0's events move a bar
where a terminal or a notebook shows it, and become one line an epoch elsewhere; the rest goes to
this module's logger at debug level, and the last lines are kept for the error that may follow.
"""

from __future__ import annotations

import collections
import json
import logging
import sys
from typing import Any

from tqdm.auto import tqdm

logger = logging.getLogger(__name__)


class Progress:
    """A text stream for the ranks' output.

    Args:
        title: What is being trained.
        epochs: The number of the last epoch of this fit.
        steps: Steps of an epoch.
        first: Epochs trained before this fit.
        marker: What begins a line that carries an event.
        shown: Whether the user wants to see anything.
    """

    def __init__(
        self, title: str, *, first: int, epochs: int, steps: int, marker: str, shown: bool
    ) -> None:
        self._epochs, self._steps, self._first, self._marker = epochs, steps, first, marker
        self._tail: collections.deque[str] = collections.deque(maxlen=30)
        live = shown and (sys.stderr.isatty() or _in_notebook())
        self._bar: Any = tqdm(total=(epochs - first) * steps, desc=title, unit="step") if live else None
        self._lines = shown and not live

    def write(self, text: str) -> int:
        """Take one line of a rank's output, as Horovod forwards it."""
        _, found, event = text.partition(self._marker)
        if found:
            self._show(json.loads(event))
        elif text.strip():
            self._tail.append(text.rstrip())
            logger.debug("%s", text.rstrip())
        return len(text)

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()

    @property
    def tail(self) -> str:
        """The last lines of output that were no events."""
        return "\n".join(self._tail)

    def _show(self, event: dict[str, Any]) -> None:
        done = event["event"] == "epoch"
        label = f"epoch {event['epoch']}/{self._epochs}"
        if self._bar is not None:
            step = self._steps if done else event["step"]
            self._bar.n = (event["epoch"] - self._first - 1) * self._steps + step
            shown = {k: f"{v:.4f}" for k, v in event.items() if isinstance(v, float)}
            self._bar.set_postfix_str(f"{label}, {_pairs(shown)}", refresh=True)
        elif self._lines and done:
            shown = {k: f"{v:.4f}" for k, v in event.items() if isinstance(v, float)}
            print(f"{label}: {_pairs(shown)}", file=sys.stderr, flush=True)


def _pairs(values: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _in_notebook() -> bool:
    shell = sys.modules.get("IPython")
    return shell is not None and "IPKernelApp" in getattr(shell.get_ipython(), "config", {})
