"""At which batches a training is read, by hooks called as `fit` calls them."""

import math
from types import SimpleNamespace

import pytest

from keras_milr.timing import Timing


def make(update_freq="epoch", at_once=1, **params):
    model = SimpleNamespace(steps_per_execution=at_once)
    return Timing(model, params, update_freq)


def train(timing, epochs, steps, anneals=False, early=0, first=0):
    """Where readings were due, as (epoch, batch), and what of the way was behind."""
    taken, ways = [], []
    for epoch in range(first, epochs):
        timing.begin_epoch(epoch)
        if epoch == first:
            timing.start(epoch, anneals)
        timing.divide(early if epoch == first else 0)
        at_once = timing._batches_at_once
        for batch in range(0, steps, at_once):
            if timing.is_due_before(batch):
                taken.append((epoch, timing.batch))
            ways.append((len(taken), timing.way(batch, len(taken))))
            if timing.is_due_after(min(batch + at_once, steps) - 1):
                taken.append((epoch, timing.batch))
        timing.end_epoch()
        if timing._per_epoch:
            taken.append((epoch, timing.batch))
    return taken, ways


@pytest.mark.parametrize(
    ("epochs", "steps", "parts"),
    [
        *((1, 1000, 6), (2, 1000, 3), (3, 1000, 2), (5, 1000, 2), (6, 1000, 1)),
        *((1, 119, 5), (1, 60, 3), (2, 40, 2), (1, 39, 1), (1, 1, 1)),
    ],
)
def test_few_epochs_are_read_six_times_where_batches_suffice(epochs, steps, parts):
    timing = make(epochs=epochs, steps=steps)
    taken, _ = train(timing, epochs, steps, anneals=True)
    batches = [math.ceil(k * steps / parts) for k in range(1, parts + 1)]
    assert taken == [(epoch, batch) for epoch in range(epochs) for batch in batches]
    assert timing.readings == len(taken)
    assert parts == 1 or timing.passed is None
    assert len(taken) >= 6 or parts == max(1, steps // 20)


def test_an_execution_of_several_batches_has_one_hook():
    timing = make(epochs=1, steps=120, at_once=50)
    timing.start(0, anneals=True)
    assert timing.divided == 3


@pytest.mark.parametrize(
    ("anneals", "update_freq", "params"),
    [
        (False, "epoch", {"epochs": 1, "steps": 1000}),
        (True, 10, {"epochs": 1, "steps": 1000}),
        *((True, "epoch", params) for params in ({"epochs": 1, "steps": None}, {})),
    ],
)
def test_epochs_that_are_not_divided(anneals, update_freq, params):
    timing = make(update_freq, **params)
    timing.start(0, anneals)
    assert timing.divided == 1


@pytest.mark.parametrize(("steps", "parts"), [(100, 4), (79, 3), (40, 2), (39, 1)])
def test_early_readings_of_the_first_epoch(steps, parts):
    timing = make(epochs=8, steps=steps)
    taken, _ = train(timing, 8, steps, early=3, first=2)
    early = [(2, math.ceil(k * steps / parts)) for k in range(1, parts)]
    assert taken == [*early, *((epoch, steps) for epoch in range(2, 8))]
    assert timing.readings == 6
    timing.begin_epoch(2)
    timing.divide(3)
    due = [b for b in range(steps) if timing.is_due_before(b)]
    assert parts == 1 or timing.passed == due[-1] / steps


def test_of_unknown_length_the_last_epoch_tells():
    timing = make(epochs=3, steps=None)
    taken, ways = train(timing, 3, 30, early=3)
    assert taken == [(0, 30), (1, 30), (2, 30)]
    assert [way for _, way in ways[:30]] == [None] * 30
    assert sum(way is not None for _, way in ways[30:]) == 20
    assert timing.length == 30
    assert timing.readings == 3
    assert make(10, epochs=3, steps=None).readings is None
    assert make().readings is None


def test_every_so_many_batches_across_epochs():
    timing = make(7, epochs=3, steps=10)
    taken, _ = train(timing, 3, 10, early=3)
    assert taken == [(0, 7), (1, 4), (2, 1), (2, 8)]
    assert timing.readings == len(taken)
    assert timing.since_reading == 2


@pytest.mark.parametrize("update_freq", ["epoch", 45])
def test_the_way_goes_in_ten_steps_from_reading_to_reading(update_freq):
    timing = make(update_freq, epochs=2, steps=180)
    divides = update_freq == "epoch"
    taken, ways = train(timing, 2, 180, anneals=divides)
    assert len(taken) == (6 if divides else 8)
    for number in range(len(taken)):
        steps = [way for n, way in ways if n == number and way is not None]
        assert steps == pytest.approx([(k + 0.5) / 10 for k in range(10)])


def test_the_way_of_an_epoch_of_few_batches():
    _, ways = train(make(epochs=1, steps=4), 1, 4)
    assert [way for _, way in ways] == [0.125, 0.375, 0.625, 0.875]


def test_the_way_goes_on_over_epochs_without_a_reading():
    """Of a validation in every third epoch, seven in all."""
    timing = make(epochs=7, steps=20)
    timing.start(0, anneals=True)
    ways = []
    for epoch in range(7):
        timing.begin_epoch(epoch)
        ways.append([timing.way(batch, epoch // 3) for batch in range(20)])
        if epoch % 3 == 2:
            assert timing.take() == 3
        else:
            timing.skip()
    # Until the first reading nobody knows that it takes three epochs. After the second
    # there is one more epoch.
    assert [way for one in ways[3:6] for way in one if way] == pytest.approx(
        [(k + 0.5) / 10 for k in range(10)]
    )
    assert [way for way in ways[6] if way] == pytest.approx(
        [(k + 0.5) / 10 for k in range(10)]
    )


@pytest.mark.parametrize("steps", [100, 97])
@pytest.mark.parametrize(
    ("at_once", "update_freq"),
    [(8, 10), (10, 1), (20, 5), (8, 8), (3, 100), (32, 31), (64, 50), (200, 7)],
)
def test_as_many_readings_as_planned_by_executions(steps, at_once, update_freq):
    timing = make(update_freq, at_once=at_once, epochs=12, steps=steps)
    taken, _ = train(timing, 12, steps)
    assert timing.readings == len(taken)
    if update_freq >= at_once:  # What is too much counts for the next one.
        assert len(taken) == 12 * steps // update_freq


def test_a_loop_may_begin_where_fit_would_end():
    timing = make(epochs=3, steps=20)
    timing.start(3, anneals=True)
    assert timing.divided == 1


def test_a_state_goes_on():
    timing = make(7, epochs=3, steps=10)
    train(timing, 1, 10)
    resumed = make(7, epochs=3, steps=10)
    resumed.resume(timing.state())
    state = {"first_epoch": 0, "divided": 1, "since_reading": 3}
    assert resumed.state() == state | {"skipped": 0, "apart": 1}
    assert resumed.readings == timing.readings
    resumed.begin_epoch(1)
    assert [b for b in range(10) if resumed.is_due_after(b)] == [3]
    # In the midst of an epoch that begins again.
    assert resumed.state()["since_reading"] == 6
    assert resumed.state(within=True)["since_reading"] == 3
