"""A rank is killed in a fit of each task, with each thing of the user's that a fit takes."""

import signal

import numpy as np
import pytest

import spark_mnist
from tests import test_tasks
from tests.conftest import arrays
from tests.faults.harness import Saboteur, nothing_left, send, trained
from tests.test_tasks import rows, table  # noqa: F401 (fixtures)

pytestmark = pytest.mark.ranks


NUMBERS = {"features": test_tasks.COLUMNS, "learning_rate": 0.05, "optimizer": "sgd"}
LOST = {
    "several inputs and outputs": test_tasks.SEVERAL,
    "numbers, standardized and streamed": {
        **NUMBERS,
        "label": "pair",
        "task": "regression",
        "standardize_label": True,
        "cache": "none",
    },
    "two classes, clipped": {
        **NUMBERS,
        "label": "flag",
        "task": "binary",
        "metrics": ["auc", "precision"],
        "clipnorm": 0.1,
    },
    "labels, gradients of three steps": {
        **NUMBERS,
        "label": "flags",
        "task": "multilabel",
        "metrics": ["f1_score"],
        "accumulate_steps": 3,
    },
    "balanced classes": {**NUMBERS, "label": "kind", "class_weight": "balanced"},
    "weights of rows, a loss and a metric of the user's": {
        **NUMBERS,
        "label": "number",
        "task": "regression",
        "sample_weight": "weight",
        "loss": test_tasks.half_huber,
        "metrics": [test_tasks.rmspe],
    },
    "an optimizer of the user's": {
        "features": test_tasks.COLUMNS,
        "label": "flag",
        "task": "binary",
        "optimizer": test_tasks.lion,
    },
    "numbers that the network looks up": {
        "features": "city",
        "label": "kind",
        "network": test_tasks.looked_up,
    },
    "image files, augmented by the network": {
        "features": "picture",
        "label": "kind",
        "network": test_tasks.augmenting,
    },
}


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(options, id=name, marks=pytest.mark.slow if number else [])
        for number, (name, options) in enumerate(LOST.items())
    ],
)
def test_a_lost_rank_changes_nothing(rows, tmp_path, options):  # noqa: F811 (the fixture)
    if options["features"] == "picture":
        rows = test_tasks.with_pictures(rows)
    options = {**options, "num_proc": 2, "batch_size": 4, "epochs": 30, "verbose": 0}
    quiet, broken = str(tmp_path / "quiet"), str(tmp_path / "broken")
    expected = spark_mnist.fit(rows, "m", store=quiet, **options)
    with (
        nothing_left(broken),
        Saboteur(lambda: trained(broken, "m", 4), send(signal.SIGKILL, 1)),
    ):
        found = spark_mnist.fit(rows, "m", store=broken, **options)
    assert found.records == expected.records
    for file in ("weights.npz", "optimizer.npz"):
        ours, wanted = arrays(broken, "m", 1, file), arrays(quiet, "m", 1, file)
        for mine, other in zip(ours, wanted, strict=True):
            np.testing.assert_array_equal(mine, other)
