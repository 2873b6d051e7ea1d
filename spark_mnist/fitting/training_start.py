"""Start of a training run: a saved version, or only the options. Runs on: driver."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import cloudpickle

from spark_mnist import errors, options
from spark_mnist.core import plan
from spark_mnist.data import column_names
from spark_mnist.networks import objectives, registry
from spark_mnist.options import value_types
from spark_mnist.store import manifests, model_store

OUTPUT_NAME = re.compile(r"[\w.-]+", re.ASCII)
"""Names of outputs that Keras, TensorFlow and columns of results can all have."""


@dataclass(frozen=True, kw_only=True)
class TrainingStart:
    """State from which training starts, and the saved version that it comes from."""

    network: plan.Network
    optimizer: plan.Optimizer
    seed: int
    input_spec: plan.InputSpec | None
    """Specification of the input; None for a table whose rows were not profiled yet."""
    standardize: bool
    standardize_label: bool = False
    version: int | None = None
    """Number of the saved version; None when training starts from scratch."""
    epochs: int = 0
    """Epochs of the model's training so far."""
    files: Mapping[str, bytes | model_store.StoredFile] = field(default_factory=dict)
    """Checkpoint of the saved version, or the weights of the user's model."""
    user_model: Any = None
    """The user's Keras model, or the user's function that makes it."""
    losses: Mapping[str, Any] = field(default_factory=dict)
    """The user's own losses, or functions that make them, by name of the output."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """Further metrics, by name of the output."""
    loss_weights: Mapping[str, float] = field(default_factory=dict)
    """Weights of losses that the options give, by name of the output."""
    optimizer_fn: plan.ModelFn | None = None
    """The user's function that makes the optimizer."""

    @property
    def model_fn(self) -> plan.ModelFn | None:
        """Return the user's function; None for a Keras model or a network of the library."""
        return (
            None
            if self.user_model is None or manifests.is_model(self.user_model)
            else self.user_model
        )

    def for_rows(
        self, input_spec: plan.InputSpec, outputs: Sequence[plan.Output] = ()
    ) -> TrainingStart:
        """Return the same start, with a network that fits the rows.

        Args:
            input_spec: The columns of the rows.
            outputs: Outputs with the sizes and names that the rows have; without them one output
                learns the classes of ``input_spec``.

        Raises:
            errors.ModelMismatch: The user's model does not fit the rows, or is not the saved one.
        """
        if not self.version:
            outputs = tuple(outputs) or (input_spec.output,)
            network = dataclasses.replace(
                self.network,
                inputs=input_spec.width,
                classes=sum(output.size for output in outputs),
                outputs=outputs,
                parts=tuple((each.name, each.width) for each in input_spec.inputs),
            )
            start = dataclasses.replace(self, input_spec=input_spec, network=network)
        else:
            start = self
        if manifests.is_model(self.user_model):
            return start._with_user_model()
        if importlib.util.find_spec("tensorflow") is None:
            return start  # the driver may be without it; ranks tell what does not fit
        if self.model_fn and not self.version and (start._has_named_parts() or start._is_table()):
            from spark_mnist.networks import custom

            try:
                user_model = _call_network(self.model_fn)
            except errors.ModelMismatch:
                if start._has_named_parts():
                    raise
                return start  # the function may need what only a rank has; else a rank tells
            custom.describe(user_model, start.network)
            losses, metrics = objectives.compiled(user_model, start.network.heads)
            start._check_objectives({**losses, **self.losses}, self.metrics or metrics)
            return start._with_loss_weights(user_model)._with_whole_inputs(user_model)
        start._check_objectives(self.losses, self.metrics)
        return start

    def _has_named_parts(self) -> bool:
        """Return whether names or tasks, and not sizes alone, must fit the user's model."""
        outputs = self.network.outputs
        is_plain = len(outputs) == 1 and outputs[0].task == plan.CLASSIFICATION
        return bool(self.network.parts or outputs[0].name or not is_plain)

    def _is_table(self) -> bool:
        """Return whether rows may have what the user's model cannot take, say other categories."""
        assert self.input_spec is not None
        return not self.input_spec.pixels

    def _check_objectives(self, losses: Mapping[str, Any], metrics: Mapping[str, Any]) -> None:
        """Try the losses and metrics that are not this library's.

        Raises:
            errors.OptionError: One does not fit its output, or two have one name.
        """
        names = {}
        for output in self.network.heads:
            loss, output_metrics = losses.get(output.name), metrics.get(output.name)
            if loss is not None and loss not in objectives.LOSSES[output.task]:
                objectives.check_loss(output, loss)
            if any(not isinstance(each, str) for each in value_types.metrics(output_metrics)):
                # Copies as ranks get them: a metric keeps what it has seen.
                copies = cloudpickle.loads(cloudpickle.dumps(output_metrics))
                names[output.name] = objectives.check_metrics(output, copies)
        objectives.check_result_names(self.network.heads, names)

    def _with_loss_weights(self, user_model: Any) -> TrainingStart:
        """Return the same start with the loss weights that the user's model was compiled with."""
        compiled = objectives.compiled_weights(user_model, self.network.heads)
        weights = {**compiled, **self.loss_weights}
        outputs = tuple(
            dataclasses.replace(output, weight=weights.get(output.name, output.weight))
            for output in self.network.outputs
        )
        return dataclasses.replace(self, network=dataclasses.replace(self.network, outputs=outputs))

    def _with_whole_inputs(self, user_model: Any) -> TrainingStart:
        """Return the same start, whose rows must have whole numbers where the model takes these."""
        from spark_mnist.networks import custom

        assert self.input_spec is not None
        sizes = custom.whole_inputs(user_model)
        inputs = tuple(
            dataclasses.replace(each, whole=True, categories=sizes[each.name])
            if each.name in sizes
            else each
            for each in self.input_spec.inputs
        )
        is_whole = "" in sizes and not self.input_spec.pixels
        input_spec = dataclasses.replace(
            self.input_spec,
            inputs=inputs,
            whole=is_whole,
            categories=sizes[""] if is_whole else 0,
        )
        return dataclasses.replace(self, input_spec=input_spec)

    def _with_user_model(self) -> TrainingStart:
        from spark_mnist.networks import array_files, custom

        network = custom.describe(self.user_model, self.network)
        if network.custom:
            raise errors.ModelMismatch(
                f"the model has objects that are not Keras's own ({', '.join(network.custom)}); "
                "give network= the function that makes it in place of the model"
            )
        if self.version:
            custom.check_same(self.network, network)
            return self
        weights = array_files.pack_weights(registry.build(network, self.user_model))
        losses, metrics = objectives.compiled(self.user_model, network.heads)
        losses = {
            output.name: losses[output.name]
            for output in network.heads
            if output.name in losses and not output.loss
        }
        start = dataclasses.replace(
            self,
            network=network,
            files={plan.WEIGHTS: weights},
            losses={**losses, **self.losses},
            metrics=self.metrics or metrics,
        )
        start._check_objectives(start.losses, start.metrics)
        return start._with_loss_weights(self.user_model)._with_whole_inputs(self.user_model)


