import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from sklearn.covariance import oas
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics import log_loss, mutual_info_score

from keras_milr import readouts
from keras_milr.readouts import linear
from tests import reference

LinearReadout = readouts.LinearReadout

# Two classes N(±μ, 1): |μ| → the exact information, nats.
EXACT = {0.25: 0.030311, 0.5: 0.111421, 1: 0.336831, 2: 0.632720, 3: 0.689298}


def measure(x, labels, classes):
    return LinearReadout().measure(x, labels, classes)


def rotation(width, seed=0):
    rng = np.random.default_rng(seed)
    return np.linalg.qr(rng.normal(size=(width, width)))[0]


def gaussians(mu, n=4000, width=300, seed=0):
    """Two classes that differ in one direction of many, no axis among them."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, n)
    x = rng.normal(size=(n, width))
    x[:, 0] += np.where(labels, mu, -mu)
    return (x @ rotation(width, seed)).astype("float32"), labels


def layer(classes=10, n=1000, width=64, sharpness=1.5, seed=0):
    """A layer of ReLUs that knows something of the labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    x = rng.normal(size=(n, width)) + sharpness * rng.normal(size=(classes, width))[
        labels
    ] / np.sqrt(width / 8)
    return np.maximum(x, 0).astype("float32"), labels


def assert_close(info, expected, atol):
    for field in ("value", "raw", "entropy", "null", "stderr", "bound", "bound_stderr"):
        got, want = getattr(info, field), getattr(expected, field)
        assert got == pytest.approx(want, abs=atol), field
    assert info.estimator == expected.estimator


class TestReference:
    @pytest.mark.parametrize(
        ("classes", "n", "width", "sharpness"),
        [
            (2, 400, 5, 0.1),
            (2, 40, 64, 0.3),  # fewer samples than features: an unsure readout
            (3, 301, 40, 0.3),
            (10, 1000, 64, 1.5),
            (10, 1000, 64, 0.0),  # knows nothing
            (10, 300, 400, 1.0),
            (100, 2000, 50, 3.0),
        ],
    )
    def test_equals(self, classes, n, width, sharpness):
        x, labels = layer(classes, n, width, sharpness)
        info = measure(x, labels, classes)
        p = reference.linear_readout(x, labels, classes)
        entropy = reference.entropy(np.bincount(labels))
        bound, bound_stderr = reference.h_minus_ce(p, labels)
        predicted = p.argmax(axis=1)
        assert info.bound == pytest.approx(bound, abs=1e-4)
        assert info.bound_stderr == pytest.approx(bound_stderr, abs=1e-4)
        assert info.entropy == pytest.approx(entropy, abs=1e-6)
        # One sample between two classes may fall on the other side in float32.
        assert info.raw == pytest.approx(mutual_info_score(labels, predicted), abs=2e-3)
        if info.estimator == "counts":
            table = reference.contingency(predicted, labels, classes, classes)
            value = reference.mutual_information(table, "miller_madow")
            assert info.value == pytest.approx(value, abs=2e-3)
        else:
            assert info.value == info.bound

    @pytest.mark.parametrize("classes", [2, 10])
    def test_predicts_what_scikit_learn_does(self, classes):
        x, _ = layer(classes, 100 * classes, 40, 0.0)
        labels = np.arange(len(x)) % classes
        x += 0.6 * np.eye(40)[labels]
        half, predicted = reference.halves(labels), np.zeros_like(labels)
        for test in (0, 1):
            fit = half != test
            z = (x - x[fit].mean(axis=0)) / x[fit].std(axis=0)
            means = np.stack([z[fit & (labels == k)].mean(0) for k in range(classes)])
            share = oas((z - means[labels])[fit], assume_centered=True)[1]
            # The same covariance, up to a factor, as with 1 percent on top.
            lda = LinearDiscriminantAnalysis("lsqr", shrinkage=(share + 0.01) / 1.01)
            predicted[~fit] = lda.fit(z[fit], labels[fit]).predict(z[~fit])
        info = measure(x, labels, classes)
        assert info.raw > 0.1
        assert info.raw == pytest.approx(mutual_info_score(labels, predicted), abs=2e-3)

    def test_class_missing_from_a_half(self):
        x, labels = layer(3, 301, 10)
        labels[:] = np.where(labels == 2, 1, labels)
        labels[7], labels[[30, 50, 70]] = 2, 3  # one sample, and three; none of 4
        info = measure(x, labels, 5)
        p = reference.linear_readout(x, labels, 5)
        bound, stderr = reference.h_minus_ce(p, labels)
        assert info.bound == pytest.approx(bound, abs=1e-4)
        assert info.bound_stderr == pytest.approx(stderr, abs=1e-4)


