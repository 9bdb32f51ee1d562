"""The readout of a network's output."""

import math

import keras
import numpy as np

from keras_milr import information, targets
from keras_milr._arguments import check_bool
from keras_milr.readouts.result import Information


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
    if units == 1:
        ids = ops.cast(outputs[:, 0] > (0.0 if from_logits else 0.5), "int32")
    else:
        ids = ops.cast(ops.argmax(outputs, axis=-1), "int32")
    finite = ops.all(ops.isfinite(outputs), axis=-1)
    return ops.where(finite, ids, targets.num_classes(units))


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
        return {
            "counts": np.zeros((num_classes + 1, num_classes), "float32"),
            # −log p(label): its sum for each class, and the sum of its squares.
            "surprise": np.zeros(num_classes, "float32"),
            "surprise_squared": np.zeros((), "float32"),
            # Weight of rows whose finite outputs are no probabilities.
            "improper": np.zeros((), "float32"),
            # Of each output, as a probability, over the rows that are finite.
            "lowest": np.full(num_classes, np.inf, "float32"),
            "highest": np.full(num_classes, -np.inf, "float32"),
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
        surprise = ops.where(finite, -log_p, -math.log(keras.config.epsilon()))
        improper = ops.where(finite & ~proper, sample_weight, 0.0)
        classes = targets.num_classes(outputs.shape[-1])
        sums = {
            "counts": prediction_counts(
                outputs, class_ids, sample_weight, self.from_logits
            ),
            "surprise": ops.segment_sum(
                sample_weight * surprise, class_ids, num_segments=classes
            ),
            "surprise_squared": ops.sum(sample_weight * surprise**2),
            "improper": ops.sum(improper),
        }
        if self.from_logits:
            single = outputs.shape[-1] == 1
            outputs = ops.sigmoid(outputs) if single else ops.softmax(outputs)
        seen = (finite & (sample_weight > 0))[:, None]
        low = ops.min(ops.where(seen, outputs, np.inf), axis=0)
        high = ops.max(ops.where(seen, outputs, -np.inf), axis=0)
        return {name: ops.add(state[name], value) for name, value in sums.items()} | {
            "lowest": ops.minimum(state["lowest"], low),
            "highest": ops.maximum(state["highest"], high),
        }

    def finish(self, state: dict) -> Information:
        """The information in the batches that `state` has seen."""
        state = {
            name: keras.ops.convert_to_numpy(value).astype("float64")
            for name, value in state.items()
        }
        counts = state["counts"]
        total = counts.sum()
        bound = bound_stderr = cross_entropy = variation = float("nan")
        if np.all(state["lowest"] <= state["highest"]):
            variation = float(np.max(state["highest"] - state["lowest"]))
        if total > 0 and state["improper"] == 0:
            # H(Y) − CE is the mean over samples of log p(label | x) − log p(label).
            labels = counts.sum(axis=0)
            prior = -np.log(np.where(labels > 0, labels, total) / total)
            cross_entropy = float(state["surprise"].sum() / total)
            bound = prior @ labels / total - cross_entropy
            square = prior**2 @ labels - 2 * prior @ state["surprise"]
            square = (square + state["surprise_squared"]) / total
            bound_stderr = np.sqrt(max(square - bound**2, 0.0) / total)
        return from_counts(counts, bound, bound_stderr)._replace(
            cross_entropy=cross_entropy, variation=variation
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
        outputs = keras.ops.convert_to_tensor(outputs)
        units = outputs.shape[-1] if len(outputs.shape) == 2 else None
        if units is None or targets.num_classes(units) != num_classes:
            raise ValueError(
                f"Argument `outputs` must have shape (n, {num_classes}), or (n, 1) for "
                f"two classes. Received: outputs.shape={tuple(outputs.shape)}, "
                f"num_classes={num_classes}"
            )
        ids = targets.checked_class_ids(class_ids, units)
        if len(ids) != len(outputs):
            raise ValueError(
                "Arguments `outputs` and `class_ids` must have the same length. "
                f"Received: {len(outputs)} and {len(ids)}"
            )
        return self.finish(self.update(self.init(num_classes), outputs, ids))

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
    labels = counts.sum(axis=0)
    entropy = float(information.entropy(labels))
    raw = float(information.mutual_information(counts))
    result = Information(
        value=float(information.mutual_information(counts, "miller_madow")),
        raw=raw,
        entropy=entropy,
        null=float(information.null_level(counts)),
        stderr=float(information.standard_error(counts)),
        bound=float(np.clip(bound, 0.0, entropy)),
        bound_stderr=float(bound_stderr),
    )
    # By the classes in the labels, which stay the same in every reading; by those
    # predicted, the estimator would change in the middle of a training.
    if labels.sum() >= 5 * np.count_nonzero(labels) ** 2:
        return result
    if not np.isnan(bound):
        return result._replace(
            value=result.bound, stderr=result.bound_stderr, estimator="bound"
        )
    value, stderr = _fano(counts, entropy)
    return result._replace(value=value, stderr=stderr, estimator="fano")


def _fano(counts, entropy):
    """Fano's lower bound on the information, and its standard error (delta method)."""
    classes, samples = counts.shape[1], max(counts.sum(), 1.0)
    # Without a prediction nothing is known: up to log K is missing in such rows.
    none = counts[-1].sum() / samples
    error = 1.0 - np.trace(counts) / max(counts[:-1].sum(), 1.0)
    binary = float(information.entropy(np.array([error, 1.0 - error])))
    missing = binary + error * np.log(classes - 1)
    value = entropy - none * np.log(classes) - (1.0 - none) * missing
    inner = np.clip(error, 1.0 / samples, 1.0 - 1.0 / samples)
    slope = np.log((1.0 - inner) * (classes - 1) / inner)
    stderr = abs(slope) * np.sqrt(inner * (1.0 - inner) / samples)
    return float(np.clip(value, 0.0, entropy)), float(stderr)
