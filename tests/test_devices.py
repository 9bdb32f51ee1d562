"""More than one device: the rates are those of one, or what a user gets instead.

The trainings are in tests/devices.py, each in a process of its own.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_milr
from tests import devices

ROOT = Path(__file__).parent.parent
SECTION = "More than one device"
TENSORFLOW = pytest.mark.backends(
    "tensorflow", reason="`tf.distribute` is for Keras on TensorFlow"
)
JAX = pytest.mark.backends("jax", reason="`keras.distribution` is for Keras on JAX")
IGNORED = "no error: Keras ignores it, and trains on one device"


def started(*args, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", "tests.devices", *map(str, args)],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def found_by(process):
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors[-3000:]
    return json.loads(output.splitlines()[-1])


def assert_same(found, expected):
    """But for the order of float32 sums, which the policies carry on."""
    assert found["rollbacks"] == expected["rollbacks"]
    for key, tolerance in (("rate", 1e-3), ("information", 5e-3)):
        by_reading = zip(found[key], expected[key], strict=True)
        for reading, other in by_reading:
            assert reading == pytest.approx(other, rel=tolerance, abs=1e-6), key
    for weights, others in zip(found["weights"], expected["weights"], strict=True):
        np.testing.assert_allclose(weights, others, rtol=0, atol=2e-3)


def assert_fit(kind, found, expected):
    """Of a `fit`: what it logged too, and what came out of it."""
    assert_same(found, expected)
    assert found["logs"].keys() == expected["logs"].keys()
    for key, logged in found["logs"].items():
        assert logged == pytest.approx(
            expected["logs"][key], rel=5e-3, abs=1e-6, nan_ok=True
        ), key
    evaluated = found["evaluated"]["mutual_information"]
    assert evaluated == pytest.approx(found["expected"], abs=1e-5)
    assert evaluated > 0.5
    rates = [list(r.values()) if isinstance(r, dict) else r for r in found["rate"]]
    assert len({str(rate) for rate in rates}) > 2, "the rates never change"
    assert found["rollbacks"][-1] == (kind == "failing")


# ------------------------------------------------------------- tf.distribute: replicas


@pytest.fixture(scope="module")
def mirrored():
    return found_by(started("mirrored"))


@TENSORFLOW
@pytest.mark.supports(SECTION, "tf.distribute.MirroredStrategy")
@pytest.mark.parametrize("kind", devices.OPTIONS)
def test_two_replicas_as_one_device(mirrored, kind):
    """With the rate that a range test found, of layers, by the metric, rolled back."""
    found, expected = mirrored[kind]
    assert_fit(kind, found, expected)
    assert found["replicas"] == [2]
    assert found["differ"] == 0.0  # Weights, slots, rates and multipliers.


@TENSORFLOW
def test_a_range_test_leaves_no_trace_on_any_replica(mirrored):
    """Each has statistics of its own, which Keras does not bring together."""
    assert mirrored["statistics"] == {"moving_mean": True, "moving_variance": True}
    assert mirrored["traces"] == []


# -------------------------------------------------------------- tf.distribute: workers


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    """What two workers found, and one process alone."""
    with socket.socket() as first, socket.socket() as second:
        for one in (first, second):
            one.bind(("127.0.0.1", 0))
        ports = [one.getsockname()[1] for one in (first, second)]
    folder = tmp_path_factory.mktemp("backups")
    both = [started("worker", index, *ports, folder) for index in range(2)]
    try:
        return [*map(found_by, both), found_by(started("alone"))]
    finally:
        for process in both:
            process.kill()


BY_HAND = "tf.distribute.MultiWorkerMirroredStrategy, a loop of one's own"


@TENSORFLOW
@pytest.mark.supports(SECTION, BY_HAND)
@pytest.mark.parametrize("kind", ["layers", "metric", "failing"])
def test_two_workers_as_one(workers, kind):
    """Although they have different probes; that of layers was killed and resumed."""
    first, second, alone = (found[kind] for found in workers)
    assert first == second
    assert_same(first, alone)
    assert first["rollbacks"][-1] == (kind == "failing")
    assert len({str(rate) for rate in first["rate"]}) > 2, "the rates never change"


@TENSORFLOW
def test_a_range_test_on_several_workers_is_refused(workers):
    for found in workers[:2]:
        assert "could not be found by 'auto'; a number needs no range" in found["auto"]
        assert (
            "Find the rate there, by `lr_range_test` on a model without"
            in (found["auto"])
        )


@TENSORFLOW
@pytest.mark.refuses(
    *(SECTION, "tf.distribute.MultiWorkerMirroredStrategy, `fit`"),
    error="ValueError of Keras, without the callback too: Attempt to convert a value "
    "(PerReplica ...) with an unsupported type",
)
def test_plain_keras_does_not_fit_on_several_workers(workers):
    """See https://github.com/keras-team/keras/issues/20585."""
    for found in workers[:2]:
        assert "Attempt to convert a value (PerReplica" in found["fit"]


