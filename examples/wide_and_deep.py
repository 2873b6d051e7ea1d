"""Wide and deep: crossed categories beside embeddings, to tell one of two classes.

    python examples/wide_and_deep.py

The rows are made here, so the probability that each label was drawn with is known: the model's AUC
stands beside that of these probabilities, which no model can beat but by luck.
"""

import numpy as np
from pyspark.ml import Pipeline
from pyspark.ml.evaluation import BinaryClassificationEvaluator
from pyspark.ml.feature import OneHotEncoder, StringIndexer
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

import spark_mnist

EDUCATION = ["school", "college", "bachelor", "master", "doctor"]
JOB = ["clerk", "cook", "driver", "engineer", "farmer", "lawyer", "nurse", "teacher"]
ROWS = 8_000
COLUMNS = "education string, job string, age double, hours double, chance double, rich boolean"


def make_rows(spark: SparkSession) -> DataFrame:
    """Make people: income depends on age and hours, and on each pair of education and job."""
    random = np.random.default_rng(0)
    education, job = (random.integers(0, len(names), ROWS) for names in (EDUCATION, JOB))
    age, hours = random.uniform(18, 70, ROWS), random.uniform(10, 60, ROWS)
    pairs = random.normal(0, 1.5, (len(EDUCATION), len(JOB)))
    score = pairs[education, job] + (hours - 35) / 12 + 1.5 - ((age - 48) / 14) ** 2
    chance = 1 / (1 + np.exp(-score))
    rich = random.random(ROWS) < chance
    names = np.array(EDUCATION)[education], np.array(JOB)[job]
    columns = [array.tolist() for array in (*names, age, hours, chance, rich)]
    return spark.createDataFrame(list(zip(*columns, strict=True)), COLUMNS)


def network():
    """Make the model; runs on each rank."""
    import keras
    from keras import layers

    wide = keras.Input((WIDTH,), name="wide")
    deep = keras.Input((4,), name="deep")  # age, hours, education, job
    numbers = layers.Normalization(mean=[44.0, 35.0], variance=[225.0, 208.0])(deep[:, :2])
    x = layers.Concatenate()(
        [
            numbers,
            layers.Embedding(len(EDUCATION) + 1, 4)(deep[:, 2]),
            layers.Embedding(len(JOB) + 1, 4)(deep[:, 3]),
        ]
    )
    x = layers.Dense(32, activation="relu")(x)
    x = layers.Dense(16, activation="relu")(x)
    # The wide part goes straight to the last layer: one weight for each pair.
    logit = layers.Add()([layers.Dense(1)(wide), layers.Dense(1)(x)])
    return keras.Model([wide, deep], layers.Activation("sigmoid")(logit))


spark = SparkSession.builder.appName("wide_and_deep").getOrCreate()
spark.sparkContext.setLogLevel("ERROR")
people = make_rows(spark).withColumn("education_and_job", F.concat_ws(" ", "education", "job"))
train, test = (part.cache() for part in people.randomSplit([0.8, 0.2], seed=0))

# Spark ML numbers the categories; an unknown one gets the number after the last.
names = ["education", "job", "education_and_job"]
indices = [f"{name}_index" for name in names]
indexer = StringIndexer(inputCols=names, outputCols=indices, handleInvalid="keep")
encoder = OneHotEncoder(inputCol="education_and_job_index", outputCol="pair", dropLast=False)
preparation = Pipeline(stages=[indexer, encoder]).fit(train)
train, test = preparation.transform(train), preparation.transform(test)
WIDTH = train.first()["pair"].size

spark_mnist.fit(
    train,
    "wide_and_deep",
    features={"wide": "pair", "deep": ["age", "hours", "education_index", "job_index"]},
    label="rich",
    task="binary",
    network=network,
    learning_rate=0.003,
    num_proc=2,
    epochs=10,
)
metrics = spark_mnist.evaluate(test, "wide_and_deep", rate=1, batch_size=1000).first()["metrics"]
measure = BinaryClassificationEvaluator(labelCol="label", rawPredictionCol="chance")
best = measure.evaluate(test.withColumn("label", F.col("rich").cast("double")))
print(f"test auc: {metrics['auc']:.4f}, of the true probabilities: {best:.4f}")
print(f"accuracy: {metrics['accuracy']:.4f}, recall: {metrics['recall']:.4f}")

predictions = spark_mnist.predict(test, "wide_and_deep", interpret=True, probabilities=True)
predictions.select("education", "job", "hours", "rich", "interpreted", "probability").show(5)
