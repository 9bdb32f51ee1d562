"""The readout of a network's output."""

import math

import keras
import numpy as np

from keras_milr import information, targets
from keras_milr._arguments import as_array, check_bool, check_integer, naming
from keras_milr.backend import argmax, class_sums, to_numpy
from keras_milr.readouts.result import Information, separate

_MOST_SURPRISE = 1e15  # nats


def predicted_class(outputs, from_logits: bool = False):
    """The class that each row of outputs stands for.

    Args:
        outputs: Tensor of shape `(n, K)`, or `(n, 1)` for two classes.
        from_logits: Whether a single output is a logit (threshold 0) rather than a
            probability (threshold 0.5).

    Returns:
        int32 ids of shape `(n,)` in `[0, K]`. The last id, K, is "no prediction": the
        row has an output that is not finite.
    """
    ops = keras.ops
    outputs = ops.cast(outputs, "float32")
    units = outputs.shape[-1]
    if units > 1:
        finite = ops.all(ops.isfinite(outputs), axis=-1)
        return ops.where(finite, argmax(outputs), units)
    single = outputs[:, 0]
    ids = ops.cast(single > (0.0 if from_logits else 0.5), "int32")
    return ops.where(ops.isfinite(single), ids, 2)


def prediction_counts(outputs, class_ids, sample_weight=None, from_logits=False):
    """The table of (predicted class, label) for a batch of outputs.

    Args:
        outputs: Tensor of shape `(n, K)`, or `(n, 1)` for two classes.
        class_ids: Labels as ids, shape `(n,)`.
        sample_weight: Optional weights of shape `(n,)`.
        from_logits: See `predicted_class`.

    Returns:
        Counts of shape `(K + 1, K)`; the last row counts rows without a prediction.
    """
    classes = targets.num_classes(outputs.shape[-1])
    predictions = predicted_class(outputs, from_logits)
    return information.contingency(
        predictions, class_ids, classes + 1, classes, sample_weight
    )


