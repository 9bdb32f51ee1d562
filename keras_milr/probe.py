"""One compiled pass that measures a model on a fixed sample."""

import contextlib
import functools
import math

import keras
import numpy as np

from keras_milr import _keras, backend, layers, outputs
from keras_milr.normalisation import BatchStatistics
from keras_milr.readouts import Columns, Information, Predictions, mean
from keras_milr.readouts.predictions import scaled, tally
from keras_milr.untouched import own_random_state

BATCH_SIZE = 256  # of a reading; a model with a batch size of its own keeps it
_QUESTIONS = 64  # that layers are read by, at most, and that are listed one by one
_INPUTS, _OUTPUTS = 2**22, 2**26  # numbers of a batch at most, but for a single row


def output_readout(target, readout=None):
    """The readout of an output: the given one, where it serves for the target."""
    if readout is not None:
        target = target._replace(from_logits=readout.from_logits)
    if target.by_unit:
        return Columns(target)
    return readout or Predictions(from_logits=target.from_logits)


class Probe:
    """Measures a model on a fixed sample, in one compiled pass.

    The forward pass and the counting run together, batch by batch, on the device that
    the model is on; only counts come back. With a `keras.distribution` each of its
    devices has a part of every batch; with a `tf.distribute` strategy the first device
    of each worker has all of it. Layers are read in the same pass, which
    keeps a few numbers of each sample for them; see `readouts.LinearReadout`. The model
    runs in inference mode and is left as it was: weights, averages, random seeds and
    metrics.

    Where an output has a label for each position, each counts, with its weight and
    within the mask that the model attaches to the output. Positions of one sample are
    not independent, so errors and biases are those of the effective number of samples,
    (Σw)² / Σw² with w the weight of all positions of a sample: as if those of one
    sample said all the same, which is the worst case. Layers are read at one position
    of each sample, drawn by the weights, so that rows are independent; and where each
    unit is a question of its own, by 64 of these at most, drawn once.

    Args:
        model: A built, compiled `keras.Model`.
        sample: What to measure on; see `sampling.draw_sample`.
        readout: A `readouts.Predictions`, for `from_logits`. Defaults to `None`: by the
            compiled losses.
        groups: List of `layers.Group` to read too. Defaults to none.
        layer_readout: A readout for them, such as `readouts.LinearReadout()`.

    Attributes:
        accuracy: Share of the labels that the last reading found predicted.
        finite: Whether all outputs were finite then.
        details: What that reading is the mean of, as a dict that is JSON-serialisable:
            `outputs`, where several are read, and of each, where it has them, `labels`
            or `columns` by number, and `bins`, where they are few.
    """

    def __init__(self, model, sample, readout=None, groups=(), layer_readout=None):
        self.layer_readout = layer_readout
        self.accuracy, self.finite, self.details = math.nan, True, {}
        self._labels = sample.labels
        self._readouts = [output_readout(one.target, readout) for one in self._labels]
        self._statistics = BatchStatistics(model)
        self._normalises, self._places = bool(self._statistics), None
        if self._normalises:
            # In the order of the data, a batch may be of one class.
            order = np.random.default_rng(0).permutation(len(sample.class_ids))
            self._places = np.argsort(order)
            sample = sample.of(order)
        fixed = outputs.fixed_batch_size(model, sample.x)
        self._batches = _equal_batches(sample, fixed)
        self._groups = list(groups)
        rng, self._rows = np.random.default_rng(0), len(self._batches[0][1][0])
        places = [math.prod(one.target.positions) for one in self._labels]
        places = places if self._groups else [1] * len(places)
        chances = [rng.uniform(1e-6, 1.0, (self._rows, n)) for n in places]

        @functools.cache
        def compiled(by_batch, with_layers):
            chosen = self._groups if with_layers else []
            return backend.compile_step(
                model, functools.partial(self._step, by_batch, chosen)
            )

        self._compiled = compiled
        self._empty = self._empty_state()
        self._chances = [
            keras.ops.convert_to_tensor(a.astype("float32")) for a in chances
        ]

    @property
    def has_averages(self) -> bool:
        """Whether batch normalisation goes by averages in inference, and only there."""
        return bool(self._statistics)

    def measure(self, by_batch=False, with_layers=True):
        """One reading of the model as it is now.

        Args:
            by_batch: Whether batches are normalised by their own statistics, as in
                training; see `BatchStatistics`. Defaults to `False`: as in inference.
            with_layers: Whether the groups are read too. Defaults to `True`.

        Returns:
            The `Information` of the outputs, and a list of that of each group.
        """
        state, parts = self._empty, []
        with_layers = with_layers and bool(self._groups)
        step = self._compiled(by_batch and self._normalises, with_layers)
        # A layer may draw from any generator, in inference too.
        with own_random_state(0):
            for batch in self._batches:
                state, features = step(state, *batch, self._chances)
                parts.append(features)
        return self._finish(state), self._read(parts) if with_layers else []

    def _step(self, by_batch, groups, forward, state, x, class_ids, weights, chances):
        """The forward pass of a batch, and what is counted of it; to be compiled.

        Args:
            by_batch: Whether the batch is normalised by its own statistics.
            groups: Groups of layers to read too.
            forward: The model, see `backend.compile_step`.
            state: A dict of counts for each output that is read.
            x: Inputs; so are the others a batch of what a sample has.
            class_ids: Ids for each of these outputs.
            weights: Weights, the same.
            chances: Random numbers that choose the position layers are read at.

        Returns:
            The new state, and for each of these outputs a tuple: the features of each
            group, and the ids and weights that these go with. Empty without groups.
        """
        normalised = contextlib.nullcontext()
        if by_batch:
            normalised = self._statistics.used(forward, x)
        with normalised, layers.recorded(groups) as activations:
            flat = keras.tree.flatten(forward(x))
            recorded = activations(self._rows)
        new, features, whole = [], [], None
        for i, labels in enumerate(self._labels):
            output, target = flat[labels.index], labels.target
            weight = _masked(weights[i], output, target)
            of_sample = keras.ops.sum(
                keras.ops.reshape(weight, (self._rows, -1)), axis=1
            )
            flat_rows = _flattened(output, class_ids[i], weight, target)
            new.append(
                {
                    "read": self._readouts[i].update(state[i]["read"], *flat_rows),
                    "weight": state[i]["weight"] + keras.ops.sum(of_sample),
                    "square": state[i]["square"] + keras.ops.sum(of_sample**2),
                }
            )
            if not groups:
                continue
            if target.positions:
                pick = _picked(weight, chances[i])
                ids = _at(class_ids[i], pick, target, target.by_unit)
                read = [
                    self.layer_readout.features(
                        [_activation_at(a, pick, target, group.name) for a in each]
                    )
                    for group, each in zip(groups, recorded, strict=True)
                ]
            else:
                # The same for all such outputs.
                whole = whole or [self.layer_readout.features(a) for a in recorded]
                ids, read = class_ids[i], whole
            features.append((read, ids, of_sample))
        return new, features

    def _empty_state(self):
        zero = np.zeros((), "float32")
        state = [
            {
                "read": readout.init(one.target.num_classes),
                "weight": zero,
                "square": zero,
            }
            for one, readout in zip(self._labels, self._readouts, strict=True)
        ]
        return keras.tree.map_structure(keras.ops.convert_to_tensor, state)

    def _finish(self, state) -> Information:
        infos, details, accuracies, self.finite = [], {}, [], True
        for labels, readout, found in zip(
            self._labels, self._readouts, state, strict=True
        ):
            scale = 1.0
            if labels.target.positions:
                weight, square = (
                    float(keras.ops.convert_to_numpy(found[name]))
                    for name in ("weight", "square")
                )
                scale = weight / max(square, 1e-30)
            known = {}
            if labels.target.shares is not None:
                known["shares"] = labels.target.shares
            infos.append(readout.finish(found["read"], scale, **known))
            details[labels.name] = _details(labels, readout, found["read"], scale)
            total, correct, none = (np.sum(a) for a in tally(scaled(found["read"])))
            accuracies.append(correct / max(total, 1e-30))
            self.finite &= bool(none == 0)
        shares = [labels.share for labels in self._labels]
        self.accuracy = float(np.average(accuracies, weights=shares))
        if len(infos) == 1:
            (self.details,) = details.values()
        else:
            named = zip(details.items(), infos, strict=True)
            each = {name: one._asdict() | detail for (name, detail), one in named}
            self.details = {"outputs": each}
        return mean(infos, shares)

    def _read(self, parts) -> list[Information]:
        """The reading of each group, the mean over all questions."""
        by_output = []
        for k, labels in enumerate(self._labels):
            features, ids, weights = zip(*(part[k] for part in parts), strict=True)
            target, n = labels.target, len(labels.class_ids)
            class_ids, weight = labels.class_ids, labels.sample_weight
            if target.positions:
                class_ids, weight = (
                    keras.ops.convert_to_numpy(self._in_order(batches[:n]))
                    for batches in map(keras.ops.concatenate, (ids, weights))
                )
                weight = weight * (weight.sum() / (weight**2).sum())
            readers = [
                self.layer_readout.reader(one, classes, weight)
                for one, classes in _questions(target, class_ids)
            ]
            infos, rows = [], sum(len(batch) for batch in ids)
            by_group = zip(*features, strict=True)
            for group, batches in zip(self._groups, by_group, strict=True):
                _check_rows(group, batches, rows)
                whole = self._in_order(_compiled_join()(batches, n))
                infos.append(mean([read(whole) for read in readers]))
            by_output.append(infos)
        shares = [labels.share for labels in self._labels]
        return [mean(infos, shares) for infos in zip(*by_output, strict=True)]

    def _in_order(self, rows):
        """Rows in the order of the sample."""
        if self._places is None:
            return rows
        return keras.ops.take(rows, self._places, axis=0)


