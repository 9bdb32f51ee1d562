"""Activations of any shape → a few numbers for each sample."""

import keras
import numpy as np

from keras_milr import targets
from keras_milr._arguments import as_array, check_integer, naming

_MOST_CLASSES = 46_340  # whose table has fewer cells than int32 can number
_HUGE = 1e15  # Beyond, the square of a float32 overflows when summed.


def pooled(activations, cells: int):
    """Averages space and time: every axis between samples and channels.

    Args:
        activations: Array or tensor of shape `(n, ..., channels)`, or a list of them
            (the outputs or the calls of one layer), which end side by side.
        cells: Number of cells, of equal size, that an axis is averaged to. A shorter
            axis stays as it is, one of unknown length gets one cell.

    Returns:
        float32 tensor of shape `(n, features)`.
    """
    ops = keras.ops
    parts = []
    if not isinstance(activations, (list, tuple)):
        activations = [activations]
    if not activations:
        raise ValueError("Argument `activations` must not be empty. Received: []")
    for x in activations:
        # Half precision overflows in sums.
        x = ops.cast(as_array("activations", x), "float32")
        if len(x.shape) == 0:
            raise ValueError(
                "Argument `activations` must be an array of shape (n, ..., channels), "
                f"or a list of them. Received a number: {x}"
            )
        if len(x.shape) == 1:
            x = ops.expand_dims(x, -1)
        for axis in range(1, len(x.shape) - 1):
            size = x.shape[axis]
            if size is None or cells == 1:
                x = ops.mean(x, axis=axis, keepdims=True)
            elif size > cells:
                x = ops.tensordot(x, _cells(size, cells), axes=(axis, 0))
                x = ops.moveaxis(x, -1, axis)
        parts.append(ops.reshape(x, (-1, int(np.prod(x.shape[1:])))))
    if len({x.shape[0] for x in parts} - {None}) > 1:
        raise ValueError(
            "Argument `activations` must have arrays of one length. "
            f"Received: {[x.shape[0] for x in parts]}"
        )
    return ops.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]


def sketched(features, size: int, seed: int):
    """Random signed sums of the features, where there are more than `2 * size`.

    Every feature goes into one of `size` sums, with a random sign: a feature hash
    (Weinberger et al. 2009) with buckets of equal size. It keeps inner products on
    average and, unlike a dense projection, costs and keeps next to nothing.
    """
    ops = keras.ops
    width, size = features.shape[-1], int(size)  # NumPy's may overflow.
    if width <= 2 * size:
        return features
    rng = np.random.default_rng((seed, width))
    each = -(-width // size)
    signs = rng.choice(np.array([-1, 1], "float32"), width)
    order = rng.permutation(each * size)
    features = ops.pad(features * signs, ((0, 0), (0, each * size - width)))
    features = ops.take(features, order, axis=-1)
    return ops.sum(ops.reshape(features, (-1, size, each)), axis=-1)


def finite(features):
    """Which features are finite, and not so large that their sums would not be."""
    return keras.ops.abs(features) < _HUGE  # False for NaN


def checked_labels(class_ids, num_classes, sample_weight=None):
    """Class ids and weights as arrays of the right types and one length.

    Raises:
        ValueError: for ids out of range, shapes that do not fit, and weights that are
            negative or not finite.
    """
    check_integer("num_classes", num_classes, at_least=2, at_most=_MOST_CLASSES)
    with naming("class_ids"):
        ids = targets.checked_class_ids(class_ids, num_classes)
    weight = np.ones(len(ids), "float32") if sample_weight is None else sample_weight
    weight = np.asarray(weight, "float32")
    if weight.shape != ids.shape:
        raise ValueError(
            "Arguments `class_ids` and `sample_weight` must have the same length, and "
            f"`sample_weight` one axis. Received: {len(ids)} and {weight.shape}"
        )
    bad = weight[~(np.isfinite(weight) & (weight >= 0))]
    if bad.size:
        raise ValueError(
            "Argument `sample_weight` must be finite and not negative. "
            f"Received {bad.size} bad value(s), the first {bad[0]}"
        )
    return ids, weight


def check_features(features, samples: int):
    """Raises ValueError for features that are not those of so many samples."""
    if len(features.shape) != 2 or 0 in features.shape:
        raise ValueError(
            "Argument `features` must have shape (n, features), neither of them 0. "
            f"Received: features.shape={tuple(features.shape)}"
        )
    if features.shape[0] != samples:
        raise ValueError(
            "Arguments `features` and `class_ids` must have the same length. "
            f"Received: {features.shape[0]} and {samples}"
        )


def _cells(size: int, cells: int) -> np.ndarray:
    """Matrix `(size, cells)` that averages an axis in cells of (almost) equal size."""
    edges = np.linspace(0, size, cells + 1)
    lower = np.maximum(np.arange(size)[:, None], edges[None, :-1])
    upper = np.minimum(np.arange(1, size + 1)[:, None], edges[None, 1:])
    return (np.maximum(upper - lower, 0) * cells / size).astype("float32")
