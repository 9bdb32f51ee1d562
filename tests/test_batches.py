import keras
import numpy as np
import pytest
import scipy.sparse
import tensorflow as tf

from keras_milr import batches

X, Y = np.zeros((20, 1), "float32"), np.arange(20) % 2


def raises(data, message, error=ValueError):
    with pytest.raises(error, match=f"(?s){message}"):
        next(batches.read(data))


def test_no_labels():
    dataset = tf.data.Dataset.from_tensor_slices(X).batch(5)
    sparse = scipy.sparse.csr_array(X)
    for data in (X, sparse, (X,), (X, None), {"x": X}, dataset):
        raises(data, "must have labels")


def test_infinite_dataset():
    dataset = tf.data.Dataset.from_tensor_slices((X, Y)).batch(5)
    raises(dataset.repeat(), "must be finite.*repeats")


def test_nothing_like_data():
    raises(3, "must be.*of type int", error=TypeError)


def test_sparse_inputs_come_dense_in_parts():
    """Beside others that are dense, with weights, and in any of SciPy's formats."""
    x = np.eye(2500, 7, dtype="float32")
    y, weight = np.arange(2500), np.linspace(0, 1, 2500, dtype="float32")
    for kind in (scipy.sparse.csr_matrix, scipy.sparse.coo_array):
        data = {"a": kind(x), "b": 2 * x}, y, weight
        read = list(batches.read(data))
        assert [len(part[1]) for part in read] == [1024, 1024, 452]
        joined = keras.tree.map_structure(lambda *a: np.concatenate(a), *read)
        np.testing.assert_array_equal(joined[0]["a"], x)
        np.testing.assert_array_equal(joined[0]["b"], 2 * x)
        np.testing.assert_array_equal(joined[1], y)
        np.testing.assert_array_equal(joined[2], weight)
    (without,) = batches.read((kind(x[:9]), y[:9]))
    assert without[2] is None


def test_sparse_inputs_of_another_length():
    data = scipy.sparse.csr_array(np.eye(9)), np.arange(8)
    raises(data, r"must have the same length.*\(9, 9\), \(8,\)")


def test_sparse_labels():
    """As scikit-learn's `MultiLabelBinarizer` makes them."""
    (read,) = batches.read((X[:9], scipy.sparse.csr_array(np.eye(9))))
    np.testing.assert_array_equal(read[1], np.eye(9))
