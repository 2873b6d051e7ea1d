import functools
import gzip
import http.server
import threading

import numpy as np
import pytest

from spark_mnist import datasets, errors


def idx(array):
    """The bytes of an IDX file."""
    shape = np.array(array.shape, ">i4").tobytes()
    return bytes([0, 0, 8, array.ndim]) + shape + array.astype(np.uint8).tobytes()


IMAGES = np.random.default_rng(0).integers(0, 256, (7, 28, 28))
LABELS = np.arange(7)


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(IMAGES))
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(LABELS)))
    return tmp_path


def assert_same(df, images=IMAGES, labels=LABELS):
    rows = df.collect()
    assert [row["label"] for row in rows] == labels.tolist()
    assert [bytes(row["image"]) for row in rows] == [i.astype(np.uint8).tobytes() for i in images]


def test_digits_are_split_once_for_all(spark):
    train, test = (datasets.digits(spark, split) for split in ("train", "test"))
    assert train.dtypes == [("image", "binary"), ("label", "int")]
    assert (train.count(), test.count()) == (1433, 364)
    counts = {row["label"]: row["count"] for row in test.groupBy("label").count().collect()}
    assert set(counts) == set(range(10))
    assert min(counts.values()) >= 35
    both = {bytes(row["image"]) for row in train.collect()} & {
        bytes(row["image"]) for row in test.collect()
    }
    assert both == set()


def test_digits_lie_in_mnists_frame(spark):
    pictures = np.stack(
        [np.frombuffer(row["image"], np.uint8) for row in datasets.digits(spark, "test").collect()]
    )
    pictures = pictures.reshape(-1, 28, 28)
    assert pictures.max() == 255
    frame = pictures.copy()
    frame[:, 4:24, 4:24] = 0
    assert frame.max() == 0


def test_idx_files_compressed_or_not(spark, directory):
    assert_same(datasets.mnist(spark, "train", directory))


def test_the_directory_may_come_from_the_environment(spark, directory, monkeypatch):
    monkeypatch.setenv("MNIST_DIR", str(directory))
    assert_same(datasets.mnist(spark, "train"))


def test_keras_archive(spark, tmp_path):
    np.savez(tmp_path / "mnist.npz", x_test=IMAGES.astype(np.uint8), y_test=LABELS.astype(np.uint8))
    assert_same(datasets.mnist(spark, "test", tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train-images-idx3-ubyte", idx(IMAGES)[:-1], "not an IDX file of bytes, or it is cut off"),
        ("train-images-idx3-ubyte", b"hello", "not an IDX file"),
        ("train-images-idx3-ubyte", b"", "not an IDX file"),
        ("train-images-idx3-ubyte", idx(IMAGES[:6]), "images of shape"),
        ("train-images-idx3-ubyte", idx(IMAGES[:, 1:]), "images of shape"),
        ("train-labels-idx1-ubyte.gz", b"not gzip", "cannot be read"),
        ("train-labels-idx1-ubyte.gz", gzip.compress(idx(LABELS))[:-9], "cannot be read"),
        ("train-labels-idx1-ubyte.gz", gzip.compress(idx(LABELS))[:10] + b"\xff" * 20, "cannot be"),
        ("train-images-idx3-ubyte", idx(IMAGES)[:6], "not an IDX file of bytes, or it is cut off"),
        ("mnist.npz", b"<html>not found</html>", "mnist.npz is not Keras' mnist.npz"),
    ],
)
def test_files_that_are_not_mnists(spark, directory, name, content, message):
    (directory / name).write_bytes(content)
    with pytest.raises(errors.DatasetError, match=message):
        datasets.mnist(spark, "train", directory)


def test_a_directory_without_the_files(spark, tmp_path):
    with pytest.raises(
        OSError, match=r"has neither t10k-images-idx3-ubyte.gz, unpacked or not, nor mnist.npz"
    ):
        datasets.mnist(spark, "test", tmp_path)


@pytest.mark.parametrize("dataset", [datasets.digits, datasets.mnist])
def test_an_unknown_split(spark, dataset):
    with pytest.raises(errors.DatasetError, match="no split 'dev'; there is train and test"):
        dataset(spark, "dev")


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A local server in place of the real one, and an empty cache."""
    served = tmp_path / "served"
    served.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(served))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("MNIST_MIRROR", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("MNIST_DIR", raising=False)
    yield served
    server.shutdown()
    server.server_close()


def test_download_is_checked_and_kept(spark, mirror, monkeypatch, capfd):
    import hashlib

    digests = dict(datasets.FILES)
    for name, array in (("t10k-images-idx3-ubyte", IMAGES), ("t10k-labels-idx1-ubyte", LABELS)):
        content = gzip.compress(idx(array))
        (mirror / f"{name}.gz").write_bytes(content)
        digests[name] = hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(datasets, "FILES", digests)
    assert_same(datasets.mnist(spark, "test"))
    assert "100%" in capfd.readouterr().err
    for path in mirror.iterdir():
        path.unlink()
    assert_same(datasets.mnist(spark, "test"))  # from the cache


def test_a_download_that_is_not_the_file_is_refused(spark, mirror):
    for name in datasets.FILES:
        (mirror / f"{name}.gz").write_bytes(gzip.compress(b"something else"))
    with pytest.raises(errors.DatasetError, match=r"could not be downloaded .*set MNIST_DIR"):
        datasets.mnist(spark, "train")


def test_a_mirror_that_is_not_there(spark, mirror):
    with pytest.raises(errors.DatasetError, match="could not be downloaded from http://127"):
        datasets.mnist(spark, "train")
