import collections
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Small models are compiled often and run briefly.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# The tests themselves run in parallel. Threads share the work, they do not change it.
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import keras
import matplotlib as mpl
import numpy as np
import pytest
from sklearn.datasets import load_digits

from tests import support

mpl.use("Agg")
# A machine that is busy takes longer for an example, which is no failure.
hypothesis.settings.register_profile("unhurried", deadline=None)
hypothesis.settings.load_profile("unhurried")

BACKEND = keras.backend.backend()
if BACKEND == "torch":
    import torch

    torch.set_num_threads(1)
# What is left out under another backend than TensorFlow. In these files nothing depends
# on the backend,
SAME_EVERYWHERE = ["test_examples.py", "test_names.py", "test_plotting.py"]
SAME_EVERYWHERE += ["test_policies.py", "test_statistics.py", "test_fuzz.py"]
SAME_EVERYWHERE += ["test_support.py", "test_trials.py", "test_versions.py"]
# these have not been tried under another than TensorFlow,
SAME_EVERYWHERE += ["test_safety.py", "test_long_run.py"]
# and in these, which train a model in each test, these parts of names tell what does;
# tests that show a row of the support table do anyway.
SENSITIVE = {
    "test_callbacks.py": (
        *("test_models", "bit_equal", "whole_loop", "every_so_many_batches", "eagerly"),
        *("float16", "TestTheMetricAsSource", "test_training_data", "several_threads"),
        *("TestWithinAnEpoch", "TestFewEpochs"),
    ),
    "test_callbacks_auto.py": ("test_it_trains_as_from_the_rate", "test_batches_of"),
    "test_callbacks_layers.py": (
        *("bit_equal", "set_by_hand", "test_readings_are_those_of_the_layers"),
    ),
    "test_faults.py": (
        *("explode[sgd-None-epoch-nan]", "explode[adam-all-7-1e", "policy_that_raises"),
        *("that_raises[on_train_batch_end", "in_a_reading[all]", "there_is_no_mixture"),
        *("in_a_roll_back_of_a_training", "full_while_saving"),
    ),
    "test_labels.py": (
        *("test_each_label_is_a_question", "test_quantile_bins", "test_no_table"),
        *("test_the_mask_of_the_output", "test_weighted_mean", "test_layers_are_read"),
    ),
    "test_range_test.py": (
        *("bit_equal", "interruption", "compiles_nothing", "by_hand", "goes_on"),
        *("test_a_dataset_is_as_its_arrays",),
    ),
    "test_resume.py": (
        *("killed_at_random", "moment[batches]", "in_the_middle_of_an_epoch"),
        *("TestJSON::test_goes_on", "without_the_weights", "may_be_loaded_while"),
        "the_weights_are_cut[True]",
    ),
    "test_rollback.py": (
        *("test_no_mixture", "test_to_the_start", "not_finite", "never_for_averages"),
    ),
}
OTHER = BACKEND != "tensorflow"
collect_ignore_glob = [f"*{name}" for name in SAME_EVERYWHERE] if OTHER else []


def pytest_report_header():
    if not OTHER:
        return f"Keras backend: {BACKEND}"
    part = ", ".join(SENSITIVE)
    return [
        f"Keras backend: {BACKEND}. What does not depend on it is left out:",
        f"{', '.join(SAME_EVERYWHERE)}, and of {part} what is not in tests/conftest.py",
    ]


def pytest_addoption(parser):
    parser.addoption("--support", help="file for what passed; see tests/support.py")


def pytest_configure(config):
    for line in (
        "backends(*names, reason): a test for these backends of Keras only",
        "supports(section, *rows): shows these rows of the support table",
        "refuses(section, *rows, error): shows the error that a user gets there",
        "slow: takes some ten seconds or more, and is run by `make test-slow`",
    ):
        config.addinivalue_line("markers", line)
    path = config.getoption("--support")
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(support.Report(path, BACKEND))


def pytest_collection_modifyitems(config, items):
    chosen = [item for item in items if not OTHER or _is_sensitive(item)]
    config.hook.pytest_deselected(items=[i for i in items if i not in chosen])
    items[:] = chosen
    for item in items:
        item.user_properties += [("support", mark) for mark in support.marks(item)]
        for mark in item.iter_markers("backends"):
            if BACKEND not in mark.args:
                only = f"for {' and '.join(mark.args)} only: {mark.kwargs['reason']}"
                item.add_marker(pytest.mark.skip(reason=only))


def pytest_terminal_summary(terminalreporter):
    reports = [r for reports in terminalreporter.stats.values() for r in reports]
    reports = [r for r in reports if getattr(r, "when", None) == "teardown"]
    _show_coverage(terminalreporter, reports)
    _show_tried(terminalreporter, reports)


def _show_coverage(terminalreporter, reports):
    """How often value ± 1.96 standard errors held the truth; see test_statistics.py."""
    found = collections.defaultdict(list)
    for report in reports:
        name = report.nodeid.partition("[")[0].partition("::")[2]
        for key, share in report.user_properties:
            if key == "coverage":
                found[name].append(share)
    if found:
        terminalreporter.section("coverage, nominally .95: lowest, highest, cases")
    for name, shares in found.items():
        line = f"{min(shares):8.3f} {max(shares):8.3f} {len(shares):8d}  {name}"
        terminalreporter.write_line(line)


def _show_tried(terminalreporter, reports):
    tried = collections.Counter()
    worked = collections.Counter()
    for report in reports:
        for entry, numbers in dict(report.user_properties).get("tried", {}).items():
            tried[entry] += sum(numbers)
            worked[entry] += numbers[0]
    if not tried:
        return
    terminalreporter.section("absurd inputs: tried, worked, refused")
    tried["in all"], worked["in all"] = tried.total(), worked.total()
    for entry, n in tried.items():
        line = f"{n:8d} {worked[entry]:8d} {n - worked[entry]:8d}  {entry}"
        terminalreporter.write_line(line)


def _is_sensitive(item):
    parts = SENSITIVE.get(item.path.name)
    named = parts is None or any(part in item.nodeid for part in parts)
    return named or bool(support.marks(item))


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
