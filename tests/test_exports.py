"""Exported models, read by plain Keras and TensorFlow, against the scores in the DataFrame."""

import importlib.util
import uuid
import warnings
from pathlib import Path

import fsspec
import keras
import numpy as np
import onnx
import pytest
import tensorflow as tf
from fsspec.implementations.memory import MemoryFileSystem
from onnx.reference import ReferenceEvaluator
from pyspark.sql import functions as F

import spark_mnist
from spark_mnist import datasets, errors
from spark_mnist.core import requirements
from spark_mnist.scoring import score_columns
from spark_mnist.store import manifests, model_store
from tests.conftest import COLUMNS, FLOWERS, custom_model


@pytest.fixture
def flowers(spark, store):
    """A standardised table's model, its rows, and its scores as executors compute them."""
    iris = datasets.iris(spark)
    spark_mnist.fit(iris, "m", **{**FLOWERS, "epochs": 3}, store=store)
    saved = manifests.load(model_store.Store(store), "m", None, None)
    scores = score_columns.probabilities(iris, saved, batch_size=32)
    rows = np.array(iris.select(*datasets.MEASURES).collect(), "float32")
    return rows, np.array([row[0] for row in iris.select(F.array(scores)[0]).collect()])


def by_keras(path, rows):
    return keras.saving.load_model(path)(rows)


def by_tensorflow(path, rows):
    loaded = tf.saved_model.load(path)
    return loaded.serve(rows)