class TestKnownInformation:
    @pytest.mark.parametrize("mu", EXACT)
    @pytest.mark.parametrize("seed", range(3))
    def test_gaussians(self, mu, seed):
        info = measure(*gaussians(mu, seed=seed), 2)
        assert info.estimator == "counts"
        for reading in (info.value, info.bound, info.accessible):
            assert reading <= EXACT[mu] + 0.02
            assert mu < 1 or reading >= 0.45 * EXACT[mu]

    @pytest.mark.parametrize("mu", [0.25, 3])
    @pytest.mark.parametrize("seed", range(3))
    def test_gaussians_shuffled(self, mu, seed):
        x, labels = gaussians(mu, seed=seed)
        labels = np.random.default_rng(seed + 100).permutation(labels)
        assert measure(x, labels, 2).accessible < 0.02

    def test_gaussians_without_noise_to_fit(self):
        # Two dimensions and many samples: the readout is the best there is.
        for mu in (0.5, 1, 2):
            info = measure(*gaussians(mu, n=40_000, width=2), 2)
            assert info.bound == pytest.approx(EXACT[mu], abs=3 * info.bound_stderr)

    @pytest.mark.parametrize(
        ("classes", "n", "width"),
        [(10, 200, 512), (10, 200, 16), (10, 200, 5000), (50, 120, 32), (100, 150, 20)],
    )
    @pytest.mark.parametrize("seed", range(3))
    def test_few_samples_with_shuffled_labels(self, classes, n, width, seed):
        x, labels = layer(classes, n, width, seed=seed)
        labels = np.random.default_rng(seed + 100).permutation(labels)
        assert measure(x, labels, classes).accessible < 0.02

    @pytest.mark.parametrize(("classes", "n"), [(2, 400), (10, 1000), (100, 1000)])
    def test_one_hot_layer_reads_everything(self, classes, n):
        labels = np.arange(n) % classes
        info = measure(np.eye(classes)[labels], labels, classes)
        assert info.entropy == pytest.approx(np.log(classes))
        assert info.value == pytest.approx(np.log(classes), abs=1e-4)
        assert info.bound == pytest.approx(np.log(classes), abs=1e-4)

    def test_reads_positions_in_images(self):
        """Which quarter is lit: nothing of it is left in the mean over space."""
        rng = np.random.default_rng(0)
        labels = np.arange(800) % 4
        x = rng.normal(size=(800, 12, 12, 2))
        x[:, :, :, 0] += np.kron(np.eye(4).reshape(4, 2, 2), np.ones((1, 6, 6)))[labels]
        assert measure(x, labels, 4).value > 0.9 * np.log(4)
        assert measure(x.mean(axis=(1, 2)), labels, 4).value < 0.02


class TestOutputs:
    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("sharpness", [0.5, 1.0, 2.0, 4.0])
    def test_agree_with_predictions(self, sharpness, seed):
        """Calibrated softmax outputs, read as a layer and as an output.

        A linear function of the probabilities says the same class, and is less well
        calibrated than the probabilities themselves.
        """
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, 10, 3000)
        logits = rng.normal(size=(3000, 10)) + sharpness * np.eye(10)[labels]
        p = np.exp(sharpness * logits)
        p /= p.sum(axis=1, keepdims=True)
        layer = measure(p, labels, 10)
        output = readouts.Predictions().measure(p, labels, 10)
        assert layer.value == pytest.approx(output.value, abs=0.03)
        assert 0.6 * output.bound < layer.bound < output.bound + 0.02

    def test_a_layer_reads_no_less_than_a_function_of_it(self, digits):
        x, labels = digits
        columns = measure(x.reshape(-1, 8, 8).mean(axis=1), labels, 10)
        whole = measure(x, labels, 10)
        assert columns.value < whole.value - 0.3
        assert whole.value > 1.8  # of 2.3; linear classifiers are right 95 % of times


