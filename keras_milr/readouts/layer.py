"""What the readouts of layers have in common."""

import abc

import numpy as np

from keras_milr import targets
from keras_milr._arguments import check_integer, naming
from keras_milr.readouts.result import Information

_MOST_CLASSES = 46_340  # whose table has fewer cells than int32 can number


class LayerReadout(abc.ABC):
    """A readout of all samples at once, from a few numbers of each."""

    @abc.abstractmethod
    def features(self, activations):
        """What is kept of a batch: shape `(n, features)`. Pure; may be compiled."""

    @abc.abstractmethod
    def _prepared(self, class_ids, sample_weight, num_classes):
        """Function from checked features to an `Information`, for checked labels."""

    def read(
        self, features, class_ids, num_classes: int, sample_weight=None
    ) -> Information:
        """The information in the features of all samples; compiled.

        Args:
            features: Tensor of shape `(n, features)`; see `features`.
            class_ids: Integer ids in `[0, num_classes)`, shape `(n,)`, as NumPy.
            num_classes: K.
            sample_weight: Optional weights of shape `(n,)`, as NumPy.

        Returns:
            An `Information`, nats.

        Raises:
            ValueError: for shapes that do not fit and ids out of range.
        """
        return self.reader(class_ids, num_classes, sample_weight)(features)

    def reader(self, class_ids, num_classes: int, sample_weight=None):
        """`read` for several layers with the same labels, which are prepared once.

        Args:
            class_ids: See `read`; so are the others.
            num_classes: K.
            sample_weight: Optional weights.

        Returns:
            Function of the features of a layer that returns what `read` does.

        Raises:
            ValueError: for shapes that do not fit and ids out of range.
        """
        ids, weight = _checked_labels(class_ids, num_classes, sample_weight)
        read = self._prepared(ids, weight, int(num_classes))

        def checked(features):
            _check_features(features, len(ids))
            return read(features)

        return checked

    def measure(self, activations, class_ids, num_classes: int) -> Information:
        """Reads the activations of all samples: `features`, then `read`.

        Args:
            activations: Array of shape `(n, ..., channels)`, or a list of them.
            class_ids: Integer ids in `[0, num_classes)`, shape `(n,)`.
            num_classes: K.

        Returns:
            An `Information`, nats.

        Raises:
            ValueError: for shapes that do not fit and ids out of range.
        """
        return self.read(self.features(activations), class_ids, num_classes)


def _checked_labels(class_ids, num_classes, sample_weight=None):
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


def _check_features(features, samples: int):
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
