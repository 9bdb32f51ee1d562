"""Back to the last good weights, when a training fails."""

import enum
import math

import keras
import numpy as np

from keras_milr import _keras, backend
from keras_milr.readouts import Information
from keras_milr.untouched import assign

MOST = 10  # roll backs of one training
_NEGLIGIBLE = 0.02  # share of H(Y)
_SAME = 1e-6  # outputs that differ by less are the same
_LITTLE = 0.1  # share of H(Y)
_LASTS = 3  # readings in a row
# Of what a resumed training must know: weights and what was read of them, numbers.
_KEPT = ("good", "start", "other")
_NUMBERS = ("low", "learned", "start_step", "good_step", "tried", "other_age")


class Way(enum.Enum):
    """What happens to the rates when weights are set back; see `Controller`."""

    CUT = "lowered, after a failure"
    RESTART = "far lower, from the start, after a failure in which little was learned"
    UNDO = "as before a raise"
    SECOND = "lower, from the start, whose rate seems too high"
    FIRST = "as before a second start, which knows less"


class Rollback:
    """Keeps the weights of the last good reading, and says when to go back to them.

    Two copies of the weights, of the buffers of PyTorch's modules and of the
    optimizer's state are held in the host's memory: those of the start, for two
    readings and until half is known of what seems attainable, and those of the last
    good reading; of a first start a third one, while a second one is tried.

    Args:
        model: A compiled, built `keras.Model`.
        even: What H(Y) would be if all classes had equal shares, in nats, where it is
            known; see `collapse`. Defaults to `0.0`.
    """

    def __init__(self, model, even: float = 0.0):
        self._model, self._even = model, even
        self._first = self._best = None  # `Information` at the output.
        # What was read, and the weights it was read of.
        self._start = self._good = None
        self._now = None  # What was read of the present weights.
        self._undo = False  # Whether all that failed was a raise of the rate.
        self._again = False  # Whether a lower rate may do better from the start.
        self._low = 0  # Readings in a row that were far below the best.
        self._learned = False  # Whether the cross-entropy was ever below H(Y).
        self._step = 0.0  # Number of the present reading,
        self._good_step = 0.0  # of the last good one,
        self._start_step = 0.0  # and of that at which the training started, or again.
        self._tried = False  # Whether there was a second start that did not do better.
        self._other = None  # Of the first start while a second one is tried: as
        self._other_best = None  # `_good`, as `_best`,
        self._other_age = 0.0  # and in how many readings it came there.
        self.count = 0
        if not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)

    def judge(
        self,
        output,
        infos,
        loss: float,
        step=0.0,
        steps=None,
        explores=False,
        raised=False,
        at_start=False,
    ) -> str | None:
        """What is wrong with the training, in words; else keeps the present weights.

        Args:
            output: `Information` at the output.
            infos: `Information` for each rate.
            loss: The training loss.
            step: Number of the reading, as a policy is told.
            steps: Number of readings planned, or None where it is not known.
            explores: Whether the policy is one that raises rates to see what comes.
            raised: Whether it was trained at a rate that was raised for that.
            at_start: Whether the rate, or that before the raise, is that of the start,
                which nothing speaks for.
                That may be far too high, and what it has done to the weights stays. So
                a lower one is given as long, from the start.
        """
        values = self._values()
        self._step = step
        failure, self._undo, self._again = self._not_finite(values, loss), False, False
        # A model that had no weights at the start has no best reading yet.
        if failure is None and self._best is not None:
            again = explores and at_start and self._may_start_again(steps)
            failure = self._fails(output, explores, raised, again)
        if failure is None:
            self.keep(output, infos, values)
        return failure

    def _fails(self, output, explores, raised, again):
        """What has been lost, in words; else None."""
        failure = collapse(output, self._best, self._first, self._even, self._learned)
        if failure is not None:
            # What little was learned otherwise is given up anyway.
            self._again = again and self._half_is_known()
            return failure
        if raised:
            failure = fell(output, self._best)
            self._undo = failure is not None
            self._again = again and self._undo
        if failure is not None:
            return failure
        if again and is_below(output, self._best, _LITTLE):
            self._again = True
            return (
                "at the rate of the start the information fell from "
                f"{self._best.accessible:.4g} to {output.accessible:.4g} nats"
            )
        if explores and not 0 < self._step < 1:
            failure = self._stays_low(output)
        if failure is None and self._other is not None:
            failure = self._knows_less(output)
        return failure

    def keep(self, output, infos, values=None):
        """Keeps the present weights, if they are as good as the best so far.

        Args:
            output: `Information` at the output.
            infos: `Information` for each rate.
            values: The present weights, where they are at hand.
        """
        self._now = infos
        self._learned |= bool(output.bound > output.bound_stderr)
        values = self._values() if values is None else values
        if self._best is None:
            self._first = self._best = output
            self._start = self._good = infos, values
            self._start_step = self._good_step = self._step
        elif output.accessible >= self._best.accessible - output.noise:
            self._good, self._good_step = (infos, values), self._step
            if output.accessible > self._best.accessible:
                self._best = output
            # A raise after the first reading is judged by the second one.
            if self._half_is_known() and self._step - self._start_step >= 2:
                self._start = None

    def _not_finite(self, values, loss):
        trained = {id(v) for v in self._model.trainable_variables}
        weights, slots = self._model.weights, self._model.optimizer.variables
        of_model = zip(weights, values, strict=False)  # The optimizer's come after.
        finite = _are_finite(value for v, value in of_model if id(v) in trained)
        # A loss scale skips the steps that are not finite, by design.
        scaled = isinstance(self._model.optimizer, keras.optimizers.LossScaleOptimizer)
        if not finite or not (scaled or math.isfinite(loss)):
            return "the loss or the weights are not finite"
        # Of a gradient whose square overflows, Adam keeps an infinite average: the
        # weights are what they were, and never change again.
        if not _are_finite(values[len(weights) : len(weights) + len(slots)]):
            return "the optimizer's state is not finite"
        return None

    def _stays_low(self, output):
        """What has been lost for some readings in a row, in words; else None.

        Once, that is how a high rate may swing. It lasts where the rate has done
        damage, such as units that are zero for every sample, which no lower rate mends.
        """
        self._low = self._low + 1 if is_below(output, self._best, _LITTLE) else 0
        if self._low < _LASTS:
            return None
        return (
            f"for {_LASTS} readings the information stayed far below what it was, "
            f"{output.accessible:.4g} of {self._best.accessible:.4g} nats"
        )

    def _knows_less(self, output):
        """What a second start lacks once it is as old as the first was; else None."""
        if self._step - self._start_step < 0.9 * self._other_age:
            return None
        known = self._other_best.accessible
        if output.accessible >= known - _margin(output, _NEGLIGIBLE):
            # Of about as much, the lower rate is farther from one that fails.
            self._other = self._other_best = None
            self._tried = False  # It may be too high as well.
            return None
        return (
            f"from the start at a lower rate {output.accessible:.4g} nats were "
            f"learned, in the same time as {known:.4g} before"
        )

    def _may_start_again(self, steps):
        """Whether a second start is about as old as the first by the next reading.

        And whether most of the training is left then.
        """
        if self._tried or self._start is None or steps is None:
            return False
        age = self._good_step - self._start_step
        ahead = 1.0 if self._step >= 1 else self._step - self._good_step
        alike = 0.5 * ahead <= age <= 1.1 * ahead
        return alike and steps - self._step >= 3 * age

    def restore(self):
        """Sets weights and optimizer back to the last good reading, or to the start.

        Returns:
            What was read of these weights, an `Information` for each rate; a `Way`; and
            where these weights are from, in words.

        Raises:
            ValueError: where nothing has been kept.
        """
        if self._good is None:
            raise ValueError(
                "MutualInformationLR: the training failed before its first reading; "
                "there are no weights to go back to. Build the model before `fit`, by "
                "an Input layer or `model.build(...)`, or lower the learning rate."
            )
        self.count += 1
        self._low = 0
        way, place = Way.CUT, "the last good reading"
        if self._other is not None:
            way, place = Way.FIRST, "what the first start had learned"
            self._good, self._best = self._other, self._other_best
            self._other = self._other_best = None
        elif self._again:
            way, place = Way.SECOND, "the start, to try a lower rate for as long"
            self._other, self._other_best = self._good, self._best
            self._other_age = self._good_step - self._start_step
            self._tried = True
        elif self._undo:
            way = Way.UNDO
        elif not self._half_is_known():
            # Little was learned, at a rate that is far too high.
            way, place = Way.RESTART, "the start"
        if way in (Way.RESTART, Way.SECOND):
            self._good, self._best = self._start, self._first
            self._start_step = self._good_step = self._step
        infos, values = self._good
        assign(list(zip(self._variables(), values, strict=True)))
        self._now = infos
        return infos, way, place

    def state(self) -> tuple[dict, dict]:
        """What to resume with: a dict for JSON, and the values that are kept."""
        kept = {name: getattr(self, f"_{name}") for name in _KEPT}
        state = {name: getattr(self, f"_{name}") for name in _NUMBERS} | {
            "count": self.count,
            "first": self._first._asdict(),
            "best": self._best._asdict(),
            "other_best": self._other_best and self._other_best._asdict(),
            "now": [info._asdict() for info in self._now],
        }
        for name, pair in kept.items():
            state[name] = pair and [info._asdict() for info in pair[0]]
        return state, {name: pair[1] for name, pair in kept.items() if pair}

    def changed(self, kept: dict) -> dict:
        """Of lists of values, as of `state`, the arrays that differ from the present.

        These are few: the last good weights are mostly the present ones.
        """
        now = self._values()
        return {
            f"{name}_{i}": value
            for name, values in kept.items()
            for i, (value, present) in enumerate(zip(values, now, strict=True))
            if not np.array_equal(value, present)
        }

    def resume(self, state: dict, arrays: dict | None):
        """Goes on from a state.

        Args:
            state: As of `state`.
            arrays: As of `changed`, of the weights that the model has now. None where
                they are not known: the present weights stand in for the kept ones.

        Raises:
            ValueError: for arrays of another model.
        """
        self.count = state["count"]
        for name in _NUMBERS:
            kind = type(getattr(self, f"_{name}"))
            setattr(self, f"_{name}", kind(state[name]))
        self._first, self._best = (Information(**state[k]) for k in ("first", "best"))
        if state["other_best"] is not None:
            self._other_best = Information(**state["other_best"])
        self._now = [Information(**info) for info in state["now"]]
        present = self._values()
        kept = {}
        for name in _KEPT:
            if state[name] is None:
                kept[name] = None
            elif arrays is None:
                kept[name] = self._now, present
            else:
                infos = [Information(**info) for info in state[name]]
                kept[name] = infos, _replaced(present, arrays, name)
        self._good, self._start, self._other = (kept[name] for name in _KEPT)

    def _half_is_known(self):
        there = self._best.entropy
        if self._learned:  # Of a network that says the same of all, little seems to be.
            there = np.fmin(there, self._best.attainable)
        return self._start is None or self._best.accessible >= 0.5 * there

    def _variables(self):
        model = self._model
        of_layers = [*backend.buffers(model), *_keras.states(model)]
        return [*model.weights, *model.optimizer.variables, *of_layers]

    def _values(self):
        # Copies: the array may be a view of the memory that is trained in.
        return [keras.ops.convert_to_numpy(v).copy() for v in self._variables()]


