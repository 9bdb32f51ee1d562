"""Absurd input to every public entry: it works, or says which argument is wrong.

`KERAS_MILR_FUZZ=20` tries twenty times as many inputs, other ones each time. How many
were tried, of each entry, stands at the end of pytest's report.
"""

import collections
import decimal
import fractions
import math
import os
import re
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import keras_milr
from keras_milr import information, policies, readouts

pytestmark = pytest.mark.slow
TIMES = int(os.environ.get("KERAS_MILR_FUZZ", "1"))
TRIED = collections.defaultdict(collections.Counter)


def fuzz(examples):
    return settings(
        max_examples=examples * TIMES,
        derandomize=TIMES == 1,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(autouse=True)
def _counted(request):
    """Hands what was tried to the report, from whichever process; see conftest.py."""
    TRIED.clear()
    yield
    tried = {entry: [n["worked"], n["refused"]] for entry, n in TRIED.items()}
    request.node.user_properties.append(("tried", tried))


def tried(entry, call, *names):
    """What `call` returns, or None where it refuses one of the arguments `names`."""
    named = r"[`'\"](" + "|".join(names) + r")(\[[^`]*\]|\.\w+)?[`'\"=]"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)  # of NumPy: silent NaN
            warnings.simplefilter("ignore", UserWarning)  # ours, for odd data
            result = call()
    except (TypeError, ValueError) as error:
        if not re.search(named, str(error)):
            fault(entry, error)
        TRIED[entry]["refused"] += 1
        return None
    except Exception as error:
        fault(entry, error)
        return None
    TRIED[entry]["worked"] += 1
    return result


def fault(entry, error):
    raise AssertionError(f"{entry}: {type(error).__name__}: {error}") from error


# ------------------------------------------------------------------------------ inputs

SPECIAL = (0.0, -0.0, 1.0, -1.0, 0.5, math.nan, math.inf, -math.inf)
HUGE = (1e308, -1e308, 5e-324, 1e-300, 3.5e38, 2.0**24, 2.0**63, 1e15)
NO_NUMBERS = (None, "", "a", "1", b"x", (), [], {}, [1, 2], {"a": 1}, object(), 1j)

floats = st.one_of(st.sampled_from(SPECIAL + HUGE), st.floats())
integers = st.one_of(
    st.integers(-3, 5), st.sampled_from((2**31, -(2**63), 2**64, 10**30, 10**400))
)
numbers = st.one_of(
    floats,
    integers,
    st.booleans(),
    st.sampled_from((np.float16(0.5), np.float32(2), np.int8(3), np.uint64(7))),
    st.sampled_from((np.array(2), np.ones(2), np.bool_(True))),
    st.sampled_from((fractions.Fraction(1, 3), decimal.Decimal("0.1"))),
)
anything = st.one_of(numbers, st.sampled_from(NO_NUMBERS), st.text(max_size=5))
dtypes = st.sampled_from(
    ["float16", "float32", "float64", "int8", "int64", "uint8", "uint64", "bool"]
)
odd_dtypes = st.sampled_from(["complex64", "U3", "S3", "O", "M8[s]"])
shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)


def elements(dtype):
    kind = np.dtype(dtype).kind
    if kind == "f":
        width = 8 * np.dtype(dtype).itemsize
        special = [x for x in SPECIAL if not math.isnan(x)] + [math.nan]
        return st.one_of(
            st.sampled_from(special), st.integers(0, 9), st.floats(width=width)
        )
    if kind in "iu":
        low = 0 if kind == "u" else -2
        return st.one_of(st.integers(0, 9), st.integers(low, 127))
    if kind == "O":  # Of which older versions of Hypothesis know no elements.
        return st.one_of(st.none(), st.integers(), st.text(max_size=3))
    return None


