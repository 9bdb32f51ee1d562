"""The layers of a model that can be read: which there are, and what they put out."""

import contextlib
from typing import NamedTuple

import keras

from keras_milr import _keras, backend
from keras_milr.names import owner_paths, resolve, short_names

_READ_AS_ONE = (
    keras.layers.RNN,
    keras.layers.Wrapper,
    keras.layers.Bidirectional,  # Not a `Wrapper`.
)


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
            regular expression or a list of them. The name of a block, a model inside
            of the model say, means all layers in it.

    Returns:
        The groups, in the order of the model's layers, or of the dict.

    Raises:
        TypeError: for anything else.
        ValueError: for a pattern that means no layer with trainable weights, a layer in
            two groups, or a group whose layers are all named in others.
    """
    units = _units(model)
    paths = [unit.name for unit in units]
    units = [
        unit._replace(name=name)
        for unit, name in zip(units, short_names(paths), strict=True)
    ]
    if isinstance(layers, str) and layers == "all":
        return units
    patterns = _patterns(layers)
    _check_trainable(model, units, patterns)
    found = resolve(patterns, paths, "layers", blocks=_blocks(model, units))
    if not isinstance(layers, dict):
        return [u for u, name in zip(units, found, strict=True) if name is not None]
    groups = {name: Group(name, [], []) for name in layers}
    for unit, name in zip(units, found, strict=True):
        if name is not None:
            groups[name].layers.extend(unit.layers)
            groups[name].variables.extend(unit.variables)
    for group in groups.values():
        if not group.layers:
            raise ValueError(
                "Argument `layers` must have a layer in each group. Received: "
                f"{group.name!r}, whose layers are named in other groups"
            )
    return list(groups.values())


def _patterns(layers) -> dict:
    """The patterns in an argument `layers`, each with the name of its group, or "".

    Raises:
        TypeError: for another type.
        ValueError: for a pattern in two groups.
    """
    patterns = {}
    for name, those in (layers if isinstance(layers, dict) else {"": layers}).items():
        those = [those] if isinstance(those, str) else those
        listed = isinstance(those, (list, tuple)) and len(those) > 0
        if not listed or not all(isinstance(p, str) for p in (name, *those)):
            raise TypeError(_expected(layers))
        for pattern in those:
            if patterns.setdefault(pattern, name) != name:
                raise ValueError(
                    "Argument `layers` must name a layer in one group only. "
                    f"Received: {pattern!r} in {patterns[pattern]!r} and {name!r}"
                )
    if not patterns:
        raise TypeError(_expected(layers))
    return patterns


def _expected(layers):
    return (
        "Argument `layers` must be 'all', a name or regular expression, a list of "
        "them, or a dict from the name of a group to these. "
        f"Received: layers={layers!r}"
    )


@contextlib.contextmanager
def recorded(groups):
    """Records what the groups' layers put out, while a forward pass is traced.

    Yields:
        A function of the number of samples that gives, for each group, what all calls
        of its last layer put out for each sample: a list of tensors.
    """
    layers = {id(layer): layer for group in groups for layer in group.layers}
    calls = []  # In their order: layer and outputs.

    def replaced(layer, call):
        def record(*args, **kwargs):
            outputs = call(*args, **kwargs)
            calls.append((layer, outputs))
            return outputs

        return record

    def outputs(samples):
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
            tensors = [t for t in tensors if _is_of_samples(t, samples)]
            if not tensors or not all(map(backend.is_in_reach, tensors)):
                raise ValueError(
                    f"The layer {last.name!r} cannot be read: it puts out no numbers "
                    "for each sample, or does so inside a loop. Leave it out, or put "
                    "it in a group with a layer that is called later. "
                    f"Received: {group.name!r} in `layers`"
                )
            found.append(tensors)
        return found

    with contextlib.ExitStack() as stack:
        for layer in layers.values():
            stack.enter_context(replaced_call(layer, replaced))
        yield outputs


@contextlib.contextmanager
def replaced_call(layer, replaced):
    """Context in which a layer's `call` is `replaced(layer, call)`.

    That of a quantized layer is `quantized_call`.
    """
    quantized = getattr(layer, "quantization_mode", None) is not None
    name = "quantized_call" if quantized else "call"
    # On the instance, past Keras' tracking of attributes; a layer that has a `call` of
    # its own there gets it back.
    kept = layer.__dict__.get(name)
    layer.__dict__[name] = replaced(layer, getattr(layer, name))
    try:
        yield
    finally:
        if kept is None:
            del layer.__dict__[name]
        else:
            layer.__dict__[name] = kept


def _is_of_samples(output, samples):
    """Whether it is read: a layer may also put out None, integers, a loss."""
    return (
        keras.ops.is_tensor(output)
        and keras.backend.is_float_dtype(output.dtype)
        and tuple(output.shape[:1]) in ((samples,), (None,))
    )


def _units(model) -> list[Group]:
    """The layers that can be read and have trainable weights, named by their path.

    A variable that several layers use belongs to the first of them.
    """
    paths, owners = owner_paths(model.trainable_variables)
    path_of = {
        id(variable): paths[owner]
        for variable, owner in zip(model.trainable_variables, owners, strict=True)
    }
    units, seen, number = [], set(), {}

    def visit(layer):
        if id(layer) in seen:
            return
        seen.add(id(layer))
        inner = [x for x in _keras.sublayers(layer) if x.trainable_variables]
        if isinstance(layer, _READ_AS_ONE):
            inner = []
        for sublayer in inner:
            visit(sublayer)
        own = [v for v in layer.trainable_variables if id(v) in path_of]
        if own:
            path = _common([path_of.pop(id(v)) for v in own]) or layer.name
            number[path] = number.get(path, 0) + 1
            if number[path] > 1:
                path = f"{path}#{number[path]}"
            units.append(Group(path, [layer], own))

    visit(model)
    return units


def _blocks(model, units) -> list[set]:
    """For each unit the names that begin with one of a layer around it.

    The variables' paths have these too, but for layers that were built before they
    were put there, as those of a functional model.
    """
    found = {id(unit.layers[0]): set() for unit in units}

    def visit(layer, around):
        if any(layer is block for block in around):
            return
        path = [*(block.name for block in around), layer.name]
        if id(layer) in found:
            found[id(layer)].update(
                "/".join(path[i:j])
                for i in range(len(around))
                for j in range(i + 1, len(path) + 1)
            )
        for inner in _keras.sublayers(layer):
            visit(inner, (*around, layer))  # A shared one from each of its blocks.

    for layer in _keras.sublayers(model):
        visit(layer, ())
    return [found[id(unit.layers[0])] for unit in units]


def _common(paths):
    """The segments that all paths begin with; none of a `TFSMLayer`, say."""
    parts = [path.split("/") for path in paths]
    same = 0
    for segments in zip(*parts, strict=False):
        if len(set(segments)) > 1:
            break
        same += 1
    return "/".join(parts[0][:same])


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