class TestInvariance:
    def test_affine_maps_of_the_units(self):
        x, labels = layer(seed=1)
        rng = np.random.default_rng(0)
        scaled = x * np.exp(3 * rng.normal(size=64)) * rng.choice([-1, 1], 64)
        expected = measure(x, labels, 10)
        assert_close(measure(scaled, labels, 10), expected, 1e-4)
        moved = scaled + scaled.std(axis=0) * rng.normal(size=64) * 10
        assert_close(measure(moved, labels, 10), expected, 2e-3)

    def test_rotations(self):
        # Units are standardised one by one, so not to the last digit.
        x, labels = gaussians(1)
        expected = measure(x, labels, 2)
        info = measure(x @ rotation(300, seed=7), labels, 2)
        assert info.value == pytest.approx(expected.value, abs=0.01)
        assert info.bound == pytest.approx(expected.bound, abs=2e-3)

    def test_names_of_the_classes(self):
        x, labels = layer()
        names = np.random.default_rng(0).permutation(100)[:10]
        assert_close(measure(x, names[labels], 100), measure(x, labels, 10), 1e-4)

    def test_order_of_the_samples(self):
        """Across classes it changes nothing; within, other halves read as much."""
        x, labels = layer(n=2000)
        expected = measure(x, labels, 10)
        order = np.argsort(labels, kind="stable")
        assert_close(measure(x[order], labels[order], 10), expected, 1e-4)
        for seed in range(3):
            order = np.random.default_rng(seed).permutation(2000)
            info = measure(x[order], labels[order], 10)
            assert info.value == pytest.approx(expected.value, abs=2 * info.stderr)
            assert info.bound == pytest.approx(
                expected.bound, abs=2 * info.bound_stderr
            )

    def test_seeds(self):
        x, labels = layer(width=600)
        first = LinearReadout(sketch=64, seed=0).measure(x, labels, 10)
        assert LinearReadout(sketch=64, seed=0).measure(x, labels, 10) == first
        other = LinearReadout(sketch=64, seed=1).measure(x, labels, 10)
        assert other.bound != first.bound
        # Up to twice the sketch there is nothing to draw.
        first = LinearReadout(sketch=300, seed=0).measure(x, labels, 10)
        assert LinearReadout(sketch=300, seed=1).measure(x, labels, 10) == first

    def test_features_keep_what_is_read(self):
        x, _ = layer(width=513)
        assert LinearReadout().features(x).shape == (1000, 256)
        assert LinearReadout().features(x[:, :512]).shape == (1000, 512)
        assert LinearReadout(sketch=300).features(x).shape == (1000, 1024)  # Zeros.
        assert LinearReadout().features(x[:, :3]).shape == (1000, 64)
        assert LinearReadout().features([x[:, :300], x[:, :300]]).shape == (1000, 256)


def test_lists_are_read_together():
    # The exclusive or of two signs, and the sum that tells it.
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 1000, 4))
    labels = (a[:, 0] + b[:, 0] > 0).astype(int)
    whole = measure(np.concatenate([a, b], axis=1), labels, 2)
    assert measure([a, b], labels, 2) == whole
    assert whole.value > measure(a, labels, 2).value + 0.2


def extremes():
    x, labels = layer(4, 400, 8)
    yield "constant", np.full_like(x, 0.1), labels, 4, 0
    yield "large constant", np.full_like(x, 1e14), labels, 4, 0
    yield "zero", np.zeros_like(x), labels, 4, 0
    yield "NaN", np.full_like(x, np.nan), labels, 4, 0
    yield "infinite", np.full_like(x, -np.inf), labels, 4, 0
    yield "overflows in squares", 1e30 * x, labels, 4, None
    yield "large", 1e13 * x, labels, 4, None
    yield "small", 1e-13 * x, labels, 4, None
    yield "subnormal", 1e-40 * x, labels, 4, None
    yield "one class", x, np.full(400, 3), 4, 0
    yield "one sample of a class", x, (np.arange(400) == 9).astype(int), 2, None
    yield "one sample", x[:1], labels[:1], 4, 0
    yield "two samples", x[:2], np.array([0, 1]), 4, 0
    yield "four samples", x[:4], np.array([0, 1, 0, 1]), 2, None
    yield "one sample per class", x[:100], np.arange(100), 100, None
    yield "one feature", x[:, :1], labels, 4, None
    scale = np.where(reference.halves(labels) == 0, 1e-13, 1e14)
    jump = scale[:, None] * np.random.default_rng(0).normal(size=(4, 8))[labels]
    yield "almost still in one half", jump, labels, 4, None


