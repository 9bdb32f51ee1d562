"""Mutual information as a streaming metric."""

import warnings

import keras
import numpy as np

from keras_milr import _keras, information, readouts, targets
from keras_milr._arguments import as_array, check_bool, naming


@keras.saving.register_keras_serializable(package="keras_milr")
class MutualInformation(_keras.IncreasingMetric):
    """Mutual information of the predicted class and the label, in nats.

    Counts how often each class is predicted for each label, and computes the
    plug-in mutual information of that table, which is
    `sklearn.metrics.mutual_info_score(labels, predictions)`: 0 when predictions say
    nothing about the labels, the entropy of the labels (log K for K classes of equal
    size) when they settle them. It does not matter under which names classes are
    predicted, so this is not accuracy.

    The table is additive, so batches, `steps_per_execution` and `jit_compile` change
    nothing. Counts are exact up to 2^47 samples in a cell, in batches of less than
    2^24. Sample weights are used in `weighted_metrics=`; `metrics=` ignore them, as
    always in Keras.

    The plug-in estimate lies about (K − 1)² / 2n nats too high, negligible over an
    epoch but not over a batch.

    With more than 1,024 classes the table would take gigabytes, and seconds in each
    step. The metric then counts, for each label, how often the class is predicted, how
    often another, and how often none, and is Fano's bound H(Y) − h(e) − e log(K − 1)
    with e the share of predictions that are wrong and h(e) = −e log e −
    (1 − e) log(1 − e), at least 0. It is in nats too, H(Y) when all predictions are
    right, and at most the information; much less as long as few are right. Here it
    does matter under which names classes are predicted. H(Y) is that of the labels
    counted: too low while they are few for the number of classes.

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
        from_logits: Whether a single output unit, or each of a multi-label model, is a
            logit (threshold 0) rather than a probability (threshold 0.5). Without
            effect on the units of other models. Defaults to `False`.
        targets: `"auto"`, by shape: class ids, or one-hot or soft labels, whose class
            is the largest entry. `"multi_label"`: labels of 0 and 1 for each unit, each
            of them a question of its own; the mean over those of which both values
            occur. Continuous targets need a probe. Defaults to `"auto"`.
    """

    def __init__(
        self,
        name="mutual_information",
        dtype=None,
        from_logits=False,
        targets="auto",
    ):
        if not isinstance(name, str | None):
            raise TypeError(
                "Argument `name` must be a string. "
                f"Received: name={name!r} of type {type(name).__name__}"
            )
        try:
            super().__init__(name=name, dtype=dtype)
        except (TypeError, ValueError) as error:
            raise ValueError(
                "Argument `dtype` must be a data type of floats, or a policy. "
                f"Received: dtype={dtype!r}: {error}"
            ) from error
        check_bool("from_logits", from_logits)
        if not isinstance(targets, str) or targets not in ("auto", "multi_label"):
            remedy = ""
            if isinstance(targets, str) and targets == "continuous":
                remedy = (
                    ". The bins of continuous targets are not known before all targets "
                    "are: use `MutualInformationLR(probe_data=(x, y))`, which draws a "
                    "sample"
                )
            raise ValueError(
                "Argument `targets` must be 'auto' or 'multi_label'. "
                f"Received: targets={targets!r}{remedy}"
            )
        self.from_logits = from_logits
        self.targets = targets
        self.counts = self._rest = None
        self._resets = 0  # How often, for `MetricTable`.

    def update_state(self, y_true, y_pred, sample_weight=None):
        """Adds a batch to the table, or to what stands for it.

        Args:
            y_true: Class ids of shape `(n, ...)` or `(n, ..., 1)`, where `...` are
                positions, tokens or pixels, if any; or one-hot, soft or multi-label
                ones of shape `(n, ..., K)`. An id that is no class of the outputs is
                not counted, nor is what is not finite. Of a yes-or-no unit these are
                all but what is in [0, 1], where a yes is above 1/2; with `from_logits`
                -1 is a no, as of a hinge loss.
            y_pred: Outputs of shape `(n, ..., K)`, or `(n, ..., 1)` for two classes.
                What a mask that they carry leaves out is not counted.
            sample_weight: Optional weights of shape `(n,)`, `(n, 1)` or `(n, ...)`, or
                a scalar. What has one below 0, or one that is not finite, is not
                counted.

        Raises:
            ValueError: for shapes that do not fit.
        """
        ops = keras.ops
        mask = _keras.mask_of(y_pred)
        y_true = ops.convert_to_tensor(as_array("y_true", y_true))
        y_pred = ops.convert_to_tensor(as_array("y_pred", y_pred))
        if len(y_pred.shape) == 1:
            y_pred = ops.expand_dims(y_pred, -1)
        if len(y_pred.shape) == 0 or not y_pred.shape[-1]:
            raise ValueError(
                "Argument `y_pred` must be outputs of shape (n, ..., units). "
                f"Received: y_pred.shape={tuple(y_pred.shape)}"
            )
        units, positions = y_pred.shape[-1], tuple(y_pred.shape[1:-1])
        with naming("y_true"):
            kind = targets.label_kind(y_true.shape, units, positions)
        if self.targets == "multi_label":
            if kind != "one_hot":
                raise ValueError(
                    "With `targets='multi_label'` MutualInformation expects labels of "
                    "the shape of the outputs, two units or more. Received: "
                    f"y_true.shape={tuple(y_true.shape)}, "
                    f"y_pred.shape={tuple(y_pred.shape)}"
                )
            kind = "multi_label"
        classes = 2 if kind == "multi_label" else targets.num_classes(units)
        several = (units,) if kind == "multi_label" else ()
        rows = classes + 1 if classes <= targets.MANY else 3
        if self.counts is None:
            self._add_counts((*several, rows, classes))
        elif self.counts.shape != (*several, rows, classes):
            raise ValueError(
                f"MutualInformation has counted {self._counted()} so far. "
                f"Received: y_pred.shape={tuple(y_pred.shape)}"
            )
        _check_length("y_true", y_true.shape[0], y_pred)
        ids = targets.class_ids(y_true, units, kind, self.from_logits)
        if sample_weight is not None:
            sample_weight = as_array("sample_weight", sample_weight)
        factors = [one for one in (sample_weight, mask) if one is not None]
        weight = _product(factors, y_pred) if factors or several else None
        if positions:
            y_pred = ops.reshape(y_pred, (-1, units))
        if several:
            batch = readouts.label_counts(y_pred, ids, weight, self.from_logits)
        elif classes > targets.MANY:
            batch = readouts.hit_counts(y_pred, ids, weight)
        else:
            predicted = readouts.predicted_class(y_pred, self.from_logits)
            batch = information.counted(predicted, ids, classes + 1, classes, weight)
        self._count(batch)

    def result(self):
        """Mutual information of all batches since the last reset: a scalar, nats.

        Of more than 1,024 classes, Fano's lower bound on it.
        """
        ops = keras.ops
        if self.counts is None:
            return ops.zeros((), self.dtype)
        # The rest is less than they are rounded by.
        counts = ops.cast(self.counts, "float32")
        if _has_no_table(counts):
            return ops.cast(information.fano(counts), self.dtype)
        nats = information.plug_in(counts)
        if self.targets == "multi_label":
            occur = ops.all(ops.sum(counts, axis=1) > 0, axis=-1)
            occur = ops.cast(occur, "float32")
            nats = ops.sum(nats * occur) / ops.maximum(ops.sum(occur), 1.0)
        return ops.cast(nats, self.dtype)

    def _add_counts(self, shape):
        # A float32 counts to 2^24: the second has what the first is rounded by.
        self.counts, self._rest = (
            self.add_variable(
                shape=shape, initializer="zeros", dtype="float32", name=name
            )
            for name in ("counts", "rest")
        )

    def _count(self, batch):
        """Kahan's sum of the counts so far and those of a batch."""
        # TensorFlow reads a variable at each use, a tensor once.
        before = keras.ops.cast(self.counts, "float32")
        batch = batch + self._rest
        counts = before + batch
        self._rest.assign(batch - (counts - before))
        self.counts.assign(counts)

    def _counted(self):
        """What was counted so far, in words."""
        classes = self.counts.shape[-1]
        if len(self.counts.shape) == 2:
            return f"{classes} classes"
        return f"{self.counts.shape[0]} labels"

    def reset_state(self):
        self._resets += 1
        for variable in (self.counts, self._rest) if self.counts is not None else ():
            variable.assign(keras.ops.zeros(variable.shape, "float32"))

    def table(self):
        """All that was counted since the last reset, a NumPy array; None before that.

        Rows are predictions, the last one for outputs without one, columns labels. Of
        more than 1,024 classes there are three rows: right, wrong, without one.
        """
        if self.counts is None:
            return None
        both = (self.counts.value, self._rest.value)
        return sum(keras.ops.convert_to_numpy(one).astype("float64") for one in both)

    def get_config(self):
        config = {"from_logits": self.from_logits, "targets": self.targets}
        return {**super().get_config(), **config}


