import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Small models are compiled often and run briefly.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import keras
import matplotlib as mpl
import numpy as np
import pytest
from sklearn.datasets import load_digits

mpl.use("Agg")

BACKEND = keras.backend.backend()
if BACKEND == "torch":
    import torch

    torch.set_num_threads(1)  # The tests themselves run in parallel.
# Nothing in them depends on the backend; under another one they are left out.
SAME_EVERYWHERE = (
    *("test_examples.py", "test_names.py", "test_plotting.py", "test_policies.py"),
)
collect_ignore = [] if BACKEND == "tensorflow" else list(SAME_EVERYWHERE)


def pytest_report_header():
    left_out = f", without {', '.join(collect_ignore)}" if collect_ignore else ""
    return f"Keras backend: {BACKEND}{left_out}"


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "backends(*names, reason): a test for these backends of Keras only"
    )


def pytest_collection_modifyitems(items):
    for item in items:
        for mark in item.iter_markers("backends"):
            if BACKEND not in mark.args:
                only = f"for {' and '.join(mark.args)} only: {mark.kwargs['reason']}"
                item.add_marker(pytest.mark.skip(reason=only))


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
