"""What the backends of Keras must have in common, and what is special about one."""

import contextlib
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from sklearn.metrics import mutual_info_score

import keras_milr
from keras_milr import backend, layers, probe, sampling
from keras_milr._keras import all_layers
from keras_milr.readouts import Information, LinearReadout, Predictions
from keras_milr.rollback import Rollback, Way
from tests import backends, reference

PLAIN = pytest.mark.backends("jax", "torch", reason="TensorFlow is the backend")


def python(script, **environment):
    return subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


# ------------------------------------------------------------------ the same values


def full_precision():
    """Context in which a model on a GPU of JAX computes in float32 throughout."""
    if keras.backend.backend() != "jax":
        return contextlib.nullcontext()
    import jax

    return jax.default_matmul_precision("float32")


@pytest.mark.supports("Backends", "readings as plain NumPy's")
def test_readings_are_those_of_plain_numpy(digits):
    """Of a network with given weights, which each backend must read as NumPy does.

    So two backends differ by at most twice the tolerance: 1e-5 nats at the output and
    1e-4 in a layer; 2e-3 in counts of a layer, where one sample between two classes
    may fall on either side.
    """
    x, y = digits
    images, rng = x.reshape(-1, 8, 8), np.random.default_rng(0)
    weights = [
        rng.normal(size=(3, 3, 1, 4)),
        rng.normal(size=4),
        rng.normal(size=(144, 24)) / 12,
        rng.normal(size=24),
    ]
    _, second, _ = reference.cnn(images, *weights, np.zeros((24, 10)))
    weights.append(8 * np.linalg.lstsq(second, np.eye(10)[y], rcond=None)[0])
    weights = [w.astype("float32") for w in weights]
    *hidden, p = reference.cnn(images.astype("float64"), *weights)

    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(4, 3, activation="tanh", name="conv"),
            keras.layers.Flatten(),
            keras.layers.Dense(24, activation="tanh", name="hidden"),
            keras.layers.Dense(10, "softmax", use_bias=False, name="out"),
        ]
    )
    model.compile("adam", "sparse_categorical_crossentropy")
    model.set_weights(weights)
    sample = sampling.draw_sample((images[..., None], y), model, 10_000)
    groups = layers.choose(model, ["conv", "hidden"])
    measuring = probe.Probe(model, sample, Predictions(), groups, LinearReadout())
    with full_precision():
        output, by_layer = measuring.measure()

    predicted, entropy = p.argmax(axis=1), reference.entropy(np.bincount(y))
    table = reference.contingency(predicted, y, 10, 10)
    bound, stderr = reference.h_minus_ce(p, y)
    expected = {
        "value": reference.mutual_information(table, "miller_madow"),
        "raw": mutual_info_score(y, predicted),
        "entropy": entropy,
        "stderr": reference.standard_error(table),
        "bound": bound,
        "bound_stderr": stderr,
        "cross_entropy": entropy - bound,
        "variation": np.ptp(p, axis=0).max(),
    }
    for field, value in expected.items():
        assert getattr(output, field) == pytest.approx(value, abs=1e-5), field
    assert 1.0 < output.value < 2.2  # It says something.

    convolved = reference.averaged(reference.averaged(hidden[0], 1, 4), 2, 4)
    for found, features in zip(by_layer, (convolved, hidden[1]), strict=True):
        p = reference.linear_readout(features.reshape(len(y), -1), y, 10)
        assert found.bound == pytest.approx(reference.h_minus_ce(p, y)[0], abs=1e-4)
        raw = mutual_info_score(y, p.argmax(axis=1))
        assert found.raw == pytest.approx(raw, abs=2e-3)


# --------------------------------------------------------- in the middle of an epoch


def make_model(layerwise=False):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(16, activation="relu", name="body"),
            keras.layers.Dense(10, activation="softmax", name="head"),
        ]
    )
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
    if layerwise:
        optimizer = keras_milr.LayerwiseOptimizer(optimizer)
    model.compile(optimizer, "sparse_categorical_crossentropy")
    return model


def batches(data, number):
    return [tuple(a[50 * i : 50 * (i + 1)] for a in data) for i in range(number)]