def _call_network(model_fn: plan.ModelFn) -> Any:
    """Make the model of the user's function.

    Raises:
        errors.ModelMismatch: The function raises an error.
    """
    try:
        return model_fn()
    except Exception as error:  # of any type: the function is the user's
        raise errors.ModelMismatch(
            f"the function network= raised {type(error).__name__}: {error}"
        ) from error


def load(store: model_store.Store, name: str, fit_options: options.FitOptions) -> TrainingStart:
    """Return the state from which a fit starts.

    Raises:
        errors.OptionError: Options contradict each other.
        errors.ModelNotFound: There is no model to continue.
        errors.ModelMismatch: The saved model was trained with other options, say another network.
        errors.DamagedModel: The files of the saved model differ from those that were written.
    """
    start = (
        _from_saved_version(store, name, fit_options)
        if fit_options.continuous
        else _from_options(fit_options)
    )
    last_epoch = start.epochs + fit_options.epochs
    try:
        rate = start.optimizer.rate(last_epoch - 1, 1)
    except OverflowError:
        rate = math.inf
    if rate == 0 or math.isinf(rate):
        raise errors.OptionError(
            f"with lr_schedule={start.optimizer.schedule} nothing more is learned in epoch "
            f"{last_epoch}, whose learning rate is {rate}: name another schedule, say constant, or "
            "fewer epochs"
        )
    return start


