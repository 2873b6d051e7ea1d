"""Go on learning as rows arrive: every micro-batch of a stream continues the model.

    python examples/learn_from_stream.py INCOMING CHECKPOINTS STORE

INCOMING is a directory of Parquet files with the columns ``image`` and ``label``. Each micro-batch
publishes a version, of which the one that a reader asked for stays as it is. The job takes what is
there and ends; without ``availableNow`` it waits for more.
"""

import sys

from pyspark.sql import DataFrame, SparkSession

import spark_mnist

spark = SparkSession.builder.appName("learn_from_stream").getOrCreate()
spark.sparkContext.setLogLevel("ERROR")
incoming, checkpoints, store = sys.argv[1:]


def learn(rows: DataFrame, batch: int) -> None:
    """Continue the model, or begin with the first rows that there are."""
    rows.persist()  # a fit reads its rows more than once
    known = [model.name for model in spark_mnist.models(store)]
    result = spark_mnist.fit(
        rows, "stream", epochs=2, batch_size=16, continuous="stream" in known, store=store
    )
    print(f"batch {batch}: {result.rows.total} rows, version {result.version}")
    rows.unpersist()


(
    spark.readStream.schema("image binary, label int")
    .option("maxFilesPerTrigger", 1)
    .parquet(incoming)
    .writeStream.foreachBatch(learn)
    .option("checkpointLocation", checkpoints)
    .trigger(availableNow=True)
    .start()
    .awaitTermination()
)
