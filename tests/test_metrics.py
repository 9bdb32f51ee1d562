import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from sklearn.metrics import mutual_info_score

import keras_milr
from keras_milr import backend, readouts
from tests import reference
from tests.backends import TORCH_COMPILE


def make_model(units=10, loss="sparse_categorical_crossentropy", **arguments):
    activation = "sigmoid" if units == 1 else "softmax"
    model = keras.Sequential(
        [keras.Input((64,)), keras.layers.Dense(units, activation=activation)]
    )
    arguments = {"metrics": [keras_milr.MutualInformation()]} | arguments
    model.compile(keras.optimizers.Adam(0.01), loss, **arguments)
    return model


def information(model, x, y, **arguments):
    return model.evaluate(x, y, verbose=0, return_dict=True, **arguments)[
        "mutual_information"
    ]


def predicted(model, x):
    p = model.predict(x, verbose=0)
    return p[:, 0] > 0.5 if p.shape[1] == 1 else p.argmax(axis=1)


in_every_way = pytest.mark.parametrize(
    "options",
    [
        pytest.param(
            {"jit_compile": True},
            marks=pytest.mark.backends("tensorflow", "jax", reason=TORCH_COMPILE),
        ),
        {"jit_compile": False},
        {"run_eagerly": True, "jit_compile": False},
        pytest.param(
            {"steps_per_execution": 7},
            marks=pytest.mark.backends(
                "tensorflow", "jax", reason="PyTorch has no `steps_per_execution`"
            ),
        ),
    ],
    ids=str,
)


@in_every_way
def test_equals_scikit_learn(digits, options):
    x, y = digits
    model = make_model(**options)
    model.fit(x, y, epochs=2, verbose=0)
    expected = mutual_info_score(y, predicted(model, x))
    for batch_size in (50, 1797):
        assert information(model, x, y, batch_size=batch_size) == pytest.approx(
            expected, abs=1e-5
        )


def test_labels(digits):
    x, y = digits
    sparse = make_model()
    expected = mutual_info_score(y, predicted(sparse, x))
    assert information(sparse, x, y[:, None]) == pytest.approx(expected, abs=1e-5)
    one_hot = make_model(loss="categorical_crossentropy")
    one_hot.set_weights(sparse.get_weights())
    assert information(one_hot, x, np.eye(10)[y]) == pytest.approx(expected, abs=1e-5)
    even = (y % 2).astype("float32")
    for labels in (even, even[:, None]):
        binary = make_model(1, "binary_crossentropy")
        assert information(binary, x, labels) == pytest.approx(
            mutual_info_score(even, predicted(binary, x)), abs=1e-5
        )


def test_single_logit():
    y, logits = np.array([0, 0, 1, 1]), np.array([[-1.0], [0.2], [0.3], [2.0]])
    metric = keras_milr.MutualInformation(from_logits=True)
    assert float(metric(y, logits)) == pytest.approx(
        mutual_info_score(y, [0, 1, 1, 1]), abs=1e-6
    )


def test_sample_weights(digits):
    x, y = digits
    weight = np.random.default_rng(0).integers(0, 4, len(y)).astype("float32")
    model = make_model(metrics=None, weighted_metrics=[keras_milr.MutualInformation()])
    repeated = np.repeat(np.arange(len(y)), weight.astype(int))
    assert information(model, x, y, sample_weight=weight) == pytest.approx(
        mutual_info_score(y[repeated], predicted(model, x)[repeated]), abs=1e-5
    )


def test_updates_add_up_and_reset():
    rng = np.random.default_rng(0)
    y, p = rng.integers(0, 3, 600), rng.random((600, 3))
    whole, parts = keras_milr.MutualInformation(), keras_milr.MutualInformation()
    assert float(whole.result()) == 0
    whole.update_state(y, p)
    for i in range(0, 600, 100):
        parts.update_state(y[i : i + 100], p[i : i + 100])
    assert float(whole.result()) == pytest.approx(float(parts.result()))
    np.testing.assert_array_equal(whole.counts, parts.counts)
    parts.reset_state()
    assert float(parts.result()) == 0
    parts.update_state(y[:300], p[:300])
    assert np.sum(parts.counts) == 300


