from fractions import Fraction

import keras
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from keras_milr import policies
from tests import reference

POLICIES = [
    (policies.RelativeChange, reference.relative_change),
    (policies.ReferenceLevel, reference.reference_level),
    (policies.ThresholdDecay, reference.threshold_decay),
]
OTHER_CONSTANTS = {
    policies.RelativeChange: dict(
        zip(
            policies.RelativeChange._constants,
            (0.2, 0.01, 50.0, 2.0),
            strict=True,
        )
    ),
    policies.ReferenceLevel: dict(
        zip(
            policies.ReferenceLevel._constants,
            (0.3, 0.2, 0.1, 0.05, 15, 0.6, 1.5),
            strict=True,
        )
    ),
    policies.ThresholdDecay: dict(
        zip(
            policies.ThresholdDecay._constants,
            (0.2, 0.8, 0.5, 0.3, 0.1, 0.2, 15, 0.6, 1.5),
            strict=True,
        )
    ),
}
BOTH = pytest.mark.parametrize("policy", [cls() for cls, _ in POLICIES])

# What a training can produce: information within [0, reference], a rate not above
# its peak; units of about a nat.
nats = st.floats(0, 1)


@st.composite
def readings(draw, size=1):
    def array(strategy):
        return np.array([draw(strategy) for _ in range(size)], "float64")

    ceiling = array(st.floats(0.05, 7))
    peak = array(st.floats(1e-6, 10))
    information, previous = array(nats) * ceiling, array(nats) * ceiling
    step = draw(st.integers(1, 30) | st.sampled_from([0.25, 0.5, 0.75]))
    return policies.Reading(
        rate=peak * array(st.sampled_from([1.0, 1.0, 0.5, 0.011, 1e-3])),
        start_rate=peak * array(st.sampled_from([1.0, 0.1])),
        peak_rate=peak,
        information=information,
        previous=previous,
        best=np.maximum(information, previous) * array(st.sampled_from([1, 1, 1.3])),
        reference=ceiling,
        noise=array(st.sampled_from([0.0, 1e-3, 0.01, 0.1])) * ceiling,
        step=step,
        steps=draw(st.sampled_from([None, 30])),
        rollbacks=draw(st.sampled_from([0, 0, 1])),
        bound=information * array(st.sampled_from([np.nan, 0.0, 0.5, 1.0])),
        searched=draw(st.booleans()),
        attainable=ceiling * array(st.sampled_from([np.nan, 0.0, 0.5, 0.9, 1.0])),
        at_raise=previous + (information - previous) * array(st.floats(-1, 1)),
        restarts=draw(st.sampled_from([0, 0, 1])),
    )


def entry(reading, i):
    """The i-th rate's part of a reading, as scalars."""
    return {
        name: float(value[i]) if isinstance(value, np.ndarray) else value
        for name, value in reading._asdict().items()
    }


@pytest.mark.parametrize(("policy", "plain"), POLICIES)
@given(reading=readings(size=4))
def test_equals_the_plain_reference_entry_by_entry(policy, plain, reading):
    """The same code for one rate and for many."""
    for constants in ({}, OTHER_CONSTANTS[policy]):
        rates = policy(**constants)(reading)
        assert rates.shape == (4,)
        single = {k: v for k, v in constants.items() if k != "max_ratio"}
        each = [plain(entry(reading, i), **single) for i in range(4)]
        ratio = constants.get("max_ratio", 30.0)
        expected = reference.within_ratio(each, reading._asdict(), ratio)
        np.testing.assert_allclose(rates, expected, rtol=1e-12)


@BOTH
@given(reading=readings(), unit=st.sampled_from([1 / np.log(2), 1e-3, 1e3]))
def test_unit_free(policy, reading, unit):
    """Nats or bits, the rates are the same."""
    fields = ("information", "previous", "best", "reference", "noise")
    fields = (*fields, "bound", "attainable", "at_raise")
    other = reading._replace(**{f: getattr(reading, f) * unit for f in fields})
    # Away from the thresholds, where rounding may tip the balance.
    change = np.abs(reading.information - reading.previous)
    missing = reading.reference - reading.information
    gain = change / np.maximum(reading.reference - reading.previous, 1e-9)
    for value, threshold in (
        (change, reading.noise),
        (reading.best - reading.information, reading.noise),
        (missing, np.maximum(0.02 * reading.reference, reading.noise)),
        (reading.information, 0.1 * reading.reference),
        (reading.information, 0.25 * reading.reference),
        (reading.information, 0.5 * reading.reference),
        (np.nan_to_num(reading.bound), 0.25 * reading.reference),
        (reading.information, 0.8 * reading.reference),
        (gain, 0.2),
        (gain, 0.1),
        (gain, 0.05),
    ):
        assume(np.all(np.abs(value - threshold) > 1e-6 * reading.reference))
    np.testing.assert_allclose(policy(other), policy(reading), rtol=1e-6)


