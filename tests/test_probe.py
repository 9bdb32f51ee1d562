import keras
import numpy as np
import pytest
import tensorflow as tf
from sklearn.metrics import mutual_info_score

from keras_milr import layers, probe
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


def draw(data, size=500, seed=0, **model_arguments):
    return probe.draw_sample(data, make_model(**model_arguments), size, seed)


def state_of(model):
    """Everything that a measurement could change."""
    seeds = [v for layer in model.layers for v in layer.variables]
    variables = [*model.variables, *model.metrics_variables, *seeds]
    return [keras.ops.convert_to_numpy(v).copy() for v in variables]


class TestSample:
    def test_each_class_has_its_share(self):
        rng = np.random.default_rng(0)
        y = rng.choice(3, 10_000, p=[0.9, 0.09, 0.01])
        x = np.arange(10_000, dtype="float32")[:, None]
        sample = draw((x, y), 1000, features=1, classes=3)
        shares = 1000 * np.bincount(y) / 10_000
        assert np.all(np.abs(np.bincount(sample.class_ids) - shares) <= 1)
        assert len(sample.class_ids) == 1000
        # The rows belong to their labels, and none came twice.
        rows = sample.x[:, 0].astype(int)
        np.testing.assert_array_equal(y[rows], sample.class_ids)
        assert len(set(rows)) == 1000

    def test_rare_classes_are_there(self):
        y = np.zeros(5000, int)
        y[:2], y[2] = 1, 2
        sample = draw((np.zeros((5000, 1)), y), 100, features=1, classes=3)
        np.testing.assert_array_equal(np.bincount(sample.class_ids), [98, 1, 1])

    def test_a_class_is_sampled_uniformly(self):
        """Each of 500 rows of a class comes up equally often in 400 draws of 100."""
        x = np.arange(1000, dtype="float32")[:, None]
        y = np.arange(1000) % 2
        model = make_model(1, 2)
        hits = np.zeros(1000)
        for seed in range(400):
            sample = probe.draw_sample((x, y), model, 100, seed)
            hits[sample.x[:, 0].astype(int)] += 1
        # Binomial(400, 0.1): mean 40, standard deviation 6; chi-squared over rows.
        chi = np.sum((hits - 40) ** 2 / 36)
        assert abs(chi - 1000) < 5 * np.sqrt(2000)

    def test_the_seed_decides(self, digits):
        first, again, other = draw(digits), draw(digits), draw(digits, seed=1)
        np.testing.assert_array_equal(first.x, again.x)
        assert not np.array_equal(first.x, other.x)

    def test_small_data_are_taken_whole_and_in_order(self, digits):
        x, y = digits[0][:300], digits[1][:300]
        sample = draw((x, y))
        np.testing.assert_array_equal(sample.x, x)
        np.testing.assert_array_equal(sample.class_ids, y)

    @pytest.mark.parametrize("sort", [False, True])
    @pytest.mark.parametrize("batch", [7, 64, 1797])
    def test_batching_does_not_matter(self, digits, batch, sort):
        order = np.argsort(digits[1], kind="stable") if sort else slice(None)
        x, y = digits[0][order], digits[1][order]
        expected = draw((x, y), 60)
        dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(batch)
        sample = draw(dataset, 60)
        np.testing.assert_array_equal(sample.x, expected.x)
        np.testing.assert_array_equal(sample.class_ids, expected.class_ids)

    def test_kinds_of_data(self, digits):
        x, y = digits
        expected = draw((x, y))

        class Batches(keras.utils.PyDataset):
            def __len__(self):
                return 18

            def __getitem__(self, i):
                return x[100 * i : 100 * (i + 1)], y[100 * i : 100 * (i + 1)]

        for data in (
            [x, y],
            (keras.ops.convert_to_tensor(x), keras.ops.convert_to_tensor(y)),
            (x, np.eye(10)[y]),
            Batches(),
            ((x[i : i + 100], y[i : i + 100]) for i in range(0, len(x), 100)),
            tf.data.Dataset.from_tensor_slices((x, y)).batch(100).prefetch(1),
        ):
            sample = draw(data)
            np.testing.assert_array_equal(sample.x, expected.x)
            np.testing.assert_array_equal(sample.class_ids, expected.class_ids)

    def test_rows_keep_labels_weights_and_positions(self, digits):
        x, y = digits
        labels, weight = np.eye(10, dtype="float32")[y], np.arange(1.0, len(y) + 1)
        data = tf.data.Dataset.from_tensor_slices((x, labels, weight)).batch(100)
        rows = probe.draw_rows(data, make_model(), 300, seed=0)
        assert np.all(np.diff(rows.positions) > 0)
        np.testing.assert_array_equal(rows.x, x[rows.positions])
        np.testing.assert_array_equal(rows.y, labels[rows.positions])
        np.testing.assert_array_equal(rows.sample_weight, weight[rows.positions])
        np.testing.assert_array_equal(rows.class_ids, y[rows.positions])
        assert rows.batch_sizes == [100] * 17 + [97]

    @pytest.mark.parametrize("loss", ["mse", "binary_crossentropy"])
    @pytest.mark.parametrize("batch", [7, 1797])
    def test_batching_does_not_matter_without_classes(self, digits, loss, batch):
        x = digits[0]
        labels = x[:, 20:21] + x[:, 30:31] if loss == "mse" else x[:, 20:24] > 0.5
        model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(1)])
        if loss != "mse":
            model.add(keras.layers.Dense(4, activation="sigmoid"))
        model.compile("sgd", loss)
        expected = probe.draw_sample((x, labels), model, 60)
        assert len(expected.class_ids) == 60
        dataset = tf.data.Dataset.from_tensor_slices((x, labels)).batch(batch)
        sample = probe.draw_sample(dataset, model, 60)
        np.testing.assert_array_equal(sample.x, expected.x)
        np.testing.assert_array_equal(sample.class_ids, expected.class_ids)

    @pytest.mark.parametrize("classes", [3, 20_000])
    def test_memory_stays_bounded(self, classes):
        longest = 0

        def batches():
            rng = np.random.default_rng(0)
            for _ in range(200):
                yield np.zeros((100, 1)), rng.integers(0, classes, 100)

        class Watched(probe._Pool):
            def add(self, *args):
                nonlocal longest
                super().add(*args)
                longest = max(longest, len(self))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(probe, "_Pool", Watched)
            sample = draw(batches(), 50, features=1, classes=classes)
        assert len(sample.class_ids) == 50
        assert longest <= 4 * 50 + 16 * 3 + 100