def fit(model, data, callbacks, number, epochs=1):
    x, y = (a[: 50 * number] for a in data)
    options = {"batch_size": 50, "shuffle": False, "verbose": 0}
    return model.fit(x, y, epochs=epochs, callbacks=callbacks, **options)


def information(model, data):
    return mutual_info_score(data[1], model.predict(data[0], verbose=0).argmax(axis=1))


def assert_same_state(first, second):
    for name in ("model", "optimizer"):
        values = [
            [keras.ops.convert_to_numpy(v) for v in part.variables]
            for part in (
                (first, second)
                if name == "model"
                else (first.optimizer, second.optimizer)
            )
        ]
        for a, b in zip(*values, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.supports("Backends", "layer-wise rates exact")
@pytest.mark.parametrize("chosen", [None, "all"])
def test_readings_and_rates_within_an_epoch(digits, chosen):
    """Each reading is of the weights of that moment; its rates train the next batch."""
    factors = np.array([0.5]) if chosen is None else np.array([0.5, 0.25])
    callback = keras_milr.MutualInformationLR(
        *(lambda reading: reading.rate * factors, digits),
        layers=chosen,
        probe_size=10_000,
        update_freq=3,
    )
    model, twin = make_model(chosen is not None), make_model(chosen is not None)
    fit(model, digits, [callback], number=8, epochs=2)

    expected = [information(twin, digits)]
    for count, (x, y) in enumerate(2 * batches(digits, 8), start=1):
        twin.train_on_batch(x, y)
        if count % 3 == 0:
            expected.append(information(twin, digits))
            power = count // 3
            if chosen is None:
                twin.optimizer.learning_rate = 0.1 * 0.5**power
            else:
                twin.optimizer.set_multipliers(
                    {"body": 0.5**power, "head": 0.25**power}
                )
    found = [(r if chosen is None else r["output"])["raw"] for r in callback.history]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert len(set(np.round(expected, 3))) > 3
    assert_same_state(model, twin)


class Poison(keras.callbacks.Callback):
    """Spoils the weights after a batch."""

    def __init__(self, batch):
        super().__init__()
        self.batch = batch

    def on_train_batch_end(self, batch, logs=None):
        if batch == self.batch:
            kernel = self.model.layers[-1].kernel
            kernel.assign(np.full(kernel.shape, np.nan))


@pytest.mark.supports("Backends", "roll back")
def test_a_roll_back_within_an_epoch(digits):
    """The next batch starts from the weights, velocities and rate that were set."""
    callback = keras_milr.MutualInformationLR(
        lambda reading: reading.rate, digits, update_freq=2
    )
    model, twin = make_model(), make_model()
    with pytest.warns(UserWarning, match="are back at the"):
        fit(model, digits, [Poison(3), callback], number=6)
    # To the start, since little was known, and on with the batches that were left.
    twin.optimizer.learning_rate = 0.01
    for x, y in batches(digits, 6)[4:]:
        twin.train_on_batch(x, y)
    twin.optimizer.iterations.assign(model.optimizer.iterations)
    assert_same_state(model, twin)
    assert callback.history[-1]["rollbacks"] == 1


@pytest.mark.supports("Backends", "new rates compile nothing")
def test_new_rates_compile_nothing_again(digits):
    """Python's code runs no more once compiled; on PyTorch it is all there is."""
    calls = []

    class Traced(keras.layers.Layer):
        def call(self, x):
            calls.append(x.shape[0])
            return x

    model = keras.Sequential([keras.Input((64,)), Traced(), *make_model().layers])
    optimizer = keras_milr.LayerwiseOptimizer("adam")
    model.compile(optimizer, "sparse_categorical_crossentropy")
    callback = keras_milr.MutualInformationLR(
        *(lambda reading: reading.rate * 0.9, digits), layers="all", update_freq=2
    )
    after_first = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: calls.clear() if epoch == 1 else None
    )
    fit(model, digits, [callback, after_first], number=6, epochs=3)
    assert len(callback.history) == 10
    trained, measured = 2 * 6 * 50, 2 * 3 * len(digits[0])
    if backends.NAME == "torch":
        assert calls.count(50) == trained / 50
        assert sum(calls) - trained >= measured
    else:
        assert not calls


# ------------------------------------------------------------------- what is imported


