import keras
import numpy as np
import pytest
import tensorflow as tf
from sklearn.metrics import mutual_info_score

from keras_milr import readouts
from keras_milr.readouts import units
from tests import reference

UnitHistogram = readouts.UnitHistogram


def layer(n=3000, classes=5, seed=0):
    """Units of many kinds, most of which know something of the labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    signal = labels + rng.normal(size=n)
    x = np.stack(
        [
            signal,
            np.maximum(signal - 2.0, 0.0),
            np.round(signal),
            np.sign(signal - 1.0),
            1e20 * signal,
            1e-20 * signal,
            signal + 1e4,
            np.where(rng.random(n) < 0.1, np.nan, signal),
            np.where(signal > 3.0, np.inf, np.where(signal < 0.0, -np.inf, signal)),
            np.where(labels == 0, signal, 0.0),
            np.full(n, 0.3),
            np.zeros(n),
            np.full(n, np.nan),
            rng.normal(size=n),
        ],
        axis=1,
    )
    return x.astype("float32"), labels


# Of some versions of scikit-learn.
@pytest.mark.filterwarnings("ignore:The number of unique classes is greater than 50%")
@pytest.mark.parametrize("bins", [2, 3, 16, 100])
@pytest.mark.parametrize("n", [2048, 201, 7])
def test_equals_independent_references(bins, n):
    x, labels = layer(n)
    info = UnitHistogram(bins, reduce=None).measure(x, labels, 5)
    assert info.value.shape == (x.shape[1],)
    for j, unit in enumerate(x.T):
        ids = reference.bin_ids(unit, bins)
        table = reference.contingency(ids, labels, bins + 2, 5)
        raw = mutual_info_score(ids, labels)
        value = reference.mutual_information(table, "miller_madow")
        freedom = (len(np.unique(ids)) - 1) * (len(np.unique(labels)) - 1)
        entropies = reference.entropy(table.sum(0)), reference.entropy(table.sum(1))
        assert info.raw[j] == pytest.approx(raw, abs=1e-9)
        assert info.value[j] == pytest.approx(value, abs=1e-9)
        assert info.stderr[j] == pytest.approx(
            reference.standard_error(table), abs=1e-9
        )
        assert info.null[j] == pytest.approx(min(freedom / (2 * n), *entropies))
    assert info.entropy == pytest.approx(reference.entropy(np.bincount(labels)))


def test_edges_of_a_sample_read_as_much():
    """Beyond 2,048 samples the edges lie at the quantiles of so many of them."""
    x, labels = layer(n=20_000)
    info = UnitHistogram(reduce=None).measure(x, labels, 5)
    edges = units.edges(keras.ops.convert_to_tensor(x), np.ones(len(x)), 16)
    for j, unit in enumerate(x.T):
        cut = reference.bin_ids(unit, 16, edges[:, j])
        assert info.raw[j] == pytest.approx(mutual_info_score(cut, labels), abs=1e-9)
        ids = reference.bin_ids(unit, 16)
        table = reference.contingency(ids, labels, 18, 5)
        value = reference.mutual_information(table, "miller_madow")
        assert info.value[j] == pytest.approx(value, abs=0.01)


def test_reductions():
    x, labels = layer()
    each = UnitHistogram(reduce=None).measure(x, labels, 5)
    mean = UnitHistogram().measure(x, labels, 5)
    best = UnitHistogram(reduce="max").measure(x, labels, 5)
    for field in ("value", "raw", "null", "stderr"):
        values = getattr(each, field)
        assert getattr(mean, field) == pytest.approx(values.mean())
        assert getattr(best, field) == values[each.value.argmax()]
        assert isinstance(getattr(mean, field), float)
    assert mean.value < best.value == each.value.max()
    assert mean.entropy == best.entropy == each.entropy


def test_unit_by_unit_information_has_every_property():
    x, labels = layer()
    info = UnitHistogram(reduce=None).measure(x, labels, 5)
    np.testing.assert_array_equal(info.accessible, info.value)
    np.testing.assert_array_equal(info.noise, 0.5 * info.stderr)


@pytest.mark.parametrize("value", [0.0, 0.1, -7.0, 1e30, np.nan, np.inf])
def test_constant_units_say_nothing(value):
    labels = np.arange(999) % 3
    info = UnitHistogram().measure(np.full((999, 4), value), labels, 3)
    assert info.value == info.raw == 0


def test_ties_are_never_split():
    # Sorted by label: bins that cut ties by rank would read all of it.
    labels = np.repeat(np.arange(4), 250)
    x = np.ones((1000, 1))
    x[::5] = 2.0
    info = UnitHistogram(bins=50).measure(x, labels, 4)
    assert info.raw == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("bins", [4, 5, 16, 300])
def test_more_bins_than_values(bins):
    rng = np.random.default_rng(0)
    level = np.repeat(np.arange(4), 50)
    labels = np.where(rng.random(200) < 0.5, rng.integers(0, 2, 200), level > 1)
    x = np.array([-1.0, 0.5, 2.0, 9.0])[level]
    info = UnitHistogram(bins).measure(x, labels, 2)
    assert info.raw == pytest.approx(mutual_info_score(level, labels), abs=1e-9)


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_zeros_have_a_bin(zero):
    rng = np.random.default_rng(0)
    labels = np.arange(1000) % 2
    # Between the others, which two bins at the median could not tell from zero.
    x = np.where(labels == 0, zero, rng.choice([-1.0, 1.0], 1000))
    info = UnitHistogram(bins=2).measure(x, labels, 2)
    assert info.raw == pytest.approx(np.log(2))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_has_another(bad):
    labels = np.arange(1000) % 3
    x = np.array([bad, 0.0, 3.0])[labels]
    info = UnitHistogram(bins=2).measure(x, labels, 3)
    assert info.raw == pytest.approx(np.log(3), abs=1e-5)


@pytest.mark.parametrize(("classes", "bins"), [(2, 4), (2, 32), (4, 48), (10, 80)])
def test_closed_form(classes, bins):
    """Y uniform on K values, T = Y + U(0, 2), of which 2 K bins miss nothing.

    Between whole numbers the label is certain or one of two, and the mass is 1/K, at
    both ends 1/2K. On an even grid instead of a sample the bins meet the numbers.
    """
    each = 2000 // classes
    grid = np.tile(2.0 * (np.arange(each) + 0.5) / each, classes)
    labels = np.repeat(np.arange(classes), each)
    exact = np.log(classes) - (classes - 1) / classes * np.log(2)
    info = UnitHistogram(bins).measure(1.0 + labels + grid, labels, classes)
    assert info.raw == pytest.approx(exact, abs=1e-5)


@pytest.mark.parametrize("classes", [2, 4, 10])
def test_closed_form_sampled(classes):
    """The same with bins that lie across the numbers, on a sample."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, 20_000)
    x = 1.0 + labels + rng.uniform(0.0, 2.0, 20_000)
    exact = np.log(classes) - (classes - 1) / classes * np.log(2)
    info = UnitHistogram(bins=57).measure(x, labels, classes)
    assert exact - 0.05 < info.value < exact + 3 * info.stderr
    coarse = UnitHistogram(bins=7).measure(x, labels, classes)
    assert coarse.value < info.value


