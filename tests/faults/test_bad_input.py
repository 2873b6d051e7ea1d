"""Input that cannot be used: refused before a rank starts."""

import json
import re
from pathlib import Path

import keras
import pytest
from pyspark.ml.linalg import Vectors, VectorUDT
from pyspark.sql import functions as F
from pyspark.sql import types as T

import spark_mnist
from spark_mnist import errors
from spark_mnist.launch import launcher
from spark_mnist.store import model_store

pytestmark = pytest.mark.usefixtures("on_spark")

DOUBLES, FLOATS = T.ArrayType(T.DoubleType()), T.ArrayType(T.FloatType())
INTEGERS, BYTES, TEXT = T.ArrayType(T.IntegerType()), T.BinaryType(), T.StringType()
VECTOR, INT, DOUBLE = VectorUDT(), T.IntegerType(), T.DoubleType()
GOOD = [0.0] * 784


def with_pixel(value, at=5):
    return [*GOOD[:at], value, *GOOD[at + 1 :]]


NAN, INFINITE = float("nan"), float("inf")
PICTURES = {
    "a null array": (DOUBLES, None, "image is null"),
    "null bytes": (BYTES, None, "image is null"),
    "null text": (TEXT, None, "image is null"),
    "a null Vector": (VECTOR, None, "image is null"),
    "a null pixel": (DOUBLES, with_pixel(None), "a pixel that is no number"),
    "a null integer": (INTEGERS, [None] + [0] * 783, "a pixel that is no number"),
    "a pixel NaN": (DOUBLES, with_pixel(NAN), "a pixel that is no number"),
    "a float NaN": (FLOATS, with_pixel(NAN), "a pixel that is no number"),
    "a NaN in a Vector": (VECTOR, Vectors.dense(with_pixel(NAN)), "a pixel that is no number"),
    "text NaN": (TEXT, ",".join(map(str, with_pixel(NAN))), "a pixel that is no number"),
    "an infinite pixel": (DOUBLES, with_pixel(INFINITE), "a pixel that is infinite"),
    "minus infinity": (DOUBLES, with_pixel(-INFINITE), "a pixel that is infinite"),
    "infinity in a Vector": (VECTOR, Vectors.dense(with_pixel(INFINITE)), "that is infinite"),
    "783 pixels": (DOUBLES, GOOD[1:], "image has 783 pixels, not 784"),
    "785 pixels": (DOUBLES, [*GOOD, 0.0], "image has 785 pixels, not 784"),
    "783 bytes": (BYTES, b"\0" * 783, "image has 783 pixels, not 784"),
    "785 bytes": (BYTES, b"\0" * 785, "image has 785 pixels, not 784"),
    "no pixel": (DOUBLES, [], "image has 0 pixels, not 784"),
    "no bytes": (BYTES, b"", "image has 0 pixels, not 784"),
    "a short Vector": (VECTOR, Vectors.dense([0.5]), "image has 1 pixels, not 784"),
    "a long sparse Vector": (VECTOR, Vectors.sparse(800, {3: 0.5}), "has 800 pixels, not 784"),
    "short text": (TEXT, "0,0,0.5", "image has 3 pixels, not 784"),
    "empty text": (TEXT, "", "image has 1 pixels, not 784"),
    "a word": (TEXT, ",".join(["0"] * 783 + ["x"]), "a pixel that is no number"),
    "text with a gap": (TEXT, ",".join(["0"] * 783 + [""]), "a pixel that is no number"),
    "hexadecimal text": (TEXT, ",".join(["0"] * 783 + ["0x1"]), "a pixel that is no number"),
    "255 among 0..1": (DOUBLES, with_pixel(255.0), "a pixel outside 0..1"),
    "a little over 1": (DOUBLES, with_pixel(1.0001), "a pixel outside 0..1"),
    "below 0": (DOUBLES, with_pixel(-0.1), "a pixel outside 0..1"),
    "0..255 as text": (TEXT, ",".join(["7"] * 784), "a pixel outside 0..1"),
    "0..255 in a Vector": (VECTOR, Vectors.dense([7.0] * 784), "a pixel outside 0..1"),
    "256": (INTEGERS, [256] + [0] * 783, "a pixel outside 0..255"),
    "-1": (INTEGERS, [-1] + [0] * 783, "a pixel outside 0..255"),
    "a long beyond all": (T.ArrayType(T.LongType()), [10**12] + [0] * 783, "outside 0..255"),
}
NO_CLASS = "label is neither 0..9 nor one-hot of length 10"
LABELS = {
    "null": (INT, None, "label is null"),
    "null text": (TEXT, None, "label is null"),
    "null one-hot": (INTEGERS, None, "label is null"),
    "10": (INT, 10, NO_CLASS),
    "-1": (INT, -1, NO_CLASS),
    "a long": (T.LongType(), 10**15, NO_CLASS),
    "3.5": (DOUBLE, 3.5, NO_CLASS),
    "NaN": (DOUBLE, NAN, NO_CLASS),
    "infinity": (DOUBLE, INFINITE, NO_CLASS),
    "seven": (TEXT, "seven", NO_CLASS),
    "text 3.5": (TEXT, "3.5", NO_CLASS),
    "text 10": (TEXT, "10", NO_CLASS),
    "empty text": (TEXT, "", NO_CLASS),
    "two ones": (INTEGERS, [1, 1] + [0] * 8, NO_CLASS),
    "no one": (INTEGERS, [0] * 10, NO_CLASS),
    "a two": (INTEGERS, [2] + [0] * 9, NO_CLASS),
    "nine numbers": (INTEGERS, [1] + [0] * 8, NO_CLASS),
    "eleven numbers": (INTEGERS, [1] + [0] * 10, NO_CLASS),
    "a null in one-hot": (INTEGERS, [1, None] + [0] * 8, NO_CLASS),
    "halves": (DOUBLES, [0.5, 0.5] + [0.0] * 8, NO_CLASS),
    "two ones as text": (TEXT, "1,1,0,0,0,0,0,0,0,0", NO_CLASS),
    "no one as text": (TEXT, "0,0,0,0,0,0,0,0,0,0", NO_CLASS),
    "two ones in a Vector": (VECTOR, Vectors.dense([1.0, 1.0] + [0.0] * 8), NO_CLASS),
}


