"""The search among rates, on trainings whose results are given."""

import types

import numpy as np
import pytest

from keras_milr import readouts, trials


def trial(*rows, start=(0.1, 2.4), skewed=False, length=30):
    """A `Trial` that has been run: (rate, information, loss) in nats, H(Y) = 2."""

    def row(rate, information, loss):
        info = readouts.Information(information, information, 2.0, 0.0, 0.02)
        return trials.Row(rate, info, loss, 0.5, False)

    rows = [row(*r) for r in rows]
    known = {"start": row(0.0, *start), "skewed": skewed, "length": length}
    return types.SimpleNamespace(rows=rows, **known)


def test_of_about_as_much_information_the_lower_loss_is_better():
    rows = (1e-3, 0.8, 1.9), (1e-2, 1.3, 1.2), (1e-1, 1.25, 1.0), (1.0, 0.8, 0.9)
    assert trials.best_of(trial(*rows)).rate == 1e-1


def test_after_a_few_steps_counts_go_to_and_fro():
    """As of a CNN on MNIST, which needs the rate that its loss prefers."""
    rows = (1e-2, 0.18, 2.27), (3e-2, 0.92, 2.01), (0.1, 0.7, 1.73), (0.3, 0.48, 1.88)
    assert trials.best_of(trial(*rows)).rate == 0.1
    much_less = (1e-2, 0.18, 2.27), (3e-2, 0.92, 2.01), (0.1, 0.6, 1.73)
    assert trials.best_of(trial(*much_less)).rate == 3e-2


def test_without_losses_the_information_decides():
    rows = (1e-3, 0.8, np.nan), (1e-2, 1.3, np.nan), (1e-1, 1.25, np.nan)
    assert trials.best_of(trial(*rows)).rate == 1e-2


@pytest.mark.parametrize(("skewed", "best"), [(False, 1e-1), (True, 1e-2)])
def test_what_an_output_worse_than_the_shares_knows_is_chance(skewed, best):
    """A rare class that is told apart at the start, and while outputs swing."""
    rows = (1e-4, 0.9, 5.0), (1e-3, 0.5, 3.0), (1e-2, 0.6, 2.05), (1e-1, 0.7, 2.3)
    assert trials.best_of(trial(*rows, skewed=skewed)).rate == best


def test_little_that_the_loss_does_not_know_is_nothing():
    """As of sigmoid units on a plateau: small differences, which pass."""
    rows = (1e-3, 0.3, 2.05), (1e-2, 0.45, 2.02), (0.1, 0.01, 2.1)
    plateau = trial(*rows)
    assert trials.moved(plateau) == []
    assert not trials.Trial._collapsed(trial(*rows[:2]), plateau.rows[2])
    learned = trial(*rows, (1.0, 0.3, 1.95))
    assert [row.rate for row in trials.moved(learned)] == [1.0]
    much = trial(*rows, (1.0, 0.55, 2.4))
    assert [row.rate for row in trials.moved(much)] == [1.0]
    # Outputs that were sure of what is wrong are on their way.
    sure = trial(*rows, start=(0.1, 9.0))
    assert [row.rate for row in trials.moved(sure)] == [1e-3, 1e-2]


def test_what_one_step_brings_is_nothing_to_judge_by():
    rows = (1e-3, 0.8, 1.9), (1e-2, 1.3, 1.2)
    assert len(trials.moved(trial(*rows, length=2))) == 2
    assert trials.moved(trial(*rows, length=1)) == []


@pytest.mark.parametrize("skewed", [False, True])
def test_to_lose_a_lucky_start_is_no_collapse(skewed):
    """But where most samples have the same output then."""
    done = trial((1e-4, 0.3, 4.0), skewed=skewed)
    lost, worse = trial((1e-3, 0.01, 3.0), (1e-3, 0.01, 4.5)).rows
    assert not trials.Trial._collapsed(done, lost)
    assert trials.Trial._collapsed(done, repeating(lost))
    assert trials.Trial._collapsed(done, worse)


def repeating(row):
    return row._replace(info=row.info._replace(repeated=0.9))


@pytest.mark.parametrize(
    ("information", "loss", "collapsed"),
    [
        (0.2, 2.1, False),  # On its way: unsure now of what it was wrong about.
        (0.2, 2.3, True),  # Neither is better.
        (0.01, 2.1, False),  # Nearly the same guess for all, and better than before.
        (0.4, 5.0, False),  # It knows more than half.
    ],
)
def test_collapse(information, loss, collapsed):
    done = trial((1e-3, 0.3, 2.35), (1e-2, 0.6, 2.25))
    now = trial((1e-1, information, loss)).rows[0]
    assert trials.Trial._collapsed(done, now) == collapsed


def test_the_same_guess_for_all_is_a_collapse():
    """Of units that are dead, or where something was known with a loss below H(Y)."""
    now = trial((1e-1, 0.01, 1.95)).rows[0]
    done = trial((1e-3, 0.3, 2.35), (1e-2, 0.6, 2.25))
    assert trials.Trial._collapsed(done, repeating(now))
    assert trials.Trial._collapsed(trial((1e-2, 0.6, 1.9)), now)
