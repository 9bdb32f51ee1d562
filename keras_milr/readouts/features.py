"""Activations of any shape → a few numbers for each sample."""

import itertools
import math

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
                x = _averaged(x, axis, cells)
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
    features = ops.multiply(features, signs)  # `*` takes no array on a GPU.
    features = ops.pad(features, ((0, 0), (0, each * size - width)))
    features = ops.take(features, order, axis=-1)
    return ops.sum(ops.reshape(features, (-1, size, each)), axis=-1)


def widened(features, least: int = 64):
    """The features and zeros, up to a power of two, so that few widths are compiled."""
    width = features.shape[-1]
    missing = max(least, 1 << (width - 1).bit_length()) - width
    return keras.ops.pad(features, ((0, 0), (0, missing))) if missing else features


def finite(features):
    """Which features are finite, and not so large that their sums would not be."""
    return keras.ops.abs(features) < _HUGE  # False for NaN


def _averaged(x, axis: int, cells: int):
    """Means over cells of equal size, which may have parts of a position in common.

    Sums, not a matrix product: on many a GPU its factors are rounded to 10 bits.
    """
    ops = keras.ops
    shape, size = ops.shape(x), x.shape[axis]
    if size % cells == 0:
        blocks = (*shape[:axis], cells, size // cells, *shape[axis + 1 :])
        return ops.mean(ops.reshape(x, blocks), axis=axis + 1)
    parts = []
    for lower, upper in itertools.pairwise(np.linspace(0, size, cells + 1)):
        first, last = int(lower), min(math.ceil(upper), size)
        at = np.arange(first, last)
        share = np.minimum(at + 1, upper) - np.maximum(at, lower)
        share = (share / share.sum()).astype("float32")
        share = share.reshape(-1, *[1] * (len(shape) - axis - 1))
        part = x[(slice(None),) * axis + (slice(first, last),)]
        parts.append(ops.sum(ops.multiply(part, share), axis=axis))
    return ops.stack(parts, axis=axis)
