import keras
import numpy as np
import pytest
from sklearn.metrics import log_loss, mutual_info_score

from keras_milr import information, readouts
from tests import reference
from tests.backends import compiled


def sample(classes, n, seed=0, sharpness=2.0):
    """Labels, and probabilities that know something about them."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    logits = rng.normal(size=(n, classes)) + sharpness * np.eye(classes)[labels]
    p = np.exp(logits)
    return (p / p.sum(axis=1, keepdims=True)).astype("float32"), labels


def streamed(readout, outputs, labels, num_classes, batch):
    """Through a compiled update, batch by batch."""
    update = compiled(readout.update)
    state = readout.init(num_classes)
    for i in range(0, len(labels), batch):
        y = keras.ops.convert_to_tensor(labels[i : i + batch], "int32")
        state = update(state, keras.ops.convert_to_tensor(outputs[i : i + batch]), y)
    return readout.finish(state)


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_equals_independent_references(classes):
    outputs, labels = sample(classes, 3000)
    info = readouts.Predictions().measure(outputs, labels, classes)
    predicted = outputs.argmax(axis=1)
    table = reference.contingency(predicted, labels, classes, classes)
    entropy = reference.entropy(np.bincount(labels))
    assert info.raw == pytest.approx(mutual_info_score(labels, predicted), abs=1e-6)
    assert info.value == pytest.approx(
        reference.mutual_information(table, "miller_madow"), abs=1e-6
    )
    assert info.entropy == pytest.approx(entropy, abs=1e-6)
    assert info.stderr == pytest.approx(reference.standard_error(table), abs=1e-6)
    assert info.bound == pytest.approx(entropy - log_loss(labels, outputs), abs=1e-5)
    assert info.bound_stderr == pytest.approx(
        reference.h_minus_ce(outputs, labels)[1], abs=1e-5
    )
    assert info.estimator == "counts"
    assert info.accessible == max(info.value, info.bound)


def test_streaming_changes_nothing():
    outputs, labels = sample(5, 1000)
    readout = readouts.Predictions()
    whole = readout.measure(outputs, labels, 5)
    for batch in (1000, 250, 125):
        parts = streamed(readout, outputs, labels, 5, batch)
        np.testing.assert_allclose(parts[:-1], whole[:-1], atol=1e-5)


def test_one_unit_is_two_classes():
    outputs, labels = sample(2, 2000)
    both = readouts.Predictions().measure(outputs, labels, 2)
    single = readouts.Predictions().measure(outputs[:, 1:], labels, 2)
    np.testing.assert_allclose(single[:-1], both[:-1], atol=1e-5)


@pytest.mark.parametrize("units", [1, 2, 4])
def test_logits_are_read_as_probabilities_are(units):
    outputs, labels = sample(max(units, 2), 1000)
    p = outputs[:, 1:] if units == 1 else outputs
    logits = np.log(p / (1 - p)) if units == 1 else np.log(p) + 3.0
    classes = max(units, 2)
    from_p = readouts.Predictions().measure(p, labels, classes)
    from_logits = readouts.Predictions(from_logits=True).measure(
        logits, labels, classes
    )
    np.testing.assert_allclose(from_logits[:-1], from_p[:-1], atol=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_outputs_are_counted_in_float32(dtype):
    # More samples of one kind than half precision can count (2048, 256).
    outputs = np.tile(np.array([[0.9, 0.1], [0.2, 0.8]], "float32"), (5000, 1))
    labels = np.tile([0, 1], 5000)
    half = keras.ops.cast(outputs, dtype)
    info = readouts.Predictions().measure(half, labels, 2)
    assert info.raw == pytest.approx(np.log(2), abs=1e-6)
    assert info.bound == pytest.approx(
        np.log(2) + (np.log(0.9) + np.log(0.8)) / 2, abs=0.01
    )


@pytest.mark.parametrize("weighted_rows", [slice(0, 300), slice(None)])
def test_weights_are_counts(weighted_rows):
    outputs, labels = sample(3, 600)
    weight = np.ones(600, "float32")
    weight[weighted_rows] = 2.0
    readout = readouts.Predictions()
    state = readout.update(readout.init(3), outputs, labels, weight)
    repeated = np.repeat(np.arange(600), weight.astype(int))
    expected = readout.measure(outputs[repeated], labels[repeated], 3)
    assert expected.repeated == pytest.approx(1 - 600 / len(repeated))
    expected = expected._replace(repeated=0.0)
    np.testing.assert_allclose(readout.finish(state)[:-1], expected[:-1], atol=1e-5)


def test_shuffled_labels_have_no_information():
    outputs, labels = sample(10, 4000)
    shuffled = np.random.default_rng(1).permutation(labels)
    info = readouts.Predictions().measure(outputs, shuffled, 10)
    assert info.value < 4 * info.null / np.sqrt(40)  # 81 degrees of freedom
    assert info.bound == 0
    assert info.raw == pytest.approx(info.null, rel=0.5)


def test_the_first_of_the_largest_is_predicted():
    """As NumPy has it, for which 0 and -0 are the same; K where one is not finite."""
    rng = np.random.default_rng(0)
    outputs = rng.integers(-2, 2, (500, 4)).astype("float32") * 0.5
    outputs[rng.random((500, 4)) < 0.3] *= -1.0  # Many ties, and zeros of both signs.
    expected = outputs.argmax(axis=1)
    for i, value in enumerate((np.nan, np.inf, -np.inf)):
        outputs[i, i] = value
        expected[i] = 4
    tensor = keras.ops.convert_to_tensor(outputs)
    for function in (readouts.predicted_class, compiled(readouts.predicted_class)):
        found = keras.ops.convert_to_numpy(function(tensor))
        np.testing.assert_array_equal(found, expected)


def test_unknown_outputs_say_nothing_but_are_counted():
    outputs, labels = sample(4, 1000)
    all_nan = readouts.Predictions().measure(np.full_like(outputs, np.nan), labels, 4)
    assert all_nan.value == all_nan.bound == all_nan.accessible == 0
    outputs[:500] = np.inf
    half = streamed(readouts.Predictions(), outputs, labels, 4, 250)
    predicted = np.where(np.arange(1000) < 500, 4, outputs.argmax(axis=1))
    assert half.raw == pytest.approx(mutual_info_score(labels, predicted), abs=1e-6)
    assert half.entropy == pytest.approx(reference.entropy(np.bincount(labels)))


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.5, 0.05])
@pytest.mark.parametrize("knows", [False, True])
def test_standard_error_of_the_bound(share, knows):
    """The spread over 300 draws, balanced and not, of a model that knows the prior
    only, and of one that knows more."""
    rng = np.random.default_rng(0)
    bounds, stated = [], []
    for _ in range(300):
        labels = (rng.random(1000) < share).astype(int)
        p = np.full(1000, 1.01 * share)
        if knows:
            p = np.where(rng.random(1000) < 0.9, labels, 1 - labels) * 0.8 + 0.1
        # Not clipped at 0, so that the whole distribution is seen.
        log_p = np.log(np.where(labels == 1, p, 1 - p))
        bounds.append(reference.entropy(np.bincount(labels)) + log_p.mean())
        info = readouts.Predictions().measure(p[:, None], labels, 2)
        stated.append(info.bound_stderr)
    assert np.mean(stated) == pytest.approx(np.std(bounds), rel=0.2, abs=2e-4)


def test_probabilities_are_normalised():
    outputs, labels = sample(3, 300)
    exact = readouts.Predictions().measure(outputs, labels, 3)
    rounded = readouts.Predictions().measure(1.03 * outputs, labels, 3)
    assert rounded.bound == pytest.approx(exact.bound, abs=1e-5)


def test_fano_knows_nothing_of_rows_without_prediction():
    for classes, n in ((2, 16), (10, 400)):
        labels = np.arange(n) % classes
        table = np.zeros((classes + 1, classes))
        table[-1] = np.bincount(labels)
        info = readouts.from_counts(table)
        assert info.estimator == "fano"
        assert info.value == pytest.approx(0, abs=1e-12)
        assert np.isfinite(info.stderr)


def test_outputs_that_are_no_probabilities_have_no_bound():
    outputs, labels = sample(3, 300)
    info = readouts.Predictions().measure(np.log(outputs), labels, 3)
    assert np.isnan(info.bound)
    assert info.accessible == info.value > 0
    assert info.noise == 0.5 * info.stderr


class TestAttainable:
    @pytest.mark.parametrize("share", [0.0, 0.2, 0.4])
    @pytest.mark.parametrize("known", [3, 10])
    def test_is_what_a_perfect_predictor_knows(self, share, known):
        """Also where it knows some classes only, and guesses among the others."""
        rng = np.random.default_rng(0)
        true = rng.integers(0, 10, 200_000)
        drawn = rng.integers(0, 10, true.size)
        labels = np.where(rng.random(true.size) < share, drawn, true)
        everything = mutual_info_score(labels, true)
        guess = rng.integers(known, 10, true.size) if known < 10 else true
        predicted = np.where(true < known, true, guess)
        counts = np.zeros((11, 10))
        np.add.at(counts, (predicted, labels), 1)
        found = readouts.attainable(counts)
        # The largest of `known` errors, each of .006 nats at most.
        assert found == pytest.approx(everything, abs=0.02)
        if known < 10:
            assert mutual_info_score(labels, predicted) < 0.6 * found

    def test_nothing_is_held_against_what_is_not_predicted(self):
        """A network that says one class always: the others might be known."""
        counts = np.zeros((4, 3))
        counts[0] = 50, 30, 20
        entropy = information.entropy(np.array([50.0, 30, 20]))
        assert readouts.attainable(counts) == pytest.approx(entropy)


class TestManyClasses:
    def test_counts_serve_from_five_samples_a_cell(self):
        for n, estimator in ((500, "counts"), (499, "bound")):
            outputs, labels = sample(10, n)
            labels[:10] = np.arange(10)
            info = readouts.Predictions().measure(outputs, labels, 10)
            assert info.estimator == estimator

    def test_only_classes_that_occur_matter(self):
        outputs, labels = sample(100, 2000)
        info = readouts.Predictions().measure(outputs, labels % 10, 100)
        assert info.estimator == "counts"

    def test_the_bound_replaces_the_biased_count(self):
        outputs, labels = sample(200, 2000, sharpness=0.0)  # knows nothing
        info = readouts.Predictions().measure(outputs, labels, 200)
        assert info.raw > 2.0
        assert info.estimator == "bound"
        assert info.value == info.bound == 0

    def test_fano_without_probabilities(self):
        classes, error, n = 100, 0.3, 10_000
        rng = np.random.default_rng(0)
        labels = np.arange(n) % classes
        wrong = (labels + rng.integers(1, classes, n)) % classes
        predicted = np.where(np.arange(n) % 10 < 3, wrong, labels)
        outputs = 5.0 * np.eye(classes)[predicted] - 1.0
        info = readouts.Predictions().measure(outputs, labels, classes)
        assert info.estimator == "fano"
        # Sharp for the symmetric channel: log K − h(e) − e log(K − 1).
        truth = np.log(classes) + (
            error * np.log(error / (classes - 1)) + (1 - error) * np.log(1 - error)
        )
        assert info.value == pytest.approx(truth, abs=1e-6)
        slope = np.log((1 - error) * (classes - 1) / error)
        assert info.stderr == pytest.approx(slope * np.sqrt(error * (1 - error) / n))

    def test_error_of_fano_with_uneven_classes(self):
        """The delta method by hand: sample by sample, of H(Y) and of the error rate."""
        rng = np.random.default_rng(0)
        labels = np.minimum(rng.geometric(0.1, 3000) - 1, 39)
        wrong = (labels + rng.integers(1, 40, 3000)) % 40
        predicted = np.where(rng.random(3000) < 0.02 * (labels + 1), wrong, labels)
        info = readouts.Predictions().measure(np.eye(40)[predicted] - 1.0, labels, 40)
        assert info.estimator == "fano"
        error = np.mean(predicted != labels)
        slope = np.log((1 - error) * 39 / error)
        each = -np.log((np.bincount(labels) / 3000)[labels])
        each = each - slope * (predicted != labels)
        assert info.stderr == pytest.approx(np.std(each) / np.sqrt(3000), rel=1e-6)


def test_serialises():
    readout = readouts.Predictions(from_logits=True)
    config = keras.saving.serialize_keras_object(readout)
    assert keras.saving.deserialize_keras_object(config).from_logits is True


def test_bad_input():
    outputs, labels = sample(3, 30)
    readout = readouts.Predictions()
    with pytest.raises(ValueError, match=r"`outputs` must have shape \(n, 4\)"):
        readout.measure(outputs, labels, 4)
    with pytest.raises(ValueError, match=r"`outputs` must have shape \(n, 3\)"):
        readout.measure(outputs[:, :, None], labels, 3)
    with pytest.raises(ValueError, match=r"whole numbers in \[0, 3\)"):
        readout.measure(outputs, labels + 1, 3)
    with pytest.raises(ValueError, match="same length"):
        readout.measure(outputs, labels[:-1], 3)
    with pytest.raises(TypeError, match="`from_logits` must be True or False"):
        readouts.Predictions(from_logits="no")
    with pytest.raises(ValueError, match="outputs of shape"):
        readout.update(readout.init(3), outputs[:, :, None], labels)


def test_null_and_raw_come_from_the_same_table():
    outputs, labels = sample(3, 600)
    table = information.contingency(outputs.argmax(axis=1), labels, 3, 3)
    info = readouts.Predictions().measure(outputs, labels, 3)
    assert info.null == pytest.approx(float(information.null_level(table)))


@pytest.mark.parametrize("units", [1, 2, 3])
def test_logits_near_the_end_of_float32(units):
    """The square of the surprise would overflow, and its error be NaN."""
    labels = np.arange(60) % max(units, 2)
    outputs = np.zeros((60, units))
    outputs[0, 0], outputs[1, 0] = (3e38, -3e38) if units == 1 else (-3e38, 3e38)
    readout = readouts.Predictions(from_logits=True)
    info = readout.measure(outputs, labels, max(units, 2))
    assert np.isfinite(info[:-1]).all()
    assert info.bound == 0
    assert info.cross_entropy > 1e12


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"outputs": [[1, 2], [3]]}, "`outputs` must be an array of real numbers"),
        ({"outputs": "a"}, "`outputs` must be an array of real numbers"),
        ({"outputs": np.zeros((2, 0))}, r"`outputs` must have shape \(n, 2\)"),
        ({"class_ids": [[1, 2], [3]]}, "`class_ids`"),
        ({"class_ids": 1}, "`class_ids`: The labels must be class ids"),
        ({"num_classes": np.ones(2)}, "`num_classes` must be an integer"),
        ({"num_classes": "2"}, "`num_classes` must be an integer"),
    ],
)
def test_absurd_input(changes, message):
    arguments = {"outputs": np.eye(2), "class_ids": [0, 1], "num_classes": 2}
    with pytest.raises((TypeError, ValueError), match=message):
        readouts.Predictions().measure(**(arguments | changes))


@pytest.mark.parametrize("p", [0.5, 0.4])
def test_cross_entropy_of_millions_of_pixels(p):
    """Of a constant output; what is added to a sum that has grown large was rounded."""
    n = 64 * 256 * 256
    labels = np.arange(n, dtype="int32") % 2
    info = readouts.Predictions().measure(np.full((n, 1), p, "float32"), labels, 2)
    expected = -0.5 * (np.log(p) + np.log(1 - p))
    assert info.cross_entropy == pytest.approx(expected, rel=1e-4)