def test_counts_stay_exact_over_millions():
    metric = keras_milr.MutualInformation()
    y = np.tile([0, 1], 500_000)
    p = np.eye(2, dtype="float32")[y]
    for _ in range(10):
        metric.update_state(y, p)
    np.testing.assert_array_equal(
        metric.counts, [[5_000_000, 0], [0, 5_000_000], [0, 0]]
    )


def test_weights_of_millions_of_pixels_in_a_batch():
    rng = np.random.default_rng(0)
    y = (rng.random((64, 256, 256)) < 0.02).astype("int32")
    said = np.where(rng.random(y.shape) < 0.1, 1 - y, y)
    weight = np.where(y == 0, 0.1, 1.0).astype("float32")
    metric = keras_milr.MutualInformation()
    metric.update_state(y, np.eye(2, dtype="float32")[said], weight)
    table = reference.contingency(said.ravel(), y.ravel(), 2, 2)
    table = table * np.array([np.float32(0.1), 1.0])
    np.testing.assert_allclose(metric.table()[:2], table, rtol=2e-4)
    expected = reference.mutual_information(table)
    assert float(metric.result()) == pytest.approx(expected, rel=1e-3)


def one_cell(labels, start):
    """A metric that has counted `start` samples of one kind, and another of them."""
    several = labels == "multi_label"
    metric = keras_milr.MutualInformation(targets="multi_label" if several else "auto")
    y = np.array([[0, 0]] if several else [0])
    outputs = np.array([[0.4, 0.1]] if several else [[0.9, 0.1]], "float32")
    if labels == "thousands":
        outputs = np.eye(1, 1500, dtype="float32")
    metric.update_state(y, outputs)
    table = np.array(keras.ops.convert_to_numpy(metric.counts.value))
    table[table > 0] = start
    metric.counts.assign(table)
    return metric, y, outputs


@pytest.mark.parametrize("start", [2.0**24 - 2, 2.0**25, 2.0**46])
@pytest.mark.parametrize("labels", [None, "multi_label", "thousands"])
def test_counts_beyond_what_a_float32_can_count_to(labels, start):
    """One sample at a time, where 2^24 + 1 is 2^24; and on in large batches."""
    metric, y, outputs = one_cell(labels, start)
    total = int(start)
    for weight in (*[1.0] * 20, 2.0**22 + 1, 2.0**24 - 1, *[2.0**23 + 3] * 5, 1.0):
        metric.update_state(y, outputs, sample_weight=np.array([weight], "float32"))
        total += int(weight)
    assert total > 2**24
    counted = metric.table()
    np.testing.assert_array_equal(counted[counted > 0], total)
    assert np.count_nonzero(counted) == (2 if labels == "multi_label" else 1)
    # Else it would be full at 2^24, as the other was.
    rest = keras.ops.convert_to_numpy(metric._rest.value)
    assert np.abs(rest).max() <= total / 2**24
    metric.reset_state()
    assert not metric.table().any()


@pytest.mark.backends("tensorflow", reason="with and without XLA")
@pytest.mark.parametrize("jit_compile", [False, True])
def test_no_compiler_takes_the_rest_for_nothing(jit_compile):
    metric, y, outputs = one_cell(None, 2.0**25)
    update = tf.function(metric.update_state, jit_compile=jit_compile)
    for _ in range(21):
        update(tf.constant(y), tf.constant(outputs))
    assert metric.table().sum() == 2**25 + 21


