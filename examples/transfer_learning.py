"""Transfer learning: a base trained on many pictures, frozen under a new head for few pictures.

    python examples/transfer_learning.py

The pictures are made here: shapes in any colour, size and place. The base learns six shapes from
1,800 pictures. The second task has four other shapes, and six pictures of each. A network without
the base learns from the same 24: its accuracy stands beside that of the frozen base.
"""

import tempfile

import numpy as np
from pyspark.sql import DataFrame, SparkSession

import spark_mnist

SIZE = 32
FIRST = ["circle", "square", "triangle", "cross", "stripes", "bars"]
SECOND = ["ring", "frame", "diamond", "plus"]


def draw(shape: str, random: np.random.Generator) -> bytes:
    """Return a picture's bytes, row by row: a shape of one colour on a dark, noisy ground."""
    radius = random.uniform(6, 11)
    center = random.uniform(radius, SIZE - radius, 2)
    y, x = np.moveaxis(np.mgrid[:SIZE, :SIZE].transpose(1, 2, 0) - center, 2, 0) / radius
    triangle = abs(x) < (y + 1) / 2
    x, y = abs(x), abs(y)
    square, circle = np.maximum(x, y) < 1, np.hypot(x, y) < 1
    mask = {
        "circle": circle,
        "square": square,
        "triangle": square & triangle,
        "cross": square & (abs(x - y) < 0.3),
        "stripes": square & (y * 5 % 2 < 1),
        "bars": square & (x * 5 % 2 < 1),
        "ring": circle & (np.hypot(x, y) > 0.6),
        "frame": square & (np.maximum(x, y) > 0.6),
        "diamond": x + y < 1,
        "plus": square & (np.minimum(x, y) < 0.3),
    }[shape]
    picture = random.uniform(0, 60, (SIZE, SIZE, 3))
    picture[mask] += random.uniform(80, 190, 3)
    return picture.astype(np.uint8).tobytes()


def make_pictures(spark: SparkSession, shapes: list[str], count: int, seed: int) -> DataFrame:
    """Make pictures of shapes, the same number of each."""
    random = np.random.default_rng(seed)
    rows = [(draw(shape, random), shape) for shape in shapes * (count // len(shapes))]
    return spark.createDataFrame(rows, "image binary, shape string")


def base():
    """Make the layers that both tasks share."""
    import keras
    from keras import layers

    return keras.Sequential(
        [
            keras.Input((SIZE, SIZE, 3)),
            layers.Conv2D(16, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(32, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(64, 3, activation="relu"),
            layers.GlobalAveragePooling2D(),
        ],
        name="base",
    )


def first_network():
    """Make a new base with a head for the first task; runs on each rank."""
    import keras

    return keras.Sequential([base(), keras.layers.Dense(len(FIRST))], name="model")


def second_network():
    """Make the same for the second task, to compare with."""
    import keras

    return keras.Sequential([base(), keras.layers.Dense(len(SECOND))], name="model")


def trained_base(model_name: str):
    """Return the base of a saved model, as Keras has it."""
    import keras

    with tempfile.TemporaryDirectory() as folder:
        path = spark_mnist.export(model_name, f"{folder}/model.keras")
        model = keras.saving.load_model(path)
    return model.get_layer("model").get_layer("base")


def accuracy(rows: DataFrame, model_name: str) -> float:
    """Return the accuracy of a saved model on all rows."""
    evaluation = spark_mnist.evaluate(rows, model_name, rate=1, batch_size=500).first()
    return evaluation["metrics"]["accuracy"]


spark = SparkSession.builder.appName("transfer_learning").getOrCreate()
spark.sparkContext.setLogLevel("ERROR")
many = make_pictures(spark, FIRST, 1800, seed=1).cache()
few = make_pictures(spark, SECOND, 24, seed=2).cache()
test = make_pictures(spark, SECOND, 400, seed=3).cache()

options = {"features": "image", "label": "shape", "num_proc": 2, "learning_rate": 0.002}
result = spark_mnist.fit(many, "first", network=first_network, epochs=8, **options)
print(f"accuracy on the first task: {result.records[-1].metrics['val_accuracy']:.4f}")

weights = trained_base("first").get_weights()  # arrays, which travel to the ranks with the function


def frozen_network():
    """Make a new head on the trained base, whose weights stay as they are."""
    import keras

    frozen = base()
    frozen.set_weights(weights)
    frozen.trainable = False
    return keras.Sequential([frozen, keras.layers.Dense(len(SECOND))], name="model")


options |= {"train_validation_ratio": 1.0, "batch_size": 8, "epochs": 40}
spark_mnist.fit(few, "transferred", network=frozen_network, **options)
spark_mnist.fit(few, "without_base", network=second_network, **options)
print(f"test accuracy with the frozen base: {accuracy(test, 'transferred'):.4f}")
print(f"test accuracy without the base: {accuracy(test, 'without_base'):.4f}")

after = trained_base("transferred").get_weights()
same = all(np.array_equal(a, b) for a, b in zip(weights, after, strict=True))
print(f"weights of the base are as before: {same}")
