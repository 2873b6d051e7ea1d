"""Command lines, names, manifests and shard layouts of every shape: never an uncaught traceback."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_mnist import errors, options
from spark_mnist.core import plan
from spark_mnist.core import sharding as worlds
from spark_mnist.data import row_counts
from spark_mnist.fitting import results
from spark_mnist.options import grammar
from spark_mnist.ranks import batches
from spark_mnist.store import manifests, model_store
from tests.conftest import CaseCounter, rank_success

counted = CaseCounter("fuzz cases")


def many(quick, full):
    """Run a property on so many cases: in the quick tests, and in all."""
    examples = full if CaseCounter.full else quick
    return settings(max_examples=examples, deadline=None, database=None)


def tried(expected, function, *args):
    """Return a function's result, or the message of the one type of error that it may raise."""
    counted.add()
    try:
        return function(*args), ""
    except expected as error:
        return None, str(error)


WORDS = st.sampled_from(
    ["mymnist", *options.OPERATIONS, "test_model", "=", "==", "'", '"', "|", "a b", "", "\0", "\n"]
)
NAMES = st.sampled_from([*options.FIELDS, "epoch", "Epochs", "", " ", "__class__"])
VALUES = st.one_of(
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(["true", "FALSE", "1e-3", "5|6", "'x'", "cosine:0", "128,32", "nan", "mlp"]),
    st.text(max_size=12),
)
PAIRS = st.builds("{}={}".format, NAMES, VALUES)
LINES = st.lists(st.one_of(WORDS, PAIRS, st.text(max_size=8)), max_size=7)


@many(150, 3000)
@given(LINES, st.sampled_from([" ", "  ", "\t", "\n", " = "]))
def test_the_text_of_a_command(words, blank):
    command, refused = tried(errors.CommandError, grammar.parse, blank.join(words))
    assert "^" in refused or command.operation in options.OPERATIONS
    assert refused or set(command.options) <= set(options.FIELDS)


@many(150, 3000)
@given(LINES)
def test_the_words_of_a_command(words):
    command, refused = tried(errors.CommandError, grammar.parse_words, words)
    assert "^" in refused or command.operation in options.OPERATIONS
    if not refused:
        options.build(options.OPERATIONS[command.operation], command.options)


NAME_PARTS = st.sampled_from(
    [
        "..",
        "/",
        "\\",
        "%2e",
        "%2f",
        "\0",
        "\n",
        "~",
        ".",
        "-",
        "\u2024",
        "\uff0e",
        "m",
        "A9",
        ":",
        "*",
    ]
)


@many(150, 2000)
@given(st.one_of(st.text(max_size=70), st.lists(NAME_PARTS, max_size=8).map("".join)))
def test_a_name_stays_in_the_store_or_is_refused(name):
    checked, refused = tried(errors.ModelNameError, model_store.validate_name, name)
    if refused:
        return
    assert checked.isascii()
    assert not set(checked) & set("/\\\0\n%:~*")
    assert checked not in (".", "..")


def example_manifest():
    """A manifest as ``fit`` writes it."""
    input_spec = plan.InputSpec()
    shards = plan.Shards(urls=("a", "b"), rows=8, encoding=plan.Encoding("uint8", 255.0, 784))
    training = plan.TrainingPlan(
        network=plan.Network(name="mlp", inputs=784, classes=10, hidden=(128, 32)),
        optimizer=plan.Optimizer(name="adam", learning_rate=0.001),
        sharding=worlds.RowSharding(size=2, rows=8, batch_size=4),
        train=shards,
        validation=dataclasses.replace(shards, urls=(), rows=0),
        first_epoch=0,
        epochs=1,
        seed=0,
        cache=1 << 30,
        work="memory://work",
    )
    record = plan.EpochRecord(epoch=1, losses={"loss": 1.0}, metrics={"accuracy": 0.5})
    progress = plan.Progress(
        epoch=1, history=(record,), rows_by_epoch=(((4, 0), (4, 0)),), best=plan.BestEpoch(epoch=1)
    )
    report = rank_success(progress)
    rows = row_counts.verify(training, progress, 8, {})
    return {
        "format": model_store.FORMAT,
        **manifests.compose(
            "m", 1, parent=None, input_spec=input_spec, training=training, report=report, rows=rows
        ),
        "files": {"weights.npz": {"sha256": "0" * 64, "bytes": 1}},
    }


