"""Statistics of the estimators, on data whose information is known.

Bias, spread, and how often value ± 1.96 standard errors holds the truth: nominally 95 %
of times, here 92–98 % of 400 to 2,000 data sets drawn independently, in the regimes
that the docstrings promise it for; and what happens elsewhere.
"""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats
from sklearn.metrics import mutual_info_score
from sklearn.metrics.cluster import expected_mutual_information

from keras_milr import information, readouts

pytestmark = pytest.mark.slow
EVEN = "even"
SKEWED = "skewed"


def shares(classes, kind=EVEN):
    weight = np.ones(classes) if kind == EVEN else np.arange(1, classes + 1) ** -0.7
    return weight / weight.sum()


def channel(prior, error):
    """Joint distribution of (prediction, label): any other class with `error`."""
    classes = len(prior)
    given_label = np.full((classes, classes), error / (classes - 1))
    np.fill_diagonal(given_label, 1 - error)
    return given_label * prior


def surprise(p):
    return -np.log(np.where(p > 0, p, 1.0))


def information_of(joint):
    """Mutual information of a distribution, by its definition."""
    rows, columns = joint.sum(axis=1), joint.sum(axis=0)
    return (
        rows @ surprise(rows)
        + columns @ surprise(columns)
        - np.sum(joint * surprise(joint))
    )


def fano_of(prior, error):
    binary = np.array([error, 1 - error])
    return (
        prior @ surprise(prior)
        - binary @ surprise(binary)
        - error * np.log(len(prior) - 1)
    )


def tables(joint, n, repeats, stratified=False, seed=0):
    """Tables of n samples each, with the labels drawn too or in fixed shares."""
    rng = np.random.default_rng(seed)
    if not stratified:
        return rng.multinomial(n, joint.ravel(), repeats).reshape(-1, *joint.shape)
    labels = joint.sum(axis=0)
    return np.stack(
        [
            rng.multinomial(round(n * share), column / share, repeats)
            for column, share in zip(joint.T, labels, strict=True)
        ],
        axis=-1,
    )


def found_in(counts):
    """Estimates and their errors, as `readouts.from_counts` has them."""
    value = information.mutual_information(counts, "miller_madow")
    return value, information.standard_error(counts)


def share_within(value, stderr, truth):
    return np.mean(np.abs(value - truth) <= 1.96 * stderr)


@pytest.fixture
def coverage(record_property):
    """Share of data sets whose interval holds the truth; conftest.py prints them."""

    def share(value, stderr, truth):
        found = share_within(value, stderr, truth)
        record_property("coverage", float(found))
        return found

    return share


@pytest.fixture
def assert_covers(coverage):
    def check(value, stderr, truth):
        assert np.mean(stderr) == pytest.approx(np.std(value), rel=0.1)
        assert abs(np.mean(value) - truth) < 0.3 * np.std(value)
        assert 0.92 <= coverage(value, stderr, truth) <= 0.98

    return check


@pytest.mark.parametrize("classes", [2, 10, 300])
def test_the_truth_is_the_closed_form(classes):
    """log K − h(e) − e log(K − 1), which Fano's bound reaches with even classes."""
    for error in (0.01, 0.3, 1 - 1 / classes):
        exact = information_of(channel(shares(classes), error))
        assert exact == pytest.approx(fano_of(shares(classes), error), abs=1e-12)
    exact = information_of(channel(shares(10), 0.3))
    assert exact == pytest.approx(1.032553, abs=1e-6)


