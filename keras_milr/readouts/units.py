"""Histograms of the units of a layer."""

import functools
import math

import keras
import numpy as np

from keras_milr import backend, information
from keras_milr._arguments import check_integer
from keras_milr.readouts import features as feature
from keras_milr.readouts.layer import LayerReadout
from keras_milr.readouts.result import Information

_REDUCTIONS = ("mean", "max", None)
_ROWS = 2048  # from which the edges of bins are taken


@keras.saving.register_keras_serializable(package="keras_milr")
class UnitHistogram(LayerReadout):
    """Reads the units of a layer one by one: binned activation against the label.

    The classical estimate. The activations of each unit are cut in `bins` bins of as
    equal numbers of samples as ties allow, judged by at most 2,048 of the samples;
    equal activations are never separated. Exact zeros, which a ReLU has many of, have
    a bin of their own, and activations that are not finite have another. The mutual
    information of (bin, label) is corrected by Miller and Madow's term. Axes between
    samples and channels, space and time, are averaged.

    It is a diagnostic: what single units say, one at a time. The mean over units may
    fall while the layer learns, and the sum would count the same information many times
    over. To compare layers, or to set rates, take `LinearReadout`.

    Example:

    ```python
    hidden = keras.Model(model.inputs, model.get_layer("hidden").output)
    readout = keras_milr.readouts.UnitHistogram(reduce=None)
    info = readout.measure(hidden.predict(x), y, num_classes=10)
    print("most informative unit:", info.value.argmax(), info.value.max(), "nats")
    ```

    Args:
        bins: Number of bins for a unit's activations, zeros apart.
            Defaults to `16`.
        reduce: `"mean"` or `"max"` over units, or None for arrays with one entry per
            unit, in `value`, `raw`, `null` and `stderr`. The largest of many estimates
            is biased upward by chance. The standard error of the mean counts units as
            if they had the same error; that of the maximum is the unit's own.
            Defaults to `"mean"`.
    """

    def __init__(self, bins: int = 16, reduce: str | None = "mean"):
        check_integer("bins", bins, at_least=2)
        if not isinstance(reduce, str | None) or reduce not in _REDUCTIONS:
            raise ValueError(
                f"Argument `reduce` must be one of {_REDUCTIONS}. "
                f"Received: reduce={reduce!r}"
            )
        self.bins = bins
        self.reduce = reduce

    def features(self, activations):
        """What is kept of a batch: shape `(n, units)`. Pure; may be compiled.

        Args:
            activations: Tensor of shape `(n, ..., channels)`, or a list of them, whose
                units end side by side.
        """
        return feature.pooled(activations, 1)

    def get_config(self) -> dict:
        return {"bins": self.bins, "reduce": self.reduce}

    @classmethod
    def from_config(cls, config: dict) -> "UnitHistogram":
        return cls(**config)

    def _prepared(self, class_ids, sample_weight, num_classes):
        return functools.partial(
            self._read, ids=class_ids, weight=sample_weight, num_classes=num_classes
        )

    def _read(self, features, ids, weight, num_classes) -> Information:
        # More bins than samples cut no finer.
        bins = max(2, min(int(self.bins), len(ids)))
        cells = features.shape[1] * (bins + 2) * num_classes
        if cells > np.iinfo("int32").max:
            raise ValueError(
                "Argument `features` must have fewer units, bins or classes: their "
                f"tables have {cells} cells, more than 2^31. "
                f"Received: features.shape={tuple(features.shape)}"
            )
        at = edges(features, weight, bins)
        weight = weight if np.any(weight != 1.0) else None
        tables = counts(features, at, ids, weight, num_classes)
        value = information.mutual_information(tables, "miller_madow")
        entropy = float(information.entropy(tables[0].sum(axis=0)))
        units = {
            "raw": information.mutual_information(tables),
            "null": information.null_level(tables),
            "stderr": information.standard_error(tables),
        }
        if self.reduce == "max":
            best = int(np.argmax(value))
            value, units = value[best], {k: v[best] for k, v in units.items()}
        elif self.reduce == "mean":
            value, units = value.mean(), {k: v.mean() for k, v in units.items()}
        if self.reduce is not None:
            value, units = float(value), {k: float(v) for k, v in units.items()}
        return Information(value=value, entropy=entropy, **units)


