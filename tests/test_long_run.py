"""What grows with the number of readings; `tests.long_run` is the long one."""

import pytest

from tests import long_run


@pytest.mark.slow
def test_nothing_grows_with_readings_but_the_history():
    found = long_run.readings(192, layers=4, warm_up=64)
    assert found["readings"] == 1 + 192  # One before the first batch.
    assert found["traces_after_warm_up"] == 0
    # A record has a few dozen objects; anything kept for each batch would be more.
    assert max(found["objects_per_50_readings"][1:]) < 50 * 60
    assert found["MiB_end"] - found["MiB_after_warm_up"] < 50


def test_counts_of_a_stream():
    found = long_run.stream(2_000_000)
    assert found["samples"] == 2_000_000
    assert found["counts_that_differ"] == 0
