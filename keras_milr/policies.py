"""Policies: from a reading of the information to the next learning rate.

A policy is a callable `policy(reading) -> rate`. It is a pure function of the reading:
whatever it must know is in there. All arithmetic is elementwise, so the same code sets
one rate for a network or an array of rates for its layers. Only the last step looks
across layers: it keeps the ratio between their rates within `max_ratio`.

Attributes of a policy say what else it needs. A policy without them has none of these:

- `undoes_raises`: true for a policy that raises rates to see what comes of it, as
  `ReferenceLevel` and `ThresholdDecay` do. Where the information falls after a raise,
  and the cross-entropy rises with it, `MutualInformationLR(rollback=True)` then goes
  back to the weights from before; see `keras_milr.rollback.fell`. It goes back as well
  where much of the information stays lost for some readings. Where that happens at the
  rate of the start, a lower one is tried from the start.
- `early_readings`: a number of readings within the first epoch, which are taken where
  there is a probe. So a rate that is far too low is raised before the epoch is lost.
- `glides`: true for a policy whose answer, where it is below the present rate, is the
  rate to be reached at the next reading. It is reached step by step, not at once.
- `anneals`: true for a policy that brings the rate down by the end of the training. In
  a training of few epochs it is shown readings within each of them, so that it can.
  Afterwards the rate is set back to the highest, for a `fit` to come.

The papers by Vasudevan (2018, 2020) recommend no policy. They name two approaches,
tracking the relative change in mutual information, and additionally its value
relative to a reference measure. `RelativeChange` and `ReferenceLevel` are of these two
kinds, and `ThresholdDecay` decays between bounds as the second paper does; their
formulas are our own.
"""

from collections.abc import Callable
from typing import NamedTuple

import keras
import numpy as np

from keras_milr._arguments import LARGEST, check_bool, check_integer, check_number


class Reading(NamedTuple):
    """What a policy knows when it sets the rates. Arrays have one entry per rate.

    Attributes:
        rate: The present learning rates.
        start_rate: The rates at the start of the training, or at the last restart:
            see `restarts`.
        peak_rate: The highest rates so far.
        information: The accessible information now, nats.
        previous: The same an epoch (or `update_freq` batches) ago; within the first
            epoch, at the reading before.
        best: The largest so far, this reading included.
        reference: What `information` is measured against, nats; H(Y) by default.
        noise: Standard error of a change of the information, nats. A change up to
            this size means nothing.
        step: Number of this reading: 1 for the one after the first epoch (or the first
            `update_freq` batches); within the first epoch the share of it that has
            passed.
        steps: Number of readings planned, or None where it is not known. Where some
            have nothing to read, as in epochs without validation, the next ones are
            expected as far apart as the last two.
        rollbacks: How often the training has been rolled back.
        bound: H(Y) − CE, the part of the information that the probabilities say, at
            least 0, nats; NaN where the outputs are not probabilities, and of hidden
            layers read otherwise. `None` counts as NaN.
        searched: Whether a range test found the start rates. Rates far above them then
            learn no better. Defaults to `False`.
        attainable: How much of H(Y) there seems to be to learn, where labels are noisy,
            nats; see `readouts.Information`. NaN where it is not known. `None` counts
            as NaN.
        at_raise: The information when the rate was last raised, nats; where it has not
            been, before the training. `None` counts as `previous`.
        restarts: How many of the roll backs were restarts: back to the weights of the
            start, at rates far below those that had failed. Defaults to `0`.
    """

    rate: np.ndarray
    start_rate: np.ndarray
    peak_rate: np.ndarray
    information: np.ndarray
    previous: np.ndarray
    best: np.ndarray
    reference: np.ndarray
    noise: np.ndarray
    step: float
    steps: int | None
    rollbacks: int
    bound: np.ndarray | None = None
    searched: bool = False
    attainable: np.ndarray | None = None
    at_raise: np.ndarray | None = None
    restarts: int = 0


Policy = Callable[[Reading], np.ndarray]