@pytest.fixture(autouse=True)
def no_rank_starts(monkeypatch):
    monkeypatch.setattr(launcher, "train", lambda *_, **__: pytest.fail("ranks were started"))


def blank(kind):
    if kind == BYTES:
        return b"\0" * 784
    if kind == TEXT:
        return ",".join(["0"] * 784)
    return Vectors.dense(GOOD) if kind == VECTOR else [0] * 784 if kind == INTEGERS else GOOD


def rows(spark, pictures, labels, kind=BYTES, label_kind=INT):
    schema = T.StructType().add("image", kind).add("label", label_kind)
    if isinstance(kind, T.ArrayType) and isinstance(kind.elementType, T.LongType):
        pictures = [[int(pixel) for pixel in picture] for picture in pictures]
    return spark.createDataFrame(list(zip(pictures, labels, strict=True)), schema)


def refused(df, message, error=errors.BadRows, **options):
    with pytest.raises(error, match=message) as caught:
        spark_mnist.fit(df, "m", **{"num_proc": 2, "verbose": 0, **options})
    store = options["store"]
    assert not Path(store).exists() or not list(Path(store).glob("*"))
    return str(caught.value)


@pytest.mark.slow  # test_feature_columns has most of them, without what goes round
@pytest.mark.parametrize("case", PICTURES)
def test_a_picture_that_is_none(spark, store, case):
    kind, value, message = PICTURES[case]
    df = rows(spark, [value, blank(kind), blank(kind)], [3, 4, 5], kind)
    said = refused(df, f"1 of 3 rows cannot be used: 1 x .*{re.escape(message)}", store=store)
    assert "for instance {'image': " in said
    assert "mode=DROPMALFORMED" in said


@pytest.mark.slow
@pytest.mark.parametrize("case", LABELS)
def test_a_label_that_is_none(spark, store, case):
    kind, value, message = LABELS[case]
    one_hot = [0.0, 1.0] + [0.0] * 8
    if kind == VECTOR:
        good = Vectors.dense(one_hot)
    elif isinstance(kind, T.ArrayType):
        good = one_hot if kind == DOUBLES else [int(number) for number in one_hot]
    else:
        good = {DOUBLE: 4.0, TEXT: "4"}.get(kind, 4)
    df = rows(spark, [blank(BYTES)] * 3, [value, good, good], label_kind=kind)
    refused(df, re.escape(f"1 of 3 rows cannot be used: 1 x {message}"), store=store)