def test_mixed_precision_counts_in_float32(digits):
    x, y = digits
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = make_model()
    finally:
        keras.config.set_dtype_policy("float32")
    model.evaluate(x, y, verbose=0)
    (table,) = (m for m in model.metrics[-1].metrics if "mutual" in m.name)
    assert np.sum(table.counts) == len(y)  # bfloat16 would stop at 256


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_rounded_result_is_that_of_the_same_table(dtype):
    """bfloat16 has 5.28 or 5.31 for log 200 = 5.298."""
    y = np.arange(400) % 200
    dense = keras.layers.Dense(200, "softmax", kernel_initializer="identity")
    model = keras.Sequential([keras.Input((200,)), dense])
    metric = keras_milr.MutualInformation(dtype=dtype)
    model.compile("sgd", "sparse_categorical_crossentropy", metrics=[metric])
    x = 10 * np.eye(200, dtype="float32")[y]
    callback = keras_milr.MutualInformationLR()
    logs = model.fit(x, y, verbose=0, callbacks=[callback]).history
    (shown,) = map(float, logs["mutual_information"])  # TensorFlow's is a tensor.
    assert metric.dtype == dtype
    assert shown == pytest.approx(np.log(200), rel=2**-8)
    assert callback.history[-1]["raw"] == pytest.approx(np.log(200))


def test_predictions_that_are_not_finite_are_counted_as_none():
    metric = keras_milr.MutualInformation()
    p = np.array([[0.9, 0.1], [np.nan, 0.1], [0.2, 0.8], [np.inf, 0.0]])
    metric.update_state([0, 0, 1, 1], p)
    np.testing.assert_array_equal(metric.counts, [[1, 0], [0, 1], [1, 1]])


@pytest.mark.parametrize("monitor", ["val_mutual_information", "mutual_information"])
def test_early_stopping_infers_the_direction(digits, monitor):
    model = make_model()
    stop = keras.callbacks.EarlyStopping(monitor=monitor, patience=1)
    history = model.fit(
        *digits, epochs=4, validation_split=0.2, verbose=0, callbacks=[stop]
    )
    # It rises; taken as something to minimise it would stop in the second epoch.
    assert len(history.history["loss"]) == 4


def test_saved_and_loaded_with_the_model(digits, tmp_path):
    x, y = digits
    model = make_model()
    model.fit(x, y, epochs=1, verbose=0)
    expected = information(model, x, y)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert information(loaded, x, y) == pytest.approx(expected, abs=1e-6)
    loaded.fit(x, y, epochs=1, verbose=0)
    assert information(loaded, x, y) > expected


def test_config():
    metric = keras_milr.MutualInformation(name="mi", from_logits=True)
    config = keras.saving.serialize_keras_object(metric)
    again = keras.saving.deserialize_keras_object(config)
    assert again.get_config() == metric.get_config()
    assert again.name == "mi"
    assert again.from_logits is True


@pytest.mark.parametrize("eager", [False, True])
def test_ids_that_are_no_class_are_not_counted(digits, eager):
    x, y = digits[0][:500], digits[1][:500].copy()
    y[:100] = -1
    loss = keras.losses.SparseCategoricalCrossentropy(ignore_class=-1)
    model = make_model(loss=loss, run_eagerly=eager, jit_compile=False)
    assert information(model, x, y) == pytest.approx(
        mutual_info_score(y[100:], predicted(model, x[100:])), abs=1e-5
    )


NAN = float("nan")
HALVES = [[0.9], [0.1], [0.9], [0.9], [0.9]]


@pytest.mark.parametrize("in_a_step", [False, True])
@pytest.mark.parametrize(
    ("labels", "outputs", "options", "counts"),
    [
        ([0, -1, 255, 1, 2], HALVES, {}, [[0, 0], [1, 1], [0, 0]]),
        ([0.0, NAN, np.inf, 0.7, 0.4], HALVES, {}, [[0, 0], [2, 1], [0, 0]]),
        # Margins, of which -1 is a no.
        ([1, -1, -1, 1, 3], HALVES, {"from_logits": True}, [[0, 0], [2, 2], [0, 0]]),
        ([0.0, NAN, -np.inf, 1.0, 2.0], np.eye(2)[[0, 0, 0, 0, 0]], {}, None),
        ([[1, 0], [NAN, 0], [0, NAN], [0, 1]], np.eye(2)[[0, 0, 0, 0]], {}, None),
        (
            *([[0, -1], [NAN, 1], [1, 0]], np.full((3, 2), 0.9)),
            {"targets": "multi_label"},
            [[[0, 0], [1, 1], [0, 0]], [[0, 0], [1, 1], [0, 0]]],
        ),
    ],
)
def test_labels_that_are_no_class_are_not_counted(
    labels, outputs, options, counts, in_a_step
):
    """Ids to ignore of a yes-or-no unit, and numbers that are none."""
    metric = keras_milr.MutualInformation(**options)
    labels, outputs = (np.array(one, "float32") for one in (labels, outputs))
    metric.update_state(labels[:0], outputs[:0])  # Makes the variables.
    if in_a_step:
        step = backend.jit(metric.stateless_update_state)
        values = step([v.value for v in metric.variables], labels, outputs)
        for variable, value in zip(metric.variables, values, strict=True):
            variable.assign(value)
    else:
        metric.update_state(labels, outputs)
    expected = [[1, 1], [0, 0], [0, 0]] if counts is None else counts
    np.testing.assert_array_equal(metric.table(), expected)