@st.composite
def arrays(draw, shape=shapes, dtype=dtypes, within=None):
    dtype = draw(dtype)
    if within is not None and dtype == "bool":
        dtype = "uint8"
    chosen = draw(shape) if not isinstance(shape, tuple) else shape
    within = elements(dtype) if within is None else within
    x = draw(hnp.arrays(dtype, chosen, elements=within))
    form = draw(st.sampled_from(["array", "list", "strided", "reversed", "fortran"]))
    if form == "list":
        return x.tolist()
    if form == "strided" and x.ndim:
        x = np.repeat(x, 2, axis=-1)[..., ::2]
    if form == "reversed" and x.ndim:
        x = x[::-1]
    if form == "fortran":
        x = np.asfortranarray(x)
    if draw(st.booleans()):
        x.flags.writeable = False
    if form == "array" and draw(st.integers(0, 3)) == 0 and x.dtype.kind in "fiub":
        return tf.constant(x)
    return x


odd_arrays = st.one_of(
    arrays(), arrays(dtype=odd_dtypes), anything, st.just([[1, 2], [3]])
)
counts = st.one_of(
    odd_arrays,
    arrays(hnp.array_shapes(min_dims=2, max_dims=3), within=st.integers(0, 100)),
    arrays(
        hnp.array_shapes(min_dims=1, max_dims=3),
        st.just("float64"),
        within=st.sampled_from([0.0, 1e-300, 1e-5, 0.5, 1e15, 1e300]),
    ),
)


def mostly(valid, absurd=anything):
    return st.integers(0, 7).flatmap(lambda i: absurd if i == 0 else valid)


def is_in(value, low, high, slack=1e-6):
    value = np.asarray(value)
    inside = (value >= low - slack) & (value <= high + slack)
    return np.all(np.isfinite(value) & inside)


def chosen(data, table, most=3):
    names = data.draw(st.lists(st.sampled_from(sorted(table)), max_size=most))
    return {name: data.draw(table[name], label=name) for name in names}


# ------------------------------------------------------------------------- information


@fuzz(300)
@given(counts, st.sampled_from(["entropy", "mutual_information"]), st.data())
def test_entropy_and_mutual_information(table, name, data):
    valid = st.sampled_from([None, "miller_madow", "grassberger"])
    correction = data.draw(st.one_of(valid, valid, anything))
    function = getattr(information, name)
    nats = tried(
        f"information.{name}",
        lambda: function(table, correction),
        "counts",
        "correction",
    )
    if nats is not None:
        shape = np.shape(table)
        assert nats.shape == (shape[:-1] if name == "entropy" else shape[:-2])
        most = np.log(max(shape[-1], 1))
        if name == "entropy" and correction is not None:
            most = np.inf  # A correction is over the number of samples.
        least = -1.0 if correction == "grassberger" and name == "entropy" else 0.0
        assert np.all(np.isfinite(nats))
        assert is_in(nats, least, most)


@fuzz(200)
@given(counts, st.sampled_from(["null_level", "standard_error"]))
def test_null_level_and_standard_error(table, name):
    nats = tried(
        f"information.{name}", lambda: getattr(information, name)(table), "counts"
    )
    if nats is not None:
        assert nats.shape == np.shape(table)[:-2]
        assert is_in(nats, 0.0, np.inf)


ids = mostly(
    arrays((3,), st.sampled_from(["int64", "int8", "uint8"]), st.integers(0, 1)),
    st.one_of(arrays((0,)), arrays((3,)), odd_arrays),
)
sizes = mostly(st.integers(2, 5))
weights = mostly(
    st.one_of(st.none(), arrays((3,), within=st.integers(0, 9))),
    st.one_of(arrays((3,)), odd_arrays),
)


@fuzz(300)
@given(ids, ids, sizes, sizes, weights)
def test_contingency(a, b, num_a, num_b, weight):
    table = tried(
        "information.contingency",
        lambda: information.contingency(a, b, num_a, num_b, weight),
        *("a", "b", "num_a", "num_b", "sample_weight"),
    )
    if table is not None:
        assert table.shape == (num_a, num_b)
        total = len(a) if weight is None else np.sum(np.asarray(weight, "float64"))
        assert np.sum(table) == pytest.approx(total)


# ---------------------------------------------------------------------------- readouts


def check_information(info):
    assert is_in(info.entropy, 0.0, 50.0)
    for value in (info.value, info.raw, info.null):
        assert is_in(value, 0.0, info.entropy, 1e-5)
    assert is_in(info.stderr, 0.0, np.inf)
    assert is_in(info.accessible, 0.0, info.entropy, 1e-5)
    assert is_in(info.noise, 0.0, np.inf)