@pytest.mark.ranks
def test_pixels_of_both_ranges(spark, store):
    df = rows(spark, [[1.0] * 784, [255.0] * 784, [0.5] * 784], [1, 2, 3], DOUBLES)
    said = refused(df, "1 of 3 rows cannot be used: 1 x image has a pixel outside", store=store)
    assert "Pixels in 0..255 belong in bytes or integers" in said


def test_ragged_arrays_and_more_are_counted_by_reason(spark, store):
    pictures = [GOOD[:size] for size in (1, 2, 2, 784)]
    said = refused(rows(spark, pictures, [0, 1, 2, 11], DOUBLES), "4 of 4 rows", store=store)
    assert "2 x image has 2 pixels, not 784; 1 x image has 1 pixels, not 784; 1 x label" in said
    assert said.count("{'image': ") == 3  # of four bad rows, three are shown


def few(spark, count):
    return rows(spark, [blank(BYTES)] * count, [number % 10 for number in range(count)])


def table(spark, *columns):
    return spark.range(200).selectExpr("id AS x", *columns)


OTHERS = {
    "no rows": (lambda s: few(s, 0), {}, errors.TooFewRows, "the DataFrame has no rows"),
    "only bad rows left out": (
        lambda s: rows(s, [b""], [1]),
        {"mode": "DROPMALFORMED"},
        errors.BadRows,
        "none of 1 rows can be used: 1 x image has 0 pixels",
    ),
    "fewer rows than ranks": (lambda s: few(s, 1), {}, errors.TooFewRows, "fewer than the 2 ranks"),
    "a ratio that leaves none": (
        lambda s: few(s, 20),
        {"train_validation_ratio": 0.01},
        errors.TooFewRows,
        "leave 0 to train",
    ),
    "no image": (
        lambda s: few(s, 9).drop("image"),
        {},
        errors.MissingColumn,
        "no column 'image' among",
    ),
    "no label": (
        lambda s: few(s, 9).withColumnRenamed("label", "lable"),
        {},
        errors.MissingColumn,
        "did you mean 'lable'",
    ),
    "an image that is a date": (
        lambda s: few(s, 9).withColumn("image", F.current_date()),
        {},
        errors.UnreadableColumn,
        "column 'image' is date; it may be binary, an array",
    ),
    "an image that is a map": (
        lambda s: few(s, 9).withColumn("image", F.create_map(F.lit("a"), F.lit(1))),
        {},
        errors.UnreadableColumn,
        "column 'image' is map<string,int>",
    ),
    "an array of text": (
        lambda s: few(s, 9).withColumn("image", F.array(F.lit("0"))),
        {},
        errors.UnreadableColumn,
        "column 'image' is array<string>",
    ),
    "a label that is a date": (
        lambda s: few(s, 9).withColumn("label", F.current_date()),
        {},
        errors.UnreadableColumn,
        "column 'label' is date; it may be an integer",
    ),
    "PNG files": (
        lambda s: rows(s, [b"\x89PNG\r\n\x1a\n" + bytes(300)] * 3, [1, 2, 3]),
        {},
        errors.BadRows,
        "3 of 3 rows cannot be used: 3 x image is a PNG file, not pixels",
    ),
    "JPEG files among pixels": (
        lambda s: rows(s, [b"\xff\xd8\xff\xe0" + bytes(780), bytes(784)], [1, 2]),
        {},
        errors.BadRows,
        "1 of 2 rows cannot be used: 1 x image is a JPEG file, not pixels",
    ),
    "a price as the label": (
        lambda s: table(s, "id * 1.5D AS y"),
        {"features": "x", "label": "y"},
        errors.BadRows,
        "column 'y' looks like a quantity to predict",
    ),
    "an age as the label": (
        lambda s: table(s, "20 + id % 70 AS y"),
        {"features": "x", "label": "y"},
        errors.BadRows,
        "column 'y' looks like a quantity to predict .70 whole numbers in 200 rows",
    ),
    "a price as text": (
        lambda s: table(s, "string(id * 1.5D) AS y"),
        {"features": "x", "label": "y"},
        errors.BadRows,
        "column 'y' looks like a quantity to predict",
    ),
    "two columns of one name": (
        lambda s: table(s, "id % 2 AS y", "x"),
        {"features": "x", "label": "y"},
        errors.UnreadableColumn,
        "the DataFrame has 2 columns called 'x'",
    ),
    "a pattern that matches nothing": (
        lambda s: table(s, "id % 2 AS y"),
        {"features": "pixel*", "label": "y"},
        errors.MissingColumn,
        r"no column matches 'pixel\*' among \['x', 'y'\]",
    ),
    "a header that is none": (
        lambda s: s.createDataFrame([(1, 2, 3)], ["5", "0", "0_1"]),
        {},
        errors.MissingColumn,
        "these look like values: without a header, read it with header=false",
    ),
    "a JSON array": (
        lambda s: s.createDataFrame([("[",)], ["_corrupt_record"]),
        {},
        errors.MissingColumn,
        "has not one object a line: read it with multiLine=true",
    ),
    "a stream": (
        lambda s: s.readStream.format("rate").load(),
        {},
        errors.NotADataFrame,
        "is a stream, which has no end",
    ),
    "a DataFrame of pandas": (
        lambda s: few(s, 9).toPandas(),
        {},
        errors.NotADataFrame,
        r"not pandas\..*: use spark\.createDataFrame",
    ),
    "an RDD": (lambda s: few(s, 9).rdd, {}, errors.NotADataFrame, r"use \.toDF\(\)"),
    "a network of another library's name": (
        lambda s: few(s, 9),
        {"model": "mlp"},
        errors.UnknownOption,
        "did you mean 'network'",
    ),
    "more ranks than slots": (
        lambda s: few(s, 9),
        {"num_proc": 3},
        errors.TooFewSlots,
        "3 ranks must run at the same time, and Spark has 2 slots",
    ),
    "no encryption": (
        lambda s: few(s, 9),
        {"secure": True},
        errors.ClusterError,
        "secure=true needs spark.authenticate=true and spark.network.crypto.enabled=true",
    ),
    "nothing to continue": (
        lambda s: few(s, 9),
        {"continuous": True},
        errors.ModelNotFound,
        "no model 'm' in",
    ),
    "a model file": (
        lambda s: few(s, 9),
        {"network": "model.keras"},
        errors.OptionError,
        "network must be mlp, .*in Python also a Keras model or a function",
    ),
    "epochs=0": (lambda s: few(s, 9), {"epochs": 0}, errors.OptionError, "epochs must be int >= 1"),
    "epochs=5.0": (lambda s: few(s, 9), {"epochs": 5.0}, errors.OptionError, "epochs must be int"),
    "batch_size=-1": (
        lambda s: few(s, 9),
        {"batch_size": -1},
        errors.OptionError,
        "batch_size must be int >= 1, not -1",
    ),
    "batch_size=x": (
        lambda s: few(s, 9),
        {"batch_size": "x"},
        errors.OptionError,
        "batch_size must be int >= 1, not 'x'",
    ),
    "a ratio of 1.2": (
        lambda s: few(s, 9),
        {"train_validation_ratio": 1.2},
        errors.OptionError,
        r"must be float in \[0, 1\], not 1.2",
    ),
    "a ratio that is NaN": (
        lambda s: few(s, 9),
        {"train_validation_ratio": NAN},
        errors.OptionError,
        r"must be float in \[0, 1\], not nan",
    ),
    "an infinite learning rate": (
        lambda s: few(s, 9),
        {"learning_rate": INFINITE},
        errors.OptionError,
        "learning_rate must be float > 0, not inf",
    ),
    "a mode of its own": (
        lambda s: few(s, 9),
        {"mode": "PERMISSIVE"},
        errors.OptionError,
        "mode must be FAILFAST or DROPMALFORMED, not 'PERMISSIVE'",
    ),
    "max_restarts=-1": (
        lambda s: few(s, 9),
        {"max_restarts": -1},
        errors.OptionError,
        "max_restarts must be int >= 0",
    ),
    "heartbeat_timeout=0": (
        lambda s: few(s, 9),
        {"heartbeat_timeout": 0},
        errors.OptionError,
        "heartbeat_timeout must be float > 0",
    ),
    "an option that is none": (
        lambda s: few(s, 9),
        {"epoch": 3},
        errors.UnknownOption,
        "no option 'epoch'.*did you mean 'epochs'",
    ),
    "a table without features": (
        lambda s: few(s, 9),
        {"network": "dnn"},
        errors.OptionError,
        "features",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_input_that_cannot_work(spark, store, case):
    make, options, error, message = OTHERS[case]
    refused(make(spark), message, error, store=store, **options)


@pytest.mark.parametrize(
    "name",
    ["../m", "/etc/m", "m/../../x", "%2e%2e", "m\0", "\u217f", "m\u2024", ".", "", "a" * 65, "CON:", "m\n"],
)  # fmt: skip
def test_a_name_that_could_lead_elsewhere(spark, store, name):
    with pytest.raises(errors.ModelNameError, match="is not a valid model name"):
        spark_mnist.fit(few(spark, 9), name, store=store, num_proc=1)


CONTINUED = {
    "another network": ({"network": "softmax"}, "network=mlp, .*with network=softmax"),
    "another optimizer": ({"optimizer": "sgd"}, "optimizer=adam, .*with optimizer=sgd"),
    "other units": ({"hidden": "64"}, "hidden=128,32, .*with hidden=64"),
    "another dropout": ({"dropout": 0.25}, "dropout=0.0, .*with dropout=0.25"),
    "another column": ({"features": "pixels"}, "features=image, .*with features=pixels"),
    "another label": ({"label": "digit"}, "label=label, .*with label=digit"),
    "standardised": ({"standardize": True}, "standardize=False, .*with standardize=True"),
}


@pytest.mark.parametrize("case", CONTINUED)
def test_continuing_as_something_else(digits, root, case):
    change, message = CONTINUED[case]
    with pytest.raises(errors.ModelMismatch, match=message):
        spark_mnist.fit(digits, "m", store=root, continuous=True, num_proc=2, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": "substring(image, 1, 783)"}, "trained on rows of 784 numbers.*783 pixels"),
        ({"label": "label + 10"}, "with the classes 0, 1, .*neither 0..9"),
    ],
    ids=["another width", "other classes"],
)
def test_continuing_on_something_else(digits, root, change, message):
    with pytest.raises(errors.ModelMismatch, match=message):
        spark_mnist.fit(
            digits.withColumns({name: F.expr(text) for name, text in change.items()}),
            "m",
            store=root,
            continuous=True,
            num_proc=2,
            verbose=0,
        )


def test_one_class_and_a_batch_beyond_the_data_are_warnings(spark, store, monkeypatch, caplog):
    monkeypatch.setattr(launcher, "train", lambda *_, **__: 1 / 0)
    df = rows(spark, [blank(BYTES)] * 9, [3] * 9)
    with pytest.raises(ZeroDivisionError):
        spark_mnist.fit(df, "m", store=store, num_proc=2, batch_size=1000)
    assert "all rows have the label 3" in caplog.text
    assert "batch_size=1000 is more than the 3 training rows of a rank" in caplog.text


MARKER = "code of the model file ran"


def lambda_model():
    """A model whose layer writes a file when it is called: it must never be."""
    layers = [keras.Input((784,)), keras.layers.Lambda(lambda x: print(MARKER) or x)]
    return keras.Sequential([*layers, keras.layers.Dense(10)])


@pytest.mark.parametrize("kind", ["keras", "h5"])
def test_a_model_file_runs_nothing(digits, store, tmp_path, capfd, kind):
    path = tmp_path / f"evil.{kind}"
    lambda_model().save(path)
    capfd.readouterr()
    refused(digits, "network must be mlp", errors.OptionError, store=store, network=str(path))
    assert MARKER not in capfd.readouterr().out


@pytest.mark.parametrize("kind", ["keras", "h5"])
def test_a_model_file_in_place_of_weights_runs_nothing(digits, root, store, tmp_path, capfd, kind):
    import hashlib
    import shutil

    shutil.copytree(Path(root) / "m" / "v000001", Path(store) / "m" / "v000001")
    version = Path(store) / "m" / "v000001"
    lambda_model().save(tmp_path / f"evil.{kind}")
    content = (tmp_path / f"evil.{kind}").read_bytes()
    (version / "weights.npz").write_bytes(content)
    manifest = json.loads((version / "manifest.json").read_text())
    stamp = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    manifest["files"]["weights.npz"] = stamp
    manifest["sha256"] = model_store.digest(manifest)
    (version / "manifest.json").write_text(json.dumps(manifest))
    capfd.readouterr()
    with pytest.raises(Exception, match="a file of arrays cannot be read"):
        spark_mnist.predict(digits.limit(2), "m", store=store).collect()
    assert MARKER not in capfd.readouterr().out
