import keras
import numpy as np
import pytest
import tensorflow as tf
from sklearn.metrics import mutual_info_score

from keras_milr import layers, probe, sampling
from keras_milr.readouts import LinearReadout, Predictions, UnitHistogram
from tests.backends import TORCH_COMPILE

JIT_COMPILE = [
    False,
    pytest.param(
        True, marks=pytest.mark.backends("tensorflow", "jax", reason=TORCH_COMPILE)
    ),
]


def make_model(features=64, classes=10, **compile_arguments):
    model = keras.Sequential(
        [
            keras.Input((features,)),
            keras.layers.Dense(32, activation="relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.5),
            keras.layers.Dense(classes, activation="softmax"),
        ]
    )
    model.compile(
        "adam",
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
        **compile_arguments,
    )
    return model


def state_of(model):
    """Everything that a measurement could change."""
    seeds = [v for layer in model.layers for v in layer.variables]
    variables = [*model.variables, *model.metrics_variables, *seeds]
    return [keras.ops.convert_to_numpy(v).copy() for v in variables]


def sizes_of_batches(model, data):
    """The number of rows of each batch that the probe calls the model on."""
    sample = sampling.draw_sample(data, model, 500)
    sizes, of_call = [], type(model).call
    reading = probe.Probe(model, sample, Predictions())

    def call(self, inputs, *args, **kwargs):
        sizes.append(inputs.shape[0])
        return of_call(self, inputs, *args, **kwargs)

    model.compile(model.optimizer, model.loss, run_eagerly=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "call", call)
        assert reading.measure()[0].value > 0
    return sizes


class TestProbe:
    def test_equals_scikit_learn_on_predict(self, digits):
        """A probe of all data reads what sklearn reads off `model.predict`."""
        model = make_model()
        model.fit(*digits, epochs=2, verbose=0)
        sample = sampling.draw_sample(digits, model, 10_000)
        info = probe.Probe(model, sample, Predictions()).measure()[0]
        predicted = model.predict(digits[0], verbose=0)
        assert info.raw == pytest.approx(
            mutual_info_score(digits[1], predicted.argmax(axis=1)), abs=1e-5
        )
        loss = model.evaluate(*digits, verbose=0)[0]
        assert info.bound == pytest.approx(info.entropy - loss, abs=1e-4)

    @pytest.mark.parametrize("jit_compile", JIT_COMPILE)
    def test_leaves_the_model_as_it_was(self, digits, jit_compile):
        class Noisy(keras.layers.Layer):
            """Draws random numbers and counts its calls, at inference too."""

            def __init__(self):
                super().__init__()
                self.seed = keras.random.SeedGenerator(1)
                self.calls = self.add_weight(
                    shape=(), initializer="zeros", trainable=False
                )

            def call(self, x):
                self.calls.assign_add(1.0)
                return x + keras.random.normal(keras.ops.shape(x), seed=self.seed)

        model = keras.Sequential([keras.Input((64,)), Noisy(), make_model()])
        model.compile(
            "adam",
            "sparse_categorical_crossentropy",
            metrics=["accuracy"],
            jit_compile=jit_compile,
        )
        model.fit(*digits, epochs=1, verbose=0)
        before = state_of(model)
        sample = sampling.draw_sample(digits, model, 500)
        probe.Probe(model, sample, Predictions()).measure()[0]
        for old, new in zip(before, state_of(model), strict=True):
            np.testing.assert_array_equal(old, new)

    @pytest.mark.backends("tensorflow", "jax", reason="PyTorch does not trace")
    def test_one_trace_for_all_readings(self, digits):
        traces = []

        class Traced(keras.layers.Layer):
            def call(self, x):
                traces.append(1)
                return x

        model = keras.Sequential([keras.Input((64,)), Traced(), make_model()])
        model.compile("adam", "sparse_categorical_crossentropy")
        sample = sampling.draw_sample(digits, model, 700)  # no multiple of a batch
        measuring = probe.Probe(model, sample, Predictions())
        first = measuring.measure()[0]
        traces.clear()
        for _ in range(5):
            model.fit(*digits, epochs=1, verbose=0)
            traces.clear()
            info = measuring.measure()[0]
            assert not traces
        assert info.raw > first.raw  # The later weights were measured.

    def test_mixed_precision_counts_in_float32(self, digits):
        keras.config.set_dtype_policy("mixed_bfloat16")
        try:
            model = make_model()
        finally:
            keras.config.set_dtype_policy("float32")
        sample = sampling.draw_sample(digits, model, 10_000)
        info = probe.Probe(model, sample, Predictions()).measure()[0]
        predicted = model.predict(digits[0], verbose=0).astype("float32")
        # 1,797 samples: bfloat16 could not count beyond 256.
        assert info.entropy == pytest.approx(np.log(10), abs=1e-3)
        assert info.raw == pytest.approx(
            mutual_info_score(digits[1], predicted.argmax(axis=1)), abs=0.02
        )

    @pytest.mark.supports("Labels", "sample weights")
    def test_padding_and_weights(self, digits):
        x, y = digits[0][:301], digits[1][:301]
        weight = np.random.default_rng(0).integers(1, 4, 301).astype("float32")
        model = make_model()
        rows = np.repeat(np.arange(301), weight.astype(int))
        weighted = sampling.draw_sample((x, y, weight), model, 301)
        scaled = sampling.draw_sample((x, y, 1e-4 * weight), model, 301)
        repeated = sampling.draw_sample((x[rows], y[rows]), model, 10_000)
        first, second, third = (
            probe.Probe(model, sample, Predictions()).measure()[0]
            for sample in (weighted, scaled, repeated)
        )
        # Weights say how much a sample matters, not how many there were.
        effective = weight.sum() ** 2 / (weight**2).sum()
        assert weighted.sample_weight.sum() == pytest.approx(effective, rel=1e-5)
        np.testing.assert_allclose(first[:-1], second[:-1], atol=1e-5)
        for field in ("raw", "entropy", "bound"):
            assert getattr(first, field) == pytest.approx(
                getattr(third, field), abs=1e-5
            )
        more = np.sqrt(weight.sum() / effective)
        assert first.bound_stderr == pytest.approx(third.bound_stderr * more, rel=1e-4)

    def test_a_fixed_batch_size_is_kept(self, digits):
        inputs = keras.Input(batch_shape=(48, 8, 8))
        hidden = keras.layers.GRU(16, stateful=True)(inputs)
        outputs = keras.layers.Dense(10, activation="softmax")(hidden)
        model = keras.Model(inputs, outputs)
        model.compile("adam", "sparse_categorical_crossentropy")
        data = digits[0].reshape(-1, 8, 8), digits[1]
        before = [np.array(v) for v in model.non_trainable_variables]
        assert sizes_of_batches(model, data) == [48] * 11
        for variable, value in zip(model.non_trainable_variables, before, strict=True):
            np.testing.assert_array_equal(variable, value)

    def test_a_batch_size_that_is_only_named_is_not(self, digits):
        called = keras.Sequential([keras.layers.Dense(10, activation="softmax")])
        called(digits[0][:1])
        assert called.inputs[0].shape == (1, 64)
        not_called = keras.Sequential([keras.layers.Dense(10, activation="softmax")])
        inputs = keras.Input(batch_shape=(48, 64))
        named = keras.Model(inputs, keras.layers.Dense(10, "softmax")(inputs))
        for model in (called, not_called, named):
            model.compile("adam", "sparse_categorical_crossentropy")
            assert sizes_of_batches(model, digits) == [250, 250]
        assert not_called.inputs[0].shape == (None, 64)

    def test_batches_of_large_samples_are_small(self, digits, monkeypatch):
        model = make_model()
        monkeypatch.setattr(probe, "_INPUTS", 6400)
        assert sizes_of_batches(model, digits) == [100] * 5
        monkeypatch.setattr(probe, "_OUTPUTS", 500)
        assert sizes_of_batches(model, digits) == [50] * 10
        monkeypatch.setattr(probe, "_INPUTS", 1)
        assert sizes_of_batches(model, digits) == [1] * 500

    def test_several_inputs(self, digits):
        x, y = digits
        left, right = keras.Input((32,), name="left"), keras.Input((32,), name="right")
        joined = keras.layers.Concatenate()([left, right])
        outputs = keras.layers.Dense(10, activation="softmax")(joined)
        model = keras.Model({"left": left, "right": right}, outputs)
        model.compile("adam", "sparse_categorical_crossentropy")
        inputs = {"left": x[:, :32], "right": x[:, 32:]}
        sample = sampling.draw_sample((inputs, y), model, 10_000)
        info = probe.Probe(model, sample, Predictions()).measure()[0]
        predicted = model.predict(inputs, verbose=0).argmax(axis=1)
        assert info.raw == pytest.approx(mutual_info_score(y, predicted), abs=1e-5)

    def test_outputs_that_cannot_be_measured(self):
        inputs = keras.Input((64,))
        total = keras.layers.Lambda(lambda x: keras.ops.sum(x))(inputs)
        model = keras.Model(inputs, total)
        with pytest.raises(ValueError, match=r"outputs have shape \(n, ..., units\)"):
            sampling.draw_sample((np.zeros((4, 64)), np.arange(4) % 2), model)


def make_cnn(**compile_arguments):
    model = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Reshape((8, 8, 1)),
            keras.layers.Conv2D(8, 3, activation="relu", name="conv"),
            keras.layers.BatchNormalization(name="norm"),
            keras.layers.Flatten(),
            keras.layers.Dropout(0.5),
            keras.layers.Dense(16, activation="relu", name="dense"),
            keras.layers.Dense(10, activation="softmax", name="out"),
        ]
    )
    model.compile("adam", "sparse_categorical_crossentropy", **compile_arguments)
    return model


