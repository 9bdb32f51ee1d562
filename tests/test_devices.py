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
BY_FIT = "tf.distribute.MultiWorkerMirroredStrategy, `fit`"
BY_HAND = "tf.distribute.MultiWorkerMirroredStrategy, a loop of one's own"
DISTRIBUTIONS = ("keras.distribution.DataParallel", "keras.distribution.ModelParallel")
IGNORED = "UserWarning: Keras ignores it here, and trains on one device"


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


# ------------------------------------------------- where Keras distributes a training


@pytest.mark.slow
@pytest.mark.backends("tensorflow", reason="`tf.distribute` is for TensorFlow's Keras")
@pytest.mark.supports(SECTION, "tf.distribute.MirroredStrategy")
def test_two_replicas_as_one_device():
    """With the rate that a range test found, of layers, by the metric, rolled back."""
    result = found_by(started("mirrored"))
    for kind in devices.OPTIONS:
        found, expected = result[kind]
        assert_fit(kind, found, expected)
        assert found["replicas"] == [2]
        assert found["differ"] == 0.0  # Weights, slots, rates and multipliers.
    # Of these each replica has its own, and has it still after a range test.
    assert result["statistics"] == {"moving_mean": True, "moving_variance": True}
    assert result["traces"] == []


@pytest.mark.slow
@pytest.mark.backends("tensorflow", reason="`tf.distribute` is for TensorFlow's Keras")
@pytest.mark.supports(SECTION, BY_HAND)
@pytest.mark.refuses(
    *(SECTION, BY_FIT),
    error="ValueError of Keras, without the callback too: Attempt to convert a value "
    "(PerReplica ...) with an unsupported type",
)
def test_two_workers_as_one_where_keras_can(tmp_path):
    """Although they have different probes; the training of layers was resumed."""
    with socket.socket() as first, socket.socket() as second:
        for one in (first, second):
            one.bind(("127.0.0.1", 0))
        ports = [one.getsockname()[1] for one in (first, second)]
    both = [started("worker", index, *ports, tmp_path) for index in range(2)]
    try:
        first, second = map(found_by, both)
    finally:
        for process in both:
            process.kill()
    alone = found_by(started("alone"))
    for kind in ("layers", "metric", "failing"):
        assert first[kind] == second[kind]
        assert_same(first[kind], alone[kind])
        assert first[kind]["rollbacks"][-1] == (kind == "failing")
        assert len({str(rate) for rate in first[kind]["rate"]}) > 2, kind
    for found in (first, second):
        assert "could not be found by 'auto'; a number needs no range" in found["auto"]
        remedy = "Find the rate there, by `lr_range_test` on a model without"
        assert remedy in found["auto"]
        # See https://github.com/keras-team/keras/issues/20585.
        assert "Attempt to convert a value (PerReplica" in found["fit"]


@pytest.mark.backends("jax", reason="`keras.distribution` is for Keras on JAX")
@pytest.mark.supports(SECTION, *DISTRIBUTIONS)
def test_data_or_weights_on_two_devices():
    flags = os.environ.get("XLA_FLAGS", "")
    flags += " --xla_force_host_platform_device_count=2"
    result = found_by(started("distribution", XLA_FLAGS=flags))
    for kind in devices.OPTIONS:
        found, expected = result[kind]["DataParallel"], result[kind]["one"]
        assert_fit(kind, found, expected)
        assert found["rows"] == {"batch": 152, "device": 76, "devices": 2}
    for kind in ("network", "layers"):
        found, expected = result[kind]["ModelParallel"], result[kind]["one"]
        assert_fit(kind, found, expected)
        assert found["rows"] == {"batch": 151, "device": 151, "devices": 2}
        assert found["sharding"]["body/kernel"] == [None, "model"]


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


@pytest.mark.backends("tensorflow", reason="`tf.distribute` is for TensorFlow's Keras")
@pytest.mark.parametrize("name", ["MirroredStrategy", "OneDeviceStrategy"])
def test_a_strategy_of_one_device(name, rates_of_one):
    """It updates variables as one of several does, though it has nothing to share."""
    tf = pytest.importorskip("tensorflow")
    device = {"MirroredStrategy": ["CPU:0"], "OneDeviceStrategy": "CPU:0"}[name]
    strategy = getattr(tf.distribute, name)(device)
    found = rates(strategy.scope)
    for reading, other in zip(found, rates_of_one, strict=True):
        assert reading == pytest.approx(other, rel=1e-5)


def distribution(name):
    mesh = keras.distribution.DeviceMesh((2,), ("batch",), ["cpu:0", "cpu:1"])
    if name == DISTRIBUTIONS[0]:
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
        for row in DISTRIBUTIONS
    ],
)
def test_a_distribution_that_keras_ignores(name, rates_of_one):
    """So do we, and say so: the rates are those of what is trained."""
    try:
        ignored = distribution(name)
    except AttributeError as error:
        pytest.skip(f"Keras {keras.__version__} cannot even make one here: {error}")
    with pytest.warns(UserWarning, match="keras.distribution means nothing to"):
        found = rates(ignored.scope)
    assert found == rates_of_one


@pytest.mark.backends("torch", reason="of Keras' own, on PyTorch")
@pytest.mark.refuses(
    *(SECTION, *DISTRIBUTIONS),
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
            "MultiWorkerMirroredStrategy": [BY_FIT, BY_HAND],
        }.items()
    ],
)
def test_a_strategy_that_keras_ignores(name, rates_of_one):
    """The scope of TensorFlow means nothing to the variables of another backend, and
    that is said."""
    tf = pytest.importorskip("tensorflow")
    strategy = getattr(tf.distribute, name)()
    with pytest.warns(UserWarning, match="tf.distribute means nothing to Keras"):
        found = rates(strategy.scope)
    assert found == rates_of_one