def test_scalar_weight():
    metric = keras_milr.MutualInformation()
    metric.update_state([0, 1, 1], np.eye(2)[[0, 1, 0]], sample_weight=2.0)
    np.testing.assert_array_equal(metric.counts, [[2, 2], [0, 2], [0, 0]])


def test_bad_shapes():
    metric = keras_milr.MutualInformation()
    with pytest.raises(ValueError, match=r"`y_pred` .* shape \(n, ..., units\)"):
        metric.update_state([0, 1], 0.5)
    with pytest.raises(ValueError, match=r"class ids of shape \(n, 3\) or"):
        metric.update_state([0, 1], np.zeros((2, 3, 4)))
    with pytest.raises(ValueError, match="`y_true`: The labels must be class ids"):
        metric.update_state(np.zeros((2, 5)), np.zeros((2, 3)))
    metric.update_state([0, 1], np.zeros((2, 3)))
    with pytest.raises(ValueError, match="has counted 3 classes so far"):
        metric.update_state([0, 1], np.zeros((2, 4)))


def test_soft_labels():
    rng = np.random.default_rng(0)
    y, p = rng.integers(0, 4, 300), rng.random((300, 4))
    soft = 0.6 * np.eye(4)[y] + 0.4 * rng.dirichlet(np.ones(4), 300)
    metric = keras_milr.MutualInformation()
    assert float(metric(soft, p)) == pytest.approx(
        mutual_info_score(y, p.argmax(axis=1)), abs=1e-6
    )


class TestMultiLabel:
    def labels(self, y):
        return np.stack([y % 2 == 0, y > 4, y < 0, y == 3], axis=1).astype("float32")

    @pytest.mark.parametrize("logits", [False, True])
    @pytest.mark.parametrize("eager", [False, True])
    def test_the_mean_over_labels_that_vary(self, digits, logits, eager):
        x, y = digits[0][:400], digits[1][:400]
        labels = self.labels(y)
        metric = keras_milr.MutualInformation(from_logits=logits, targets="multi_label")
        model = make_model(4)
        model.layers[0].activation = keras.activations.get(
            "linear" if logits else "sigmoid"
        )
        model.compile(
            keras.optimizers.Adam(0.01),
            keras.losses.BinaryCrossentropy(from_logits=logits),
            metrics=[metric],
            run_eagerly=eager,
            jit_compile=False,
        )
        model.fit(x, labels, epochs=2, verbose=0)
        said = model.predict(x, verbose=0) > (0.0 if logits else 0.5)
        expected = [mutual_info_score(labels[:, i], said[:, i]) for i in (0, 1, 3)]
        assert information(model, x, labels) == pytest.approx(
            np.mean(expected), abs=1e-5
        )

    def test_as_the_source_of_the_callback(self, digits):
        x, labels = digits[0], self.labels(digits[1])
        model = make_model(4)
        model.layers[0].activation = keras.activations.sigmoid
        metric = keras_milr.MutualInformation(targets="multi_label")
        model.compile("adam", "binary_crossentropy", metrics=[metric])
        callback = keras_milr.MutualInformationLR(lambda r: r.rate)
        history = model.fit(x, labels, epochs=2, verbose=0, callbacks=[callback])
        np.testing.assert_allclose(
            [r["raw"] for r in callback.history],
            history.history["mutual_information"],
            atol=1e-5,
        )
        entropies = [
            reference.entropy(np.bincount(labels[:, i] > 0)) for i in (0, 1, 3)
        ]
        assert callback.history[-1]["entropy"] == pytest.approx(np.mean(entropies))

    def test_bad_shapes(self):
        metric = keras_milr.MutualInformation(targets="multi_label")
        with pytest.raises(ValueError, match="labels of the shape of the outputs"):
            metric.update_state([0, 1], np.zeros((2, 3)))
        metric.update_state(np.ones((2, 3)), np.zeros((2, 3)))
        with pytest.raises(ValueError, match="has counted 3 labels so far"):
            metric.update_state(np.ones((2, 4)), np.zeros((2, 4)))