# Exactly float32, or NumPy before 2 takes them for others than are drawn.
EXTREME = [float(np.float32(value)) for value in (3e38, -3e38, 1e-45, 0.0)]
# Few shapes: each is compiled.
activations = mostly(
    st.one_of(
        arrays(st.sampled_from([(7, 3), (7, 2), (7, 1)])),
        arrays((7, 3), st.just("float32"), st.floats(0, 1, width=32)),
        arrays((7, 3), st.just("float32"), st.sampled_from(EXTREME)),
    ),
    st.one_of(
        arrays(st.sampled_from([(7,), (7, 2, 3), (0,), (1, 3), (0, 3), (7, 0)])),
        arrays((7, 3), odd_dtypes),
        anything,
        st.lists(arrays((7, 2), st.just("float32")), max_size=2),
        st.just([[1, 2], [3]]),
    ),
)
class_ids = mostly(
    arrays(st.sampled_from([(7,), (7, 1)]), within=st.integers(0, 1)),
    st.one_of(
        arrays((7,), st.just("int64"), st.integers(0, 2)),
        arrays(st.sampled_from([(7,), (1,), (0,)])),
        odd_arrays,
    ),
)
classes = mostly(st.sampled_from([2, 3]))


@fuzz(200)
@given(mostly(st.booleans()), activations, class_ids, classes)
def test_predictions(from_logits, outputs, labels, num_classes):
    readout = tried(
        "readouts.Predictions",
        lambda: readouts.Predictions(from_logits),
        "from_logits",
    )
    if readout is None:
        return
    info = tried(
        "readouts.Predictions.measure",
        lambda: readout.measure(outputs, labels, num_classes),
        *("outputs", "class_ids", "num_classes"),
    )
    if info is not None:
        check_information(info)
        assert info.bound_stderr >= 0 or math.isnan(info.bound)


def try_layer_readout(cls, arguments, layer, labels, num_classes):
    name = f"readouts.{cls.__name__}"
    readout = tried(name, lambda: cls(**arguments), *arguments)
    if readout is None:
        return
    info = tried(
        f"{name}.measure",
        lambda: readout.measure(layer, labels, num_classes),
        *("activations", "features", "class_ids", "num_classes"),
    )
    if info is not None:
        check_information(info)


@fuzz(60)
@given(
    mostly(st.sampled_from([1, 256])),
    mostly(st.just(0)),
    *(activations, class_ids, classes),
)
def test_linear_readout(sketch, seed, layer, labels, num_classes):
    arguments = {"sketch": sketch, "seed": seed}
    try_layer_readout(readouts.LinearReadout, arguments, layer, labels, num_classes)


@fuzz(60)
@given(
    mostly(st.sampled_from([2, 16])),
    mostly(st.sampled_from(["mean", "max", None])),
    *(activations, class_ids, classes),
)
def test_unit_histogram(bins, reduce, layer, labels, num_classes):
    arguments = {"bins": bins, "reduce": reduce}
    try_layer_readout(readouts.UnitHistogram, arguments, layer, labels, num_classes)


# ---------------------------------------------------------------------------- policies

POLICIES = [policies.RelativeChange, policies.ReferenceLevel, policies.ThresholdDecay]
fields = st.one_of(
    arrays((2,), st.just("float64"), st.sampled_from([0.0, 1e-300, 1e-38, 3e38])),
    arrays((2,), st.just("float64"), floats),
    odd_arrays,
)
plausible = st.one_of(st.floats(1e-6, 1), st.floats(0, 10))


