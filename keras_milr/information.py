"""Entropy and mutual information of tables of counts, in nats.

Counts are whole numbers of samples, or sums of sample weights. A function here
takes NumPy arrays and tensors alike. Whatever has a value is checked, computed in
float64 with NumPy and returned as NumPy; a tensor inside a trace (a `tf.function`, a
`jax.jit`), or a measurement on PyTorch, is computed in float32 where it is, and bad
values give NaN instead of an error.
"""

from typing import Any, Literal

import keras
import numpy as np
from scipy.special import digamma

from keras_milr._arguments import check_integer
from keras_milr.backend import class_sums, is_symbolic

Array = Any  # an array or a tensor of any backend
Correction = Literal["miller_madow", "grassberger"] | None

_CORRECTIONS = (None, "miller_madow", "grassberger")


def contingency(
    a: Array,
    b: Array,
    num_a: int,
    num_b: int,
    sample_weight: Array | None = None,
) -> Array:
    """Counts how often each pair of ids occurs.

    Args:
        a: Integer ids in `[0, num_a)`, shape `(n,)`.
        b: Integer ids in `[0, num_b)`, shape `(n,)`.
        num_a: Number of rows of the table.
        num_b: Number of columns of the table.
        sample_weight: Optional weights `>= 0`, shape `(n,)`. A sample of weight 2
            counts as two samples.

    Returns:
        The table, shape `(num_a, num_b)`: float64 NumPy, or a float32 tensor when
        an argument is a tensor inside a trace. Float32 counts are exact below 2^24.

    Raises:
        ValueError: for ids out of range, shapes that differ, and weights that are
            negative or not finite. In a trace such a sample is left out instead.
    """
    if any(_in_trace(v) for v in (a, b, sample_weight)):
        a, b = keras.ops.cast(a, "int32"), keras.ops.cast(b, "int32")
        b = keras.ops.where((a >= 0) & (a < num_a), b, -1)
        return counted(a, b, num_a, num_b, sample_weight)
    a, b = _ids(a, num_a, "a"), _ids(b, num_b, "b")
    num_a, num_b = int(num_a), int(num_b)  # Unsigned ones of NumPy make floats.
    if num_a * num_b > np.iinfo("int32").max:
        raise ValueError(
            "Arguments `num_a` and `num_b` must make fewer than 2^31 cells. "
            f"Received: num_a={num_a}, num_b={num_b}"
        )
    if a.shape != b.shape:
        raise ValueError(
            "Arguments `a` and `b` must have the same length. "
            f"Received: a.shape={a.shape}, b.shape={b.shape}"
        )
    if sample_weight is not None:
        sample_weight = _nonnegative(sample_weight, "sample_weight")
        if sample_weight.shape != a.shape:
            raise ValueError(
                "Argument `sample_weight` must have the shape of `a`. Received: "
                f"sample_weight.shape={sample_weight.shape}, a.shape={a.shape}"
            )
    cells = np.bincount(a * num_b + b, sample_weight, minlength=num_a * num_b)
    return cells.astype("float64").reshape(num_a, num_b)


def counted(a, b, num_a, num_b, sample_weight=None):
    """`contingency` of int32 tensors, in a trace or not, for `a` that are in range.

    A sample with a bad `b` or weight is left out.

    Returns:
        The table, a float32 tensor of shape `(num_a, num_b)`.
    """
    # Not `bincount`, which XLA compiles anew for all data, nor a matrix product, which
    # rounds weights at a low precision.
    ops = keras.ops
    inside = (b >= 0) & (b < num_b)
    if sample_weight is None:
        weight = ops.cast(inside, "float32")
    else:
        weight = ops.cast(sample_weight, "float32")
        inside = inside & (weight >= 0) & ops.isfinite(weight)
        weight = ops.where(inside, weight, 0.0)
    cells = ops.where(inside, a * num_b + b, 0)
    counts = class_sums(weight, cells, num_a * num_b)
    return ops.reshape(counts, (num_a, num_b))