TRAIN = """
import sys
import keras
import numpy as np

names = {"tensorflow", "jax", "torch"}
keras_needs = names.intersection(sys.modules)
import keras_milr

rng = np.random.default_rng(0)
x = rng.normal(size=(320, 8)).astype("float32")
y = (x[:, 0] > 0).astype("int32")
layers = [keras.layers.Dense(8, "relu"), keras.layers.Dense(2, "softmax")]
model = keras.Sequential([keras.Input((8,)), *layers])
metrics = [keras_milr.MutualInformation()]
optimizer = keras_milr.LayerwiseOptimizer("adam")
model.compile(optimizer, "sparse_categorical_crossentropy", metrics=metrics)
callback = keras_milr.MutualInformationLR(
    probe_data=(x, y), layers="all", learning_rate="auto"
)
model.fit(x, y, epochs=2, verbose=0, callbacks=[callback])
assert len(callback.history) == 3
print(keras.backend.backend(), names.intersection(sys.modules) - keras_needs)
"""


@pytest.mark.slow
@pytest.mark.supports("Backends", "no other backend imported")
def test_no_other_backend_is_imported():
    """Beyond what Keras imports itself, which on PyTorch is JAX where there is one."""
    done = python(TRAIN)
    assert done.stdout == f"{backends.NAME} set()\n", done.stderr


@pytest.mark.backends("jax", reason="Keras' backend for NumPy needs JAX")
def test_a_backend_that_cannot_train():
    done = python("import keras_milr", KERAS_BACKEND="numpy")
    assert "keras_milr works on the backends ('jax', 'tensorflow', 'torch')" in (
        done.stderr
    )


# ------------------------------------------------------------------ data of PyTorch


def loader(data, **options):
    import torch

    tensors = [torch.from_numpy(np.ascontiguousarray(a)) for a in data]
    dataset = torch.utils.data.TensorDataset(*tensors)
    return torch.utils.data.DataLoader(dataset, batch_size=20, **options)


@PLAIN
def test_a_data_loader_is_as_its_arrays(digits):
    data = digits[0][:640], digits[1][:640].astype("int64")
    found = keras_milr.lr_range_test(make_model(), loader(data), verbose=0)
    arrays = keras_milr.lr_range_test(make_model(), *data, batch_size=20, verbose=0)
    for a, b in zip(found[:6], arrays[:6], strict=True):
        np.testing.assert_array_equal(a, b)
    histories = []
    for given in (loader(data), data):
        callback = keras_milr.MutualInformationLR(
            probe_data=given, learning_rate="auto", max_lr=0.1
        )
        model = make_model()
        model.fit(
            loader(data), epochs=2, verbose=0, callbacks=[callback], shuffle=False
        )
        histories.append([r["information"] for r in callback.history])
    assert histories[0][0] == pytest.approx(histories[1][0], abs=1e-6)
    assert histories[0][-1] > 1.0


@PLAIN
@pytest.mark.parametrize("own", [False, True])
def test_a_data_loader_goes_on_shuffling_as_without(digits, own):
    """Its random numbers are its own generator's, or the global one's."""
    import torch

    data = digits[0][:640], digits[1][:640].astype("int64")

    def after(between):
        torch.manual_seed(3)
        generator = torch.Generator().manual_seed(5) if own else None
        shuffled = loader(data, shuffle=True, generator=generator)
        between(shuffled)
        return [y.numpy() for _ in range(2) for _, y in shuffled]

    def test(shuffled):
        keras_milr.lr_range_test(make_model(), shuffled, verbose=0)

    def differs(found):
        return any(np.any(a != b) for a, b in zip(found, expected, strict=True))

    expected = after(lambda shuffled: make_model())
    assert not differs(after(test))
    assert differs(after(lambda shuffled: list(shuffled)))  # It can fail.


@PLAIN
def test_a_sampler_that_cannot_be_copied_is_said(digits):
    import torch

    class Stubborn(torch.utils.data.SequentialSampler):
        def __deepcopy__(self, memo):
            raise TypeError("no copies")

    given = loader(digits, sampler=Stubborn(digits[0]))
    with pytest.warns(UserWarning, match="cannot be copied.*no copies"):
        assert backend.fresh(given) is given


# ------------------------------------------------------------ as a GPU has things


