"""Fit, for as many epochs as asked, and tell of signal handlers: driver.py EPOCHS."""

import logging
import os
import signal
import sys
import time
from pathlib import Path

from pyspark.sql import SparkSession

import spark_mnist
from spark_mnist.store.filesystem import Files

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has none
write = Files.write_blocks


def slowly(self, path, blocks):
    write(self, path, blocks)
    if path.startswith("m/v") and path.endswith("weights.npz"):
        time.sleep(float(os.environ.get("SLOW", "0")))


Files.write_blocks = slowly
logging.basicConfig(level="WARNING")
logging.getLogger("spark_mnist").setLevel("DEBUG")
spark = SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false").getOrCreate()
spark.sparkContext.setLogLevel("OFF")
spark_handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
rows = spark_mnist.datasets.digits(spark, "train").limit(256)
rounds = int(os.environ.get("ROUNDS", "1"))
try:
    for number in range(rounds):
        if rounds > 1:  # both processes begin a round together
            Path(f"round-{number}-{os.getpid()}").touch()
            while len(list(Path().glob(f"round-{number}-*"))) < 2:
                time.sleep(0.05)
        spark_mnist.fit(
            rows,
            "m",
            epochs=int(sys.argv[1]),
            batch_size=16,
            num_proc=2,
            store="models",
            heartbeat_timeout=6.0,
            continuous=sys.argv[1] != "1",
        )
finally:
    after = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    print("restored", after == spark_handlers, flush=True)
