from importlib import metadata

import pytest

from spark_mnist import errors
from spark_mnist.core import requirements


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

    monkeypatch.setattr(requirements.metadata, "version", version)
    requirements.check.cache_clear()
    yield changed
    requirements.check.cache_clear()


def test_the_locked_set_is_right(installed):
    requirements.check()


def test_extras_may_be_missing(installed):
    installed.update({"tensorflow-cpu": None, "scikit-learn": None})
    requirements.check()


PYSPARK = metadata.version("pyspark")


@pytest.mark.parametrize(
    ("name", "version", "message"),
    [
        ("pyarrow", "13.0.0", r"pyarrow 13.0.0 is installed, \S*>=14.0.1\S* works"),
        ("tensorflow-cpu", "2.22.0", r"tensorflow-cpu 2.22.0 is installed, \S*<2.22\S* works"),
        ("horovod", None, "horovod is missing"),
        ("pyspark", "4.4.0", "pyspark 4.4.0 is installed"),
    ],
)
def test_what_does_not_fit_is_named_with_what_does(installed, name, version, message):
    installed[name] = version
    with pytest.raises(ImportError, match=message) as caught:
        requirements.check()
    assert isinstance(caught.value, errors.VersionError)


def test_what_pyspark_itself_asks_for_is_known(installed, monkeypatch):
    real = metadata.requires
    asked = ["pyarrow>=18.0.0; extra == 'sql'", "grpcio>=99; extra == 'connect'"]
    monkeypatch.setattr(
        requirements.metadata, "requires", lambda name: asked if name == "pyspark" else real(name)
    )
    installed["pyarrow"] = "18.0.0"
    requirements.check()
    requirements.check.cache_clear()
    installed["pyarrow"] = "17.0.0"
    message = (
        f"pyspark {PYSPARK} needs pyarrow>=18.0.0 and 17.0.0 is installed: change one of the two"
    )
    with pytest.raises(errors.VersionError, match=message):
        requirements.check()


def test_a_horovod_without_tensorflow_is_named(installed, monkeypatch):
    monkeypatch.setattr(requirements, "built_for", lambda: None)
    with pytest.raises(errors.VersionError, match="horovod was built without TensorFlow"):
        requirements.check()


def test_a_horovod_for_another_tensorflow_is_named(installed, monkeypatch):
    there = requirements.tensorflow_version()
    assert requirements.built_for() == there
    monkeypatch.setattr(requirements, "built_for", lambda: "2.15.1")
    message = f"horovod was built for TensorFlow 2.15.1 and {there} is installed"
    with pytest.raises(errors.VersionError, match=message):
        requirements.check()
    assert [*requirements.horovod_faults("2.18.0", "2.18.1")] == []
    assert requirements.horovod_target('{\n"dummy": "none"\n}') is None
