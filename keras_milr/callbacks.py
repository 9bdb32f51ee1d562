"""The callback that sets the learning rate from mutual information."""

import copy
import inspect
import math
import re
import warnings

import keras
import numpy as np

from keras_milr import (
    _keras,
    backend,
    company,
    policies,
    probe,
    rates,
    readouts,
    records,
    sampling,
)
from keras_milr._arguments import (
    LARGEST,
    LARGEST_SEED,
    check_bool,
    check_integer,
    check_number,
    check_verbose,
)
from keras_milr.controller import Controller, check_bounds
from keras_milr.metrics import MetricTable
from keras_milr.outputs import outputs_of, signature
from keras_milr.range_test import LRRange, lr_range_test, show
from keras_milr.rollback import MOST, Rollback
from keras_milr.state import State, resuming
from keras_milr.targets import check_kind
from keras_milr.timing import Timing

_LAYER_READOUTS = (readouts.LinearReadout, readouts.UnitHistogram)
_FEW_STEPS = 30  # of an epoch


@keras.saving.register_keras_serializable(package="keras_milr")
class MutualInformationLR(keras.callbacks.Callback):
    """Sets the learning rate from the mutual information of outputs and labels.

    After every epoch (or every `update_freq` batches) the callback measures how much
    the network's output says about the labels, in nats, and a policy sets the learning
    rate from that. It measures on a fixed sample of `probe_data`, in one compiled pass
    that leaves the model as it is. Without `probe_data` it uses the table of the
    `MutualInformation` metric that the model is compiled with.

    Two lower bounds of the information are measured in the same pass: the counted
    mutual information of (prediction, label), and H(Y) − CE. The larger one is what the
    policy sees. It is measured in inference mode, but with batch normalisation as in
    training: by the statistics of the probe's batches, since the averages for inference
    lag behind the weights by some hundred batches.

    Labels may be of any kind: classes, yes or no, several of these at once, numbers;
    one for each sample, token or pixel, of one output or several. Each yes-or-no label
    is measured by itself, and so is each output; the mean drives the policy. Numbers
    are read in bins of equal numbers of samples, as many as the counts allow; there is
    no H(Y) − CE of them. See `targets` and `output`.

    With `layers` there is a rate for each layer, or group of layers, of a model that is
    compiled with a `LayerwiseOptimizer`. All of them are read in the same pass as the
    output. A layer's reading is what a linear readout can tell from it about the
    labels, in nats as for the output; see `readouts.LinearReadout`. The policy then
    works on arrays with an entry for each layer: it moves the rate of a layer by what
    the layer's own reading has gained beyond the noise, and keeps the ratio between
    rates within 30. The callback sets the layer's multiplier, which is its rate divided
    by the optimizer's learning rate; the latter stays for others to set. Layers near
    the input say nearly all that they will ever say from the start, so mostly the
    upper ones move. No mapping from the information in layers to their rates is known
    that beats its own controls; take it as a diagnostic and an experiment, and see the
    README for what was measured.

    It adds these keys to the logs of each epoch:

    - `learning_rate`: the rate that the last batch of the epoch was trained with.
    - With a probe, of the last reading: `probe_mutual_information`, counted and
      corrected for bias, and `probe_information`, which is what the policy sees for the
      network. With batch normalisation these two are read once more at the end of the
      epoch, in inference as `predict` does it; `history` has what the policy saw.
    - With `layers`: `learning_rate/<layer>` and `probe_mutual_information/<layer>`.

    In the list of callbacks it must stand before `BackupAndRestore`, and before one of
    your own that uses these keys, calls `evaluate` or changes weights; and after one of
    your own that sets the rate too, whose rate it then takes up. Among others of Keras
    it may stand anywhere: it is called after `LearningRateScheduler` and
    `ReduceLROnPlateau`, and before `TensorBoard`, `CSVLogger`, `SwapEMAWeights` and
    whatever monitors `probe_mutual_information` or `probe_information`, of which more
    is better. So readings are of the weights that are trained, not of their averages.
    What `TensorBoard` logs as `learning_rate` is the optimizer's rate by then, which is
    that of the next epoch. The same holds of a `ReduceLROnPlateau` that monitors one of
    our keys.

    In a training loop of your own, call its hooks as `fit` does. `initial_epoch` is the
    first epoch that you pass to them. It needs `probe_data`, since `train_on_batch`
    resets metrics before each batch:

    ```python
    callbacks = keras.callbacks.CallbackList(
        [callback], model=model, epochs=10, steps=len(batches)
    )
    callbacks.on_train_begin()
    for epoch in range(10):
        model.reset_metrics()
        callbacks.on_epoch_begin(epoch)
        for i, (x, y) in enumerate(batches):
            callbacks.on_train_batch_begin(i)
            logs = model.train_on_batch(x, y, return_dict=True)
            callbacks.on_train_batch_end(i, logs)
        callbacks.on_epoch_end(epoch, logs)
    callbacks.on_train_end()
    ```

    Where several workers train one model, by `tf.distribute`, each needs one: they wait
    for each other, and all act on what the first of them has read.

    A training that was interrupted can be resumed, and its rates go on as if nothing
    had happened. With `BackupAndRestore` among the callbacks, start the same script
    again; with its `double_checkpoint=True` even a kill while it saves is survived.
    Whatever else saves the model or its weights during `fit`, such as
    `ModelCheckpoint`, saves the state of this callback in the same file:

    ```python
    model = keras.models.load_model("checkpoint-07.keras")
    callback.load_state("checkpoint-07.keras")
    model.fit(x_train, y_train, initial_epoch=7, epochs=20, callbacks=[callback])
    ```

    A training that had come to its end goes on with more `epochs` from its highest
    rate, as in another `fit`. Without `load_state`, a model from a file that was saved
    late in a training has the low rate of then: compile it again, or pass
    `learning_rate=`.

    While less than half of H(Y) is known, and after a reading that was worse than the
    best, such a file also has the weights to roll back to, and is larger. The order of
    batches is not in it: with `shuffle=True` a resumed `fit` draws another order than
    the training would have had. On JAX a keyboard interrupt inside of a training step
    leaves a model without weights, since Keras has given them to the step: go on from
    a file.

    Example:

    ```python
    callback = keras_milr.MutualInformationLR(probe_data=(x_train, y_train))
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(x_train, y_train, epochs=20, callbacks=[callback])
    keras_milr.plot_history(callback).savefig("history.png")
    ```

    Args:
        policy: How a reading becomes the next rate. `"decay"`, `"reference"`,
            `"relative"`, a policy of `keras_milr.policies`, or any callable
            `policy(reading) -> rate` of a `keras_milr.policies.Reading`; its result
            is clipped to the bounds. A callable must be a pure function of the reading:
            it is called once before training, to check its result. To serialise, it
            must be registered with `keras.saving.register_keras_serializable`. It may
            have attributes `undoes_raises`, `early_readings`, `glides` and `anneals`,
            which say when it is read and how its rates are set; they are described in
            `keras_milr.policies`. Defaults to `"decay"`, which has all four.
        probe_data: What to measure on: `(x, y)`, `(x, y, sample_weight)`, or an
            iterable of such batches (`tf.data.Dataset`, `keras.utils.PyDataset`,
            `DataLoader`, generator). It is gone through once before the first epoch, or
            twice with `learning_rate="auto"`, for which a generator does not serve. Of
            a large dataset, pass a part such as `dataset.take(200)`. Inputs may be
            sparse arrays of SciPy. The training data are a good choice, with their
            class weights, if there are any, as sample weights. Defaults to `None`: use
            the metric.
        probe_size: Integer, size of the class-stratified sample that is drawn once
            from `probe_data` and reused for every reading; at least 2 per class. All
            data are used where there are fewer. Defaults to `2048`.
        layers: Which layers have a rate of their own: `"all"` that have trainable
            weights, a name or regular expression, or a list of these. Or a dict from
            the name of a group to its layers, which share one rate: it is the highest
            of theirs, their multipliers keep their ratios, and the one that is called
            last is read. Other layers keep their multiplier. Names are those of
            `LayerwiseOptimizer.summary()`. Defaults to `None`: one rate for the
            network.
        readout: How to read. `"auto"`, a `keras_milr.readouts.Predictions` for the
            output, or with `layers` a `readouts.LinearReadout` or
            `readouts.UnitHistogram` for them. `"auto"` takes `from_logits` from the
            compiled losses, and a `LinearReadout` for layers. Where samples have a
            label for each position, layers must have the same positions, and are read
            at one position of each sample. Where a sample has more than 64 labels or
            numbers, layers are read by 64 of them. Defaults to `"auto"`.
        output: Name of the output to read, where the model has several. Defaults to
            `None`: the mean of all that have a loss, by their loss weights; one that
            cannot be read is left out, with a warning.
        targets: What the labels are: `"sparse"`, `"one_hot"`, `"soft"`, `"binary"`,
            `"multi_label"` or `"continuous"`, or a dict from the names of outputs to
            these; see the table in `keras_milr.targets`. Defaults to `"auto"`: by loss,
            labels and outputs together.
        learning_rate: The rate to start with. Float, or `"auto"` to find one by
            `lr_range_test` on `probe_data` before the first epoch. That takes at most
            as many training steps as an epoch of them, or seven if these are more, and
            leaves no trace. It trains on the batches of a dataset; arrays are cut in as
            many batches as `fit` has in an epoch, or in batches of 32 where that is
            not known. Defaults to `None`: keep the optimizer's.
        min_lr: Float `>= 0`, lower bound of the rate. A layer that starts below it, as
            under a warm-up of the base from 0, may stay there. Defaults to `1e-6`.
        max_lr: Float, upper bound of the rate. Defaults to `None`. With `"auto"` it is
            then the highest rate that trained in the range test; where an epoch has
            fewer than 30 steps, the one that learned fastest in it. Otherwise it is a
            thousand times the rate at the start. With `layers`, each rate is bounded by
            the highest multiplier at the start times the bound of `"auto"`, or, without
            `"auto"`, times ten times the optimizer's rate.
        reference: What the information is measured against. Float in nats, or a
            callable from `readouts.Information` to nats. Defaults to `None`: H(Y), the
            entropy of the labels.
        update_freq: `"epoch"`, or an integer number of batches from one reading to the
            next. With `"epoch"` there are further readings within epochs, at least 20
            batches apart, for policies that ask for them:

            - *Early readings*, for `"decay"` and `"reference"`: at the quarters of the
              first epoch, with a probe, to raise a rate that is far too low. There are
              none where classes are so rare that H(Y) is below half of that of equal
              classes, since little is known of them for long; and none where the
              cross-entropy is not known, as of numbers.
            - *Few epochs*, for `"decay"`: in a training of fewer than six epochs, whose
              length is known, six readings or more, equally many in each epoch.

            Defaults to `"epoch"`.
        rollback: Whether to set weights and optimizer state back when the training
            fails, and to go on at a lower rate. Each time warns; after the tenth the
            training stops. A training fails when

            - the loss, the weights or the optimizer's state are not finite;
            - with a probe, the output does not depend on the input any more, or is the
              same for nearly all samples, or is worse than the same guess for every
              sample after it was better. The last cannot be told of continuous targets,
              nor under a loss of your own, which may leave out some labels.
              Over-fitting is no failure, though on a probe that is held out the
              cross-entropy may rise above that of any guess.
            - under a policy that raises rates to see what comes, as `"decay"` and
              `"reference"` do: a raise has cost information; or for three readings in
              a row the information is below the best by a tenth of H(Y), and the
              cross-entropy above by as much.

            In most cases it goes on from the last good weights, at 0.3 of the rates
            (after a raise, of those before it). A raise that has cost information is
            just undone; but half of the rate of the start is taken, if the raise was
            from there. Where less than half was known of what seems attainable, it goes
            on from the start, at a tenth of the rates, and never above that; at 0.01 of
            them under a policy that raises rates, or 0.03 if it has just done so.

            Under a policy that raises rates, the rate of the start may be too high
            itself, unless a range test found it, and what it has done to the weights
            would stay. Signs of that, in the second reading, are a failure though half
            was known, a raise that has cost information, a loss of a tenth of H(Y), or
            the same output for more than a tenth of the samples, which units do that
            are zero for all. Then 0.3 of the rate is tried from the start, for as long;
            and if less is learned, what the first start had learned comes back, at half
            its rate. The same output for so many is a failure in any reading while less
            than half is known.
            Defaults to `True`.
        monitor: Without `probe_data`, the log key of the metric to use, such as
            `"val_mutual_information"`. It begins with the name of the output where
            there are several. A metric on the validation data is read after epochs
            only. Defaults to `None`: the metric on the validation data where there is a
            validation before the first reading, else on the training data.
        seed: Integer seed of the sample. Defaults to `0`.
        verbose: Integer. 0: quiet, 1: update messages. Defaults to `0`.

    Attributes:
        history: List of dicts, one for each reading, JSON-serialisable: `epoch` and
            `batch` (batches of that epoch trained by then), all fields of
            `policies.Reading` and of `readouts.Information`. With a probe the first is
            from before the training (`step` 0); within the first epoch, `step` is the
            share of it that has passed. With `layers` these fields are dicts
            from layer to number, and `output` has what was found at the output. Where
            that is a mean, `outputs`, by name, and up to 64 `labels` or `columns`, by
            number, have what it is the mean of, and `bins` has the number of bins of
            continuous targets.
        lr_range: The `LRRange` that was found with `learning_rate="auto"`, else `None`.

    Raises:
        ValueError: for arguments out of range, and before the first batch for anything
            that would fail later: neither probe nor metric, data that cannot be
            measured, an optimizer whose rate cannot be set, `layers` without a
            `LayerwiseOptimizer` or that name no layer with trainable weights, a policy
            that does not return finite rates.
        TypeError: for arguments of a wrong type.

    Reference:

    - [Vasudevan, 2018](https://arxiv.org/abs/1805.07249)
    - [Vasudevan, 2020](https://doi.org/10.3390/e22050560)
    """

    def __init__(
        self,
        policy="decay",
        probe_data=None,
        probe_size=2048,
        layers=None,
        *,
        readout="auto",
        output=None,
        targets="auto",
        learning_rate=None,
        min_lr=1e-6,
        max_lr=None,
        reference=None,
        update_freq="epoch",
        rollback=True,
        monitor=None,
        seed=0,
        verbose=0,
    ):
        super().__init__()
        check_integer("probe_size", probe_size, at_least=2)
        check_integer("seed", seed, at_least=0, at_most=LARGEST_SEED)
        check_bool("rollback", rollback)
        per_epoch = isinstance(update_freq, str) and update_freq == "epoch"
        if not per_epoch:
            check_integer("update_freq", update_freq, at_least=1, or_else="'epoch'")
        _check_rates(learning_rate, min_lr, max_lr, probe_data)
        if reference is not None and not callable(reference):
            check_number("reference", reference, above=0, at_most=LARGEST)
        check_verbose(verbose)
        _check_monitor(monitor, update_freq)
        _check_readout(readout, layers)
        _check_probed(probe_data, layers, output, targets, monitor)
        self.policy = policy
        self.probe_data = probe_data
        self.probe_size = probe_size
        self.layers = layers
        self.readout = readout
        self.output = output
        self.targets = targets
        self.learning_rate = learning_rate
        self.min_lr = min_lr
        self.max_lr = max_lr
        self.reference = reference
        self.update_freq = update_freq
        self.rollback = rollback
        self.monitor = monitor
        self.seed = seed
        self.verbose = verbose
        self.history = []
        self.lr_range = None
        self._state = State()
        # Keras may call batch hooks from another thread unless told otherwise. With
        # readings after epochs ours only keeps count; in batches, order matters.
        self.async_safe = per_epoch
        self._policy = policies.get(policy)
        early = getattr(self._policy, "early_readings", 0)
        check_integer("policy.early_readings", early, at_least=0)
        self._sample, self._drawn = None, (None, None)  # From what, and how.
        # What is measured: one of the two while `fit` runs.
        self._probe = None
        self._table = None

    def __deepcopy__(self, memo):
        # Tuners copy callbacks for each trial. Data may be large, or have no copies,
        # and the model of the last `fit` is no part of this.
        copied = copy.copy(self)
        copied.history = copy.deepcopy(self.history)
        copied._state = self._state.copy()
        return copied

    def set_model(self, model):
        super().set_model(model)
        company.take_place(self)

    def on_train_begin(self, logs=None):
        self.history = []
        self._controller = self._rollback = self._steps_made = None
        self._overruled = company.Overruled()
        self.lr_range = None
        self._timing = Timing(self.model, self.params, self.update_freq)
        if ignored := backend.ignored_distribution():
            warnings.warn(
                f"MutualInformationLR: {ignored} means nothing to Keras on the backend "
                f"{keras.backend.backend()!r}. The model trains and is measured on one "
                "device.",
                stacklevel=2,
            )
        self._state.begin(self)
        if self._is_auto():
            # An optimizer whose rate cannot be set is refused now.
            rates.set_base(self.model, rates.base_rate(self.model))
        elif self.learning_rate is not None and not self._state.resumes:
            rates.set_base(self.model, self.learning_rate)
        if self.probe_data is None:
            self._rates = rates.NetworkRate(self.model)
            self._table = MetricTable(self.model, self.monitor)
        else:
            sample = self._draw_sample()  # Builds the model, where it is not built.
            groups, layer_readout = (), None
            if self.layers is None:
                self._rates = rates.NetworkRate(self.model)
            else:
                self._rates = rates.LayerRates(self.model, self.layers)
                groups, layer_readout = self._rates.groups, self._layer_readout()
            known = isinstance(self.readout, readouts.Predictions)
            self._probe = probe.Probe(
                self.model,
                sample,
                self.readout if known else None,
                groups,
                layer_readout,
            )
        if not self._is_auto() and not self._state.resumes:
            check_bounds(self._rates, self.min_lr, self.max_lr)

    def on_epoch_begin(self, epoch, logs=None):
        self._timing.begin_epoch(epoch)
        self._trained = None
        self._failed = False
        if self._table is not None:
            self._table.begin_epoch()
        # Not in `on_train_begin`: a callback after this one may restore a backup there.
        if self._controller is None:
            self._state.start()
            if self._state.resumes:
                self._resume(epoch)
            else:
                self._start(epoch)
        self._controller.begin_epoch()
        self._timing.divide(self._early_readings(epoch))
        self._note_state(epoch)

    def on_train_batch_begin(self, batch, logs=None):
        # All that is done within an epoch is done here, if it can be: before it calls
        # the hook at the end of a batch, Keras waits for the device.
        timing = self._timing
        if timing.is_due_before(batch):
            self._update({}, mid_epoch=True, passed=timing.passed)
            self._note_state(timing.epoch)
        if not self._controller.glides:
            return
        share = timing.way(batch, len(self.history))
        if share is not None:
            model = self.model  # With its state, as in `_measure`.
            if self._controller.glide(share):
                self._overruled.set(rates.base_rate(model))

    def on_train_batch_end(self, batch, logs=None):
        due = self._timing.is_due_after(batch)
        self._trained = None
        if self._table is not None and "verbose" not in (self.params or {}):
            self._table.check_is_whole()  # It is not `fit` that trains.
        if due:
            # Asked for its model, a callback has it with its state: on JAX that is with
            # the trainer within an epoch, and goes back to it with what is changed.
            self._trained = self._rates_now(self.model)
            self._update(logs, mid_epoch=True)
            self._note_state(self._timing.epoch)

    def on_test_begin(self, logs=None):
        if self._table is not None:
            self._table.begin_validation()

    def on_epoch_end(self, epoch, logs=None):
        logs = {} if logs is None else logs
        self._timing.end_epoch()
        if self._table is not None:
            self._table.end_epoch(logs)
        base, by_layer = self._rates_of_last_batch(logs)
        logs["learning_rate"] = base
        self._check_steps()
        shown = None
        if self._probe is not None and self._probe.has_averages:
            shown, _ = self._measured(self.model, by_batch=False, with_layers=False)
        if self.update_freq == "epoch":
            if self.layers is None:
                self._overruled.trained_at(base)
            self._update(logs)
        self._note_state(epoch + 1)
        if self._probe is None:
            return
        output, infos = self._last
        shown = shown or output
        logs["probe_mutual_information"] = shown.value
        logs["probe_information"] = shown.accessible
        if self.layers is None:
            return
        for name, rate, info in zip(self._rates.names, by_layer, infos, strict=True):
            logs[f"learning_rate/{name}"] = float(rate)
            logs[f"probe_mutual_information/{name}"] = info.value

    def on_train_end(self, logs=None):
        failure = self._rollback and self._rollback.unfinished()
        if failure:
            self._roll_back(failure)
        if self._controller is not None:
            self._controller.end()
        self._state.end()
        self._probe = self._table = self._rollback = None  # Frees their memory.

    def save_state(self, path):
        """Saves what the next rates depend on, beside the model's weights.

        Only needed for weights that are saved without Keras: a file of Keras that is
        written during `fit` has the state in it. The weights to roll back to are not
        saved; after a resume those of that moment are.

        Args:
            path: Path of the file, ending in `.json`. It is replaced as a whole.

        Raises:
            ValueError: before the first reading, and for a path with another ending.
        """
        self._state.save(path)

    def load_state(self, path):
        """Makes the next `fit` go on from a state, for a model with its weights.

        `fit` then needs the `initial_epoch` that comes next. `BackupAndRestore` needs
        none of this.

        Args:
            path: Path of a `.keras` or `.weights.h5` file that was saved during `fit`,
                or of a file of `save_state`.

        Raises:
            ValueError: for a file without a state, or with one that is damaged; and in
                `fit` for a state of another model, epoch or way to measure.
        """
        self._state.load(path)

    def _note_state(self, epoch):
        """Notes this moment, between two readings, as before the given epoch."""
        within = epoch == self._timing.epoch  # Begun, and begun again after a resume.
        content = {
            "settings": self._settings(),
            "epoch": epoch,
            **self._timing.state(within),
            "max_lr": self._max_lr,
            "lr_range": self.lr_range and self.lr_range._asdict(),
            "controller": self._controller.state(within),
            "rates": self._rates.state(),
            "table": self._table and self._table.state(),
            "history": self.history.copy(),
        }
        self._state.note(content, self._rollback)

    def _settings(self):
        # Without the numbers of automatic names, which change from run to run.
        names = self._rates.names and [
            re.sub(r"_\d+", "", n) for n in self._rates.names
        ]
        return {
            "source": "metric" if self.probe_data is None else "probe",
            "layers": names,
            "update_freq": self.update_freq,
        }

    def _resume(self, epoch):
        """Goes on from a state, of which the model has the weights."""
        per_epoch = self.update_freq == "epoch" and self._probe is not None
        state, arrays, missing = self._state.take(epoch, self._settings(), per_epoch)
        with resuming():
            self._take_up(state, arrays)
            left = state["controller"]["left"]
            if left is not None and left <= missing:
                # That training had ended. This one goes on from the highest rate, as
                # it does in another `fit`.
                self._controller.end()
        if self.verbose > 0:
            show(
                f"MutualInformationLR resuming at epoch {epoch + 1}, with learning "
                f"rate {rates.base_rate(self.model):.4g}."
            )
        if missing:
            timing = self._timing
            timing.epoch, timing.batch = epoch - 1, timing.steps or 0
            self._update({})
            timing.begin_epoch(epoch)

    def _take_up(self, state, arrays):
        self._timing.resume(state)
        names = self._rates.names
        self.history = state["history"]
        if names:
            self.history = records.renamed(self.history, names)
        if state["lr_range"] is not None:
            self.lr_range = LRRange.from_lists(state["lr_range"])
        self._max_lr = state["max_lr"] if self.max_lr is None else self.max_lr
        self._rates.resume(state["rates"])
        self._controller = self._make_controller(state["controller"])
        if self._table is None:
            last = self.history[-1]
            infos = records.informations(last, names)
            output = records.informations(last["output"])[0] if names else infos[0]
            self._last = output, infos
        else:
            self._table.resume(state["table"])
        if self.rollback and state["rollback"] is not None:
            self._rollback = self._make_rollback()
            self._rollback.resume(state["rollback"], arrays)

    def _make_rollback(self):
        if self._probe is None:
            return Rollback(self.model)
        labels = self._sample.labels
        usual = all(one.target.usual_loss for one in labels)
        usual &= type(self.model).compute_loss is keras.Model.compute_loss
        return Rollback(self.model, sampling.even_entropy(labels), usual)

    def _make_controller(self, state=None):
        return Controller(
            self._rates,
            self._policy,
            reference=self.reference,
            min_lr=self.min_lr,
            max_lr=self._max_lr,
            steps=self._timing.readings,
            noise=self._noise,
            searched=self.lr_range is not None and self.lr_range.found,
            state=state,
        )

    def _start(self, epoch):
        """Begins a training: finds the rate if it is to be found, and reads the start.

        The policy is tried on that reading, and the roll back keeps the weights.
        """
        anneals = getattr(self._policy, "anneals", False)
        if self._table is not None:
            anneals = anneals and self._table.is_seen_within_epochs
        self._timing.start(epoch, anneals)
        self._max_lr = self.max_lr
        if self._is_auto():
            self._find_rate()
            if self.max_lr is None:
                self._max_lr = self._highest_found()
        self._controller = self._make_controller()
        self._steps_made = rates.steps_made(self.model)
        if self._probe is None:
            # A metric has counted nothing yet: nothing is known, of one bit.
            infos = [readouts.Information(0.0, 0.0, math.log(2), 0.0, 0.0)]
        else:
            infos = self._measure()
            self._check_first(self._last[0])
        reading = self._controller.read(infos)
        if self._probe is not None:
            self._record(reading, infos)
        # A fault of the policy shows now and not after an epoch.
        self._controller.decide(reading)
        # A model without weights yet, which only the metric can read, is kept from its
        # first reading on; so is one of which only a training step builds some layer:
        # an optimizer that is built before does not take its weights.
        whole = self.model.optimizer.built or _keras.all_built(self.model)
        if self.rollback and self.model.built and whole:
            self._rollback = self._make_rollback()
            self._rollback.keep(self._output(infos), infos)

    def _is_auto(self):
        return isinstance(self.learning_rate, str)

    def _find_rate(self):
        data, batch_size = self.probe_data, None
        x, y, weight = data, None, None
        if isinstance(data, (tuple, list)):
            x, y, weight = (*data, None)[:3]
            steps = self._timing.steps
            rows = keras.tree.flatten(x)[0].shape[0]  # Sparse ones have no `len`.
            batch_size = -(-rows // steps) if steps else None
        try:
            self.lr_range = lr_range_test(
                self.model,
                x,
                y,
                batch_size=batch_size,
                probe_size=self.probe_size,
                seed=self.seed,
                verbose=self.verbose,
                sample_weight=weight,
                output=self.output,
                targets=self.targets,
            )
        except (TypeError, ValueError) as error:
            message = str(error).replace("`x`", "`probe_data`")
            raise type(error)(
                "Argument `learning_rate` could not be found by 'auto'; a number needs "
                f"no range test. {message}"
            ) from error
        high = math.inf if self.max_lr is None else self.max_lr
        rate = min(max(self.lr_range.best_lr, self.min_lr), high)
        rates.set_base(self.model, rate)
        if self.verbose > 0:
            show(f"MutualInformationLR starting with learning rate {rate:.4g}.")

    def _highest_found(self) -> float:
        """Upper bound of the rates, where only the range test knows of one."""
        highest = self.lr_range.max_lr
        few = (self._timing.length or _FEW_STEPS) < _FEW_STEPS
        if self.lr_range.found and few:
            # A gain in so few steps does not show that a raise serves more than the
            # rate that served best in the test.
            highest = self.lr_range.peak_lr
        # The bound of layers is one of their rates: multipliers of the optimizer's.
        scale = self._rates.get().max() / self.lr_range.best_lr
        return scale * max(highest, self.min_lr)

    def _early_readings(self, epoch) -> int:
        """How many readings the policy wants within this epoch: 0 but in the first.

        They are to find out whether the rate is far too low, and there are none where
        they could not tell. Of rare classes little is known for long, at any rate. And
        a rate that is too high, at which little is known either, can be told from one
        that is too low by the cross-entropy only, which not all labels have.
        """
        if (
            epoch != self._timing.first_epoch
            or self._probe is None
            or math.isnan(self._last[0].cross_entropy)
            or sampling.is_skewed(self._sample.labels, self._last[0].entropy)
        ):
            return 0
        return getattr(self._policy, "early_readings", 0)

    def _decides_nothing(self):
        """Whether a reading within the first epoch is worse than that of the start.

        The rate is not too low then. What else it does, the whole epoch will show, but
        where it has killed the network that is sure.
        """
        if self._rollback is not None and self._rollback.is_dead(self._last[0]):
            return False
        first = self.history[0]
        first = first.get("output", first)["cross_entropy"]
        return not self._last[0].cross_entropy <= first  # True for NaN.

    def _update(self, logs, mid_epoch=False, passed=None):
        """Takes a reading and sets the next rates.

        Args:
            logs: Logs of the epoch, or None.
            mid_epoch: Whether the epoch goes on afterwards, for the table of a metric.
            passed: For an early reading of a probe, the share of the first epoch that
                has passed. Defaults to `None`, for all others.
        """
        infos = self._measure(mid_epoch)
        if infos is None:
            self._timing.skip()
            return
        apart = 1 if passed is not None else self._timing.take()
        reading = self._controller.read(infos, passed, apart)
        self._record(reading, infos)
        raised = self._controller.tries()
        if passed is not None and not raised and self._decides_nothing():
            return
        if self.rollback:
            failure = self._failure(reading, infos, raised, logs)
            if failure is not None:
                self._roll_back(failure)
                return
        new = self._controller.act(reading)
        self._overruled.set(None if new is None else rates.base_rate(self.model))
        if new is not None and self.verbose > 0:
            self._show_rates(new, reading)

    def _failure(self, reading, infos, raised, logs):
        """What is wrong with the training, in words; else None, and weights are kept.

        Args:
            reading: The reading.
            infos: What it is made of, an `Information` for each rate.
            raised: Whether the policy has raised a rate at the reading before.
            logs: Logs of the epoch, or None.
        """
        if self._rollback is None:
            self._rollback = self._make_rollback()
        loss = float((logs or {}).get("loss", 0.0))
        if self._failed and not math.isfinite(loss):
            # The mean over an epoch with batches that were rolled back.
            loss = 0.0
        loss = float(backend.of_first_worker(self.model, np.asarray(loss)))
        return self._rollback.judge(
            self._output(infos),
            infos,
            loss,
            reading.step,
            reading.steps,
            explores=self._controller.explores(),
            raised=raised,
            at_start=self._controller.is_at_start(reading),
        )

    def _show_rates(self, new, reading):
        names = self._rates.names
        what = f"rate to {new[0]:.4g}"
        if names:
            each = zip(names, new, strict=True)
            what = "rates to " + ", ".join(f"{n}: {rate:.4g}" for n, rate in each)
        # What rises does so at once.
        falls = self._controller.glides and np.all(new <= reading.rate)
        verb = "lowering" if falls else "setting"
        show(
            f"\nEpoch {self._timing.epoch + 1}: MutualInformationLR {verb} "
            f"learning {what}."
        )

    def _roll_back(self, failure):
        """Goes back to earlier weights, at lower rates, and warns of it."""
        base, failed = self._rates_now(self.model)
        infos, way, place = self._rollback.restore()
        self._failed = True
        with self._rates.keeping_base(base):
            new = self._controller.roll_back(infos, failed, way)
        what = f"learning rate {new.max():.4g}"
        if self._rollback.count >= MOST:
            self.model.stop_training = True
            what = f"the training stops, since this was roll back {MOST}"
        warnings.warn(
            f"MutualInformationLR: epoch {self._timing.epoch + 1}, {failure}. Weights "
            f"and optimizer are back at {place}; {what}.",
            stacklevel=2,
        )

    def _output(self, infos):
        """What was read at the output: of layers, `infos` are something else."""
        return infos[0] if self._probe is None else self._last[0]

    def _measure(self, mid_epoch=False):
        """What was found for each rate; None where there is nothing to read yet."""
        model = self.model  # With its state, which on JAX the trainer has in an epoch.
        if self._table is not None:
            info = self._table.measure(mid_epoch)
            return None if info is None else [info]
        self._last = self._measured(model, by_batch=True)
        return self._last[1]

    def _measured(self, model, **arguments):
        """What the probe has found at the output, and for each rate."""
        output, by_layer = self._probe.measure(**arguments)
        if backend.on_several_workers(model):
            # All must decide the same, whatever data and device each of them has.
            found = readouts.to_array([output, *by_layer])
            found = backend.of_first_worker(model, found)
            output, *by_layer = readouts.from_array(found)
        return output, by_layer or [output]

    def _noise(self, info) -> float:
        within = self.update_freq != "epoch" or self._timing.divided > 1
        if self._table is not None and within:
            return math.sqrt(2) * info.stderr  # Each reading has other samples.
        return info.noise

    def _rates_of_last_batch(self, logs):
        """The rates before anybody has set those of the next one."""
        if self._trained is not None:  # We have, by a reading of it.
            return self._trained
        base, by_layer = self._rates_now(self.model)
        trained = logs.get("learning_rate", base)  # Who sets it too has logged it.
        return trained, by_layer * (trained / base if base > 0 else 1.0)

    def _rates_now(self, model):
        return rates.base_rate(model), self._rates.get()

    def _record(self, reading, infos):
        names = self._rates.names
        record = {"epoch": self._timing.epoch, "batch": self._timing.batch}
        record |= records.record(reading, infos, names)
        if names:
            record["output"] = self._last[0]._asdict()
        if self._probe is not None:
            record |= self._probe.details
        self.history.append(record)

    def _draw_sample(self):
        """The sample, kept from one `fit` to the next."""
        model, sample = self.model, self._sample
        data, chosen = self._drawn
        how = self.probe_size, self.seed, self.output, self.targets
        kept = sample is not None and data is self.probe_data and chosen == how
        if not kept or sample.signature != signature(outputs_of(model, sample.x)):
            sample = sampling.draw_sample(self.probe_data, model, *how)
            self._sample, self._drawn = sample, (self.probe_data, how)
            for note in sample.notes:
                warnings.warn(f"MutualInformationLR: {note}", stacklevel=2)
        return sample

    def _layer_readout(self):
        if isinstance(self.readout, _LAYER_READOUTS):
            return self.readout
        return readouts.LinearReadout(seed=self.seed)

    def _check_first(self, info):
        kinds = {labels.target.kind for labels in self._sample.labels}
        if not math.isnan(info.bound) or "continuous" in kinds:
            return
        if kinds == {"binary"}:
            raise ValueError(
                "The model's single output has values outside [0, 1], so 0.5 cannot be "
                "the threshold between the classes. If it is a logit, compile with "
                "`BinaryCrossentropy(from_logits=True)` or pass "
                "`readout=keras_milr.readouts.Predictions(from_logits=True)`. If it is "
                "a number, pass `targets='continuous'`."
            )
        warnings.warn(
            "MutualInformationLR: the model's outputs are not probabilities, and its "
            "loss does not say that they are logits. H(Y) − CE cannot be measured, and "
            "the counted mutual information alone sets the rate. If they are logits, "
            "pass `readout=keras_milr.readouts.Predictions(from_logits=True)`.",
            stacklevel=2,
        )

    def _check_steps(self):
        """Warns, once, of an optimizer that does not train the model."""
        before, self._steps_made = self._steps_made, None
        if before is None or self._failed or rates.steps_made(self.model) != before:
            return
        warnings.warn(
            "MutualInformationLR: `model.optimizer` has made no step in the first "
            "epoch, so its learning rate, which is the one that is set, does nothing. "
            "A `train_step` of your own must train with `self.optimizer`. "
            f"Received: {type(self.model.optimizer).__name__}",
            stacklevel=2,
        )

    # ------------------------------------------------------------ serialisation

    def get_config(self):
        """The constructor's arguments, except `probe_data`, which is no setting.

        Raises:
            ValueError: for a policy or reference of one's own that is not registered.
        """
        names = (
            *("probe_size", "layers", "output", "targets", "learning_rate", "min_lr"),
            *("max_lr", "update_freq", "rollback", "monitor", "seed", "verbose"),
        )
        objects = ("policy", "readout", "reference")
        return {name: getattr(self, name) for name in names} | {
            name: _serialized(name, getattr(self, name)) for name in objects
        }

    @classmethod
    def from_config(cls, config, probe_data=None):
        objects = ("policy", "readout", "reference")
        deserialize = keras.saving.deserialize_keras_object
        arguments = config | {name: deserialize(config[name]) for name in objects}
        return cls(probe_data=probe_data, **arguments)


def _serialized(name, value):
    """By name and constants. Of a lambda, Keras would save the code itself."""
    if callable(value):
        kind = value if inspect.isroutine(value) else type(value)
        registered = keras.saving.get_registered_name(kind)
        if keras.saving.get_registered_object(registered) is not kind:
            raise ValueError(
                f"Argument `{name}` must be registered, by "
                "`@keras.saving.register_keras_serializable()` on a function or class, "
                f"to be part of a configuration. Received: {name}={value!r}"
            )
    return keras.saving.serialize_keras_object(value)


def _check_rates(learning_rate, min_lr, max_lr, probe_data):
    check_number("min_lr", min_lr, at_least=0)
    if max_lr is not None:
        check_number("max_lr", max_lr, above=0, at_most=LARGEST)
        if min_lr > max_lr:
            raise ValueError(
                "Argument `min_lr` must not be above `max_lr`. "
                f"Received: min_lr={min_lr}, max_lr={max_lr}"
            )
    auto = isinstance(learning_rate, str) and learning_rate == "auto"
    if learning_rate is not None and not auto:
        check_number(
            "learning_rate", learning_rate, above=0, at_most=LARGEST, or_else="'auto'"
        )
    if auto and probe_data is None:
        raise ValueError(
            "Argument `learning_rate` needs `probe_data` to be found: the range "
            "test trains and measures on them. "
            "Received: learning_rate='auto', probe_data=None"
        )


def _check_monitor(monitor, update_freq):
    if monitor is not None and not isinstance(monitor, str):
        raise TypeError(
            "Argument `monitor` must be a log key. "
            f"Received: monitor={monitor!r} of type {type(monitor).__name__}"
        )
    if update_freq != "epoch" and str(monitor).startswith("val_"):
        raise ValueError(
            "A metric on the validation data changes once an epoch: "
            "`update_freq` must be 'epoch' with it. "
            f"Received: update_freq={update_freq!r}, monitor={monitor!r}"
        )


def _check_probed(probe_data, layers, output, targets, monitor):
    """Checks what needs a probe, and what must not be given with one."""
    if layers is not None and probe_data is None:
        raise ValueError(
            "Argument `layers` needs `probe_data`: a metric knows nothing of what "
            f"layers say. Received: layers={layers!r}, probe_data=None"
        )
    if output is not None and not isinstance(output, str):
        raise TypeError(
            "Argument `output` must be the name of an output of the model. "
            f"Received: output={output!r} of type {type(output).__name__}"
        )
    check_kind(targets)
    given = {"output": output, "targets": None if targets == "auto" else targets}
    for name, value in given.items():
        if value is not None and probe_data is None:
            raise ValueError(
                f"Argument `{name}` needs `probe_data`: a metric belongs to one "
                "output, and is told the kind of its labels itself. "
                f"Received: {name}={value!r}, probe_data=None"
            )
    if monitor is not None and probe_data is not None:
        raise ValueError(
            "Arguments `monitor` and `probe_data` exclude each other: one names a "
            "metric, the other replaces it. "
            f"Received both, with monitor={monitor!r}"
        )


def _check_readout(readout, layers):
    known = (readouts.Predictions, *(() if layers is None else _LAYER_READOUTS))
    if not isinstance(readout, known) and not (
        isinstance(readout, str) and readout == "auto"
    ):
        raise TypeError(
            "Argument `readout` must be 'auto' or a readouts.Predictions, or with "
            "`layers` a readouts.LinearReadout or readouts.UnitHistogram. "
            f"Received: readout={readout!r}, layers={layers!r}"
        )
    if getattr(readout, "reduce", "mean") is None:
        raise ValueError(
            "Argument `readout` must give one number for each layer: set `reduce` to "
            f"'mean' or 'max'. Received: readout={readout!r} with reduce=None"
        )
