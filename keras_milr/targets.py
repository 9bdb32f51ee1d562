"""Labels of any kind, as class ids.

With outputs of shape `(n, ..., K)`, where `...` are positions in a sample (tokens,
pixels; most often none), the kinds are:

| kind            | labels                              | classes                |
| --------------- | ----------------------------------- | ---------------------- |
| `"sparse"`      | ids, `(n, ...)` or `(n, ..., 1)`    | K units, K classes     |
| `"one_hot"`     | one 1 in a row of 0, `(n, ..., K)`  | K units, K classes     |
| `"soft"`        | shares that add up to 1, the same   | K units, K classes     |
| `"binary"`      | 0 or 1, `(n, ...)` or `(n, ..., 1)` | one unit, two classes  |
| `"multi_label"` | 0 or 1 for each unit, `(n, ..., K)` | two of each unit       |
| `"continuous"`  | numbers, `(n, ..., K)`, `(n, ...)`  | bins of each unit      |

The class of a soft label is its largest entry. Against the whole distribution, even an
output that fits it exactly has a cross-entropy above 0: the ceiling H(Y) could never be
reached, and a training at its end would look as if much were still to be learned.

The classes of a continuous target are bins of about equal numbers of samples, with
edges half-way between two values that occur, so that equal values share a bin. Of n
samples there are sqrt(n / 5) bins, which is what counts can serve, but at least 2 and
at most 16.

A kind follows from loss, labels and outputs together; see `detect`. A further kind
is a row here, a case in `_detected`, and a check in `_CHECKS`.
"""

from typing import NamedTuple

import keras
import numpy as np

from keras_milr.backend import argmax

KINDS = ("sparse", "one_hot", "soft", "binary", "multi_label", "continuous")
MANY = 1024  # classes; beyond, no table of counts and no share of each in a sample
_MOST_BINS = 16

# By the names of Keras' losses; functions have the same names in lower case.
_FAMILIES = {
    "SparseCategoricalCrossentropy": "sparse",
    "CategoricalGeneralizedCrossEntropy": "sparse",
    "CategoricalCrossentropy": "categorical",
    "CategoricalFocalCrossentropy": "categorical",
    "CategoricalHinge": "categorical",
    "KLDivergence": "categorical",
    "BinaryCrossentropy": "binary",
    "BinaryFocalCrossentropy": "binary",
    "Hinge": "hinge",
    "SquaredHinge": "hinge",
    "MeanSquaredError": "continuous",
    "MeanAbsoluteError": "continuous",
    "MeanAbsolutePercentageError": "continuous",
    "MeanSquaredLogarithmicError": "continuous",
    "Huber": "continuous",
    "LogCosh": "continuous",
    "Poisson": "continuous",
    "CTC": "unreadable",
    "Circle": "unreadable",
    "CosineSimilarity": "unreadable",
}
_BY_LOWER = {name.lower(): family for name, family in _FAMILIES.items()}


class Target(NamedTuple):
    """What an output of a model is asked.

    Attributes:
        kind: One of `KINDS`.
        units: Number of output units, K.
        positions: Sizes of the axes of the output between samples and units.
        from_logits: Whether the outputs are logits.
        ignore_class: Id of labels that the loss leaves out, or None.
        explicit: Whether the kind was given, not detected.
        columns: Of a kind with a question for each unit, the units whose labels
            vary, as an array; else None.
        edges: Of continuous targets the inner edges of the bins, one array for each
            of `columns`; else None.
        spread: Their standard deviations, or None.
        shares: Of more than `MANY` classes the share of each in all data: a sample
            does not have them all. None for fewer.
        usual_loss: Whether the loss is one of Keras' own, unchanged.
    """

    kind: str
    units: int
    positions: tuple = ()
    from_logits: bool = False
    ignore_class: int | None = None
    explicit: bool = False
    columns: np.ndarray | None = None
    edges: list | None = None
    spread: np.ndarray | None = None
    shares: np.ndarray | None = None
    usual_loss: bool = True

    @property
    def by_unit(self) -> bool:
        """Whether each unit is a question of its own."""
        return self.kind in ("multi_label", "continuous")

    @property
    def num_classes(self) -> int:
        """Number of classes; of continuous targets the largest number of bins."""
        if self.kind == "continuous":
            return max(len(edges) for edges in self.edges) + 1
        return 2 if self.kind == "multi_label" else num_classes(self.units)


def num_classes(num_units: int) -> int:
    """Number of classes that `num_units` output units tell apart."""
    return max(num_units, 2)