def counts(features, edges, class_ids, weight, num_classes) -> np.ndarray:
    """Tables of (bin, label) for each unit: shape `(units, bins + 2, K)`.

    The last two bins are for zeros and for what is not finite.

    Args:
        features: Tensor of shape `(n, units)`.
        edges: Ascending edges of the bins, shape `(bins - 1, units)`.
        class_ids: int32 ids in `[0, num_classes)`, shape `(n,)`.
        weight: Weights of shape `(n,)`; None where all are 1, which is faster.
        num_classes: K.
    """
    tables = _compiled()(features, edges, class_ids, weight, num_classes)
    return keras.ops.convert_to_numpy(tables)


def edges(features, weight, bins) -> np.ndarray:
    """Edges at quantiles of what is binned, shape `(bins - 1, units)`.

    Of a sample of the rows, where there are many: to sort them all would cost several
    times what is left to do. On the host, where NumPy sorts an order of magnitude
    faster than a compiled graph.
    """
    rows = np.flatnonzero(weight > 0)
    if len(rows) == 0:
        return np.full((bins - 1, features.shape[1]), np.inf, "float32")
    if len(rows) > _ROWS:
        rows = np.sort(np.random.default_rng(0).choice(rows, _ROWS, replace=False))
    if len(rows) < len(weight):
        features = keras.ops.take(features, rows, axis=0)
    ops = keras.ops
    x = ops.cast(features, "float32")
    # What is not binned comes last. Each unit is in one piece, to be sorted fast.
    x = ops.where(ops.isfinite(x) & (x != 0.0), x, np.inf)
    ordered = np.sort(ops.convert_to_numpy(ops.transpose(x)), axis=1)
    binned = np.count_nonzero(ordered < np.inf, axis=1)
    at = np.arange(1, bins) * binned[:, None] // bins
    at = np.minimum(at, len(rows) - 1)
    return np.ascontiguousarray(np.take_along_axis(ordered, at, axis=1).T)


@functools.cache
def _compiled():
    ops = keras.ops
    fused = backend.jit(_cells, fused=True)

    def tables(features, edges, class_ids, weight, num_classes):
        cells = fused(features, edges, class_ids, num_classes)
        if weight is not None:
            weight = ops.broadcast_to(weight[:, None], cells.shape)
            weight = ops.reshape(weight, (-1,))
        # Outside of the fused pass, which would divide to find each number's unit.
        cells, units = ops.reshape(cells, (-1,)), cells.shape[1]
        shape = (units, edges.shape[0] + 3, num_classes)
        return ops.reshape(backend.bincount(cells, math.prod(shape), weight), shape)

    return backend.jit(tables)


def _cells(features, edges, class_ids, num_classes):
    """For each number its cell in the tables of all units, `(n, units)`."""
    ops = keras.ops
    x = ops.cast(features, "float32")
    bins = edges.shape[0] + 1
    # A binary search by selections instead of gathers: it fuses to one pass.
    levels = (bins - 1).bit_length()
    edges = [edges[i] for i in range(bins - 1)]
    edges += [np.float32(np.inf)] * (2**levels - bins)
    above = []

    def chosen(candidates, depth=0):
        if len(candidates) == 1:
            return candidates[0]
        middle = len(candidates) // 2
        low, high = candidates[:middle], candidates[middle:]
        return ops.where(above[depth], chosen(high, depth + 1), chosen(low, depth + 1))

    ids = ops.zeros(x.shape, "int32")
    for level in range(levels):
        half = 2 ** (levels - 1 - level)
        above.append(x >= chosen(edges[half - 1 :: 2 * half]))
        ids = ids + ops.where(above[level], half, 0)
    ids = ops.where(x == 0.0, bins, ids)
    ids = ops.where(ops.isfinite(x), ids, bins + 1)
    unit = ops.arange(x.shape[1], dtype="int32")
    return (unit * (bins + 2) + ids) * num_classes + class_ids[:, None]