class TestCounts:
    @pytest.mark.parametrize(
        ("classes", "n", "error"),
        [
            *((2, 200, 0.3), (2, 500, 0.1), (2, 2048, 0.01), (2, 100_000, 0.5 - 0.01)),
            *((3, 500, 0.1), (3, 2048, 0.05), (3, 2048, 0.5), (3, 100_000, 0.01)),
            *((5, 1000, 0.3), (5, 2048, 0.1), (5, 5000, 0.7), (5, 100_000, 0.001)),
            *((10, 2048, 0.3), (10, 2048, 0.5), (10, 5000, 0.1), (10, 50_000, 0.01)),
            *((20, 10_000, 0.3), (20, 50_000, 0.05), (50, 100_000, 0.3)),
        ],
    )
    def test_covers(self, assert_covers, classes, n, error):
        """From five expected samples a cell, and above twice the null level."""
        joint = channel(shares(classes), error)
        truth = information_of(joint)
        assert n * joint.min() >= 5
        assert n * truth > (classes - 1) ** 2  # null: half of it, over n
        repeats = 2000 if classes <= 10 else 1000
        assert_covers(*found_in(tables(joint, n, repeats)), truth)

    @pytest.mark.parametrize("error", [0.05, 0.1, 0.3])
    @pytest.mark.parametrize("prior", [(0.9, 0.1), (0.5, 0.3, 0.2), (0.7, 0.2, 0.1)])
    def test_covers_with_uneven_classes(self, coverage, assert_covers, prior, error):
        joint = channel(np.array(prior), error)
        truth = information_of(joint)
        assert_covers(*found_in(tables(joint, 4000, 2000)), truth)
        # Shares of the classes that do not vary leave less to vary.
        value, stderr = found_in(tables(joint, 4000, 2000, stratified=True))
        assert coverage(value, stderr, truth) >= 0.92
        assert np.mean(stderr) >= 0.95 * np.std(value)

    @pytest.mark.parametrize(("classes", "n"), [(2, 100), (5, 500), (10, 5000)])
    def test_is_too_wide_without_information(self, coverage, classes, n):
        value, stderr = found_in(
            tables(channel(shares(classes), 1 - 1 / classes), n, 2000)
        )
        assert coverage(value, stderr, 0.0) >= 0.975
        assert np.mean(stderr) >= 1.3 * np.std(value)

    @pytest.mark.parametrize(
        ("classes", "n", "error", "most", "bias", "covered"),
        [
            (10, 2048, 0.01, 0.8, 0.012, 0.73),
            (20, 2000, 0.05, 0.4, 0.056, 0.32),
            (10, 500, 0.05, 0.7, 0.052, 0.64),
        ],
    )
    def test_is_too_high_and_too_narrow_with_rare_cells(
        self, coverage, classes, n, error, most, bias, covered
    ):
        """The docstring gives the first two: much of it is bias, some of it spread."""
        joint = channel(shares(classes), error)
        truth = information_of(joint)
        value, stderr = found_in(tables(joint, n, 1000))
        share = coverage(value, stderr, truth)
        assert share < most
        assert share == pytest.approx(covered, abs=0.04)
        assert np.mean(value) - truth == pytest.approx(bias, rel=0.1)
        assert np.mean(value) - truth > 0.5 * np.std(value)
        assert 0.65 < np.mean(stderr) / np.std(value) < 0.9
        centred = value - np.mean(value) + truth
        assert most < share_within(centred, stderr, truth) < 0.92

    @pytest.mark.parametrize("classes", [2, 10])
    def test_never_more_than_the_sample_has(self, classes):
        """With perfect predictions it is H(Y) of the sample, (K − 1) / 2n too low."""
        n = 500
        counts = tables(channel(shares(classes), 0.0), n, 4000)
        value, _ = found_in(counts)
        np.testing.assert_allclose(value, information.entropy(counts.sum(axis=1)))
        bias = np.log(classes) - np.mean(value)
        assert bias == pytest.approx((classes - 1) / (2 * n), rel=0.1)


