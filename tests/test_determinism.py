"""Same seeds, same rates, bit for bit; a policy that changes nothing leaves no trace.

In a process of its own, since deterministic operations cannot be switched off again.
"""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

PROGRAM = """
import tempfile
import keras, numpy as np
import keras_milr
from tests import killed

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf
    tf.config.experimental.enable_op_determinism()
elif keras.backend.backend() == "torch":
    import torch
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
x, y = killed.digits()


def fit(source, policy=None, backup=False):
    keras.utils.set_random_seed(7)
    layers = [keras.layers.Dense(16, activation="relu"), keras.layers.Dropout(0.3)]
    layers += [keras.layers.BatchNormalization(), keras.layers.Dense(10, name="head")]
    model = keras.Sequential([keras.Input((64,)), *layers, keras.layers.Softmax()])
    optimizer = keras.optimizers.SGD(0.05, momentum=0.9)
    if source == "layers":
        optimizer = keras_milr.LayerwiseOptimizer(optimizer, layer_decay=0.5)
    metrics = [keras_milr.MutualInformation()]
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=metrics)
    callbacks = []
    if policy is not None:
        options = {"probe_data": None if source == "metric" else (x, y)}
        options |= {
            "layers": {"layers": "all"},
            "auto": {"learning_rate": "auto"},
        }.get(source, {})
        callbacks.append(keras_milr.MutualInformationLR(policy, **options))
    with tempfile.TemporaryDirectory() as folder:
        if backup:
            callbacks.append(keras.callbacks.BackupAndRestore(folder))
        history = model.fit(
            x, y, epochs=3, verbose=0, callbacks=callbacks, validation_split=0.1
        )
    variables = [*model.variables, *model.optimizer.variables]
    learned = [keras.ops.convert_to_numpy(v).copy() for v in variables]
    return learned, history.history, [c.history for c in callbacks[:1]]


def same(a, b):
    return all(np.array_equal(u, v) for u, v in zip(a, b, strict=True))


for source in ("layers", "metric", "auto"):
    one, two = (fit(source, "relative") for _ in range(2))
    assert same(one[0], two[0]), source
    for key in ("loss", "learning_rate", "val_mutual_information"):
        assert one[1][key] == two[1][key], (source, key)
    rates = [
        [list(r["rate"].values()) if source == "layers" else r["rate"] for r in history]
        for _, _, (history,) in (one, two)
    ]
    assert rates[0] == rates[1], source
    assert len({str(rate) for rate in rates[0]}) > 2, "the rates never change"
    if source != "auto":  # Which sets the rate.
        without, with_it = fit(source), fit(source, lambda r: r.rate, backup=True)
        assert same(without[0], with_it[0]), source
        assert without[1]["loss"] == with_it[1]["loss"], source
    print(source)
"""


@pytest.mark.slow
@pytest.mark.supports("Backends", "same seeds, same rates")
@pytest.mark.supports("Company", "BackupAndRestore")
def test_same_seeds_same_rates():
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["layers", "metric", "auto"]