@keras.saving.register_keras_serializable(package="keras_milr")
class Predictions:
    """Reads a network's output: the predicted class against the label.

    Measures two lower bounds of the accessible information in one pass: the mutual
    information of (prediction, label), from their table of counts, and
    H(Y) − CE, from the predicted probabilities. `Information.value` is the first,
    with the Miller–Madow correction, when there are at least 5 samples for each cell
    of the classes that occur in the labels (n ≥ 5 K²). With fewer, counts are mostly
    bias: `value` is then the second, or, without probabilities, Fano's bound
    H(Y) − h(e) − e log(K − 1) from the error rate e. `Information.estimator` says
    which.

    H(Y) is that of the sample. Where its labels are drawn at random it is about
    (K − 1) / 2n below that of the population, and so are both bounds, which matters
    with hundreds of classes; a stratified sample, such as the probe, has its shares.

    Example:

    ```python
    readout = keras_milr.readouts.Predictions()
    info = readout.measure(model.predict(x), y, num_classes=10)
    print(info.value, "of", info.entropy, "nats")
    ```

    Args:
        from_logits: Whether the outputs are logits instead of probabilities.
            Defaults to `False`. The callback reads it off the compiled loss.
    """

    def __init__(self, from_logits: bool = False):
        check_bool("from_logits", from_logits)
        self.from_logits = from_logits

    def init(self, num_classes: int) -> dict:
        """The state before the first batch, for labels of `num_classes` classes."""
        if num_classes <= targets.MANY:
            counts = {"counts": np.zeros((num_classes + 1, num_classes), "float32")}
        else:
            # A table would take gigabytes, and no sample is large enough to fill it.
            counts = {
                "labels": np.zeros(num_classes, "float32"),
                "correct": np.zeros(num_classes, "float32"),
                "none": np.zeros(num_classes, "float32"),
            }
        return counts | {
            # −log p(label): its sum for each class, and the sum of its squares.
            "surprise": np.zeros(num_classes, "float32"),
            "surprise_squared": np.zeros((), "float32"),
            # Weight of rows whose finite outputs are no probabilities.
            "improper": np.zeros((), "float32"),
            # Of each output, as a probability, over the rows that are finite.
            "lowest": np.full(num_classes, np.inf, "float32"),
            "highest": np.full(num_classes, -np.inf, "float32"),
            # Weight of rows that have the same outputs as the row before.
            "repeated": np.zeros((), "float32"),
        }

    def update(self, state: dict, outputs, class_ids, sample_weight=None) -> dict:
        """Adds a batch. Pure; may be compiled.

        Args:
            state: What `init` or the last `update` returned.
            outputs: Tensor of shape `(n, K)`, or `(n, 1)` for two classes.
            class_ids: Ids in `[0, K)`, shape `(n,)`.
            sample_weight: Optional weights of shape `(n,)`.

        Returns:
            The new state.

        Raises:
            ValueError: for outputs of another shape.
        """
        ops = keras.ops
        class_ids = ops.convert_to_tensor(class_ids, "int32")
        # float32 under mixed precision too: half precision cannot count.
        outputs = ops.cast(outputs, "float32")
        if len(outputs.shape) != 2:
            raise ValueError(
                "`Predictions` reads outputs of shape (n, units). "
                f"Received: outputs of shape {tuple(outputs.shape)}"
            )
        if sample_weight is None:
            sample_weight = ops.ones(ops.shape(outputs)[0], "float32")
        sample_weight = ops.cast(sample_weight, "float32")
        finite = ops.all(ops.isfinite(outputs), axis=-1)
        log_p, proper = self._log_probability(outputs, class_ids)
        # A row that is not finite says nothing, at the price of the worst guess.
        # Logits have no limit, and the square of a float32 has one.
        surprise = ops.minimum(-log_p, _MOST_SURPRISE)
        surprise = ops.where(finite, surprise, -math.log(keras.config.epsilon()))
        improper = ops.where(finite & ~proper, sample_weight, 0.0)
        classes = targets.num_classes(outputs.shape[-1])
        sums = self._counts(state, outputs, class_ids, sample_weight) | {
            "surprise": class_sums(sample_weight * surprise, class_ids, classes),
            "surprise_squared": ops.sum(sample_weight * surprise**2),
            "improper": ops.sum(improper),
        }
        if self.from_logits:
            single = outputs.shape[-1] == 1
            outputs = ops.sigmoid(outputs) if single else ops.softmax(outputs)
        sums["repeated"] = repeated(outputs, sample_weight)
        seen = (finite & (sample_weight > 0))[:, None]
        low = ops.min(ops.where(seen, outputs, np.inf), axis=0)
        high = ops.max(ops.where(seen, outputs, -np.inf), axis=0)
        return {name: ops.add(state[name], value) for name, value in sums.items()} | {
            "lowest": ops.minimum(state["lowest"], low),
            "highest": ops.maximum(state["highest"], high),
        }

    def finish(self, state: dict, scale: float = 1.0, shares=None) -> Information:
        """The information in the batches that `state` has seen.

        Args:
            state: What the last `update` returned.
            scale: What weights are multiplied with, so that they add up to the number
                of samples that are independent. Defaults to `1`.
            shares: Shares of the classes, for H(Y), where these samples are too few to
                tell. Defaults to `None`: as in the samples.
        """
        state = scaled(state, scale)
        labels = tally(state)[0]
        if shares is None:
            shares = labels / max(labels.sum(), 1e-30)
        prior = -np.log(np.where(labels > 0, shares, 1.0))
        bound, bound_stderr, cross_entropy = h_minus_ce(
            labels,
            prior,
            *(state[name] for name in ("surprise", "surprise_squared", "improper")),
        )
        variation = float("nan")
        if np.all(state["lowest"] <= state["highest"]):
            variation = float(np.max(state["highest"] - state["lowest"]))
        if "counts" in state:
            info = from_counts(state["counts"], bound, bound_stderr)
        else:
            info = _without_table(*tally(state), prior, bound, bound_stderr)
        return info._replace(
            cross_entropy=float(cross_entropy),
            variation=variation,
            repeated=float(state["repeated"]) / max(float(labels.sum()), 1e-30),
        )

    def measure(self, outputs, class_ids, num_classes: int) -> Information:
        """Reads all samples at once: `init`, one `update`, `finish`.

        Args:
            outputs: Array of shape `(n, K)`, or `(n, 1)` for two classes.
            class_ids: Integer ids in `[0, num_classes)`, shape `(n,)`.
            num_classes: K.

        Returns:
            An `Information`, nats.

        Raises:
            ValueError: for shapes that do not fit and ids out of range.
        """
        check_integer("num_classes", num_classes, at_least=2)
        outputs = keras.ops.convert_to_tensor(as_array("outputs", outputs))
        units = outputs.shape[-1] if len(outputs.shape) == 2 else None
        if not units or targets.num_classes(units) != num_classes:
            raise ValueError(
                f"Argument `outputs` must have shape (n, {num_classes}), or (n, 1) for "
                f"two classes. Received: outputs.shape={tuple(outputs.shape)}, "
                f"num_classes={num_classes}"
            )
        with naming("class_ids"):
            ids = targets.checked_class_ids(class_ids, units)
        if len(ids) != len(outputs):
            raise ValueError(
                "Arguments `outputs` and `class_ids` must have the same length. "
                f"Received: {len(outputs)} and {len(ids)}"
            )
        return self.finish(self.update(self.init(num_classes), outputs, ids))

    def _counts(self, state, outputs, class_ids, sample_weight):
        if "counts" in state:
            counts = prediction_counts(
                outputs, class_ids, sample_weight, self.from_logits
            )
            return {"counts": counts}
        ops = keras.ops
        classes = targets.num_classes(outputs.shape[-1])
        predicted = predicted_class(outputs, self.from_logits)
        weights = {
            "labels": sample_weight,
            "correct": ops.where(predicted == class_ids, sample_weight, 0.0),
            "none": ops.where(predicted == classes, sample_weight, 0.0),
        }
        return {
            name: class_sums(weight, class_ids, classes)
            for name, weight in weights.items()
        }

    def _log_probability(self, outputs, class_ids):
        """log p(label), and whether the row is a probability distribution."""
        ops = keras.ops
        label = ops.cast(class_ids, "int32")
        if outputs.shape[-1] == 1:
            single = outputs[:, 0]
            if self.from_logits:
                log_p = ops.log_sigmoid(ops.where(label == 1, single, -single))
                return log_p, ops.ones_like(log_p, dtype="bool")
            p = ops.where(label == 1, single, 1.0 - single)
            proper = (single >= 0.0) & (single <= 1.0)
        else:
            chosen = ops.expand_dims(label, -1)
            if self.from_logits:
                log_p = ops.log_softmax(outputs, axis=-1)
                log_p = ops.take_along_axis(log_p, chosen, axis=-1)[:, 0]
                return log_p, ops.ones_like(log_p, dtype="bool")
            total = ops.sum(outputs, axis=-1)
            # Probabilities in bfloat16 add up to 1 within a few percent.
            proper = ops.all(outputs >= 0.0, axis=-1) & (ops.abs(total - 1.0) < 0.05)
            p = ops.take_along_axis(outputs, chosen, axis=-1)[:, 0]
            p = p / ops.where(proper, total, 1.0)
        # Clipped as Keras' own cross-entropies are.
        epsilon = keras.config.epsilon()
        return ops.log(ops.clip(p, epsilon, 1.0 - epsilon)), proper

    def get_config(self) -> dict:
        return {"from_logits": self.from_logits}

    @classmethod
    def from_config(cls, config: dict) -> "Predictions":
        return cls(**config)