class Block(keras.layers.Layer):
    def __init__(self, units):
        super().__init__()
        self.inner = keras.layers.Dense(units, activation="relu", name="inner")

    def call(self, x):
        return self.inner(x)


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.block = Block(16)
        self.drop = keras.layers.Dropout(0.5)
        self.out = keras.layers.Dense(10, activation="softmax", name="out")

    def call(self, x, training=False):
        return self.out(self.drop(self.block(x), training=training))


def layer_probe(model, data, chosen="all", readout=None, size=10_000):
    sample = sampling.draw_sample(data, model, size)
    groups = layers.choose(model, chosen)
    return probe.Probe(model, sample, Predictions(), groups, readout or LinearReadout())


def assert_same(info, expected):
    np.testing.assert_allclose(info[:-1], expected[:-1], atol=1e-4)
    assert info.estimator == expected.estimator


class TestLayers:
    @pytest.mark.parametrize("how", ["compiled", "jit_compile", "run_eagerly"])
    @pytest.mark.parametrize("readout", [LinearReadout(sketch=32), UnitHistogram()])
    def test_a_layer_reads_as_its_predictions_do(self, digits, how, readout):
        """Images beyond the sketch, a padded last batch, dropout that is off."""
        x, y = digits[0][:603], digits[1][:603]
        model = make_cnn(jit_compile=False)
        model.fit(x, y, epochs=1, batch_size=128, verbose=0)
        if how != "compiled":
            model.compile("adam", model.loss, **{how: True})
        output, found = layer_probe(model, (x, y), readout=readout).measure()
        for name, info in zip(("conv", "norm", "dense", "out"), found, strict=True):
            layer = model.get_layer(name).output
            activations = keras.Model(model.inputs[0], layer).predict(x, verbose=0)
            assert_same(info, readout.measure(activations, y, 10))
        (alone, nothing) = probe.Probe(
            model, sampling.draw_sample((x, y), model, 603), Predictions()
        ).measure()
        assert_same(output, alone)
        assert nothing == []

    @pytest.mark.parametrize("jit_compile", [False, True])
    def test_a_subclassed_model(self, digits, jit_compile):
        x, y = digits
        model = Subclassed()
        model.compile("adam", "sparse_categorical_crossentropy", jit_compile=False)
        model.fit(*digits, epochs=1, verbose=0)
        model.jit_compile = jit_compile
        chosen = {"block": "inner", "out": "out"}
        _, found = layer_probe(model, digits, chosen).measure()
        hidden = model.block(x)
        assert_same(found[0], LinearReadout().measure(hidden, y, 10))
        assert_same(found[1], LinearReadout().measure(model.out(hidden), y, 10))

    def test_a_nested_model(self, digits):
        x, y = digits
        encoder = make_model()
        model = keras.Sequential([encoder, keras.layers.Dense(10, name="out")])
        model.build((None, 64))
        model.compile("adam", "sparse_categorical_crossentropy")
        group = layers.choose(model, "all")[0]
        assert group.layers == [encoder.layers[0]]
        _, found = layer_probe(model, digits).measure()
        hidden = keras.Model(encoder.inputs[0], encoder.layers[0].output)(x)
        assert_same(found[0], LinearReadout().measure(hidden, y, 10))

    def test_of_many_labels_64_are_read(self, digits):
        """Each is a question of its own, of which a layer has a readout."""
        x, y = digits[0][:500], digits[1][:500]
        rng = np.random.default_rng(1)
        labels = (y[:, None] == rng.integers(0, 10, 100)) | (
            x[:, rng.permutation(64)[:1]] > 8
        )
        inputs = keras.Input((64,))
        hidden = keras.layers.Dense(8, "relu", name="hidden")(inputs)
        out = keras.layers.Dense(100, activation="sigmoid")(hidden)
        model = keras.Model(inputs, out)
        model.compile("adam", "binary_crossentropy")
        _, (found,) = layer_probe(model, (x, labels), "hidden").measure()
        activations = keras.Model(inputs, hidden)(x)
        read = LinearReadout().measure
        each = [read(activations, one, 2).value for one in labels.T.astype(int)]
        chosen = np.random.default_rng(0).choice(100, 64, replace=False)
        assert found.value == pytest.approx(np.mean(np.array(each)[chosen]), abs=1e-4)

    def test_weights_of_the_samples(self, digits):
        x, y = digits[0][:500], digits[1][:500]
        weight = np.where(np.arange(500) < 300, 1.0, 0.0).astype("float32")
        model = make_cnn()
        _, found = layer_probe(model, (x, y, weight)).measure()
        activations = keras.Model(
            model.inputs[0], model.get_layer("conv").output
        ).predict(x, verbose=0)
        assert_same(found[0], LinearReadout().measure(activations[:300], y[:300], 10))

    @pytest.mark.parametrize("jit_compile", JIT_COMPILE)
    def test_leaves_the_model_as_it_was(self, digits, jit_compile):
        class Noisy(keras.layers.Layer):
            """Draws random numbers and counts its calls, at inference too."""

            def build(self, shape):
                self.seed = keras.random.SeedGenerator(1)
                self.scale = self.add_weight(shape=(1,), initializer="ones")
                self.calls = self.add_weight(shape=(), trainable=False)

            def call(self, x):
                self.calls.assign_add(1.0)
                shape = keras.ops.shape(x)
                return x + self.scale * keras.random.normal(shape, seed=self.seed)

        model = keras.Sequential([keras.Input((64,)), Noisy(), *make_cnn().layers])
        model.compile(
            "adam",
            "sparse_categorical_crossentropy",
            metrics=["accuracy"],
            jit_compile=False,
        )
        model.fit(*digits, epochs=1, batch_size=128, verbose=0)
        model.jit_compile = jit_compile
        before = state_of(model)
        layer_probe(model, digits, size=500).measure()
        for old, new in zip(before, state_of(model), strict=True):
            np.testing.assert_array_equal(old, new)
        assert not any("call" in layer.__dict__ for layer in model.layers)

    @pytest.mark.backends("tensorflow", "jax", reason="PyTorch does not trace")
    def test_one_trace_for_all_readings(self, digits):
        traces = []

        class Traced(keras.layers.Layer):
            def call(self, x):
                traces.append(1)
                return x

        class Counted(LinearReadout):
            def features(self, activations):
                traces.append(2)
                return super().features(activations)

        model = keras.Sequential([keras.Input((64,)), Traced(), *make_cnn().layers])
        model.compile("adam", "sparse_categorical_crossentropy")
        measuring = layer_probe(model, digits, readout=Counted(), size=700)
        traces.clear()
        first = measuring.measure()[1][-1]
        assert traces == [1, 2, 2, 2, 2]
        for _ in range(2):
            model.fit(*digits, epochs=1, verbose=0)
            traces.clear()
            last = measuring.measure()[1][-1]
            assert not traces
        assert last.accessible > first.accessible + 0.1  # The later weights.

    def test_mixed_precision(self, digits):
        x, y = digits
        keras.config.set_dtype_policy("mixed_bfloat16")
        try:
            model = make_cnn()
        finally:
            keras.config.set_dtype_policy("float32")
        _, found = layer_probe(model, digits).measure()
        layer = keras.Model(model.inputs[0], model.get_layer("conv").output)
        expected = LinearReadout().measure(layer(x), y, 10)
        assert found[0].value == pytest.approx(expected.value, abs=0.05)

    @pytest.mark.backends("tensorflow", reason="others know all shapes")
    def test_a_layer_with_other_rows_than_the_samples(self, digits):
        """Seen late, where the graph does not know how many there are."""

        class Dark(keras.layers.Layer):
            def build(self, shape):
                self.scale = self.add_weight(shape=(1,))

            def call(self, x):
                return self.scale * tf.boolean_mask(x, x[:, 20] < 0.5)

        class Model(Subclassed):
            def __init__(self):
                super().__init__()
                self.dark = Dark(name="dark")

            def call(self, x, training=False):
                return super().call(x, training) + 0 * keras.ops.mean(self.dark(x))

        model = Model()
        model.compile("adam", "sparse_categorical_crossentropy", jit_compile=False)
        model(digits[0][:100])
        with pytest.raises(ValueError, match=r"for each sample. Received: 'dark'"):
            layer_probe(model, digits, "dark").measure()

    def test_a_layer_that_cannot_be_read(self, digits):
        model = Subclassed()
        model.unused = keras.layers.Dense(3, name="unused")
        model.unused.build((None, 3))
        model.compile("adam", "sparse_categorical_crossentropy")
        with pytest.raises(ValueError, match="not called by the model"):
            layer_probe(model, digits, "unused").measure()


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ("sparse_categorical_crossentropy", False),
        (keras.losses.SparseCategoricalCrossentropy(from_logits=True), True),
        (keras.losses.CategoricalCrossentropy(), False),
        ([keras.losses.BinaryCrossentropy(from_logits=True)], True),
        (keras.losses.sparse_categorical_crossentropy, False),
        (None, False),
    ],
)
def test_logits_are_read_off_the_loss(loss, expected):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    model.compile("sgd", loss)
    sample = sampling.draw_sample((np.zeros((6, 4)), np.arange(6) % 3), model)
    readout = probe.output_readout(sample.labels[0].target)
    assert readout.from_logits is expected
