"""Trainings in which something goes wrong: model and rate stay usable."""

import resource

import keras
import numpy as np
import pytest

import keras_milr
from keras_milr import MutualInformationLR, probe, rates
from keras_milr.untouched import assign
from tests import killed

LOW, HIGH = 1e-5, 1.0
ROLLED_BACK = "are back at the"


class Spoiled(keras.utils.PyDataset):
    """Data whose loss is multiplied with a number, in one batch of the third epoch.

    Keras does not tell of each epoch once on all backends: `epoch` is for us to set.
    """

    def __init__(self, data, value):
        super().__init__()
        self.data = data
        self.value = value
        self.epoch = 0

    def __len__(self):
        return len(self.data[1]) // 64

    def __getitem__(self, i):
        x, y = (a[64 * i : 64 * (i + 1)] for a in self.data)
        weight = self.value if (self.epoch, i) == (2, 11) else 1.0
        return x, y, np.full(len(y), weight, "float32")


def make_model(optimizer="adam", layers=None):
    model = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(16, activation="relu"),
            keras.layers.BatchNormalization(momentum=0.9),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    optimizer = keras.optimizers.get(optimizer)
    optimizer.learning_rate = (
        0.1 if isinstance(optimizer, keras.optimizers.SGD) else 0.01
    )
    if layers:
        optimizer = keras_milr.LayerwiseOptimizer(optimizer)
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def make_callback(data, policy="relative", **options):
    bounds = {"min_lr": LOW, "max_lr": HIGH}
    return MutualInformationLR(policy, data, **(bounds | options))


def fit(model, data, callbacks, **options):
    options = {"epochs": 5, "batch_size": 64, "verbose": 0} | options
    return model.fit(*data, callbacks=callbacks, **options)


def values(model):
    variables = [*model.weights, *model.optimizer.variables]
    return [keras.ops.convert_to_numpy(v).copy() for v in variables]


def assert_usable(model, callback, data):
    """Finite all over, rates within bounds, and it trains on."""
    for value in values(model):
        assert np.all(np.isfinite(value))
    bounds = pytest.approx(LOW), pytest.approx(HIGH)
    present = callback._rates.get()
    readings = [record["rate"] for record in callback.history]
    readings = [r.values() if isinstance(r, dict) else [r] for r in readings]
    for rate in np.concatenate([present, *map(list, readings)]):
        assert np.isfinite(rate)
        assert LOW <= rate <= HIGH or rate in bounds
    accuracy = fit(model, data, [callback], epochs=3).history["accuracy"]
    assert accuracy[-1] > 0.6
    assert "_keras_milr" not in vars(model)


@pytest.mark.parametrize("again", [False, True])
def test_saved_after_an_interruption(again, tmp_path, digits):
    """With what the training can go on from, until the model is compiled anew."""

    def interrupt(epoch, logs):
        if epoch == 2:
            raise KeyboardInterrupt

    model, path = make_model(), tmp_path / "model.keras"
    callback = keras_milr.MutualInformationLR(probe_data=digits)
    stop = keras.callbacks.LambdaCallback(on_epoch_end=interrupt)
    with pytest.raises(KeyboardInterrupt):
        fit(model, digits, [callback, stop], epochs=4)
    if again:
        model.compile(keras.optimizers.SGD(), "sparse_categorical_crossentropy")
    model.save(path)
    if again:
        with pytest.raises(ValueError, match="which has no state of one"):
            callback.load_state(path)
        with pytest.raises(ValueError, match="has no state to save"):
            callback.save_state(tmp_path / "state.json")
        saver = keras.callbacks.ModelCheckpoint(path)
        fit(model, digits, [saver], epochs=1)
    else:
        callback.load_state(path)
        model = keras.models.load_model(path)
        fit(model, digits, [callback], epochs=4, initial_epoch=3)
        assert callback.history[-1]["step"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize(
    ("optimizer", "layers", "update_freq"), [("sgd", None, "epoch"), ("adam", "all", 7)]
)
def test_gradients_that_are_nan_or_explode(
    optimizer, layers, value, update_freq, digits
):
    model = make_model(optimizer, layers)
    callback = make_callback(digits, layers=layers, update_freq=update_freq)
    spoiled = Spoiled(digits, value)
    count = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: setattr(spoiled, "epoch", epoch)
    )
    callbacks = [callback, count]
    with pytest.warns(UserWarning, match=rf"epoch 3, .*{ROLLED_BACK}"):
        model.fit(spoiled, epochs=5, shuffle=False, verbose=0, callbacks=callbacks)
    assert_usable(model, callback, digits)


class Raises(keras.callbacks.Callback):
    """Somebody else's callback, which fails in the third epoch."""

    def __init__(self, hook, error):
        super().__init__()
        self.epoch = 0
        setattr(self, hook, self.fail)
        self.error = error

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def fail(self, at, logs=None):
        if self.epoch == 2 or at == 2:
            raise self.error


@pytest.mark.parametrize(
    ("hook", "error", "first"),
    [
        ("on_epoch_begin", RuntimeError("theirs"), True),
        ("on_train_batch_end", KeyboardInterrupt(), False),
        ("on_epoch_end", RuntimeError("theirs"), True),
        ("on_epoch_end", KeyboardInterrupt(), False),
    ],
)
def test_a_callback_of_somebody_else_that_raises(error, hook, first, digits):
    model, callback = make_model(), make_callback(digits)
    order = [Raises(hook, error), callback]
    with pytest.raises(type(error)) as raised:
        fit(model, digits, order if first else order[::-1])
    assert raised.value is error
    assert_usable(model, callback, digits)


