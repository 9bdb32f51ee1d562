"""A fixed sample of labelled data, drawn in one pass: what a model is measured on."""

import itertools
import math
import time
import warnings
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_milr import batches, outputs, targets
from keras_milr._arguments import naming
from keras_milr.untouched import own_random_state

_LONG = 30  # seconds after which a user may wonder
_SPARE = 2048  # rows that a draw may hold beyond two samples, where these are smaller


class Labels(NamedTuple):
    """Labels of one output, as class ids.

    Attributes:
        name: The output's name.
        index: Its place among the outputs of the model.
        share: Its weight in the mean over outputs.
        target: What the output is asked.
        class_ids: int32 ids, shape `(n, ...)` with the positions of the target, or
            `(n, ..., columns)` where each unit is a question of its own.
        sample_weight: float32 weights of shape `(n, ...)`, or None. Without positions
            they add up to the effective number of samples, (Σw)² / Σw², so that errors
            and biases that depend on it do not depend on the scale of the weights. With
            positions the mask of the output comes in first; see
            `probe.Probe`.
    """

    name: str
    index: int
    share: float
    target: targets.Target
    class_ids: np.ndarray
    sample_weight: np.ndarray | None

    def of(self, rows) -> "Labels":
        """Those of some samples."""
        weight = None if self.sample_weight is None else self.sample_weight[rows]
        return self._replace(class_ids=self.class_ids[rows], sample_weight=weight)


class Sample(NamedTuple):
    """Labelled samples to measure on.

    Attributes:
        x: Array, or list, tuple or dict of arrays, of length n.
        labels: List of `Labels`, one for each output that is read.
        signature: What of the model they were read for; see `outputs.signature`.
        notes: What is left out and why, in sentences.
    """

    x: Any
    labels: list[Labels]
    signature: list
    notes: list[str]

    def of(self, rows) -> "Sample":
        """Some samples of it, or all in another order."""
        return self._replace(
            x=keras.tree.map_structure(lambda a: a[rows], self.x),
            labels=[labels.of(rows) for labels in self.labels],
        )

    @property
    def class_ids(self) -> np.ndarray:
        """Those of the only output, or of the first."""
        return self.labels[0].class_ids

    @property
    def sample_weight(self) -> np.ndarray | None:
        """Those of the only output, or of the first."""
        return self.labels[0].sample_weight


class Rows(NamedTuple):
    """Labelled rows drawn from data, as `fit` would be given them.

    Attributes:
        x: Array, or structure of arrays, of length n.
        y: Labels of any kind, of length n, or a structure of them.
        sample_weight: Weights as they came, or None.
        labels: List of `Labels`, one for each output that is read.
        positions: The rows' positions in the data, shape `(n,)`, ascending.
        strata: Number of classes that the draw gave their share each, or 1.
        signature: What of the model they were read for; see `outputs.signature`.
        notes: What is left out and why, in sentences.
        batch_sizes: Numbers of rows in the batches of the data, all of them.
    """

    x: Any
    y: Any
    sample_weight: Any
    labels: list[Labels]
    positions: np.ndarray
    strata: int
    signature: list
    notes: list[str]
    batch_sizes: list[int]

    @property
    def class_ids(self) -> np.ndarray:
        """Those of the only output, or of the first."""
        return self.labels[0].class_ids

    def sample(self) -> Sample:
        """The rows to measure on."""
        return Sample(self.x, self.labels, self.signature, self.notes)


def is_skewed(labels, entropy: float) -> bool:
    """Whether the shares of the classes are most of what is to be learned.

    Args:
        labels: Sequence of `Labels`.
        entropy: H(Y) of them, in nats.
    """
    return bool(entropy < 0.5 * even_entropy(labels))


def even_entropy(labels) -> float:
    """What H(Y) would be if all classes had equal shares, in nats.

    Args:
        labels: Sequence of `Labels`.
    """
    even = [math.log(one.target.num_classes) for one in labels]
    return float(np.average(even, weights=[one.share for one in labels]))


