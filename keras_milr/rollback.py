"""Back to the last good weights, when a training fails."""

import enum
import math

import keras
import numpy as np

from keras_milr import _keras, backend, rates
from keras_milr.readouts import Information
from keras_milr.untouched import assign

MOST = 10  # roll backs of one training
_NEGLIGIBLE = 0.02  # Share of H(Y) that may be lost without a word.
_LITTLE = 0.1  # Share of H(Y) whose loss is a failure if it lasts.
_LASTS = 3  # Readings in a row: so long.
_MANY = 0.1  # Share of samples that have the output of the one before.
_SAME = 1e-6  # Outputs that differ by less are the same.
# What a resumed training must know: weights with what was read of them, and numbers.
_KEPT = ("good", "start", "other")
_NUMBERS = ("low", "learned", "start_step", "good_step", "tried", "other_age")


class Way(enum.Enum):
    """How a training goes on after a failure: from which weights, at what rates.

    How much lower the rates are, `Controller.roll_back` says.
    """

    CUT = "from the last good weights, lower"
    RESTART = "from the start, far lower, since little was learned"
    UNDO = "from the last good weights, at the rates before a raise"
    SECOND = "a second start: from the start, lower, since its rate seems too high"
    FIRST = "from where the first start had come to, since the second one knows less"