def entropy(counts: Array, correction: Correction = None) -> Array:
    """Entropy of the distribution that each vector of counts was drawn from.

    Args:
        counts: Counts `>= 0`, shape `(..., K)`.
        correction: None for the plug-in estimate (biased downward), or
            `"miller_madow"` or `"grassberger"`; see `mutual_information`.

    Returns:
        Nats, shape `(...)`. An empty vector of counts has entropy 0.

    Raises:
        ValueError: for negative or non-finite counts.
    """
    xp, counts, valid = _prepare(counts, 1, correction)
    return xp.where(valid, _entropy(xp, counts, correction), np.nan)


def mutual_information(counts: Array, correction: Correction = None) -> Array:
    """Mutual information of the rows and the columns of each table of counts.

    Args:
        counts: Counts `>= 0`, shape `(..., R, S)`. Rows and columns may be empty.
        correction: How the bias of a finite sample is corrected.
            None: not at all. The plug-in estimate, which is
            `sklearn.metrics.mutual_info_score`, lies about
            `(R - 1)(S - 1) / 2n` nats too high.
            `"miller_madow"`: each entropy is raised by (occupied cells - 1) / 2n
            (Miller 1955).
            `"grassberger"`: `log` is replaced by a function of digammas
            (Grassberger 2003, arXiv:physics/0307138); for whole counts only.

    Returns:
        Nats, shape `(...)`, between 0 and the smaller of the two marginal (plug-in)
        entropies (within rounding, inside a trace). An empty table has 0.

    Raises:
        ValueError: for negative or non-finite counts, an unknown `correction`, and
            for `"grassberger"` with fractional counts or inside a trace.
    """
    xp, counts, valid = _prepare(counts, 2, correction)
    if correction is None and xp is not np:
        return xp.where(valid, plug_in(counts), np.nan)
    shape = counts.shape
    joint = xp.reshape(counts, (*shape[:-2], shape[-2] * shape[-1]))
    margins = _margins(xp, counts)
    plain = [_entropy(xp, one, None) for one in margins]
    corrected = plain
    if correction is not None:
        corrected = [_entropy(xp, one, correction) for one in margins]
    information = sum(corrected) - _entropy(xp, joint, correction)
    information = xp.minimum(xp.maximum(information, 0.0), xp.minimum(*plain))
    return xp.where(valid, information, np.nan)


def plug_in(counts):
    """`mutual_information` of float32 tensors, in a trace or not, that are counts.

    A metric computes it in every step: there is no check, nor a ceiling.
    """
    # The difference of entropies loses digits in float32 where that is small.
    joint, log_ratio = _log_ratio(keras.ops, counts)
    return keras.ops.maximum(keras.ops.sum(joint * log_ratio, axis=(-2, -1)), 0.0)


def fano(counts):
    """Fano's bound of float32 tensors, in a trace or not, that are counts.

    Args:
        counts: Shape `(3, K)`: for each label the right predictions, the wrong ones,
            and samples without a prediction.

    Returns:
        Nats, shape `()`.
    """
    ops = keras.ops
    entropy = _entropy(ops, ops.sum(counts, axis=0), None)
    right, wrong, none = (ops.sum(counts[i]) for i in range(3))
    error = wrong / _samples(ops, right + wrong)
    missing = none / _samples(ops, right + wrong + none)
    return fano_bound(entropy, error, missing, counts.shape[-1])


def fano_bound(entropy, error, missing, classes):
    """Fano's lower bound on the mutual information of predictions and labels.

    Args:
        entropy: H(Y) of the labels, nats, shape `(...)`; so are the others.
        error: Share of the predictions that are wrong.
        missing: Share of the samples that have no prediction.
        classes: Number of classes, as NumPy or a Python number.

    Returns:
        Nats, shape `(...)`, between 0 and `entropy`.
    """
    xp = keras.ops if keras.ops.is_tensor(error) else np
    binary = _entropy(xp, xp.stack([error, 1.0 - error], axis=-1), None)
    unknown = binary + error * np.log(classes - 1)
    # Without a prediction nothing is known, of up to log K.
    unknown = missing * np.log(classes) + (1.0 - missing) * unknown
    return xp.minimum(xp.maximum(entropy - unknown, 0.0), entropy)


