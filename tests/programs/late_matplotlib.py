"""Draw a curve, and check when matplotlib is imported, and that pyplot never is."""

import sys

from spark_mnist import plots
from spark_mnist.core import plan

assert "matplotlib" not in sys.modules
records = [plan.EpochRecord(epoch=1, losses={"loss": 1.0}, metrics={"accuracy": 0.5})]
plots.png(plots.history(records))
assert "matplotlib" in sys.modules
assert "matplotlib.pyplot" not in sys.modules