# ------------------------------------------------------------------ keras.distribution


@pytest.fixture(scope="module")
def distributed():
    flags = os.environ.get("XLA_FLAGS", "")
    flags += " --xla_force_host_platform_device_count=2"
    return found_by(started("distribution", XLA_FLAGS=flags))


@JAX
@pytest.mark.supports(SECTION, "keras.distribution.DataParallel")
@pytest.mark.parametrize("kind", devices.OPTIONS)
def test_data_on_two_devices(distributed, kind):
    found = distributed[kind]["DataParallel"]
    assert_fit(kind, found, distributed[kind]["one"])
    assert found["rows"] == {"batch": 152, "device": 76, "devices": 2}


@JAX
@pytest.mark.supports(SECTION, "keras.distribution.ModelParallel")
@pytest.mark.parametrize("kind", ["network", "layers"])
def test_weights_on_two_devices(distributed, kind):
    found = distributed[kind]["ModelParallel"]
    assert_fit(kind, found, distributed[kind]["one"])
    assert found["sharding"]["body/kernel"] == [None, "model"]
    assert found["rows"] == {"batch": 151, "device": 151, "devices": 2}


# ------------------------------------------------- where Keras distributes nothing


def rates(scope):
    x, y = devices.digits()
    with scope():
        model = devices.make_model("layers")
        callback = keras_milr.MutualInformationLR("relative", (x, y), layers="all")
        model.fit(x, y, epochs=2, verbose=0, shuffle=False, callbacks=[callback])
    places = {str(v.value.device) for v in model.trainable_variables}
    assert len(places) == 1
    return [record["rate"] for record in callback.history]


@pytest.fixture(scope="module")
def rates_of_one():
    return rates(contextlib.nullcontext)


ROWS = ("keras.distribution.DataParallel", "keras.distribution.ModelParallel")


def distribution(name):
    mesh = keras.distribution.DeviceMesh((2,), ("batch",), ["cpu:0", "cpu:1"])
    if name == ROWS[0]:
        return keras.distribution.DataParallel(mesh)
    layout = keras.distribution.LayoutMap(mesh)
    layout[".*kernel"] = (None, "batch")
    return keras.distribution.ModelParallel(layout_map=layout, batch_dim_name="batch")


@pytest.mark.backends(
    *("tensorflow", "torch"), reason="Keras distributes on JAX, by `keras.distribution`"
)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(row, marks=pytest.mark.refuses(SECTION, row, error=IGNORED))
        for row in ROWS
    ],
)
def test_a_distribution_that_keras_ignores(name, rates_of_one):
    """So do we: the rates are those of what is trained."""
    assert rates(distribution(name).scope) == rates_of_one


@pytest.mark.backends("torch", reason="of Keras' own, on PyTorch")
@pytest.mark.refuses(
    *(SECTION, *ROWS),
    error="AttributeError of Keras, where no devices are named: 'NoneType' object has "
    "no attribute 'list_devices'",
)
def test_keras_does_not_list_the_devices_of_pytorch():
    with pytest.raises(AttributeError, match="no attribute 'list_devices'"):
        keras.distribution.DataParallel()
    with pytest.raises(AttributeError, match="no attribute 'list_devices'"):
        keras.distribution.DeviceMesh((2,), ("batch",))


@pytest.mark.backends("jax", "torch", reason="Keras on TensorFlow distributes by it")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.refuses(SECTION, *rows, error=IGNORED))
        for name, rows in {
            "MirroredStrategy": ["tf.distribute.MirroredStrategy"],
            "MultiWorkerMirroredStrategy": [
                "tf.distribute.MultiWorkerMirroredStrategy, `fit`",
                BY_HAND,
            ],
        }.items()
    ],
)
def test_a_strategy_that_keras_ignores(name, rates_of_one):
    """The scope of TensorFlow means nothing to the variables of another backend."""
    tf = pytest.importorskip("tensorflow")
    assert rates(getattr(tf.distribute, name)().scope) == rates_of_one