def null_level(counts: Array) -> Array:
    """Plug-in mutual information to expect when rows and columns are independent.

    Under independence `2 n I` follows about a chi-squared distribution with
    (occupied rows - 1)(occupied columns - 1) degrees of freedom (Wilks); this is its
    mean. Reliable while there are five samples or more to a cell; with fewer it is
    too high, and it is capped where the information itself is.

    Args:
        counts: Counts `>= 0`, shape `(..., R, S)`.

    Returns:
        Nats, shape `(...)`.

    Raises:
        ValueError: for negative or non-finite counts.
    """
    xp, counts, valid = _prepare(counts, 2, None)
    rows, columns = _margins(xp, counts)
    freedom = xp.maximum(_occupied(xp, rows) - 1.0, 0.0) * xp.maximum(
        _occupied(xp, columns) - 1.0, 0.0
    )
    null = freedom / (2.0 * _samples(xp, xp.sum(rows, axis=-1)))
    ceiling = xp.minimum(_entropy(xp, rows, None), _entropy(xp, columns, None))
    return xp.where(valid, xp.minimum(null, ceiling), np.nan)


def standard_error(counts: Array) -> Array:
    """Standard error of the plug-in mutual information, by the delta method.

    The standard deviation over samples of log(p(a, b) / p(a)p(b)), divided by the
    square root of their number. It is the error of one reading: two readings of
    the same samples differ by less than their errors suggest.

    Of samples drawn independently, the Miller–Madow estimate ± 1.96 errors holds the
    truth 92–98 % of times where five are expected in each cell that can have any, and
    the information is above twice its null level. Elsewhere, by
    `tests/test_statistics.py`:

    - With rarer cells, as late in a training, the error is up to a third too small and
      the estimate too high: with 10 classes, 2,048 samples and 1 % of errors
      everywhere, .012 nats, and 73 % hold the truth; with 20 classes, 2,000 samples
      and 5 %, .056 nats and 32 %.
    - Where there is next to no information the error is too large.
    - It is too large too where the labels have fixed shares that are not even, as in a
      stratified sample.

    Args:
        counts: Counts `>= 0`, shape `(..., R, S)`.

    Returns:
        Nats, shape `(...)`. An empty table has 0.

    Raises:
        ValueError: for negative or non-finite counts.
    """
    xp, counts, valid = _prepare(counts, 2, None)
    samples = _samples(xp, xp.sum(counts, axis=(-2, -1)))
    joint, log_ratio = _log_ratio(xp, counts)
    mean = xp.sum(joint * log_ratio, axis=(-2, -1), keepdims=True)
    variance = xp.sum(joint * (log_ratio - mean) ** 2, axis=(-2, -1))
    return xp.where(valid, xp.sqrt(variance / samples), np.nan)


def _margins(xp, counts):
    """Sums of the rows and of the columns of each table."""
    if xp is np:  # `sum` takes four times as long over short axes.
        return np.einsum("...rs->...r", counts), np.einsum("...rs->...s", counts)
    return xp.sum(counts, axis=-1), xp.sum(counts, axis=-2)


def _log_ratio(xp, counts):
    """p(a, b), and log(p(a, b) / p(a)p(b)), 0 where the cell is empty."""
    samples = _samples(xp, xp.sum(counts, axis=(-2, -1), keepdims=True))
    joint = counts / samples  # A product of counts may overflow.
    rows = xp.sum(joint, axis=-1, keepdims=True)
    columns = xp.sum(joint, axis=-2, keepdims=True)
    ratio = joint / xp.maximum(rows * columns, _tiny(xp))
    # Of a share that is rounded to 0, the count is not.
    return joint, xp.log(xp.where(joint > 0, ratio, 1.0))


def _tiny(xp):
    return np.finfo("float64" if xp is np else "float32").tiny


