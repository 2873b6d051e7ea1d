"""Load Petastorm after an import of it that failed, as it does without what it asks for."""

import contextlib
import importlib

import numpy as np

from spark_mnist.compat import petastorm

with contextlib.suppress(ImportError):  # with pyarrow 15 reading fails, and not the import
    importlib.import_module("petastorm")
assert petastorm.module().make_batch_reader
assert importlib.import_module("petastorm.unischema").np.unicode_ is np.str_