_UNKNOWN = ("bound", "attainable")  # Fields of a reading that may be NaN.
_INFORMATION = ("information", "previous", "best", "at_raise")  # May be below 0.
_ARRAYS = (*Reading._fields[:8], *_UNKNOWN, "at_raise")
_TINY = np.finfo("float32").tiny  # In float32 rates are set.
_SOON = 0.2  # Share of the missing information, in a part of the first epoch.
_SURE = 10  # Standard errors, where there are no probabilities.


class _Configured:
    """Serialisation of a policy whose constructor arguments are its attributes."""

    _constants: tuple[str, ...] = ()

    def get_config(self) -> dict:
        return {name: getattr(self, name) for name in self._constants}

    @classmethod
    def from_config(cls, config: dict):
        return cls(**config)

    def __repr__(self):
        constants = ", ".join(f"{k}={v!r}" for k, v in self.get_config().items())
        return f"{type(self).__name__}({constants})"


@keras.saving.register_keras_serializable(package="keras_milr")
class RelativeChange(_Configured):
    """The rate follows the relative change of the information, up and down.

    With the information I of this reading and I' of the previous one, both nats:

        d = (I − I') / max(I', floor × reference, noise)
        rate ← rate × clip((1 + d) / (1 + expected), 1 / max_factor, max_factor)

    While the information grows faster than `expected` per reading the rate rises,
    which is a warm-up whose length the data decide; once it grows more slowly, or
    falls, the rate falls. A change within the noise is no change (d = 0).
    The formula is our own, of the first kind in Vasudevan (2018).

    Args:
        expected: Relative growth of the information per reading at which the rate
            stays as it is. Larger values decay sooner. Defaults to `0.05`.
        floor: Share of the reference below which the previous information does not
            count as smaller, so that a start at I' ≈ 0 does not explode.
            Defaults to `0.1`.
        max_factor: Largest factor, and one over the smallest, by which one reading
            may change the rate. Defaults to `1.5`.
        max_ratio: With several rates, the largest ratio between two of them, both in
            units of their start; the lowest are raised to it. Defaults to `30`.

    Raises:
        ValueError: for `expected < 0`, `floor <= 0`, `max_factor <= 1` or
            `max_ratio < 1`.
    """

    _constants = ("expected", "floor", "max_factor", "max_ratio")

    def __init__(
        self,
        expected: float = 0.05,
        floor: float = 0.1,
        max_factor: float = 1.5,
        max_ratio: float = 30.0,
    ):
        check_number("expected", expected, at_least=0)
        check_number("floor", floor, above=0)
        check_number("max_factor", max_factor, above=1, at_most=LARGEST)
        check_number("max_ratio", max_ratio, at_least=1)
        self.expected = expected
        self.floor = floor
        self.max_factor = max_factor
        self.max_ratio = max_ratio

    def __call__(self, reading: Reading) -> np.ndarray:
        reading = _checked(reading)
        base = np.maximum(reading.previous, self.floor * reading.reference)
        base = np.maximum(base, np.maximum(reading.noise, _TINY))
        relative = _change(reading, reading.previous) / base
        factor = (1.0 + relative) / (1.0 + self.expected)
        factor = np.clip(factor, 1.0 / self.max_factor, self.max_factor)
        return _within_ratio(reading.rate * factor, reading, self.max_ratio)


