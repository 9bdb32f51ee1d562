"""A linear readout of a layer, on samples that it was not fitted to."""

import functools
import math

import keras
import numpy as np

from keras_milr import backend
from keras_milr._arguments import check_integer
from keras_milr.readouts import features as feature
from keras_milr.readouts.layer import LayerReadout
from keras_milr.readouts.predictions import Predictions

_CELLS = 4  # to which each axis of space or time is averaged
_RIDGE = 0.01  # as a share of the mean variance
# How far the readout's confidence may be lowered; at 0 it knows the classes' shares.
_TEMPERATURES = np.array([1.0, 0.7, 0.5, 0.35, 0.25, 0.15, 0.08, 0.0], "float32")


@keras.saving.register_keras_serializable(package="keras_milr")
class LinearReadout(LayerReadout):
    """Reads a layer: what a linear classifier gets out of it about the label.

    The samples are split in two halves, stratified by class. Linear discriminant
    analysis is fitted in closed form to one half and predicts the labels of the other,
    and the other way round; `Predictions` then measures the information in what was
    predicted. Since no sample is predicted by a readout that it was fitted to, the
    result is a lower bound of the layer's accessible information, about 0 where the
    labels have nothing to do with the activations, and comparable between layers and
    with the network's output.

    Space and time are averaged to at most 4 cells an axis, and more than `2 * sketch`
    features are summed at random to `sketch`. Features are standardised on the half
    that is fitted; their pooled covariance is shrunk towards its mean variance by as
    much as OAS finds right for their number, plus 1 percent. The confidence of both
    predictions together is lowered by one factor of eight, the one that suits the
    labels best: with few samples, discriminant analysis is too sure of itself, and
    H(Y) − CE would hide what is known. Chance alone reads up to .02 nats with 200
    samples and .1 with 20.

    A sample that has a feature which is not finite, or 1e15 and more, counts as no
    prediction. One that is merely far out spoils the fit of its half.

    It reads what a *new* readout could get out of the layer, so it does not see that
    the layers above no longer fit: a shift of the activations that spoils the network
    may leave the reading as it was.

    Example:

    ```python
    hidden = keras.Model(model.inputs, model.get_layer("hidden").output)
    readout = keras_milr.readouts.LinearReadout()
    info = readout.measure(hidden.predict(x), y, num_classes=10)
    print(info.accessible, "of", info.entropy, "nats")
    ```

    Args:
        sketch: Number of random sums that more than twice as many features are reduced
            to. Defaults to `256`.
        seed: Integer seed of these sums. Defaults to `0`.

    Reference:

    - [Chen et al., 2010](https://arxiv.org/abs/0907.4698), the shrinkage (OAS)
    """

    def __init__(self, sketch: int = 256, seed: int = 0):
        check_integer("sketch", sketch, at_least=1)
        check_integer("seed", seed, at_least=0)
        self.sketch = sketch
        self.seed = seed

    def features(self, activations):
        """What is kept of a batch: shape `(n, features)`. Pure; may be compiled.

        Args:
            activations: Tensor of shape `(n, ..., channels)`, or a list of them, all
                of which are read together.
        """
        pooled = feature.pooled(activations, _CELLS)
        return feature.widened(feature.sketched(pooled, self.sketch, self.seed))

    def get_config(self) -> dict:
        return {"sketch": self.sketch, "seed": self.seed}

    @classmethod
    def from_config(cls, config: dict) -> "LinearReadout":
        return cls(**config)

    def _prepared(self, class_ids, sample_weight, num_classes):
        order, middle = _halves(class_ids, sample_weight)
        labels = [
            keras.ops.convert_to_tensor(a)
            for a in (order, class_ids[order], sample_weight[order])
        ]
        readout = Predictions(from_logits=True)

        def read(features):
            return readout.finish(_compiled()(features, *labels, middle, num_classes))

        return read


def _halves(class_ids, weight) -> tuple[np.ndarray, int]:
    """The samples one half after the other, and where the second half begins.

    Every second sample of a class that has a weight is in the second.
    """
    second = np.zeros(len(class_ids), "bool")
    for class_id in np.unique(class_ids):
        (members,) = np.nonzero((class_ids == class_id) & (weight > 0))
        second[members[1::2]] = True
    order = np.argsort(second, kind="stable").astype("int32")
    return order, len(second) - int(second.sum())


@functools.cache
def _compiled():
    return backend.jit(_count_held_out, any_width=True)


