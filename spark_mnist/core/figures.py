"""Metrics from sums over rows, as training and evaluation both report them.

Runs on: driver, rank. Shape letters: K = numbers or labels of an output.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt


def precision_and_recall(both: float, truth: float, guess: float) -> dict[str, float]:
    """Return precision and recall of the positive class, by name; a quotient of no rows is 0.

    Args:
        both: Rows of the class for which it was predicted.
        truth: Rows of the class.
        guess: Rows for which it was predicted.
    """
    return {
        "precision": float(both / guess) if guess else 0.0,
        "recall": float(both / truth) if truth else 0.0,
    }


def f1(
    both: npt.NDArray[np.float64], truth: npt.NDArray[np.float64], guess: npt.NDArray[np.float64]
) -> dict[str, float]:
    """Return F1 over all labels together and its mean over the labels, by name.

    Args:
        both: Rows that have a label for which it was predicted, by label, ``[K]``.
        truth: Rows that have the label.
        guess: Rows for which it was predicted.
    """
    whole = truth + guess
    shares = np.divide(2 * both, whole, out=np.zeros(len(whole)), where=whole > 0)
    total = float(whole.sum())
    micro = 2 * float(both.sum()) / total if total else 0.0
    return {"f1_micro": micro, "f1_macro": float(shares.mean())}


def errors_of_numbers(
    squares: npt.NDArray[np.float64],
    sizes: npt.NDArray[np.float64],
    spread: npt.NDArray[np.float64],
    rows: float,
) -> dict[str, float]:
    """Return ``mse``, ``rmse``, ``mae`` and ``r2``, means over the numbers of a row.

    Args:
        squares: Sums of the squared errors, by number, ``[K]``.
        sizes: Sums of the absolute errors.
        spread: Sums of the squared distances of the labels from their mean.
        rows: Number of rows.
    """
    mse = float((squares / rows).mean())
    shares = [
        1 - square / width if width > 0 else float(square == 0)
        for square, width in zip(squares, spread, strict=True)
    ]
    mae = float((sizes / rows).mean())
    return {"mse": mse, "rmse": math.sqrt(mse), "mae": mae, "r2": float(np.mean(shares))}