class _MissingShare(_Configured):
    """What policies share that measure a gain by the information still missing.

    They raise a rate to see whether more can be learned: see `undoes_raises` and
    `early_readings` in the docstring of this module.
    """

    undoes_raises = True

    @property
    def early_readings(self) -> int:
        return 3 if self.grow_steps > 0 else 0

    def _set_shared(self, cut, hold, floor, grow_steps, grow_below, max_ratio):
        for name, value in (("cut", cut), ("floor", floor), ("grow_below", grow_below)):
            check_number(name, value, above=0, at_most=1)
        check_number("hold", hold, above=0, below=1)
        check_integer("grow_steps", grow_steps, at_least=0)
        check_number("max_ratio", max_ratio, at_least=1)
        self.cut = cut
        self.hold = hold
        self.floor = floor
        self.grow_steps = grow_steps
        self.grow_below = grow_below
        self.max_ratio = max_ratio

    def _negligible(self, reading: Reading) -> np.ndarray:
        """What does not count as missing, nats."""
        negligible = np.maximum(self.hold * reading.reference, reading.noise)
        return np.maximum(negligible, _TINY)

    def _saturated(self, reading: Reading) -> np.ndarray:
        return reading.reference - reading.information < self._negligible(reading)

    def _gain(self, reading: Reading, before) -> np.ndarray:
        """Share gained of what was missing when the information was `before`."""
        missing = np.maximum(reading.reference - before, self._negligible(reading))
        return _change(reading, before) / missing

    def _lowered(self, reading: Reading, factor) -> np.ndarray:
        """The rate times a factor, but not below the floor."""
        lowest = np.minimum(self.floor * reading.peak_rate, reading.rate)
        return np.maximum(reading.rate * factor, lowest)

    def _grown(self, rate, reading: Reading, gain, threshold) -> np.ndarray:
        """`rate`, or more where it is far too low: see *Grow* of `ReferenceLevel`.

        Args:
            rate: What the rate would be otherwise.
            reading: The reading.
            gain: Share of the missing information gained since the previous reading.
            threshold: Share that must be gained for the rate to be doubled.
        """
        early = reading.information < 0.5 * reading.reference
        # The counts of a network that knows nothing are blind to names: often high.
        known = np.fmin(reading.information, reading.bound)
        # Without a bound, as of numbers in bins, a tenth is much: H(bins), which only a
        # perfect prediction reaches, is 8 times what one with R² = .5 says.
        share = np.where(np.isnan(reading.bound), 0.1, 0.25)
        # What there is to know, without what is noise.
        there = np.fmin(reading.reference, reading.attainable)
        # Nothing far above a rate that a range test found learns better.
        little = (known < share * there) & (not reading.searched)
        # What a network seems to know before it is trained is luck, and soon lost; and
        # of next to nothing, some is lost before more is learned. It goes to and fro
        # while little is known.
        begins = (reading.step <= 1) & (reading.previous < 0.5 * reading.reference)
        begins |= known <= self._negligible(reading)
        may_grow = (
            (reading.step <= self.grow_steps)
            & (reading.rollbacks == reading.restarts)
            & (reading.rate >= reading.peak_rate)
            & (little | begins | (gain >= 0))
            & (reading.information < self.grow_below * reading.reference)
        )
        if self._within_first(reading):
            # At a rate that is about right half is known after a quarter of an epoch.
            behind = known < share * reading.reference
            behind |= reading.information < 0.5 * there
            may_grow &= behind | (reading.rate > reading.start_rate)
            threshold = max(threshold, _SOON)
        # A gain over an epoch may hide a loss since its quarters.
        learns = (gain > threshold) & (
            reading.information >= reading.best - reading.noise
        )
        # Nor does what was gained before a raise speak for another one.
        learns &= self._gain(reading, reading.at_raise) > threshold
        # In a few hundred samples counts gain a tenth at any rate; those of a metric
        # are of a whole epoch, in which the network knew less than at its end.
        surely = _change(reading, reading.previous) > _SURE * reading.noise
        learns &= ~np.isnan(reading.bound) | surely
        rate = np.where(may_grow & learns, 2 * reading.rate, rate)
        stuck = may_grow & early & ~learns
        return np.where(stuck, np.where(little, 3.0, 1.0) * reading.rate, rate)

    @staticmethod
    def _within_first(reading: Reading) -> bool:
        """Whether the first epoch has not ended: a time to raise rates only."""
        return 0 < reading.step < 1


