"""Readings of batch normalisation, as the network is in training."""

import keras
import numpy as np
import pytest

import keras_milr
from keras_milr import layers, probe, sampling
from keras_milr.readouts import LinearReadout, Predictions
from tests.backends import draw, noise

K = keras.layers


class Called(keras.Model):
    """Calls a layer in inference mode, whatever mode it is in itself."""

    def __init__(self, norm, calls_frozen):
        super().__init__()
        self.norm, self.calls_frozen = norm, calls_frozen
        self.hidden = K.Dense(24, name="hidden")
        self.drop = K.Dropout(0.5)
        self.head = K.Dense(10, activation="softmax", name="head")

    def call(self, x):
        mode = {"training": False} if self.calls_frozen else {}
        return self.head(self.drop(self.norm(self.hidden(x), **mode)))


def make(kind="training", **compile_arguments):
    keras.utils.set_random_seed(0)
    norm = K.BatchNormalization(name="norm")
    norm.trainable = kind != "frozen"
    if kind == "module":
        import torch

        norm = torch.nn.BatchNorm1d(24, eps=1e-3)
    if kind in ("called", "module"):
        model = Called(norm, kind == "called")
        model(np.zeros((2, 64), "float32"), training=False)
    else:
        head = K.Dense(10, activation="softmax", name="head")
        body = [K.Dense(24, name="hidden"), norm, K.Dropout(0.5)]
        model = keras.Sequential([keras.Input((64,)), *body, head])
    model.compile("adam", "sparse_categorical_crossentropy", **compile_arguments)
    return model


def normalised(model, x, order=None):
    """Hidden units in plain NumPy, by the statistics of two batches, or by averages."""
    named = {layer.name: layer for layer in model.layers}
    hidden, norm = named["hidden"], named["norm"]
    kernel, bias = (keras.ops.convert_to_numpy(w) for w in hidden.weights)
    gamma, beta, mean, variance = (
        keras.ops.convert_to_numpy(w)
        for w in (norm.gamma, norm.beta, norm.moving_mean, norm.moving_variance)
    )
    h = x.astype("float64") @ kernel + bias
    statistics = [(mean, variance)] * 2
    batches = [np.arange(len(x))[:256], np.arange(len(x))[256:]]
    if order is not None:
        batches = [order[:256], order[256:]]
        statistics = [(h[rows].mean(0), h[rows].var(0)) for rows in batches]
    out = np.empty_like(h)
    for rows, (mean, variance) in zip(batches, statistics, strict=True):
        scaled = (h[rows] - mean) / np.sqrt(variance + norm.epsilon)
        out[rows] = scaled * gamma + beta
    return out


def cross_entropy(model, hidden, y):
    kernel, bias = (keras.ops.convert_to_numpy(w) for w in model.layers[-1].weights)
    scores = hidden @ kernel + bias
    scores -= np.log(np.exp(scores).sum(1, keepdims=True))
    return -scores[np.arange(len(y)), y].mean()


def state_of(model):
    return [keras.ops.convert_to_numpy(v).copy() for v in model.variables]


ORDER = np.random.default_rng(0).permutation(512)  # That of the probe.


@pytest.mark.parametrize("kind", ["training", "frozen", "called"])
@pytest.mark.parametrize("options", [{}, {"run_eagerly": True}], ids=str)
def test_by_the_batches_where_training_goes_by_them(kind, options, digits):
    """And by the averages where it does; dropout drops nothing."""
    model = make(kind, **options)
    model.fit(*digits, epochs=1, verbose=0)
    sample = sampling.draw_sample(digits, model, 512)
    measuring = probe.Probe(model, sample, Predictions())
    before = state_of(model)
    found = [measuring.measure(by_batch)[0] for by_batch in (True, True, False)]
    for old, new in zip(before, state_of(model), strict=True):
        np.testing.assert_array_equal(old, new)
    assert found[0] == found[1]
    # What is the same is not read twice.
    assert measuring.has_averages is (kind == "training")
    y = sample.class_ids
    by_averages = cross_entropy(model, normalised(model, sample.x), y)
    assert found[2].cross_entropy == pytest.approx(by_averages, rel=1e-4)
    by_batch = cross_entropy(model, normalised(model, sample.x, ORDER), y)
    expected = by_batch if kind == "training" else by_averages
    assert found[0].cross_entropy == pytest.approx(expected, rel=1e-4)
    assert by_batch < by_averages - 0.1  # They lag.


def test_layers_in_the_order_of_the_sample(digits):
    model = make()
    model.compile(
        keras_milr.LayerwiseOptimizer("adam"), "sparse_categorical_crossentropy"
    )
    model.fit(*digits, epochs=1, verbose=0)
    sample = sampling.draw_sample(digits, model, 512)
    groups = layers.choose(model, "norm")
    measuring = probe.Probe(model, sample, None, groups, LinearReadout())
    for by_batch, order in ((True, ORDER), (False, None)):
        (found,) = measuring.measure(by_batch)[1]
        hidden = normalised(model, sample.x, order).astype("float32")
        expected = LinearReadout().measure(hidden, sample.class_ids, 10)
        assert found.value == pytest.approx(expected.value, abs=2e-3)