@fuzz(200)
@given(st.sampled_from(POLICIES), st.data())
def test_policy_constants(policy, data):
    value = mostly(st.one_of(plausible, st.integers(0, 9)))
    names = data.draw(st.lists(st.sampled_from(policy._constants), unique=True))
    constants = {name: data.draw(value) for name in names}
    made = tried(
        f"policies.{policy.__name__}", lambda: policy(**constants), *policy._constants
    )
    if made is None:
        return
    assert made.get_config() | constants == made.get_config()
    reading = policies.Reading(
        *np.array([[0.1, 0.2], [0.1, 0.2], [0.1, 0.2], [0.5, 1.0], [0.5, 0.1]]),
        *np.array([[0.5, 1.0], [2.0, 2.0], [0.0, 0.1]]),
        *(3, 9, 0),
    )
    rates = tried(
        f"policies.{policy.__name__} called", lambda: made(reading), "reading"
    )
    assert rates.shape == (2,)
    assert is_in(rates, 0.0, np.inf)


@fuzz(300)
@given(st.sampled_from(POLICIES), st.data())
def test_policies_on_readings(policy, data):
    arrays_of = (*policies.Reading._fields[:8], "bound")
    value = arrays((2,), st.just("float64"), st.floats(1e-9, 10))
    values = {name: data.draw(value) for name in arrays_of}
    absurd = data.draw(st.lists(st.sampled_from(arrays_of), max_size=2))
    values |= {name: data.draw(fields) for name in absurd}
    number = mostly(st.integers(0, 30))
    reading = policies.Reading(
        **values,
        step=data.draw(number),
        steps=data.draw(st.one_of(st.none(), number)),
        rollbacks=data.draw(number),
        searched=data.draw(mostly(st.booleans())),
    )
    rates = tried(
        f"policies.{policy.__name__} called", lambda: policy()(reading), "reading"
    )
    if rates is not None:
        assert rates.shape == np.shape(reading.rate)
        assert is_in(rates, 0.0, np.inf)


@fuzz(50)
@given(st.one_of(anything, st.sampled_from(["decay", "relative", "reference"])))
def test_policy_by_name(identifier):
    policy = tried("policies.get", lambda: policies.get(identifier), "policy")
    assert policy is None or callable(policy)


# ------------------------------------------------------------------------------ metric


@fuzz(100)
@given(
    mostly(st.just("mutual_information")),
    mostly(st.sampled_from([None, "float16", "float32", "mixed_bfloat16"])),
    mostly(st.booleans()),
)
def test_metric_arguments(name, dtype, from_logits):
    metric = tried(
        "MutualInformation",
        lambda: keras_milr.MutualInformation(name, dtype, from_logits),
        *("name", "dtype", "from_logits"),
    )
    assert metric is None or float(metric.result()) == 0


@fuzz(200)
@given(
    class_ids,
    activations,
    mostly(st.one_of(st.none(), arrays((7,), within=st.integers(0, 2))), odd_arrays),
)
def test_metric_updates(labels, outputs, weight):
    metric = keras_milr.MutualInformation()
    entry = "MutualInformation.update_state"

    def update():
        metric.update_state(labels, outputs, weight)
        return metric.result()

    nats = tried(entry, update, "y_true", "y_pred", "sample_weight")
    if nats is not None:
        assert is_in(nats, 0.0, np.log(3))


# --------------------------------------------------------------------------- optimizer


def make_model(optimizer="sgd", loss="sparse_categorical_crossentropy"):
    """Runs eagerly: nothing is compiled for each example."""
    model = keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(4, activation="relu", name="hidden"),
            keras.layers.Dense(2, activation="softmax", name="head"),
        ]
    )
    model.compile(optimizer, loss, run_eagerly=True)
    return model


layer_names = st.one_of(
    st.sampled_from(["hidden", "head", ".*", "h.*", "(", "", "nobody"]), anything
).filter(lambda x: getattr(type(x), "__hash__", None) is not None and hash_works(x))


def hash_works(x):
    try:
        hash(x)
    except TypeError:
        return False
    return True


multipliers = mostly(
    st.dictionaries(
        st.sampled_from(["hidden", "head", ".*", "h.*"]),
        mostly(st.floats(0, 10)),
        max_size=2,
    ),
    st.one_of(st.none(), st.dictionaries(layer_names, floats, max_size=2), anything),
)


OPTIMIZER = {
    "inner_optimizer": mostly(st.just("adam")),
    "multipliers": multipliers,
    "layer_decay": st.one_of(st.none(), st.floats(0, 1), anything),
    "layer_order": st.one_of(
        st.just(["hidden", "head"]), st.lists(layer_names, max_size=3), anything
    ),
    "name": mostly(st.none()),
}


