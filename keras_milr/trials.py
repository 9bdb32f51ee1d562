"""Short trainings at one learning rate after the other, and the search among rates."""

import math
import warnings
from typing import NamedTuple

import numpy as np

from keras_milr import probe, rates
from keras_milr.readouts import Information
from keras_milr.sampling import is_skewed

STEPS = 30  # of a candidate, at most, where the number is not given
LEAST_STEPS = 2  # to judge a candidate by
_DECADES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_LOWEST = 1e-7
COUNT = 7  # candidates of the search: the decades, and one on each side of the best
_HALF_DECADE = 10**0.5
# Shares of H(Y), of information:
_NEGLIGIBLE = 0.01  # as much may be gained by chance;
_MUCH = 0.25  # as much is known even if the loss does not say so.
# Multiples of H(Y), of the loss:
_GUESS = 1.05  # up to here, of outputs that know about the shares of the classes;
_UNSURE = 1.5  # up to here, of outputs that are not sure of anything.
_AS_GOOD = 1 / 3  # of what the best has gained may be missing where the loss is lower


class Row(NamedTuple):
    """A rate and what came of it.

    Attributes:
        rate: The learning rate, or 0 for the start.
        info: `Information` after the training, None where numbers are not finite.
        loss: Cross-entropy in nats, NaN where it is not known.
        accuracy: Share of the labels that were predicted.
        failed: Whether the training failed.
    """

    rate: float
    info: Information | None
    loss: float
    accuracy: float
    failed: bool


class Trial:
    """Trains at one rate after the other, each time from the start, and keeps the rows.

    Args:
        model: A `keras.Model`, lent by `untouched`.
        layers: Layers whose rate is to be set, or None for that of the network.
        sample: The `sampling.Sample` to judge on.
        batches: What to train on at each rate: list of (x, y, sample_weight).
        restart: Function that sets the model back to the start.
        reseed: Function that sets the global generators back to the start.

    Attributes:
        length: Number of training steps at each rate.
        taken: Number of training steps so far, of all rates.
        rows: A `Row` for each rate so far, in ascending order.
        own_rate: The optimizer's own rate; with layers the highest of theirs.
        start: The `Row` before any training.
        skewed: Whether classes are so rare that H(Y) is mostly of their shares.
    """

    def __init__(self, model, layers, sample, batches, restart, reseed):
        self._model = model
        self._batches = batches
        self._restart = restart
        self._reseed = reseed
        self.length = len(batches)
        self.taken = 0
        self.rows = []
        _check_rate(model)
        self._rates = rates.NetworkRate(model)
        if layers is not None:
            self._rates = rates.LayerRates(model, layers)
            if rates.base_rate(model) <= 0:
                raise ValueError(
                    "Argument `layers` needs an optimizer whose learning rate is above "
                    "0: the rate of a layer is a multiple of it. "
                    f"Received: learning_rate={rates.base_rate(model)}"
                )
        self.own_rate = float(self._rates.get().max())
        self._probe = probe.Probe(model, sample)
        self.start = self._read(0.0)
        _check_start(self.start, sample.labels)
        self.skewed = is_skewed(sample.labels, self.start.info.entropy)

    def run(self, rate: float) -> Row:
        """Trains at a rate and reads."""
        self._restart()
        self._reseed()
        self._rates.set(np.full(len(self._rates.get()), rate))
        row = self._read(rate) if self._stays_finite() else _not_finite(rate)
        if row.info is not None:
            row = row._replace(failed=self._collapsed(row))
        self.rows = sorted([*self.rows, row], key=lambda row: row.rate)
        return row

    def _stays_finite(self):
        """Trains on all batches, or until the loss is not finite."""
        for x, y, weight in self._batches:
            logs = self._model.train_on_batch(
                x, y, sample_weight=weight, return_dict=True
            )
            self.taken += 1
            # The logs of a custom step may have no loss; its outputs are still read.
            if not math.isfinite(logs.get("loss", 0.0)):
                return False
        return True

    def _read(self, rate):
        info, _ = self._probe.measure(by_batch=True)
        if not self._probe.finite:
            return _not_finite(rate)
        return Row(rate, info, info.cross_entropy, self._probe.accuracy, False)

    def _collapsed(self, row):
        """Whether a training has lost what was known at a lower rate, or at the start.

        It has if less than half of that information is left, at a loss like that of a
        constant predictor, H(Y), or higher. On their way to learning, predictions that
        become less sure of what is wrong, or have yet to learn the shares of the
        classes, pass through a state with less information. So the loss has to be worse
        than before, too, where something is still known, or where training had added
        nothing so far, or where the loss was above H(Y) before.

        Where next to nothing was known there is nothing to lose: then the training has
        collapsed if its loss is far above both H(Y) and that of the start.
        """
        lower = [r for r in self.rows if r.rate < row.rate and not r.failed]
        best = max([self.start, *lower], key=lambda r: r.info.accessible)
        known, entropy = best.info.accessible, row.info.entropy
        # Units that are dead say the same of most samples.
        dead = row.info.repeated > 0.5
        lucky = best.loss > _GUESS * entropy and not dead
        doubtful = best.loss > entropy and self.start.loss <= _UNSURE * entropy
        little = _MUCH if doubtful and not dead else 0.05
        if known < little * entropy:
            return row.loss > 1.5 * np.fmax(entropy, self.start.loss)
        limit = 0.95 * entropy
        added = known > 1.1 * self.start.info.accessible
        if lucky or not added or row.info.accessible > 0.1 * known:
            limit = np.fmax(limit, best.loss)
        # The loss may be unknown.
        return row.info.accessible < known / 2 and not row.loss < limit