class TestThousandsOfClasses:
    """No table: Fano's bound, from what was predicted right, wrong and not at all."""

    def data(self, classes=1500, samples=3000):
        """Labels, outputs that are right for most, and what they predict."""
        rng = np.random.default_rng(0)
        y = rng.integers(0, classes, samples)
        p = rng.random((samples, classes)).astype("float32")
        sure = rng.random(samples) < 0.8
        p[sure, y[sure]] += 1.0
        p[:100, 7] = np.nan
        said = np.where(np.isnan(p[:, 7]), -1, p.argmax(axis=1))
        return y, p, said

    def make_model(self, classes=1500, **arguments):
        """A model that knows most of the classes, and codes of these as its inputs."""
        codes = np.random.default_rng(0).normal(size=(classes, 64)).astype("float32")
        model = make_model(classes, **arguments)
        model.layers[0].set_weights([0.1 * codes.T, np.zeros(classes)])
        return model, codes

    def inputs(self, codes, samples=900):
        rng = np.random.default_rng(1)
        y = rng.integers(0, len(codes), samples).astype("int32")
        noise = rng.normal(size=(samples, codes.shape[1]))
        return (codes[y] + 1.5 * noise).astype("float32"), y

    def test_equals_the_reference(self):
        y, p, said = self.data()
        metric = keras_milr.MutualInformation()
        for i in range(0, 3000, 600):
            metric.update_state(y[i : i + 600], p[i : i + 600])
        expected = reference.fano(said, y, 1500)
        assert float(metric.result()) == pytest.approx(expected, abs=1e-5)
        assert 3 < expected < mutual_info_score(y, said)
        right = np.bincount(y[said == y], minlength=1500)
        none = np.bincount(y[:100], minlength=1500)
        wrong = np.bincount(y, minlength=1500) - right - none
        np.testing.assert_array_equal(metric.table(), [right, wrong, none])
        metric.reset_state()
        assert float(metric.result()) == 0

    def test_extremes(self):
        y = np.arange(2000)
        metric = keras_milr.MutualInformation()
        right = np.eye(2000, dtype="float32")
        assert float(metric(y, right)) == pytest.approx(np.log(2000), abs=1e-5)
        for outputs, expected in (
            (np.roll(right, 1, axis=0), np.log(2000 / 1999)),  # Each is ruled out.
            (right[:1] + 0 * right, 0),
            (np.nan * right, 0),
        ):
            metric.reset_state()
            assert float(metric(y, outputs)) == pytest.approx(expected, abs=1e-5)
        # What is no class, and weights below 0, are not counted.
        metric.reset_state()
        ids, weight = np.where(y < 500, -1, y), np.where(y < 1000, -1.0, 1.0)
        metric.update_state(ids, right, sample_weight=weight)
        assert metric.table().sum() == 1000
        assert float(metric.result()) == pytest.approx(np.log(1000), abs=1e-5)

    @pytest.mark.parametrize("scale", [1.0, 1e-5])
    def test_weights(self, scale):
        """Of which only the ratios matter: their sum may be below 1."""
        y, p, said = self.data()
        weight = scale * np.random.default_rng(1).integers(0, 4, 3000)
        metric = keras_milr.MutualInformation()
        metric.update_state(y, p, sample_weight=weight)
        expected = reference.fano(said, y, 1500, weight)
        assert float(metric.result()) == pytest.approx(expected, abs=1e-5)
        found = readouts.from_hits(metric.table())
        assert found.value == pytest.approx(expected, abs=1e-5)
        assert 0 < found.stderr < 4

    def test_reads_as_the_table_would(self):
        """Its errors too, by `readouts.from_counts`."""
        y, p, said = self.data()
        metric = keras_milr.MutualInformation()
        metric.update_state(y, p)
        table = reference.contingency(np.where(said < 0, 1500, said), y, 1501, 1500)
        expected = readouts.from_counts(table)
        found = readouts.from_hits(metric.table())
        assert found.estimator == expected.estimator == "fano"
        for name in ("value", "stderr", "noise", "entropy"):
            assert getattr(found, name) == pytest.approx(getattr(expected, name))

    @pytest.mark.parametrize(("classes", "rows"), [(1024, 1025), (1025, 3)])
    def test_from_as_many_classes_as_the_probe(self, classes, rows):
        metric = keras_milr.MutualInformation()
        metric.update_state([0, 5], np.eye(classes)[[0, 5]])
        assert metric.table().shape == (rows, classes)
        assert float(metric.result()) == pytest.approx(np.log(2), abs=1e-5)
        with pytest.raises(ValueError, match=f"has counted {classes} classes so far"):
            metric.update_state([0, 5], np.eye(2049)[[0, 5]])

    def test_a_vocabulary(self):
        """Of which a table would have more cells than an int32 can number."""
        y = np.array([0, 49_999, 49_999, 30_000])
        p = np.zeros((4, 50_000), "float32")
        p[np.arange(4), [0, 49_999, 0, 30_000]] = 1
        metric = keras_milr.MutualInformation()
        metric.update_state(y, p)
        assert sum(4 * np.prod(one.shape) for one in metric.variables) < 2e6
        expected = np.zeros((3, 50_000))
        expected[[0, 0, 0, 1], [0, 49_999, 30_000, 49_999]] = 1
        np.testing.assert_array_equal(metric.table(), expected)

    @in_every_way
    def test_in_a_model_that_is_saved_and_loaded(self, options, tmp_path):
        model, codes = self.make_model(**options)
        x, y = self.inputs(codes)
        model.fit(x, y, epochs=1, verbose=0)
        expected = reference.fano(predicted(model, x), y, 1500)
        assert 1 < expected < 6
        for batch_size in (50, 900):
            found = information(model, x, y, batch_size=batch_size)
            assert found == pytest.approx(expected, abs=1e-5)
        model.save(tmp_path / "model.keras")
        loaded = keras.models.load_model(tmp_path / "model.keras")
        assert information(loaded, x, y) == pytest.approx(expected, abs=1e-5)
        loaded.fit(x, y, epochs=1, verbose=0)
        assert information(loaded, x, y) != pytest.approx(expected, abs=1e-3)

    @pytest.mark.backends(
        *("tensorflow", "jax"),
        reason="Keras on PyTorch changes the weights when it masks its own loss",
    )
    def test_tokens(self):
        rng = np.random.default_rng(0)
        x = rng.integers(0, 1100, (200, 5))
        x[:, 3:] *= rng.integers(0, 2, (200, 2))
        weight = rng.integers(0, 3, x.shape).astype("float32")
        model = keras.Sequential(
            [
                keras.Input((5,), dtype="int32"),
                keras.layers.Embedding(1100, 64, mask_zero=True),
                keras.layers.Dense(1100, activation="softmax"),
            ]
        )
        codes = rng.normal(size=(1100, 64))
        model.set_weights([codes, codes.T, np.zeros(1100)])
        model.compile(
            "sgd",
            "sparse_categorical_crossentropy",
            weighted_metrics=[keras_milr.MutualInformation()],
        )
        y = np.where(rng.random(x.shape) < 0.3, 5, x)
        said = model.predict(x, verbose=0).argmax(axis=-1)
        found = information(model, x, y, sample_weight=weight, batch_size=70)
        times = (weight * (x != 0)).ravel()
        expected = reference.fano(said.ravel(), y.ravel(), 1100, times)
        assert expected > 1
        assert found == pytest.approx(expected, abs=1e-5)

    @pytest.mark.parametrize("validation", [False, True])
    def test_as_the_source_of_the_callback(self, validation):
        model, codes = self.make_model()
        x, y = self.inputs(codes)
        key = ("val_" if validation else "") + "mutual_information"
        callback = keras_milr.MutualInformationLR(lambda r: r.rate, monitor=key)
        options = {"validation_data": (x[::3], y[::3])} if validation else {}
        history = model.fit(
            x, y, epochs=3, verbose=0, callbacks=[callback], **options
        ).history
        values = [record["value"] for record in callback.history]
        np.testing.assert_allclose(values, history[key], atol=1e-4)
        labels = y[::3] if validation else y
        entropy = reference.entropy(np.bincount(labels))
        for record in callback.history:
            assert record["estimator"] == "fano"
            assert record["entropy"] == pytest.approx(entropy)
            assert record["noise"] == pytest.approx(0.5 * record["stderr"])
            assert np.isnan([record["raw"], record["bound"]]).all()
        assert 0 < callback.history[-1]["stderr"] < 1

    def test_readings_within_an_epoch_are_of_their_batches(self):
        model, codes = self.make_model()
        x, y = self.inputs(codes, 1200)
        # A rate at which it stays as it is.
        model.compile(
            keras.optimizers.SGD(1e-6),
            model.loss,
            metrics=[keras_milr.MutualInformation()],
        )
        callback = keras_milr.MutualInformationLR(lambda r: r.rate, update_freq=20)
        options = {"batch_size": 20, "shuffle": False, "verbose": 0}
        model.fit(x, y, epochs=2, callbacks=[callback], **options)
        said = predicted(model, x)
        parts = [slice(i, i + 400) for i in (0, 400, 800)]
        expected = [reference.fano(said[part], y[part], 1500) for part in parts]
        values = [record["value"] for record in callback.history]
        np.testing.assert_allclose(values[:3], expected, atol=1e-6)
        np.testing.assert_allclose(values[3:6], expected, atol=1e-6)

    def test_goes_on_from_a_state(self, tmp_path):
        """As if it had not ended, with the counts that no reading has had yet."""

        def train(epochs, *callbacks, model=None, load=None, first=0):
            keras.utils.set_random_seed(0)
            made, codes = self.make_model()
            x, y = self.inputs(codes)
            callback = keras_milr.MutualInformationLR(
                lambda r: 0.9 * r.rate, update_freq=25
            )
            if load is not None:
                callback.load_state(load)
            options = {"batch_size": 45, "shuffle": False, "verbose": 0}
            (model or made).fit(
                *(x, y),
                epochs=epochs,
                initial_epoch=first,
                callbacks=[callback, *callbacks],
                **options,
            )
            return callback.history

        whole, path = train(4), tmp_path / "2.keras"
        train(2, keras.callbacks.ModelCheckpoint(path))
        loaded = keras.models.load_model(path)
        again = train(4, model=loaded, load=path, first=2)
        assert len(whole) == len(again) > 2
        for name in ("epoch", "batch", "value", "stderr", "entropy", "rate"):
            np.testing.assert_allclose(
                *([record[name] for record in found] for found in (again, whole)),
                rtol=1e-5,
            )

    def test_a_loop_that_resets_it_is_refused(self):
        model, codes = self.make_model()
        x, y = self.inputs(codes, 90)
        callback = keras_milr.MutualInformationLR(lambda r: r.rate)
        hooks = keras.callbacks.CallbackList([callback], model=model, epochs=1)
        hooks.on_train_begin()
        hooks.on_epoch_begin(0)
        for i in range(2):
            logs = model.train_on_batch(x[i::3], y[i::3], return_dict=True)
        with pytest.raises(ValueError, match="was reset within the epoch"):
            callback.on_train_batch_end(1, logs)