def test_shuffled_labels_have_no_information():
    x, labels = layer()
    labels = np.random.default_rng(1).permutation(labels)
    info = UnitHistogram(reduce=None).measure(x, labels, 5)
    # A chi-squared variable of (16 + 2 - 1) * 4 degrees of freedom, in nats.
    np.testing.assert_array_less(info.value, 4 * np.sqrt(2 * 68) / 6000)
    assert info.raw[0] == pytest.approx(info.null[0], rel=0.5)


def test_order_and_scale_do_not_matter():
    x, labels = layer(n=2000)
    expected = UnitHistogram(reduce=None).measure(x, labels, 5)
    order = np.random.default_rng(1).permutation(len(labels))
    for other, ids in ((x[order], labels[order]), (3.0 * x, labels)):
        info = UnitHistogram(reduce=None).measure(other, ids, 5)
        np.testing.assert_allclose(info.value, expected.value, atol=1e-9)


def test_names_of_the_classes_do_not_matter():
    x, labels = layer()
    expected = UnitHistogram(reduce=None).measure(x, labels, 5)
    renamed = UnitHistogram(reduce=None).measure(
        x, np.array([6, 0, 2, 5, 1])[labels], 7
    )
    np.testing.assert_allclose(renamed.value, expected.value, atol=1e-9)


def test_space_is_averaged():
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(500, 6, 5, 3)), rng.integers(0, 3, 500)
    image = UnitHistogram().measure(x, labels, 3)
    means = UnitHistogram().measure(x.astype("float32").mean(axis=(1, 2)), labels, 3)
    assert image.value == pytest.approx(means.value, abs=5e-3)


def test_lists_end_side_by_side():
    x, labels = layer()
    parts = UnitHistogram(reduce=None).measure([x[:, :3], x[:, 3], x[:, 4:]], labels, 5)
    whole = UnitHistogram(reduce=None).measure(x, labels, 5)
    np.testing.assert_array_equal(parts.value, whole.value)


