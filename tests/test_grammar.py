import contextlib
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spark_mnist import errors
from spark_mnist.options import grammar


@pytest.mark.parametrize(
    ("text", "operation", "name", "options"),
    [
        ("mymnist fit test_model batch_size=128 epochs=5", "fit", "test_model", {"batch_size": 128, "epochs": 5}),
        ("mymnist predict test_model batch_size=128 interpret=true", "predict", "test_model", {"batch_size": 128, "interpret": True}),
        ("mymnist eval test_model repeat=2 batch_size=128 rate=0.8", "eval", "test_model", {"repeat": 2, "batch_size": 128, "rate": 0.8}),
        ("fit m", "fit", "m", {}),
        ("fit m epochs = 5", "fit", "m", {"epochs": 5}),
        ("fit m epochs= 5 batch_size =7", "fit", "m", {"epochs": 5, "batch_size": 7}),
        ("fit\tm\n  epochs=5", "fit", "m", {"epochs": 5}),
        ("fit 'my model' store=\"a b=c|d\"", "fit", "my model", {"store": "a b=c|d"}),
        ("'fit' \"m\" 'epochs'='5'", "fit", "m", {"epochs": 5}),
        ("fit it's", "fit", "it's", {}),
        ("fit a^b", "fit", "a^b", {}),
        ("fit mymnist", "fit", "mymnist", {}),
        ("fit m continuous=False", "fit", "m", {"continuous": False}),
        ("predict m interpret=TRUE", "predict", "m", {"interpret": True}),
        ("fit m train_validation_ratio=1", "fit", "m", {"train_validation_ratio": 1.0}),
        ("fit m learning_rate=1e-3", "fit", "m", {"learning_rate": 0.001}),
        ("eval m rate=.5", "eval", "m", {"rate": 0.5}),
        ("fit m network=softmax num_proc=2 seed=0", "fit", "m", {"network": "softmax", "num_proc": 2, "seed": 0}),
    ],
)  # fmt: skip
def test_understood(text, operation, name, options):
    assert grammar.parse(text) == grammar.Command(operation, name, options)


@pytest.mark.parametrize(
    ("text", "message", "column"),
    [
        ("", "operation is missing", 0),
        ("mymnist", "operation is missing", 7),
        ("epochs=5", "operation is missing", 0),
        ("fit", "model name is missing", 3),
        ("fit epochs=5", "model name is missing", 4),
        ("fit epochs=3 m", "come before the options", 4),
        ("epochs=5 fit m", "come before the options", 0),
        ("fit m epochs=1_000", "epochs must be int >= 1", 13),
        ("fit m seed=4294967296", "int in 0..4294967295", 11),
        ("fit ''", "model name is missing", 6),
        ("fot m", "did you mean 'fit'", 0),
        ("fit m epoch=3", "did you mean 'epochs'", 6),
        ("fit m zzz=3", "unknown option 'zzz'", 6),
        ("fit m epochs=5 epochs=6", "given twice", 15),
        ("fit m epochs=", "one value after", 12),
        ("fit m epochs=''", "empty value", 13),
        ("fit m a=b=c", "one value after", 9),
        ("fit m 'x", "quote never ends", 6),
        ("fit m store=\"x", "quote never ends", 12),
        ("fit m 'x'y", "follows a closing quote", 6),
        ("fit m epochs=5 oops", "'oops' is no option", 15),
        ("fit m|x", "cannot stand in a bare word", 5),
        ("fit m epochs=5|6", "cannot stand in a bare word", 14),
        ("fit m epochs=5.0", "epochs must be int >= 1", 13),
        ("fit m epochs=0", "epochs must be int >= 1", 13),
        ("fit m epochs=1e3", "epochs must be int >= 1", 13),
        ("fit m batch_size=-1", "batch_size must be int >= 1", 17),
        ("fit m train_validation_ratio=1.2", "float in [0, 1]", 29),
        ("fit m train_validation_ratio=nan", "float in [0, 1]", 29),
        ("eval m rate=-0.1", "float in [0, 1]", 12),
        ("predict m interpret=yes", "true or false", 20),
        ("predict m interpret=1", "true or false", 20),
        ("fit m network=resnet", "mlp, softmax, small, cnn, dnn", 14),
        ("fit m learning_rate=inf", "float > 0", 20),
        ("models m", "'m' is no option", 7),
        ("describe", "the model name is missing", 8),
        ("fit m features=a,,b", "column names like a,b,c", 15),
    ],
)  # fmt: skip
def test_refused_with_a_caret_under_the_column(text, message, column):
    with pytest.raises(errors.CommandError) as caught:
        grammar.parse(text)
    head, line, caret = str(caught.value).split("\n")
    assert message in head
    assert line == f"  {text}"
    assert caret == f"  {' ' * column}^"


@pytest.mark.parametrize(
    ("text", "command"),
    [
        ("models", ("models", "", {})),
        ("mymnist models store=x", ("models", "", {"store": "x"})),
        ("describe m version=2", ("describe", "m", {"version": 2})),
        ("delete models", ("delete", "models", {})),
    ],
)
def test_operations_on_saved_models(text, command):
    assert grammar.parse(text) == grammar.parse_words(text.split()) == grammar.Command(*command)


def test_the_caret_stands_under_its_own_line():
    with pytest.raises(errors.CommandError) as caught:
        grammar.parse("fit m\n epoch=3")
    assert str(caught.value).split("\n")[1:] == ["   epoch=3", "   ^"]


def test_an_option_of_another_operation_is_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        assert grammar.parse("fit m rate=0.5 epochs=2").options == {"epochs": 2}
    assert "fit does not use rate" in caplog.text


def test_words_of_a_shell_are_taken_as_they_are():
    words = ["fit", "m", "store=a b=c", "epochs=5"]
    assert grammar.parse_words(words).options == {"store": "a b=c", "epochs": 5}
    assert grammar.parse_words(["fit", "it's | a = b"[:6]]).model_name == "it's |"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "operation is missing"),
        (["fit"], "model name is missing"),
        (["fit", "epochs=5"], "model name is missing"),
        (["fit", "m", "epochs="], "empty value"),
        (["fit", "m", "epochs"], "is no option"),
        (["fit", "m", "=5"], "is no option"),
        (["fit", "my model", "epoch=5"], "unknown option 'epoch'"),
    ],
)
def test_words_refused(words, message):
    with pytest.raises(errors.CommandError, match=message):
        grammar.parse_words(words)


words = st.text(
    st.characters(blacklist_characters="|='\"", blacklist_categories=("Z", "C")), min_size=1
)
quoted = st.text(st.characters(blacklist_characters="'", blacklist_categories=("Cs",)), min_size=1)


@given(
    name=words.filter(lambda w: not w.isspace()),
    epochs=st.integers(1, 10**6),
    blanks=st.sampled_from(["", " ", "\t "]),
)
def test_round_trip_of_bare_words(name, epochs, blanks):
    parsed = grammar.parse(f"fit {name} epochs{blanks}={blanks}{epochs}")
    assert parsed == grammar.Command("fit", name, {"epochs": epochs})


@given(name=quoted, path=quoted)
def test_round_trip_of_quoted_strings(name, path):
    assert grammar.parse(f"fit '{name}' store='{path}'") == grammar.Command(
        "fit", name, {"store": path}
    )


@given(st.text(max_size=60))
def test_any_text_is_a_command_or_a_command_error(text):
    with contextlib.suppress(errors.CommandError):
        assert grammar.parse(text).operation in ("fit", "predict", "eval")
