from importlib import metadata

import pytest

from spark_mnist import errors, versions


@pytest.fixture
def installed(monkeypatch):
    """The versions that the check is told; what is None is not installed."""
    changed = {}
    real = metadata.version

    def version(name):
        found = changed.get(name, real)
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return real(name) if found is real else found

    monkeypatch.setattr(versions.metadata, "version", version)
    versions.check.cache_clear()
    yield changed
    versions.check.cache_clear()


def test_the_locked_set_is_right(installed):
    versions.check()


def test_extras_may_be_missing(installed):
    installed.update({"tensorflow-cpu": None, "scikit-learn": None})
    versions.check()


@pytest.mark.parametrize(
    ("name", "version", "message"),
    [
        ("pyarrow", "15.0.0", r"pyarrow 15.0.0 is installed, (<15,>=14.0.1|>=14.0.1,<15) works"),
        ("tensorflow-cpu", "2.19.1", "tensorflow-cpu 2.19.1 is installed"),
        ("horovod", None, "horovod is missing"),
    ],
)
def test_what_does_not_fit_is_named_with_what_does(installed, name, version, message):
    installed[name] = version
    with pytest.raises(ImportError, match=message) as caught:
        versions.check()
    assert isinstance(caught.value, errors.VersionError)


def test_a_horovod_without_tensorflow_is_named(installed, monkeypatch):
    monkeypatch.setattr(versions.metadata, "files", lambda _: ["horovod/runner/launch.py"])
    with pytest.raises(errors.VersionError, match="horovod was built without TensorFlow"):
        versions.check()
