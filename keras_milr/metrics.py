"""Mutual information as a streaming metric."""

import keras
import numpy as np

from keras_milr import _keras, information, readouts, targets


@keras.saving.register_keras_serializable(package="keras_milr")
class MutualInformation(keras.metrics.Metric):
    """Mutual information of the predicted class and the label, in nats.

    Counts how often each class is predicted for each label, and computes the
    plug-in mutual information of that table, which is
    `sklearn.metrics.mutual_info_score(labels, predictions)`: 0 when predictions say
    nothing about the labels, the entropy of the labels (log K for K classes of equal
    size) when they settle them. It does not matter under which names classes are
    predicted, so this is not accuracy.

    The table is additive, so batches, `steps_per_execution` and `jit_compile` change
    nothing. It is exact while each count stays below 2^24. Sample weights are used
    in `weighted_metrics=`; `metrics=` ignore them, as always in Keras.

    The plug-in estimate lies about (K − 1)² / 2n nats too high, negligible over an
    epoch but not over a batch.

    Example:

    ```python
    model.compile(
        optimizer="adam",
        loss="sparse_categorical_crossentropy",
        metrics=[keras_milr.MutualInformation()],
    )
    stop = keras.callbacks.EarlyStopping(monitor="val_mutual_information", patience=3)
    model.fit(x, y, validation_split=0.2, callbacks=[stop])
    ```

    Args:
        name: (Optional) string name of the metric instance. Defaults to
            `"mutual_information"`.
        dtype: (Optional) data type of the metric result. The counts are always
            float32.
        from_logits: Whether a single output unit is a logit (threshold 0) rather than
            a probability (threshold 0.5). Without effect on two or more units. Defaults
            to `False`.
    """

    _direction = "up"  # Read by EarlyStopping, ModelCheckpoint, ReduceLROnPlateau.

    def __init__(self, name="mutual_information", dtype=None, from_logits=False):
        super().__init__(name=name, dtype=dtype)
        self.from_logits = from_logits
        self.counts = None

    def update_state(self, y_true, y_pred, sample_weight=None):
        """Adds a batch to the table.

        Args:
            y_true: Class ids of shape `(n,)` or `(n, 1)`, or one-hot labels of shape
                `(n, K)`. An id that is no class of the outputs is not counted.
            y_pred: Outputs of shape `(n, K)`, or `(n, 1)` for two classes.
            sample_weight: Optional weights of shape `(n,)` or `(n, 1)`.

        Raises:
            ValueError: for shapes that do not fit.
        """
        ops = keras.ops
        y_pred = ops.convert_to_tensor(y_pred)
        if len(y_pred.shape) == 1:
            y_pred = ops.expand_dims(y_pred, -1)
        if len(y_pred.shape) != 2 or y_pred.shape[-1] is None:
            raise ValueError(
                "MutualInformation expects outputs of shape (n, units). "
                f"Received: y_pred.shape={tuple(y_pred.shape)}"
            )
        units = y_pred.shape[-1]
        classes = targets.num_classes(units)
        if self.counts is None:
            self.counts = self.add_variable(
                shape=(classes + 1, classes),
                initializer="zeros",
                dtype="float32",
                name="counts",
            )
        elif self.counts.shape[1] != classes:
            raise ValueError(
                f"MutualInformation has counted {self.counts.shape[1]} classes so far. "
                f"Received: y_pred.shape={tuple(y_pred.shape)}"
            )
        if sample_weight is not None:
            sample_weight = ops.reshape(sample_weight, (-1,))
        ids = targets.class_ids(y_true, units)
        self.counts.assign_add(
            ops.cast(
                readouts.prediction_counts(
                    y_pred, ids, sample_weight, self.from_logits
                ),
                "float32",
            )
        )

    def result(self):
        """Mutual information of all batches since the last reset: a scalar, nats."""
        ops = keras.ops
        if self.counts is None:
            return ops.zeros((), self.dtype)
        nats = information.mutual_information(self.counts.value)
        return ops.cast(nats, self.dtype)

    def reset_state(self):
        if self.counts is not None:
            self.counts.assign(keras.ops.zeros(self.counts.shape, "float32"))

    def get_config(self):
        return {**super().get_config(), "from_logits": self.from_logits}


class MetricTable:
    """Reads information from the table of a `MutualInformation` metric in training.

    Args:
        model: A compiled `keras.Model`.
        monitor: Log key of the metric, `"val_"` in front for the validation data. None
            takes the only one there is: on the validation data where the first epoch
            has some before its reading, else on the training data.

    Raises:
        ValueError: where there is no such metric, or more than one.
    """

    def __init__(self, model, monitor=None):
        found = {
            m.name: m for m in _keras.metrics(model) if isinstance(m, MutualInformation)
        }
        if not found:
            raise ValueError(
                "MutualInformationLR has nothing to measure. Either pass "
                "`probe_data=(x_train, y_train)`, or compile the model with "
                "`metrics=[keras_milr.MutualInformation()]`. "
                "Received: probe_data=None and no MutualInformation metric"
            )
        keys = [prefix + name for name in found for prefix in ("", "val_")]
        ambiguous = monitor is None and len(found) > 1
        if ambiguous or monitor not in (None, *keys):
            raise ValueError(
                f"Argument `monitor` must be one of {keys}. Received: {monitor!r}"
            )
        self._validation = None if monitor is None else monitor not in found
        self._metric = found[
            next(iter(found)) if monitor is None else monitor.removeprefix("val_")
        ]
        self.begin_epoch()

    def begin_epoch(self):
        """To be called after Keras has reset its metrics for an epoch."""
        self._read = 0.0
        self._trained = None

    def begin_validation(self):
        """To be called before validation resets the metric."""
        self._trained = self._counts()

    def measure(self, epoch_ended: bool):
        """The information in what was counted since the last reading.

        Args:
            epoch_ended: Whether the epoch is over, and validated if it is to be.

        Returns:
            A `readouts.Information`; None in an epoch that was not validated, where
            the metric on the validation data is to be read.

        Raises:
            ValueError: where nothing was counted, or labels of one class only.
        """
        validated = self._trained is not None
        if self._validation is None:
            self._validation = validated
        if self._validation:
            if not (epoch_ended and validated):
                return None
            counts = self._counts()
        else:
            total = self._trained if epoch_ended and validated else self._counts()
            counts, self._read = total - self._read, total
        if np.count_nonzero(counts.sum(axis=0)) < 2:
            raise ValueError(
                f"The metric {self._metric.name!r} has counted labels of fewer than "
                "two classes since the last reading; nothing can be known of them. "
                f"Received: {counts.sum():g} sample(s)"
            )
        return readouts.from_counts(counts)

    def _counts(self):
        if self._metric.counts is None:
            raise ValueError(
                f"The metric {self._metric.name!r} has not been updated in training."
            )
        counts = keras.ops.convert_to_numpy(self._metric.counts.value)
        return counts.astype("float64")