class TestBadData:
    x, y = np.zeros((20, 1), "float32"), np.arange(20) % 2

    def raises(self, data, message, size=10, error=ValueError):
        with pytest.raises(error, match=f"(?s){message}"):
            draw(data, size, features=1, classes=2)

    def test_lengths(self):
        self.raises((self.x, self.y[:-1]), r"same length.*\(20, 1\).*\(19,\)")
        self.raises((self.x, self.y, np.ones(19)), "same length")

    def test_empty(self):
        self.raises((self.x[:0], self.y[:0]), "`probe_data` is empty")
        self.raises(iter(()), "`probe_data` is empty")

    def test_no_labels(self):
        dataset = tf.data.Dataset.from_tensor_slices(self.x).batch(5)
        for data in (self.x, (self.x,), (self.x, None), {"x": self.x}, dataset):
            self.raises(data, "must have labels")

    def test_labels_beyond_the_outputs(self):
        self.raises((self.x, self.y + 1), r"whole numbers in \[0, 2\)")
        self.raises((self.x, self.y - 1), r"whole numbers in \[0, 2\).*-1")

    def test_a_single_class(self):
        self.raises((self.x, np.ones(20)), "at least two classes.*class 1 only")

    def test_inputs_that_are_not_finite(self):
        for bad in (np.nan, np.inf):
            x = self.x.copy()
            x[3] = bad
            self.raises((x, self.y), r"must be finite.*1 NaN or infinite")

    def test_too_small_for_the_classes(self):
        self.raises((self.x, self.y), "at least 2 for each class.*probe_size=3", 3)

    def test_ragged(self):
        batches = [(np.zeros((4, n)), np.arange(4) % 2) for n in (1, 2)]
        self.raises(iter(batches), "must have the same shapes.*pad them")
        self.raises(batches, "must hold arrays")

    def test_infinite_dataset(self):
        dataset = tf.data.Dataset.from_tensor_slices((self.x, self.y)).batch(5)
        self.raises(dataset.repeat(), "must be finite.*repeats")

    def test_unbatched_dataset(self):
        dataset = tf.data.Dataset.from_tensor_slices((self.x, self.y))
        self.raises(dataset, "must come in batches")

    def test_weights(self):
        self.raises((self.x, self.y, -np.ones(20)), "weights.*finite and not negative")
        self.raises((self.x, self.y, np.ones((20, 1))), r"weights.*shape \(n,\)")
        self.raises((self.x, self.y, np.full(20, "w")), "weights.*finite")
        self.raises((self.x, self.y, np.zeros(20)), "above 0 in at least two classes")
        self.raises((self.x, self.y, self.y), "above 0 in at least two classes")

    def test_nothing_like_data(self):
        self.raises(3, "must be.*of type int", error=TypeError)


