"""A range test of the learning rate, judged by mutual information."""

import contextlib
import math
import warnings
from typing import NamedTuple

import keras
import numpy as np
from absl import logging

from keras_milr import backend, batches, sampling, trials
from keras_milr._arguments import (
    LARGEST,
    LARGEST_SEED,
    check_integer,
    check_number,
    check_verbose,
)
from keras_milr.plotting import plot_range
from keras_milr.untouched import own_random_state, untouched

_MOST_STEPS = 1_000_000  # of a candidate, where the number is given


class LRRange(NamedTuple):
    """What `lr_range_test` found.

    Arrays have an entry for each rate tried, in ascending order. Information and loss
    are read on samples that the model has not been trained on.

    Attributes:
        min_lr: The lowest rate that raised the information beyond the noise.
        max_lr: The highest rate that trained: it did not fail, nor any below it.
        best_lr: The rate to use: half a decade below `peak_lr`, more where there were
            fewer than 30 steps, but not below `min_lr`.
        peak_lr: The rate that learned most: of those that gained two thirds of the most
            information gained, or more, that with the lowest loss; `max_lr` where none
            had more than at the start beyond the noise.
        rates: The learning rates.
        information: Accessible information after the training, in nats. NaN where the
            training ended in numbers that are not finite.
        loss: Cross-entropy of the labels, in nats. NaN where the outputs are no
            probabilities, as with continuous targets.
        accuracy: Share of the labels that were predicted; of continuous targets, of
            their bins.
        failed: Whether the training failed.
        noise: Standard error of a change of the information.
        start: Information before any training.
        entropy: H(Y), all the information there is to have.
        steps: Training steps of all candidates together.
        found: Whether any rate raised the information beyond the noise, in at least two
            steps.
    """

    min_lr: float
    max_lr: float
    best_lr: float
    peak_lr: float
    rates: np.ndarray
    information: np.ndarray
    loss: np.ndarray
    accuracy: np.ndarray
    failed: np.ndarray
    noise: np.ndarray
    start: float
    entropy: float
    steps: int
    found: bool

    def plot(self):
        """Draws information, loss and accuracy over the rates.

        Returns:
            A `matplotlib.figure.Figure`.

        Raises:
            ImportError: without matplotlib (`pip install keras-milr[plot]`).
        """
        return plot_range(self)

    @classmethod
    def from_lists(cls, fields: dict):
        """The result whose `_asdict()` has been through JSON."""
        return cls(
            **{k: np.array(v) if isinstance(v, list) else v for k, v in fields.items()}
        )