@pytest.mark.parametrize("update_freq", ["epoch", 7])
def test_a_policy_that_raises(update_freq, digits):
    def policy(reading):
        if reading.step == 2:
            raise ZeroDivisionError("of the policy")
        return 0.5 * reading.rate

    model = make_model()
    callback = make_callback(digits, policy, update_freq=update_freq)
    with pytest.raises(ZeroDivisionError, match="of the policy"):
        fit(model, digits, [callback])
    np.testing.assert_allclose(rates.base_rate(model), 0.005)  # The last that it set.
    assert len(callback.history) == 3
    other = make_callback(digits)
    fit(model, digits, [other], epochs=1)
    assert_usable(model, other, digits)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_a_policy_that_answers_nonsense_later(bad, digits):
    def policy(reading):
        return reading.rate * (bad if reading.step == 2 else 0.5)

    model = make_model()
    with pytest.raises(ValueError, match="`policy` must return finite rates"):
        fit(model, digits, [make_callback(digits, policy)])
    np.testing.assert_allclose(rates.base_rate(model), 0.005)


@pytest.mark.parametrize("layers", [None, "all"])
def test_interrupted_by_the_keyboard_in_a_reading(layers, digits, monkeypatch):
    """In the middle of the compiled passes over the sample."""
    model, callback = make_model(layers=layers), make_callback(digits, layers=layers)
    measure = probe.Probe.measure
    taken = []

    def interrupted(self, by_batch=False, **arguments):
        taken.append(by_batch)
        if by_batch and sum(taken) == 3:
            compiled = self._compiled

            def once(*kind):
                def step(*args):
                    compiled(*kind)(*args)
                    raise KeyboardInterrupt

                return step

            self._compiled = once
        return measure(self, by_batch, **arguments)

    monkeypatch.setattr(probe.Probe, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit(model, digits, [callback])
    assert len(callback.history) == 2
    assert_usable(model, callback, digits)


class Interrupted:
    """A variable in whose assignment the keyboard interrupts, once."""

    def __init__(self, variable, before):
        self.variable = variable
        self.before = before
        self.again = False

    def assign(self, value):
        if self.before and not self.again:
            self.again = True
            raise KeyboardInterrupt
        self.variable.assign(value)
        if not self.again:
            self.again = True
            raise KeyboardInterrupt


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("where", [[0], [3], [9], [1, 2, 8]])
def test_interrupted_in_a_roll_back_there_is_no_mixture(where, before):
    variables = [keras.Variable(np.zeros(3)) for _ in range(10)]
    interrupted = [
        Interrupted(v, before) if i in where else v for i, v in enumerate(variables)
    ]
    with pytest.raises(KeyboardInterrupt):
        assign([(v, np.ones(3)) for v in interrupted])
    for variable in variables:
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable), 1)


def test_interrupted_in_a_roll_back_of_a_training(digits, monkeypatch):
    """Weights, statistics and the optimizer are those of the good reading, all."""
    model, callback = make_model(), make_callback(digits)
    good = []

    class Look(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            good[:] = values(self.model)

    variable_type = type(model.weights[0])
    plain, calls = variable_type.assign, []

    def interrupting(self, value):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return plain(self, value)

    restore = keras_milr.rollback.Rollback.restore

    def restoring(self):
        monkeypatch.setattr(variable_type, "assign", interrupting)
        return restore(self)

    monkeypatch.setattr(keras_milr.rollback.Rollback, "restore", restoring)
    with pytest.raises(KeyboardInterrupt):
        fit(model, digits, [callback, Look(), killed.Spoil(poisoned=(2,))])
    monkeypatch.undo()
    assert len(calls) == 3 + 1 + len(good)
    names = [v.name for v in [*model.weights, *model.optimizer.variables]]
    for name, value, expected in zip(names, values(model), good, strict=True):
        if name != "learning_rate":  # Which the policy set after that reading.
            np.testing.assert_array_equal(value, expected)
    assert_usable(model, callback, digits)


class FullDisk(keras.callbacks.Callback):
    """Lets no file grow in an epoch."""

    def __init__(self, epoch, size):
        super().__init__()
        self.epoch = epoch
        self.size = size

    def on_epoch_end(self, epoch, logs=None):
        if epoch == self.epoch:
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, hard))


@pytest.mark.slow
def test_a_disk_that_is_full_while_saving(tmp_path, digits):
    def start(folder, *others):
        keras.utils.set_random_seed(0)
        model, callback = make_model(), make_callback(digits)
        backup = keras.callbacks.BackupAndRestore(folder, double_checkpoint=True)
        order = [callback, *others, backup]
        return model, callback, lambda: fit(model, digits, order, shuffle=False)

    model, expected, run = start(tmp_path / "other")
    run()
    model, callback, run = start(tmp_path / "backup", FullDisk(2, 4096))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OSError, match=r"File too large|[Uu]nable to|write failed"):
            run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_usable(model, callback, digits)
    # And with space again, the training is resumed.
    model, callback, run = start(tmp_path / "backup")
    run()
    assert [r["rate"] for r in callback.history] == [
        r["rate"] for r in expected.history
    ]
