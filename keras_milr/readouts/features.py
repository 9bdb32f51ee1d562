"""Activations of any shape → a few numbers for each sample."""

import keras
import numpy as np

from keras_milr._arguments import as_array

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


def _cells(size: int, cells: int) -> np.ndarray:
    """Matrix `(size, cells)` that averages an axis in cells of (almost) equal size."""
    edges = np.linspace(0, size, cells + 1)
    lower = np.maximum(np.arange(size)[:, None], edges[None, :-1])
    upper = np.minimum(np.arange(1, size + 1)[:, None], edges[None, 1:])
    return (np.maximum(upper - lower, 0) * cells / size).astype("float32")