def _questions(target, class_ids):
    """What layers are asked: pairs of class ids of shape `(n,)` and their number."""
    if not target.by_unit:
        return [(class_ids, target.num_classes)]
    classes = [2] * len(target.columns)
    if target.edges is not None:
        classes = [len(edges) + 1 for edges in target.edges]
    chosen = np.arange(len(classes))
    if len(chosen) > _QUESTIONS:
        chosen = np.random.default_rng(0).choice(chosen, _QUESTIONS, replace=False)
    return [(class_ids[:, i], classes[i]) for i in chosen]


def _check_rows(group, batches, rows):
    found = sum(batch.shape[0] for batch in batches)
    if found != rows:  # Not known before, where a shape is dynamic.
        raise ValueError(
            "A layer to be read must put out numbers for each sample. "
            f"Received: {group.name!r} in `layers`, with {found} rows for {rows}"
        )


@functools.cache
def _compiled_join():
    return backend.jit(_joined)


def _joined(batches, rows):
    return keras.ops.concatenate(batches, axis=0)[:rows]


def _details(labels, readout, state, scale) -> dict:
    target, details = labels.target, {}
    if target.kind == "continuous":
        bins = [len(edges) + 1 for edges in target.edges]
        if target.units <= _QUESTIONS:
            details["bins"] = bins if target.units > 1 else bins[0]
    if target.by_unit and 1 < target.units <= _QUESTIONS:
        key = "columns" if target.kind == "continuous" else "labels"
        parts = readout.parts(state, scale)
        details[key] = {str(column): one._asdict() for column, one in parts.items()}
    return details