def _from_options(fit_options: options.FitOptions) -> TrainingStart:
    """Return the start of a new model, which has only the options."""
    network = _describe_network(fit_options)
    optimizer_name = fit_options.optimizer or next(iter(registry.OPTIMIZERS))
    if isinstance(optimizer_name, str):
        learning_rate = registry.OPTIMIZERS[optimizer_name].learning_rate
    else:
        learning_rate = registry.optimizer_learning_rate(optimizer_name)
        optimizer_name = plan.CUSTOM
        if fit_options.clipnorm or fit_options.accumulate_steps:
            raise errors.OptionError(
                "clipnorm and accumulate_steps are for optimizers by name: give them to the Keras "
                "optimizer that optimizer= makes (clipnorm=, gradient_accumulation_steps=)"
            )
    is_table = registry.is_table(network.name)
    standardize = is_table if fit_options.standardize is None else fit_options.standardize
    if standardize and isinstance(fit_options.features, Mapping):
        raise errors.OptionError(
            "standardize is for one input: put a Normalization layer, adapted, into the network"
        )
    return TrainingStart(
        network=network,
        optimizer=plan.Optimizer(
            name=optimizer_name,
            learning_rate=fit_options.learning_rate or learning_rate,
            warmup_epochs=fit_options.warmup_epochs or 0,
            schedule=str(fit_options.lr_schedule or "constant"),
            clipnorm=fit_options.clipnorm,
            accumulate_steps=fit_options.accumulate_steps or 1,
        ),
        seed=fit_options.seed or 0,
        input_spec=_picture_input_spec(network.name, fit_options),
        standardize=standardize,
        standardize_label=_standardizes_label(fit_options, network),
        user_model=None if isinstance(fit_options.network, str) else fit_options.network,
        **_functions(fit_options, network.outputs),
    )


def _functions(fit_options: options.FitOptions, outputs: Sequence[plan.Output]) -> dict[str, Any]:
    """Return what the options give for outputs, and the optimizer, as fields of a start."""
    metrics = _by_output("metrics", fit_options.metrics, outputs)
    for output in outputs:
        for metric in value_types.metrics(metrics.get(output.name)):
            if isinstance(metric, str):
                objectives.check_metric(output.task, metric)
    return {
        "losses": custom_losses(fit_options.loss, outputs),
        "loss_weights": _by_output("loss_weights", fit_options.loss_weights, outputs),
        "metrics": metrics,
        "optimizer_fn": None if isinstance(fit_options.optimizer, str) else fit_options.optimizer,
    }


def custom_losses(option: Any, outputs: Sequence[plan.Output]) -> dict[str, Any]:
    """Return the losses of the option ``loss`` that are no names, by name of the output.

    Raises:
        errors.OptionError: The option names an output that there is not.
    """
    by_name = {output.name: output for output in outputs}
    return {
        name: objectives.sendable(by_name[name], loss)
        for name, loss in _by_output("loss", option, outputs).items()
        if not isinstance(loss, str)
    }


def check_loss_names(name: str, option: Any, outputs: Sequence[plan.Output]) -> None:
    """Refuse the name of a loss that is not the saved model's.

    Raises:
        errors.OptionError: There is no such loss for the task, or no such output.
        errors.ModelMismatch: The saved model was trained with another loss.
    """
    losses = _by_output("loss", option, outputs)
    for output in outputs:
        loss, saved = losses.get(output.name), output.loss or objectives.LOSSES[output.task][0]
        if isinstance(loss, str) and objectives.loss_name(output.task, loss) != saved:
            raise manifests.mismatch(name, "loss", saved, loss)