class TestFano:
    """Of many classes without probabilities."""

    @staticmethod
    def found_in(counts):
        # Nobody is without prediction.
        counts = np.pad(counts, ((0, 0), (0, 1), (0, 0)))
        infos = [readouts.from_counts(table) for table in counts]
        assert {info.estimator for info in infos} == {"fano"}
        return np.array([(info.value, info.stderr) for info in infos]).T

    @pytest.mark.parametrize("stratified", [False, True])
    @pytest.mark.parametrize("kind", [EVEN, SKEWED])
    @pytest.mark.parametrize("error", [0.02, 0.3, 0.6])
    def test_covers(self, coverage, assert_covers, error, kind, stratified):
        prior = shares(70, kind)
        if stratified:
            prior = np.round(20_000 * prior) / np.round(20_000 * prior).sum()
        truth = fano_of(prior, error)
        counts = tables(channel(prior, error), 20_000, 1000, stratified)
        value, stderr = self.found_in(counts)
        if kind == EVEN or not stratified:
            assert_covers(value, stderr, truth)
        else:
            assert coverage(value, stderr, truth) >= 0.92
        assert abs(np.mean(value) - truth) < 0.4 * np.std(value)

    def test_entropy_of_the_sample_is_too_low(self, coverage):
        """(K − 1) / 2n, which is much with few samples of a class, drawn at random."""
        joint, n = channel(shares(300), 0.1), 2048
        truth = fano_of(shares(300), 0.1)
        value, stderr = self.found_in(tables(joint, n, 200))
        assert truth - np.mean(value) == pytest.approx(299 / (2 * n), rel=0.2)
        assert coverage(value, stderr, truth) < 0.85


class TestBound:
    """H(Y) − CE of a model that gives 1 − q to its class and the rest to the others."""

    @staticmethod
    def found(prior, error, q, n, repeats, stratified, seed=0):
        classes, rng = len(prior), np.random.default_rng(seed)
        readout = readouts.Predictions()
        update = tf.function(readout.update)
        start = {k: tf.constant(v) for k, v in readout.init(classes).items()}
        fixed = np.repeat(np.arange(classes), np.round(n * prior).astype(int))
        found = []
        for _ in range(repeats):
            labels = fixed if stratified else rng.choice(classes, n, p=prior)
            wrong = (labels + rng.integers(1, classes, n)) % classes
            predicted = np.where(rng.random(n) < error, wrong, labels)
            outputs = np.full((n, classes), q / (classes - 1), "float32")
            outputs[np.arange(n), predicted] = 1 - q
            info = readout.finish(update(start, outputs, labels.astype("int32")))
            found.append((info.bound, info.bound_stderr))
        return np.array(found).T

    @pytest.mark.parametrize("stratified", [False, True])
    @pytest.mark.parametrize(
        ("prior", "n", "error", "q"),
        [
            ((0.5, 0.5), 1000, 0.1, 0.1),
            ((0.5, 0.5), 1000, 0.1, 0.02),  # too sure of itself
            ((0.9, 0.1), 1000, 0.04, 0.05),
            ((0.7, 0.2, 0.1), 1000, 0.05, 0.05),
            ((0.1,) * 10, 2000, 0.3, 0.3),
            ((0.1,) * 10, 2000, 0.03, 0.02),
        ],
    )
    def test_covers(self, coverage, assert_covers, prior, n, error, q, stratified):
        prior = np.array(prior)
        cost = (1 - error) * surprise(1 - q) + error * surprise(q / (len(prior) - 1))
        truth = prior @ surprise(prior) - cost
        bound, stderr = self.found(prior, error, q, n, 500, stratified)
        if stratified and np.ptp(prior) > 0:
            assert coverage(bound, stderr, truth) >= 0.92
            assert np.mean(stderr) > np.std(bound)
        else:
            assert_covers(bound, stderr, truth)

    def test_entropy_of_the_sample_is_too_low(self, coverage):
        prior, error, n = shares(100), 0.01, 2000
        truth = fano_of(prior, error)
        bound, _ = self.found(prior, error, error, n, 200, stratified=False)
        assert truth - np.mean(bound) == pytest.approx(99 / (2 * n), rel=0.2)
        bound, stderr = self.found(prior, error, error, n, 200, stratified=True)
        assert coverage(bound, stderr, truth) >= 0.92


