import keras
import numpy as np
import pytest
from sklearn.metrics import log_loss, mutual_info_score

from keras_milr import readouts, targets
from tests import reference
from tests.backends import compiled


def multi_label(n=600, units=5, logits=False, seed=0):
    """Labels, outputs that know something of them, and the target without unit 3."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((n, units)) < 0.3).astype("int32")
    labels[:, 3] = 1
    outputs = rng.normal(size=(n, units)) + 2.0 * labels - 1.0
    outputs = outputs if logits else 1 / (1 + np.exp(-outputs))
    target = targets.Target("multi_label", units, from_logits=logits)
    return settled(labels, outputs, target)


def continuous(n=600, units=3, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.normal(size=(n, units))
    labels[:, 1] = np.maximum(labels[:, 1].round(), 0)  # Few values, many ties.
    outputs = labels + rng.normal(size=(n, units))
    target = targets.Target("continuous", units)
    return settled(labels, outputs, target)


def settled(labels, outputs, target):
    counted = np.ones(len(labels), bool)
    target, ids = targets.settled(target, labels, counted, len(labels))
    return target, labels, ids, outputs.astype("float32")


def read(target, outputs, ids, weight=None, batch=None):
    readout = readouts.Columns(target)
    update = compiled(readout.update) if batch else readout.update
    state = readout.init(target.num_classes)
    weight = np.ones(len(ids), "float32") if weight is None else weight
    for i in range(0, len(ids), batch or len(ids)):
        rows = slice(i, i + (batch or len(ids)))
        parts = outputs[rows], ids[rows], weight[rows]
        if batch:
            parts = map(keras.ops.convert_to_tensor, parts)
        state = update(state, *parts)
    return readout.finish(state), readout.parts(state)


@pytest.mark.parametrize("logits", [False, True])
def test_labels_equal_scikit_learn(logits):
    target, labels, ids, outputs = multi_label(logits=logits)
    info, parts = read(target, outputs, ids)
    assert list(parts) == [0, 1, 2, 4]
    p = 1 / (1 + np.exp(-outputs.astype("float64"))) if logits else outputs
    for unit, part in parts.items():
        yes, q = labels[:, unit], p[:, unit].astype("float64")
        assert part.raw == pytest.approx(mutual_info_score(yes, q > 0.5), abs=1e-6)
        assert part.cross_entropy == pytest.approx(log_loss(yes, q), abs=1e-5)
        bound, error = reference.h_minus_ce(np.stack([1 - q, q], axis=1), yes)
        assert part.bound == pytest.approx(bound, abs=1e-5)
        assert part.bound_stderr == pytest.approx(error, abs=1e-5)
    for field in info._fields[:-1]:
        each = [getattr(part, field) for part in parts.values()]
        assert getattr(info, field) == pytest.approx(np.mean(each), abs=1e-9), field


def test_numbers_equal_scikit_learn():
    target, labels, ids, outputs = continuous()
    info, parts = read(target, outputs, ids)
    for unit, part in parts.items():
        edges = reference.quantile_edges(labels[:, unit], reference.number_of_bins(600))
        known, said = (
            [reference.bin_of(v, edges) for v in values[:, unit]]
            for values in (labels, outputs)
        )
        assert part.raw == pytest.approx(mutual_info_score(known, said), abs=1e-6)
        table = reference.contingency(said, known, len(edges) + 1, len(edges) + 1)
        assert part.value == pytest.approx(
            reference.mutual_information(table, "miller_madow"), abs=1e-6
        )
        assert part.variation == pytest.approx(
            np.ptp(outputs[:, unit]) / labels[:, unit].std(), rel=1e-5
        )
    assert info.raw == pytest.approx(np.mean([part.raw for part in parts.values()]))
    assert np.isnan(info.bound)
    assert np.isnan(info.cross_entropy)


@pytest.mark.parametrize("make", [multi_label, continuous])
def test_streaming_and_weights(make):
    target, _, ids, outputs = make()
    whole, _ = read(target, outputs, ids)
    parts, _ = read(target, outputs, ids, batch=150)
    np.testing.assert_allclose(parts[:-1], whole[:-1], atol=1e-5)
    weight = np.random.default_rng(1).integers(0, 3, len(ids)).astype("float32")
    repeated = np.repeat(np.arange(len(ids)), weight.astype(int))
    weighted, _ = read(target, outputs, ids, weight)
    expected, _ = read(target, outputs[repeated], ids[repeated])
    assert weighted.repeated == 0
    assert expected.repeated == pytest.approx(1 - np.sum(weight > 0) / np.sum(weight))
    expected = expected._replace(repeated=0.0)
    np.testing.assert_allclose(weighted[:-1], expected[:-1], atol=1e-5)


@pytest.mark.parametrize("make", [multi_label, continuous])
def test_what_is_not_finite_is_no_prediction(make):
    target, _, ids, outputs = make()
    outputs[:100, 0] = np.nan
    _, parts = read(target, outputs, ids)
    edges = [0.5] if target.edges is None else target.edges[0]
    said = [reference.bin_of(v, edges) for v in outputs[:, 0]]
    said = np.where(np.isnan(outputs[:, 0]), -1, said)
    assert parts[0].raw == pytest.approx(mutual_info_score(ids[:, 0], said), abs=1e-6)
    # The other units know nothing of that.
    whole = read(target, np.nan_to_num(outputs), ids)[1]
    np.testing.assert_array_equal(parts[2][:-1], whole[2][:-1])


def test_constant_outputs_have_no_variation():
    for make in (multi_label, continuous):
        target, _, ids, outputs = make()
        info, _ = read(target, np.repeat(outputs[:1], len(ids), axis=0), ids)
        assert info.variation == 0
        assert info.raw == pytest.approx(0, abs=1e-6)
