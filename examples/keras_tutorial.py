"""The Keras tutorial: Flatten, 20, 20, 10, SGD, rows split 7:3; curves, save, load, one picture.

    python examples/keras_tutorial.py [mnist|digits]

The network is built with Keras itself, as in the tutorial. The curves go to keras_tutorial.png.
"""

import sys
import tempfile

import numpy as np
from pyspark.sql import SparkSession

import spark_mnist


def network():
    """Make the tutorial's model; runs on each rank."""
    import keras
    from keras import layers

    return keras.Sequential(
        [
            keras.Input((28, 28)),
            layers.Flatten(),
            layers.Dense(20, activation="relu"),
            layers.Dense(20, activation="relu"),
            layers.Dense(10, activation="softmax"),
        ]
    )


data = sys.argv[1] if len(sys.argv) > 1 else "mnist"
spark = SparkSession.builder.appName("keras_tutorial").getOrCreate()
spark.sparkContext.setLogLevel("ERROR")
read = getattr(spark_mnist.datasets, data)
test = read(spark, "test").cache()

result = spark_mnist.fit(
    read(spark, "train"),
    "keras_tutorial",
    network=network,
    optimizer="sgd",
    learning_rate=0.05,
    train_validation_ratio=0.7,
    batch_size=16,
    num_proc=2,
    epochs=15,
)
result.plot().savefig("keras_tutorial.png")
evaluation = spark_mnist.evaluate(test, "keras_tutorial", rate=1, batch_size=1000).first()
loss, accuracy = evaluation["losses"]["loss"], evaluation["metrics"]["accuracy"]
print(f"test loss: {loss:.4f}, accuracy: {accuracy:.4f}")

# The model was saved under its name. To take it out of Spark, export it and load it with Keras.
picture = test.first()
with tempfile.TemporaryDirectory() as folder:
    import keras

    path = spark_mnist.export("keras_tutorial", f"{folder}/tutorial.keras", format="keras")
    loaded = keras.saving.load_model(path)
pixels = np.frombuffer(picture["image"], np.uint8).reshape(1, 784) / np.float32(255)
read_by_keras = int(np.argmax(loaded(pixels)))
one = spark.createDataFrame([picture])
read_by_spark = spark_mnist.predict(one, "keras_tutorial", interpret=True).first()["interpreted"]
print(f"the picture is a {picture['label']}: Spark reads {read_by_spark}, Keras {read_by_keras}")
