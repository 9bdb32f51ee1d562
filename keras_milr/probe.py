"""A fixed sample of the data, and one compiled pass that measures the model on it."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_milr import backend, layers, targets
from keras_milr.readouts import Information, Predictions

BATCH_SIZE = 256  # of a reading; a model with a batch size of its own keeps it


class Sample(NamedTuple):
    """Labelled samples to measure on.

    Attributes:
        x: Array, or list, tuple or dict of arrays, of length n.
        class_ids: int32 ids, shape `(n,)`.
        sample_weight: float32 weights of shape `(n,)`, or None. They add up to the
            effective number of samples, (Σw)² / Σw², so that errors and biases that
            depend on it do not depend on the scale of the weights.
        num_units: Number of output units that the labels were read for.
    """

    x: Any
    class_ids: np.ndarray
    sample_weight: np.ndarray | None
    num_units: int


class Rows(NamedTuple):
    """Labelled rows drawn from data, as `fit` would be given them.

    Attributes:
        x: Array, or structure of arrays, of length n.
        y: Labels of any kind, of length n.
        sample_weight: Weights of shape `(n,)`, or None.
        class_ids: int32 ids of `y`, shape `(n,)`.
        positions: The rows' positions in the data, shape `(n,)`, ascending.
        num_units: Number of output units that the labels were read for.
        batch_sizes: Numbers of rows in the batches of the data, all of them.
    """

    x: Any
    y: np.ndarray
    sample_weight: np.ndarray | None
    class_ids: np.ndarray
    positions: np.ndarray
    num_units: int
    batch_sizes: list[int]

    def sample(self) -> Sample:
        """The rows to measure on."""
        weight = self.sample_weight
        if weight is not None:
            weight = weight * np.float32(weight.sum() / (weight**2).sum())
        return Sample(self.x, self.class_ids, weight, self.num_units)


def draw_sample(data, model, size: int = 2048, seed: int = 0) -> Sample:
    """Draws a class-stratified sample in one pass over the data.

    Each class gets its share of the data, and at least one sample. The draw depends on
    the seed and on the order of the data, not on how they are batched.

    Args:
        data: `(x, y)` or `(x, y, sample_weight)` of arrays, or an iterable of such
            batches: a `tf.data.Dataset`, a `keras.utils.PyDataset`, a `DataLoader`, a
            generator.
        model: The built `keras.Model` to measure; its output says how labels are read.
        size: Number of samples to draw; all of them where there are no more.
        seed: Integer seed.

    Returns:
        A `Sample`, in the order of the data.

    Raises:
        ValueError: for data without labels, of unequal lengths, empty, infinite or of
            one class only; for labels that do not fit the outputs; for inputs that are
            not finite; for a `size` below 2 for each class.
    """
    return draw_rows(data, model, size, seed).sample()


def draw_rows(data, model, size: int, seed: int) -> Rows:
    """Draws the rows of a sample, with their labels and weights as they came.

    See `draw_sample`.
    """
    rng = np.random.default_rng(seed)
    pool, batch_sizes = None, []
    for x, y, sample_weight in batches(data):
        n = _check_lengths(x, y, sample_weight)
        if n == 0:
            continue
        if pool is None:
            num_units = num_output_units(model, x)
            classes = targets.num_classes(num_units)
            pool = _Pool(classes)
        ids = targets.checked_class_ids(y, num_units)
        _check_finite(x)
        rows = {"x": x, "y": y, "position": np.arange(n) + sum(batch_sizes)}
        batch_sizes.append(n)
        if sample_weight is not None:
            rows["sample_weight"] = sample_weight
        pool.add(rows, ids, rng.random(n))
        # Memory stays bounded by the sample. Twice the share keeps whatever the
        # final draw will want, but for a chance that is negligible.
        if len(pool) > 4 * size + 16 * classes:
            pool.keep(2.0 * size * pool.counts / pool.counts.sum() + 4)
    if pool is None:
        raise ValueError("Argument `probe_data` is empty. Received: no samples")
    present = np.count_nonzero(pool.counts)
    if present == 1:
        raise ValueError(
            "Argument `probe_data` must have at least two classes: labels of a single "
            "class have no entropy, and nothing can be known about them. "
            f"Received: class {int(np.argmax(pool.counts))} only"
        )
    if size < 2 * present:
        raise ValueError(
            "Argument `probe_size` must be at least 2 for each class. Received: "
            f"probe_size={size} for {present} classes"
        )
    pool.keep(_shares(pool.counts, size))
    rows, ids = pool.rows()
    weight = rows.get("sample_weight")
    if weight is not None and len(np.unique(ids[weight > 0])) < 2:
        raise ValueError(
            "The sample weights of `probe_data` must be above 0 in at least two "
            "classes. Received: 0 in all others"
        )
    position = rows["position"]
    return Rows(rows["x"], rows["y"], weight, ids, position, num_units, batch_sizes)


class _Pool:
    """Rows with random priorities; the lowest ones of each class are kept."""

    def __init__(self, classes: int):
        self.counts = np.zeros(classes, "int64")
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
        self._chunks.append(rows)
        self._ids = np.concatenate([self._ids, ids])
        self._priorities = np.concatenate([self._priorities, priorities])

    def keep(self, quota):
        """Drops all but the `quota[c]` lowest priorities of each class c."""
        order = np.lexsort((self._priorities, self._ids))
        ids = self._ids[order]
        rank = np.arange(len(ids)) - np.searchsorted(ids, ids)
        chosen = np.sort(order[rank < np.asarray(quota)[ids]])
        self._chunks = [self._take(chosen)]
        self._ids, self._priorities = self._ids[chosen], self._priorities[chosen]

    def rows(self):
        return self._chunks[0], self._ids

    def _take(self, chosen):
        lengths = [len(keras.tree.flatten(chunk)[0]) for chunk in self._chunks]
        ends = np.cumsum(lengths)
        parts = []
        for chunk, end, length in zip(self._chunks, ends, lengths, strict=True):
            local = chosen[(chosen >= end - length) & (chosen < end)] - (end - length)
            parts.append(keras.tree.map_structure(lambda a, i=local: a[i], chunk))
        return keras.tree.map_structure(lambda *a: np.concatenate(a), *parts)


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


def batches(data) -> Iterator[tuple[Any, np.ndarray, np.ndarray | None]]:
    """Batches of (x, y, sample_weight) as NumPy, from whatever `data` is."""
    if isinstance(data, (tuple, list)):
        batches = [data]
    elif isinstance(data, keras.utils.PyDataset):
        if data.num_batches is None:
            raise ValueError(
                "Argument `probe_data` must be finite. Received a PyDataset whose "
                "`num_batches` is None"
            )
        batches = (data[i] for i in range(data.num_batches))
    elif isinstance(data, (np.ndarray, dict)) or keras.ops.is_tensor(data):
        raise ValueError(
            "Argument `probe_data` must have labels: (x, y), (x, y, sample_weight), or "
            f"an iterable of such batches. Received: {type(data).__name__}"
        )
    elif hasattr(data, "__iter__"):
        if hasattr(data, "cardinality") and int(data.cardinality()) == -1:
            raise ValueError(
                "Argument `probe_data` must be finite. Received a dataset that repeats "
                "without end; pass it before `.repeat()`, or use `.take(steps)`."
            )
        batches = data
    else:
        raise TypeError(
            "Argument `probe_data` must be (x, y), (x, y, sample_weight), or an "
            "iterable of such batches (tf.data.Dataset, keras.utils.PyDataset, "
            f"DataLoader, generator). Received: {data!r} of type {type(data).__name__}"
        )
    for batch in batches:
        if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
            what = f"{type(batch).__name__}"
            if isinstance(batch, (tuple, list)):
                what += f" of {len(batch)}"
            raise ValueError(
                "Argument `probe_data` must have labels: (x, y) or "
                f"(x, y, sample_weight). Received: {what}"
            )
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(tuple(batch))
        if y is None:
            raise ValueError("Argument `probe_data` must have labels. Received: y=None")
        x = keras.tree.map_structure(_array, x)
        if sample_weight is not None:
            sample_weight = _array(sample_weight)
        yield x, _array(y), sample_weight


def _array(x):
    """`x` as NumPy, in the types that Keras trains with."""
    if keras.ops.is_tensor(x):  # Which may be on another device.
        x = keras.ops.convert_to_numpy(x)
    try:
        x = np.asarray(x)
    except ValueError as error:
        raise ValueError(
            "Argument `probe_data` must hold arrays, (x, y) or (x, y, sample_weight). "
            f"Received a {type(x).__name__} that is none: {error}"
        ) from error
    return x.astype(keras.config.floatx(), copy=False) if x.dtype.kind == "f" else x


def _check_lengths(x, y, sample_weight):
    shapes = [np.shape(a) for a in (*keras.tree.flatten(x), y)]
    if sample_weight is not None:
        shapes.append(sample_weight.shape)
        if sample_weight.ndim != 1:
            raise ValueError(
                "The sample weights of `probe_data` must have shape (n,). "
                f"Received: {sample_weight.shape}"
            )
        number = sample_weight.dtype.kind in "biuf"
        if not number or not np.all((sample_weight >= 0) & np.isfinite(sample_weight)):
            raise ValueError(
                "The sample weights of `probe_data` must be finite and not negative. "
                f"Received: {sample_weight}"
            )
    if any(len(shape) == 0 for shape in shapes):
        raise ValueError(
            "Argument `probe_data` must come in batches. Received single samples; "
            "use `dataset.batch(...)`."
        )
    if len({shape[0] for shape in shapes}) != 1:
        raise ValueError(
            "Inputs, labels and weights in `probe_data` must have the same length. "
            f"Received: shapes {shapes}"
        )
    return shapes[0][0]


def _check_finite(x):
    for array in keras.tree.flatten(x):
        if array.dtype.kind == "f" and not np.all(np.isfinite(array)):
            raise ValueError(
                "The inputs in `probe_data` must be finite. Received an array of shape "
                f"{array.shape} with {int(np.sum(~np.isfinite(array)))} NaN or "
                "infinite value(s)"
            )


def num_output_units(model, x) -> int:
    """Units of the model's output for inputs like `x`.

    Runs the model on one row, without a trace in its state; a model without weights
    yet (a subclassed one) is built by it.

    Args:
        model: A `keras.Model` with one output of shape `(n, units)`.
        x: Array, or structure of arrays, with the batch first.

    Raises:
        ValueError: for several outputs, or an output that has another shape.
    """
    first = np.zeros(_fixed_batch_size(model) or 1, "int64")
    row = keras.tree.map_structure(lambda a: keras.ops.convert_to_tensor(a[first]), x)
    with keras.StatelessScope():
        outputs = model(row, training=False)
    shapes = [tuple(t.shape) for t in keras.tree.flatten(outputs)]
    if len(shapes) != 1 or len(shapes[0]) != 2 or shapes[0][1] is None:
        raise ValueError(
            "Measuring mutual information needs a model with one output of shape "
            f"(n, units). Received: model {model.name!r} with output shape(s) {shapes}"
        )
    return shapes[0][1]


def output_readout(model) -> Predictions:
    """The readout for the model's output, by its compiled loss."""
    losses = keras.tree.flatten(getattr(model, "loss", None))
    from_logits = len(losses) == 1 and getattr(losses[0], "from_logits", False)
    return Predictions(from_logits=bool(from_logits))


