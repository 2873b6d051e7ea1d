"""Load Petastorm, and check that NumPy, pyarrow and the list of modules stay as they were."""

import sys

import numpy
import pyarrow
import pyarrow.lib
import pyarrow.parquet

modules = [numpy, pyarrow, pyarrow.parquet, pyarrow.lib]
members_before = [dict(vars(module)) for module in modules]
names_before = set(sys.modules)

from spark_mnist.compat import petastorm  # noqa: E402

petastorm.module("petastorm.spark")
removed_modules = {"pyarrow.filesystem", "pyarrow.hdfs", "distutils", "distutils.version"}
if pyarrow.__version__.split(".")[0] != "14" and sys.version_info >= (3, 12):
    left = removed_modules & set(sys.modules) - names_before
    assert not left, left
for module, members in zip(modules, members_before, strict=True):
    changed = {name for name, member in members.items() if vars(module)[name] is not member}
    added = {
        name
        for name in set(vars(module)) - set(members)
        if not isinstance(vars(module)[name], type(sys))
    }
    assert not changed, (module, changed)
    assert not added, (module, added)
