import hypothesis.extra.numpy
import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_milr import targets
from tests import reference
from tests.backends import compiled

IDS = np.array([0, 2, 1, 2])


@pytest.mark.parametrize(
    ("labels", "units", "kind", "expected"),
    [
        (IDS, 3, "sparse", IDS),
        (IDS[:, None].astype("float32"), 3, "sparse", IDS),
        (IDS, 1000, "sparse", IDS),
        (np.eye(3)[IDS], 3, "one_hot", IDS),
        (np.eye(3)[IDS].astype(bool), 3, "one_hot", IDS),
        (np.eye(3, dtype="float16")[IDS], 3, "one_hot", IDS),
        (np.array([0, 1, 1]), 1, "binary", [0, 1, 1]),
        (np.array([[0.0], [1.0]]), 1, "binary", [0, 1]),
        (np.array([True, False]), 1, "binary", [1, 0]),
        (np.array([0, 1, 1]), 2, "sparse", [0, 1, 1]),
    ],
)
def test_kinds(labels, units, kind, expected):
    assert targets.label_kind(labels.shape, units) == kind
    checked = targets.checked_class_ids(labels, units)
    assert checked.dtype == "int32"
    np.testing.assert_array_equal(checked, expected)
    found = compiled(lambda y: targets.class_ids(y, units))(labels)
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(found), expected)


