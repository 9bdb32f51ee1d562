"""Names of layers, and which layers a pattern means.

A layer is known by the path of its variables less their own names, such as
`"model/encoder/dense"`. It is shown by the shortest end of that path that no other
layer has, such as `"dense"`.

A pattern, a name or a regular expression, means a layer when it matches, as a whole,
any run of segments of the layer's path: `"dense"`, `"encoder"`, `"model/encoder"` and
`"enc.*"` all mean the one above. So the name of a block means all layers in it. What is
a name of a layer or block is not taken for a regular expression. Where it is just the
shown name of a layer, then for that layer it goes before others.

The path of a variable has no names of what was put around its layer after it had been
built, as all layers of a functional model are. Who knows the model adds them, as
`blocks`: the argument `layers` does. An optimizer knows variables only.
"""

import re

# Of an optimizer, where the name is that of a block after all.
_UNKNOWN = (
    " A functional model inside of the model has no name here: name its layers, or "
    "with '.*' all layers but those that are named too."
)


def owner_paths(variables) -> tuple[list[str], list[int]]:
    """The layers that own variables, by path, in the order of their first variable.

    Args:
        variables: List of `keras.Variable`.

    Returns:
        The layers' paths, and for each variable the index of its layer. A variable
        whose path occurred before belongs to another layer of the same name, whose path
        gets a number: `"dense"`, `"dense#2"`.
    """
    paths, owners, seen, numbers = {}, [], {}, {}
    for variable in variables:
        path, _, name = variable.path.rpartition("/")
        seen[variable.path] = seen.get(variable.path, 0) + 1
        path = path or name  # A weight of the model itself.
        # A layer's variables stand together, and the first layer may lack some.
        number = max(seen[variable.path], numbers.get(path, 1))
        numbers[path] = number
        if number > 1:
            path = f"{path}#{number}"
        owners.append(paths.setdefault(path, len(paths)))
    return list(paths), owners


def short_names(paths: list[str]) -> list[str]:
    """For each path its shortest end, cut at a `/`, that no other path has."""
    ends = [_ends(path) for path in paths]
    count = {}
    for end in (end for ends_of_one in ends for end in ends_of_one):
        count[end] = count.get(end, 0) + 1
    return [
        next((end for end in ends_of_one if count[end] == 1), ends_of_one[-1])
        for ends_of_one in ends
    ]


def resolve(
    values: dict,
    paths: list[str],
    argument: str,
    may_miss: bool = False,
    blocks: list[set[str]] | None = None,
) -> list:
    """The value that the patterns give to each layer.

    Args:
        values: Dict from pattern to value.
        paths: The layers.
        argument: Name of the argument that `values` came from, for errors.
        may_miss: Whether a pattern may mean no layer. Defaults to `False`.
        blocks: For each layer further names by which it is meant, with those of the
            blocks around it. Defaults to `None`: the model is not known.

    Returns:
        A list with the value of each layer, None where no pattern means it.

    Raises:
        TypeError: for a pattern that is no string.
        ValueError: for a pattern that is no regular expression or means no layer, and
            for patterns that give different values to the same layer.
    """
    names = short_names(paths)
    given = [{} for _ in paths]
    runs = [_runs(path) for path in paths]
    hint = _UNKNOWN if blocks is None else ""
    for of_one, further in zip(runs, blocks or [], strict=blocks is not None):
        of_one.extend(further)
    for pattern, value in values.items():
        found = _meant(pattern, runs, argument)
        if not found and not may_miss:
            raise ValueError(
                f"Argument `{argument}` names no layer with {pattern!r}. Use a name "
                f"or a regular expression that matches as a whole.{hint} The layers "
                f"with trainable weights are: {', '.join(names)}"
            )
        for i in found:
            given[i][pattern] = value
    result = []
    for name, candidates in zip(names, given, strict=True):
        if name in candidates:
            candidates = {name: candidates[name]}
        different = list(candidates.values())
        if any(value != different[0] for value in different):
            raise ValueError(
                f"Argument `{argument}` gives different values to the layer {name!r}. "
                f"Received: {candidates}. The layers with trainable weights are: "
                f"{', '.join(names)}"
            )
        result.append(different[0] if different else None)
    return result


def _ends(path):
    parts = path.split("/")
    return ["/".join(parts[i:]) for i in reversed(range(len(parts)))]


def _runs(path):
    parts = path.split("/")
    return [
        "/".join(parts[i:j])
        for i in range(len(parts))
        for j in range(i + 1, len(parts) + 1)
    ]


def _meant(pattern, runs, argument):
    """Indices of the layers that a pattern means, by what it may match of each."""
    if not isinstance(pattern, str):
        raise TypeError(
            f"Argument `{argument}` must name layers with strings. "
            f"Received: {pattern!r} of type {type(pattern).__name__}"
        )
    found = [i for i, of_one in enumerate(runs) if pattern in of_one]
    if found:  # A name need not be a regular expression, and may be another one.
        return found
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"Argument `{argument}` must name layers with names or regular "
            f"expressions. Received: {pattern!r}, which is none: {error}"
        ) from error
    return [
        i for i, of_one in enumerate(runs) if any(map(expression.fullmatch, of_one))
    ]
