"""Interrupt a stream whose micro-batch is fitted: interrupted_stream.py stop|notebook|script."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

from pyspark.sql import SparkSession

import spark_mnist


def learn(rows, batch):
    """Fit for longer than the test lasts."""
    try:
        spark_mnist.fit(rows, "m", epochs=5000, batch_size=16, store="models", num_proc=2)
    except spark_mnist.errors.FitCancelled:
        print("fit was cancelled", flush=True)
        raise


def interrupt():
    """Interrupt the main thread once ranks train."""
    while not list(Path().glob("models/m/.work-*/attempt-*")):
        time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGINT)


builder = SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false")
spark = builder.config("spark.ui.showConsoleProgress", "false").getOrCreate()
spark.sparkContext.setLogLevel("OFF")
home = Path.cwd()
digits = spark_mnist.datasets.digits(spark, "train").limit(200)
digits.select("image", "label").write.parquet(f"{home}/incoming")
incoming = spark.readStream.schema("image binary, label int").parquet(f"{home}/incoming")
writer = incoming.writeStream.foreachBatch(learn).trigger(availableNow=True)
query = writer.option("checkpointLocation", f"{home}/checkpoints").start()
threading.Thread(target=interrupt, daemon=True).start()
if sys.argv[1] == "script":
    query.awaitTermination()
try:
    query.awaitTermination()
except KeyboardInterrupt as error:
    print("interrupted", flush=True)
    if sys.argv[1] == "stop":
        query.stop()
    else:
        sys.last_value = error  # as IPython does where a cell did not catch it
deadline = time.monotonic() + 30
while query.isActive and time.monotonic() < deadline:
    time.sleep(0.1)
versions = [model.version for model in spark_mnist.models("models")]
print("active", query.isActive, "versions", versions, flush=True)
os._exit(0)