def _masked(weight, output, target):
    """The weights of an output's positions, within the mask that it carries."""
    ops = keras.ops
    mask = _keras.mask_of(output)
    if mask is None:
        return weight
    missing = 1 + len(target.positions) - len(mask.shape)
    if missing < 0:
        raise ValueError(
            "The mask of an output must be one of its samples or positions. Received: "
            f"a mask of shape {tuple(mask.shape)} for an output of shape "
            f"{tuple(output.shape)}"
        )
    for _ in range(missing):
        mask = ops.expand_dims(mask, -1)
    return weight * ops.cast(mask, "float32")


def _flattened(output, class_ids, weight, target):
    """Outputs, ids and weights with all positions one after the other."""
    ops = keras.ops
    columns = (len(target.columns),) if target.by_unit else ()
    return (
        ops.reshape(output, (-1, target.units)),
        ops.reshape(class_ids, (-1, *columns)),
        ops.reshape(weight, (-1,)),
    )


def _picked(weight, chances):
    """One position of each sample, at random in proportion to the weights.

    A layer is read there only, so that the rows it is read from are independent.
    """
    ops = keras.ops
    weight = ops.reshape(weight, chances.shape)
    at_least = ops.maximum(weight, 1e-30)
    race = ops.where(weight > 0, ops.log(chances) / at_least, -np.inf)
    return ops.cast(ops.argmax(race, axis=1), "int32")