def draw_sample(
    data, model, size: int = 2048, seed: int = 0, output=None, kind="auto"
) -> Sample:
    """Draws a class-stratified sample in one pass over the data.

    Each class gets its share of the data, and at least one sample; of a continuous
    target, each bin. Where a sample has many labels (positions, several labels, targets
    or outputs) or there are more than `targets.MANY` classes, it is drawn at random.
    The draw depends on the seed and on the order of the data, not on how they are
    batched.

    Args:
        data: `(x, y)` or `(x, y, sample_weight)` of arrays, or an iterable of such
            batches: a `tf.data.Dataset`, a `keras.utils.PyDataset`, a `DataLoader`, a
            generator.
        model: The built `keras.Model` to measure; its outputs and losses say how labels
            are read.
        size: Number of samples to draw; all of them where there are no more.
        seed: Integer seed.
        output: Name of the output to read. Defaults to all that have a loss.
        kind: Kind of the labels, see `keras_milr.targets`, or a dict from the names of
            outputs to kinds. Defaults to `"auto"`.

    Returns:
        A `Sample`, in the order of the data.

    Raises:
        ValueError: for data without labels, of unequal lengths, empty, infinite or of
            one class only; for labels that do not fit the outputs; for inputs that are
            not finite; for a `size` below 2 for each class.
    """
    return draw_rows(data, model, size, seed, output, kind).sample()


def draw_rows(data, model, size, seed: int, output=None, kind="auto") -> Rows:
    """Draws the rows of a sample, with their labels and weights as they came.

    See `draw_sample`. Here `size` may also be a function that gives it, from the length
    of the first batch.
    """
    rng = np.random.default_rng(seed)
    source = batches.read(data)
    # What the data draw is not to be missing in `fit`, where the model, if it is built
    # only now, would have drawn its weights too.
    with own_random_state(int(seed)):
        first = next((one for one in source if batches.check_lengths(*one) > 0), None)
    if first is None:
        raise ValueError("Argument `probe_data` is empty. Received: no samples")
    size = int(size(batches.check_lengths(*first)) if callable(size) else size)
    batches.check_inputs(first[0])
    plan = _Plan(model, first[0], first[1], output, kind)
    most = 2 * size if plan.bins else size  # Bins are not known before the targets are.
    pool = _Pool(plan.classes)
    with own_random_state(int(seed) ^ 1):
        batch_sizes = _fill(pool, plan, itertools.chain([first], source), rng, most)
    plan.decide()
    present = np.count_nonzero(pool.counts)
    if plan.classes > 1:
        _check_classes(pool.counts, size)
    if plan.bins:
        pool.keep(_shares(pool.counts, most))
        pool.stratify(plan.bin_ids(pool.rows()["y"]))
    pool.keep(_shares(pool.counts, size))
    rows = pool.rows()
    y, weight = rows["y"], rows.get("sample_weight")
    return Rows(
        rows["x"],
        y,
        weight,
        plan.labels(y, weight),
        rows["position"],
        present if plan.classes > 1 else 1,
        plan.signature,
        plan.notes,
        batch_sizes,
    )


def _fill(pool, plan, source, rng, most: int) -> list[int]:
    """Goes through all batches once, and keeps in the pool what a sample may want.

    Args:
        pool: An empty `_Pool`.
        plan: A `_Plan`, which checks the labels and learns from them.
        source: The batches: inputs, labels, and weights or None.
        rng: Generator of the rows' priorities.
        most: Number of rows that will be wanted.

    Returns:
        The number of rows in each batch that has some.
    """
    batch_sizes, seen, spare = [], 0, max(most, _SPARE)
    started = time.monotonic()
    for x, y, sample_weight in source:
        if started is not None and time.monotonic() - started > _LONG:
            started = None
            warnings.warn(
                f"After {_LONG} s of drawing a sample, {seen} samples "
                "of `probe_data` have been gone through, and all of them will be. "
                "If they are many, or never end, pass a part, such as "
                "`dataset.take(200)`.",
                stacklevel=3,
            )
        n = batches.check_lengths(x, y, sample_weight)
        if n == 0:
            continue
        batches.check_inputs(x)
        ids = plan.checked(y, sample_weight)
        rows = {"x": x, "y": y, "position": np.arange(seen, seen + n)}
        batch_sizes.append(n)
        seen += n
        if sample_weight is not None:
            rows["sample_weight"] = sample_weight
        pool.add(rows, ids, rng.random(n))
        # Memory stays bounded by the sample.
        if len(pool) > 2 * most + min(16 * plan.classes, spare):
            # What the final draw will want of the rows so far is fewer on average, and
            # more with a chance that is negligible. Of hundreds of classes those
            # chances together would be many samples, so each has less.
            shares = most * pool.counts / pool.counts.sum()
            more = 4 * np.sqrt(shares) + 4
            pool.keep(shares + more * min(1.0, spare / more.sum()))
    return batch_sizes