@BOTH
@given(reading=readings())
def test_the_rate_itself_only_scales(policy, reading):
    fields = ("rate", "start_rate", "peak_rate")
    other = reading._replace(**{f: getattr(reading, f) * 1024 for f in fields})
    np.testing.assert_allclose(policy(other), 1024 * policy(reading), rtol=1e-12)


@BOTH
@given(reading=readings())
def test_bounded_per_step(policy, reading):
    factor = policy(reading) / reading.rate
    # To the floor at the last; at the last but one half is left, everything missing.
    last = reading.steps is not None and reading.step == reading.steps - 1
    low, high = {
        "RelativeChange": (1 / 1.5, 1.5),
        "ReferenceLevel": (0.5, 3),
        "ThresholdDecay": (0.001 if last else (1 / 2) ** 3, 3),
    }[type(policy).__name__]
    assert np.all(np.isfinite(factor))
    assert low * (1 - 1e-12) <= factor <= high * (1 + 1e-12)


@BOTH
@given(reading=readings(), share=st.floats(-1, 1))
def test_blind_to_changes_within_the_noise(policy, reading, share):
    still = reading._replace(previous=reading.information)
    assume(np.all(reading.information > 2 * reading.noise))
    moved = still._replace(previous=still.information - share * 0.999 * still.noise)
    # Only the relative change's denominator feels `previous`, and 0 over it is 0.
    np.testing.assert_array_equal(policy(moved), policy(still))


@BOTH
@given(reading=readings(), tiny=st.sampled_from([0.0, 1e-300, 1e-12]))
def test_a_start_without_information_does_not_explode(policy, reading, tiny):
    start = reading._replace(previous=np.full(1, tiny), noise=np.zeros(1))
    rate = policy(start)
    assert np.all(np.isfinite(rate))
    assert rate <= 3 * reading.rate * (1 + 1e-12)
    # Growth out of nothing is measured against the floor, not against nothing.
    slight = start._replace(information=1e-3 * start.reference)
    if isinstance(policy, policies.RelativeChange):
        assert policy(slight) < 1.01 * reading.rate


@BOTH
@given(reading=readings())
def test_no_hidden_state(policy, reading):
    first = policy(reading)
    policy(reading._replace(information=reading.reference, step=int(reading.step) + 1))
    np.testing.assert_array_equal(policy(reading), first)
    np.testing.assert_array_equal(type(policy)()(reading), first)


def make_reading(**changes):
    """One rate, in the middle of a training that knows 1.5 of 2 nats."""
    scalars = {"step": 20, "steps": None, "rollbacks": 0}
    arrays = {"rate": 0.01, "start_rate": 0.01, "peak_rate": 0.01, "noise": 0.01}
    arrays |= {"information": 1.5, "previous": 1.0, "reference": 2.0}
    values = {**scalars, **arrays, **changes}
    values.setdefault("best", max(values["information"], values["previous"]))
    return policies.Reading(
        **{k: v if k in scalars else np.array([v]) for k, v in values.items()}
    )


@BOTH
def test_the_ratio_between_layers_is_bounded(policy):
    """One layer learns on and on, the other says nothing new; from unequal starts."""
    start = np.array([1e-3, 1e-2])
    reading = policies.Reading(
        rate=start,
        start_rate=start,
        peak_rate=start,
        information=np.array([0.4, 1.0]),
        previous=np.array([0.1, 1.0]),
        best=np.array([0.4, 1.0]),
        reference=np.array([2.0, 2.0]),
        noise=np.array([0.01, 0.01]),
        step=20,  # No growth any more.
        steps=None,
        rollbacks=0,
    )
    for _ in range(50):
        rate = policy(reading)
        relative = rate / start
        assert relative.max() <= 30.0001 * relative.min()
        peak = np.maximum(reading.peak_rate, rate)
        reading = reading._replace(rate=rate, peak_rate=peak)
    assert relative.max() >= 29.9999 * relative.min()


