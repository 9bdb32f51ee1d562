import math

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import mutual_info_score
from sklearn.metrics.cluster import expected_mutual_information

from keras_milr import backend, information
from tests import reference
from tests.backends import compiled

CORRECTIONS = [None, "miller_madow", "grassberger"]

tables = hnp.arrays(
    "int64",
    st.tuples(st.integers(1, 12), st.integers(1, 12)),
    elements=st.one_of(st.just(0), st.integers(0, 5), st.integers(0, 10_000)),
)


def in_graph(function, counts, *args):
    """`function` of a tensor, compiled."""
    counts = keras.ops.convert_to_tensor(counts, "float32")
    found = compiled(lambda c: function(c, *args))(counts)
    return keras.ops.convert_to_numpy(found)


def in_graph_contingency(a, b, num_a, num_b, weight):
    tensors = [
        keras.ops.convert_to_tensor(np.asarray(v), dtype)
        for v, dtype in ((a, "int32"), (b, "int32"), (weight, "float32"))
    ]
    function = compiled(lambda a, b, w: information.contingency(a, b, num_a, num_b, w))
    return keras.ops.convert_to_numpy(function(*tensors))


def test_a_share_that_float32_rounds_to_nothing():
    table = np.array([[1e20, 0.0], [0.0, 1e-30]])
    tensor = keras.ops.convert_to_tensor(table, "float32")
    for function in (information.mutual_information, information.standard_error):
        assert function(table) == pytest.approx(0.0, abs=1e-20)
        for compile_ in (compiled, backend.jit):  # XLA makes no NaN of it.
            found = keras.ops.convert_to_numpy(compile_(function)(tensor))
            assert found == pytest.approx(0.0, abs=1e-20)


def symmetric_channel(classes, error, n, rng):
    labels = rng.integers(0, classes, n)
    wrong = (labels + rng.integers(1, classes, n)) % classes
    return np.where(rng.random(n) < error, wrong, labels), labels


@settings(max_examples=300)
@given(tables)
def test_mutual_information_is_scikit_learns(table):
    expected = mutual_info_score(None, None, contingency=table) if table.any() else 0.0
    assert information.mutual_information(table) == pytest.approx(expected, abs=1e-9)


@settings(max_examples=100)
@given(tables, st.sampled_from(CORRECTIONS))
def test_corrections_equal_the_reference(table, correction):
    np.testing.assert_allclose(
        information.mutual_information(table, correction),
        reference.mutual_information(table, correction),
        atol=1e-9,
    )
    np.testing.assert_allclose(
        information.entropy(table.sum(axis=0), correction),
        reference.entropy(table.sum(axis=0), correction),
        atol=1e-9,
    )
    if table.any():
        np.testing.assert_allclose(
            information.standard_error(table),
            reference.standard_error(table),
            atol=1e-7,
        )


@pytest.mark.parametrize("correction", [None, "miller_madow"])
@pytest.mark.parametrize("n", [0, 7, 1000, 1_000_000])
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (2, 2), (11, 10), (60, 80)])
def test_in_a_compiled_graph_it_is_the_same(shape, n, correction):
    rng = np.random.default_rng(n)
    p = rng.dirichlet(np.full(shape[0] * shape[1], 0.3))
    table = rng.multinomial(n, p).reshape(shape)
    table[:, -1] = 0  # an empty column
    for function in (information.mutual_information, information.entropy):
        np.testing.assert_allclose(
            in_graph(function, table, correction),
            function(table, correction),
            atol=1e-5,
        )
    for function in (information.null_level, information.standard_error):
        np.testing.assert_allclose(
            in_graph(function, table), function(table), atol=1e-5
        )


def test_a_million_samples():
    rng = np.random.default_rng(0)
    a, b = symmetric_channel(10, 0.3, 1_000_000, rng)
    table = information.contingency(a, b, 10, 10)
    expected = mutual_info_score(a, b)
    assert information.mutual_information(table) == pytest.approx(expected, abs=1e-9)
    assert in_graph(information.mutual_information, table) == pytest.approx(
        expected, abs=1e-5
    )
    assert expected == pytest.approx(1.032553, abs=5e-3)  # the closed form


