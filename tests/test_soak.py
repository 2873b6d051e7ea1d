"""Fits, predictions and evaluations by the dozen in one session: nothing is left, nothing grows."""

import gc
import re
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest

import spark_mnist
from tests.faults import harness

pytestmark = pytest.mark.ranks

ROUNDS, WARM = 50, 15
"""Rounds, and how many of them fill caches and pools before anything is compared."""
NOISE = {"driver": 40.0, "jvm heap": 20.0, "python workers": 60.0, "spark storage": 1.0}
"""MiB by which the last rounds may lie above the first ones after the warm ones."""


POOLS = re.compile(r"(ResultQueryStageExecution|shuffle-exchange|broadcast-exchange|subquery)-")
"""Threads of Spark's pools, one for each query of the last minute, after which they end."""


def megabytes(process):
    try:
        return process.memory_full_info().uss / 2**20
    except psutil.Error:  # it has just ended
        return 0.0


def thread_names(jvm):
    return [str(thread.getName()) for thread in jvm.Thread.getAllStackTraces().keySet()]


def state(spark):
    """Return memory in MiB, and counts of threads, files and blocks, after a round."""
    gc.collect()
    jvm = spark.sparkContext._jvm
    jvm.System.gc()
    time.sleep(0.5)  # Spark's cleaner follows the collection
    jvm.System.gc()
    runtime = jvm.Runtime.getRuntime()
    storage = spark.sparkContext._jsc.sc().getExecutorMemoryStatus().values().head()
    me = psutil.Process()
    children = me.children(recursive=True)
    workers = [child for child in children if child.name().startswith("python")]
    return {
        "driver": megabytes(me),
        "jvm heap": (runtime.totalMemory() - runtime.freeMemory()) / 2**20,
        "python workers": sum(map(megabytes, workers)),
        "spark storage": (storage._1() - storage._2()) / 2**20,
        "driver's threads": threading.active_count(),
        "JVM's threads": len([name for name in thread_names(jvm) if not POOLS.match(name)]),
        "open files": me.num_fds(),
        "processes": len(children),
        "cached tables": spark.sparkContext._jsc.getPersistentRDDs().size(),
        "temporary files": len([*Path(tempfile.gettempdir()).iterdir()]),
    }


@pytest.mark.slow
def test_fifty_rounds_in_one_session(spark, digits, held_out, store):
    found = []
    for number in range(ROUNDS):
        ranks = 1 + number % 2
        options = {"epochs": 1, "batch_size": 16, "store": store, "verbose": 0}
        spark_mnist.fit(digits, "m", num_proc=ranks, continuous=number > 0, **options)
        spark_mnist.predict(held_out, "m", store=store).write.format("noop").mode("append").save()
        spark_mnist.evaluate(held_out, "m", repeat=2, store=store).collect()
        found.append(state(spark))
        assert not harness.ranks()
    assert harness.leftovers(store) == []

    third = (ROUNDS - WARM) // 3
    first, last = found[WARM : WARM + third], found[-third:]
    for name in found[0]:
        before, after = (statistics.median(r[name] for r in part) for part in (first, last))
        sys.stderr.write(f"\n| {name} | {before:.0f} | {after:.0f} |")
        allowed = NOISE.get(name, 2)
        assert after - before <= allowed, (name, [round(r[name], 1) for r in found])