class TestRelativeChange:
    policy = staticmethod(policies.RelativeChange())

    def test_follows_the_change_up_and_down(self):
        assert self.policy(make_reading(previous=1.2)) > 0.01
        assert self.policy(make_reading(previous=1.49)) < 0.01
        falls = self.policy(make_reading(previous=1.8))
        assert falls < self.policy(make_reading(previous=1.5))

    def test_keeps_the_rate_at_the_expected_growth(self):
        reading = make_reading(previous=1.0, information=1.05, noise=0.0)
        assert self.policy(reading)[0] == pytest.approx(0.01)


class TestReferenceLevel:
    policy = staticmethod(policies.ReferenceLevel())

    def test_keeps_the_rate_while_a_reading_gains_its_share(self):
        assert self.policy(make_reading(previous=1.4)) == 0.01  # 0.1 of 0.6 missing

    def test_cuts_as_the_share_shrinks(self):
        # 0.035 of 0.535 missing is 0.654 of the share.
        rate = self.policy(make_reading(previous=1.465))
        assert rate[0] == pytest.approx(0.01 * 0.035 / 0.535 / 0.1)
        assert self.policy(make_reading(previous=1.5)) == 0.005
        assert self.policy(make_reading(previous=1.9)) == 0.005

    def test_holds_once_nothing_is_missing(self):
        for missing in (0.039, 0.0, -0.5):  # below 2 % of the reference, or above it
            reading = make_reading(information=2 - missing, previous=2.0)
            assert self.policy(reading) == 0.01
        noisy = make_reading(information=1.8, previous=1.8, noise=0.21)
        assert self.policy(noisy) == 0.01

    def test_floor(self):
        at_floor = make_reading(rate=1.5e-4, previous=1.5)
        assert self.policy(at_floor) == pytest.approx(1e-4)
        # A rate that somebody set below the floor is not raised to it.
        assert self.policy(make_reading(rate=1e-5, previous=1.5)) == 1e-5

    def test_grows_early(self):
        early = {"step": 3, "previous": 0.5, "information": 0.9}
        assert self.policy(make_reading(**early)) == pytest.approx(0.02)
        late = early | {"information": 1.5}
        assert self.policy(make_reading(**late)) == pytest.approx(0.02)
        # Little or nothing was learned, or something lost of the little.
        for little in (
            {"information": 0.15},
            {"information": 0.4, "bound": 0.4},
            {"bound": 0.1},
        ):
            known = (early | little)["information"]
            for previous in (known - 0.03, known, known + 0.05, 1.5):
                reading = make_reading(**early | little | {"previous": previous})
                assert self.policy(reading) == pytest.approx(0.03)
        # Not again where a raise has gained little, but for a rate that is far too low.
        for at_raise, rate in ((0.7, 0.02), (0.8, 0.01), (0.9, 0.01), (1.1, 0.01)):
            raised = make_reading(**early)._replace(at_raise=np.array([at_raise]))
            assert self.policy(raised) == pytest.approx(rate)
        # A fifth of H(Y) may be half of what is to be known of noisy labels.
        noisy = make_reading(**early | {"information": 0.4, "previous": 0.38})
        noisy = noisy._replace(bound=np.array([0.4]))
        assert self.policy(noisy) == pytest.approx(0.03)
        assert self.policy(noisy._replace(attainable=np.array([0.8]))) == 0.01
        # Not beyond a rate at which less is known than before it.
        assert self.policy(make_reading(**early | {"best": 0.92})) == 0.01
        # Half may be all that noisy labels let it know, a quarter all of numbers.
        for known, bound in ((0.9, np.nan), (0.9, 0.6), (0.4, np.nan)):
            here = {"information": known, "previous": known, "bound": bound}
            assert self.policy(make_reading(**early | here)) == 0.01
        for reason in (
            {"step": 9},
            {"rollbacks": 1},
            {"peak_rate": 0.02},
            {"previous": 0.95},  # More than a quarter is known.
            {"information": 1.2, "previous": 1.25},
            {"information": 1.61},
        ):
            assert self.policy(make_reading(**early | reason)) <= 0.01
        never = policies.ReferenceLevel(grow_steps=0)
        assert never(make_reading(**early)) == 0.01