def num_bins(samples: float) -> int:
    """Number of bins that counts serve for: samples >= 5 bins²."""
    return int(np.clip(np.sqrt(samples / 5), 2, _MOST_BINS))


# ------------------------------------------------------------------- detection


def loss_family(loss) -> str | None:
    """What labels a loss of Keras is for; None for any other loss, and for none."""
    if isinstance(loss, str):
        if loss.lower() in ("crossentropy", "ce"):  # As `compile` takes them.
            return "crossentropy"
        try:
            loss = keras.losses.get(loss)
        except ValueError:
            return None
    if isinstance(loss, keras.losses.Loss):
        for cls in type(loss).__mro__:
            if cls.__module__.startswith("keras.") and cls.__name__ in _FAMILIES:
                return _FAMILIES[cls.__name__]
        return None
    if str(getattr(loss, "__module__", "")).startswith("keras."):
        return _BY_LOWER.get(getattr(loss, "__name__", "").replace("_", ""))
    return None


def is_usual(loss) -> bool:
    """Whether a loss is one of Keras' own, and not a class that is derived of it."""
    kind = type(loss) if isinstance(loss, keras.losses.Loss) else loss
    named = isinstance(loss, str)
    return named or str(getattr(kind, "__module__", "")).startswith("keras.")


def from_logits(loss) -> bool:
    """Whether the loss takes the outputs for logits. Margins are read as such."""
    if loss_family(loss) == "hinge":
        return True
    return bool(getattr(loss, "from_logits", False))


def detect(loss, labels, outputs, kind: str = "auto") -> Target:
    """What an output is asked, from loss, labels and outputs together.

    Labels with one id for each row of two or more units are `"sparse"`, whatever the
    loss, and those of a single unit `"binary"`, but for numbers other than 0 and 1 with
    a loss for numbers or an unknown one. Labels of the shape of the outputs are:

    | loss                                     | kind                                |
    | ---------------------------------------- | ----------------------------------- |
    | sparse categorical                       | one-hot                             |
    | categorical, its hinge, KL divergence    | soft, one-hot included              |
    | binary cross-entropy, hinge              | multi-label; one-hot where labels   |
    |                                          | are and outputs add up to 1         |
    | MSE, MAE, MAPE, MSLE, Huber, log-cosh,   | continuous; one-hot where all       |
    | Poisson                                  | labels are                          |
    | any other, none                          | the only one that the labels fit    |
    | CTC, circle, cosine similarity           | none: their outputs are not read    |

    Args:
        loss: The loss of the output, as `compile` was given it, or None.
        labels: Array of some labels.
        outputs: Array of what the model puts out for some samples.
        kind: One of `KINDS`, or `"auto"`.

    Returns:
        A `Target`; continuous targets have no bins yet.

    Raises:
        ValueError: for labels that fit no kind, not the loss or not the given kind, and
            for labels that fit several where the loss decides nothing.
    """
    explicit = kind != "auto"
    # Its labels need not have the shape of any kind.
    if not explicit and loss_family(loss) == "unreadable":
        raise ValueError(
            "The outputs are trained by a loss that neither names a class nor compares "
            f"numbers one by one. Received: {loss!r}. If they can be read all the "
            f"same, pass `targets`, one of {KINDS}"
        )
    labels, outputs = _numbers(labels), np.asarray(outputs, "float32")
    if outputs.ndim == 1:
        outputs = outputs[:, None]
    positions, units = outputs.shape[1:-1], outputs.shape[-1]
    single = labels.shape[1:] in (positions, (*positions, 1))
    by_unit = labels.shape[1:] == outputs.shape[1:] or (single and units == 1)
    if labels.ndim == 0 or not (single or by_unit):
        raise ValueError(_no_kind(labels.shape, positions, units))
    logits = from_logits(loss)
    if explicit:
        _check_shape(kind, single, by_unit, labels.shape, units)
    else:
        kind = _detected(loss, labels, outputs, single, units, logits)
    return Target(
        kind,
        units,
        positions,
        logits,
        getattr(loss, "ignore_class", None) if kind == "sparse" else None,
        explicit,
        usual_loss=is_usual(loss),
    )