def repeated(outputs, sample_weight):
    """Weight of the rows that have the outputs of the row before, within 1e-6.

    Rows of zeros and ones do not count: of samples that a network is sure of, such as
    the easy ones of a frequent class, it says the same.
    """
    ops = keras.ops
    step = ops.max(ops.abs(outputs - ops.roll(outputs, 1, axis=0)), axis=-1)
    doubt = ops.minimum(ops.abs(outputs), ops.abs(1.0 - outputs))
    same = (step < 1e-6) & (ops.max(doubt, axis=-1) > 1e-5)
    same &= ops.arange(ops.shape(outputs)[0], dtype="int32") > 0
    return ops.sum(ops.where(same, sample_weight, 0.0))


def from_counts(counts, bound=float("nan"), bound_stderr=float("nan")) -> Information:
    """The information in a table of (prediction, label).

    Args:
        counts: Table of shape `(K + 1, K)`: see `prediction_counts`.
        bound: H(Y) − CE of the same samples, nats, where it is known.
        bound_stderr: Its standard error.

    Returns:
        An `Information`. Its `value` comes from the counts, from `bound` or from the
        error rate, as the docstring of `Predictions` says.
    """
    return separate(from_tables(counts[None], counts.shape[-1], bound, bound_stderr))[0]


def from_tables(
    counts, classes, bound=float("nan"), bound_stderr=float("nan")
) -> Information:
    """`from_counts` for many tables at once.

    Args:
        counts: Tables of shape `(m, K + 1, K)`.
        classes: How many of the K each of them is about, shape `(m,)` or a number. The
            rows and columns of others are 0.
        bound: See `from_counts`, shape `(m,)` or a number.
        bound_stderr: The same.

    Returns:
        An `Information` of arrays of shape `(m,)`, or of shapes that go with it.
    """
    labels = counts.sum(axis=-2)
    entropy = information.entropy(labels)
    result = Information(
        value=information.mutual_information(counts, "miller_madow"),
        raw=information.mutual_information(counts),
        entropy=entropy,
        null=information.null_level(counts),
        stderr=information.standard_error(counts),
        bound=np.clip(bound, 0.0, entropy),
        bound_stderr=bound_stderr,
        attainable=attainable(counts),
    )
    # By the classes in the labels, which stay the same in every reading; by those
    # predicted, the estimator would change in the middle of a training. Sums of
    # weights are rounded.
    least = 5 * np.count_nonzero(labels, axis=-1) ** 2
    enough = labels.sum(axis=-1) * (1 + 1e-6) >= least
    correct = np.diagonal(counts, axis1=-2, axis2=-1)
    other = _by_bound(result, labels, correct, counts[:, -1], classes)
    fields = ("value", "stderr", "estimator")
    chosen = {
        name: np.where(enough, getattr(result, name), getattr(other, name))
        for name in fields
    }
    return result._replace(**chosen)


