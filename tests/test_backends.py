"""What the backends of Keras must have in common, and what is special about one."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from sklearn.metrics import mutual_info_score

import keras_milr
from keras_milr import backend, layers, probe, sampling
from keras_milr.readouts import LinearReadout, Predictions
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
    with pytest.warns(UserWarning, match="are back at the last good reading"):
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


@pytest.mark.backends("torch", reason="its tensors know gradients")
def test_a_reading_leaves_no_gradients(digits):
    model = make_model()
    sample = sampling.draw_sample(digits, model, 500)
    probe.Probe(
        *(model, sample, Predictions()), layers.choose(model, "all"), LinearReadout()
    ).measure()
    assert all(v.value.grad is None for v in model.trainable_variables)