def _check_classes(counts, size):
    """ValueError for a single class in all data, and for too few samples for all."""
    present = np.count_nonzero(counts)
    if present == 1:
        raise ValueError(
            "Argument `probe_data` must have at least two classes: labels of a single "
            "class have no entropy, and nothing can be known about them. "
            f"Received: class {int(np.argmax(counts))} only"
        )
    if size < 2 * present:
        raise ValueError(
            "Argument `probe_size` must be at least 2 for each class. Received: "
            f"probe_size={size} for {present} classes"
        )


class _Plan:
    """Which outputs of a model are read, and as what.

    Args:
        model: A `keras.Model`.
        x: Inputs of some samples.
        y: Their labels, as `fit` takes them.
        output: See `draw_sample`; so is `kind`.
        kind: A kind, or a dict.
    """

    def __init__(self, model, x, y, output, kind):
        self._all = outputs.outputs_of(model, x)
        self.signature = outputs.signature(self._all)
        self.notes = []
        self._outputs, self._targets = [], []
        names = [one.name for one in self._all]
        if isinstance(kind, dict):
            outputs.by_output(kind, names, "kinds in `targets`")
        found = outputs.labels_of(y, self._all)
        several = outputs.chosen(self._all, output)
        for one in several:
            given = kind.get(one.name, "auto") if isinstance(kind, dict) else kind
            try:
                if found[one.index] is None:
                    raise ValueError(f"There are no labels for output {one.name!r}")
                with naming("probe_data"):
                    target = targets.detect(
                        one.loss, found[one.index], one.values, given
                    )
            except ValueError as error:
                if len(several) == 1 or given != "auto":
                    raise
                self._leave_out(one, error)
                continue
            self._outputs.append(one)
            self._targets.append(target)
        self._check_any()
        only = self._targets[0] if len(self._targets) == 1 else None
        per_sample = only is not None and not only.positions
        self.classes = 1
        if per_sample and not only.by_unit and only.num_classes <= targets.MANY:
            self.classes = only.num_classes
        # Numbers may begin with some that are 0 or 1: all of them show what they are.
        pairs = enumerate(zip(self._outputs, self._targets, strict=True))
        self._binary = {
            i: target
            for i, (one, target) in pairs
            if targets.may_be_numbers(target, one.loss)
        }
        for i, target in self._binary.items():
            self._targets[i] = target._replace(kind="continuous")
        only = self._targets[0]
        self.bins = per_sample and only.kind == "continuous" and only.units == 1
        self._seen = [
            None
            if target.by_unit or target.num_classes <= targets.MANY
            else np.zeros(target.num_classes)
            for target in self._targets
        ]

    def checked(self, y, weight):
        """Checks labels and weights of a batch; ids of the classes to share out."""
        rows = [self._ids(*row) for row in self._each(y, weight)]
        for i in list(self._binary):
            if not np.all(np.isin(rows[i][0], (0, 1))):
                del self._binary[i]
        for seen, (ids, weights) in zip(self._seen, rows, strict=True):
            if seen is not None:
                flat = None if weights is None else weights.reshape(-1)
                seen += np.bincount(ids.reshape(-1), flat, minlength=len(seen))
        ids = rows[0][0]
        if self.classes == 1:
            return np.zeros(len(ids), "int32")
        # Those that may be binary are numbers so far.
        return (ids == 1).reshape(-1).astype("int32") if self.bins else ids

    def decide(self):
        """What the first batch left open, once all data have been checked."""
        for i, target in self._binary.items():
            self._targets[i] = target
        self.bins = self.bins and self._targets[0].kind == "continuous"
        self.classes = 1 if self.bins else self.classes

    def bin_ids(self, y):
        """Ids of the bins of the only target, which each shall have their share."""
        values, _ = self._ids(*next(self._each(y, None)))
        counted = np.ones(len(values), bool)
        target, ids = targets.settled(self._targets[0], values, counted, len(values))
        return ids[:, 0] if len(target.columns) else np.zeros(len(values), "int32")

    def labels(self, y, weight) -> list[Labels]:
        """The labels of the sample."""
        found, rows = [], list(self._each(y, weight))
        for one, seen, row in zip(self._outputs, self._seen, rows, strict=True):
            target = row[0]
            if seen is not None:
                target = target._replace(shares=seen / max(seen.sum(), 1e-30))
            ids, weights = self._ids(*row)
            counted = np.ones(ids.shape[: 1 + len(target.positions)], bool)
            samples = len(ids)
            if weights is not None:
                counted = weights > 0
                of_sample = weights.reshape(len(ids), -1).sum(axis=1, dtype="float64")
                total, square = of_sample.sum(), (of_sample**2).sum()
                samples = total**2 / max(square, 1e-30)
                if not target.positions and total > 0:
                    weights = weights * np.float32(total / square)
            target, ids = targets.settled(target, ids, counted, samples)
            try:
                self._check_varied(target, ids[counted], weight)
            except ValueError as error:
                if len(rows) == 1:
                    raise
                self._leave_out(one, error)
                continue
            if target.by_unit and len(target.columns) < target.units:
                without = sorted(set(range(target.units)) - set(target.columns))
                self.notes.append(
                    f"Output {one.name!r}: labels that are the same in all of the "
                    f"probe are left out. Received: {_listed(without)}"
                )
            found.append(Labels(one.name, one.index, one.weight, target, ids, weights))
        self._check_any(found)
        return found

    def _each(self, y, weight):
        """Target, labels and weights of each output."""
        labels = outputs.labels_of(y, self._all)
        if keras.tree.is_nested(weight):
            weights = outputs.labels_of(
                weight, self._all, "sample weights in `probe_data`"
            )
        else:
            weights = [weight] * len(self._all)
        for one, target in zip(self._outputs, self._targets, strict=True):
            if labels[one.index] is None:
                raise ValueError(f"There are no labels for output {one.name!r}")
            yield target, labels[one.index], weights[one.index]

    def _ids(self, target, labels, weight):
        """Ids, or targets, and weights for each position, or None."""
        shape = (len(labels), *target.positions)
        if weight is not None:
            # Keras' own losses take (n, 1) for all positions of a sample, not (n,); and
            # weights that have an axis of one more than there is to weigh.
            while weight.ndim > len(shape) and weight.shape[-1] == 1:
                weight = weight[..., 0]
            axes = weight.shape[1:] + (1,) * (len(shape) - weight.ndim)
            pairs = zip(axes, target.positions, strict=False)
            fits = len(axes) == len(target.positions)
            if not fits or any(size not in (1, full) for size, full in pairs):
                also = f" or (n, {', '.join(map(str, target.positions))})"
                raise ValueError(
                    "The sample weights of `probe_data` must have shape (n,)"
                    f"{also if target.positions else ''}. Received: {weight.shape}"
                )
            weight = weight.reshape(len(labels), *axes)
            weight = np.broadcast_to(weight, shape).astype("float32")
        if target.ignore_class is not None and labels.size == np.prod(shape):
            ignored = labels.reshape(shape) == target.ignore_class
            if np.any(ignored):
                weight = np.ones(shape, "float32") if weight is None else weight
                weight = np.where(ignored, np.float32(0), weight)
        # What does not count may be anything: padding, or a sample of weight 0. But a
        # sample that has a label is drawn as one of its class.
        of_samples = not target.positions and target.ignore_class is None
        counted = None if weight is None else weight > 0
        with naming("probe_data"):
            try:
                known = None if of_samples else counted
                return targets.checked_ids(labels, target, known), weight
            except ValueError:
                if not of_samples or counted is None:
                    raise
            return targets.checked_ids(labels, target, counted), weight

    def _check_varied(self, target, ids, weight):
        if target.by_unit:
            if len(target.columns) == 0:
                raise ValueError(
                    "Argument `probe_data` must have labels that vary: those that are "
                    "all the same have no entropy, and nothing can be known about "
                    f"them. Received: {target.units} constant label(s)"
                )
        elif len(np.unique(ids)) < 2:
            if weight is None:
                raise ValueError(
                    "Argument `probe_data` must have at least two classes. Received: "
                    f"class {ids[:1]} only"
                )
            raise ValueError(
                "The sample weights of `probe_data` must be above 0 in at least two "
                "classes. Received: 0 in all others"
            )

    def _leave_out(self, one, error):
        self.notes.append(f"Output {one.name!r} is not read: {error}")

    def _check_any(self, found=None):
        if not (self._outputs if found is None else found):
            raise ValueError(
                "None of the model's outputs can be read. " + " ".join(self.notes)
            )