def hit_counts(outputs, class_ids, sample_weight=None):
    """How often each class is predicted where it is the label.

    What is kept of the table of (predicted class, label) where that is too large.

    Args:
        outputs: Tensor of shape `(n, K)`, K at least 2.
        class_ids: Labels as int32 ids, shape `(n,)`. What is out of range is left out.
        sample_weight: Optional weights of shape `(n,)`.

    Returns:
        Counts of shape `(3, K)`, a float32 tensor: for each label the right
        predictions, the wrong ones, and rows without a prediction.
    """
    ops = keras.ops
    classes = outputs.shape[-1]
    predicted = predicted_class(outputs)
    kind = ops.where(predicted == class_ids, 0, 1)
    kind = ops.cast(ops.where(predicted == classes, 2, kind), "int32")
    return information.counted(kind, class_ids, 3, classes, sample_weight)


def from_hits(counts) -> Information:
    """The information in what `hit_counts` has counted: Fano's bound."""
    labels = counts.sum(axis=0)
    shares = labels / max(labels.sum(), 1e-30)
    prior = -np.log(np.where(labels > 0, shares, 1.0))
    nan = float("nan")
    return _without_table(labels, counts[0], counts[2], prior, nan, nan)


def attainable(counts) -> np.ndarray:
    """What would be known if every class were predicted as surely as the surest.

    Of labels with noise not even a perfect predictor knows H(Y), and what will not be
    known looks like what has still to be learned. But some classes are learned soon,
    and how often their predictions are right shows the noise. With q the share of the
    predictions of a class that are right, and p its share of the labels:

        max over classes of  q log(q / p) + (1 − q) log((1 − q) / (1 − p)),

    at most H(Y). One more prediction counts as right, so that nothing is held against a
    class that is hardly predicted yet. The formula is our own; it takes errors to fall
    on the other classes by their shares, and noise to be alike in all classes.

    Args:
        counts: Tables of shape `(..., K + 1, K)`: see `prediction_counts`.

    Returns:
        Nats, shape `(...)`.
    """
    labels = counts.sum(axis=-2)
    total = labels.sum(axis=-1, keepdims=True)
    here = (labels > 0) & (labels < total)
    share = np.where(here, labels / np.maximum(total, 1e-30), 0.5)
    right = np.diagonal(counts, axis1=-2, axis2=-1) + 1.0
    right = right / (counts[..., :-1, :].sum(axis=-1) + 1.0)
    wrong = np.maximum(1.0 - right, 1e-30)
    known = right * np.log(right / share) + wrong * np.log(wrong / (1.0 - share))
    most = np.max(known, axis=-1, initial=0.0, where=here & (right > share))
    return np.minimum(most, information.entropy(labels))


