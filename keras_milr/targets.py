"""Labels of any kind, as class ids.

The kind of the labels follows from their shape and the number of output units:

| kind        | labels                  | outputs   |
| ----------- | ----------------------- | --------- |
| `"sparse"`  | ids, `(n,)` or `(n, 1)` | `(n, K)`  |
| `"one_hot"` | `(n, K)`                | `(n, K)`  |
| `"binary"`  | 0 or 1, `(n,)`/`(n, 1)` | `(n, 1)`  |

A further kind is a new row here: its test in `label_kind`, its conversion in
`class_ids`, and its check in `checked_class_ids`.
"""

import keras
import numpy as np


def num_classes(num_units: int) -> int:
    """Number of classes that `num_units` output units tell apart."""
    return max(num_units, 2)


def label_kind(label_shape: tuple[int | None, ...], num_units: int) -> str:
    """The kind of the labels: `"sparse"`, `"one_hot"` or `"binary"`.

    Args:
        label_shape: Shape of a batch of labels; the batch size may be None.
        num_units: Number of output units of the model.

    Raises:
        ValueError: for a shape that fits none of the kinds.
    """
    shape = tuple(label_shape)
    single = len(shape) == 1 or (len(shape) == 2 and shape[1] == 1)
    if single:
        return "binary" if num_units == 1 else "sparse"
    if len(shape) == 2 and shape[1] == num_units:
        return "one_hot"
    raise ValueError(
        "The labels must be class ids of shape (n,) or (n, 1), or one-hot vectors "
        f"of shape (n, {num_units}) for the model's {num_units} output unit(s). "
        f"Received: labels of shape {shape}"
    )


def class_ids(labels, num_units: int):
    """Class ids of a batch of labels, by shape alone.

    Used where values cannot be looked at, in a compiled step; labels that are not
    of a known kind give ids out of range, or the class of the largest entry.

    Args:
        labels: Tensor or array of labels; see the table of kinds.
        num_units: Number of output units of the model.

    Returns:
        int32 tensor of shape `(n,)`.
    """
    ops = keras.ops
    labels = ops.convert_to_tensor(labels)
    kind = label_kind(labels.shape, num_units)
    if kind == "one_hot":
        return ops.cast(ops.argmax(ops.cast(labels, "float32"), axis=-1), "int32")
    labels = ops.reshape(labels, (-1,))
    if kind == "binary":
        # As keras.metrics.BinaryAccuracy, any label above the middle is class 1.
        return ops.cast(ops.cast(labels, "float32") > 0.5, "int32")
    return ops.cast(labels, "int32")


def checked_class_ids(labels, num_units: int) -> np.ndarray:
    """Class ids of an array of labels, each value checked.

    Args:
        labels: NumPy array of labels; see the table of kinds.
        num_units: Number of output units of the model.

    Returns:
        int32 array of shape `(n,)`.

    Raises:
        ValueError: for labels that are not numbers, not whole, negative, beyond the
            outputs, or (one label per row) not one-hot.
    """
    labels = np.asarray(labels)
    if labels.dtype.kind not in "biuf":
        raise ValueError(
            "The labels must be numbers: class ids, one-hot vectors, or 0 and 1. "
            f"Received: labels of dtype {labels.dtype}"
        )
    kind = label_kind(labels.shape, num_units)
    if kind == "one_hot":
        # A tolerance for labels that went through half precision.
        one_hot = (np.abs(labels - 1.0) < 1e-3).sum(axis=1) == 1
        one_hot &= (np.abs(labels) < 1e-3).sum(axis=1) == num_units - 1
        if not np.all(one_hot):
            row = int(np.argmin(one_hot))
            raise ValueError(
                f"Labels of shape {labels.shape} must be one-hot: one 1 in each row, "
                "otherwise 0. Soft and multi-label targets are not supported. "
                f"Received row {row}: {labels[row]}"
            )
    else:
        limit = num_classes(num_units)
        flat = labels.reshape(-1).astype("float64")
        bad = ~np.isfinite(flat) | (flat != np.floor(flat))
        bad |= (flat < 0) | (flat >= limit)
        if np.any(bad):
            raise ValueError(
                f"The labels must be whole numbers in [0, {limit}) for a model with "
                f"{num_units} output unit(s). Received {int(bad.sum())} other "
                f"value(s), the first {flat[np.argmax(bad)]}"
            )
    return np.asarray(keras.ops.convert_to_numpy(class_ids(labels, num_units)))