def lr_range_test(
    model,
    x,
    y=None,
    candidates=None,
    steps=None,
    batch_size=None,
    layers=None,
    probe_size=2048,
    seed=0,
    verbose=1,
    *,
    sample_weight=None,
    class_weight=None,
    max_steps=None,
    output=None,
    targets="auto",
):
    """Finds the learning rates that a model can be trained with, and the best of them.

    Each rate gets a short training from the same start on the same batches, and is
    judged by the information that the outputs then have about the labels of samples it
    has not been trained on: the larger of the counted mutual information and
    H(Y) − CE. The search goes upward in decades and stops where training fails, then
    refines around the best. A training fails when its loss or outputs are not
    finite, or when the information collapses: less than half of what there was at a
    lower rate or at the start, and a loss that a constant predictor has too.

    `best_lr` is half a decade below `peak_lr`, the rate that learned most: what is
    fastest for a few steps is often too fast for a whole training. The test finds
    nothing where the steps raise the information beyond the noise at no rate, and where
    there is only one step for each rate. Then `best_lr` is the optimizer's own rate, or
    the nearest one that trained, and a warning says so. Information of less than a
    quarter of H(Y) counts only with a loss below H(Y), unless the loss of the start was
    above 1.5 H(Y): a network that has yet to begin may tell classes apart by
    differences that are small and pass.

    All trainings together take no more steps than there are batches in one epoch, or
    one for each rate if these are more, unless `steps` or `max_steps` ask for more.
    After each the model is read once, which is a prediction of at most `probe_size`
    samples.

    It leaves no trace, even when it is interrupted. Weights, optimizer, metrics,
    statistics of batch normalisation, random generators and compiled functions are as
    before, so that what is trained afterwards is bit for bit what it would have been.
    Only a model that has no weights yet is built. A `tf.data.Dataset` or a `DataLoader`
    is read in a copy, so that its shuffling does not go on either. What is kept
    elsewhere is not known: see `keras_milr.untouched`.

    To hold samples out costs nothing: a training sees a small part of an epoch, and the
    model is judged on other samples, which `fit` then trains on too. Where `steps` asks
    for more than half of a small set, that half is gone through more than once.

    Example:

    ```python
    model.compile(keras.optimizers.Adam(), "sparse_categorical_crossentropy")
    found = keras_milr.lr_range_test(model, x_train, y_train)
    found.plot().savefig("range.png")
    model.optimizer.learning_rate = found.best_lr
    model.fit(x_train, y_train, epochs=20)
    ```

    Args:
        model: A compiled `keras.Model`. Its state is the start.
        x: Inputs as `fit` takes them: array, also a sparse one of SciPy, structure of
            arrays, or with the labels in them a finite `tf.data.Dataset`,
            `keras.utils.PyDataset` or `DataLoader` of batches.
        y: Labels, where `x` is arrays. Defaults to `None`.
        candidates: Learning rates to try, in any order, each above 0. Defaults to
            `None`: decades from 1e-4 to 1, on to 1e-7 where the lowest is the best, and
            then half a decade below and above the best.
        steps: Integer, training steps for each rate. Defaults to `None`: at most 30,
            and as many as `max_steps` allows.
        batch_size: Integer, samples in a step. Defaults to `None`: 32, or those of the
            dataset's batches, which then must not be given.
        layers: Name or regular expression, or list of them, of layers whose rate is to
            be found, see `keras_milr.layers.choose`; others keep theirs. Needs a
            `LayerwiseOptimizer`. Defaults to `None`: the rate of the whole model.
        probe_size: Integer, samples to judge on, at least 2 per class. Fewer where
            there are no more. Defaults to `2048`.
        seed: Integer, seed of the draw of samples and batches and of all random numbers
            that are not the model's own. Defaults to `0`.
        verbose: Integer. 0: quiet, 1: say what it costs before it starts. Defaults to
            `1`.
        sample_weight: Weights of the samples, shape `(n,)`, where `x` is arrays; in
            training and in judging. Defaults to `None`.
        class_weight: Dict from class to weight, in training only, as `fit` takes it.
            Defaults to `None`.
        max_steps: Integer, training steps of all rates together, where `steps` is not
            given. Defaults to `None`: one epoch, or as many as there are rates.
        output: Name of the output to judge by, where the model has several. Defaults to
            `None`: the mean over outputs, by their loss weights.
        targets: Kind of the labels, or a dict from the names of outputs to kinds; see
            `MutualInformationLR`. Defaults to `"auto"`.

    Returns:
        An `LRRange`: `min_lr`, `max_lr`, `best_lr`, and the table.

    Raises:
        ValueError: for arguments out of range, data that cannot be measured, a model
            that is not compiled or trains on several workers, an optimizer with a
            `LearningRateSchedule`, all before anything is trained; and where training
            fails at every rate.
        TypeError: for arguments of a wrong type.

    Reference:

    - [Vasudevan, 2020](https://doi.org/10.3390/e22050560), where a range test bounds
      the rate. The search and its rules here are our own.
    """
    candidates = _check_arguments(
        candidates, steps, batch_size, layers, probe_size, seed, verbose, max_steps
    )
    # Small integers of NumPy overflow.
    steps, batch_size, max_steps = (
        None if n is None else int(n) for n in (steps, batch_size, max_steps)
    )
    probe_size, seed = int(probe_size), int(seed)
    _check_model(model)
    data = _as_data(x, y, batch_size, sample_weight, class_weight)
    default = 32 if y is not None else None  # That of the data.

    def most(length):
        size = batch_size or default or length
        return probe_size + size * (steps or trials.STEPS)

    with _naming_x():
        # In a single pass: a cache of TensorFlow that is begun may be cut off there.
        rows = sampling.draw_rows(data, model, most, seed, output, targets)
    batch_size = batch_size or default or rows.batch_sizes[0]
    with own_random_state(seed) as reseed:
        epoch = len(rows.batch_sizes)
        if y is not None:
            samples = sum(rows.batch_sizes)
            batch_size = min(batch_size, samples)  # As in `fit`.
            epoch = math.ceil(samples / batch_size)
        count = trials.COUNT if candidates is None else len(candidates)
        if steps is None:
            budget = max_steps or max(epoch, count)
            steps = trials.affordable_steps(budget, candidates)
        else:
            budget = count * steps
        with _naming_x():
            sample, training = _split(
                rows, model, steps, batch_size, class_weight, probe_size, seed
            )
        with untouched(model) as restart:
            trial = trials.Trial(model, layers, sample, training, restart, reseed)
            if verbose > 0:
                _announce(count, steps, batch_size, budget, epoch, sample)
            if candidates is None:
                trials.search(trial, budget)
            else:
                trials.upward(trial, candidates)
    return _result(trial)