def _detected(loss, labels, outputs, single, units, logits):
    family = loss_family(loss)
    whole = np.all((labels == 0) | (labels == 1))
    if single and units > 1:  # Class ids, whatever the labels trained with.
        return "sparse"
    if units == 1:
        continuous = family == "continuous" or family is None
        return "continuous" if continuous and not whole else "binary"
    if family == "sparse":
        return "one_hot"
    if family in ("categorical", "crossentropy"):
        return "soft"
    one_hot = np.all(_is_one_hot(labels))
    if family in ("binary", "hinge"):
        shares = not logits and np.all(_adds_up(outputs))
        return "one_hot" if one_hot and shares else "multi_label"
    if one_hot:
        return "one_hot"
    if family == "continuous":
        return "continuous"
    if whole:
        return "multi_label"
    if np.all(np.isin(labels, (-1, 0, 1))):
        raise ValueError(
            "The labels are -1, 0 and 1: they may be numbers, or yes-or-no labels of "
            "which some are missing, and the loss does not tell. Pass "
            "`targets='continuous'` for numbers. Missing labels cannot be read: weigh "
            "their samples with 0, or take a probe without them. "
            f"Received: loss {loss!r}, row 0 of the labels: {labels[0]}"
        )
    if np.all(_adds_up(labels)):
        raise ValueError(
            "The labels add up to 1 in each row: they may be soft labels or continuous "
            "targets, and the loss does not tell. Pass `targets='soft'` or "
            f"`targets='continuous'`. Received: loss {loss!r}, row 0 of the labels: "
            f"{labels[0]}"
        )
    return "continuous"


def may_be_numbers(target: Target, loss) -> bool:
    """Whether labels that were all 0 or 1 might turn out to be numbers, of more data.

    Args:
        target: What was detected.
        loss: The loss of the output, as `compile` was given it, or None.
    """
    of_numbers = loss_family(loss) in ("continuous", None)
    return target.kind == "binary" and not target.explicit and of_numbers


def _check_shape(kind, single, by_unit, shape, units):
    fits = {
        "sparse": single and units > 1,
        "binary": single and units == 1,
        "continuous": by_unit,
    }.get(kind, by_unit and units > 1)
    if not fits:
        raise ValueError(
            f"Argument `targets` does not fit labels and outputs: {_needs(kind)}. "
            f"Received: targets={kind!r}, labels of shape {shape}, {units} output "
            "unit(s)"
        )


def _needs(kind):
    return {
        "sparse": "'sparse' needs one class id for each row of two or more units",
        "binary": "'binary' needs a single unit, and one label for each",
        "continuous": "'continuous' needs a number for each output unit",
    }.get(kind, f"{kind!r} needs labels of the shape of the outputs, two or more units")


def _no_kind(shape, positions, units):
    n = ", ".join(["n", *map(str, positions)])
    ids = f"({n},) or ({n}, 1)" if not positions else f"({n}) or ({n}, 1)"
    return (
        f"The labels must be class ids of shape {ids}, or one-hot vectors "
        f"of shape ({n}, {units}) for the model's {units} output unit(s). "
        f"Received: labels of shape {tuple(shape)}"
    )


def check_kind(kind):
    """Refuses what is no argument `targets`: a kind, "auto", or a dict to these."""
    kinds = kind.values() if isinstance(kind, dict) else [kind]
    for one in kinds:
        if not isinstance(one, str) or one not in ("auto", *KINDS):
            raise ValueError(
                f"Argument `targets` must be 'auto' or one of {KINDS}, or a dict from "
                f"the names of outputs to these. Received: targets={kind!r}"
            )


def label_kind(
    label_shape: tuple[int | None, ...], num_units: int, positions: tuple = ()
) -> str:
    """The kind of labels by shape alone: `"sparse"`, `"one_hot"` or `"binary"`.

    Args:
        label_shape: Shape of a batch of labels. Sizes may be None, here and below.
        num_units: Number of output units of the model.
        positions: Sizes of the axes of the outputs between samples and units.

    Raises:
        ValueError: for a shape that fits none of the kinds.
    """
    # TensorFlow's shape of a scalar is true, and of an unknown rank has no length.
    shape = tuple(label_shape)[1:] if label_shape and len(label_shape) else None
    positions = tuple(positions)
    if _fits(shape, positions) or _fits(shape, (*positions, 1)):
        return "binary" if num_units == 1 else "sparse"
    if _fits(shape, (*positions, num_units)):
        return "one_hot"
    raise ValueError(_no_kind(label_shape, positions, num_units))


def _fits(shape, expected):
    if shape is None or len(shape) != len(expected):
        return False
    pairs = zip(shape, expected, strict=True)
    return all(a is None or b is None or a == b for a, b in pairs)


# ---------------------------------------------------------------------- class ids