def _without_table(labels, correct, none, prior, bound, bound_stderr) -> Information:
    """`from_counts` for so many classes that there is no table.

    Args:
        labels: Weights of the labels of each class, shape `(K,)`.
        correct: Those of correct predictions, the same.
        none: Those of rows without a prediction, the same.
        prior: −log of the share of each class in all data, the same.
        bound: H(Y) − CE, nats, or NaN.
        bound_stderr: Its standard error.
    """
    nan, entropy = float("nan"), float(prior @ labels / max(labels.sum(), 1e-30))
    result = Information(
        value=nan,
        raw=nan,
        entropy=entropy,
        null=nan,
        stderr=nan,
        bound=float(np.clip(bound, 0.0, entropy)),
        bound_stderr=float(bound_stderr),
    )
    rows = (a[None] for a in (labels, correct, none))
    return separate(_by_bound(result, *rows, len(labels)))[0]


def _by_bound(result, labels, correct, none, classes) -> Information:
    """With the bound H(Y) − CE as its `value`, or Fano's where there is none."""
    value, stderr = _fano(labels, correct, none, result.entropy, classes)
    known = ~np.isnan(result.bound)
    return result._replace(
        value=np.where(known, result.bound, value),
        stderr=np.where(known, result.bound_stderr, stderr),
        estimator=np.where(known, "bound", "fano"),
    )


def _fano(labels, correct, none, entropy, classes):
    """Fano's lower bound on the information, and its standard error (delta method).

    Args:
        labels: Weights of the labels of each class, shape `(m, K)`.
        correct: Those of correct predictions, the same.
        none: Those of rows without a prediction, the same.
        entropy: H(Y), shape `(m,)` or a number.
        classes: Number of classes, the same.
    """
    # Sums of weights may be below 1.
    total = np.maximum(labels.sum(axis=-1), 1e-30)
    predicted = labels - none
    error = correct.sum(axis=-1) / np.maximum(predicted.sum(axis=-1), 1e-30)
    error = np.clip(1.0 - error, 0.0, 1.0)
    value = information.fano_bound(entropy, error, none.sum(axis=-1) / total, classes)
    samples = np.maximum(total, 1.0)
    least = np.minimum(1.0 / samples, 0.5)
    inner = np.clip(error, least, 1.0 - least)
    slope = np.log((1.0 - inner) * (classes - 1) / inner)
    # H(Y) varies with the sample too, and with its errors where they are in some
    # classes more than in others.
    labels, wrong = (a / total[:, None] for a in (labels, predicted - correct))
    surprise = -np.log(np.where(labels > 0, labels, 1.0))
    surprise = surprise - np.reshape(entropy, (-1, 1))
    variance = slope**2 * inner * (1.0 - inner) + np.sum(labels * surprise**2, axis=-1)
    variance -= 2.0 * slope * np.sum(wrong * surprise, axis=-1)
    return value, np.sqrt(np.maximum(variance, 0.0) / samples)


def h_minus_ce(labels, prior, surprise, surprise_squared, improper):
    """H(Y) − CE, its standard error, and CE; NaN where outputs are improper.

    Args:
        labels: Weights of the labels of each class, shape `(..., K)`.
        prior: −log of the share of each class, 0 for one without labels, the same.
        surprise: Sums of −log p(label) for each class, the same.
        surprise_squared: Sum of its squares, shape `(...)`.
        improper: Weight of the rows whose finite outputs are no probabilities, the
            same.
    """
    total = labels.sum(axis=-1)
    known = (total > 0) & (improper == 0)
    total = np.where(total > 0, total, 1.0)
    # H(Y) − CE is the mean over samples of log p(label | x) − log p(label).
    cross_entropy = surprise.sum(axis=-1) / total
    bound = np.sum(prior * labels, axis=-1) / total - cross_entropy
    square = np.sum(prior**2 * labels - 2 * prior * surprise, axis=-1)
    square = (square + surprise_squared) / total
    stderr = np.sqrt(np.maximum(square - bound**2, 0.0) / total)
    return tuple(np.where(known, a, np.nan) for a in (bound, stderr, cross_entropy))


def scaled(state: dict, scale: float = 1.0) -> dict:
    """A state as float64 NumPy, as if all weights had been multiplied by `scale`."""
    extremes = ("lowest", "highest")
    return {
        name: value.astype("float64") * (1.0 if name in extremes else scale)
        for name, value in to_numpy(state).items()
    }


def tally(state: dict):
    """For each class the weights of all its rows, the correct, those not predicted."""
    if "counts" not in state:
        return state["labels"], state["correct"], state["none"]
    counts = state["counts"]
    correct = np.diagonal(counts, axis1=-2, axis2=-1)
    return counts.sum(axis=-2), correct, counts[..., -1, :]
