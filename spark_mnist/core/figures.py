"""Metrics from sums over rows, as training and evaluation both report them.

Runs on: driver, rank. Shape letters: K = numbers or labels of an output.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt


def precision_and_recall(
    true_positives: float, positives: float, predicted_positives: float
) -> dict[str, float]:
    """Return precision and recall of the positive class, by name; a quotient of no rows is 0.

    Args:
        true_positives: Rows of the class for which it was predicted.
        positives: Rows of the class.
        predicted_positives: Rows for which it was predicted.
    """
    return {
        "precision": float(true_positives / predicted_positives) if predicted_positives else 0.0,
        "recall": float(true_positives / positives) if positives else 0.0,
    }


def f1(
    true_positives: npt.NDArray[np.float64],
    positives: npt.NDArray[np.float64],
    predicted_positives: npt.NDArray[np.float64],
) -> dict[str, float]:
    """Return F1 over all labels together and its mean over the labels, by name.

    Args:
        true_positives: Rows that have a label for which it was predicted, by label, ``[K]``.
        positives: Rows that have the label.
        predicted_positives: Rows for which it was predicted.
    """
    denominators = positives + predicted_positives
    shares = np.divide(
        2 * true_positives, denominators, out=np.zeros(len(denominators)), where=denominators > 0
    )
    total = float(denominators.sum())
    micro = 2 * float(true_positives.sum()) / total if total else 0.0
    return {"f1_micro": micro, "f1_macro": float(shares.mean())}


def regression_metrics(
    squared_errors: npt.NDArray[np.float64],
    absolute_errors: npt.NDArray[np.float64],
    total_squares: npt.NDArray[np.float64],
    rows: float,
) -> dict[str, float]:
    """Return ``mse``, ``rmse``, ``mae`` and ``r2``, means over the numbers of a row.

    Args:
        squared_errors: Sums of the squared errors, by number, ``[K]``.
        absolute_errors: Sums of the absolute errors.
        total_squares: Sums of the squared distances of the labels from their mean.
        rows: Number of rows.
    """
    mse = float((squared_errors / rows).mean())
    shares = [
        1 - error / total if total > 0 else float(error == 0)
        for error, total in zip(squared_errors, total_squares, strict=True)
    ]
    mae = float((absolute_errors / rows).mean())
    return {"mse": mse, "rmse": math.sqrt(mse), "mae": mae, "r2": float(np.mean(shares))}