def _not_finite(rate):
    return Row(rate, None, math.nan, math.nan, True)


def affordable_steps(budget, candidates):
    """Steps for each rate, so that all together take `budget` steps at most."""
    least = len(_DECADES) if candidates is None else len(candidates)
    if budget < least:
        raise ValueError(
            f"{budget} training step(s) are too few to try {least} learning rates. "
            "Pass a larger `max_steps`, for all, or `steps`, for each."
        )
    count = COUNT if candidates is None else len(candidates)
    return max(1, min(STEPS, budget // count))


def upward(trial, candidates):
    """Tries rates in ascending order, until a training fails."""
    for rate in candidates:
        if trial.run(rate).failed:
            break


def search(trial, budget):
    """Tries rates in decades, then half a decade below and above the best of them.

    The decades go upward until a training fails, and on downward while the lowest is
    the best or has failed. The search ends when the next training might take more steps
    in all than `budget`.
    """

    def affordable():
        return trial.taken + trial.length <= budget

    for rate in _DECADES:
        if not affordable() or trial.run(rate).failed:
            break
    while affordable() and trial.rows[0].rate > 1.5 * _LOWEST:
        lowest = trial.rows[0]
        if not lowest.failed and (not moved(trial) or lowest is not best_of(trial)):
            break
        trial.run(lowest.rate / 10)
    best = best_of(trial)
    if best is not None:
        for rate in (best.rate / _HALF_DECADE, best.rate * _HALF_DECADE):
            if affordable():
                trial.run(rate)


def trained(rows):
    """The rows below the lowest rate that failed."""
    failed = [row.rate for row in rows if row.failed]
    return [row for row in rows if row.rate < min(failed, default=math.inf)]


def moved(trial):
    """The rows that trained, and know more than there was at the start beyond noise.

    They must not be there by chance. Outputs with a loss above H(Y), which do not even
    know the shares of the classes, may tell some classes apart by differences that are
    small and pass. Such a row counts only if it knows much, or if the start was sure of
    what is wrong, which a few steps do not mend. Where classes are rare it never
    counts. And after a single step no row does.
    """
    if trial.length < LEAST_STEPS:
        return []
    known, entropy = trial.start.info.accessible, trial.start.info.entropy
    most, much = entropy, _MUCH * entropy
    if trial.skewed:
        most, much = _GUESS * entropy, math.inf
    elif trial.start.loss > _UNSURE * entropy:
        most = math.inf
    return [
        row
        for row in trained(trial.rows)
        if row.info.accessible > known + max(2 * row.info.noise, _NEGLIGIBLE * entropy)
        # The loss may be unknown.
        and not (row.loss > most and row.info.accessible < much)
    ]


def best_of(trial):
    """The row that learned most, or that with the lowest loss where none moved.

    Of rows with as much information but for a third of what was gained, the one with
    the lowest loss, which is less coarse: after a few steps counts go to and fro.
    """
    rows = moved(trial)
    if rows:
        most = max(row.info.accessible for row in rows)
        least = most - _AS_GOOD * (most - trial.start.info.accessible)
        rows = [row for row in rows if row.info.accessible >= least]
    else:
        rows = trained(trial.rows)
    return min(rows, key=_loss_or_information, default=None)


def _loss_or_information(row):
    """The lower the better; rows without a loss come last, by their information."""
    known = not math.isnan(row.loss)
    return (0, row.loss) if known else (1, -row.info.accessible)


def margin(steps):
    """The factor by which the rate to use shall be below the one that learned fastest.

    What is fastest for a few steps is too fast for many: momentum has not built up yet,
    and too high a rate shows late. Half a decade at 30 steps, more with fewer.
    """
    return _HALF_DECADE * max(1.0, STEPS / steps) ** 0.25


def _check_rate(model):
    """Refuses an optimizer whose rate cannot be set; tried on the copy."""
    try:
        model.optimizer.learning_rate = rates.base_rate(model)
    except TypeError as error:
        raise ValueError(
            "lr_range_test sets the learning rate, and cannot where the optimizer has "
            "a LearningRateSchedule. Compile with a number, as "
            "`keras.optimizers.Adam(learning_rate=1e-3)`, and make the schedule from "
            f"what is found. Received: {type(model.optimizer).__name__} with a schedule"
        ) from error
    except (AttributeError, NotImplementedError, ValueError) as error:
        raise ValueError(
            "lr_range_test needs an optimizer with one learning rate that can be set. "
            f"Received: {type(model.optimizer).__name__}"
        ) from error


def _check_start(row, labels):
    if row.info is None:
        raise ValueError(
            "The outputs of the model are not finite before any training. "
            "Check its weights and the inputs."
        )
    kinds = {one.target.kind for one in labels}
    if not math.isnan(row.loss) or "continuous" in kinds:
        return
    if kinds == {"binary"}:
        raise ValueError(
            "The model's single output has values outside [0, 1], so 0.5 cannot be "
            "the threshold between the classes. If it is a logit, compile with "
            "`BinaryCrossentropy(from_logits=True)`."
        )
    warnings.warn(
        "lr_range_test: the model's outputs are not probabilities, and its loss does "
        "not say that they are logits. H(Y) − CE cannot be measured, and the counted "
        "mutual information alone judges the rates.",
        stacklevel=4,
    )
