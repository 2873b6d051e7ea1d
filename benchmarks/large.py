"""Ten times the rows in streamed shards: seconds and memory a row, and the plan of a terabyte.

    MNIST_DIR=/path/to/idx python -m benchmarks.large [MILLIONS]

Trains the mlp on two ranks with ``cache=512m`` and predicts, on a tenth of the rows and on all of
them, 6 million by default: 4.7 GB, no two rows alike. A tenth fits into that cache, so it is also
trained with a tenth of the cache. Prints a table: seconds for a million rows, and the most memory
of the driver, of the JVM, whose heap has 1 GiB, and of a rank. Then it plans shards for 512 ranks
and a terabyte, without any rows, and prints how long the driver takes.
"""

from __future__ import annotations

import contextlib
import pickle
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

import spark_mnist
from benchmarks.__main__ import machine, session
from benchmarks.data import Data
from spark_mnist.core import plan
from spark_mnist.data import shard_writer

CACHE, BATCH = 512 << 20, 1024
"""Bytes of the cache of a rank, where all rows are streamed; rows of a batch."""
DRIVER_MEMORY = "1g"
"""Heap of the JVM: one that may grow takes more with more rows, whether it needs it or not."""
POLL_S = 0.2
"""Seconds between two looks at the memory of the driver and the JVM."""
MIB = 1 << 20
TERABYTE_ROWS = (1 << 40) // 784
TERABYTE_RANKS = 512


def main(millions: float) -> None:
    """Print the tables."""
    with tempfile.TemporaryDirectory() as home:
        spark = session(DRIVER_MEMORY)
        data = Data(spark, Path(home))
        many = int(millions * 1e6)
        few_rows, many_rows = _rows(data, many // 10), _rows(data, many)
        cases = (few_rows, CACHE), (few_rows, CACHE // 10), (many_rows, CACHE)
        measure(few_rows, CACHE, home)  # the JVM compiles, and workers start
        figures = [measure(rows, cache, home) for rows, cache in cases]
        sys.stdout.write(f"{machine(data)}\n\n")
        _print_figures(figures, many)
        _print_plan(spark)


def _rows(data: Data, count: int) -> DataFrame:
    """Write so many rows, each with its number in its last pixels; and return them."""
    path = str(data.home / f"rows-{count}")
    copies = -(-count // 60_000)
    number = F.encode(F.format_string("%08d", F.monotonically_increasing_id() % 10**8), "utf-8")
    image = F.concat(F.substring("image", 1, 776), number).alias("image")
    copied = data.pictures.crossJoin(data.spark.range(copies).withColumnRenamed("id", "copy"))
    copied.select(image, "label").limit(count).write.parquet(path)
    return data.spark.read.parquet(path)


def fit(rows: DataFrame, cache: int, home: str) -> spark_mnist.FitResult:
    """Train one epoch on two ranks, which stream their shards where ``cache`` does not hold them.

    ``cache`` is the bytes of each rank.
    """
    return spark_mnist.fit(
        rows,
        "mlp",
        epochs=1,
        batch_size=BATCH,
        num_proc=2,
        cache=cache,
        train_validation_ratio=1.0,
        verbose=0,
        store=f"{home}/models",
    )


def measure(rows: DataFrame, cache: int, home: str) -> dict[str, float]:
    """Return seconds for a million rows of each part, and the most memory of each process."""
    with _memory() as most:
        timing = fit(rows, cache, home).timing
        predicted = spark_mnist.predict(rows, "mlp", batch_size=BATCH, store=f"{home}/models")
        begun = time.perf_counter()
        predicted.write.format("noop").mode("overwrite").save()
        seconds = time.perf_counter() - begun
    millions = rows.count() / 1e6
    return {
        "prepare, s": timing.prepare / millions,
        "train, s": timing.train / millions,
        "predict, s": seconds / millions,
        "driver, MiB": most["driver"] / MIB,
        "JVM, MiB": most["JVM"] / MIB,
        "rank, MiB": timing.memory / MIB,
    }


@contextlib.contextmanager
def _memory() -> Iterator[dict[str, int]]:
    """Watch the memory of this process and of its JVM until the block ends."""
    this = psutil.Process()
    jvm = next(child for child in this.children(recursive=True) if child.name() == "java")
    processes, most = {"driver": this, "JVM": jvm}, {"driver": 0, "JVM": 0}
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(POLL_S):
            for name, process in processes.items():
                most[name] = max(most[name], process.memory_info().rss)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield most
    finally:
        stop.set()
        thread.join()


def _print_figures(figures: list[dict[str, float]], many: int) -> None:
    in_memory, small, large = figures
    few, cache, small_cache = f"{many // 10:,}", CACHE // MIB, CACHE // 10 // MIB
    sys.stdout.write(
        f"| a million rows | of {few}, cache {cache} MiB | of {few}, cache {small_cache} MiB "
        f"| of {many:,}, cache {cache} MiB | to the first | to the second |\n"
        "|---|---|---|---|---|---|\n"
    )
    for name, value in large.items():
        cells = " | ".join(f"{case[name]:,.2f}" for case in (in_memory, small, large))
        ratios = " | ".join(f"{value / case[name]:.2f}" for case in (in_memory, small))
        sys.stdout.write(f"| {name} | {cells} | {ratios} |\n")


def _print_plan(spark: SparkSession) -> None:
    """Print what the driver does for a terabyte of rows: files, keys, Spark's plan, rank plans."""
    encoding = plan.Encoding("uint8", 255.0, 784)
    layout = plan.Shards(urls=(), rows=TERABYTE_ROWS, encoding=encoding)
    files = shard_writer._num_files(TERABYTE_ROWS, layout, TERABYTE_RANKS)
    begun = time.perf_counter()
    keys = shard_writer._partition_keys(files)
    keys_s = time.perf_counter() - begun
    begun = time.perf_counter()
    key = F.get(shard_writer._bigint_array(keys), (F.col("id") % files).cast("int"))
    rows: Any = spark.range(1_000).repartition(files, key)
    text = rows._jdf.queryExecution().executedPlan().toString()
    plan_s = time.perf_counter() - begun
    urls = tuple(f"file:///a/store/m/.work-0123456789abcdef/{n:06d}.parquet" for n in range(files))
    begun = time.perf_counter()
    pickled = pickle.dumps(plan.Shards(urls=urls, rows=TERABYTE_ROWS, encoding=encoding))
    pickle_s = time.perf_counter() - begun
    sys.stdout.write(
        f"\n| {TERABYTE_ROWS:,} rows of 784 bytes on {TERABYTE_RANKS} ranks | |\n|---|---|\n"
        f"| files of one row group | {files:,} |\n"
        f"| partition keys, s | {keys_s:.1f} |\n"
        f"| Spark's plan, s | {plan_s:.1f} |\n"
        f"| Spark's plan as text, MiB | {len(text) / MIB:.1f} |\n"
        f"| list of files for a rank, MiB | {len(pickled) / MIB:.1f} |\n"
        f"| its pickling, s | {pickle_s:.2f} |\n"
    )


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 6.0)