class Rollback:
    """Keeps the weights of the last good reading, and says when to go back to them.

    A reading is good whose information is not below the best so far by more than noise.
    `judge` compares each with the best and with the first one, and keeps its weights or
    says what has failed; `restore` then sets the weights back. What it goes back to:

    - *the last good reading*, in most cases;
    - *the start*, where little was learned. It is kept for two readings, and until half
      is known of what seems attainable;
    - *a second start*: where a policy raises rates, and a failure points to a rate of
      the start that is too high, a lower one is tried from the start, as long as the
      first one took. Meanwhile the first one's last good weights are kept. If the
      second then knows less, the training goes on from these.

    So there are two copies, and three while a second start is tried. Each has the
    weights, the buffers of PyTorch's modules and the optimizer's state, as NumPy arrays
    in the host's memory.

    Args:
        model: A compiled, built `keras.Model`.
        even: What H(Y) would be if all classes had equal shares, in nats, where it is
            known; see `collapse`. Defaults to `0.0`.
        usual_loss: Whether the losses are Keras' own. One of the user's may leave out
            labels, such as padding, whose cross-entropy rises while the others are
            learned. So it is no failure then. Defaults to `True`.
    """

    def __init__(self, model, even: float = 0.0, usual_loss: bool = True):
        self._model, self._even, self._usual_loss = model, even, usual_loss
        # `Information` at the output: at the start, and of the best reading since.
        self._first = self._best = None
        # Pairs of what was read, an `Information` for each rate, and the weights that
        # it was read of: at the start, while it is kept, and at the last good reading.
        self._start = self._good = None
        self._now = None  # What was read of the present weights.
        self._learned = False  # Whether the cross-entropy was ever below H(Y).
        self._low = 0  # Readings in a row that were far below the best.
        # Of the failure that `judge` has found: whether it is a raise that has cost
        # information, and whether a second start may do better.
        self._undo = self._again = False
        self._step = 0.0  # Number of the present reading,
        self._good_step = 0.0  # of the last good one,
        self._start_step = 0.0  # and of that at which the training started, or again.
        # While a second start is tried, what is kept of the first one: its `_good`, its
        # `_best`, and the number of readings that these took it.
        self._other = self._other_best = None
        self._other_age = 0.0
        self._second = None  # Its weights at the latest reading, or at the start.
        self._tried = False  # Whether a second start was made, and did not do better.
        self.count = 0  # How often the training was rolled back.
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
        """Judges a reading. Its weights are kept where nothing has failed.

        Args:
            output: `Information` at the output.
            infos: `Information` for each rate.
            loss: The training loss.
            step: Number of the reading, as in `policies.Reading`.
            steps: Number of readings planned, or None where it is not known.
            explores: Whether the policy is one that raises rates to see what comes.
            raised: Whether the last reading made it raise one.
            at_start: Whether the rate, or the one before that raise, is still that of
                the start. Nothing has shown that this one is not too high; if it is,
                no lower rate mends what it has done to the weights. So after some
                failures a second start is made at a lower one.

        Returns:
            What has failed, in words, or None.
        """
        values = self._values()
        self._step = step
        failure, self._undo, self._again = self._not_finite(values, loss), False, False
        # A model that had no weights at the start has no best reading yet.
        if failure is None and self._best is not None:
            at_start = explores and at_start
            again = at_start and self._may_start_again(steps)
            failure = self._fails(output, explores, raised, at_start, again)
        if failure is None:
            self.keep(output, infos, values)
            self._second = None if self._other is None else values
        return failure

    def _fails(self, output, explores, raised, at_start, again):
        """What has been lost, in words; else None. Sets `_undo` and `_again`.

        Args:
            output: `Information` at the output.
            explores: See `judge`; so are `raised` and `at_start`.
            raised: Whether the last reading made the policy raise a rate.
            at_start: Whether the policy explores from a rate that may be too high.
            again: Whether a second start may be made.
        """
        failure = (
            collapse(output, self._best, self._first, self._even, self._learned)
            if self._usual_loss
            else death(output, self._first)
        )
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
        if at_start and (again or not self._half_is_known()):
            failure = self._repeats(output)
            if failure is not None:
                self._again = again
                return failure
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

    def is_dead(self, output) -> bool:
        """Whether the output is the same for nearly all samples, and was not."""
        return self._first is not None and death(output, self._first) is not None

    def _not_finite(self, values, loss):
        """What is not finite, in words; else None."""
        trained = {id(v) for v in self._model.trainable_variables}
        weights, slots = self._model.weights, self._model.optimizer.variables
        of_model = zip(weights, values, strict=False)  # The optimizer's come after.
        finite = _are_finite(value for v, value in of_model if id(v) in trained)
        if not finite or not (math.isfinite(loss) or self._skips_some()):
            return "the loss or the weights are not finite"
        # Of a gradient whose square overflows, Adam keeps an infinite average: the
        # weights are what they were, and never change again.
        if not _are_finite(values[len(weights) : len(weights) + len(slots)]):
            return "the optimizer's state is not finite"
        return None

    def _skips_some(self):
        """Whether steps that are not finite are skipped, by design, and not all are.

        A loss scale is halved by each of them: one that has come down below 1 is none
        that any gradient needs.
        """
        optimizer = self._model.optimizer
        if not isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
            return False
        return float(keras.ops.convert_to_numpy(optimizer.dynamic_scale)) >= 1

    def _repeats(self, output):
        """How many samples have the same output, in words; None where few have.

        A rate that is too high makes units zero for every sample. What is left of the
        network still learns, but no lower rate brings these back. At rates that serve,
        hardly two samples have the same output while the network is not sure of them.
        """
        more = output.repeated > self._first.repeated + _MANY
        if not more or output.accessible >= 0.75 * self._attainable():
            return None
        return (
            "at the rate of the start the output became the same for many samples: "
            f"{output.repeated:.0%} have that of the one before"
        )

    def _stays_low(self, output):
        """What has been lost for some readings in a row, in words; else None.

        In a single reading much may be missing, as the weights swing at a high rate. It
        stays missing where the rate has done damage that no lower rate mends, such as
        units that are zero for every sample.
        """
        self._low = self._low + 1 if is_below(output, self._best, _LITTLE) else 0
        if self._low < _LASTS:
            return None
        return (
            f"for {_LASTS} readings the information stayed far below what it was, "
            f"{output.accessible:.4g} of {self._best.accessible:.4g} nats"
        )

    def _knows_less(self, output):
        """What a second start lacks, once it is as old as the first was; else None.

        Where it lacks nothing, the first one is given up.
        """
        if self._step - self._start_step < 0.9 * self._other_age:
            return None
        known = self._other_best.accessible
        if output.accessible >= known - _margin(output, _NEGLIGIBLE):
            # Where both know about as much, the lower rate is farther from one that
            # fails.
            self._other = self._other_best = None
            self._tried = False  # It may be too high as well.
            return None
        return (
            f"from the start at a lower rate {output.accessible:.4g} nats were "
            f"learned, in the same time as {known:.4g} before"
        )

    def _may_start_again(self, steps):
        """Whether a second start could be judged, and leaves time for a training.

        It is judged by a reading at about the age that the first one had at its last
        good reading. By then a third of what is left has passed at most.
        """
        if self._tried or self._start is None or steps is None:
            return False
        age = self._good_step - self._start_step
        ahead = 1.0 if self._step >= 1 else self._step - self._good_step
        alike = 0.5 * ahead <= age <= 1.1 * ahead
        return alike and steps - self._step >= 3 * age

    def restore(self):
        """Sets weights and optimizer back, after `judge` has found a failure.

        Returns:
            What was read of these weights, an `Information` for each rate; the `Way`
            in which the training goes on; and where the weights are from, in words.

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
            self._second = self._start[1] if way is Way.SECOND else None
        infos, values = self._good
        # They are rates: whoever has set them, to freeze a layer say, means them still.
        with rates.keeping_multipliers(self._model):
            assign(list(zip(self._variables(), values, strict=True)))
        self._now = infos
        return infos, way, place

    def unfinished(self) -> str | None:
        """What a second start lacks that the end of the training cuts short; else None.

        As that of `EarlyStopping` may. It lacks nothing where it knows as much as the
        first one, or where somebody else has set the weights meanwhile.
        """
        if self._other is None or self._second is None:
            return None
        now, known = self._best.accessible, self._other_best.accessible
        weights = len(self._model.weights)  # The optimizer's come after, as its rate.
        present = zip(self._values()[:weights], self._second, strict=False)
        if now >= known or not all(np.array_equal(*pair) for pair in present):
            return None
        return (
            f"the training ended when a second start had learned {now:.4g} nats of the "
            f"{known:.4g} of the first"
        )

    def state(self) -> tuple[dict, dict]:
        """What to resume with: a dict for JSON, and the kept weights by their names.

        Both are of this moment, and do not change afterwards.
        """
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
        """The arrays among kept weights that differ from the present ones, by name.

        These are few, since the last good weights are mostly the present ones.

        Args:
            kept: Lists of weights by their names, as of `state`.
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

    def _attainable(self):
        """How much there seems to be to learn, nats."""
        if not self._learned:  # A network that says the same of all cannot tell.
            return self._best.entropy
        return np.fmin(self._best.entropy, self._best.attainable)

    def _half_is_known(self):
        """Whether half of what seems attainable is known, or was before."""
        known = self._best.accessible >= 0.5 * self._attainable()
        return self._start is None or known

    def _variables(self):
        """All that is kept: the model's, the optimizer's, and what layers hide."""
        model = self._model
        of_layers = [*backend.buffers(model), *_keras.states(model)]
        return [*model.weights, *model.optimizer.variables, *of_layers]

    def _values(self):
        # Copies: the array may be a view of the memory that is trained in.
        return [keras.ops.convert_to_numpy(v).copy() for v in self._variables()]