@pytest.mark.parametrize(
    ("labels", "units", "message"),
    [
        ([0, 1, -1], 3, r"whole numbers in \[0, 3\).*first -1"),
        ([0, 1, 3], 3, r"whole numbers in \[0, 3\).*first 3"),
        ([0, 1, 2], 1, r"whole numbers in \[0, 2\).*first 2"),
        ([0.0, 0.5], 3, "whole numbers.*first 0.5"),
        ([0.0, np.nan], 3, "whole numbers.*first nan"),
        ([0.0, np.inf], 3, "whole numbers.*first inf"),
        (["cat", "dog"], 3, "must be numbers"),
        ([[0.5, 0.5], [1.0, 0.0]], 2, "one-hot.*row 0"),
        ([[1.0, 0.0], [1.0, 1.0]], 2, "one-hot.*row 1"),
        ([[1.0, 0.0], [0.0, 0.0]], 2, "one-hot.*row 1"),
        ([[1.0, 0.5], [0.0, 1.0]], 2, "one-hot.*row 0"),
        (np.zeros((4, 3)), 5, r"shape \(n, 5\).*\(4, 3\)"),
        (np.zeros((4, 3, 3)), 3, r"Received: labels of shape \(4, 3, 3\)"),
        (np.zeros(()), 3, r"Received: labels of shape \(\)"),
    ],
)
def test_bad_labels(labels, units, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        targets.checked_class_ids(np.asarray(labels), units)


def rows(n=6, units=4, seed=0):
    return np.random.default_rng(seed).dirichlet(np.ones(units), n)


IDS_6 = np.arange(6) % 4
YES = np.array([[1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]] * 2)
SOFTMAX, SIGMOID = rows(1), rows(1) + 0.5


def custom(y_true, y_pred):
    return keras.ops.mean(keras.ops.abs(y_true - y_pred))


class MyCrossentropy(keras.losses.CategoricalCrossentropy):
    pass


class TestDetection:
    @pytest.mark.parametrize(
        ("loss", "labels", "outputs", "kind"),
        [
            # Strings, objects and functions.
            ("sparse_categorical_crossentropy", IDS_6, SOFTMAX, "sparse"),
            ("crossentropy", IDS_6, SOFTMAX, "sparse"),
            ("crossentropy", np.eye(4)[IDS_6], SOFTMAX, "soft"),
            ("CategoricalCrossentropy", np.eye(4)[IDS_6], SOFTMAX, "soft"),
            (keras.losses.KLDivergence(), rows(), SOFTMAX, "soft"),
            (keras.losses.categorical_crossentropy, rows(), SOFTMAX, "soft"),
            (MyCrossentropy(label_smoothing=0.1), rows(), SOFTMAX, "soft"),
            ("kld", rows(), SOFTMAX, "soft"),
            ("binary_crossentropy", YES, SIGMOID, "multi_label"),
            (keras.losses.BinaryFocalCrossentropy(), YES, SIGMOID, "multi_label"),
            ("binary_crossentropy", IDS_6 % 2, SIGMOID[:, :1], "binary"),
            ("binary_crossentropy", IDS_6[:, None] % 2, SIGMOID[:, :1], "binary"),
            ("hinge", 2 * (IDS_6 % 2) - 1, -SIGMOID[:, :1], "binary"),
            ("squared_hinge", 2 * YES - 1, -SIGMOID, "multi_label"),
            ("mse", rows()[:, 0], SIGMOID[:, :1], "continuous"),
            ("mae", 3 * rows(), SIGMOID, "continuous"),
            ("mape", rows(), SIGMOID, "continuous"),
            ("msle", rows(), SIGMOID, "continuous"),
            ("huber", rows(), SIGMOID, "continuous"),
            (keras.losses.LogCosh(), YES, SIGMOID, "continuous"),
            (keras.losses.Poisson(), IDS_6, SIGMOID[:, :1], "continuous"),
            # Loss, labels and outputs together.
            ("binary_crossentropy", np.eye(4)[IDS_6], SOFTMAX, "one_hot"),
            ("binary_crossentropy", np.eye(4)[IDS_6], SIGMOID, "multi_label"),
            (
                keras.losses.BinaryCrossentropy(from_logits=True),
                *(np.eye(4)[IDS_6], SOFTMAX, "multi_label"),
            ),
            ("mse", np.eye(4)[IDS_6], SOFTMAX, "one_hot"),
            ("mse", IDS_6 % 2, SIGMOID[:, :1], "binary"),
            # Labels alone, where they fit one kind only.
            (custom, IDS_6, SIGMOID, "sparse"),
            (None, IDS_6, SIGMOID, "sparse"),
            (custom, IDS_6 % 2, SIGMOID[:, :1], "binary"),
            (custom, rows()[:, 0], SIGMOID[:, :1], "continuous"),
            (custom, np.eye(4)[IDS_6], SIGMOID, "one_hot"),
            (custom, YES, SIGMOID, "multi_label"),
            (custom, 3 * rows(), SIGMOID, "continuous"),
            ("dice", YES, SIGMOID, "multi_label"),
            # Class ids and one-hot labels are known whatever the loss.
            ("sparse_categorical_crossentropy", np.eye(4)[IDS_6], SOFTMAX, "one_hot"),
            ("categorical_crossentropy", IDS_6, SOFTMAX, "sparse"),
            # Positions.
            ("mse", np.zeros((6, 5, 3)) + 0.5, np.zeros((1, 5, 3)), "continuous"),
            (None, np.zeros((6, 5), int), np.zeros((1, 5, 3)), "sparse"),
            (None, np.zeros((6, 5, 1)), np.zeros((1, 5, 3)), "sparse"),
            ("bce", np.zeros((6, 5, 7, 1)), np.zeros((1, 5, 7, 1)), "binary"),
            ("bce", np.zeros((6, 5, 7)), np.zeros((1, 5, 7, 1)), "binary"),
        ],
    )
    def test_from_loss_labels_and_outputs(self, loss, labels, outputs, kind):
        found = targets.detect(loss, labels, outputs)
        assert found.kind == kind
        assert found.units == outputs.shape[-1]
        assert found.positions == outputs.shape[1:-1]
        # The same, asked for by name.
        assert targets.detect(custom, labels, outputs, kind).kind == kind

    def test_ambiguous(self):
        with pytest.raises(ValueError, match=r"(?s)Pass `targets='soft'` or.*custom"):
            targets.detect(custom, rows(), SIGMOID)
        with pytest.raises(ValueError, match="Pass `targets='soft'`"):
            targets.detect(None, rows(), SOFTMAX)

    @pytest.mark.parametrize("name", ["cosine_similarity", "circle", "ctc"])
    def test_losses_whose_outputs_are_not_read(self, name):
        for loss in (name, getattr(keras.losses, name)):
            with pytest.raises(ValueError, match=r"neither names.*If.*pass `targets`"):
                targets.detect(loss, rows(), SIGMOID)
        assert targets.detect(name, rows(), SIGMOID, "continuous").explicit

    def test_such_a_loss_goes_before_shapes(self):
        """Of CTC, labels are shorter than outputs."""
        labels, outputs = np.ones((6, 2), int), np.ones((6, 5, 3))
        with pytest.raises(ValueError, match="neither names a class"):
            targets.detect(keras.losses.CTC(), labels, outputs)
        with pytest.raises(ValueError, match="Received: labels of shape"):
            targets.detect(keras.losses.CTC(), labels, outputs, "sparse")

    def test_logits(self):
        loss = keras.losses.CategoricalCrossentropy(from_logits=True)
        assert targets.detect(loss, rows(), SIGMOID).from_logits
        assert targets.detect("hinge", IDS_6 % 2, SIGMOID[:, :1]).from_logits
        assert not targets.detect("bce", YES, SIGMOID).from_logits

    @pytest.mark.parametrize(
        ("labels", "outputs", "message"),
        [
            (np.zeros((6, 3)), SIGMOID, r"shape \(n, 4\).*\(6, 3\)"),
            (np.zeros((6, 5)), np.zeros((1, 7, 4)), r"\(n, 7\) or \(n, 7, 1\)"),
            (np.zeros((6, 7, 2)), np.zeros((1, 7, 4)), r"\(n, 7, 4\).*\(6, 7, 2\)"),
            (np.array(["a"] * 6), SIGMOID, "must be numbers"),
        ],
    )
    def test_labels_that_fit_nothing(self, labels, outputs, message):
        with pytest.raises(ValueError, match=f"(?s){message}"):
            targets.detect("mse", labels, outputs)


@given(
    hypothesis.extra.numpy.arrays(
        "float32",
        st.integers(2, 80),
        elements=st.one_of(
            st.sampled_from([0.0, 1.0, 2.0]),
            st.floats(-1e6, 1e6, width=32),
        ),
    ).filter(lambda a: len(np.unique(a)) > 1),
    st.integers(2, 16),
)
@settings(max_examples=60)
def test_quantile_bins(values, bins):
    edges = targets.quantile_edges(values, bins)
    assert 1 <= len(edges) < bins
    np.testing.assert_allclose(edges, reference.quantile_edges(values, bins))
    target = targets.Target("continuous", 1)
    target, ids = targets.settled(
        target,
        values[:, None].astype("float64"),
        np.ones(len(values), bool),
        5 * bins**2,
    )
    np.testing.assert_array_equal(
        ids[:, 0], [reference.bin_of(v, edges) for v in values.astype("float64")]
    )
    # Each bin has samples, in the order of the values, and ties share one.
    assert set(ids[:, 0]) == set(range(len(edges) + 1))
    order = np.argsort(values, kind="stable")
    assert np.all(np.diff(ids[order, 0]) >= 0)
    for value in np.unique(values):
        assert len(set(ids[values == value, 0])) == 1
    # Without ties, they are as equal as whole numbers allow.
    if len(np.unique(values)) == len(values) >= bins:
        counts = np.bincount(ids[:, 0])
        assert counts.max() - counts.min() <= 1


def test_as_many_bins_as_counts_serve():
    for samples in (2, 19, 20, 44, 45, 46, 500, 1279, 1280, 10**6):
        assert targets.num_bins(samples) == reference.number_of_bins(samples)


def test_units_whose_labels_do_not_vary_are_left_out():
    labels = np.array([[1, 0, 1], [1, 1, 0], [1, 0, 0]])
    target = targets.Target("multi_label", 3)
    target, ids = targets.settled(target, labels, np.array([True, False, True]), 2)
    np.testing.assert_array_equal(target.columns, [2])
    np.testing.assert_array_equal(ids, labels[:, 2:])


def test_labels_that_are_not_counted_may_be_anything():
    target = targets.Target("sparse", 3, (2,))
    labels = np.array([[1, -100], [255, 2]])
    counted = np.array([[True, False], [False, True]])
    np.testing.assert_array_equal(
        targets.checked_ids(labels, target, counted), [[1, 0], [0, 2]]
    )
    with pytest.raises(ValueError, match="whole numbers"):
        targets.checked_ids(labels, target)