@keras.saving.register_keras_serializable(package="keras_milr")
class ReferenceLevel(_MissingShare):
    """Keeps the rate while each reading gains its share of what is still missing.

    The change of the information is measured against its distance from the reference,
    by default H(Y), the most that can be known about the labels. With the information I
    of this reading and I' of the previous one, all nats:

        missing = reference − I,    missing' = reference − I'
        g = (I − I') / max(missing', hold × reference, noise)

    1. *Hold.* If missing < hold × reference, or missing < noise, nothing measurable is
       missing: the rate stays.
    2. *Grow.* This mends a start that is far too low. It is looked at in the first
       `grow_steps` readings, and at each quarter of the first epoch, while the rate was
       never lowered and I is less than `grow_below` of the reference.

       - Much is gained: rate × 2. That is g > share (0.2, if that is more, within the
         first epoch), both since the previous reading and since the last raise, with I
         the best so far. Where there are no probabilities, the gain must also be ten
         standard errors.
       - Else, I is less than half of the reference: the rate is not lowered, be it a
         low rate or noise in the labels that this comes from. And where little is
         known, rate × 3. That is H(Y) − CE less than a quarter of what seems
         `attainable` or, where there are no probabilities, I less than a tenth of it.
         It holds also if the information falls, since counts go to and fro then; but
         not where a range test found the start. Otherwise a fall ends all this, except
         at first: from what the network knew by luck before it was trained, or while
         next to nothing is known.

       Within the first epoch the rate is not raised for the first time once half is
       reached of what seems attainable, unless H(Y) − CE is less than a quarter of the
       reference. A raise that costs information is undone.
    3. *Decay.* Else, once an epoch has ended, rate × clip(g / share, cut, 1): kept
       while a reading gains at least `share` of what was missing, cut as the gain
       shrinks, but never below `floor` times the highest rate so far.

    A change within the noise is no change (g = 0). The formula is our own, of the
    second kind in Vasudevan (2018).

    Args:
        share: Share of the missing information that a reading must gain to keep the
            rate. Larger values decay sooner. Defaults to `0.1`.
        cut: Smallest factor by which one reading may lower the rate.
            Defaults to `0.5`.
        hold: Share of the reference below which missing information does not count.
            Defaults to `0.02`.
        floor: Lowest rate, as a share of the highest so far. Defaults to `0.01`.
        grow_steps: Number of first readings in which the rate may grow; 0 to never
            raise it. Defaults to `8`.
        grow_below: Share of the reference beyond which the rate is not raised: it
            serves well as it is. Defaults to `0.8`.
        max_ratio: With several rates, the largest ratio between two of them, both in
            units of their start; the lowest are raised to it. Defaults to `30`.

    Raises:
        ValueError: for a `share`, `cut`, `floor` or `grow_below` outside (0, 1], a
            `hold` outside (0, 1), a negative `grow_steps`, or `max_ratio < 1`.
    """

    _constants = (
        *("share", "cut", "hold", "floor", "grow_steps", "grow_below"),
        "max_ratio",
    )

    def __init__(
        self,
        share: float = 0.1,
        cut: float = 0.5,
        hold: float = 0.02,
        floor: float = 0.01,
        grow_steps: int = 8,
        grow_below: float = 0.8,
        max_ratio: float = 30.0,
    ):
        check_number("share", share, above=0, at_most=1)
        self.share = share
        self._set_shared(cut, hold, floor, grow_steps, grow_below, max_ratio)

    @np.errstate(over="ignore")  # A share of next to nothing: clipped.
    def __call__(self, reading: Reading) -> np.ndarray:
        reading = _checked(reading)
        gain = self._gain(reading, reading.previous)
        saturated = self._saturated(reading)
        kept = np.clip(gain / self.share, self.cut, 1.0)
        rate = self._lowered(reading, kept)
        rate = self._grown(rate, reading, gain, self.share)
        if self._within_first(reading):
            rate = np.maximum(rate, reading.rate)
        rate = np.where(saturated, reading.rate, rate)
        return _within_ratio(rate, reading, self.max_ratio)


