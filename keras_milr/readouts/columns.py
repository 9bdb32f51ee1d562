"""The readout of an output whose units are questions of their own."""

import math

import keras
import numpy as np

from keras_milr import information
from keras_milr.readouts.predictions import (
    from_tables,
    h_minus_ce,
    repeated,
    scaled,
)
from keras_milr.readouts.result import Information, mean, separate

_AT_ONCE = 1024  # units, whose tables take 2 MB


class Columns:
    """Reads each unit of an output by itself: yes-or-no labels, or numbers.

    As `Predictions` for each of them. A yes is predicted above 1/2, by a logit above 0,
    and H(Y) − CE is measured too. A number falls into the bins of the targets, and
    there is no H(Y) − CE. What is read is the mean over the units, number by number,
    and `parts` has those of each.

    Args:
        target: A `targets.Target` whose questions are settled.
    """

    def __init__(self, target):
        self._continuous = target.kind == "continuous"
        self._from_logits = target.from_logits
        self._columns = np.asarray(target.columns)
        self._classes = target.num_classes
        self._bins = np.full(len(target.columns), 2)
        self._spread = np.ones(len(target.columns), "float32")
        if self._continuous:
            self._bins = np.array([len(edges) + 1 for edges in target.edges])
            self._spread = np.array(target.spread, "float32")
            self._edges = np.full((len(self._bins), self._classes - 1), np.inf)
            for row, edges in zip(self._edges, target.edges, strict=True):
                row[: len(edges)] = edges
        else:
            threshold = 0.0 if target.from_logits else 0.5
            self._edges = np.full((len(self._bins), 1), threshold)

    def init(self, num_classes: int) -> dict:
        """The state before the first batch."""
        units = len(self._columns)
        state = {
            "counts": np.zeros((units, num_classes + 1, num_classes), "float32"),
            "lowest": np.full(units, np.inf, "float32"),
            "highest": np.full(units, -np.inf, "float32"),
            "repeated": np.zeros((), "float32"),
        }
        if not self._continuous:
            state["surprise"] = np.zeros((units, 2), "float32")
            state["surprise_squared"] = np.zeros(units, "float32")
            state["improper"] = np.zeros(units, "float32")
        return state

    def update(self, state: dict, outputs, class_ids, sample_weight=None) -> dict:
        """Adds a batch. Pure; may be compiled.

        Args:
            state: What `init` or the last `update` returned.
            outputs: Tensor of shape `(n, units)`.
            class_ids: Ids of the units that are read, shape `(n, columns)`.
            sample_weight: Optional weights of shape `(n,)`.

        Returns:
            The new state.
        """
        ops = keras.ops
        ids = ops.convert_to_tensor(class_ids, "int32")
        columns = ops.convert_to_tensor(self._columns, "int32")
        outputs = ops.take(ops.cast(outputs, "float32"), columns, axis=-1)
        if sample_weight is None:
            sample_weight = ops.ones(ops.shape(outputs)[0])
        weight = ops.expand_dims(ops.cast(sample_weight, "float32"), -1)
        weight = ops.broadcast_to(weight, ops.shape(outputs))
        finite = ops.isfinite(outputs)
        counts = _counts(outputs, ids, weight, self._edges)
        seen = finite & (weight > 0)
        read = ops.sigmoid(outputs) if self._probabilities() else outputs
        low = ops.min(ops.where(seen, read, np.inf), axis=0)
        high = ops.max(ops.where(seen, read, -np.inf), axis=0)
        same = repeated(read / ops.convert_to_tensor(self._spread), weight[:, 0])
        new = {
            "counts": ops.add(state["counts"], counts),
            "lowest": ops.minimum(state["lowest"], low),
            "highest": ops.maximum(state["highest"], high),
            "repeated": ops.add(state["repeated"], same),
        }
        if not self._continuous:
            sums = self._surprise(outputs, ids, weight, finite)
            new |= {name: ops.add(state[name], value) for name, value in sums.items()}
        return new

    def finish(self, state: dict, scale: float = 1.0) -> Information:
        """The mean of the information about each unit; see `Predictions.finish`."""
        return mean(list(self.parts(state, scale).values()))

    def parts(self, state: dict, scale: float = 1.0) -> dict:
        """The `Information` about each unit that is read, by its number."""
        state = scaled(state, scale)
        counts = state["counts"]
        labels = counts.sum(axis=1)
        total = np.maximum(labels.sum(axis=1), 1e-30)
        bound = bound_stderr = cross_entropy = np.full(len(counts), np.nan)
        if not self._continuous:
            share = np.where(labels > 0, labels / total[:, None], 1.0)
            names = ("surprise", "surprise_squared", "improper")
            bound, bound_stderr, cross_entropy = h_minus_ce(
                labels, -np.log(share), *(state[name] for name in names)
            )
        seen = state["lowest"] <= state["highest"]
        variation = (state["highest"] - state["lowest"]) / self._spread
        variation = np.where(seen, variation, np.nan)
        repeats = state["repeated"] / total
        infos = []
        for start in range(0, len(counts), _AT_ONCE):
            at = slice(start, start + _AT_ONCE)
            # Of a column of fewer bins than others have, the rest is empty.
            found = from_tables(counts[at], self._bins[at], bound[at], bound_stderr[at])
            infos += separate(
                found._replace(
                    cross_entropy=cross_entropy[at],
                    variation=variation[at],
                    repeated=repeats[at],
                )
            )
        return dict(zip(self._columns.tolist(), infos, strict=True))

    def _probabilities(self):
        return self._from_logits and not self._continuous

    def _surprise(self, outputs, ids, weight, finite):
        ops = keras.ops
        yes = ids == 1
        if self._from_logits:
            log_p = ops.log_sigmoid(ops.where(yes, outputs, -outputs))
            proper = ops.ones_like(finite)
        else:
            epsilon = keras.config.epsilon()
            p = ops.where(yes, outputs, 1.0 - outputs)
            log_p = ops.log(ops.clip(p, epsilon, 1.0 - epsilon))
            proper = (outputs >= 0.0) & (outputs <= 1.0)
        surprise = ops.where(finite, -log_p, -math.log(keras.config.epsilon()))
        weighted = weight * surprise
        by_class = [ops.sum(ops.where(ids == k, weighted, 0.0), axis=0) for k in (0, 1)]
        return {
            "surprise": ops.stack(by_class, axis=-1),
            "surprise_squared": ops.sum(weighted * surprise, axis=0),
            "improper": ops.sum(ops.where(finite & ~proper, weight, 0.0), axis=0),
        }


