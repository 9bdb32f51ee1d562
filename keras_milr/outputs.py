"""The outputs of a model: which are read, with which labels, and by which losses."""

import contextlib
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_milr import _keras, backend, targets
from keras_milr.untouched import own_random_state


class Output(NamedTuple):
    """An output of a model.

    Attributes:
        name: As in the model's losses and labels.
        index: Its place among all outputs of the model, flattened.
        loss: Its loss, as `compile` was given it, or None.
        weight: Its loss weight.
        values: What the model puts out for one sample, or one batch of a fixed size.
    """

    name: str
    index: int
    loss: Any
    weight: float
    values: np.ndarray


def outputs_of(model, x) -> list[Output]:
    """All outputs of a model for inputs like `x`.

    Runs the model on one row, without a trace in its state; a model without weights
    yet is built before, or (a subclassed one) by it.

    Args:
        model: A `keras.Model`.
        x: Array, or structure of arrays, with the batch first.

    Raises:
        ValueError: for outputs that are no arrays of numbers for each sample, and for
            losses that do not fit them.
    """
    inputs = getattr(model, "inputs", None) or []
    if isinstance(x, (list, tuple)) and len(inputs) == 1 < len(x):
        raise ValueError(
            "Argument `probe_data` must hold arrays, (x, y) or (x, y, sample_weight), "
            f"or be an iterable of such batches, but no list. Received: {len(x)} "
            f"inputs for model {model.name!r}, which has one"
        )
    if not model.built:
        # By the call below it would be for inputs of so many rows.
        if isinstance(model, keras.Sequential) and hasattr(x, "shape"):
            model.build((None, *x.shape[1:]))
        else:
            backend.build(model, x)
    rows = fixed_batch_size(model, x) or 1
    structure = _called(model, x, rows)
    flat = keras.tree.flatten(structure)
    names = _names(model, structure, len(flat))
    losses, weights = _losses(model, names)
    shapes = [tuple(t.shape) for t in flat]
    # What nobody has a loss for may be anything.
    read = [s for s, one in zip(shapes, losses, strict=True) if one is not None]
    if not all(shape[:1] == (rows,) for shape in read or shapes):
        raise ValueError(
            "Measuring mutual information needs a model whose outputs have shape "
            f"(n, ..., units). Received: model {model.name!r} with output shape(s) "
            f"{shapes}"
        )
    values = [keras.ops.convert_to_numpy(keras.ops.cast(t, "float32")) for t in flat]
    fields = zip(names, range(len(flat)), losses, weights, values, strict=True)
    return [Output(*one) for one in fields]


def _losses(model, names):
    """The loss of each of these outputs, as `compile` was given it, and its weight."""
    loss = getattr(model, "loss", None)
    if len(names) == 1 and isinstance(loss, (list, tuple)) and len(loss) > 1:
        losses = [tuple(loss)]  # Several losses of one output: none that is known.
    elif isinstance(loss, (list, tuple, dict)):
        losses = by_output(loss, names, "loss")
    else:
        losses = [loss] * len(names)
    weights = _keras.loss_weights(model)
    listed = isinstance(weights, (list, tuple, dict))
    weights = by_output(weights, names, "loss_weights") if listed else [weights]
    weights = [1.0 if weight is None else float(weight) for weight in weights]
    return losses, weights * len(names) if len(weights) == 1 else weights


def fixed_batch_size(model, x) -> int | None:
    """The only number of rows that the model takes, if there is one.

    That its inputs name a number does not say so: those of a `Sequential` that was
    built by a call name that of the call, and it takes any.

    Args:
        model: A `keras.Model`.
        x: Array, or structure of arrays, with the batch first.
    """
    shapes = [tuple(t.shape) for t in keras.tree.flatten(getattr(model, "inputs", []))]
    named = {shape[0] for shape in shapes if shape and shape[0] is not None}
    if not named:
        return None
    size = named.pop()
    try:
        outputs = keras.tree.flatten(_called(model, x, size + 1))
    except Exception:  # Of any kind, by backend and layer.
        return size
    return None if all(t.shape[:1] == (size + 1,) for t in outputs) else size


def _called(model, x, rows):
    """The outputs for the first row, so many times, without a trace in the state."""
    first = np.zeros(rows, "int64")
    batch = keras.tree.map_structure(lambda a: keras.ops.convert_to_tensor(a[first]), x)
    # Weights that are only made now are drawn as `fit` would draw them.
    drawn = _keras.all_built(model)
    random_state = own_random_state(0) if drawn else contextlib.nullcontext()
    with random_state, backend.inference(model), keras.StatelessScope():
        return model(batch, training=False)


def signature(outputs) -> list:
    """What the reading of a model's outputs depends on, to see whether it changed."""
    return [
        (
            *(o.name, o.values.shape, o.weight, targets.loss_family(o.loss)),
            targets.from_logits(o.loss),
            getattr(o.loss, "ignore_class", None),
        )
        for o in outputs
    ]


def by_output(value, names, what: str) -> list:
    """The entries of a list or dict for the outputs of these names, None for missing.

    Raises:
        ValueError: for names or a number of entries that do not fit.
    """
    if isinstance(value, dict):
        unknown = set(value) - set(names)
        if not unknown:
            return [value.get(name) for name in names]
        if len(names) == len(value) == 1:  # A model may not know a name for it.
            return list(value.values())
    elif isinstance(value, (list, tuple)):
        if len(value) == len(names):
            return list(value)
    elif len(names) == 1:
        return [value]
    received = list(value) if isinstance(value, dict) else type(value).__name__
    if isinstance(value, (list, tuple)):
        received += f" of {len(value)}"
    raise ValueError(
        f"The {what} must have an entry for each output of the model: {list(names)}. "
        f"Received: {received}"
    )


def labels_of(y, outputs, what: str = "labels in `probe_data`") -> list:
    """The entry of each output in labels, or weights, as `fit` takes them."""
    names = [output.name for output in outputs]
    trained = [output for output in outputs if output.loss is not None]
    if isinstance(y, (list, tuple)) and len(y) == len(trained) < len(outputs):
        y = {output.name: one for output, one in zip(trained, y, strict=True)}
    elif not keras.tree.is_nested(y) and len(trained) == 1:
        y = {trained[0].name: y}
    return by_output(y, names, what)


def chosen(outputs, name: str | None) -> list[Output]:
    """The outputs to read: one by name, or all that have a loss.

    Raises:
        ValueError: for an unknown name, and for loss weights that are all 0.
    """
    if name is not None:
        found = [output for output in outputs if output.name == name]
        if not found:
            raise ValueError(
                "Argument `output` must be the name of an output of the model: "
                f"{[output.name for output in outputs]}. Received: output={name!r}"
            )
        return [found[0]._replace(weight=1.0)]
    if len(outputs) == 1:
        return [outputs[0]._replace(weight=1.0)]
    trained = [output for output in outputs if output.loss is not None] or outputs
    if sum(output.weight for output in trained) <= 0:
        raise ValueError(
            "The loss weights of the model's outputs must not all be 0. Pass `output` "
            f"to read one. Received: {[(o.name, o.weight) for o in trained]}"
        )
    return trained


def _names(model, structure, count):
    if isinstance(structure, dict) and len(structure) == count:
        return sorted(structure)  # As `keras.tree` flattens it.
    names = getattr(model, "output_names", None)
    if names and len(names) == count:
        # One layer may make several.
        return [
            f"{name}_{names[:i].count(name)}" if name in names[:i] else name
            for i, name in enumerate(names)
        ]
    return [f"output_{i}" for i in range(count)] if count > 1 else ["output"]