@keras.saving.register_keras_serializable(package="keras_milr")
class ThresholdDecay(_MissingShare):
    """Explores while the information grows, then decays over the steps that remain.

    With the information I of this reading and I' of the previous one, all nats, and g
    and `missing` as of `ReferenceLevel`:

    1. *Explore.* The rate stays while it was never lowered, more than `tail` of the
       planned readings remain, and g >= threshold or nothing measurable is missing. It
       is raised as `ReferenceLevel` raises it, see *Grow* there, with the threshold in
       place of the share.
    2. *Decay.* From the first reading at the end of an epoch that gains less, or once
       less than `tail` of the readings are left, or only one:

           rate ← rate × ((left − 1) / left) ^ power
           power = 1 + sharpness × missing / reference

       where `left` is the number of readings to come: a ramp that ends with the
       training, and never below `floor` times the highest rate so far. The rate goes
       down this ramp step by step between readings: see `glides` in the docstring of
       this module. A network that knows nearly everything comes down along a straight
       line; the more is missing that it does not learn any more, such as noise in the
       labels, the lower it gets. So the decay survives saturation: where nothing is
       missing the rate falls with the time that is left, and no faster.

    Where the number of readings is not known, 2. is that of `ReferenceLevel`: rate ×
    clip(g / threshold, cut, 1), and the rate stays where nothing measurable is missing.

    A policy of one's own that calls this one must have `glides = True` and
    `anneals = True` too. Without the first, each rate would be that of the next reading
    at once.

    A change within the noise is no change (g = 0). The formula is our own. That
    information decides when and between which bounds a rate decays is the idea of
    Vasudevan (2020).

    Args:
        threshold: Share of the missing information that a reading must gain for the
            exploration to go on. Larger values decay sooner. Defaults to `0.05`.
        tail: Share of the planned readings, the last ones, in which the rate decays in
            any case; so it does from the last reading but one on. Defaults to `0.4`.
        sharpness: How much steeper the decay is the more information is missing; 0 for
            a straight line to zero. Defaults to `2`.
        cut: Smallest factor by which one reading may lower the rate, where the number
            of readings is not known. Defaults to `0.5`.
        hold: Share of the reference below which missing information does not count.
            Defaults to `0.02`.
        floor: Lowest rate, as a share of the highest so far. Defaults to `0.001`.
        grow_steps: Number of first readings in which the rate may grow; 0 to never
            raise it. Defaults to `8`.
        grow_below: Share of the reference beyond which the rate is not raised.
            Defaults to `0.8`.
        max_ratio: With several rates, the largest ratio between two of them, both in
            units of their start; the lowest are raised to it. Defaults to `30`.

    Raises:
        ValueError: for a `threshold`, `tail`, `cut`, `floor` or `grow_below` outside
            (0, 1], a `hold` outside (0, 1), a negative `sharpness` or `grow_steps`, or
            `max_ratio < 1`.
    """

    _constants = (
        *("threshold", "tail", "sharpness", "cut", "hold", "floor"),
        *("grow_steps", "grow_below", "max_ratio"),
    )
    anneals = True
    glides = True

    def __init__(
        self,
        threshold: float = 0.05,
        tail: float = 0.4,
        sharpness: float = 2.0,
        cut: float = 0.5,
        hold: float = 0.02,
        floor: float = 0.001,
        grow_steps: int = 8,
        grow_below: float = 0.8,
        max_ratio: float = 30.0,
    ):
        check_number("threshold", threshold, above=0, at_most=1)
        check_number("tail", tail, above=0, at_most=1)
        check_number("sharpness", sharpness, at_least=0)
        self.threshold = threshold
        self.tail = tail
        self.sharpness = sharpness
        self._set_shared(cut, hold, floor, grow_steps, grow_below, max_ratio)

    @np.errstate(over="ignore")  # A share of next to nothing: clipped.
    def __call__(self, reading: Reading) -> np.ndarray:
        reading = _checked(reading)
        gain = self._gain(reading, reading.previous)
        saturated = self._saturated(reading)
        if reading.steps is None:
            factor = np.clip(gain / self.threshold, self.cut, 1.0)
            factor = np.where(saturated, 1.0, factor)
            late = False
        else:
            # After the last reading nothing is left to decay for.
            left = max(reading.steps - reading.step, 0)
            ramp = max(left - 1, 0) / left if left > 0 else 1.0
            missing = np.maximum(reading.reference - reading.information, 0.0)
            factor = ramp ** (1.0 + self.sharpness * missing / reading.reference)
            late = left < self.tail * reading.steps or left <= 1
        if self._within_first(reading):
            factor, late = 1.0, False
        exploring = (
            (reading.rate >= reading.peak_rate)
            & ((gain >= self.threshold) | saturated)
            & (not late)
        )
        rate = self._lowered(reading, factor)
        rate = np.where(exploring, reading.rate, rate)
        if not late:
            rate = self._grown(rate, reading, gain, self.threshold)
        return _within_ratio(rate, reading, self.max_ratio)