def test_a_probe_that_is_sorted_by_class(digits):
    """A batch of one class would have other statistics than any in training."""
    order = np.argsort(digits[1], kind="stable")
    ordered = digits[0][order], digits[1][order]
    model = make()
    model.fit(*digits, epochs=3, verbose=0)
    found = []
    for data in (digits, ordered):
        sample = sampling.draw_sample(data, model, 512)
        found.append(probe.Probe(model, sample).measure(by_batch=True)[0])
    assert found[0].cross_entropy == pytest.approx(found[1].cross_entropy, abs=0.05)
    sample = sampling.draw_sample(ordered, model, 512)
    as_it_is = normalised(model, sample.x, np.arange(512))
    bad = cross_entropy(model, as_it_is, sample.class_ids)
    assert bad > found[1].cross_entropy + 0.1


def test_readings_go_by_batches_and_logs_by_averages(digits):
    model = make()
    callback = keras_milr.MutualInformationLR("relative", digits, probe_size=512)
    logs = model.fit(*digits, epochs=2, verbose=0, callbacks=[callback]).history
    sample = sampling.draw_sample(digits, model, 512)
    y, nats = sample.class_ids, callback.history[-1]["entropy"]
    read = cross_entropy(model, normalised(model, sample.x, ORDER), y)
    shown = cross_entropy(model, normalised(model, sample.x), y)
    assert callback.history[-1]["cross_entropy"] == pytest.approx(read, rel=1e-4)
    assert callback.history[-1]["bound"] == pytest.approx(nats - read, rel=1e-3)
    value = logs["probe_mutual_information"][-1]
    information = max(nats - shown, value)
    assert logs["probe_information"][-1] == pytest.approx(information, rel=1e-3)
    assert information != pytest.approx(callback.history[-1]["information"], rel=1e-3)


def test_a_model_that_trains_with_its_labels_as_inputs(digits):
    class Teacher(keras.Model):
        def __init__(self):
            super().__init__()
            self.norm, self.head = K.BatchNormalization(), K.Dense(10, "softmax")

        def call(self, x, labels=None, training=False):
            if training and labels is None:
                raise RuntimeError("no labels")
            return self.head(self.norm(x, training=training))

    model = Teacher()
    model(digits[0][:2])
    model.compile("adam", "sparse_categorical_crossentropy")
    sample = sampling.draw_sample(digits, model, 512)
    measuring = probe.Probe(model, sample)
    with pytest.warns(UserWarning, match="(?s)cannot be called .*no labels"):
        found = measuring.measure(by_batch=True)[0]
    assert found.cross_entropy == measuring.measure()[0].cross_entropy


@pytest.mark.parametrize("shared", [False, True])
def test_for_each_step_of_a_sequence(shared, digits):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8))
    layer = K.TimeDistributed(K.BatchNormalization())
    h = layer(layer(inputs) if shared else inputs)
    model = keras.Model(inputs, K.Dense(10, "softmax")(K.Flatten()(h)))
    model.compile("adam", "sparse_categorical_crossentropy")
    x, y = digits[0].reshape(-1, 8, 8), digits[1]
    callback = keras_milr.MutualInformationLR("relative", (x, y), probe_size=512)
    model.fit(x, y, epochs=2, verbose=0, callbacks=[callback])
    assert callback.history[-1]["information"] > callback.history[0]["information"]


def test_there_are_readings_within_the_first_epoch(digits):
    callback = keras_milr.MutualInformationLR(probe_data=digits, learning_rate=1e-5)
    model = make()
    model.fit(*digits, epochs=8, batch_size=16, verbose=0, callbacks=[callback])
    within = [r["step"] for r in callback.history if 0 < r["step"] < 1]
    assert len(within) == 3
    assert callback.history[4]["rate"] > 1e-4


@pytest.mark.backends("torch", reason="a model with modules of PyTorch")
def test_a_module_of_pytorch(digits):
    own, module = make(), make("module")
    module.hidden.set_weights(own.layers[0].get_weights())
    module.head.set_weights(own.layers[-1].get_weights())
    sample = sampling.draw_sample(digits, own, 512)
    modes = [m.training for m in module.modules()]
    found = [
        probe.Probe(model, sample).measure(by_batch)[0].cross_entropy
        for model, by_batch in ((own, True), (module, True), (module, False))
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert abs(found[1] - found[2]) > 0.01
    assert modes == [m.training for m in module.modules()]


class Noisy(K.Layer):
    """Draws from the global generator of the backend, in training only."""

    def call(self, x, training=False):
        return x + 0.1 * noise(x) if training else x


@pytest.mark.parametrize("eagerly", [True, False])
def test_nothing_is_drawn_from_global_generators(eagerly, digits):
    """The pass that finds out which layers go by batches is one in training mode."""
    drawn = []
    for reads in (True, False):
        keras.utils.set_random_seed(0)
        parts = [K.Dense(8), K.BatchNormalization(), Noisy(), K.Dense(10, "softmax")]
        model = keras.Sequential([keras.Input((64,)), *parts])
        model.compile("sgd", "sparse_categorical_crossentropy", run_eagerly=eagerly)
        sample = sampling.draw_sample(digits, model, 512)
        keras.utils.set_random_seed(2)
        if reads:
            probe.Probe(model, sample).measure(by_batch=True)
        drawn.append(draw())
    assert drawn[0] == drawn[1]