@pytest.mark.parametrize("case", list(extremes()), ids=lambda case: case[0])
def test_extremes(case):
    """Always a number, from 0 to H(Y)."""
    _, x, labels, classes, expected = case
    info = measure(x, labels, classes)
    entropy = reference.entropy(np.bincount(labels))
    # The spread of its outputs matters for the network's output only.
    assert np.all(np.isfinite(info._replace(variation=0.0)[:-1]))
    assert info.entropy == pytest.approx(entropy, abs=1e-6)
    for reading in (info.value, info.bound, info.raw):
        assert 0 <= reading <= info.entropy
        assert expected is None or reading == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("scale", [1e-12, 1e13])
def test_scale_of_the_layer_does_not_matter(scale):
    x, labels = layer()
    assert_close(measure(scale * x, labels, 10), measure(x, labels, 10), 1e-4)


@pytest.mark.parametrize(("value", "digit"), [(0.0, 0), (0.1, 0), (1e4, 0), (3, 1e-7)])
def test_dead_units_do_not_matter(value, digit):
    x, labels = layer(n=5000)  # enough for the mean of a constant to be rounded
    still = value * (1 + digit * np.random.default_rng(0).integers(-1, 2, (5000, 100)))
    still = np.concatenate([x, still], axis=1)
    assert_close(measure(still, labels, 10), measure(x, labels, 10), 1e-4)


def test_one_sample_far_out_costs_little():
    x, labels = gaussians(2, n=1000, width=20)
    expected = measure(x, labels, 2)
    x[0, 0] = 1e6
    info = measure(x, labels, 2)
    assert info.value > 0.9 * expected.value
    assert info.bound > 0.9 * expected.bound


def test_one_sample_out_of_the_range_of_float32_costs_little():
    # 1e27 standard deviations, between classes that have no variance within.
    labels = np.arange(1000) % 8
    x = 1e-13 * np.random.default_rng(0).normal(size=(8, 8))[labels]
    x[17, 0] = 1e14
    info = measure(x, labels, 8)
    assert info.value > 0.9 * np.log(8)
    assert info.bound > 0.9 * np.log(8)


class TestWeights:
    @pytest.mark.parametrize("bad", [0.0, 1e10, np.nan])
    def test_rows_of_weight_zero_change_nothing(self, bad):
        x, labels = layer()
        expected = measure(x, labels, 10)
        weight = np.ones(1300)
        weight[np.random.default_rng(1).choice(1300, 300, replace=False)] = 0.0
        mixed, ids = np.full((1300, 64), bad, "float32"), np.arange(1300) % 10
        mixed[weight > 0], ids[weight > 0] = x, labels
        info = LinearReadout().read(mixed, ids, 10, sample_weight=weight)
        assert_close(info, expected, 1e-4)

    def test_weights_count_in_fit_and_reading(self):
        # Two populations with opposite signs: the heavier one is learned and counted.
        rng = np.random.default_rng(0)
        labels, sign = np.arange(2000) % 2, np.where(np.arange(2000) < 1000, 1, -1)
        x = (rng.normal(size=2000) + 2 * sign * (2 * labels - 1))[:, None]
        even = LinearReadout().read(x, labels, 2)
        assert even.accessible < 0.02
        weight = np.where(sign > 0, 1.0, 0.01)
        heavy = LinearReadout().read(x, labels, 2, sample_weight=weight)
        one = LinearReadout().read(x[:1000], labels[:1000], 2)
        assert heavy.value == pytest.approx(one.value, abs=0.06)
        assert heavy.value > 0.5

    def test_of_nothing(self):
        x, labels = layer(n=50)
        info = LinearReadout().read(x, labels, 10, sample_weight=np.zeros(50))
        assert info.value == info.raw == info.entropy == info.accessible == 0


