"""The public names and signatures, against public.txt: users notice each change there.

`python -m tests.test_public` writes it again.
"""

import inspect
import types
from pathlib import Path

import spark_mnist
from spark_mnist import options
from spark_mnist.cli import app

KEPT = Path(__file__).with_name("public.txt")


def described(name, value):
    """A public name as lines: a function's signature, a class's members, a module's names."""
    if isinstance(value, types.ModuleType):
        for inner, found in sorted(vars(value).items()):
            if getattr(found, "__module__", None) == value.__name__ and not inner.startswith("_"):
                yield from described(f"{name}.{inner}", found)
    elif inspect.isclass(value) and issubclass(value, Exception):
        yield f"{name} ({', '.join(base.__name__ for base in value.__bases__)})"
    elif inspect.isclass(value):
        yield f"{name}: {', '.join(n for n in sorted(members(value)) if not n.startswith('_'))}"
    elif callable(value):
        yield f"{name}{inspect.signature(value)}"
    else:
        yield f"{name} = {value!r}"


def members(kind):
    return {*dir(kind), *getattr(kind, "__dataclass_fields__", {})}


def public():
    from spark_mnist.ml import classifier, regressor

    for name in spark_mnist.__all__:
        if name != "__version__":
            yield from described(name, getattr(spark_mnist, name))
    for kind in (
        *(classifier.MnistClassifier, classifier.MnistClassifierModel),
        *(regressor.MnistRegressor, regressor.MnistRegressorModel),
    ):
        yield f"ml.{kind.__name__}: {', '.join(sorted(param.name for param in kind().params))}"
    for operation in options.OPERATIONS:
        yield f"mymnist {operation}"
    for action in app._parser()._actions:
        yield f"mymnist {', '.join(action.option_strings) or action.dest} {action.choices or ''}".strip()


def test_nothing_changes_unnoticed(spark):
    kept = KEPT.read_text().splitlines()
    found = [line for text in public() for line in text.splitlines()]
    assert found == kept, "a change that users meet: say so in CHANGELOG.md, and write public.txt"


if __name__ == "__main__":
    from pyspark.sql import SparkSession

    SparkSession.builder.master("local[1]").getOrCreate()
    KEPT.write_text("\n".join(public()) + "\n")
