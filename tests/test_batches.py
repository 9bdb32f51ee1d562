import numpy as np
import pytest
import tensorflow as tf

from keras_milr import batches

X, Y = np.zeros((20, 1), "float32"), np.arange(20) % 2


def raises(data, message, error=ValueError):
    with pytest.raises(error, match=f"(?s){message}"):
        next(batches.read(data))


def test_no_labels():
    dataset = tf.data.Dataset.from_tensor_slices(X).batch(5)
    for data in (X, (X,), (X, None), {"x": X}, dataset):
        raises(data, "must have labels")


def test_infinite_dataset():
    dataset = tf.data.Dataset.from_tensor_slices((X, Y)).batch(5)
    raises(dataset.repeat(), "must be finite.*repeats")


def test_nothing_like_data():
    raises(3, "must be.*of type int", error=TypeError)
