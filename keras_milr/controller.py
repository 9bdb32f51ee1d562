"""The loop of one training: a reading goes to the policy, its rates are set."""

import numbers
import operator

import numpy as np

from keras_milr._arguments import LARGEST
from keras_milr.policies import Reading
from keras_milr.rollback import Way

_ARRAYS = (
    *("start", "peak", "own_peak"),
    *("previous", "latest", "best", "at_raise"),
)
_MAYBE = ("before", "highest", "other")  # Arrays, or None.
_COUNTS = ("step", "due", "rollbacks", "restarts")


class Controller:
    """Keeps what a policy must be told, and sets what it answers within bounds.

    A policy remembers nothing. What its `Reading` says of the past (the start, the
    highest rates, the best reading) is kept here, and saved with the training.

    Args:
        rates: What is set: a `rates.NetworkRate` or `rates.LayerRates`.
        policy: A callable from a `policies.Reading` to the next rates.
        reference: What information is measured against: a number of nats, or a callable
            from an `Information` to nats. None for H(Y).
        min_lr: Lower bound of every rate.
        max_lr: Upper bound of every rate, or None for `rates.ceiling`.
        steps: How many readings there will be after the one at the start, if each that
            is due is taken. None where that is not known.
        noise: Function from an `Information` to the standard error of its changes, in
            nats.
        searched: Whether a range test found the rates at the start.
        state: What `state()` returned, for a training that goes on. Defaults to `None`:
            a training begins.

    Raises:
        ValueError: for a rate out of bounds at the start.
    """

    def __init__(
        self,
        rates,
        policy,
        reference,
        min_lr,
        max_lr,
        steps,
        noise,
        searched,
        state=None,
    ):
        self.rates = rates
        self._policy = policy
        self._reference = reference
        self._bounds = min_lr, max_lr
        self._steps = steps
        self._noise = noise
        self._searched = searched
        self._glide = None  # From where to where, and where we were last.
        if state is not None:
            self._resume(state)
            return
        self._start = self._peak = rates.get()
        check_bounds(rates, min_lr, max_lr)
        self._own_peak = rates.own()  # Not of a base that others set.
        # Information at the last reading, but for those within the first epoch; at the
        # last of all; at the best; and when a rate was last raised.
        self._previous = self._latest = self._best = self._at_raise = None
        # Of readings but for those within the first epoch: how many there were, and how
        # many were due. The one at the start makes them 0.
        self._step = self._due = -1
        self._due_before = 0  # How many readings were due before this epoch.
        self._rollbacks = self._restarts = 0
        self._before = None  # The rates before a raise, until it is judged.
        self._highest = None  # Bounds after a restart, below what has failed.
        self._other = None  # The rates to go back to from a second start.

    def _resume(self, state):
        for name in _ARRAYS:
            setattr(self, f"_{name}", self._array(name, state[name]))
        for name in _MAYBE:
            known = state[name] is not None
            value = self._array(name, state[name]) if known else None
            setattr(self, f"_{name}", value)
        for name in _COUNTS:
            setattr(self, f"_{name}", operator.index(state[name]))
        self._due_before = self._due
        if state["glide"] is not None:
            start, end = (self._array("glide", rates) for rates in state["glide"])
            at = self.rates.own()  # Somewhere on the way, in the midst of an epoch.
            if np.all((at >= end) & (at <= start)):
                self._glide = start, end, at

    def begin_epoch(self):
        """Notes that an epoch begins, which a resumed training may begin again."""
        self._due_before = self._due

    def state(self, within=False) -> dict:
        """What must be kept for a training to go on: what cannot be measured again.

        Args:
            within: Whether the training will go on from the beginning of this epoch,
                whose readings are then due once more. Defaults to `False`: from its
                end.
        """
        names = (*_ARRAYS, *_COUNTS, *_MAYBE)
        state = {name: getattr(self, f"_{name}") for name in names}
        if within:
            state["due"] = self._due_before
        left = None if self._steps is None else max(self._steps - state["due"], 0)
        return state | {"glide": self._glide and self._glide[:2], "left": left}

    def _array(self, name, value):
        """An array out of a state, which may be forged; TypeError for a bad one."""
        value, shape = np.array(value, "float64"), self.rates.get().shape
        if value.shape != shape or not np.all(np.isfinite(value)):
            raise TypeError(f"no finite numbers of shape {shape}: {name!r}")
        return value

    def explores(self) -> bool:
        """Whether the policy raises rates to see what comes of it."""
        return bool(getattr(self._policy, "undoes_raises", False))

    def tries(self) -> bool:
        """Whether the policy has raised a rate last, to see what comes of it."""
        return self.explores() and self._before is not None

    def is_at_start(self, reading) -> bool:
        """Whether the rates are those of the start, which may be too high, or below.

        After a raise, the rates before it are meant. False where a range test found the
        start: it has shown that it serves.
        """
        if self._searched:
            return False
        before = reading.rate if self._before is None else self._before
        return bool(np.all(before <= self._start))

    def read(self, infos, passed: float | None = None, apart: int = 1) -> Reading:
        """Takes up what was read, and makes of it the reading that a policy is handed.

        The first call is with what was read before the training.

        Args:
            infos: An `Information` for each rate.
            passed: For an early reading within the first epoch, the share of it that
                has passed. Such readings are not counted. Defaults to `None`, for all
                others.
            apart: How many readings have come due since the last one that was taken,
                this one included: more than 1 where some had nothing to read. Those to
                come are expected as far apart. Defaults to `1`.
        """
        if passed is None:
            self._step, self._due = self._step + 1, self._due + apart
        self.glide(1.0)
        self._glide = None
        rate = self.rates.get()
        information = np.array([info.accessible for info in infos])
        if self._previous is None:
            self._previous = self._latest = self._best = information
            self._at_raise = information
        self._peak = np.maximum(self._peak, rate)
        self._own_peak = np.maximum(self._own_peak, self.rates.own())
        self._best = np.maximum(self._best, information)
        reading = Reading(
            rate=rate,
            start_rate=self._start,
            peak_rate=self._peak,
            information=information,
            previous=self._previous if passed is None else self._latest,
            best=self._best,
            reference=np.array([self._reference_of(info) for info in infos]),
            noise=np.array([self._noise(info) for info in infos]),
            step=self._step if passed is None else passed,
            steps=self._planned(apart),
            rollbacks=self._rollbacks,
            bound=np.array([info.bound for info in infos], "float64"),
            searched=self._searched,
            attainable=np.array([info.attainable for info in infos], "float64"),
            at_raise=self._at_raise,
            restarts=self._restarts,
        )
        for value in reading:
            if isinstance(value, np.ndarray):
                # A policy that computes in place would change what it is compared with.
                value.setflags(write=False)
        self._latest = information
        if passed is None:
            self._previous = information
        return reading

    def _planned(self, apart):
        """The number that the last reading will have; None where it is not known."""
        if self._steps is None:
            return None
        left = max(self._steps - self._due, 0)
        return self._step + (max(left // apart, 1) if left > 0 else 0)

    def decide(self, reading) -> np.ndarray:
        """The rates that the policy answers, within the bounds. Sets nothing.

        Raises:
            ValueError: for an answer that is no rates.
        """
        result = self._policy(reading)
        try:
            rates = np.asarray(result)
        except ValueError:  # A ragged list, say.
            rates = np.asarray(None)
        if rates.dtype.kind not in "iuf" or rates.shape not in ((), reading.rate.shape):
            raise ValueError(
                "Argument `policy` must return a rate, or an array of the shape of "
                f"`reading.rate`, {reading.rate.shape}. Received: {result!r}"
            )
        rates = np.broadcast_to(rates, reading.rate.shape).astype("float64")
        if not np.all(np.isfinite(rates) & (rates >= 0)):
            raise ValueError(
                "Argument `policy` must return finite rates that are not negative. "
                f"Received: {rates if len(rates) > 1 else rates[0]} for {reading}"
            )
        return self._clipped(rates)

    def act(self, reading) -> np.ndarray | None:
        """Sets the rates that the policy decides on, and returns them.

        None where nothing changes. Where the policy glides, a lower rate is the one to
        be reached at the next reading: it is set half-way there, and `glide` takes it
        on from the next batch. Higher rates are set at once.
        """
        rates = self.decide(reading)
        new, old = rates.astype("float32"), reading.rate.astype("float32")
        self._before = reading.rate if np.any(new > old) else None
        self._at_raise = np.where(new > old, reading.information, self._at_raise)
        if np.array_equal(new, old):
            return None
        before = self.rates.own()
        self.rates.set(rates)
        if getattr(self._policy, "glides", False):
            after = self.rates.own()
            self._glide = np.maximum(before, after), after, after
            self.glide(0.5)
        return rates

    @property
    def glides(self) -> bool:
        """Whether rates are on their way to those of the next reading."""
        return self._glide is not None

    def glide(self, share: float) -> bool:
        """Moves rates on their way to those of the next reading.

        Args:
            share: How much of the way shall be behind them, from 0 to 1.

        Returns:
            Whether they were moved. Where somebody else has set a rate since, they stay
            as they are until the next reading.
        """
        if self._glide is None:
            return False
        start, end, at = self._glide
        if not np.array_equal(self.rates.own(), at):
            self._glide = None
            return False
        self.rates.set_own(end if share == 1 else start + share * (end - start))
        self._glide = start, end, self.rates.own()
        return True

    def end(self):
        """Sets rates that came down by the end of the training back to the highest.

        Else a training to come would start from next to nothing.
        """
        self._glide = None
        if getattr(self._policy, "anneals", False):
            self.rates.set_own(np.maximum(self.rates.own(), self._own_peak))

    def roll_back(self, infos, failed, way: Way) -> np.ndarray:
        """Lowers the rates after a training has failed, sets them and returns them.

        - `Way.CUT`: 0.3 of the rates; after a raise, of those before it.
        - `Way.UNDO`: the rates before the raise; but half of a rate that was never
          raised before, since that of the start has not shown to serve, and may be
          close below one that fails.
        - `Way.RESTART`: where the policy raises what is too low, 0.01 of the rates, but
          0.03 if they were raised or found by a range test, since something near them
          has served; else 0.1. From now on they are at most a tenth of what has failed.
        - `Way.SECOND`: 0.3 of the rates, as of `CUT`. Half of them is kept for `FIRST`.
        - `Way.FIRST`: what `SECOND` has kept.

        What is remembered of rates and information begins anew with the weights that
        the model was set back to.

        Args:
            infos: What was read of these weights, an `Information` for each rate.
            failed: The rates at the failure.
            way: How the training goes on.
        """
        self._rollbacks += 1
        before = after = failed
        if self._before is not None:
            before = np.minimum(before, self._before)
            at_start = (failed > before) & (before <= self._start)
            after = before * np.where(at_start, 0.5, 1.0)
        if way is Way.FIRST:
            rates, self._other = self._other, None
        elif way is Way.UNDO:
            rates = after
        elif way is Way.SECOND:
            rates, self._other = 0.3 * before, 0.5 * before
        elif way is Way.CUT:
            rates = 0.3 * before
        else:
            served = self._searched or self._before is not None
            low = 0.03 if served else 0.01
            rates = failed * (low if self.explores() else 0.1)
            self._highest = 0.1 * failed
            self._restarts += 1
        rates = self._clipped(rates)
        self._before = None
        self.rates.set(rates)
        if way is Way.RESTART:
            self._start = self.rates.get()
        # As they were set, in float32: a rate below the highest by rounding would count
        # as lowered.
        self._peak, self._own_peak = self.rates.get(), self.rates.own()
        self._previous = np.array([info.accessible for info in infos])
        self._latest = self._best = self._at_raise = self._previous
        return rates

    def _clipped(self, rates):
        """The rates within the bounds."""
        low, high = self._bounds
        # Where somebody else has set a rate below the bound, it may stay there.
        low = np.minimum(low, self.rates.get())
        high = self.rates.ceiling(self._start) if high is None else high
        if self._highest is not None:
            high = np.maximum(low, np.minimum(high, self._highest))
        return np.clip(rates, low, high)

    def _reference_of(self, info) -> float:
        if self._reference is None:
            return info.entropy
        if not callable(self._reference):
            return float(self._reference)
        reference = self._reference(info)
        number = isinstance(reference, numbers.Real)
        if not number or not 0 < reference <= LARGEST:
            raise ValueError(
                "Argument `reference` must return a positive number of nats. "
                f"Received: {reference!r}"
            )
        return float(reference)


def check_bounds(rates, min_lr, max_lr):
    """Refuses rates outside of the bounds at the start, with a ValueError.

    Args:
        rates: A `rates.NetworkRate` or `rates.LayerRates`.
        min_lr: Lower bound.
        max_lr: Upper bound, or None.
    """
    start = rates.get()
    # The base of layers may begin at 0, and some of them far below all others.
    low = np.float32(min_lr if rates.names is None else 0)
    high = np.float32(np.inf if max_lr is None else max_lr)
    outside = (start < low) | (start > high)
    if np.any(outside):
        raise ValueError(
            "The learning rate at the start must lie between `min_lr` and `max_lr`. "
            f"Received: learning rate {start[np.argmax(outside)]}, min_lr={min_lr}, "
            f"max_lr={max_lr}"
        )
