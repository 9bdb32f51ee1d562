"""The layers of a model that can be read: which there are, and what they put out."""

import contextlib
from typing import NamedTuple

import keras

from keras_milr import _keras, backend
from keras_milr.names import owner_paths, resolve, short_names


class Group(NamedTuple):
    """Layers that share a rate, and are read as one.

    Attributes:
        name: As in the logs.
        layers: The `keras.Layer` instances. The one that is called last is read.
        variables: Their trainable variables.
    """

    name: str
    layers: list
    variables: list


def choose(model, layers) -> list[Group]:
    """The groups of layers that an argument `layers` means.

    A layer here is the smallest one whose output can be read: those inside of
    recurrent layers and of wrappers (`Bidirectional`, `TimeDistributed`) run many times
    in a loop, and are read as one with it.

    Args:
        model: A built `keras.Model`.
        layers: `"all"`, a name or regular expression, or a list of them: a group for
            each layer. Or a dict from the name of a group to its layers, a name or
            regular expression or a list of them.

    Returns:
        The groups, in the order of the model's layers, or of the dict.

    Raises:
        TypeError: for anything else.
        ValueError: for a pattern that means no layer with trainable weights, or a layer
            in two groups.
    """
    units = _units(model)
    names = short_names([unit.name for unit in units])
    if isinstance(layers, str) and layers == "all":
        return [u._replace(name=n) for u, n in zip(units, names, strict=True)]
    grouped = isinstance(layers, dict)
    patterns = {}
    for name, those in layers.items() if grouped else [(None, layers)]:
        those = [those] if isinstance(those, str) else those
        if not isinstance(those, (list, tuple)) or not those:
            raise TypeError(
                "Argument `layers` must be 'all', a name or regular expression, a list "
                "of them, or a dict from the name of a group to these. "
                f"Received: layers={layers!r}"
            )
        for pattern in those:
            if patterns.setdefault(pattern, name) != name:
                raise ValueError(
                    "Argument `layers` must name a layer in one group only. "
                    f"Received: {pattern!r} in {patterns[pattern]!r} and {name!r}"
                )
    _check_trainable(model, units, patterns)
    found = resolve(
        {pattern: (name,) for pattern, name in patterns.items()},
        [unit.name for unit in units],
        "layers",
    )
    if not grouped:
        return [
            unit._replace(name=name)
            for unit, name, chosen in zip(units, names, found, strict=True)
            if chosen
        ]
    groups = {name: Group(name, [], []) for name in layers}
    for unit, chosen in zip(units, found, strict=True):
        if chosen:
            groups[chosen[0]].layers.extend(unit.layers)
            groups[chosen[0]].variables.extend(unit.variables)
    return list(groups.values())


@contextlib.contextmanager
def recorded(groups):
    """Records what the groups' layers put out, while a forward pass is traced.

    Yields:
        A function that gives, for each group, the outputs of all calls of its last
        layer: a list of tensors.
    """
    layers = {id(layer): layer for group in groups for layer in group.layers}
    calls = []  # In their order: layer and outputs.

    def replaced(layer):
        call = layer.call

        def record(*args, **kwargs):
            outputs = call(*args, **kwargs)
            calls.append((layer, outputs))
            return outputs

        return record

    def outputs():
        found = []
        for group in groups:
            here = {id(layer) for layer in group.layers}
            own = [(layer, out) for layer, out in calls if id(layer) in here]
            if not own:
                raise ValueError(
                    "A layer to be read is not called by the model. "
                    f"Received: {group.name!r} in `layers`"
                )
            last = own[-1][0]
            tensors = keras.tree.flatten([out for layer, out in own if layer is last])
            tensors = [t for t in tensors if keras.backend.is_float_dtype(t.dtype)]
            if not tensors or not all(map(backend.is_in_reach, tensors)):
                raise ValueError(
                    f"The layer {last.name!r} cannot be read: it puts out no numbers, "
                    "or does so inside a loop. Name the layer around it instead. "
                    f"Received: {group.name!r} in `layers`"
                )
            found.append(tensors)
        return found

    with contextlib.ExitStack() as stack:
        for layer in layers.values():
            # On the instance, past Keras' tracking of attributes; a layer that has
            # a `call` of its own there gets it back.
            stack.callback(_restore, layer, layer.__dict__.get("call"))
            layer.__dict__["call"] = replaced(layer)
        yield outputs


def _restore(layer, call):
    if call is None:
        del layer.__dict__["call"]
    else:
        layer.__dict__["call"] = call


def _units(model) -> list[Group]:
    """The layers that can be read and have trainable weights, named by their path."""
    paths, owners = owner_paths(model.trainable_variables)
    path_of = {
        id(variable): paths[owner]
        for variable, owner in zip(model.trainable_variables, owners, strict=True)
    }
    units, seen = [], set()

    def visit(layer):
        if id(layer) in seen:
            return
        seen.add(id(layer))
        inner = [x for x in _keras.sublayers(layer) if x.trainable_variables]
        if isinstance(layer, (keras.layers.RNN, keras.layers.Wrapper)):
            inner = []
        for sublayer in inner:
            visit(sublayer)
        below = {id(v) for sublayer in inner for v in sublayer.trainable_variables}
        own = [v for v in layer.trainable_variables if id(v) not in below]
        own = [v for v in own if id(v) in path_of]
        if own:
            path = _common([path_of[id(v)] for v in own])
            units.append(Group(path, [layer], own))

    visit(model)
    return units


def _common(paths):
    """The segments that all paths begin with; the first path where there are none."""
    parts = [path.split("/") for path in paths]
    same = 0
    for segments in zip(*parts, strict=False):
        if len(set(segments)) > 1:
            break
        same += 1
    return "/".join(parts[0][:same]) or paths[0]


def _check_trainable(model, units, patterns):
    """Says of a layer that is asked for by name if it has nothing to train."""
    there = {layer.name for unit in units for layer in unit.layers}
    for layer in _keras.all_layers(model):
        asked_for = layer.name in patterns and layer.name not in there
        if asked_for and not layer.trainable_variables:
            raise ValueError(
                "Argument `layers` must name layers with trainable weights. "
                f"Received: {layer.name!r}, which has none"
            )
