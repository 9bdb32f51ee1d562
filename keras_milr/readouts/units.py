"""Histograms of the units of a layer."""

import functools

import keras
import numpy as np

from keras_milr import backend, information
from keras_milr._arguments import check_integer
from keras_milr.readouts import features as feature
from keras_milr.readouts.result import Information

_REDUCTIONS = ("mean", "max", None)


@keras.saving.register_keras_serializable(package="keras_milr")
class UnitHistogram:
    """Reads the units of a layer one by one: binned activation against the label.

    The classical estimate. The activations of each unit are cut in `bins` bins of as
    equal numbers of samples as ties allow; equal activations are never separated.
    Exact zeros, which a ReLU has many of, have a bin of their own, and activations
    that are not finite have another. The mutual information of (bin, label) is
    corrected by Miller and Madow's term. Axes between samples and channels, space and
    time, are averaged.

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
            unit. The largest of many estimates is biased upward by chance. The
            standard error of the mean counts units as if they had the same error; that
            of the maximum is the unit's own. Defaults to `"mean"`.
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

    def read(
        self, features, class_ids, num_classes: int, sample_weight=None
    ) -> Information:
        """The information in the features of all samples; compiled.

        Args:
            features: Tensor of shape `(n, units)`; see `features`.
            class_ids: Integer ids in `[0, num_classes)`, shape `(n,)`, as NumPy.
            num_classes: K.
            sample_weight: Optional weights of shape `(n,)`, as NumPy.

        Returns:
            An `Information`, nats; its `value`, `raw`, `null` and `stderr` are arrays
            of shape `(units,)` for `reduce=None`.

        Raises:
            ValueError: for shapes that do not fit and ids out of range.
        """
        ids, weight = feature.checked_samples(
            features, class_ids, num_classes, sample_weight
        )
        # More bins than samples cut no finer.
        bins, num_classes = max(2, min(int(self.bins), len(ids))), int(num_classes)
        cells = features.shape[1] * (bins + 2) * num_classes
        if cells > np.iinfo("int32").max:
            raise ValueError(
                "Argument `features` must have fewer units, bins or classes: their "
                f"tables have {cells} cells, more than 2^31. "
                f"Received: features.shape={tuple(features.shape)}"
            )
        counts = _compiled()(features, ids, weight, bins, num_classes)
        counts = keras.ops.convert_to_numpy(counts)
        value = information.mutual_information(counts, "miller_madow")
        entropy = float(information.entropy(counts[0].sum(axis=0)))
        units = {
            "raw": information.mutual_information(counts),
            "null": information.null_level(counts),
            "stderr": information.standard_error(counts),
        }
        if self.reduce == "max":
            best = int(np.argmax(value))
            value, units = value[best], {k: v[best] for k, v in units.items()}
        elif self.reduce == "mean":
            value, units = value.mean(), {k: v.mean() for k, v in units.items()}
        if self.reduce is not None:
            value, units = float(value), {k: float(v) for k, v in units.items()}
        return Information(value=value, entropy=entropy, **units)

    def measure(self, activations, class_ids, num_classes: int) -> Information:
        """Reads the activations of all samples: `features`, then `read`.

        Args:
            activations: Array of shape `(n, ..., channels)`, or a list of them.
            class_ids: Integer ids in `[0, num_classes)`, shape `(n,)`.
            num_classes: K.

        Returns:
            An `Information`, nats.

        Raises:
            ValueError: for shapes that do not fit and ids out of range.
        """
        return self.read(self.features(activations), class_ids, num_classes)

    def get_config(self) -> dict:
        return {"bins": self.bins, "reduce": self.reduce}

    @classmethod
    def from_config(cls, config: dict) -> "UnitHistogram":
        return cls(**config)


@functools.cache
def _compiled():
    return backend.jit(_count)


def _count(features, class_ids, weight, bins, num_classes):
    """Tables of (bin, label) for each unit: shape `(units, bins + 2, K)`.

    The last two bins are for zeros and for what is not finite.
    """
    ops = keras.ops
    x = ops.cast(features, "float32")
    n, units = x.shape
    finite = ops.isfinite(x)
    binned = finite & (x != 0.0)
    # Sorted, what is not binned comes last; edges lie at quantiles of the rest.
    used = binned & (weight > 0)[:, None]
    ordered = ops.sort(ops.where(used, x, np.inf), axis=0)
    number = ops.sum(ops.cast(used, "int32"), axis=0)
    at = ops.arange(1, bins)[:, None] * number[None, :] // bins
    edges = ops.take_along_axis(ordered, at, axis=0)
    ids = ops.zeros((n, units), "int32")
    for edge in range(bins - 1):
        ids = ids + ops.cast(x >= edges[edge], "int32")
    ids = ops.where(binned, ids, ops.where(finite, bins, bins + 1))

    cells = (ops.arange(units)[None, :] * (bins + 2) + ids) * num_classes
    cells = cells + class_ids[:, None]
    weights = ops.broadcast_to(weight[:, None], (n, units))
    counts = ops.segment_sum(
        ops.reshape(weights, (-1,)),
        ops.reshape(cells, (-1,)),
        num_segments=units * (bins + 2) * num_classes,
    )
    return ops.reshape(counts, (units, bins + 2, num_classes))