@pytest.mark.parametrize(
    "policy", [policies.ReferenceLevel(), policies.ThresholdDecay()]
)
def test_what_an_untrained_network_knows_is_luck(policy):
    """Numbers in bins: a quarter of H(bins) before the training, less after it."""
    first = {"step": 1, "steps": 20, "previous": 0.5, "information": 0.4}
    assert policy(make_reading(**first)) == 0.01
    assert policy(make_reading(**first | {"step": 2})) < 0.01
    assert policy(make_reading(**first | {"previous": 1.2})) < 0.01  # It was trained.


@pytest.mark.parametrize(
    "policy", [policies.ReferenceLevel(), policies.ThresholdDecay()]
)
def test_of_next_to_nothing_some_may_be_lost(policy):
    """Of two classes one is said of all samples for long: nothing is attainable."""
    start = {"step": 4, "steps": 30, "noise": 0.0, "previous": 0.03, "bound": 0.0}
    nothing = make_reading(**start, information=0.02)
    nothing = nothing._replace(attainable=np.array([0.0]))
    assert policy(nothing) == 0.01
    assert policy(nothing._replace(attainable=np.array([1.0]))) == pytest.approx(0.03)
    some = make_reading(**start | {"bound": 0.3, "previous": 0.5}, information=0.3)
    assert policy(some._replace(attainable=np.array([0.5]))) < 0.01


@pytest.mark.parametrize(
    "policy", [policies.ReferenceLevel(), policies.ThresholdDecay()]
)
def test_within_the_first_epoch_rates_only_rise(policy):
    early = {"step": 0.5, "steps": 6, "previous": 0.5, "information": 0.9}
    assert policy(make_reading(**early)) == pytest.approx(0.02)
    restarted = make_reading(**early, rollbacks=1)._replace(restarts=1)
    assert policy(restarted) == pytest.approx(0.02)
    assert policy(restarted._replace(rollbacks=2)) == 0.01
    # A quarter of an epoch that gains less than a fifth of what is missing.
    for previous in (0.7, 0.95):
        slow = early | {"previous": previous}
        assert policy(make_reading(**slow)) == 0.01
        assert policy(make_reading(**slow, bound=0.1)) == pytest.approx(0.03)
        found = make_reading(**slow, bound=0.1)._replace(searched=True)
        assert policy(found) == 0.01  # It cannot be far too low.
        restarted = make_reading(**slow, bound=0.1, rollbacks=1)
        assert policy(restarted._replace(restarts=1)) == pytest.approx(0.03)
    # Where a quarter of H(Y) is not known yet, a raise may begin, but not threefold.
    noisy = make_reading(**early, bound=0.4)._replace(attainable=np.array([1.2]))
    assert policy(noisy) == pytest.approx(0.02)
    assert policy(noisy._replace(bound=np.array([0.6]))) == 0.01
    assert policy(noisy._replace(previous=np.array([0.8]))) == 0.01
    known = early | {"information": 1.3, "previous": 1.1}
    assert policy(make_reading(**known)) == 0.01  # A start that is about right.
    known |= {"start_rate": 0.001}
    assert policy(make_reading(**known)) == pytest.approx(0.02)
    for previous in (1.2, 1.3, 1.5):
        assert policy(make_reading(**known | {"previous": previous})) == 0.01
    assert policy(make_reading(**early | {"information": 1.7})) == 0.01
    assert policy.early_readings == 3
    never = type(policy)(grow_steps=0)
    assert never(make_reading(**early)) == 0.01
    assert never.early_readings == 0


@pytest.mark.parametrize(
    "policy", [policies.ReferenceLevel(), policies.ThresholdDecay()]
)
def test_without_probabilities_a_raise_needs_ten_standard_errors(policy):
    early = {"step": 3, "steps": 40, "previous": 0.5, "information": 0.9}
    early["noise"] = 0.041
    assert policy(make_reading(**early)) == 0.01
    assert policy(make_reading(**early | {"noise": 0.039})) == pytest.approx(0.02)
    assert policy(make_reading(**early, bound=0.6)) == pytest.approx(0.02)