@fuzz(150)
@given(st.data())
def test_layerwise_optimizer(data):
    arguments = {"inner_optimizer": "sgd", "layer_decay": 0.5}
    arguments |= chosen(data, OPTIMIZER, 2)

    def make():
        optimizer = keras_milr.LayerwiseOptimizer(**arguments)
        optimizer.build(make_model().trainable_variables)
        return optimizer.multipliers

    found = tried("LayerwiseOptimizer", make, *OPTIMIZER)
    if found is not None:
        assert list(found) == ["hidden", "head"]
        assert is_in(list(found.values()), 0.0, np.inf)


@fuzz(100)
@given(multipliers)
def test_set_multipliers(values):
    optimizer = keras_milr.LayerwiseOptimizer("sgd")
    optimizer.build(make_model().trainable_variables)

    def change():
        optimizer.set_multipliers(values)
        return optimizer.multipliers

    found = tried("LayerwiseOptimizer.set_multipliers", change, "multipliers")
    if found is None:
        assert optimizer.multipliers == {"hidden": 1.0, "head": 1.0}
    else:
        assert is_in(list(found.values()), 0.0, np.inf)


# -------------------------------------------------------------- callback and range test


def samples(n=24, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    x = rng.normal(size=(n, 3)) + labels[:, None]
    return x.astype("float32"), labels


DATA = mostly(
    st.one_of(
        st.just(samples()),
        st.tuples(st.just(samples()[0]), arrays((24,), within=st.integers(0, 1))),
        st.tuples(*map(st.just, samples()), arrays((24,), within=st.integers(0, 3))),
        st.lists(st.just(samples()), min_size=1, max_size=2).map(iter),
    ),
    st.one_of(
        st.tuples(arrays((24, 3)), st.just(samples()[1])),
        st.tuples(st.just(samples()[0]), odd_arrays),
        st.tuples(odd_arrays, st.just(samples()[1])),
        st.tuples(*map(st.just, samples()), st.one_of(arrays((24,)), odd_arrays)),
        st.lists(odd_arrays, max_size=2).map(iter),
        odd_arrays,
    ),
)


CALLBACK = {
    "policy": mostly(
        st.sampled_from(["decay", "relative", "reference"]),
        st.one_of(anything, anything.map(lambda x: lambda reading: x)),
    ),
    "probe_data": DATA,
    "probe_size": mostly(st.integers(2, 50)),
    "layers": mostly(
        st.sampled_from([None, "all", "hidden", ["head"], {"a": "hidden"}]),
        st.one_of(
            layer_names,
            st.lists(layer_names, max_size=2),
            st.dictionaries(layer_names, layer_names, max_size=2),
        ),
    ),
    "readout": mostly(
        st.sampled_from(
            ["auto", readouts.Predictions(), readouts.UnitHistogram(bins=2)]
        )
    ),
    "learning_rate": mostly(st.one_of(st.none(), st.floats(1e-5, 1), st.just("auto"))),
    "min_lr": mostly(st.floats(0, 1e-3)),
    "max_lr": mostly(st.one_of(st.none(), st.floats(1e-3, 1))),
    "reference": mostly(
        st.one_of(st.none(), st.floats(0.1, 2), anything.map(lambda x: lambda info: x))
    ),
    "update_freq": mostly(st.one_of(st.just("epoch"), st.integers(1, 3))),
    "rollback": mostly(st.booleans()),
    "monitor": st.one_of(st.none(), st.just("mutual_information"), anything),
    "seed": st.one_of(st.integers(0, 3), anything),
    "verbose": mostly(st.just(0)),
}


@fuzz(300)
@given(st.data())
def test_callback_arguments(data):
    arguments = {"probe_data": samples()} | chosen(data, CALLBACK)
    callback = tried(
        "MutualInformationLR",
        lambda: keras_milr.MutualInformationLR(**arguments),
        *CALLBACK,
    )
    if callback is not None:
        assert callback.history == []


@fuzz(40)
@given(st.data())
def test_callback_in_fit(data):
    """What passes the constructor is refused before a step, or trains."""
    arguments = {"probe_data": samples()} | chosen(data, CALLBACK, 2)
    try:
        callback = keras_milr.MutualInformationLR(**arguments)
    except (TypeError, ValueError):
        return
    layers = arguments.get("layers")
    optimizer = keras_milr.LayerwiseOptimizer("sgd") if layers is not None else "sgd"
    model = make_model(optimizer)
    names = (*CALLBACK, "x", "activations")

    def train():
        return model.fit(*samples(), 4, 1, verbose=0, callbacks=[callback])

    history = tried("MutualInformationLR in fit", train, *names)
    rate = float(model.optimizer.learning_rate)
    if history is None:
        assert int(model.optimizer.iterations) == 0
    else:
        assert is_in(history.history["learning_rate"], 0.0, np.inf)
        assert all(np.all(np.isfinite(w)) for w in model.get_weights())
    assert math.isfinite(rate)


RANGE = {
    "x": mostly(arrays((24, 3), within=st.integers(0, 9)), odd_arrays | DATA),
    "y": mostly(arrays((24,), within=st.integers(0, 1)), odd_arrays),
    "candidates": mostly(
        st.lists(st.floats(1e-4, 1), min_size=1, max_size=3),
        st.one_of(st.lists(anything, max_size=3), odd_arrays),
    ),
    "steps": mostly(st.integers(1, 3)),
    "batch_size": mostly(st.integers(1, 30)),
    "layers": mostly(st.sampled_from([None, "hidden", [".*"]]), layer_names),
    "probe_size": mostly(st.integers(4, 30)),
    "seed": st.one_of(st.integers(0, 3), anything),
    "verbose": mostly(st.just(0)),
    "sample_weight": mostly(arrays((24,), within=st.integers(0, 9)), odd_arrays),
    "class_weight": mostly(
        st.dictionaries(st.integers(0, 2), mostly(st.floats(0, 9))), odd_arrays
    ),
    "max_steps": st.one_of(st.none(), st.integers(1, 9), anything),
}


@fuzz(60)
@given(st.data())
def test_range_test(data):
    x, y = samples()
    arguments = {"x": x, "y": y, "candidates": [0.01, 0.1], "verbose": 0}
    arguments |= chosen(data, RANGE)
    if "max_steps" not in arguments:
        arguments.setdefault("steps", 1)
    layers = arguments.get("layers")
    model = make_model(keras_milr.LayerwiseOptimizer("sgd") if layers else "sgd")
    before = model.get_weights()
    found = tried(
        "lr_range_test", lambda: keras_milr.lr_range_test(model, **arguments), *RANGE
    )
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    if found is not None:
        assert 0 < found.min_lr <= found.best_lr <= found.peak_lr <= found.max_lr
        assert math.isfinite(found.max_lr)
        known = found.information[~np.isnan(found.information)]
        assert is_in(known, 0.0, found.entropy)


@fuzz(30)
@given(st.one_of(anything, st.sampled_from([make_model, keras.Model(), samples()])))
def test_range_test_of_no_model(model):
    tried("lr_range_test", lambda: keras_milr.lr_range_test(model, *samples()), "model")


# ------------------------------------------------------------------------------- plots

LOGS = ("learning_rate", "probe_information", "probe_mutual_information", "loss")
LOGS += ("mutual_information", "val_mutual_information", "learning_rate/a")
LOGS += ("probe_mutual_information/a",)


@fuzz(40)
@given(
    mostly(
        st.just({key: [0.1, 0.2] for key in LOGS}),
        st.dictionaries(
            st.sampled_from(LOGS), mostly(st.lists(floats, min_size=2, max_size=2))
        ),
    ),
    mostly(st.none()),
)
def test_plot_history(logs, other):
    history = keras.callbacks.History()
    history.history, history.epoch = logs, [0, 1]
    of = history if other is None else other
    figure = tried("plot_history", lambda: keras_milr.plot_history(of), "history")
    if figure is not None:
        assert len(figure.axes) >= 2
        figure.clear()
        import matplotlib.pyplot as plt

        plt.close(figure)