def _at(values, pick, target, channels: bool):
    """The values of each sample at its position."""
    ops = keras.ops
    rest = (values.shape[-1],) if channels else ()
    values = ops.reshape(values, (pick.shape[0], math.prod(target.positions), *rest))
    place = ops.reshape(pick, (-1, 1, *[1] * len(rest)))
    return ops.take_along_axis(values, place, axis=1)[:, 0]


def _activation_at(activation, pick, target, name):
    positions = tuple(target.positions)
    if tuple(activation.shape[1 : 1 + len(positions)]) != positions:
        raise ValueError(
            "With a label for each position, the layers to be read must have the same "
            f"positions, {positions}. Name those in `layers`. Received: {name!r}, "
            f"whose activations have shape {tuple(activation.shape)}"
        )
    rest = activation.shape[1 + len(positions) :]
    size = math.prod(rest)
    rows = keras.ops.reshape(activation, (pick.shape[0], *positions, size))
    return keras.ops.reshape(_at(rows, pick, target, True), (-1, *rest))


def _equal_batches(sample, size=None):
    """Batches of one shape, so that one trace serves all, and split over the devices.

    The last one is filled up with repeated rows of weight 0.
    """
    n = len(sample.class_ids)
    if size is None:
        most = max(1, min(BATCH_SIZE, *_mosts(sample)))
        size = math.ceil(n / math.ceil(n / most))
        size += -size % backend.shards()
    batches = []
    for start in range(0, n, size):
        rows = np.arange(start, start + size)
        inside, rows = rows < n, np.minimum(rows, n - 1)
        batch = (
            keras.tree.map_structure(lambda a, r=rows: a[r], sample.x),
            [one.class_ids[rows] for one in sample.labels],
            [_weights_of(one, rows, inside) for one in sample.labels],
        )
        batches.append(keras.tree.map_structure(backend.split, batch))
    return batches


def _mosts(sample):
    """How many rows a batch may have, by what counts and memory have to hold."""
    inputs = keras.tree.flatten(sample.x)
    # Activations take a multiple of the inputs, some hundred MB then.
    yield _INPUTS // max(1, sum(math.prod(a.shape[1:]) for a in inputs))
    for one in sample.labels:
        positions = math.prod(one.target.positions)
        yield _OUTPUTS // (positions * one.target.units)
        # Counts in float32 are exact for that many.
        yield 2**24 // (positions * (one.target.units if one.target.by_unit else 1))


def _weights_of(labels, rows, inside):
    weight = labels.sample_weight
    if weight is None:
        weight = np.ones((len(rows), *labels.target.positions), "float32")
    else:
        weight = weight[rows]
    inside = inside.reshape(-1, *[1] * len(labels.target.positions))
    return np.where(inside, weight, 0.0).astype("float32")