def test_kinds_that_cannot_stream():
    with pytest.raises(ValueError, match=r"(?s)'multi_label'.*probe_data=\(x, y\)"):
        keras_milr.MutualInformation(targets="continuous")
    with pytest.raises(ValueError, match="must be 'auto' or 'multi_label'"):
        keras_milr.MutualInformation(targets="soft")


@pytest.mark.backends(
    *("tensorflow", "jax"),
    reason="Keras on PyTorch changes the weights when it masks its own loss",
)
@pytest.mark.parametrize("kind", ["ids", "column", "one_hot"])
@pytest.mark.parametrize("weights", ["none", "samples", "positions"])
def test_tokens(kind, weights):
    """The mask of the output, and weights of samples or tokens."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 9, (200, 5))
    y = rng.integers(0, 3, x.shape)
    weight = {
        "none": None,
        "samples": rng.integers(0, 3, (200, 1)).astype("float32"),
        "positions": rng.integers(0, 3, x.shape).astype("float32"),
    }[weights]
    model = keras.Sequential(
        [
            keras.Input((5,), dtype="int32"),
            keras.layers.Embedding(9, 8, mask_zero=True),
            keras.layers.Dense(3, activation="softmax"),
        ]
    )
    loss = "categorical_crossentropy"
    loss = loss if kind == "one_hot" else "sparse_" + loss
    model.compile("sgd", loss, weighted_metrics=[keras_milr.MutualInformation()])
    labels = {"ids": y, "column": y[..., None], "one_hot": np.eye(3)[y]}[kind]
    times = (x != 0) * (1 if weight is None else weight.reshape(200, -1))
    repeated = np.repeat(np.arange(1000), times.astype(int).ravel())
    said = model.predict(x, verbose=0).argmax(axis=-1).ravel()
    found = information(model, x, labels, sample_weight=weight, batch_size=70)
    assert found == pytest.approx(
        mutual_info_score(y.ravel()[repeated], said[repeated]), abs=1e-5
    )


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"name": 3}, TypeError, "`name` must be a string"),
        ({"dtype": "a"}, ValueError, "`dtype` must be a data type"),
        ({"from_logits": 1}, TypeError, "`from_logits` must be True or False"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        keras_milr.MutualInformation(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_true": None}, "`y_true` must be an array of real numbers"),
        ({"y_true": ["a", "b"]}, "`y_true` must be an array of real numbers"),
        ({"y_true": [0, 1, 1]}, "`y_true` and `y_pred` must have the same length"),
        ({"y_true": 1}, r"`y_true`.*labels of shape \(\)"),
        ({"y_pred": "a"}, "`y_pred` must be an array of real numbers"),
        ({"y_pred": [[1, 2], [3]]}, "`y_pred` must be an array of real numbers"),
        ({"y_pred": 1.0}, "`y_pred` must be outputs of shape"),
        ({"y_pred": np.zeros((2, 0))}, "`y_pred` must be outputs of shape"),
        ({"sample_weight": ["a", "b"]}, "`sample_weight` must be an array"),
        ({"sample_weight": [1, 1, 1]}, "`sample_weight` and `y_pred` must have"),
        (
            {"sample_weight": [[0, 0, 0]]},
            r"weights of shape \(1, 3\) for.*\(2,\)",
        ),
    ],
)
def test_bad_updates(changes, message):
    batch = {"y_true": [0, 1], "y_pred": np.eye(2), "sample_weight": [1, 1]}
    metric = keras_milr.MutualInformation()
    with pytest.raises(ValueError, match=message):
        metric.update_state(**(batch | changes))


@pytest.mark.parametrize("shape", [(3, 4, 2), (3, 2), (2, 4), (1, 3), (3, 4, 1, 2)])
def test_bad_weights_of_positions(shape):
    metric = keras_milr.MutualInformation()
    labels, outputs = np.zeros((3, 4), "int32"), np.zeros((3, 4, 2))
    for good in ((3, 4, 1), (3, 4), (3, 1), (3,), (1, 4), (1,), ()):
        metric.update_state(labels, outputs, sample_weight=np.ones(good))
    with pytest.raises(ValueError, match=re.escape(f"of shape {shape} for outputs")):
        metric.update_state(labels, outputs, sample_weight=np.ones(shape))
    assert float(np.sum(metric.table())) == 7 * 12