class TestThresholdDecay:
    policy = staticmethod(policies.ThresholdDecay())

    def test_explores_while_a_reading_gains_enough(self):
        # 0.04 of 0.54 missing is more than a twentieth.
        reading = make_reading(step=10, steps=40, previous=1.46)
        assert self.policy(reading) == 0.01
        assert self.policy(make_reading(step=10, steps=40, previous=1.48)) < 0.01

    def test_saturation_is_no_reason_to_decay(self):
        full = make_reading(step=10, steps=40, information=1.99, previous=1.99)
        assert self.policy(full) == 0.01
        unknown = make_reading(step=10, information=1.99, previous=1.99)
        assert self.policy(unknown) == 0.01

    def test_decays_in_the_tail_in_any_case(self):
        for information in (1.5, 1.99):
            reading = make_reading(step=25, steps=40, information=information)
            assert self.policy(reading) < 0.01

    @pytest.mark.parametrize(("missing", "power"), [(0.0, 1), (0.5, 2), (1.0, 3)])
    def test_ends_with_the_training(self, missing, power):
        """In closed form: the product telescopes, from 30 readings to go."""
        information = 2 * (1 - missing)
        reading = make_reading(
            peak_rate=0.02, information=information, previous=information, steps=40
        )
        for step in range(10, 41):
            rate = self.policy(reading._replace(step=step))
            reading = reading._replace(rate=rate)
            if step < 39:
                expected = max(0.01 * ((39 - step) / 30) ** power, 0.001 * 0.02)
                assert rate[0] == pytest.approx(expected)
        assert rate[0] == pytest.approx(0.001 * 0.02)

    def test_grows_early_but_not_in_the_tail(self):
        early = {"step": 3, "previous": 0.5, "information": 0.9}
        assert self.policy(make_reading(steps=40, **early)) == pytest.approx(0.02)
        for previous in (0.88, 0.94, 1.5):
            slow = early | {"previous": previous, "bound": 0.1}
            assert self.policy(make_reading(steps=40, **slow)) == pytest.approx(0.03)
        waits = early | {"previous": 0.88}
        assert self.policy(make_reading(steps=40, **waits)) == 0.01
        for lost in ({"previous": 0.95}, {"information": 1.2, "previous": 1.25}):
            assert self.policy(make_reading(steps=40, **early | lost)) < 0.01
        assert self.policy(make_reading(steps=4, **early)) < 0.01
        assert self.policy(make_reading(**early | {"step": 1}, steps=2)) < 0.01
        never = policies.ThresholdDecay(grow_steps=0)
        assert never(make_reading(steps=40, **early)) == 0.01


def test_get():
    assert isinstance(policies.get("decay"), policies.ThresholdDecay)
    assert isinstance(policies.get("relative"), policies.RelativeChange)
    assert isinstance(policies.get("reference"), policies.ReferenceLevel)

    def own(reading):
        return reading.rate

    assert policies.get(own) is own
    policy = policies.ReferenceLevel(share=0.2, grow_steps=0)
    config = keras.saving.serialize_keras_object(policy)
    again = policies.get(config)
    assert again.get_config() == policy.get_config()
    assert repr(again) == (
        "ReferenceLevel(share=0.2, cut=0.5, hold=0.02, floor=0.01, grow_steps=0, "
        "grow_below=0.8, max_ratio=30.0)"
    )


@pytest.mark.parametrize(
    ("identifier", "error"),
    [
        ("decay!", ValueError),
        (3, TypeError),
        (None, TypeError),
        (policies.RelativeChange, TypeError),
    ],
)
def test_unknown_policies(identifier, error):
    with pytest.raises(error, match=r"`policy` must be one of \['decay', 'refer"):
        policies.get(identifier)