def test_rows_of_nan_are_no_prediction():
    x, labels = layer(n=1000)
    p = reference.linear_readout(x, labels, 10)
    # At the end, so that the halves of the others stay.
    bad = np.full((100, 64), 1.0)
    bad[np.arange(100), np.arange(100) % 64] = np.resize([np.nan, np.inf, 1e20], 100)
    ids = np.append(labels, np.arange(100) % 10)
    info = measure(np.concatenate([x, bad]), ids, 10)
    predicted = np.append(p.argmax(axis=1), np.full(100, 10))
    assert info.raw == pytest.approx(mutual_info_score(ids, predicted), abs=2e-3)
    # At the price of the worst guess, as in `Predictions`.
    surprise = log_loss(labels, p, labels=np.arange(10)) * 1000 - 100 * np.log(1e-7)
    entropy = reference.entropy(np.bincount(ids))
    assert info.bound == pytest.approx(max(entropy - surprise / 1100, 0), abs=1e-3)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_computed_in_float32(dtype):
    x, labels = layer(n=3000)  # more than half precision can count
    half = keras.ops.cast(x, dtype)
    info = measure(half, labels, 10)
    assert info == measure(keras.ops.cast(half, "float32"), labels, 10)
    assert LinearReadout().read(half, labels, 10) == info
    assert info.bound == pytest.approx(measure(x, labels, 10).bound, abs=0.01)


@pytest.mark.backends("tensorflow", "jax", reason="PyTorch does not trace")
def test_is_traced_once_for_the_labels_of_a_probe(monkeypatch):
    """On TensorFlow for layers of all widths, elsewhere once for each."""
    traced, count = [], linear._count_held_out

    def counted(features, *args):
        traced.append(features.shape[-1])
        return count(features, *args)

    monkeypatch.setattr(linear, "_count_held_out", counted)
    fresh = functools.cache(linear._compiled.__wrapped__)
    monkeypatch.setattr(linear, "_compiled", fresh)
    readout, rng = LinearReadout(), np.random.default_rng(0)
    _, labels = layer(n=333, width=9)
    for weight in (1.0, 2.0):
        for width in (9, 64, 17):
            x = keras.ops.convert_to_tensor(rng.normal(size=(333, width)), "float32")
            readout.read(x, labels, 10, np.full(333, weight))
    tensorflow = keras.backend.backend() == "tensorflow"
    assert traced == ([None] if tensorflow else [9, 64, 17])


@pytest.mark.backends("tensorflow", reason="with and without XLA")
@pytest.mark.parametrize("jit_compile", [False, True])
def test_features_compile(jit_compile):
    x = np.random.default_rng(0).normal(size=(8, 9, 10, 40)).astype("float32")
    readout = LinearReadout()
    compiled = tf.function(readout.features, jit_compile=jit_compile)
    np.testing.assert_allclose(compiled(x), readout.features(x), atol=1e-5)
    assert compiled(x).shape == (8, 256)


@pytest.mark.backends("tensorflow", reason="others know all shapes")
def test_features_of_unknown_batch_and_length():
    signature = [tf.TensorSpec((None, None, 600), tf.float16)]
    compiled = tf.function(LinearReadout().features, signature)
    assert compiled.get_concrete_function().output_shapes == (None, 256)


def test_batches_of_features_are_those_of_the_whole():
    x, labels = layer(width=600)
    readout = LinearReadout()
    parts = [readout.features(x[i : i + 300]) for i in range(0, 1000, 300)]
    info = readout.read(np.concatenate(parts), labels, 10)
    assert_close(info, readout.measure(x, labels, 10), 1e-5)


def test_serialises():
    readout = LinearReadout(sketch=77, seed=5)
    config = keras.saving.serialize_keras_object(readout)
    assert config["registered_name"] == "keras_milr>LinearReadout"
    again = keras.saving.deserialize_keras_object(config)
    assert (again.sketch, again.seed) == (77, 5)