def _check_loss_weights(name: str, option: Any, outputs: Sequence[plan.Output]) -> None:
    """Refuse weights of losses that are not the saved model's.

    Raises:
        errors.OptionError: There is no such output.
        errors.ModelMismatch: The saved model was trained with another weight.
    """
    weights = _by_output("loss_weights", option, outputs)
    for output in outputs:
        weight = float(weights.get(output.name, output.weight))
        if weight != output.weight:
            texts = (f"{output.name}: {number:g}" for number in (output.weight, weight))
            raise manifests.mismatch(name, "loss_weights", *texts)


def _by_output(option: str, value: Any, outputs: Sequence[plan.Output]) -> dict[str, Any]:
    """Return the value of an option for each output that has one.

    Raises:
        errors.OptionError: The option names an output that ``label`` does not name.
    """
    if value is None:
        return {}
    names = [output.name for output in outputs]
    if not isinstance(value, Mapping):
        return dict.fromkeys(names, value)
    unknown = [name for name in value if name not in names]
    if unknown:
        hint = (
            f"label= names the outputs {', '.join(names)}"
            if names != [""]
            else "a dictionary is for several outputs, which label= names: label={'output': "
            "'column', ...}"
        )
        raise errors.OptionError(f"{option}= names an output {unknown[0]!r}: {hint}")
    return dict(value)


def _outputs(fit_options: options.FitOptions) -> tuple[plan.Output, ...]:
    """Return the outputs that the options ask for; rows tell their sizes and names.

    Raises:
        errors.OptionError: A loss does not fit its task.
    """
    label = fit_options.label or plan.InputSpec.label
    columns = label if isinstance(label, Mapping) else {"": label}
    for name in columns:
        if name and not OUTPUT_NAME.fullmatch(name):
            raise errors.OptionError(
                f"label= names an output {name!r}; a name has letters from a to z, digits, and any "
                "of _ . -"
            )
    named = [plan.Output(name=name, label=column, size=0) for name, column in columns.items()]
    tasks = _by_output("task", fit_options.task, named)
    losses = _by_output("loss", fit_options.loss, named)
    weights = _by_output("loss_weights", fit_options.loss_weights, named)
    outputs = []
    for output in named:
        task = tasks.get(output.name, plan.CLASSIFICATION)
        loss = losses.get(output.name, "")
        outputs.append(
            dataclasses.replace(
                output,
                task=task,
                loss=objectives.loss_name(task, loss)
                if isinstance(loss, str) and loss
                else plan.CUSTOM
                if loss
                else "",
                weight=float(weights.get(output.name, 1.0)),
            )
        )
    return tuple(outputs)


def _standardizes_label(fit_options: options.FitOptions, network: plan.Network) -> bool:
    """Return whether numbers are learned in units of their deviation over the training rows.

    Raises:
        errors.OptionError: There are no numbers to learn, or the loss compares them with 0.
    """
    numbers = [output for output in network.outputs if output.task == plan.REGRESSION]
    absolute = [output.loss for output in numbers if output.loss in objectives.UNSCALED_LOSSES]
    if not fit_options.standardize_label:
        is_default = fit_options.standardize_label is None
        return is_default and registry.is_table(network.name) and not absolute and bool(numbers)
    if not numbers:
        raise errors.OptionError(f"standardize_label is for task={plan.REGRESSION}")
    if absolute:
        raise errors.OptionError(
            f"loss={absolute[0]} compares with 0, which standardize_label=true moves: leave one out"
        )
    return True


