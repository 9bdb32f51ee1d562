import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import matplotlib as mpl
import numpy as np
import pytest
from sklearn.datasets import load_digits

mpl.use("Agg")


@pytest.fixture(autouse=True)
def _seeded():
    keras.utils.set_random_seed(0)


@pytest.fixture(autouse=True)
def _closed_figures():
    yield
    mpl.pyplot.close("all")


@pytest.fixture(scope="session")
def digits():
    """Real data: handwritten digits, 1,797 images of 8 × 8 as vectors in [0, 1]."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    return (x[order] / 16).astype("float32"), y[order].astype("int32")