def label_counts(outputs, class_ids, sample_weight, from_logits: bool = False):
    """The tables of (predicted, label) for each yes-or-no unit of a batch of outputs.

    Args:
        outputs: Tensor of shape `(n, units)`.
        class_ids: 0 and 1, shape `(n, units)`. Others are left out.
        sample_weight: Weights of shape `(n,)`.
        from_logits: Whether the outputs are logits.

    Returns:
        Counts of shape `(units, 3, 2)`; the last row is for what is not finite.
    """
    ops = keras.ops
    outputs = ops.cast(outputs, "float32")
    weight = ops.broadcast_to(ops.expand_dims(sample_weight, -1), ops.shape(outputs))
    edges = np.full((outputs.shape[-1], 1), 0.0 if from_logits else 0.5)
    return _counts(outputs, class_ids, weight, edges)


def _counts(outputs, class_ids, weight, edges):
    """Tables of shape `(columns, classes + 1, classes)`, from `(n, columns)` of all."""
    ops = keras.ops
    columns, classes = len(edges), edges.shape[1] + 1
    predicted = ops.zeros_like(class_ids)
    edges = ops.convert_to_tensor(edges.T.astype("float32"))
    for i in range(classes - 1):
        predicted = predicted + ops.cast(outputs > edges[i], "int32")
    predicted = ops.where(ops.isfinite(outputs), predicted, classes)
    rows = ops.arange(columns, dtype="int32") * (classes + 1) + predicted
    counts = information.counted(
        ops.reshape(rows, (-1,)),
        ops.cast(ops.reshape(class_ids, (-1,)), "int32"),
        *(columns * (classes + 1), classes),
        ops.reshape(weight, (-1,)),
    )
    return ops.reshape(counts, (columns, classes + 1, classes))