def test_leading_dimensions_are_independent_tables():
    rng = np.random.default_rng(0)
    stack = rng.integers(0, 50, (3, 4, 5, 6))
    for function in (
        information.mutual_information,
        information.null_level,
        information.standard_error,
        lambda t: information.mutual_information(t, "miller_madow"),
        lambda t: information.mutual_information(t, "grassberger"),
    ):
        together = function(stack)
        assert together.shape == (3, 4)
        assert together[1, 2] == pytest.approx(float(function(stack[1, 2])), abs=1e-12)
    assert information.entropy(stack).shape == (3, 4, 5)


def test_known_values():
    assert information.entropy([1, 1, 1, 1]) == pytest.approx(math.log(4))
    assert information.entropy([5, 0]) == 0
    assert information.entropy([0, 0]) == 0
    assert information.mutual_information(np.eye(10) * 7) == pytest.approx(math.log(10))
    assert information.mutual_information(np.ones((3, 4))) == pytest.approx(
        0, abs=1e-12
    )
    assert information.mutual_information(np.zeros((3, 4))) == 0
    # One class only: nothing to know.
    assert information.mutual_information([[3], [4]]) == 0


@given(tables, st.randoms(use_true_random=False))
@settings(max_examples=50)
def test_invariances(table, random):
    nats = float(information.mutual_information(table))
    rows = random.sample(range(table.shape[0]), table.shape[0])
    assert information.mutual_information(table[rows]) == pytest.approx(nats, abs=1e-9)
    assert information.mutual_information(table.T) == pytest.approx(nats, abs=1e-9)
    assert information.mutual_information(3 * table) == pytest.approx(nats, abs=1e-9)
    merged = (
        np.vstack([table[:1] + table[-1:], table[1:-1]]) if len(table) > 1 else table
    )
    assert information.mutual_information(merged) <= nats + 1e-9


@pytest.mark.parametrize(
    ("classes", "n", "left"),
    [
        (10, 1000, {"miller_madow": 0.5, "grassberger": 0.5}),
        (100, 10_000, {"miller_madow": 0.8, "grassberger": 0.4}),
    ],
)
def test_corrections_reduce_the_bias(classes, n, left):
    """At most the share `left` of the plug-in estimate's bias is left, 30 seeds."""
    error = 0.3
    truth = math.log(classes) + (
        error * math.log(error / (classes - 1)) + (1 - error) * math.log(1 - error)
    )
    found = {correction: [] for correction in CORRECTIONS}
    for seed in range(30):
        pair = symmetric_channel(classes, error, n, np.random.default_rng(seed))
        table = information.contingency(*pair, classes, classes)
        for correction, values in found.items():
            values.append(float(information.mutual_information(table, correction)))
    bias = {c: np.mean(values) - truth for c, values in found.items()}
    assert bias[None] > 0.9 * (classes - 1) ** 2 / (2 * n) * 0.8
    for correction, share in left.items():
        assert abs(bias[correction]) < share * bias[None]


def test_standard_error_covers():
    """Nominal 95 % intervals of the corrected value hold the truth 92–98 % of times."""
    rng = np.random.default_rng(0)
    inside, spread, stated = 0, [], []
    for _ in range(500):
        a, b = symmetric_channel(10, 0.3, 2000, rng)
        table = information.contingency(a, b, 10, 10)
        nats = float(information.mutual_information(table, "miller_madow"))
        error = float(information.standard_error(table))
        inside += abs(nats - 1.032553) < 1.96 * error
        spread.append(nats)
        stated.append(error)
    assert 0.92 <= inside / 500 <= 0.98
    assert np.mean(stated) == pytest.approx(np.std(spread), rel=0.15)