def class_ids(
    labels, num_units: int, kind: str | None = None, from_logits: bool = False
):
    """Class ids of a batch of labels, one after the other.

    Used where values cannot be looked at, in a compiled step; labels that are not
    of the kind give ids out of range, or the class of the largest entry. Those that are
    not finite give -1.

    Args:
        labels: Tensor or array of labels; see the table of kinds.
        num_units: Number of output units of the model.
        kind: Any kind but `"continuous"`. Defaults to `None`: by shape, see
            `label_kind`.
        from_logits: Whether -1 is a no, as for a loss on margins, and not a label that
            is missing. Defaults to `False`.

    Returns:
        int32 tensor of shape `(n,)`, or `(n, K)` for multi-label, where n counts
        positions too.
    """
    ops = keras.ops
    labels = ops.convert_to_tensor(labels)
    kind = label_kind(labels.shape, num_units) if kind is None else kind
    numbers = ops.cast(labels, "float32")
    if kind in ("one_hot", "soft"):
        known, ids = ops.all(ops.isfinite(numbers), axis=-1), argmax(numbers)
    elif kind == "sparse":
        known, ids = ops.isfinite(numbers), labels
    else:
        # As keras.metrics.BinaryAccuracy, any label above the middle is class 1.
        known, ids = (numbers >= 0) & (numbers <= 1), numbers > 0.5
        if from_logits:
            known = known | (numbers == -1)
    ids = ops.where(known, ops.cast(ids, "int32"), -1)
    return ops.reshape(ids, (-1, num_units) if kind == "multi_label" else (-1,))


def checked_class_ids(labels, num_units: int) -> np.ndarray:
    """Class ids of an array of labels, each value checked, by shape alone.

    Args:
        labels: NumPy array of labels, sparse, one-hot or binary.
        num_units: Number of output units of the model.

    Returns:
        int32 array of shape `(n,)`.

    Raises:
        ValueError: for labels that are not numbers, not whole, negative, beyond the
            outputs, or (one label per row) not one-hot.
    """
    labels = _numbers(labels)
    kind = label_kind(labels.shape, num_units)
    return checked_ids(labels, Target(kind, num_units))


def checked_ids(labels, target: Target, counted=None) -> np.ndarray:
    """Class ids of an array of labels, each value checked.

    Args:
        labels: NumPy array of labels.
        target: What they are.
        counted: Booleans of shape `(n, ...)`: labels that are not counted, padding
            say, may be anything. Defaults to all.

    Returns:
        int32 array of shape `(n, ...)`, or `(n, ..., K)` where each unit is a question
        of its own; 0 where a label is not counted. Of continuous targets without bins
        yet, the targets themselves.

    Raises:
        ValueError: for labels that are not of the kind.
    """
    labels = _numbers(labels)
    vectors = target.kind in ("one_hot", "soft") or target.by_unit
    shape = (len(labels), *target.positions, *([target.units] if vectors else []))
    if labels.size != np.prod(shape):
        raise ValueError(_no_kind(labels.shape, target.positions, target.units))
    labels = labels.reshape(shape)
    if counted is not None:
        where = counted[..., None] if vectors else counted
        labels = np.where(where, labels, np.eye(1, shape[-1])[0] if vectors else 0)
    _CHECKS[target.kind](labels, target)
    if target.kind == "continuous":
        return _binned(labels, target)
    ids = class_ids(labels, target.units, target.kind, target.from_logits)
    ids = keras.ops.convert_to_numpy(ids)
    return np.asarray(ids).reshape(
        shape if target.by_unit or not vectors else shape[:-1]
    )


def _check_whole(labels, target):
    limit = num_classes(target.units)
    flat = labels.reshape(-1)
    bad = (flat < 0) | (flat >= limit)
    if flat.dtype.kind == "f":
        bad |= ~np.isfinite(flat) | (flat != np.floor(flat))
    if np.any(bad):
        hint = ""
        if target.units == 1 and np.all(np.isfinite(flat)):
            hint = (
                ". For targets that are numbers pass `targets='continuous'`, or "
                "`targets='binary'` if all above 1/2 are a yes"
            )
        raise ValueError(
            f"The labels must be whole numbers in [0, {limit}) for a model with "
            f"{target.units} output unit(s). Received {int(bad.sum())} other "
            f"value(s), the first {flat[np.argmax(bad)]}{hint}"
        )


def _check_binary(labels, target):
    """0 and 1; -1 for a loss on margins; what lies between only where it is said."""
    margins = target.from_logits and np.all((labels == 1) | (labels == -1))
    smoothed = target.explicit and np.all((labels >= 0) & (labels <= 1))
    if margins or smoothed:
        return
    if target.kind == "binary":
        _check_whole(labels, target)
        return
    bad = ~((labels == 0) | (labels == 1))
    if np.any(bad):
        raise ValueError(
            "The labels of a model with several yes-or-no outputs must be 0 or 1. "
            f"Received {int(bad.sum())} other value(s), the first "
            f"{labels.reshape(-1)[np.argmax(bad)]}. Pass `targets='multi_label'` if a "
            "label above 1/2 is a yes, or `targets='continuous'` if they are numbers"
        )