def _entropy(xp, counts, correction):
    total = xp.sum(counts, axis=-1)
    if correction == "grassberger":
        # G(n) of Grassberger (2003), Eq. 30, in closed form.
        log = np.where(counts > 0, digamma(counts // 2 + 0.5) + np.log(2.0), 0.0)
    else:
        log = xp.log(xp.maximum(counts, _tiny(xp)))  # Times 0 where there are none.
    samples = _samples(xp, total)
    result = xp.log(samples) - xp.sum(counts * log, axis=-1) / samples
    if correction == "miller_madow":
        missing = (_occupied(xp, counts) - 1.0) / (2.0 * samples)
        result = result + xp.where(total > 0, missing, 0.0)
    return result


def _samples(xp, total):
    """Divisor for a table with `total` samples: 1 where it is empty."""
    return xp.where(total > 0, total, 1.0)


def _occupied(xp, counts):
    return xp.sum(xp.where(counts > 0, 1.0, 0.0), axis=-1)


def _prepare(counts, rank, correction):
    """The namespace to compute in, the counts in it, and whether they are valid."""
    if not isinstance(correction, str | None) or correction not in _CORRECTIONS:
        raise ValueError(
            f"Argument `correction` must be one of {_CORRECTIONS}. "
            f"Received: correction={correction!r}"
        )
    axes = tuple(range(-rank, 0))
    if _in_trace(counts):
        if correction == "grassberger":
            raise ValueError(
                "`correction='grassberger'` needs counts with a value; inside a "
                "compiled function use 'miller_madow'."
            )
        ops = keras.ops
        counts = ops.cast(counts, "float32")
        _check_rank(counts, rank)
        return ops, counts, ops.all((counts >= 0) & ops.isfinite(counts), axis=axes)
    counts = _nonnegative(counts, "counts")
    _check_rank(counts, rank)
    if correction == "grassberger" and np.any(counts != np.floor(counts)):
        raise ValueError(
            "`correction='grassberger'` needs whole counts. Received fractional "
            "counts (sample weights?); use 'miller_madow'."
        )
    return np, counts, True


def _check_rank(counts, rank):
    if len(counts.shape) < rank:
        raise ValueError(
            f"Argument `counts` must have at least {rank} dimension(s). "
            f"Received: counts.shape={tuple(counts.shape)}"
        )


def _in_trace(x):
    return keras.ops.is_tensor(x) and is_symbolic(x)


def _to_numpy(x, name):
    if keras.ops.is_tensor(x):
        return keras.ops.convert_to_numpy(x)
    try:
        return np.asarray(x)
    except ValueError as error:  # A ragged list.
        raise ValueError(
            f"Argument `{name}` must be an array. Received: {name}={x!r}"
        ) from error


def _nonnegative(x, name):
    x = _to_numpy(x, name)
    if x.dtype.kind not in "biuf":
        raise ValueError(
            f"Argument `{name}` must hold real numbers. Received: dtype={x.dtype}"
        )
    x = x.astype("float64")
    if not np.all(np.isfinite(x)) or np.any(x < 0):
        bad = x[~(np.isfinite(x) & (x >= 0))]
        raise ValueError(
            f"Argument `{name}` must be finite and not negative. "
            f"Received {bad.size} bad value(s), the first {bad.flat[0]}"
        )
    return x


def _ids(x, num, name):
    check_integer(f"num_{name}", num, at_least=1)
    x = _to_numpy(x, name)
    if x.size == 0:
        x = np.zeros(x.shape, "int64")
    if x.ndim != 1 or x.dtype.kind not in "biu":
        raise ValueError(
            f"Argument `{name}` must be a vector of integer ids. "
            f"Received: shape={x.shape}, dtype={x.dtype}"
        )
    x = x.astype("int64")
    if x.size and (x.min() < 0 or x.max() >= num):
        raise ValueError(
            f"Argument `{name}` must hold ids in [0, {num}). "
            f"Received ids from {x.min()} to {x.max()}"
        )
    return x
