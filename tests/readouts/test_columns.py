import keras
import numpy as np
import pytest
from sklearn.metrics import log_loss, mutual_info_score

from keras_milr import information, readouts, targets
from keras_milr.readouts import columns
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


class TestAllUnitsAtOnce:
    """The tables of all units are read together, not one after the other."""

    def state(self, kind, n, improper=False, units=23):
        """The readout, its state, and the number of bins of each unit."""
        rng = np.random.default_rng(n)
        share = rng.uniform(0, 1, units)
        if kind == "continuous":
            labels = rng.normal(size=(n, units))
            labels[:, ::3] = rng.integers(0, 3, labels[:, ::3].shape)
            labels[0, ::3] = 3
        else:
            labels = (rng.random((n, units)) < share).astype("int32")
        outputs = labels + share * rng.normal(size=(n, units))
        if kind == "multi_label" and not improper:
            outputs = 1 / (1 + np.exp(1 - 2 * outputs))
        outputs[rng.random((n, units)) < 0.02] = np.nan
        outputs[:, 2] = np.nan
        target = targets.Target(kind, units)
        target, _, ids, outputs = settled(labels, outputs, target)
        if target.edges is None:
            bins = np.full(len(target.columns), 2)
        else:
            bins = np.array([len(edges) + 1 for edges in target.edges])
        readout = readouts.Columns(target)
        weight = rng.integers(0, 4, n).astype("float32") + 0.25
        state = readout.init(target.num_classes)
        state = readout.update(state, outputs, ids, weight)
        state = {name: keras.ops.convert_to_numpy(a) for name, a in state.items()}
        return readout, target, state, bins

    @pytest.mark.parametrize("scale", [1.0, 0.03])
    @pytest.mark.parametrize("n", [60, 900])
    @pytest.mark.parametrize(
        ("kind", "improper"),
        [("continuous", False), ("multi_label", False), ("multi_label", True)],
    )
    def test_equals_a_loop(self, kind, improper, n, scale):
        readout, target, state, bins = self.state(kind, n, improper)
        parts = readout.parts(state, scale)
        assert list(parts) == list(target.columns)
        if kind == "continuous" and n == 900:
            assert len(set(bins)) > 1
        for i, part in enumerate(parts.values()):
            expected = reference.column_information(state, i, bins[i], scale)
            if target.spread is not None:
                expected["variation"] /= np.float32(target.spread[i])
            if not np.isfinite(expected["variation"]):
                expected["variation"] = np.nan
            assert part.estimator == expected.pop("estimator")
            for name, value in expected.items():
                found = getattr(part, name)
                assert type(found) is float
                assert found == pytest.approx(value, rel=0, abs=1e-12, nan_ok=True), (
                    name
                )

    def test_each_estimator_is_among_them(self):
        found = set()
        for kind, improper in (("multi_label", False), ("multi_label", True)):
            for scale in (1.0, 0.03):
                readout, _, state, _ = self.state(kind, 60, improper)
                found |= {p.estimator for p in readout.parts(state, scale).values()}
        assert found == {"counts", "bound", "fano"}

    @pytest.mark.parametrize("kind", ["continuous", "multi_label"])
    def test_in_blocks(self, monkeypatch, kind):
        readout, _, state, _ = self.state(kind, 300)
        whole = readout.parts(state)
        monkeypatch.setattr(columns, "_AT_ONCE", 5)
        parts = readout.parts(state)
        assert list(parts) == list(whole)
        for part, expected in zip(parts.values(), whole.values(), strict=True):
            np.testing.assert_allclose(part[:-1], expected[:-1], rtol=0, atol=1e-12)

    @pytest.mark.parametrize("kind", ["continuous", "multi_label"])
    def test_takes_as_many_steps_for_many(self, monkeypatch, kind):
        steps = {}
        for units in (5, 200):
            readout, _, state, _ = self.state(kind, 100, units=units)
            calls = []
            for name in ("entropy", "mutual_information", "standard_error"):
                function = getattr(information, name)

                def counted(*args, function=function, calls=calls):
                    calls.append(function)
                    return function(*args)

                monkeypatch.setattr(information, name, counted)
            readout.parts(state)
            steps[units] = len(calls)
            monkeypatch.undo()
        assert steps[200] == steps[5] > 0