def _result(trial):
    rows = trial.rows
    trained, moved = trials.trained(rows), trials.moved(trial)
    if not trained:
        raise ValueError(
            "Training fails at every rate that was tried, the lowest being "
            f"{rows[0].rate:g}. Pass lower `candidates`, or look for the fault in the "
            "model or the data."
        )
    nan, lowest = math.nan, (moved or trained)[0].rate
    peak = trials.best_of(trial).rate
    rate = max(lowest, peak / trials.margin(trial.length))
    if not moved:
        # The loss tells no more: of classes that are rare it is lowest where little
        # but their share was learned.
        peak = trained[-1].rate
        rate = min(max(trial.own_rate, lowest), peak)
        reason = "moved the information at no rate beyond the noise"
        if trial.length < trials.LEAST_STEPS:
            reason = "for each rate is too few to judge it by"
        warnings.warn(
            f"lr_range_test: {trial.length} step(s) {reason}, so the optimizer's own, "
            f"{rate:g}, counts as best. To find out, call `found = keras_milr."
            "lr_range_test(model, x, y, max_steps=...)` with more than the "
            f"{trial.taken} that all took, and train at `found.best_lr`. "
            f"Received: rates {[row.rate for row in trained]}",
            stacklevel=3,
        )
    return LRRange(
        min_lr=lowest,
        max_lr=trained[-1].rate,
        best_lr=rate,
        peak_lr=peak,
        rates=np.array([row.rate for row in rows]),
        information=np.array([r.info.accessible if r.info else nan for r in rows]),
        loss=np.array([row.loss for row in rows]),
        accuracy=np.array([row.accuracy for row in rows]),
        failed=np.array([row.failed for row in rows]),
        noise=np.array([row.info.noise if row.info else nan for row in rows]),
        start=float(trial.start.info.accessible),
        entropy=trial.start.info.entropy,
        steps=trial.taken,
        found=bool(moved),
    )