def _from_saved_version(
    store: model_store.Store, name: str, fit_options: options.FitOptions
) -> TrainingStart:
    """Return a start from the newest version of a saved model."""
    version = store.resolve_version(name)
    manifest = store.manifest(name, version)
    input_spec, network, optimizer = manifests.parse(manifest)
    _check_unchanged(name, network, optimizer, input_spec, fit_options)
    manifests.check_makeable(name, network, fit_options.network)
    loss_scale = (plan.LOSS_SCALE,) if plan.LOSS_SCALE in manifest["files"] else ()
    files = store.references(name, version, (plan.WEIGHTS, plan.OPTIMIZER, *loss_scale))
    optimizer_options: dict[str, Any] = {
        "learning_rate": fit_options.learning_rate,
        "warmup_epochs": fit_options.warmup_epochs,
        "schedule": fit_options.lr_schedule,
        "clipnorm": fit_options.clipnorm,
    }
    overrides = {name: value for name, value in optimizer_options.items() if value is not None}
    return TrainingStart(
        network=network,
        optimizer=dataclasses.replace(optimizer, **overrides),
        seed=manifest["seed"] if fit_options.seed is None else fit_options.seed,
        input_spec=input_spec,
        standardize=bool(network.mean),
        standardize_label=any(output.mean for output in network.outputs),
        version=version,
        epochs=manifest["epochs"],
        files=files,
        user_model=None if isinstance(fit_options.network, str) else fit_options.network,
        **_functions(fit_options, network.outputs),
    )


def _describe_network(fit_options: options.FitOptions) -> plan.Network:
    """Return the network that the options describe.

    Its ``inputs`` and ``classes`` are 0, since only the rows tell them; see ``for_rows``.
    """
    name = fit_options.network or (registry.TABLE if fit_options.features else registry.PICTURES)
    outputs = _outputs(fit_options)
    if not isinstance(name, str):
        if fit_options.hidden or fit_options.dropout is not None:
            raise errors.OptionError("hidden and dropout do not apply to a network of your own")
        return plan.Network(name=plan.CUSTOM, inputs=0, classes=0, outputs=outputs)
    if isinstance(fit_options.features, Mapping):
        raise errors.OptionError(
            f"{name} has one input, and features= names several: give a network of your own that "
            f"has the inputs {', '.join(fit_options.features)}"
        )
    if any(output.loss in objectives.POSITIVE_LOSSES for output in outputs):
        raise errors.OptionError(
            f"loss=poisson needs outputs above 0, and {name} has others, too: give a network of "
            "your own that ends with softplus"
        )
    architecture = registry.REGISTRY[name]
    hidden = _parse_units(str(fit_options.hidden)) if fit_options.hidden else architecture.hidden
    dropout = architecture.dropout if fit_options.dropout is None else fit_options.dropout
    if not architecture.hidden and (hidden or dropout):
        raise errors.OptionError(f"{name} has no hidden layers: leave out hidden and dropout")
    return plan.Network(
        name=name, inputs=0, classes=0, hidden=hidden, dropout=dropout, outputs=outputs
    )


def _picture_input_spec(network: str, fit_options: options.FitOptions) -> plan.InputSpec | None:
    """Return the specification of the input of a network for pictures, or None for a table."""
    if isinstance(fit_options.features, Mapping):
        return None
    columns = value_types.columns(fit_options.features) or ("image",)
    is_table = registry.is_table(network)
    if is_table and not fit_options.features:
        raise errors.OptionError(f"{network} reads a table: name its columns, features=a,b,c")
    if is_table or (network == plan.CUSTOM and fit_options.features):
        return None
    if not any(column_names.WILDCARD in name for name in columns):
        check_pixels(network, columns)
    label = fit_options.label or plan.InputSpec.label
    return plan.InputSpec(
        features=columns, label=label if isinstance(label, str) else next(iter(label.values()))
    )