def by_lite(path, rows):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TensorFlow recommends another package for this
        interpreter = tf.lite.Interpreter(path)
    (taken,), (given,) = interpreter.get_input_details(), interpreter.get_output_details()
    interpreter.resize_tensor_input(taken["index"], rows.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(taken["index"], rows)
    interpreter.invoke()
    return interpreter.get_tensor(given["index"])


def by_onnx(path, rows):
    (outputs,) = ReferenceEvaluator(path).run(None, {"features": rows})
    return outputs


@pytest.mark.parametrize(
    ("format", "name", "read"),
    [
        ("keras", "m.keras", by_keras),
        ("savedmodel", "folder/m", by_tensorflow),
        ("tflite", "m.tflite", by_lite),
        ("onnx", "m.onnx", by_onnx),
    ],
)
def test_others_read_what_was_exported(flowers, store, tmp_path, format, name, read):
    rows, scores = flowers
    path = str(tmp_path / "out" / name)
    assert spark_mnist.export("m", path, format, store=store) == path
    np.testing.assert_allclose(np.asarray(read(path, rows)), scores, atol=1e-5)
    assert list((tmp_path / "out").rglob("*.tmp")) == []
    with pytest.raises(errors.OptionError, match="exists already"):
        spark_mnist.export("m", path, format, store=store)


@pytest.mark.parametrize(
    ("format", "name", "writes"), [("keras", "m.keras", 0), ("savedmodel", "m", 2)]
)
def test_half_an_export_cannot_be_read(flowers, store, monkeypatch, format, name, writes):
    """A file system without renames of folders fails before the last file is there."""
    put_file, paths = MemoryFileSystem.put_file, []

    def put(fs, source, target, **options):
        paths.append(target)
        if len(paths) > writes:
            fs.pipe_file(target, Path(source).read_bytes()[:10])
            raise OSError("the disk is full")
        put_file(fs, source, target, **options)

    monkeypatch.setattr(MemoryFileSystem, "put_file", put)
    root = f"memory://exports/{uuid.uuid4().hex}"
    with pytest.raises(OSError, match="the disk is full"):
        spark_mnist.export("m", f"{root}/{name}", format, store=store)
    assert len(paths) == writes + 1
    written = fsspec.filesystem("memory").find(root)
    assert not [path for path in written if path.endswith((".keras", "saved_model.pb"))]
    monkeypatch.undo()
    url = spark_mnist.export("m", f"{root}/again/{name}", format, store=store)
    assert fsspec.filesystem("memory").find(url)


def test_pictures_of_a_model_with_objects_of_its_own(digits, store, tmp_path):
    spark_mnist.fit(digits, "m", network=custom_model, epochs=1, store=store, verbose=0)
    path = str(tmp_path / "m.tflite")
    with pytest.raises(errors.ModelMismatch, match="give the function"):
        spark_mnist.export("m", path, "tflite", store=store)
    spark_mnist.export("m", path, "tflite", store=store, network=custom_model)
    sums = by_lite(path, np.random.default_rng(0).random((4, 784), "float32")).sum(axis=1)
    np.testing.assert_allclose(sums, 1, atol=1e-5)


@pytest.mark.parametrize(
    ("path", "format", "message"),
    [
        ("m.pt", "torch", "must be keras or savedmodel or tflite or onnx, not 'torch'"),
        ("m", "kera", "did you mean 'keras'"),
        ("m.h5", "keras", r"a file \*.keras, not from .*m.h5"),
    ],
)
def test_formats_that_are_none(tmp_path, path, format, message):
    with pytest.raises(errors.OptionError, match=message):
        spark_mnist.export("m", tmp_path / path, format)


def test_features_far_from_zero_are_exported_as_doubles(spark, store, tmp_path):
    far = datasets.iris(spark).selectExpr("petal_length + 1.7e9 AS x", "species")
    options = {"features": "x", "label": "species", "epochs": 5, "store": store, "verbose": 0}
    spark_mnist.fit(far, "far", **options)
    with pytest.raises(errors.OptionError, match="format=tflite has floats"):
        spark_mnist.export("far", tmp_path / "far.tflite", "tflite", store=store)
    path = spark_mnist.export("far", tmp_path / "far.keras", store=store)
    rows = far.collect()
    outputs = np.asarray(keras.saving.load_model(path)(np.array([[row["x"]] for row in rows])))
    names = ["setosa", "versicolor", "virginica"]
    answers = spark_mnist.predict(far, "far", interpret=True, store=store).collect()
    assert [names[i] for i in outputs.argmax(axis=1)] == [row["interpreted"] for row in answers]
    path = spark_mnist.export("far", tmp_path / "far.onnx", "onnx", store=store)
    doubles = by_onnx(path, np.array([[row["x"]] for row in rows]))
    np.testing.assert_allclose(doubles, outputs, atol=1e-6)


def test_numbers_are_exported_in_the_units_of_the_label(spark, store, tmp_path):
    iris = datasets.iris(spark).withColumn("grams", 100 + 20 * F.col("petal_width"))
    options = {**FLOWERS, "label": "grams", "task": "regression", "epochs": 2, "store": store}
    spark_mnist.fit(iris, "m", **options)
    path = spark_mnist.export("m", tmp_path / "m.keras", store=store)
    rows = np.array(iris.select(*datasets.MEASURES).collect(), "float32")
    predicted = spark_mnist.predict(iris, "m", store=store).select("prediction").collect()
    np.testing.assert_allclose(by_keras(path, rows)[:, 0], np.array(predicted)[:, 0], rtol=1e-5)


def exported(store, tmp_path):
    """The saved model as Keras reads it, and as ONNX's own evaluator does."""
    kept = keras.saving.load_model(spark_mnist.export("m", tmp_path / "m.keras", store=store))
    path = spark_mnist.export("m", tmp_path / "m.onnx", "onnx", store=store)
    for tensor in [*onnx.load(path).graph.input, *onnx.load(path).graph.output]:
        assert tensor.type.tensor_type.shape.dim[0].dim_value == 0, "the batch is not free"
    return kept, ReferenceEvaluator(path)


def test_onnx_of_pictures(digits, store, tmp_path):
    spark_mnist.fit(digits, "m", network="mlp", epochs=1, store=store, verbose=0)
    kept, written = exported(store, tmp_path)
    rows = np.random.default_rng(0).random((5, 784), "float32")
    assert (written.input_names, written.output_names) == (["features"], kept.output_names)
    for batch in (rows, rows[:1]):
        (outputs,) = written.run(None, {"features": batch})
        np.testing.assert_allclose(outputs, kept(batch), atol=1e-6)


def test_onnx_of_numbers_is_in_the_units_of_the_label(spark, store, tmp_path):
    iris = datasets.iris(spark).withColumn("grams", F.col("petal_length") * 100 + 5000)
    options = {**FLOWERS, "label": "grams", "task": "regression", "standardize_label": True}
    spark_mnist.fit(iris, "m", **{**options, "epochs": 3}, store=store)
    kept, written = exported(store, tmp_path)
    rows = np.array(iris.select(*COLUMNS).collect(), "float32")
    (outputs,) = written.run(None, {"features": rows})
    np.testing.assert_allclose(outputs, kept(rows), rtol=1e-6)
    assert 5000 < outputs.mean() < 6000


def test_onnx_of_several_inputs_and_outputs_keeps_their_names(spark, store, tmp_path):
    iris = datasets.iris(spark).selectExpr("*", "cast(petal_width * 3 AS int) AS ward")
    sizes, ward = keras.Input((2,), name="sizes"), keras.Input((1,), dtype="int64", name="ward")
    scale = keras.layers.Normalization()  # holds arrays beside its weights
    scale.adapt(np.array(iris.select(*COLUMNS[:2]).collect()))
    place = keras.layers.Flatten()(keras.layers.Embedding(9, 2)(ward))
    joined = keras.layers.Concatenate()([scale(sizes), place])
    kind = keras.layers.Dense(3, activation="softmax", name="kind")(joined)
    length = keras.layers.Dense(1, name="length")(joined)
    spark_mnist.fit(
        iris,
        "m",
        network=keras.Model([ward, sizes], [length, kind]),
        features={"sizes": COLUMNS[:2], "ward": "ward"},
        label={"length": "petal_length", "kind": "species"},
        task={"length": "regression"},
        epochs=1,
        store=store,
        verbose=0,
    )
    kept, written = exported(store, tmp_path)
    random = np.random.default_rng(0)
    rows = {
        "sizes": random.random((5, 2), "float32"),
        "ward": random.integers(0, 9, (5, 1)).astype(kept.input["ward"].dtype),
    }
    assert sorted(written.input_names) == ["sizes", "ward"]
    assert sorted(written.output_names) == ["kind", "length"]
    found = dict(zip(written.output_names, written.run(None, rows), strict=True))
    for name, outputs in kept(rows).items():
        np.testing.assert_allclose(found[name], outputs, atol=1e-6, err_msg=name)


def test_onnx_refuses_what_it_cannot_hold(spark, store, tmp_path):
    rows = spark.range(60).selectExpr("id * 1.0D AS size", "id % 2 AS label")
    bins = keras.layers.Discretization(num_bins=4)
    bins.adapt(np.arange(60.0))
    size = keras.Input((1,), name="size")
    place = keras.layers.Flatten()(keras.layers.Embedding(5, 2)(bins(size)))
    network = keras.Model({"size": size}, {"label": keras.layers.Dense(2)(place)})
    options = {"network": network, "epochs": 1, "store": store, "verbose": 0}
    names = {"features": {"size": "size"}, "label": {"label": "label"}}
    spark_mnist.fit(rows, "bins", **options, **names)
    with pytest.raises(errors.OptionError, match=r"ONNX cannot hold the model .*Bucketize"):
        spark_mnist.export("bins", tmp_path / "m.onnx", "onnx", store=store)
    network = keras.Model({"size": size}, {"size": keras.layers.Dense(2)(size)})
    options, names = {**options, "network": network}, {**names, "label": {"size": "label"}}
    spark_mnist.fit(rows, "same", **options, **names)
    with pytest.raises(errors.OptionError, match="size is the name of an input and of an output"):
        spark_mnist.export("same", tmp_path / "m.onnx", "onnx", store=store)
    assert not (tmp_path / "m.onnx").exists()


@pytest.mark.parametrize("name", ["tf2onnx", "onnx"])
def test_without_onnx_the_extra_is_named_before_any_work(tmp_path, monkeypatch, name):
    version, find_spec = requirements.metadata.version, importlib.util.find_spec

    def version_without(package):
        if package == name:
            raise requirements.metadata.PackageNotFoundError(name)
        return version(package)

    monkeypatch.setattr(requirements.metadata, "version", version_without)
    message = rf"format=onnx needs .*{name} is missing .*; install spark-mnist\[onnx\]"
    with pytest.raises(errors.VersionError, match=message):
        spark_mnist.export("m", tmp_path / "m.onnx", "onnx")
    monkeypatch.setattr(requirements, "check_extra", lambda extra: None)  # shipped as plain files
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *rest: None if n == name else find_spec(n, *rest)
    )
    message = rf"format=onnx needs {name}, which is missing; install spark-mnist\[onnx\]"
    with pytest.raises(errors.VersionError, match=message):
        spark_mnist.export("m", tmp_path / "m.onnx", "onnx")
