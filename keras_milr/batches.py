"""Batches of labelled data as NumPy, from whatever `fit` takes."""

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

_PART = 1024  # rows of a sparse matrix that are made dense at a time


def read(data) -> Iterator[tuple[Any, np.ndarray, np.ndarray | None]]:
    """The batches of labelled data; arrays are one batch.

    Args:
        data: `(x, y)` or `(x, y, sample_weight)` of arrays, or an iterable of such
            batches: a `tf.data.Dataset`, a `keras.utils.PyDataset`, a `DataLoader`, a
            generator. Inputs may be sparse matrices of SciPy.

    Yields:
        Inputs, labels and sample weights or None, as NumPy arrays or structures of
        them. What is sparse comes dense, in batches of 1,024 rows.

    Raises:
        TypeError: for anything else.
        ValueError: for data that are infinite, without labels, or no arrays.
    """
    if isinstance(data, (tuple, list)):
        batches = [data]
    elif isinstance(data, keras.utils.PyDataset):
        if data.num_batches is None:
            raise ValueError(
                "Argument `probe_data` must be finite. Received a PyDataset whose "
                "`num_batches` is None"
            )
        batches = (data[i] for i in range(data.num_batches))
    elif isinstance(data, dict) or is_array(data):
        raise ValueError(
            "Argument `probe_data` must have labels: (x, y), (x, y, sample_weight), or "
            f"an iterable of such batches. Received: {type(data).__name__}"
        )
    elif hasattr(data, "__iter__"):
        if hasattr(data, "cardinality") and int(data.cardinality()) == -1:
            raise ValueError(
                "Argument `probe_data` must be finite. Received a dataset that repeats "
                "without end; pass it before `.repeat()`, or use `.take(steps)`."
            )
        batches = data
    else:
        raise TypeError(
            "Argument `probe_data` must be (x, y), (x, y, sample_weight), or an "
            "iterable of such batches (tf.data.Dataset, keras.utils.PyDataset, "
            f"DataLoader, generator). Received: {data!r} of type {type(data).__name__}"
        )
    for batch in batches:
        if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
            what = f"{type(batch).__name__}"
            if isinstance(batch, (tuple, list)):
                what += f" of {len(batch)}"
            raise ValueError(
                "Argument `probe_data` must have labels: (x, y) or "
                f"(x, y, sample_weight). Received: {what}"
            )
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(tuple(batch))
        if y is None:
            raise ValueError("Argument `probe_data` must have labels. Received: y=None")
        y = _of_outputs(y)
        if sample_weight is not None:
            sample_weight = _of_outputs(sample_weight)
        if any(_is_sparse(a) for a in keras.tree.flatten(x)):
            yield from _dense(x, y, sample_weight)
        else:
            yield keras.tree.map_structure(_array, x), y, sample_weight


def is_array(x) -> bool:
    """Whether it is rows of one thing, dense or sparse, on any device."""
    return hasattr(x, "__array__") or keras.ops.is_tensor(x) or _is_sparse(x)


def _is_sparse(x) -> bool:
    """Whether it is a matrix of `scipy.sparse`, as scikit-learn makes of texts."""
    return hasattr(x, "tocsr")


def _dense(x, y, sample_weight):
    """The batch in parts, so that memory does not have all of what is sparse."""
    x = keras.tree.map_structure(lambda a: a.tocsr() if _is_sparse(a) else _array(a), x)
    for start in range(0, check_lengths(x, y, sample_weight), _PART):
        rows = slice(start, start + _PART)
        yield keras.tree.map_structure(
            lambda a, r=rows: None if a is None else _array(a[r]),
            (x, y, sample_weight),
        )


def _of_outputs(y):
    """Labels or weights as NumPy: a dict or list of arrays has those of each output."""
    if isinstance(y, dict):
        return {name: _array(a) for name, a in y.items() if a is not None}
    listed = isinstance(y, (list, tuple)) and len(y) > 0
    if listed and all(len(getattr(a, "shape", ())) > 0 for a in y):
        return [_array(a) for a in y]
    return _array(y)


def _array(x):
    """`x` as NumPy, in the types that Keras trains with."""
    if keras.ops.is_tensor(x):  # Which may be on another device.
        x = keras.ops.convert_to_numpy(x)
    elif _is_sparse(x):
        x = x.toarray()
    try:
        x = np.asarray(x)
    except ValueError as error:
        raise ValueError(
            "Argument `probe_data` must hold arrays, (x, y) or (x, y, sample_weight). "
            f"Received a {type(x).__name__} that is none: {error}"
        ) from error
    return x.astype(keras.config.floatx(), copy=False) if x.dtype.kind == "f" else x


def check_lengths(x, y, sample_weight) -> int:
    """Number of samples in a batch; ValueError for lengths that differ."""
    shapes = [a.shape for a in (*keras.tree.flatten(x), *keras.tree.flatten(y))]
    weights = [] if sample_weight is None else keras.tree.flatten(sample_weight)
    for weight in weights:
        shapes.append(weight.shape)
        number = weight.dtype.kind in "biuf"
        if not number or not np.all((weight >= 0) & np.isfinite(weight)):
            raise ValueError(
                "The sample weights of `probe_data` must be finite and not negative. "
                f"Received: {weight}"
            )
    if any(len(shape) == 0 for shape in shapes):
        raise ValueError(
            "Argument `probe_data` must come in batches. Received single samples; "
            "use `dataset.batch(...)`."
        )
    if len({shape[0] for shape in shapes}) != 1:
        raise ValueError(
            "Inputs, labels and weights in `probe_data` must have the same length. "
            f"Received: shapes {shapes}"
        )
    return shapes[0][0]


def check_inputs(x):
    """ValueError for inputs that are not finite, or strings where none can be."""
    for array in keras.tree.flatten(x):
        if array.dtype.kind in "OSU" and keras.backend.backend() != "tensorflow":
            raise ValueError(
                "The inputs in `probe_data` must be numbers: only the backend "
                "TensorFlow has strings in a model. Look them up in the data, as by "
                "`dataset.map(lambda x, y: (text_vectorization(x), y))`. "
                f"Received: an array of {array.dtype}, such as {array.flat[0]!r}"
            )
        if array.dtype.kind == "f" and not np.all(np.isfinite(array)):
            raise ValueError(
                "The inputs in `probe_data` must be finite. Received an array of shape "
                f"{array.shape} with {int(np.sum(~np.isfinite(array)))} NaN or "
                "infinite value(s)"
            )