EXAMPLE = json.loads(json.dumps(example_manifest()))
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


def paths(value, path=()):
    """Yield the path of each value of a manifest."""
    yield path
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from paths(item, (*path, key))


def mutated(path, value, how):
    """The example with one value replaced or removed."""
    found = json.loads(json.dumps(EXAMPLE))
    if not path:
        return value
    inner = found
    for key in path[:-1]:
        inner = inner[key]
    if how == "remove":
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    (root / "m" / "v000001").mkdir(parents=True)
    return model_store.Store(str(root)), root / "m" / "v000001" / "manifest.json"


@many(150, 2500)
@given(
    path=st.sampled_from(list(paths(EXAMPLE))), value=JSON, how=st.sampled_from(["set", "remove"])
)
def test_a_mutated_manifest_is_read_or_refused(models, path, value, how):
    store, file = models
    file.write_text(json.dumps(mutated(path, value, how)))

    def read():
        manifest = store.manifest("m", 1)
        input_spec, network, optimizer = manifests.parse(manifest)
        assert network.inputs == input_spec.width >= 1
        assert optimizer.rate(3, 2) >= 0
        return results.info(manifest)

    info, refused = tried(errors.DamagedModel, read)
    assert "cannot be" in refused or info.version == 1


@many(100, 500)
@given(st.binary(max_size=200), st.integers(0, 2000), st.integers(0, 255))
def test_a_torn_manifest_is_refused(models, junk, at, byte):
    store, file = models
    content = bytearray(json.dumps(EXAMPLE).encode())
    content[at % len(content)] = byte
    file.write_bytes(bytes(content[:at]) + junk)
    tried(errors.DamagedModel, lambda: manifests.parse(store.manifest("m", 1)))


@many(60, 1200)
@given(
    size=st.integers(1, 8),
    rows=st.integers(0, 50),
    files=st.integers(1, 12),
    batch=st.integers(1, 20),
    epoch=st.integers(0, 3),
)
def test_any_layout_of_shards_gives_equal_steps_and_every_row_once(size, rows, files, batch, epoch):
    counted.add()
    rows = max(rows, size)
    files = size * files
    division = worlds.RowSharding(size=size, rows=rows, batch_size=batch)
    files = min(files, rows)
    shards = plan.Shards(urls=(), rows=rows, encoding=plan.Encoding("float32", 1.0, 1))
    of_ranks = [
        sum(worlds.share(rows, file, files) for file in range(rank, files, size))
        for rank in range(size)
    ]
    assert sum(of_ranks) == rows
    assert row_counts.rows_by_rank(shards, shards, size) == tuple(
        zip(of_ranks, of_ranks, strict=True)
    )
    assert max(of_ranks) <= division.padded_rows
    seen, steps, weights = [], set(), 0.0
    start = 0
    for rank, count in enumerate(of_ranks):
        order = batches.order(count, division, rank=rank, seed=1, epoch=epoch)
        weight = batches.weights(count, division)
        assert len(order) == len(weight) == division.padded_rows
        seen += [start + number for number, one in zip(order, weight, strict=True) if one > 0]
        steps.add(-(-len(order) // batch))
        weights += float(weight.sum())
        start += count
    assert sorted(seen) == list(range(rows))
    assert steps == {division.steps}
    np.testing.assert_allclose(weights, size * division.padded_rows, rtol=1e-5)