def _are_finite(values):
    return all(bool(np.all(np.isfinite(value))) for value in values)


def _replaced(present, arrays, name):
    """Kept weights of that name: the present ones, but for `arrays` of `changed`."""
    values = [arrays.get(f"{name}_{i}", value) for i, value in enumerate(present)]
    for value, other in zip(values, present, strict=True):
        if value.shape != other.shape:
            raise ValueError(
                "The state that MutualInformationLR is to resume is of another model. "
                f"Received: weights of shape {value.shape}, expected {other.shape}"
            )
    return values


def collapse(now, best, first, even: float = 0.0, learned=False) -> str | None:
    """Why a training has collapsed, in words, judged by readings of its output.

    None where it has not. A training has collapsed whose output does not depend on the
    input any more, or is the same for nearly all samples; or whose output is worse than
    a predictor that says the same of every sample. The cross-entropy of the best of
    these is H(Y). That the information is less than before does not suffice:

    - A network that was wrong about every sample unlearns that first. With a dominant
      class, a network predicts nothing else for long.
    - Class weights, or batches that are drawn otherwise than the probe, train for other
      shares of the classes than the probe has. While the network learns, its
      cross-entropy on the probe then rises above H(Y), up to that of the guess that all
      classes have equal shares.
    - On samples that are held out, the cross-entropy of a network that has learned may
      rise far above all of these. It is over-fitted, and knows what it knew.

    Args:
        now: `Information` of the present reading.
        best: That of the reading with the most information so far.
        first: That of the reading before training.
        even: What H(Y) would be with classes of equal shares, in nats; 0 where it is
            not known.
        learned: Whether the cross-entropy of an earlier reading was below H(Y).
    """
    nats, unlearned = now.entropy, max(now.entropy, even)
    failure = death(now, first)
    if failure is not None:
        return failure
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


def death(now, first) -> str | None:
    """Why a network says the same of all samples for good, in words; else None.

    Args:
        now: `Information` of the present reading.
        first: That of the reading before training.
    """
    if now.variation <= _SAME < first.variation:
        return "the output does not depend on the input any more"
    little = now.accessible < _LITTLE * now.entropy
    if now.repeated > 0.5 and first.repeated < _MANY and little:
        return (
            "the output is the same for nearly all samples: "
            f"{now.repeated:.0%} have that of the one before"
        )
    return None


def fell(now, best) -> str | None:
    """What a raise of the rate has cost, in words; None where it has cost nothing.

    Early in a training the counted information may fall while the network learns. So
    the cross-entropy must have risen as well, or, where there is none, half of the
    information must be lost.

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
    """Whether more was lost than a share of H(Y), and more than noise explains.

    It must be lost both by the information and by the cross-entropy. Where there is no
    cross-entropy, nothing is said to be lost.

    Args:
        now: `Information` at the output.
        best: That of the reading with the most information so far.
        share: Share of H(Y).
    """
    margin = _margin(now, share)
    lost = now.accessible < best.accessible - margin
    return bool(lost and now.cross_entropy > best.cross_entropy + margin)


def _margin(now, share):
    """Nats that may be lost: a share of H(Y), and what noise explains."""
    return max(share * now.entropy, 3 * now.noise)