def test_null_level_is_the_expectation_under_independence():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 6, 3000), rng.integers(0, 9, 3000)
    table = information.contingency(a, b, 6, 9)
    exact = expected_mutual_information(table.astype("int64"), 3000)
    assert information.null_level(table) == pytest.approx(exact, rel=0.05)
    shuffled = [
        information.mutual_information(
            information.contingency(rng.permutation(a), b, 6, 9)
        )
        for _ in range(300)
    ]
    assert information.null_level(table) == pytest.approx(np.mean(shuffled), rel=0.1)
    # Too few samples: capped where the information is.
    assert information.null_level(np.eye(50)) <= math.log(50) + 1e-12


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("n", [0, 1, 1000])
def test_contingency_equals_the_reference(n, weighted):
    rng = np.random.default_rng(n)
    a, b = rng.integers(0, 5, n), rng.integers(0, 3, n)
    weight = rng.random(n) if weighted else None
    expected = reference.contingency(a, b, 5, 3, weight)
    np.testing.assert_allclose(information.contingency(a, b, 5, 3, weight), expected)

    weight = np.ones(n) if weight is None else weight
    found = in_graph_contingency(a, b, 5, 3, weight)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_contingency_in_a_graph_leaves_out_what_has_no_cell():
    a = [0, 1, -1, 2, 0, 1, 1]
    b = [0, 1, 0, 0, 5, 1, 1]
    weight = [1.0, 2.0, 1.0, 1.0, 1.0, np.nan, -3.0]
    found = in_graph_contingency(a, b, 2, 2, weight)
    np.testing.assert_array_equal(found, [[1, 0], [0, 2]])


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
def test_bad_counts(bad):
    table = np.array([[1.0, 2.0], [bad, 1.0]])
    for function in (
        information.mutual_information,
        information.null_level,
        information.standard_error,
        information.entropy,
    ):
        with pytest.raises(
            ValueError, match="`counts` must be finite and not negative"
        ):
            function(table)
        with pytest.raises(
            ValueError, match="`counts` must be finite and not negative"
        ):
            function(keras.ops.convert_to_tensor(table))
        assert np.isnan(in_graph(function, table)).any()


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"`correction` must be one of.*'miller'"):
        information.mutual_information(np.eye(2), "miller")
    with pytest.raises(ValueError, match="needs whole counts"):
        information.mutual_information(np.eye(2) * 0.5, "grassberger")
    with pytest.raises(ValueError, match="needs counts with a value"):
        in_graph(information.mutual_information, np.eye(2), "grassberger")
    with pytest.raises(ValueError, match="at least 2 dimension"):
        information.mutual_information([1, 2])
    with pytest.raises(ValueError, match="must hold real numbers"):
        information.entropy(["a", "b"])
    with pytest.raises(ValueError, match=r"`a` must hold ids in \[0, 2\)"):
        information.contingency([0, 2], [0, 1], 2, 2)
    with pytest.raises(ValueError, match="`b` must be a vector of integer ids"):
        information.contingency([0, 1], [0.0, 1.0], 2, 2)
    with pytest.raises(ValueError, match="same length"):
        information.contingency([0, 1], [0], 2, 2)
    with pytest.raises(ValueError, match="`sample_weight` must be finite"):
        information.contingency([0, 1], [0, 1], 2, 2, [1.0, -1.0])
    with pytest.raises(ValueError, match="`sample_weight` must have the shape"):
        information.contingency([0, 1], [0, 1], 2, 2, [1.0])
    with pytest.raises(ValueError, match="`num_a` must be an integer, at least 1"):
        information.contingency([0, 1], [0, 1], 0, 2)


def test_ragged_lists_and_absurd_options():
    with pytest.raises(ValueError, match="`counts` must be an array"):
        information.entropy([[1, 2], [3]])
    with pytest.raises(ValueError, match="`a` must be an array"):
        information.contingency([[0, 1], [0]], [0, 1], 2, 2)
    for correction in (np.ones(2), 3, ["miller_madow"]):
        with pytest.raises(ValueError, match="`correction` must be one of"):
            information.mutual_information(np.eye(2), correction)


def test_sizes_of_a_table():
    ids = np.array([0, 1])
    table = information.contingency(ids, ids, np.uint64(2), np.int8(2))
    np.testing.assert_array_equal(table, np.eye(2))
    none = np.zeros(0, "complex64")  # of no samples, whatever the type
    assert information.contingency(none, none, 2, 3).shape == (2, 3)
    for size in (2**31, 2**64, 10**400):
        with pytest.raises(ValueError, match="`num_a` and `num_b` must make fewer"):
            information.contingency(ids, ids, 2, size)