@pytest.mark.parametrize(("n", "size"), [(7, 3), (5_000, 2), (30_000, 2), (5_000, 400)])
def test_sums_by_class(n, size):
    """Few and many values to a sum, which are added up in different ways on a GPU."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, size, n).astype("int32")
    values = rng.integers(1, 4, n).astype("float32")
    expected = np.bincount(ids, values, size)
    tensors = [keras.ops.convert_to_tensor(a) for a in (values, ids)]
    found = backend.jit(backend.class_sums)(*tensors, size)
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(found), expected)
    count = backend.jit(backend.bincount)
    found = keras.ops.convert_to_numpy(count(tensors[1], size, values))
    np.testing.assert_array_equal(found, expected)
    found = keras.ops.convert_to_numpy(count(tensors[1], size))
    np.testing.assert_array_equal(found, np.bincount(ids, minlength=size))


@pytest.mark.parametrize("size", [2, 20_000])
@pytest.mark.parametrize("way", ["as it is", "jit", "compiled", "any length"])
def test_sums_of_millions(way, size):
    """One after the other, a float32 rounds 4 % of them away."""
    ids = np.where(np.arange(2**22) % 50, 0, size - 1).astype("int32")
    values = np.full(2**22, 0.1, "float32")

    def add(values, ids):
        return backend.class_sums(values, ids, size)

    if way == "jit":
        add = backend.jit(add)
    elif way == "compiled":
        add = backends.compiled(add)
    elif way == "any length" and backends.NAME == "tensorflow":
        import tensorflow as tf

        shapes = [tf.TensorSpec((None,), dtype) for dtype in ("float32", "int32")]
        add = tf.function(add, input_signature=shapes)
    # Within a block, a sum is the same as before.
    for n, tolerance in [(2**22, 1e-4 if size == 2 else 2e-3), (3000, 1e-4), (1, 0)]:
        tensors = [keras.ops.convert_to_tensor(a[:n]) for a in (values, ids)]
        found = keras.ops.convert_to_numpy(add(*tensors))
        expected = np.bincount(ids[:n], values[:n].astype("float64"), size)
        np.testing.assert_allclose(found, expected, rtol=tolerance)
        if n <= 3000:
            direct = keras.ops.segment_sum(*tensors, num_segments=size)
            np.testing.assert_array_equal(found, keras.ops.convert_to_numpy(direct))


@pytest.mark.parametrize("compiled", [False, True])
def test_in_turn(compiled):
    def doubled(values):
        return backend.in_turn(lambda x: 2.0 * x, values)

    values = keras.ops.convert_to_tensor(np.arange(4, dtype="float32"))
    found = (backend.jit(doubled) if compiled else doubled)(values)
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(found), [0, 2, 4, 6])


def test_one_trace_for_any_width():
    """And another for another number of rows, and of a Python argument."""
    traced = []

    def moment(x, weight, power):
        traced.append(tuple(x.shape))
        return keras.ops.sum(keras.ops.power(x, power) * weight[:, None], axis=0)

    moments = backend.jit(moment, any_width=True)
    rng = np.random.default_rng(0)
    for rows, width, power in [(9, 5, 2), (9, 3, 2), (9, 8, 2), (7, 5, 2), (9, 3, 3)]:
        x, weight = rng.normal(size=(rows, width)), rng.normal(size=rows)
        tensors = [keras.ops.convert_to_tensor(a, "float32") for a in (x, weight)]
        found = keras.ops.convert_to_numpy(moments(*tensors, power))
        np.testing.assert_allclose(found, weight @ x**power, rtol=1e-4, atol=1e-5)
    if keras.backend.backend() == "tensorflow":
        assert traced == [(9, None), (7, None), (9, None)]


@pytest.mark.backends("jax", reason="it chooses by the platform")
def test_sums_by_class_as_on_a_gpu(monkeypatch):
    import jax

    ids = np.random.default_rng(0).integers(0, 9, 500).astype("int32")
    values = jax.numpy.linspace(1.0, 2.0, 500)
    on_cpu = backend.class_sums(values, jax.numpy.asarray(ids), 9)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    lowered = jax.jit(backend.class_sums, static_argnums=2).lower(values, ids, 9)
    assert "scatter" not in lowered.as_text()
    found = lowered.compile()(values, ids)
    np.testing.assert_allclose(found, on_cpu, rtol=1e-6)


@pytest.mark.backends("torch", reason="it alone refuses")
@pytest.mark.parametrize("layers", [None, "all"])
def test_no_tensor_is_taken_for_an_array(digits, layers, monkeypatch):
    """PyTorch gives a tensor of a GPU to NumPy only when asked to fetch it."""
    import torch

    fetch = torch.Tensor.__array__

    def refuse(tensor, *args, **kwargs):
        # Keras fetches it before, which is nothing to do on a CPU.
        if sys._getframe(1).f_code.co_name == "transform":
            return fetch(tensor, *args, **kwargs)
        raise TypeError("can't convert cuda:0 device type tensor to numpy.")

    monkeypatch.setattr(torch.Tensor, "__array__", refuse)
    with pytest.raises(TypeError, match="cuda:0"):
        np.asarray(torch.zeros(2))
    x, y = digits[0].reshape(-1, 8, 8, 1), digits[1]
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(64, 3, padding="same", activation="relu"),  # Sketched.
            keras.layers.Conv2D(3, 2, strides=2),
            keras.layers.BatchNormalization(),
            keras.layers.Flatten(),
            keras.layers.Dense(10, "softmax"),
        ]
    )
    optimizer = keras.optimizers.Adam()
    if layers:
        optimizer = keras_milr.LayerwiseOptimizer(optimizer)
    model.compile(
        *(optimizer, "sparse_categorical_crossentropy"),
        metrics=[keras_milr.MutualInformation()],
    )
    callback = keras_milr.MutualInformationLR(
        *("decay", (x, y), 500, layers),
        learning_rate=None if layers else "auto",
    )
    model.fit(x[:500], y[:500], epochs=2, verbose=0, callbacks=[callback])
    assert len(callback.history) == 3
    readout = keras_milr.readouts.UnitHistogram()
    labels = torch.as_tensor(y)
    assert readout.measure(x.reshape(-1, 64), labels, 10).value > 0


# --------------------------------------------------------------- modules of PyTorch


@pytest.mark.backends("torch", reason="a model with modules of PyTorch")
def test_modules_of_pytorch_are_in_inference_mode_and_left_as_they_were(digits):
    """They go by their own flag, which the trainer sets once an epoch."""
    import torch

    class Mixed(keras.Model):
        def __init__(self):
            super().__init__()
            self.hidden = keras.layers.Dense(16, activation="relu")
            self.norm = torch.nn.BatchNorm1d(16)
            self.drop = torch.nn.Dropout(0.5)
            self.out = keras.layers.Dense(10, activation="softmax")

        def call(self, x):
            return self.out(self.drop(self.norm(self.hidden(x))))

    model = Mixed()
    # Keras builds it on memory that nobody has written to, which may end up as NaN in
    # the averages of a module; not so on data.
    model(digits[0][:32])
    model.compile("adam", "sparse_categorical_crossentropy")
    model.fit(*digits, epochs=1, verbose=0)
    for training in (True, False):
        sample = sampling.draw_sample(digits, model, 500)
        model.train(training)
        model.drop.train(not training)
        modes = [module.training for module in model.modules()]
        buffers = [b.clone() for b in model.buffers()]
        measuring = probe.Probe(model, sample, Predictions())
        first = measuring.measure()[0]
        assert measuring.measure()[0] == first
        assert modes == [module.training for module in model.modules()]
        for old, new in zip(buffers, model.buffers(), strict=True):
            assert torch.equal(old, new)
    # Not by `predict`: without an argument `training` it leaves them in training mode.
    outputs = keras.ops.convert_to_numpy(model(sample.x, training=False))
    predicted = outputs.argmax(axis=1)
    assert first.raw == pytest.approx(
        mutual_info_score(sample.class_ids, predicted), abs=1e-6
    )


class Counting(keras.layers.Layer):
    """Has buffers of its own, which Keras does not save; replaces one of them."""

    def __init__(self):
        super().__init__()
        import torch

        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("last", torch.zeros(1), persistent=False)

    def call(self, x):
        if x.device.type != "meta":  # Keras finds out shapes.
            self.calls += 1
            self.last = x.detach().mean().reshape(1)
        return x


def with_modules(kind="sequential", rate=0.05):
    import torch

    keras.utils.set_random_seed(0)
    parts = [
        keras.layers.Dense(16, name="hidden"),
        Counting(),
        keras.layers.TorchModuleWrapper(
            torch.nn.Sequential(torch.nn.BatchNorm1d(16), torch.nn.ReLU()),
            output_shape=(None, 16),
        ),
        keras.layers.Dense(10, activation="softmax", name="head"),
    ]
    if kind == "sequential":
        model = keras.Sequential([keras.Input((64,)), *parts])
    elif kind == "functional":
        x = inputs = keras.Input((64,))
        for part in parts:
            x = part(x)
        model = keras.Model(inputs, x)
    else:
        model = Chain(parts)
        model(np.zeros((1, 64)), training=False)
    optimizer = keras.optimizers.SGD(rate, momentum=0.9)
    model.compile(optimizer, "sparse_categorical_crossentropy")
    return model


class Chain(keras.Model):
    def __init__(self, parts):
        super().__init__()
        self.one, self.two, self.three, self.four = parts

    def call(self, x):
        return self.four(self.three(self.two(self.one(x))))


def whole_state(model):
    """Every number of a model with modules of PyTorch, by what PyTorch says of them."""
    (norm,) = (w.module for w in all_layers(model) if hasattr(w, "module"))
    (counting,) = (w for w in all_layers(model) if isinstance(w, Counting))
    values = [*norm.state_dict().values(), counting.calls, counting.last]
    values += [*model.variables, *model.optimizer.variables]
    modes = [module.training for module in [*norm.modules(), counting]]
    return [keras.ops.convert_to_numpy(v).copy() for v in values], modes, norm[0]


def assert_bit_equal(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


MODULES = pytest.mark.backends("torch", reason="a model with modules of PyTorch")


@MODULES
@pytest.mark.supports("Backends", "roll back")
@pytest.mark.parametrize("kind", ["sequential", "functional", "subclassed"])
def test_buffers_of_modules_are_rolled_back(kind, digits):
    """Statistics and whatever else a module keeps, bit for bit, with the weights."""
    model = with_modules(kind)
    model.fit(*digits, epochs=2, verbose=0)
    kept, _, norm = whole_state(model)
    assert norm.num_batches_tracked > 0
    guard = Rollback(model)
    good = Information(1.8, 1.8, np.log(10), 0.0, 0.02)
    guard.keep(good, ["good"])
    held = norm.running_mean
    model.fit(*digits, epochs=1, verbose=0)
    norm.running_var.fill_(np.nan)
    moved = whole_state(model)[0]
    assert sum(np.any(a != b) for a, b in zip(moved, kept, strict=True)) > 8
    assert guard.restore() == (["good"], Way.CUT, "the last good reading")
    assert_bit_equal(whole_state(model)[0], kept)
    assert norm.running_mean is held  # Others may hold it too.


@MODULES
def test_after_a_roll_back_statistics_are_finite(digits):
    """NaN in a batch is in the running averages for ever."""
    model = with_modules()
    callback = keras_milr.MutualInformationLR(lambda reading: reading.rate, digits)
    norm = whole_state(model)[2]

    class Spoil(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                norm.running_mean.fill_(np.nan)
                kernel = self.model.layers[-1].kernel
                kernel.assign(np.full(kernel.shape, np.nan))

    with pytest.warns(UserWarning, match="are back at the"):
        model.fit(*digits, epochs=4, verbose=0, callbacks=[callback, Spoil()])
    assert all(np.all(np.isfinite(value)) for value in whole_state(model)[0])
    assert callback.history[-1]["information"] > 1.5


@MODULES
@pytest.mark.supports("Backends", "range test without a trace")
@pytest.mark.parametrize("kind", ["sequential", "subclassed"])
def test_the_range_test_leaves_modules_as_they_were(kind, digits):
    model = with_modules(kind)
    model.train_on_batch(*(a[:64] for a in digits))
    for training in (True, False):
        values, _, norm = whole_state(model)
        norm.train(training)
        expected = [norm.training]
        keras_milr.lr_range_test(model, *digits, verbose=0)
        assert_bit_equal(whole_state(model)[0], values)
        assert [norm.training, norm.momentum] == [*expected, 0.1]


@MODULES
def test_a_reading_leaves_modules_as_they_were(digits):
    """Also what counts in inference mode."""
    model = with_modules()
    model.fit(*digits, epochs=1, verbose=0)
    values, modes, _ = whole_state(model)
    sample = sampling.draw_sample(digits, model, 500)
    probe.Probe(model, sample, Predictions()).measure()
    found = whole_state(model)
    assert_bit_equal(found[0], values)
    assert found[1] == modes


@MODULES
def test_the_range_test_reads_a_module_as_keras_own_layer(digits):
    """Batch normalisation by the statistics of a batch, as in training."""
    found = []
    for own in (True, False):
        model = with_modules()
        if own:
            norm = keras.layers.BatchNormalization(momentum=0.9, epsilon=1e-5)
            layers = [norm, keras.layers.ReLU(), model.layers[-1]]
            twin = keras.Sequential([keras.Input((64,)), model.layers[0], *layers])
            twin.compile(keras.optimizers.SGD(0.05, momentum=0.9), model.loss)
            model = twin
        found.append(
            keras_milr.lr_range_test(
                *(model, *digits), candidates=[1e-3, 1e-2, 0.1], steps=8, verbose=0
            )
        )
    np.testing.assert_allclose(found[0].loss, found[1].loss, rtol=1e-3)
    np.testing.assert_allclose(found[0].information, found[1].information, atol=1e-3)
    assert found[1].information[-1] > 1.0


@MODULES
@pytest.mark.supports("Backends", "resuming after a kill")
@pytest.mark.supports("Company", "BackupAndRestore", "ModelCheckpoint")
@pytest.mark.supports("Training options", "initial_epoch")
@pytest.mark.parametrize("by", ["backup", "checkpoint"])
def test_buffers_of_modules_are_resumed(by, digits, tmp_path):
    """Those that Keras saves, and those that it does not, which ride with the state."""

    class Killed(BaseException):
        pass

    def die(epoch, logs=None):
        if epoch == 3:
            raise Killed

    def run(folder, *others, first=0):
        model = with_modules()
        callback = keras_milr.MutualInformationLR("relative", digits)
        keeper = keras.callbacks.BackupAndRestore(folder)
        if by == "checkpoint":
            path = str(folder / "{epoch}.weights.h5")
            keeper = keras.callbacks.ModelCheckpoint(path, save_weights_only=True)
        if first:
            model.optimizer.build(model.trainable_variables)
            model.load_weights(folder / f"{first}.weights.h5")
            callback.load_state(folder / f"{first}.weights.h5")
        callbacks = [callback, keeper, *others]
        options = {"epochs": 5, "initial_epoch": first, "shuffle": False, "verbose": 0}
        model.fit(*digits, callbacks=callbacks, **options)
        return model, [record["rate"] for record in callback.history]

    expected = run(tmp_path / "alone")
    folder = tmp_path / "killed"
    with pytest.raises(Killed):
        run(folder, keras.callbacks.LambdaCallback(on_epoch_begin=die))
    found = run(folder, first=3 if by == "checkpoint" else 0)
    assert found[1] == expected[1]
    assert len(set(found[1])) > 3
    assert_bit_equal(whole_state(found[0])[0], whole_state(expected[0])[0])


@MODULES
def test_buffers_that_keras_does_not_save(digits, tmp_path):
    """Without the callback. If this fails, Keras has learned it."""
    model, other = with_modules(), with_modules()
    model.fit(*digits, epochs=1, verbose=0)
    model.save_weights(tmp_path / "plain.weights.h5")
    other.optimizer.build(other.trainable_variables)
    other.load_weights(tmp_path / "plain.weights.h5")
    norms = [whole_state(one)[2] for one in (model, other)]
    means = [keras.ops.convert_to_numpy(norm.running_mean) for norm in norms]
    np.testing.assert_array_equal(*means)
    calls = [one.calls for one in all_layers(other) if isinstance(one, Counting)]
    assert [int(n) for n in calls] == [0]
    assert [b.saved for b in backend.buffers(model)].count(False) == 2


@pytest.mark.backends("torch", reason="its tensors know gradients")
def test_a_reading_leaves_no_gradients(digits):
    model = make_model()
    sample = sampling.draw_sample(digits, model, 500)
    probe.Probe(
        *(model, sample, Predictions()), layers.choose(model, "all"), LinearReadout()
    ).measure()
    assert all(v.value.grad is None for v in model.trainable_variables)
