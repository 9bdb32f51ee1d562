"""The records in a callback's `history`: as they are written, and read again."""

import numpy as np

from keras_milr import readouts

_INFORMATION = readouts.Information._fields
_NOT_BY_LAYER = ("output", "outputs", "labels", "columns")  # of a record's dicts


def record(reading, infos, names=None) -> dict:
    """What was read, JSON-serialisable.

    Args:
        reading: A `policies.Reading`.
        infos: The `Information` for each of its rates.
        names: Names of the layers that these are of: fields are then dicts by layer.
            Defaults to `None`, for the one rate of a network.
    """

    def by_name(values):
        return dict(zip(names, values, strict=True)) if names else values[0]

    made = {}
    for name, value in reading._asdict().items():
        array = isinstance(value, np.ndarray)
        made[name] = by_name(value.tolist()) if array else value
    for name in _INFORMATION:
        made[name] = by_name([getattr(info, name) for info in infos])
    return made


def informations(record, names=None) -> list:
    """The `infos` that a record was made of: the inverse of `record`."""
    return [
        readouts.Information(
            **{f: record[f][n] if names else record[f] for f in _INFORMATION}
        )
        for n in names or [None]
    ]


def renamed(history, names) -> list[dict]:
    """The records of a history with other names for the layers.

    Automatic names change from one run to the next, the order of layers does not.
    """
    return [
        {
            key: dict(zip(names, value.values(), strict=True))
            if isinstance(value, dict) and key not in _NOT_BY_LAYER
            else value
            for key, value in record.items()
        }
        for record in history
    ]