@pytest.mark.parametrize(
    ("policy", "name", "value"),
    [
        (policies.RelativeChange, "expected", -0.1),
        (policies.RelativeChange, "floor", 0),
        (policies.RelativeChange, "max_factor", 1.0),
        (policies.RelativeChange, "max_factor", float("inf")),
        (policies.ReferenceLevel, "share", 0),
        (policies.ReferenceLevel, "cut", 1.5),
        (policies.ReferenceLevel, "hold", 1.0),
        (policies.ReferenceLevel, "floor", float("nan")),
        (policies.ReferenceLevel, "grow_steps", -1),
        (policies.ReferenceLevel, "grow_below", 0.0),
        (policies.RelativeChange, "max_ratio", 0.5),
        (policies.ReferenceLevel, "max_ratio", float("inf")),
        (policies.ThresholdDecay, "threshold", 0),
        (policies.ThresholdDecay, "tail", 1.5),
        (policies.ThresholdDecay, "sharpness", -0.1),
        (policies.ThresholdDecay, "cut", 0.0),
        (policies.ThresholdDecay, "hold", 1.0),
        (policies.ThresholdDecay, "floor", float("nan")),
        (policies.ThresholdDecay, "grow_steps", 1.5),
        (policies.ThresholdDecay, "grow_below", 2),
        (policies.ThresholdDecay, "max_ratio", 0.5),
    ],
)
def test_bad_constants(policy, name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be .* Received: {name}="):
        policy(**{name: value})


@BOTH
class TestAbsurdReadings:
    """A rate that is not a number would be set without a word."""

    @pytest.mark.parametrize("field", ["steps", "rollbacks"])
    def test_no_fraction_but_of_the_first_epoch(self, policy, field):
        assert np.isfinite(policy(make_reading(step=0.5)))
        with pytest.raises(ValueError, match=f"`reading.{field}` must be"):
            policy(make_reading(**{field: 0.5}))

    @pytest.mark.parametrize("field", [*policies.Reading._fields[:8], "bound"])
    @pytest.mark.parametrize(
        "value",
        [[np.nan], [np.inf], [1e300], [1.0, 2.0], 1.0, ["a"], [1j], [[1], [2, 3]]],
        ids=str,
    )
    def test_arrays(self, policy, field, value):
        reading = make_reading()._replace(**{field: value})
        if (field, str(value)) == ("bound", "[nan]"):
            assert np.isfinite(policy(reading))  # Not known.
            return
        match = "`reading." if field == "rate" else f"`reading.{field}` must"
        with pytest.raises(ValueError, match=match):
            policy(reading)

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            *(("rate", -0.1), ("noise", -1.0), ("bound", -0.1)),
            *(("reference", 0.0), ("reference", 1e-300)),
        ],
    )
    def test_limits(self, policy, field, value):
        with pytest.raises(ValueError, match=f"`reading.{field}` must have finite"):
            policy(make_reading(**{field: value}))

    @pytest.mark.parametrize("field", ["step", "steps", "rollbacks", "restarts"])
    @pytest.mark.parametrize("value", [-1, -0.5, 1.5, np.nan, 10**400, "a", [1]])
    def test_numbers(self, policy, field, value):
        with pytest.raises((TypeError, ValueError), match=f"`reading.{field}` must be"):
            policy(make_reading()._replace(**{field: value}))

    def test_searched(self, policy):
        with pytest.raises(TypeError, match=r"`reading.searched` must be True or"):
            policy(make_reading()._replace(searched=1))

    def test_other_than_a_reading(self, policy):
        with pytest.raises(TypeError, match=r"`reading` must be a policies\.Reading"):
            policy({"rate": 0.1})


def test_constants_next_to_nothing():
    """Nothing over nothing is no change, not NaN."""
    tiny = 5e-324
    still = {"information": 0.0, "previous": 0.0, "noise": 0.0}
    gained = {"information": 1.0, "previous": 0.0, "noise": 0.0}
    for policy in (
        policies.RelativeChange(floor=tiny),
        policies.ReferenceLevel(share=tiny, hold=tiny, floor=tiny, cut=tiny),
        policies.ThresholdDecay(threshold=tiny, hold=tiny, floor=tiny, cut=tiny),
    ):
        for changes in (still, gained):
            for start_rate in (0.01, tiny):
                reading = make_reading(**changes, start_rate=start_rate)
                with np.errstate(divide="raise", invalid="raise"):
                    assert np.isfinite(policy(reading)[0])


@pytest.mark.parametrize(("policy", "plain"), POLICIES)
def test_a_change_beyond_float32_is_a_change(policy, plain):
    reading = make_reading(information=0.0, previous=7e-80, noise=0.0, step=1)
    assert policy()(reading)[0] == pytest.approx(plain(entry(reading, 0)), rel=1e-12)


def test_fractions_are_no_constants():
    """An array times a fraction is an array of objects, which no optimizer takes."""
    with pytest.raises(TypeError, match="`floor` must be a finite number"):
        policies.RelativeChange(floor=Fraction(1, 3))
    with pytest.raises(ValueError, match=r"`max_factor` must be .* at most 3\.4"):
        policies.RelativeChange(max_factor=1e308)