def test_units_cover(assert_covers):
    """A thousand units with four values, which the label sets with an error of .3."""
    rng = np.random.default_rng(0)
    n, units = 2000, 1000
    labels = np.repeat(np.arange(4), n // 4)
    wrong = (labels[:, None] + rng.integers(1, 4, (n, units))) % 4
    level = np.where(rng.random((n, units)) < 0.3, wrong, labels[:, None])
    x = np.array([-2.0, 0.0, 0.5, 7.0])[level]
    info = readouts.UnitHistogram(bins=40, reduce=None).measure(x, labels, 4)
    truth = information_of(channel(shares(4), 0.3))
    assert_covers(info.value, info.stderr, truth)


def test_linear_readout_covers(coverage, assert_covers):
    """Two Gaussians, of which the best linear readout knows everything there is.

    A closed form for each bound: .336831 nats of the activations, and log 2 − h(e) of
    the predicted class, e = Φ(−1).
    """
    readout, rng = readouts.LinearReadout(), np.random.default_rng(0)
    labels, n = np.arange(2000) % 2, 2000
    found = []
    for _ in range(400):
        x = rng.normal(size=(n, 2))
        x[:, 0] += 2 * labels - 1
        info = readout.measure(x.astype("float32"), labels, 2)
        found.append((info.value, info.stderr, info.bound, info.bound_stderr))
    value, stderr, bound, bound_stderr = np.array(found).T
    counted = information_of(channel(shares(2), stats.norm.cdf(-1)))
    assert_covers(value, stderr, counted)
    # It is fitted to a half each time: a few parameters over 2n are lost.
    assert 0.92 <= coverage(bound, bound_stderr, 0.336831) <= 0.98
    assert 0 < 0.336831 - np.mean(bound) < 10 / n


class TestNull:
    @pytest.mark.parametrize(("rows", "columns", "n"), [(3, 4, 500), (4, 7, 1000)])
    def test_shuffling_gives_the_null_distribution(self, rows, columns, n):
        """2nI is chi-squared, and `null_level` the mean of I."""
        rng = np.random.default_rng(0)
        a, b = rng.integers(0, rows, n), rng.integers(0, columns, n)
        counts = np.stack(
            [
                information.contingency(rng.permutation(a), b, rows, columns)
                for _ in range(2000)
            ]
        )
        raw = information.mutual_information(counts)
        freedom = (rows - 1) * (columns - 1)
        assert stats.kstest(2 * n * raw, "chi2", (freedom,)).statistic < 0.05
        assert np.mean(raw) == pytest.approx(information.null_level(counts[0]), rel=0.1)
        corrected = information.mutual_information(counts, "miller_madow")
        assert np.mean(corrected) < 0.7 * np.mean(raw)

    @settings(max_examples=50, derandomize=True)
    @given(
        hnp.arrays(
            "int64",
            st.tuples(st.integers(2, 6), st.integers(2, 6)),
            elements=st.integers(5, 200),
        )
    )
    def test_is_the_expectation_over_all_shuffles(self, table):
        """Exactly known by scikit-learn; here from five samples in each cell."""
        exact = expected_mutual_information(table, table.sum())
        assert information.null_level(table) == pytest.approx(exact, rel=0.2)

    @pytest.mark.parametrize("classes", [2, 10])
    def test_readouts_of_shuffled_labels(self, classes):
        rng = np.random.default_rng(0)
        labels = rng.integers(0, classes, 2000)
        x = np.eye(classes)[labels] + 0.3 * rng.normal(size=(2000, classes))
        p = np.exp(3 * x) / np.exp(3 * x).sum(axis=1, keepdims=True)
        measures = (
            lambda y: readouts.Predictions().measure(p, y, classes),
            lambda y: readouts.LinearReadout().measure(x, y, classes),
            lambda y: readouts.UnitHistogram(bins=8).measure(x, y, classes),
        )
        for measure in measures:
            assert measure(labels).accessible > 0.1
            shuffled = [measure(rng.permutation(labels)) for _ in range(20)]
            read = [info.accessible for info in shuffled]
            level = np.mean([info.null for info in shuffled])
            # Half of the corrected ones are cut off at 0.
            assert np.mean(read) < max(0.5 * level, 1e-3)
            assert max(read) < max(2 * level, 0.01)


# ------------------------------------------------ invariances and data processing

TABLES = hnp.arrays(
    "int64",
    st.tuples(st.integers(1, 8), st.integers(1, 8)),
    elements=st.one_of(st.just(0), st.integers(0, 5), st.integers(0, 10_000)),
)


def measures_of(table):
    corrections = (None, "miller_madow", "grassberger")
    return [
        *(float(information.mutual_information(table, c)) for c in corrections),
        float(information.null_level(table)),
        float(information.standard_error(table)),
    ]


@settings(max_examples=100, derandomize=True)
@given(TABLES, st.data())
def test_names_do_not_matter(table, data):
    rows = data.draw(st.permutations(range(table.shape[0])))
    columns = data.draw(st.permutations(range(table.shape[1])))
    expected = measures_of(table)
    for other in (table[rows][:, columns], table.T, np.pad(table, ((0, 2), (1, 0)))):
        np.testing.assert_allclose(measures_of(other), expected, atol=1e-9)


@settings(max_examples=100, derandomize=True)
@given(TABLES, st.integers(2, 1000))
def test_repetition_only_makes_it_surer(table, times):
    """What is counted stays; errors shrink as of more samples, bias as of so many."""
    raw, corrected, _, null, stderr = measures_of(table)
    again = measures_of(times * table)
    np.testing.assert_allclose(again[0], raw, atol=1e-9)
    np.testing.assert_allclose(again[4], stderr / np.sqrt(times), atol=1e-7)
    assert again[3] <= null + 1e-12
    assert abs(again[1] - raw) <= abs(corrected - raw) + 1e-9


@settings(max_examples=100, derandomize=True)
@given(TABLES, st.data())
def test_merging_loses_information(table, data):
    """The data-processing inequality, of rows, of columns and of both."""
    nats = float(information.mutual_information(table))
    merged = table
    for axis in (0, 1):
        size = table.shape[axis]
        index = st.lists(st.integers(0, size - 1), min_size=size, max_size=size)
        one_hot = np.eye(size, dtype=int)[data.draw(index)]
        whole = merged.sum(axis=1 - axis)
        merged = one_hot.T @ merged if axis == 0 else merged @ one_hot
        coarse = float(information.mutual_information(merged))
        assert coarse <= nats + 1e-9
        nats = coarse
        entropy = information.entropy(merged.sum(axis=1 - axis))
        assert entropy <= information.entropy(whole) + 1e-9


@settings(max_examples=50, derandomize=True)
@given(st.integers(0, 300), st.integers(1, 9), st.integers(1, 9), st.data())
def test_order_of_the_samples_does_not_matter(n, rows, columns, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    a, b = rng.integers(0, rows, n), rng.integers(0, columns, n)
    order = rng.permutation(n)
    table = information.contingency(a, b, rows, columns)
    other = information.contingency(a[order], b[order], rows, columns)
    np.testing.assert_array_equal(other, table)
    if n > 0:
        expected = pytest.approx(mutual_info_score(a, b), abs=1e-9)
        assert information.mutual_information(table) == expected


class TestReadoutsOfUnits:
    def layer(self, seed):
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, 6, 1500)
        x = labels[:, None] + rng.normal(scale=2.0, size=(1500, 8))
        x[:, 1] = np.maximum(x[:, 1], 0.0)
        x[:, 2] = np.round(x[:, 2])
        x[::7, 3] = np.nan
        return x.astype("float32"), labels

    @pytest.mark.parametrize("seed", range(5))
    def test_fewer_bins_and_classes_say_less(self, seed):
        """Half as many bins join two each, since both lie at quantiles."""
        x, labels = self.layer(seed)
        before = None
        for bins in (64, 32, 16, 8, 4, 2):
            readout = readouts.UnitHistogram(bins, reduce=None)
            raw = readout.measure(x, labels, 6).raw
            coarse = readout.measure(x, labels // 2, 3).raw
            assert np.all(coarse <= raw + 1e-9)
            assert np.any(coarse < raw - 1e-3)
            assert before is None or np.all(raw <= before + 1e-9)
            before = raw

    def test_units_of_measurement_do_not_matter(self):
        x, labels = self.layer(0)
        readout = readouts.UnitHistogram(reduce=None)
        expected = readout.measure(x, labels, 6)
        for scale in (2.0**-60, 2.0**60):
            assert_same(readout.measure(scale * x, labels, 6), expected)

    @pytest.mark.parametrize("seed", range(3))
    def test_merged_outputs_say_less(self, seed):
        """A network that names only the pair of classes, of its own prediction."""
        x, labels = self.layer(seed)
        outputs = np.nan_to_num(x[:, :6])
        whole = readouts.Predictions(from_logits=True).measure(outputs, labels, 6)
        pair = np.eye(3)[outputs.argmax(axis=1) // 2]
        merged = readouts.Predictions().measure(pair, labels // 2, 3)
        assert merged.raw < whole.raw
        assert merged.entropy < whole.entropy


def assert_same(info, expected):
    for got, want in zip(info[:5], expected[:5], strict=True):
        np.testing.assert_allclose(got, want, atol=1e-9)


# ------------------------------------ other implementations, where they are there


def drawn(n=1000, classes=5, error=0.4):
    rng = np.random.default_rng(0)
    labels = rng.choice(classes, n, p=shares(classes, SKEWED))
    wrong = (labels + rng.integers(1, classes, n)) % classes
    return np.where(rng.random(n) < error, wrong, labels), labels


def test_equals_infomeasure():
    infomeasure = pytest.importorskip("infomeasure")
    a, b = drawn()
    table = information.contingency(a, b, 5, 5)
    # Its "grassberger" is the formula of 1988, ours that of 2003.
    for theirs, ours in (("discrete", None), ("miller_madow", "miller_madow")):
        nats = infomeasure.mutual_information(a, b, approach=theirs, base="e")
        found = information.mutual_information(table, ours)
        assert found == pytest.approx(nats, abs=1e-9)
        nats = infomeasure.entropy(b, approach=theirs, base="e")
        found = information.entropy(table.sum(axis=0), ours)
        assert found == pytest.approx(nats, abs=1e-9)


def test_equals_ennemi():
    ennemi = pytest.importorskip("ennemi")
    a, b = drawn()
    nats = ennemi.estimate_mi(a, b, discrete_x=True, discrete_y=True)
    table = information.contingency(a, b, 5, 5)
    assert information.mutual_information(table) == pytest.approx(
        float(np.squeeze(nats)), abs=1e-9
    )
    found = information.entropy(table.sum(axis=0))
    nats = float(np.squeeze(ennemi.estimate_entropy(b, discrete=True)))
    assert found == pytest.approx(nats, abs=1e-9)


@pytest.mark.parametrize("mu", [0.5, 1.0, 2.0])
def test_reads_what_nearest_neighbours_do(mu):
    """Ross' estimator (2014) knows nothing of Gaussians, and sees the same in them."""
    ennemi = pytest.importorskip("ennemi")
    rng = np.random.default_rng(0)
    labels = np.arange(4000) % 2
    x = mu * (2 * labels - 1) + rng.normal(size=4000)
    nats = float(np.squeeze(ennemi.estimate_mi(labels, x, discrete_y=True, k=20)))
    info = readouts.LinearReadout().measure(x[:, None], labels, 2)
    assert info.bound == pytest.approx(nats, abs=0.03)
    binned = readouts.UnitHistogram(bins=32).measure(x[:, None], labels, 2)
    assert binned.value == pytest.approx(nats, abs=0.03)