class TestProbe:
    def test_equals_scikit_learn_on_predict(self, digits):
        """A probe of all data reads what sklearn reads off `model.predict`."""
        model = make_model()
        model.fit(*digits, epochs=2, verbose=0)
        sample = probe.draw_sample(digits, model, 10_000)
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
        sample = probe.draw_sample(digits, model, 500)
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
        sample = probe.draw_sample(digits, model, 700)  # no multiple of a batch
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
        sample = probe.draw_sample(digits, model, 10_000)
        info = probe.Probe(model, sample, Predictions()).measure()[0]
        predicted = model.predict(digits[0], verbose=0).astype("float32")
        # 1,797 samples: bfloat16 could not count beyond 256.
        assert info.entropy == pytest.approx(np.log(10), abs=1e-3)
        assert info.raw == pytest.approx(
            mutual_info_score(digits[1], predicted.argmax(axis=1)), abs=0.02
        )

    def test_padding_and_weights(self, digits):
        x, y = digits[0][:301], digits[1][:301]
        weight = np.random.default_rng(0).integers(1, 4, 301).astype("float32")
        model = make_model()
        rows = np.repeat(np.arange(301), weight.astype(int))
        weighted = probe.draw_sample((x, y, weight), model, 301)
        scaled = probe.draw_sample((x, y, 1e-4 * weight), model, 301)
        repeated = probe.draw_sample((x[rows], y[rows]), model, 10_000)
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
        inputs = keras.Input(batch_shape=(48, 64))
        outputs = keras.layers.Dense(10, activation="softmax")(inputs)
        model = keras.Model(inputs, outputs)
        model.compile("adam", "sparse_categorical_crossentropy")
        sample = probe.draw_sample(digits, model, 500)
        assert probe.Probe(model, sample, Predictions()).measure()[0].value > 0

    def test_several_inputs(self, digits):
        x, y = digits
        left, right = keras.Input((32,), name="left"), keras.Input((32,), name="right")
        joined = keras.layers.Concatenate()([left, right])
        outputs = keras.layers.Dense(10, activation="softmax")(joined)
        model = keras.Model({"left": left, "right": right}, outputs)
        model.compile("adam", "sparse_categorical_crossentropy")
        inputs = {"left": x[:, :32], "right": x[:, 32:]}
        sample = probe.draw_sample((inputs, y), model, 10_000)
        info = probe.Probe(model, sample, Predictions()).measure()[0]
        predicted = model.predict(inputs, verbose=0).argmax(axis=1)
        assert info.raw == pytest.approx(mutual_info_score(y, predicted), abs=1e-5)

    def test_outputs_that_cannot_be_measured(self):
        inputs = keras.Input((64,))
        total = keras.layers.Lambda(lambda x: keras.ops.sum(x))(inputs)
        model = keras.Model(inputs, total)
        with pytest.raises(ValueError, match=r"outputs have shape \(n, ..., units\)"):
            probe.draw_sample((np.zeros((4, 64)), np.arange(4) % 2), model)


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
    sample = probe.draw_sample(data, model, size)
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
            model, probe.draw_sample((x, y), model, 603), Predictions()
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
    sample = probe.draw_sample((np.zeros((6, 4)), np.arange(6) % 3), model)
    readout = probe.output_readout(sample.labels[0].target)
    assert readout.from_logits is expected