def _count_held_out(features, order, class_ids, weight, middle, num_classes):
    """The state of a `Predictions` that has seen held-out predictions.

    `class_ids` and `weight` are in the order that `order` puts the features in: one
    half, then the other, which begins at the row `middle`.
    """
    ops = keras.ops
    features = ops.take(ops.cast(features, "float32"), order, axis=0)
    valid = ops.all(feature.finite(features), axis=-1)
    each = ops.expand_dims(valid, -1)
    features = ops.where(each, features, 0.0)
    counted = ops.where(each, ops.expand_dims(weight, -1), 0.0)
    one_hot = ops.one_hot(class_ids, num_classes, dtype="float32")
    parts = features, one_hot, counted
    halves = [[part[:middle] for part in parts], [part[middle:] for part in parts]]
    evidence, prior = [], []
    for (x, _, _), fitted in zip(halves, halves[::-1], strict=True):
        scores, log_shares = _discriminant(*fitted, x)
        evidence.append(scores)
        prior.append(ops.zeros_like(scores) + log_shares)
    evidence, prior = ops.concatenate(evidence), ops.concatenate(prior)

    weighted = one_hot * counted
    exists = ops.sum(weighted, axis=0) > 0
    prior = ops.where(exists, prior, -1e30)  # No class at all, in either half.

    def log_p_at(temperature):
        log_p = ops.log_softmax(temperature * evidence + prior, axis=-1)
        # As probabilities are clipped in `Predictions`: a single sample far out, on the
        # wrong side, must not cost more than all the others are worth.
        return ops.maximum(log_p, math.log(keras.config.epsilon()))

    def score(temperature):
        return ops.sum(log_p_at(temperature) * weighted)

    # One after the other: with thousands of classes each takes as much as all the rest.
    temperatures = ops.convert_to_tensor(_TEMPERATURES, "float32")
    scores = backend.in_turn(score, temperatures)
    logits = log_p_at(ops.take(temperatures, ops.argmax(scores), axis=0))
    logits = ops.where(each, logits, np.nan)  # Counted as no prediction.
    readout = Predictions(from_logits=True)
    return readout.update(readout.init(num_classes), logits, class_ids, weight)


def _discriminant(x, one_hot, weight, others):
    """Linear discriminant analysis, fitted to `x`.

    Args:
        x: Features, shape `(n, features)`.
        one_hot: Labels, `(n, K)`.
        weight: Weights, `(n, 1)`.
        others: Features of other samples.

    Returns:
        Log likelihood ratios of the classes for every row of `others`, `(n, K)`, up
        to a constant of the row, and the logarithm of the classes' shares, `(K,)`.
    """
    ops = keras.ops
    weighted = one_hot * weight
    counts = ops.sum(weighted, axis=0)
    total = ops.maximum(ops.sum(counts), 1e-6)
    mean = ops.sum(x * weight, axis=0) / total
    # Once more: a long sum is rounded, and a constant would seem to move.
    mean = mean + ops.sum((x - mean) * weight, axis=0) / total
    x = x - mean
    variance = ops.sum(x * x * weight, axis=0) / total
    # A unit that never moves, but for rounding, says nothing.
    moves = variance > 1e-10 * (mean * mean) + 1e-30
    scale = ops.where(moves, ops.rsqrt(ops.where(moves, variance, 1.0)), 0.0)
    x = x * scale

    class_means = ops.matmul(ops.transpose(weighted), x)
    class_means = class_means / ops.expand_dims(ops.maximum(counts, 1e-6), -1)
    residual = (x - ops.matmul(one_hot, class_means)) * ops.sqrt(weight)
    covariance = ops.matmul(ops.transpose(residual), residual) / total
    covariance = _shrunk(covariance, total, ops.sum(ops.cast(moves, "float32")))

    lower = ops.linalg.cholesky(covariance)
    half = ops.solve_triangular(lower, ops.transpose(class_means), lower=True)
    direction = ops.solve_triangular(ops.transpose(lower), half, lower=False)
    scores = ops.matmul((others - mean) * scale, direction)
    # A class that this half does not have counts as half a sample.
    shares = ops.maximum(counts, 0.5) / total
    return scores - 0.5 * ops.sum(half * half, axis=0), ops.log(shares)


def _shrunk(covariance, samples, width):
    """Oracle approximating shrinkage towards the mean variance, and the ridge.

    `width` is the number of units that move: the others, whose rows and columns are 0,
    must not lower the mean variance.
    """
    ops = keras.ops
    width = ops.maximum(width, 1.0)
    scale = ops.sum(ops.diagonal(covariance)) / width
    square = ops.sum(covariance * covariance) / (width * width)
    numerator = square + scale * scale
    denominator = (samples + 1.0) * (square - scale * scale / width)
    share = numerator / ops.maximum(denominator, 1e-12 * numerator + 1e-30)
    share = ops.minimum(share, 1.0)
    scale = ops.where(scale > 0, scale, 1.0)  # Nothing moves: any will do.
    # `eye` would have to know the width.
    diagonal = (share + _RIDGE) * scale * ops.diag(ops.ones_like(covariance[0]))
    return (1.0 - share) * covariance + diagonal
