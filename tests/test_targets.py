import keras
import numpy as np
import pytest

from keras_milr import targets
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