class TestWeights:
    def test_rows_of_weight_zero_change_nothing(self):
        x, labels = layer()
        expected = UnitHistogram(reduce=None).measure(x, labels, 5)
        rng = np.random.default_rng(1)
        weight = np.ones(4000)
        weight[rng.choice(4000, 1000, replace=False)] = 0.0
        mixed, ids = np.full((4000, x.shape[1]), 50.0), np.zeros(4000, int)
        mixed[weight > 0], ids[weight > 0] = x, labels
        mixed[weight == 0] += rng.normal(size=(1000, 1))
        info = UnitHistogram(reduce=None).read(
            mixed.astype("float32"), ids, 5, sample_weight=weight
        )
        for got, want in zip(info[:5], expected[:5], strict=True):
            np.testing.assert_allclose(got, want, atol=1e-9)

    def test_weights_are_counts(self):
        x, labels = layer(n=800)  # 16 bins divide it: repeating moves no edge
        info = UnitHistogram(reduce=None).read(x[:, :1], labels, 5, np.full(800, 2.0))
        repeated = UnitHistogram(reduce=None).measure(
            np.repeat(x[:, :1], 2, axis=0), np.repeat(labels, 2), 5
        )
        for got, want in zip(info[:5], repeated[:5], strict=True):
            np.testing.assert_allclose(got, want, atol=1e-9)

    def test_of_nothing(self):
        x, labels = layer(n=50)
        info = UnitHistogram().read(x, labels, 5, np.zeros(50))
        assert info.value == info.raw == info.entropy == info.stderr == 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_counted_in_float32(dtype):
    x, labels = layer(n=10_000)
    half = keras.ops.cast(x[:, :4], dtype)
    info = UnitHistogram(reduce=None).measure(half, labels, 5)
    same = UnitHistogram(reduce=None).measure(
        keras.ops.cast(half, "float32"), labels, 5
    )
    np.testing.assert_array_equal(info.value, same.value)
    assert info.entropy == pytest.approx(reference.entropy(np.bincount(labels)))
    # Coarse values tie: little is lost.
    whole = UnitHistogram(reduce=None).measure(x[:, :4], labels, 5)
    np.testing.assert_allclose(info.value, whole.value, atol=0.02)


@pytest.mark.backends("tensorflow", reason="counts the traces of a tf.function")
def test_is_traced_once_for_a_shape():
    readout = UnitHistogram(bins=9)
    compiled = units._compiled()
    before = compiled.experimental_get_tracing_count()
    for seed in range(4):
        x, labels = layer(n=333, seed=seed)
        x = keras.ops.convert_to_tensor(x)
        readout.read(x, labels, 5)
        readout.read(x, labels, 5, np.full(333, 2.0 + seed))
    # With weights and without.
    assert compiled.experimental_get_tracing_count() == before + 2


@pytest.mark.backends("tensorflow", reason="with and without XLA")
@pytest.mark.parametrize("jit_compile", [False, True])
def test_features_compile(jit_compile):
    x = np.random.default_rng(0).normal(size=(8, 6, 5, 3)).astype("float32")
    compiled = tf.function(UnitHistogram().features, jit_compile=jit_compile)
    np.testing.assert_allclose(compiled(x), x.mean(axis=(1, 2)), atol=1e-6)


@pytest.mark.parametrize("reduce", ["mean", "max", None])
def test_serialises(reduce):
    config = keras.saving.serialize_keras_object(UnitHistogram(5, reduce))
    assert config["registered_name"] == "keras_milr>UnitHistogram"
    again = keras.saving.deserialize_keras_object(config)
    assert (again.bins, again.reduce) == (5, reduce)


def test_bad_input():
    x, labels = layer(n=30)
    with pytest.raises(ValueError, match="`bins` must be an integer, at least 2"):
        UnitHistogram(bins=1)
    with pytest.raises(TypeError, match="`bins` must be an integer, at least 2"):
        UnitHistogram(bins=None)
    with pytest.raises(ValueError, match=r"`reduce` must be one of .*'sum'"):
        UnitHistogram(reduce="sum")
    with pytest.raises(ValueError, match="`reduce` must be one of"):
        UnitHistogram(reduce=np.array(["mean", "max"]))
    readout = UnitHistogram()
    with pytest.raises(ValueError, match=r"whole numbers in \[0, 3\)"):
        readout.measure(x, labels, 3)
    with pytest.raises(ValueError, match=r"same length.* 30 and 29"):
        readout.measure(x, labels[1:], 5)
    with pytest.raises(ValueError, match=r"`features` must have shape \(n, features\)"):
        readout.read(x[:, 0], labels, 5)


def test_bins_without_end():
    """More than there are samples cut no finer, and are not waited for."""
    x, labels = layer(n=40)
    enough = UnitHistogram(bins=40, reduce=None).measure(x, labels, 5)
    for bins in (41, 10**9, 10**30):
        info = UnitHistogram(bins, reduce=None).measure(x, labels, 5)
        np.testing.assert_array_equal(info.value, enough.value)
    single = UnitHistogram(bins=16).measure(x[:1], labels[:1], 5)
    assert single.value == single.entropy == 0


def test_tables_beyond_the_range_of_int32():
    """Cells would be numbered wrongly, and the wrong ones counted."""
    x = np.zeros((2, 30_000), "float32")
    with pytest.raises(ValueError, match="`features` must have fewer units"):
        UnitHistogram().measure(x, [0, 1], 40_000)