def check_pixels(network: str, columns: tuple[str, ...]) -> None:
    """Refuse columns that cannot hold a picture.

    Raises:
        errors.OptionError: There is neither one column nor one for each pixel.
    """
    if len(columns) not in (1, plan.InputSpec.width):
        raise errors.OptionError(
            f"{network} reads pictures of 784 pixels, from one column or from 784, not from "
            f"{len(columns)}; network={registry.TABLE} reads a table"
        )


def _parse_units(text: str) -> tuple[int, ...]:
    return tuple(int(units) for units in text.split(","))


def _check_unchanged(
    name: str,
    network: plan.Network,
    optimizer: plan.Optimizer,
    input_spec: plan.InputSpec,
    fit_options: options.FitOptions,
) -> None:
    outputs = network.outputs
    is_single = [output.name for output in outputs] == [""]

    def by_output(field: str) -> Any:
        values = {output.name: getattr(output, field) for output in outputs}
        return values[""] if is_single else values

    saved_values = {
        "network": network.name,
        "hidden": ",".join(map(str, network.hidden)),
        "dropout": network.dropout,
        "optimizer": optimizer.name,
        "accumulate_steps": optimizer.accumulate_steps,
        "features": _features_text(input_spec),
        "label": by_output("label"),
        "task": by_output("task"),
        "standardize": bool(network.mean),
        "standardize_label": any(output.mean for output in outputs),
    }
    features = fit_options.features
    columns = () if isinstance(features, Mapping) else value_types.columns(features)
    if isinstance(features, Mapping):
        saved_inputs = {each.name: each.features for each in input_spec.inputs}
        features = {
            name: _as_saved(value_types.columns(each), saved_inputs.get(name, ()))
            for name, each in features.items()
        }
    elif columns and not input_spec.inputs:
        columns = _as_saved(columns, input_spec.features)
    new_values = {option: getattr(fit_options, option) for option in saved_values} | {
        "network": fit_options.network if isinstance(fit_options.network, str) else None,
        "optimizer": plan.CUSTOM if callable(fit_options.optimizer) else fit_options.optimizer,
        "features": _inputs_text(features)
        if isinstance(features, Mapping)
        else ",".join(columns) or None,
    }
    for output in outputs:
        loss = _by_output("loss", fit_options.loss, outputs).get(output.name)
        if output.loss == plan.CUSTOM and loss is None and fit_options.network is None:
            raise errors.ModelMismatch(
                f"model {name!r} was trained with a loss of your own: give it again, loss=..."
            )
    check_loss_names(name, fit_options.loss, outputs)
    _check_loss_weights(name, fit_options.loss_weights, outputs)
    if optimizer.name == plan.CUSTOM and not callable(fit_options.optimizer):
        raise errors.ModelMismatch(
            f"model {name!r} was trained with an optimizer of your own: give it again, "
            "optimizer=..."
        )
    if fit_options.task and not is_single:
        tasks = _by_output("task", fit_options.task, outputs)
        new_values["task"] = {**saved_values["task"], **tasks}
    for option, value in saved_values.items():
        if new_values[option] not in (None, value):
            raise manifests.mismatch(name, option, value, new_values[option])


def _as_saved(columns: Sequence[str], saved_columns: Sequence[str]) -> tuple[str, ...]:
    """Return columns as the saved model names them, where they are the same but for case.

    Patterns are replaced by those of the saved columns that they match.
    """
    try:
        names = column_names.expand(saved_columns, columns)
    except errors.MissingColumn:
        return tuple(columns)
    is_same = [name.strip().lower() for name in names] == [
        name.strip().lower() for name in saved_columns
    ]
    return tuple(saved_columns) if is_same else names


def _features_text(input_spec: plan.InputSpec) -> str:
    """Return the columns of a saved model as text."""
    if not input_spec.inputs:
        return ",".join(input_spec.features)
    return _inputs_text({each.name: each.features for each in input_spec.inputs})


def _inputs_text(features: Mapping[str, Any]) -> str:
    """Return the columns of several inputs as text."""
    return "; ".join(
        f"{name}: {','.join(value_types.columns(columns))}"
        for name, columns in sorted(features.items())
    )