def _check_one_hot(labels, target):
    _check_rows(
        *(labels, target, _is_one_hot(labels)),
        "one-hot: one 1 in each row, otherwise 0. For others pass `targets='soft'`, "
        "'multi_label' or 'continuous'",
    )


def _check_soft(labels, target):
    _check_rows(
        *(labels, target, _adds_up(labels)),
        "one-hot, or soft: shares that add up to 1 in each row. Where several classes "
        "may be true at once, compile with a binary cross-entropy, or pass "
        "`targets='multi_label'`",
    )


def _check_rows(labels, target, fits, expected):
    if not np.all(fits):
        row = int(np.argmin(fits.reshape(-1)))
        raise ValueError(
            f"Labels of shape {labels.shape} must be {expected}. "
            f"Received row {row}: {labels.reshape(-1, target.units)[row]}"
        )


def _check_continuous(labels, target):
    bad = ~np.isfinite(labels)
    if np.any(bad):
        raise ValueError(
            f"The targets must be finite. Received {int(bad.sum())} NaN or infinite "
            "value(s)"
        )


_CHECKS = {
    "sparse": _check_whole,
    "binary": _check_binary,
    "one_hot": _check_one_hot,
    "soft": _check_soft,
    "multi_label": _check_binary,
    "continuous": _check_continuous,
}


def _is_one_hot(labels):
    # A tolerance for labels that went through half precision.
    ones = (np.abs(labels - 1.0) < 1e-3).sum(axis=-1)
    zeros = (np.abs(labels) < 1e-3).sum(axis=-1)
    return (ones == 1) & (zeros == labels.shape[-1] - 1)


def _adds_up(rows):
    # The same for bfloat16.
    return np.all(rows >= 0, axis=-1) & (np.abs(rows.sum(axis=-1) - 1.0) < 0.02)


def _numbers(labels) -> np.ndarray:
    if keras.ops.is_tensor(labels):  # Which may be on another device.
        labels = keras.ops.convert_to_numpy(labels)
    labels = np.asarray(labels)
    if labels.dtype.kind not in "biuf":
        raise ValueError(
            "The labels must be numbers: class ids, one-hot vectors, or 0 and 1. "
            f"Received: labels of dtype {labels.dtype}"
        )
    return labels.astype("uint8") if labels.dtype == bool else labels


# --------------------------------------------------- questions, once all are known


def settled(target: Target, ids, counted, samples: float):
    """Target and class ids of a sample, where each unit is a question of its own.

    Units whose labels do not vary are left out, and continuous targets get their bins.

    Args:
        target: A `Target`.
        ids: What `checked_ids` gave for the sample.
        counted: Booleans of shape `(n, ...)`.
        samples: Effective number of samples, for the number of bins.

    Returns:
        The target, and ids of shape `(n, ..., columns)`; as they are for other kinds.
    """
    if not target.by_unit:
        return target, ids
    values = ids[counted]
    varies = np.any(values != values[:1], axis=0)
    columns = np.flatnonzero(varies)
    edges = spread = None
    if target.kind == "continuous":
        spread = values[:, columns].std(axis=0)
        bins = num_bins(samples)
        edges = [quantile_edges(values[:, column], bins) for column in columns]
    target = target._replace(columns=columns, edges=edges, spread=spread)
    ids = ids[..., columns]
    if edges is not None and len(columns) > 0:
        ids = _binned(ids, target)
    return target, ids


def quantile_edges(values, bins: int) -> np.ndarray:
    """Inner edges of at most `bins` bins of about equal numbers of values.

    Each lies half-way between two values that occur, so that equal values are in one
    bin and each bin has some.
    """
    ordered = np.sort(np.asarray(values, "float64"))
    at = ordered[np.arange(1, bins) * len(ordered) // bins]
    distinct = np.unique(ordered)
    above = np.unique(np.searchsorted(distinct, at))
    above = above[above > 0]
    if len(above) == 0:  # More than half have the lowest value.
        above = np.array([1])
    return (distinct[above - 1] + distinct[above]) / 2


def _binned(values, target):
    if target.edges is None:
        return np.asarray(values, "float64")
    ids = [
        np.searchsorted(edges, values[..., i]) for i, edges in enumerate(target.edges)
    ]
    return np.stack(ids, axis=-1).astype("int32")