def test_integers_of_numpy():
    x, labels = layer(n=200, width=150)
    expected = LinearReadout(sketch=70).measure(x, labels, 10)
    readout = LinearReadout(sketch=np.int8(70))
    assert readout.measure(x, labels, np.uint64(10)) == expected
    expected = readouts.UnitHistogram(bins=100).measure(x, labels, 10)
    readout = readouts.UnitHistogram(bins=np.int8(100))
    assert readout.measure(x, labels, np.uint64(10)) == expected


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"sketch": 0}, ValueError, "`sketch` must be an integer, at least 1"),
            ({"sketch": 2.5}, ValueError, "`sketch` must be an integer, at least 1"),
            ({"sketch": None}, TypeError, "`sketch` must be an integer, at least 1"),
            ({"seed": -1}, ValueError, "`seed` must be an integer, at least 0"),
            ({"seed": None}, TypeError, "`seed` must be an integer, at least 0"),
        ],
    )
    def test_constructor(self, arguments, error, message):
        with pytest.raises(error, match=message):
            LinearReadout(**arguments)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"features": np.ones(30)}, r"`features` must have .*shape=\(30,\)"),
            ({"features": np.ones((30, 2, 2))}, r"`features` must have .*30, 2, 2"),
            ({"features": np.ones((0, 4))}, r"`features` must have .*\(0, 4\)"),
            ({"features": np.ones((30, 0))}, r"`features` must have .*\(30, 0\)"),
            ({"features": np.ones((29, 4))}, r"same length.*29 and 30"),
            ({"class_ids": np.arange(30)}, r"whole numbers in \[0, 3\)"),
            ({"class_ids": np.full(30, -1)}, r"whole numbers in \[0, 3\)"),
            ({"class_ids": np.full(30, 0.5)}, r"whole numbers in \[0, 3\)"),
            ({"class_ids": np.array(["a"] * 30)}, "labels must be numbers"),
            ({"class_ids": [[0, 1], [2]]}, "`class_ids`: "),
            ({"num_classes": 1}, "`num_classes` must be an integer, at least 2"),
            ({"num_classes": 10**9}, "`num_classes` must be .* at most 46340"),
            ({"sample_weight": np.ones(31)}, r"same length.*30 and \(31,\)"),
            ({"sample_weight": np.ones((30, 1))}, r"`sample_weight` one axis"),
            ({"sample_weight": -np.ones(30)}, r"not negative.* 30 bad .*-1\.0"),
            ({"sample_weight": np.full(30, np.nan)}, "must be finite"),
        ],
    )
    @pytest.mark.parametrize("readout", [LinearReadout(), readouts.UnitHistogram()])
    def test_read(self, readout, changes, message):
        arguments = {
            "features": np.random.default_rng(0).normal(size=(30, 4)),
            "class_ids": np.arange(30) % 3,
            "num_classes": 3,
            "sample_weight": np.ones(30),
        }
        readout.read(**arguments)
        with pytest.raises(ValueError, match=message):
            readout.read(**(arguments | changes))

    @pytest.mark.parametrize("readout", [LinearReadout(), readouts.UnitHistogram()])
    @pytest.mark.parametrize("activations", [[], "a", None, {"a": 1}, [[1], [2, 3]]])
    def test_absurd_activations(self, readout, activations):
        with pytest.raises(ValueError, match="`activations` must"):
            readout.measure(activations, [0, 1], 2)

    def test_number_instead_of_activations(self):
        with pytest.raises(ValueError, match=r"`activations` must be .* a number"):
            measure(1.0, [0, 1], 2)


def test_temperatures_take_no_memory_of_their_own(monkeypatch):
    """One after the other: with 8,000 classes all eight took 1.5 GB."""
    rng, log_softmax, sizes = np.random.default_rng(0), keras.ops.log_softmax, []

    def watched(x, axis=-1):
        sizes.append(np.prod(x.shape))
        return log_softmax(x, axis)

    monkeypatch.setattr(keras.ops, "log_softmax", watched)
    # A shape that no other test has compiled.
    features, labels = rng.normal(size=(211, 3)), rng.integers(0, 53, 211)
    LinearReadout().measure(features, labels, 53)
    assert max(sizes) == 211 * 53