_POLICIES = {
    "relative": RelativeChange,
    "reference": ReferenceLevel,
    "decay": ThresholdDecay,
}


def get(identifier) -> Policy:
    """The policy that `identifier` names.

    Args:
        identifier: `"relative"`, `"reference"`, `"decay"`, a serialised policy (dict),
            or a callable `policy(reading) -> rate`, which is returned as it is.

    Raises:
        ValueError: for a name that is not known.
        TypeError: for anything else.
    """
    if isinstance(identifier, str):
        if identifier not in _POLICIES:
            raise ValueError(
                f"Argument `policy` must be one of {sorted(_POLICIES)}, or a callable "
                f"policy(reading) -> rate. Received: policy={identifier!r}"
            )
        return _POLICIES[identifier]()
    if isinstance(identifier, dict):
        identifier = keras.saving.deserialize_keras_object(identifier)
    if not callable(identifier) or isinstance(identifier, type):
        raise TypeError(
            f"Argument `policy` must be one of {sorted(_POLICIES)}, or a callable "
            "policy(reading) -> rate. "
            f"Received: policy={identifier!r} of type {type(identifier).__name__}"
        )
    return identifier


def _checked(reading: Reading) -> Reading:
    """The reading in float64.

    Raises:
        TypeError: for anything else than a reading.
        ValueError: for numbers that no training has, which would make rates of NaN.
    """
    if not isinstance(reading, Reading):
        raise TypeError(
            "Argument `reading` must be a policies.Reading. "
            f"Received: reading={reading!r} of type {type(reading).__name__}"
        )
    for name in ("step", "steps", "rollbacks", "restarts"):
        number = getattr(reading, name)
        early = name == "step" and isinstance(number, float) and 0 < number < 1
        if not early and (number is not None or name != "steps"):
            check_integer(f"reading.{name}", number, at_least=0)
            if number > LARGEST:
                raise ValueError(
                    f"Argument `reading.{name}` must be a number of readings. "
                    f"Received: {number}"
                )
    check_bool("reading.searched", reading.searched)
    arrays = {}
    for name in _ARRAYS:
        value = getattr(reading, name)
        if value is None and name in _UNKNOWN:
            value = np.full(arrays["rate"].shape, np.nan)
        elif value is None and name == "at_raise":
            value = arrays["previous"]
        shape = arrays["rate"].shape if arrays else None
        arrays[name] = _checked_array(name, value, shape)
    return reading._replace(**arrays)


def _checked_array(name, value, shape) -> np.ndarray:
    """A field of a reading, of the shape of `rate`, which is None for `rate` itself."""
    try:
        array = np.asarray(value)
    except ValueError:  # A ragged list.
        array = np.array(None)
    shape = array.shape if shape is None else shape  # The first of them.
    if array.dtype.kind not in "iuf" or array.shape != shape or array.ndim != 1:
        raise ValueError(
            f"Argument `reading.{name}` must be an array of real numbers, one for "
            f"each rate. Received: {value!r}"
        )
    with np.errstate(over="ignore"):
        single = array.astype("float32")
    least = -np.inf if name in _INFORMATION else 0.0
    bad = ~np.isfinite(single) | (single < least)
    if name in _UNKNOWN:
        bad &= ~np.isnan(single)
    bad |= (single == 0) & (name == "reference")
    if np.any(bad):
        raise ValueError(
            f"Argument `reading.{name}` must have finite numbers, and none below "
            f"0, a reference above it. Received: {array}"
        )
    return array.astype("float64")


def _change(reading: Reading, before) -> np.ndarray:
    """Change of the information since it was `before`, 0 within the noise."""
    change = reading.information - before
    return np.where(np.abs(change) <= reading.noise, 0.0, change)


def _within_ratio(rates, reading: Reading, max_ratio: float) -> np.ndarray:
    """Keeps the ratio between rates, in units of their start, by raising the lowest."""
    start = reading.start_rate
    share = np.divide(rates, start, out=np.zeros_like(rates), where=start >= _TINY)
    return np.maximum(rates, start * np.max(share) / max_ratio)