def _has_no_table(counts):
    """Whether there are too many classes for a table: see `readouts.hit_counts`."""
    return counts.shape[-1] > targets.MANY


def _product(factors, y_pred):
    """The product of weights and masks for each position, one after the other."""
    ops = keras.ops
    weight = ops.ones(ops.shape(y_pred)[:-1], "float32")
    for factor in factors:
        weight = weight * _like(ops.cast(factor, "float32"), weight)
    return ops.reshape(weight, (-1,))


def _like(weight, positions):
    """Weights that can be multiplied with those of all positions."""
    ops = keras.ops
    rank, given = len(positions.shape), tuple(weight.shape)
    if not given:
        return weight
    if rank == 1:
        weight = ops.reshape(weight, (-1,))
    for _ in range(rank - len(weight.shape)):
        weight = ops.expand_dims(weight, -1)
    extra = len(weight.shape) - rank
    full = (*positions.shape, *[1] * extra)
    for size, most in zip(weight.shape, full, strict=True):
        if None not in (size, most) and size not in (1, most):
            raise ValueError(
                "Arguments `sample_weight` and `y_pred` must have the same length, or "
                "there is one weight for all. Received: weights of shape "
                f"{given} for outputs of {tuple(positions.shape)}"
            )
    return ops.reshape(weight, ops.shape(weight)[:rank]) if extra else weight