def _split(rows, model, steps, batch_size, class_weight, probe_size, seed):
    """What to judge on, and batches of other rows to train on."""
    n, wanted = len(rows.class_ids), steps * batch_size
    size = min(probe_size, n - min(wanted, n // 2))
    classes = rows.strata
    if size < 2 * classes <= probe_size and classes > 1:
        raise ValueError(
            "Argument `x` must have at least 4 samples for each class, to train on "
            f"some and judge on others. Received: {n} samples of {classes} classes"
        )
    data = (rows.x, rows.y)
    if rows.sample_weight is not None:
        data = (*data, rows.sample_weight)
    # What the first draw found of all data, a part of them might not show.
    kinds = {one.name: one.target.kind for one in rows.labels}
    output = rows.labels[0].name if len(kinds) == 1 else None
    drawn = sampling.draw_rows(data, model, size, seed, output, kinds)
    rng = np.random.default_rng([seed, 1])
    rest = np.setdiff1d(np.arange(n), drawn.positions)
    passes = math.ceil(wanted / len(rest))
    order = np.concatenate([rng.permutation(rest) for _ in range(passes)])
    weight = rows.sample_weight
    if class_weight is not None:
        if len(kinds) > 1 or rows.class_ids.ndim > 1:
            raise ValueError(
                "Argument `class_weight` needs one class for each sample. Use "
                "`sample_weight` instead. Received: outputs and labels "
                f"{kinds}"
            )
        weight = np.array([class_weight.get(int(c), 1.0) for c in rows.class_ids])
        weight = weight.astype(keras.config.floatx())
    training = []
    for start in range(0, wanted, batch_size):
        here = order[start : start + batch_size]
        batch = (rows.x, rows.y, weight)
        training.append(
            keras.tree.map_structure(
                lambda a, i=here: None if a is None else a[i], batch
            )
        )
    return drawn.sample(), training


def _check_arguments(
    candidates, steps, batch_size, layers, probe_size, seed, verbose, max_steps
):
    """The candidates in ascending order, or None."""
    for name, value in (
        ("steps", steps),
        ("batch_size", batch_size),
        ("max_steps", max_steps),
    ):
        if value is not None:
            most = _MOST_STEPS if name == "steps" else None
            check_integer(name, value, at_least=1, at_most=most)
    check_integer("probe_size", probe_size, at_least=2)
    check_integer("seed", seed, at_least=0, at_most=LARGEST_SEED)
    check_verbose(verbose)
    if steps is not None and max_steps is not None:
        raise ValueError(
            "Arguments `steps` and `max_steps` exclude each other: the first is for "
            "each rate, the second for all together. "
            f"Received: steps={steps}, max_steps={max_steps}"
        )
    if isinstance(layers, dict):
        raise TypeError(
            "Argument `layers` must be a name or regular expression, or a list of "
            f"them: one rate is looked for. Received: layers={layers!r}"
        )
    if candidates is None:
        return None
    if isinstance(candidates, (str, dict)) or np.ndim(candidates) != 1:
        raise TypeError(
            "Argument `candidates` must be a list of learning rates. "
            f"Received: candidates={candidates!r}"
        )
    if len(candidates) == 0:
        raise ValueError(
            "Argument `candidates` must have at least one learning rate. "
            f"Received: candidates={candidates!r}"
        )
    for i, rate in enumerate(candidates):
        check_number(f"candidates[{i}]", rate, above=0, at_most=LARGEST)
    return sorted({float(rate) for rate in candidates})


def _check_model(model):
    if not isinstance(model, keras.Model):
        raise TypeError(
            "Argument `model` must be a keras.Model. "
            f"Received: model={model!r} of type {type(model).__name__}"
        )
    if not model.compiled or model.optimizer is None:
        raise ValueError(
            "Argument `model` must be compiled, with the optimizer and the loss to "
            f"train with. Received: model {model.name!r}, not compiled"
        )
    if backend.on_several_workers(model):
        raise ValueError(
            "A range test runs in one process: Keras trains single batches on one "
            "worker only. Find the rate there, by `lr_range_test` on a model without "
            "a strategy, and pass the number. "
            f"Received: model {model.name!r}, which trains on several workers"
        )


def _as_data(x, y, batch_size, sample_weight, class_weight):
    """What `sampling.draw_rows` reads, and can read twice."""
    if class_weight is not None:
        if not isinstance(class_weight, dict):
            raise TypeError(
                "Argument `class_weight` must be a dict from class to weight. "
                f"Received: class_weight={class_weight!r}"
            )
        for name, value in class_weight.items():
            check_number(f"class_weight[{name!r}]", value, at_least=0)
        if sample_weight is not None:
            raise ValueError(
                "Arguments `class_weight` and `sample_weight` exclude each other, as "
                "in `fit`. Received both"
            )
    arrays = isinstance(x, (tuple, list, dict)) or batches.is_array(x)
    if y is not None:
        if not arrays:
            raise ValueError(
                "Argument `y` must be None where `x` has the labels in it. "
                f"Received: x of type {type(x).__name__} and y"
            )
        return (x, y) if sample_weight is None else (x, y, sample_weight)
    if arrays:
        raise ValueError(
            "Argument `y` must have the labels where `x` is arrays. "
            f"Received: x of type {type(x).__name__}, y=None"
        )
    if hasattr(x, "__next__"):
        raise ValueError(
            "Argument `x` must be data that can be read more than once, for the range "
            "test and afterwards: arrays, or a dataset. Received: an iterator, of type "
            f"{type(x).__name__}"
        )
    for name, value in (("batch_size", batch_size), ("sample_weight", sample_weight)):
        if value is not None:
            raise ValueError(
                f"Argument `{name}` must be None where `x` is a dataset, which has "
                f"batches and weights of its own. Received: {name}={value!r}"
            )
    return backend.fresh(x)


@contextlib.contextmanager
def _naming_x():
    """Errors about data name the argument that they came by here."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if "`probe_data`" not in str(error):
            raise
        message = str(error).replace("`probe_data`", "`x`")
        raise type(error)(message) from error


def _announce(count, steps, batch_size, budget, epoch, sample):
    cost = min(count * steps, budget)
    show(
        f"lr_range_test: up to {count} learning rates, {steps} step(s) of {batch_size} "
        f"samples each, at most {cost} steps or {cost / epoch:.0%} of an epoch. Each "
        f"is judged on {len(sample.class_ids)} other samples."
    )


def show(message):
    """Prints or logs a message, whichever Keras does with those of its callbacks."""
    if keras.config.is_interactive_logging_enabled():
        print(message, flush=True)
    else:
        logging.info(message)