def _listed(numbers, most=10):
    shown = ", ".join(map(str, numbers[:most]))
    return shown + (", ..." if len(numbers) > most else "")


class _Pool:
    """Rows with random priorities; the lowest ones of each class are kept.

    Attributes:
        counts: Number of rows of each class that were added, kept or not.
    """

    def __init__(self, classes: int):
        self.counts = np.zeros(classes, "int64")
        self._limits = np.full(classes, np.inf)  # No priority above is wanted.
        self._chunks = []
        self._ids = np.zeros(0, "int32")
        self._priorities = np.zeros(0)

    def __len__(self):
        return len(self._ids)

    def add(self, rows, ids, priorities):
        if self._chunks:
            first, here = (
                [a.shape[1:] for a in keras.tree.flatten(chunk)]
                for chunk in (self._chunks[0], rows)
            )
            if first != here:
                raise ValueError(
                    "All batches of `probe_data` must have the same shapes, except for "
                    "the number of samples; pad them to one length. "
                    f"Received: {first}, later {here}"
                )
        self.counts += np.bincount(ids, minlength=len(self.counts))
        wanted = priorities < self._limits[ids]
        if np.any(wanted):
            self._chunks.append(_taken(rows, wanted))
            self._ids = np.concatenate([self._ids, ids[wanted]])
            self._priorities = np.concatenate([self._priorities, priorities[wanted]])

    def keep(self, quota):
        """Drops all but the `quota[c]` lowest priorities of each class c."""
        order = np.lexsort((self._priorities, self._ids))
        ids = self._ids[order]
        rank = np.arange(len(ids)) - np.searchsorted(ids, ids)
        wanted = np.zeros(len(ids), bool)
        wanted[order] = rank < np.asarray(quota)[ids]
        np.minimum.at(self._limits, self._ids[~wanted], self._priorities[~wanted])
        self._ids, self._priorities = self._ids[wanted], self._priorities[wanted]
        start, chunks = 0, self._chunks
        for i, chunk in enumerate(chunks):
            end = start + len(keras.tree.flatten(chunk)[0])
            chunks[i] = _taken(chunk, wanted[start:end])  # One after the other.
            start = end
        self._chunks = [c for c in chunks if len(keras.tree.flatten(c)[0]) > 0]

    def stratify(self, ids):
        """Gives the rows that are kept other classes."""
        self.counts = np.bincount(ids)
        self._limits = np.full(len(self.counts), np.inf)
        self._ids = ids

    def rows(self):
        """The rows that are kept."""
        joined = keras.tree.map_structure(lambda *a: np.concatenate(a), *self._chunks)
        self._chunks = [joined]
        return joined


def _taken(rows, wanted):
    if np.all(wanted):
        return rows
    return keras.tree.map_structure(lambda a: a[wanted], rows)


def _shares(counts, size):
    """Whole numbers that add up to `size`, in proportion to `counts`, at least 1."""
    if counts.sum() <= size:
        return counts
    exact = counts * (size / counts.sum())
    shares = np.where(counts > 0, np.maximum(np.floor(exact), 1), 0).astype("int64")
    # Largest remainders get what is left; over-full shares give back first.
    while shares.sum() != size:
        step = 1 if shares.sum() < size else -1
        may_change = (counts > 0) & (shares + step > 0)
        shares[np.argmax(np.where(may_change, step * (exact - shares), -np.inf))] += (
            step
        )
    return shares