def _check_length(name, length, y_pred):
    if length is not None and y_pred.shape[0] not in (None, length):
        raise ValueError(
            f"Arguments `{name}` and `y_pred` must have the same length. "
            f"Received: {length} and {y_pred.shape[0]}"
        )


class MetricTable:
    """Reads information from the table of a `MutualInformation` metric in training.

    Of more than 1,024 classes, from what the metric counts instead.

    Args:
        model: A compiled `keras.Model`.
        monitor: Log key of the metric, `"val_"` in front for the validation data. None
            takes the only one there is: on the validation data where the first reading
            comes after a validation, else on the training data.

    Raises:
        ValueError: where there is no such metric, or more than one.
    """

    def __init__(self, model, monitor=None):
        found = {
            key: metric
            for key, metric in _keras.metrics(model).items()
            if isinstance(metric, MutualInformation)
        }
        if not found:
            raise ValueError(
                "MutualInformationLR has nothing to measure. Either pass "
                "`probe_data=(x_train, y_train)`, or compile the model with "
                "`metrics=[keras_milr.MutualInformation()]`. "
                "Received: probe_data=None and no MutualInformation metric"
            )
        keys = [prefix + key for key in found for prefix in ("", "val_")]
        ambiguous = monitor is None and len(found) > 1
        if ambiguous or monitor not in (None, *keys):
            raise ValueError(
                f"Argument `monitor` must be one of {keys}. Received: {monitor!r}"
            )
        self._validation = None if monitor is None else monitor not in found
        monitor = next(iter(found)) if monitor is None else monitor
        self._key = monitor if monitor in found else monitor.removeprefix("val_")
        self._metric = found[self._key]
        # Tables of counts, or 0: of finished epochs, not read yet; of this epoch, read
        # already; and of its training, where validation has reset the metric since.
        self._unread = 0.0
        self._read = 0.0
        self._trained = None
        self.begin_epoch()

    @property
    def is_seen_within_epochs(self) -> bool:
        """Whether it is on the training data; true while that is open, too."""
        return not self._validation

    def begin_epoch(self):
        """To be called after Keras has reset its metrics for an epoch."""
        self._read = 0.0
        self._trained = None
        self._resets = self._metric._resets

    def check_is_whole(self):
        """ValueError where the metric has not counted all of the epoch so far."""
        if self._metric._resets != self._resets:
            raise ValueError(
                f"The metric {self._key!r} was reset within the epoch, as "
                "`train_on_batch` does, and `evaluate` in another callback. It must "
                "count all of an epoch to be read; pass `probe_data` instead. "
                "Received: probe_data=None"
            )

    def begin_validation(self):
        """To be called before validation resets the metric.

        Raises:
            ValueError: where it was reset before, and is not read on validation data.
        """
        if self._validation is False:
            self.check_is_whole()
        self._trained = self._counts()

    def end_epoch(self, logs):
        """To be called after an epoch and its validation.

        Args:
            logs: Logs of the epoch, to see that nobody has touched the metric since.

        Raises:
            ValueError: where somebody has, or has reset it within the epoch.
        """
        validated = self._trained is not None
        if self._validation is None:
            self._validation = validated
        key = ("val_" if self._validation else "") + self._key
        if self._validation and not validated:
            warnings.warn(
                f"MutualInformationLR: `{key}` is not available, since there was no "
                "validation in this epoch. No reading is taken. "
                f"Available metrics are: {','.join(logs)}",
                stacklevel=3,
            )
            return
        use_trained = validated and not self._validation
        total = self._trained if use_trained else self._counts()
        nats = _nats(total)
        # Of eight digits: steps of 0.03 above 4.
        rounded = nats / 128 if self._metric.dtype == "bfloat16" else 0.0
        if abs(nats - float(logs.get(key, nats))) > 0.01 + rounded:
            raise ValueError(
                f"The metric {self._key!r} has been used since the epoch "
                "ended, by `evaluate` in another callback? Put MutualInformationLR "
                f"before it, or pass `probe_data`. Received: {nats} nats, while "
                f"{key}={logs[key]}"
            )
        if self._validation:
            self._unread = total
        else:
            if not validated:
                self.check_is_whole()
            self._unread, self._read = self._unread + total - self._read, total

    def measure(self, mid_epoch: bool = False):
        """The information in what was counted since the last reading.

        Args:
            mid_epoch: Whether the epoch still goes on.

        Returns:
            A `readouts.Information`, or None where there is nothing to read yet: in an
            epoch without validation, or where all labels since the last reading of the
            epoch were of one class.

        Raises:
            ValueError: for an epoch with labels of one class only, and where the metric
                was reset within it.
        """
        counts, total = self._unread, None
        if mid_epoch:
            self._validation = False
            self.check_is_whole()
            total = self._counts()
            counts = counts + total - self._read
        if np.ndim(counts) == 0:
            return None
        if _of_one_class(counts):
            if mid_epoch or not _of_one_class(self._read):
                return None
            raise ValueError(
                f"The metric {self._key!r} has counted labels of fewer than "
                "two classes in an epoch; nothing can be known of them. "
                f"Received: {counts.sum():g} sample(s)"
            )
        self._unread = 0.0
        self._read = self._read if total is None else total
        if _has_no_table(counts):
            return readouts.from_hits(counts)
        if counts.ndim == 2:
            return readouts.from_counts(counts)
        infos = readouts.from_tables(_varied(counts), 2)
        return readouts.mean(readouts.separate(infos))

    def state(self) -> dict:
        """What is not in the metric's variables."""
        return {"validation": self._validation, "unread": np.asarray(self._unread)}

    def resume(self, state: dict):
        """Goes on from a state."""
        self._validation = state["validation"]
        self._unread = np.asarray(state["unread"])

    def _counts(self):
        table = self._metric.table()
        return np.zeros((3, 2)) if table is None else table  # None: not used yet.


def _of_one_class(counts):
    """Whether no table has labels of two classes; nor has what was never counted."""
    if np.ndim(counts) == 0:
        return True
    return not np.any(np.count_nonzero(counts.sum(axis=-2), axis=-1) >= 2)


def _varied(counts):
    """The tables of the labels of which both values occur."""
    return counts[np.all(counts.sum(axis=1) > 0, axis=-1)]


def _nats(counts):
    """As the metric computes it."""
    if _has_no_table(counts):
        return readouts.from_hits(counts).value
    if counts.ndim == 3:
        counts = _varied(counts)
    return (
        float(np.mean(information.mutual_information(counts))) if len(counts) else 0.0
    )