def _are_finite(values):
    return all(bool(np.all(np.isfinite(value))) for value in values)


def _replaced(present, arrays, name):
    values = [arrays.get(f"{name}_{i}", value) for i, value in enumerate(present)]
    for value, other in zip(values, present, strict=True):
        if value.shape != other.shape:
            raise ValueError(
                "The state that MutualInformationLR is to resume is of another model. "
                f"Received: weights of shape {value.shape}, expected {other.shape}"
            )
    return values


def collapse(now, best, first, even: float = 0.0, learned=False) -> str | None:
    """Why a training has collapsed, judged by readings of its output; else None.

    The yardstick is a predictor that says the same of every sample, whose cross-entropy
    is H(Y) at best. To have less information than before is no collapse: a network
    that was wrong about every sample unlearns that first, and one with a dominant class
    predicts nothing else for long. Where class weights or another sampling than the
    probe's train for other shares of the classes, its cross-entropy on the probe rises
    above H(Y), up to that of the guess that all classes are equal, while it learns. And
    on samples that are held out, that of a network that has learned may rise far above
    all of these: it is over-fitted, and knows what it knew.

    Args:
        now: `Information` of the present reading.
        best: That of the reading with the most information so far.
        first: That of the reading before training.
        even: H(Y) of classes of equal shares, in nats, where it is known.
        learned: Whether the cross-entropy of a reading before was below H(Y).
    """
    nats, unlearned = now.entropy, max(now.entropy, even)
    if now.variation <= _SAME < first.variation:
        return "the output does not depend on the input any more"
    if now.repeated > 0.5 and first.repeated < 0.1 and now.accessible < _LITTLE * nats:
        return (
            "the output is the same for nearly all samples: "
            f"{now.repeated:.0%} have that of the one before"
        )
    if math.isnan(now.cross_entropy) or math.isnan(first.cross_entropy):
        return None  # Not probabilities: what is lost cannot be told.
    margin = _margin(now, _NEGLIGIBLE)

    def rose(before, guess):
        return (
            f"the cross-entropy rose from {before:.4g} to {now.cross_entropy:.4g} "
            f"nats, above the same guess for every sample, {guess:.4g} nats"
        )

    lost = now.accessible < 0.5 * best.accessible - margin
    if lost and now.cross_entropy >= max(0.99 * nats, best.cross_entropy):
        return f"the information was lost: {rose(best.cross_entropy, nats)}"
    knows = now.accessible > first.accessible + margin
    # The rarer classes are, the less of what is learned can be told from noise.
    limit = unlearned + 0.5 * (unlearned - nats)
    worse = now.cross_entropy > max(limit, first.cross_entropy + 0.05 * nats)
    far_worse = now.cross_entropy > max(2 * unlearned, 1.5 * first.cross_entropy)
    far_worse = far_worse and now.accessible < 0.5 * nats
    # Once it has learned, it takes more for nothing to be known.
    if (far_worse and not (learned and knows)) or (worse and not (learned or knows)):
        return f"nothing was learned: {rose(first.cross_entropy, unlearned)}"
    return None


def fell(now, best) -> str | None:
    """What a raise of the rate has cost, in words; else None.

    Early in a training the counted information may fall while the network learns, so
    the cross-entropy must have risen too; or, where there is none, half of the
    information is lost.

    Args:
        now: `Information` at the output, after the raise.
        best: That of the reading with the most information so far.
    """
    if math.isnan(now.cross_entropy):
        lost = now.accessible < 0.5 * best.accessible - _margin(now, _NEGLIGIBLE)
    else:
        lost = is_below(now, best, _NEGLIGIBLE)
    if not lost:
        return None
    return (
        f"after the rate was raised the information fell from {best.accessible:.4g} to "
        f"{now.accessible:.4g} nats"
    )


def is_below(now, best, share) -> bool:
    """Whether more than a share of H(Y) was lost, and than what noise explains.

    Both by the information and by the cross-entropy, so never where there is none.

    Args:
        now: `Information` at the output.
        best: That of the reading with the most information so far.
        share: Share of H(Y).
    """
    margin = _margin(now, share)
    lost = now.accessible < best.accessible - margin
    return bool(lost and now.cross_entropy > best.cross_entropy + margin)


def _margin(now, share):
    return max(share * now.entropy, 3 * now.noise)