class Probe:
    """Measures a model on a fixed sample, in one compiled pass.

    The forward pass and the counting run together, batch by batch, on the device that
    the model is on; only counts come back. Layers are read in the same pass, which
    keeps a few numbers of each sample for them; see `readouts.LinearReadout`. The model
    runs in inference mode and is left as it was: weights, statistics, random seeds and
    metrics.

    Args:
        model: A built, compiled `keras.Model`.
        sample: What to measure on; see `draw_sample`.
        readout: A readout of the output, such as `keras_milr.readouts.Predictions()`.
        groups: List of `layers.Group` to read too. Defaults to none.
        layer_readout: A readout for them, such as `readouts.LinearReadout()`.
    """

    def __init__(self, model, sample: Sample, readout, groups=(), layer_readout=None):
        self.readout = readout
        self.layer_readout = layer_readout
        self.num_classes = targets.num_classes(sample.num_units)
        self._sample = sample
        self._batches = _equal_batches(sample, _fixed_batch_size(model))
        self._groups = list(groups)

        def step(forward, state, x, class_ids, weight):
            with layers.recorded(groups) as activations:
                (outputs,) = keras.tree.flatten(forward(x))
                recorded = activations(class_ids.shape[0])
                features = [layer_readout.features(a) for a in recorded]
            return readout.update(state, outputs, class_ids, weight), features

        self._step = backend.compile_step(model, step)

    def measure(self) -> tuple[Information, list[Information]]:
        """One reading of the model as it is now: of the output, and of each group."""
        state = keras.tree.map_structure(
            keras.ops.convert_to_tensor, self.readout.init(self.num_classes)
        )
        parts = []
        for batch in self._batches:
            state, features = self._step(state, *batch)
            parts.append(features)
        by_group = zip(*parts, strict=True)
        return self.readout.finish(state), [
            self._read(group.name, features)
            for group, features in zip(self._groups, by_group, strict=True)
        ]

    def _read(self, name, features) -> Information:
        ids, weight = self._sample.class_ids, self._sample.sample_weight
        rows = sum(len(class_ids) for _, class_ids, _ in self._batches)
        features = keras.ops.concatenate(features, axis=0)
        if features.shape[0] != rows:  # Not known before, where a shape is dynamic.
            raise ValueError(
                "A layer to be read must put out numbers for each sample. Received: "
                f"{name!r} in `layers`, with {features.shape[0]} rows for {rows}"
            )
        return self.layer_readout.read(
            features[: len(ids)], ids, self.num_classes, weight
        )


def _fixed_batch_size(model) -> int | None:
    shapes = [tuple(t.shape) for t in keras.tree.flatten(getattr(model, "inputs", []))]
    fixed = {shape[0] for shape in shapes if shape and shape[0] is not None}
    return fixed.pop() if fixed else None


def _equal_batches(sample, size=None):
    """Batches of one shape, so that one trace serves all.

    The last one is filled up with repeated rows of weight 0.
    """
    n = len(sample.class_ids)
    if size is None:
        size = math.ceil(n / math.ceil(n / BATCH_SIZE))
    weight = sample.sample_weight
    weight = np.ones(n, "float32") if weight is None else weight
    batches = []
    for start in range(0, n, size):
        rows = np.arange(start, start + size)
        inside, rows = rows < n, np.minimum(rows, n - 1)
        batch = (
            keras.tree.map_structure(lambda a, r=rows: a[r], sample.x),
            sample.class_ids[rows],
            np.where(inside, weight[rows], 0.0).astype("float32"),
        )
        batches.append(keras.tree.map_structure(keras.ops.convert_to_tensor, batch))
    return batches
