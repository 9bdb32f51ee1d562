"""What a callback keeps of its readings."""

import json

import numpy as np

from keras_milr import readouts, records
from keras_milr.policies import Reading

INFOS = [
    readouts.Information(0.5, 0.6, 2.3, 0.01, 0.02, bound=0.4),
    readouts.Information(1.5, 1.6, 2.3, 0.03, 0.04),
]


def reading(rates):
    arrays = [np.arange(rates) + k / 8 for k in range(8)]
    return Reading(*arrays, step=3, steps=None, rollbacks=1, bound=arrays[0])


def test_of_a_network():
    made = records.record(reading(1), INFOS[:1])
    assert set(made) == {*Reading._fields, *readouts.Information._fields}
    assert (made["rate"], made["noise"], made["step"]) == (0.0, 0.875, 3)
    assert (made["steps"], made["value"], made["raw"]) == (None, 0.5, 0.6)
    again = json.loads(json.dumps(made))
    np.testing.assert_equal(records.informations(again), INFOS[:1])


def test_of_layers_under_other_names():
    made = records.record(reading(2), INFOS, ["dense", "dense_1"])
    assert made["peak_rate"] == {"dense": 0.25, "dense_1": 1.25}
    assert made["value"] == {"dense": 0.5, "dense_1": 1.5}
    assert made["rollbacks"] == 1
    made["output"] = INFOS[0]._asdict()
    (renamed,) = records.renamed([made], ["dense_7", "dense_8"])
    assert renamed["peak_rate"] == {"dense_7": 0.25, "dense_8": 1.25}
    assert renamed["output"] == made["output"]
    found = records.informations(renamed, ["dense_7", "dense_8"])
    np.testing.assert_equal(found, INFOS)
