import contextlib
import json
import re
import warnings

import keras
import numpy as np
import pytest

import keras_milr
from keras_milr import rates
from keras_milr.readouts import Information, Predictions
from keras_milr.rollback import MOST, Rollback, Way, collapse, fell, is_below
from tests.backends import DRAWN, NAME

H = np.log(10)


def make_model(optimizer="sgd", classes=10, width=64, normalise=False):
    layers = [keras.Input((width,)), keras.layers.Dense(64, "relu")]
    if normalise:
        layers.append(keras.layers.BatchNormalization())
    layers += [
        keras.layers.Dense(64, "relu"),
        keras.layers.Dense(classes, activation="softmax"),
    ]
    model = keras.Sequential(layers)
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def info(
    accessible, cross_entropy, variation=0.5, entropy=H, stderr=0.02, repeated=0.0
):
    bound = max(entropy - cross_entropy, 0.0)
    return Information(
        value=accessible,
        raw=accessible,
        entropy=entropy,
        null=0.0,
        stderr=stderr,
        bound=min(bound, accessible),
        bound_stderr=stderr,
        cross_entropy=cross_entropy,
        variation=variation,
        repeated=repeated,
    )


class TestCollapse:
    START = info(0.02, 2.35)
    TRAINED = info(1.8, 0.5)

    @pytest.mark.parametrize(
        ("now", "best", "message"),
        [
            (info(0.0, 2.31, variation=0.0), TRAINED, "not depend on the input"),
            (info(0.0, 2.31, variation=1e-9), START, "not depend on the input"),
            (info(0.3, 2.5), TRAINED, "information was lost.* from 0.5 to 2.5 nats"),
            (info(0.0, 2.304), TRAINED, "information was lost"),
            (info(0.03, 2.6), START, "nothing was learned.* from 2.35 to 2.6 nats"),
            (info(0.4, 12.0), START, "nothing was learned"),
            (info(0.1, 2.2, repeated=0.8), TRAINED, "same for nearly all.*80%"),
            (info(0.1, 2.2, repeated=0.8), START, "same for nearly all"),
        ],
    )
    def test_is_seen(self, now, best, message):
        assert re.search(message, collapse(now, best, self.START))

    @pytest.mark.parametrize(
        ("now", "best", "first"),
        [
            (START, START, START),
            (info(1.7, 0.6), TRAINED, START),
            (info(0.0, 2.4), START, START),  # A little worse: not more than noise.
            (info(0.4, 1.9), TRAINED, START),  # Lost much, but better than a guess.
            (info(1.3, 6.0), TRAINED, START),  # Over-confident, and often right.
            # All wrong at the start: right answers come from unlearning.
            (info(0.0, 2.3), info(2.2, 8.0), info(2.2, 8.0)),
            # 98:2, everything is the majority class.
            (info(0.0, 0.3, entropy=0.1), *[info(0.0, 0.69, entropy=0.1)] * 2),
            (info(0.0, 0.102, entropy=0.1), *[info(0.01, 0.105, entropy=0.1)] * 2),
            # Zeros in the last layer: nothing depended on the input before either.
            (info(0.0, H, variation=0.0), *[info(0.0, H, variation=0.0)] * 2),
            # Sure of its classes, and right.
            (info(1.8, 0.5, repeated=0.9), TRAINED, START),
            # Samples that are the same, or were nearly so for the first weights.
            (info(0.0, 2.3, repeated=0.8), *[info(0.0, 2.3, repeated=0.8)] * 2),
            # Not probabilities.
            (info(0.0, np.nan), info(1.0, np.nan), info(0.0, np.nan)),
        ],
    )
    def test_is_not_imagined(self, now, best, first):
        assert collapse(now, best, first) is None

    def test_classes_may_be_trained_for_as_if_they_were_equal(self):
        """98:2, weighted to 50:50: at best nothing is known at log 2 nats."""
        even, first = np.log(2), info(0.0, 0.1, entropy=0.1)
        for now in (info(0.01, 0.69, entropy=0.1), info(0.01, 0.9, entropy=0.1)):
            assert collapse(now, first, first)
            assert collapse(now, first, first, even) is None
        now = info(0.01, 1.0, entropy=0.1)
        assert "above the same guess" in collapse(now, first, first, even)
        # Of classes that are equal nothing changes.
        now = info(0.03, 2.6)
        for first in (self.START, info(0.02, 3.0)):
            said = [collapse(now, first, first, even) for even in (0.0, H)]
            assert said[0] == said[1]

    def test_a_network_that_is_over_fitted_knows_what_it_knew(self):
        """On samples that are held out, the cross-entropy may rise without end."""
        best, now = info(0.5, 2.0), info(0.4, 12.0)
        assert collapse(now, best, self.START)
        assert collapse(now, best, self.START, learned=True) is None
        # But not one that knows nothing any more.
        for lost in (info(0.2, 12.0), info(0.03, 5.0)):
            assert collapse(lost, best, self.START, learned=True)
        little = info(0.06, 2.2)
        assert collapse(info(0.03, 5.0), little, self.START, learned=True)
        assert collapse(info(0.03, 2.6), little, self.START, learned=True) is None

    def test_a_loss_of_ones_own_may_leave_out_labels(self, digits):
        """Those of padding, whose cross-entropy rises while the others are learned."""

        class Masked(keras.losses.SparseCategoricalCrossentropy):
            def call(self, y_true, y_pred):
                losses = keras.losses.sparse_categorical_crossentropy(y_true, y_pred)
                return losses * keras.ops.cast(y_true > 0, losses.dtype)

        rng = np.random.default_rng(0)
        labels = np.where(rng.random(len(digits[1])) < 0.7, 0, digits[1])
        data = digits[0], labels
        model = make_model("adam")
        model.compile("adam", Masked())
        callback = keras_milr.MutualInformationLR(keep, probe_data=data)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            model.fit(*data, epochs=12, verbose=0, callbacks=[callback])
        assert callback.history[-1]["cross_entropy"] > 1.5 * np.log(10)
        known = labels > 0
        right = model.predict(digits[0], verbose=0).argmax(1) == labels
        assert right[known].mean() > 0.97

    def test_over_fitting_in_fit(self):
        """One label in five is wrong, and nobody can learn half of H(Y)."""
        rng = np.random.default_rng(0)
        x = rng.normal(size=(800, 20)).astype("float32")
        y = (x[:, 0] + x[:, 1] > 0) ^ (rng.random(800) < 0.2)
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [
                keras.Input((20,)),
                keras.layers.Dense(256, activation="relu"),
                keras.layers.Dense(256, activation="relu"),
                keras.layers.Dense(2, activation="softmax"),
            ]
        )
        model.compile("adam", "sparse_categorical_crossentropy")
        callback = keras_milr.MutualInformationLR(keep, probe_data=(x[400:], y[400:]))
        model.fit(x[:400], y[:400], epochs=60, verbose=0, callbacks=[callback])
        last = callback.history[-1]
        assert last["cross_entropy"] > 2 * np.log(2)
        assert last["rollbacks"] == 0


class TestRaise:
    BEST = info(1.0, 1.3)

    def test_costs_information(self):
        assert re.search("fell from 1 to 0.8 nats", fell(info(0.8, 1.5), self.BEST))
        # Of numbers there is no cross-entropy.
        assert fell(info(0.4, np.nan), info(1.0, np.nan))

    @pytest.mark.parametrize(
        "now",
        [
            info(1.2, 1.1),
            info(0.97, 1.5),  # Within the margin.
            info(0.8, 1.29),  # Fewer nats are counted, but it learns.
            info(0.8, 1.5, stderr=0.2),  # Within the noise.
            info(0.6, np.nan),
        ],
    )
    def test_costs_nothing(self, now):
        assert fell(now, self.BEST) is None

    @pytest.mark.parametrize("undoes", [True, False])
    @pytest.mark.parametrize("reached", [True, False], ids=["reached", "start"])
    def test_is_undone(self, undoes, reached, digits):
        """Back to the weights before the raise, and to a rate that served."""
        start = 5e-4 if reached else 1e-3
        model = make_model(keras.optimizers.Adam(start))

        def raised(reading):
            if reached and reading.step == 1:
                return 2 * reading.rate
            return reading.rate * (100 if reading.step == 3 else 1)

        raised.undoes_raises = undoes
        callback = keras_milr.MutualInformationLR(raised, digits)
        kept = {}

        def note(epoch, logs):
            kept[epoch] = [model.get_weights(), float(model.optimizer.iterations)]

        notes = keras.callbacks.LambdaCallback(on_epoch_begin=note)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            history = model.fit(
                *digits, epochs=5, verbose=0, callbacks=[callback, notes]
            )
        rates = history.history["learning_rate"]
        np.testing.assert_allclose(rates[:4], [start, 1e-3, 1e-3, 0.1], rtol=1e-5)
        said = [w for w in warned if "after the rate was raised the" in str(w.message)]
        found = [callback.history[i]["information"] for i in (3, 4)]
        assert found[1] < found[0] - 0.2
        if undoes:
            assert len(said) == 1
            assert rates[4] == pytest.approx(1e-3 if reached else 5e-4)
            assert callback.history[4]["rollbacks"] == 0
            assert callback.history[5]["rollbacks"] == 1
            for now, then in zip(*(kept[epoch] for epoch in (4, 3)), strict=True):
                np.testing.assert_equal(now, then)
        else:
            assert not [w for w in warned if w.category is UserWarning]
            assert not np.array_equal(kept[4][0][0], kept[3][0][0])


def test_outputs_of_the_sample_before():
    p = np.random.default_rng(0).dirichlet(np.ones(3), 8).astype("float32")
    p[[2, 3, 6]] = p[[1, 1, 5]]  # Rows 2, 3 and 6 are those before them.
    y = np.arange(8) % 3
    readout = Predictions()
    assert readout.measure(p, y, 3).repeated == pytest.approx(3 / 8)
    state = readout.init(3)
    for rows in (slice(0, 3), slice(3, 8)):  # Row 3 has none before it in its batch.
        weight = np.where(np.arange(8) == 6, 0.5, 1.0)[rows].astype("float32")
        state = readout.update(state, p[rows], y[rows], weight)
    assert readout.finish(state).repeated == pytest.approx(1.5 / 7.5)
    # Of a rare class most samples are easy: nobody doubts them.
    p = np.full((8, 1), 1e-7, "float32")
    p[3:6] = 0.2
    assert readout.measure(p, y > 1, 2).repeated == pytest.approx(2 / 8)
    assert readout.measure(np.eye(3)[[0] * 8], y, 3).repeated == 0


def test_what_it_is_judged_by(digits):
    """Cross-entropy and variation, in batches, with rows that are not finite."""
    _, y = digits
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(10), len(y)).astype("float32")
    readout, state = Predictions(), Predictions().init(10)
    for rows in np.array_split(np.arange(len(y)), 7):
        state = readout.update(state, p[rows], y[rows])
    found = readout.finish(state)
    loss = keras.losses.sparse_categorical_crossentropy(y, p)
    np.testing.assert_allclose(found.cross_entropy, np.mean(loss), rtol=1e-5)
    np.testing.assert_allclose(found.variation, np.ptp(p, axis=0).max(), rtol=1e-6)
    p[3] = np.nan
    again = readout.measure(p, y, 10)
    np.testing.assert_allclose(again.variation, np.ptp(p[4:], axis=0).max(), atol=0.02)
    same = readout.measure(np.repeat(p[:1], len(y), axis=0), y, 10)
    assert same.variation == 0.0
    single = readout.measure(p[5:, :1], y[5:] % 2, 2)
    np.testing.assert_allclose(single.variation, np.ptp(p[5:, 0]), rtol=1e-6)
    assert np.isnan(readout.measure(np.full((20, 2), np.nan), y[:20] % 2, 2).variation)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda: keras.optimizers.SGD(0.1, momentum=0.9),
        pytest.param(
            lambda: keras.optimizers.Adam(use_ema=True, ema_momentum=0.9),
            marks=pytest.mark.backends(
                *("tensorflow", "torch"),
                reason="Keras itself fails in a second `fit` with averages on JAX",
            ),
        ),
        lambda: keras_milr.LayerwiseOptimizer("adamw", layer_decay=0.5),
        lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam()),
    ],
)
def test_no_mixture_of_weights(optimizer, digits):
    """Everything is set back, bit for bit: statistics and the optimizer's state too."""
    model = make_model(optimizer(), normalise=True)
    x, y = digits
    model.fit(x, y, epochs=1, verbose=0)
    variables = [*model.weights, *model.optimizer.variables]
    kept = [keras.ops.convert_to_numpy(v).copy() for v in variables]
    guard = Rollback(model)
    good = info(1.8, 0.5)
    guard.keep(info(0.1, 2.3), ["start"])
    guard.keep(good, ["good"])
    model.fit(x, y, epochs=1, verbose=0)
    guard.keep(info(0.5, 1.5), ["worse"])  # Not kept.
    assert guard.restore() == (["good"], Way.CUT, "the last good reading")
    for variable, value in zip(variables, kept, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable), value)
    x, y = x[:64], y[:64]
    model.fit(x, y, epochs=1, verbose=0)  # And it trains on.


@pytest.mark.parametrize("scaled", [False, True])
def test_multipliers_that_others_have_set_stay(scaled, digits):
    """Layers are frozen and set free epoch by epoch, which no roll back undoes."""
    sgd = keras.optimizers.SGD(0.1, momentum=0.9)
    layerwise = keras_milr.LayerwiseOptimizer(sgd, {"dense": 0})
    optimizer = keras.optimizers.LossScaleOptimizer(layerwise) if scaled else layerwise
    keras.backend.clear_session()
    model = make_model(optimizer)
    x, y = digits
    model.fit(x, y, epochs=1, verbose=0)
    guard = Rollback(model)
    guard.keep(info(1.8, 0.5), ["good"])
    wanted = {"dense": 1.0, "dense_1": 0.5, "dense_2": 0.0}
    layerwise.set_multipliers(wanted)
    guard.restore()
    assert layerwise.multipliers == wanted
    first, last = (keras.ops.convert_to_numpy(model.layers[i].kernel) for i in (0, 2))
    first, last = first.copy(), last.copy()
    model.fit(x, y, epochs=1, verbose=0)
    kernels = [keras.ops.convert_to_numpy(model.layers[i].kernel) for i in (0, 2)]
    assert not np.array_equal(kernels[0], first)
    np.testing.assert_array_equal(kernels[1], last)


def test_to_the_start_while_little_is_known(digits):
    model = make_model()
    guard = Rollback(model)
    guard.keep(info(0.1, 2.3), ["start"])
    start = model.get_weights()
    model.fit(*digits, epochs=1, verbose=0)
    guard.keep(info(1.0, 1.3), ["some"])  # Less than half of H(Y).
    noisy = Rollback(model)  # But of noisy labels more than half of what there is.
    noisy.keep(info(0.1, 2.3), ["start"])
    noisy.keep(info(1.0, 1.3)._replace(attainable=1.9), ["some"])
    assert noisy.restore() == (["some"], Way.CUT, "the last good reading")
    same = Rollback(model)  # A guess that is the same for all, or nearly.
    same.keep(info(0.1, 2.3), ["start"])
    same.keep(info(0.2, 2.4)._replace(attainable=0.3), ["same"])
    assert same.restore() == (["start"], Way.RESTART, "the start")
    assert guard.restore() == (["start"], Way.RESTART, "the start")
    for now, then in zip(model.get_weights(), start, strict=True):
        np.testing.assert_array_equal(now, then)


@pytest.mark.backends("tensorflow", reason=DRAWN)
@pytest.mark.parametrize("rate", [1.0, 10.0])
@pytest.mark.parametrize("name", ["SGD", "Adam", "RMSprop"])
def test_a_start_far_too_high_ends_trained(name, rate, digits):
    keras.utils.set_random_seed(0)
    options = {"momentum": 0.9} if name == "SGD" else {}
    model = make_model(getattr(keras.optimizers, name)(rate, **options))
    callback = keras_milr.MutualInformationLR(probe_data=digits)
    with pytest.warns(UserWarning, match="are back at the"):
        history = model.fit(*digits, epochs=15, verbose=0, callbacks=[callback])
    assert history.history["accuracy"][-1] > 0.75
    last = callback.history[-1]
    assert 1 <= last["rollbacks"] <= 4
    assert last["peak_rate"] <= 0.1001 * rate
    # The next reading is compared with what the model was set back to.
    pairs = zip(callback.history, callback.history[1:], strict=False)
    after = next(b for a, b in pairs if b["rollbacks"] > a["rollbacks"])
    assert after["previous"] == callback.history[0]["information"]


class Poison(keras.callbacks.Callback):
    """Spoils the weights at the beginning of an epoch, once."""

    def __init__(self, epoch):
        super().__init__()
        self.epoch = epoch

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == self.epoch:
            # Of the last layer: on some machines relu(NaN) is 0.
            kernel = self.model.layers[-1].kernel
            kernel.assign(np.full(kernel.shape, np.nan))


def keep(reading):
    return reading.rate


@pytest.mark.parametrize("layers", [None, "all"])
@pytest.mark.parametrize("source", ["probe", "metric"])
def test_weights_that_are_not_finite(source, layers, digits):
    if source == "metric" and layers is not None:
        pytest.skip("a metric knows nothing of layers")
    keras.utils.set_random_seed(0)
    adam = keras.optimizers.Adam(0.01)
    model = make_model(keras_milr.LayerwiseOptimizer(adam) if layers else adam)
    options = {"probe_data": digits}
    if source == "metric":
        options = {}
        metrics = [keras_milr.MutualInformation()]
        model.compile(adam, "sparse_categorical_crossentropy", metrics=metrics)
    callback = keras_milr.MutualInformationLR(keep, layers=layers, **options)
    with pytest.warns(UserWarning, match="epoch 3, the loss or the weights are not"):
        history = model.fit(
            *digits, epochs=5, verbose=0, callbacks=[callback, Poison(2)]
        )
    assert np.all(np.isfinite(np.concatenate([w.ravel() for w in model.get_weights()])))
    assert np.isnan(history.history["loss"][2])
    assert history.history["loss"][4] < history.history["loss"][1]
    np.testing.assert_allclose(rates.base_rate(model), 0.01 if layers else 0.003, 1e-5)
    if layers:
        assert {round(m, 4) for m in model.optimizer.multipliers.values()} == {0.3}
    assert [r["rollbacks"] for r in callback.history][-2:] == [1, 1]


@pytest.mark.parametrize("source", ["probe", "metric"])
def test_a_loss_scale_that_skips_every_step(source, digits):
    """Of a network that overflows float16 the weights stay finite, as they are."""
    keras.utils.set_random_seed(0)
    x, y = digits[0], digits[1].astype("float32") / 9
    adam = keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01))
    if source == "probe":
        model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(1)])
        model.compile(adam, "mse")
        callback = keras_milr.MutualInformationLR(keep, (x, y))
    else:
        y = digits[1]
        model = make_model(adam)
        metrics = [keras_milr.MutualInformation()]
        model.compile(adam, "sparse_categorical_crossentropy", metrics=metrics)
        callback = keras_milr.MutualInformationLR(keep)

    class Overflow(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                kernel = self.model.layers[-1].kernel
                kernel.assign(np.full(kernel.shape, 3e38))

    with pytest.warns(UserWarning, match="epoch 3, the loss or the weights are not"):
        history = model.fit(
            x, y, epochs=5, verbose=0, callbacks=[callback, Overflow()]
        ).history
    assert not np.isfinite(history["loss"][2])
    assert np.all(np.isfinite(history["loss"][3:]))


def test_a_network_that_is_nearly_dead(digits):
    """Its hidden units answer to 3 % of the samples only."""
    x = digits[0]
    model = make_model(keras.optimizers.Adam(0.01))
    callback = keras_milr.MutualInformationLR(keep, digits)

    def kill(epoch, logs):
        if epoch == 2:
            layer = model.layers[0]
            column = np.random.default_rng(0).normal(size=(64, 1))
            layer.kernel.assign(np.repeat(column, 64, axis=1))
            layer.bias.assign(np.full(64, -np.quantile(x @ column, 0.97)))

    killer = keras.callbacks.LambdaCallback(on_epoch_end=kill)
    with pytest.warns(UserWarning, match="epoch 3, the output is the same for nearly"):
        history = model.fit(*digits, epochs=4, verbose=0, callbacks=[killer, callback])
    assert callback.history[3]["repeated"] > 0.9
    assert callback.history[3]["variation"] > 0.1
    assert history.history["loss"][3] < history.history["loss"][2]
    assert callback.history[4]["rollbacks"] == 1


def test_batch_readings_see_it_in_the_epoch(digits):
    model = make_model(keras.optimizers.Adam(0.01))
    callback = keras_milr.MutualInformationLR(keep, probe_data=digits, update_freq=10)
    with pytest.warns(UserWarning, match="epoch 2, the loss or the weights are not"):
        model.fit(*digits, epochs=3, verbose=0, callbacks=[callback, Poison(1)])
    failed = next(r for r in callback.history if r["epoch"] == 1)
    assert failed["batch"] < 12
    after = [r for r in callback.history if r["rollbacks"]]
    assert all(r["information"] > 1.0 for r in after)


def test_one_failure_in_an_epoch_is_rolled_back_once(digits):
    """The loss of the logs is a mean over the epoch, and is NaN until its end."""
    model = make_model(keras.optimizers.Adam(0.01))
    callback = keras_milr.MutualInformationLR(keep, probe_data=digits, update_freq=7)
    losses = []

    class Once(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            losses.append(logs["loss"])
            if len(losses) == 9:
                kernel = self.model.layers[-1].kernel
                kernel.assign(np.full(kernel.shape, np.nan))

    with pytest.warns(UserWarning, match="are back at the start") as warned:
        model.fit(*digits, epochs=2, verbose=0, callbacks=[Once(), callback])
    epoch = len(losses) // 2
    assert np.all(np.isnan(losses[9:epoch]))
    assert np.all(np.isfinite(losses[epoch:]))
    assert len([w for w in warned if "are back" in str(w.message)]) == 1
    assert callback.history[-1]["rollbacks"] == 1
    assert len(callback.history) == 1 + len(losses) // 7
    assert callback.history[-1]["information"] > 1.0


def test_switched_off(digits):
    model = make_model()
    callback = keras_milr.MutualInformationLR(keep, probe_data=digits, rollback=False)
    model.fit(*digits, epochs=2, verbose=0, callbacks=[callback, Poison(1)])
    lost = np.isnan(model.get_weights()[0])
    assert lost.all() if NAME == "tensorflow" else lost.any()
    assert [r["rollbacks"] for r in callback.history] == [0, 0, 0]


def test_bounded_in_number(digits):
    """Where nothing helps, training stops, at weights that are finite."""
    model = make_model()
    model.compile("sgd", lambda y, p: keras.ops.mean(p, axis=-1) * np.nan)
    start = model.get_weights()
    x, y = (a[:64] for a in digits)
    callback = keras_milr.MutualInformationLR(
        keep, probe_data=digits, readout=Predictions()
    )
    with pytest.warns(UserWarning, match="are back at the start") as warned:
        history = model.fit(x, y, epochs=30, verbose=0, callbacks=[callback])
    messages = [str(w.message) for w in warned if "are back" in str(w.message)]
    assert len(messages) == len(history.epoch) == MOST
    assert "training stops" in messages[-1]
    assert all("learning rate" in m for m in messages[:-1])
    for now, then in zip(model.get_weights(), start, strict=True):
        np.testing.assert_array_equal(now, then)
    np.testing.assert_allclose(rates.base_rate(model), 1e-6)  # The lower bound.


def test_a_model_without_weights_at_the_start(digits):
    """It is kept from the first reading on; before, there is nothing to go back to."""

    def fit(poisoned):
        model = keras.Sequential([keras.layers.Dense(10, activation="softmax")])
        metrics = [keras_milr.MutualInformation()]
        model.compile("adam", "sparse_categorical_crossentropy", metrics=metrics)
        callbacks = [keras_milr.MutualInformationLR(), *poisoned]
        model.fit(*digits, epochs=3, verbose=0, callbacks=callbacks)
        return model

    with pytest.warns(UserWarning, match="epoch 3, the loss or the weights are not"):
        model = fit([Poison(2)])
    assert np.all(np.isfinite(model.get_weights()[0]))

    if NAME != "tensorflow":  # The others build the model before.
        return

    class Early(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model.layers[0].kernel.assign(np.full((64, 10), np.nan))

    with pytest.raises(ValueError, match=r"no weights to go back to. Build the model"):
        fit([Early()])


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("seed", [0, 1])
def test_never_for_a_dominant_class(optimizer, seed):
    """98:2, where the information stays at 0 for long. Warnings would be errors."""
    keras.utils.set_random_seed(seed)
    rng = np.random.default_rng(seed)
    y = (rng.random(4000) < 0.02).astype("int32")
    x = rng.normal(size=(4000, 10)).astype("float32")
    x[:, 0] += 3 * y
    model = make_model(optimizer, classes=2, width=10)
    callback = keras_milr.MutualInformationLR(probe_data=(x, y))
    model.fit(x, y, epochs=8, verbose=0, callbacks=[callback])
    assert callback.history[-1]["rollbacks"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_never_for_outputs_that_start_inverted(optimizer):
    """All it says is wrong, with confidence: CE falls from far above H(Y)."""
    keras.utils.set_random_seed(0)
    x = np.random.default_rng(0).normal(size=(2000, 10)).astype("float32")
    y = (x[:, 0] + x[:, 1] > 0).astype("int32")
    model = make_model("adam", classes=2, width=10)
    model.fit(x, 1 - y, epochs=8, verbose=0)
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    assert model.evaluate(x, y, verbose=0)[1] < 0.05
    # At one rate: that all is known, if under other names, a policy takes for trained.
    callback = keras_milr.MutualInformationLR(keep, (x, y), update_freq=10)
    model.fit(x, y, epochs=15, verbose=0, callbacks=[callback])
    assert callback.history[0]["cross_entropy"] > 3 * callback.history[0]["entropy"]
    assert model.evaluate(x, y, verbose=0)[1] > 0.9
    assert callback.history[-1]["rollbacks"] == 0


@pytest.mark.parametrize("seed", range(3))
def test_never_for_averages_that_lag(seed, digits):
    """Those of batch normalisation, which are of other weights in the first epochs."""
    x, y = (a[:640] for a in digits)
    keras.utils.set_random_seed(seed)
    model = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(16, activation="relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.1),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    model.compile(
        keras.optimizers.SGD(0.1, momentum=0.9),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    callback = keras_milr.MutualInformationLR(lambda reading: reading.rate, (x, y))
    logs = model.fit(x, y, batch_size=10, epochs=5, verbose=0, callbacks=[callback])
    assert callback.history[-1]["rollbacks"] == 0
    assert logs.history["accuracy"][-1] > 0.7
    # The test is none if inference is not bad.
    shown = logs.history["probe_information"][0]
    assert shown < callback.history[1]["information"] - 0.2


class TestLastingLoss:
    BEST = info(1.2, 1.1)
    LOW = info(0.9, 1.4)  # A tenth of H(Y) is .23.

    @pytest.mark.parametrize(
        ("now", "far"),
        [
            (LOW, True),
            (info(1.0, 1.4), False),
            (info(0.9, 1.2), False),  # Fewer nats are counted, but it learns.
            (info(0.9, 1.4, stderr=0.2), False),  # Within the noise.
            (info(0.6, np.nan), False),
        ],
    )
    def test_a_tenth_is_lost(self, now, far):
        assert is_below(now, self.BEST, 0.1) is far

    @pytest.mark.parametrize("explores", [True, False])
    def test_fails_when_it_lasts(self, explores):
        guard = Rollback(make_model())
        guard.keep(self.BEST, ["best"])
        for now in (self.LOW, self.LOW, self.BEST, self.LOW, self.LOW):
            assert guard.judge(now, [], loss=1.2, explores=explores) is None
        failure = guard.judge(self.LOW, [], loss=1.2, explores=explores)
        assert (failure is not None) is explores
        if explores:
            assert re.search("3 readings .* stayed far below.* 0.9 of 1.2", failure)
            guard.restore()
            assert guard.judge(self.LOW, [], loss=1.2, explores=True) is None

    def test_the_count_is_resumed(self):
        guard, again = (Rollback(make_model()) for _ in range(2))
        guard.keep(self.BEST, [self.BEST])
        for _ in range(2):
            guard.judge(self.LOW, [self.LOW], loss=1.2, explores=True)
        again.resume(guard.state()[0], None)
        assert again.judge(self.LOW, [self.LOW], loss=1.2, explores=True) is not None


class TestSecondStart:
    """The rate at the start seems to be too high."""

    START, KNOWN = info(0.1, 2.3), info(1.0, 1.3)

    def guard(self, good=(1,), fails=2, raised=True, at_start=True, steps=10):
        """With the weights 0, then numbers of readings that are good; rolled back."""
        guard = Rollback(make_model())
        self.model = guard._model
        self.set(0)
        guard.keep(self.START, [self.START])
        for step in good:
            self.set(step)
            assert self.judge(guard, self.KNOWN, step) is None
        self.set(fails)
        how = {"steps": steps, "raised": raised, "at_start": at_start}
        failure = self.judge(guard, info(0.3, 2.0), fails, **how)
        what = "after the rate was raised" if raised else "at the rate of the start"
        assert failure.startswith(f"{what} the information fell from 1 to 0.3 nats")
        self.back = guard.restore()
        return guard

    def judge(self, guard, now, step, **how):
        return guard.judge(now, [now], 1.0, step, explores=True, **how)

    def set(self, number):
        for weight in self.model.weights:
            weight.assign(keras.ops.full(weight.shape, float(number)))

    def check(self, back, info, way):
        infos, found, _ = back
        assert ([i.value for i in infos], found) == ([info.value], way)

    def weights(self):
        return float(keras.ops.convert_to_numpy(self.model.weights[0])[0, 0])

    @pytest.mark.parametrize("raised", [True, False])
    def test_from_the_start(self, raised):
        self.guard(raised=raised)
        self.check(self.back, self.START, Way.SECOND)
        assert self.weights() == 0

    def test_after_a_collapse(self):
        """Of a network that knew less than half, a restart is far lower."""
        for known, way in ((1.0, Way.RESTART), (1.4, Way.SECOND)):
            guard = Rollback(make_model())
            guard.keep(self.START, [self.START])
            assert self.judge(guard, info(known, 0.8), 1) is None
            at_start = {"steps": 10, "at_start": True}
            failed = info(0.0, 2.31, variation=0.0)
            assert "not depend" in self.judge(guard, failed, 2, **at_start)
            self.check(guard.restore(), self.START, way)

    @pytest.mark.parametrize("known", [1.1, 0.98])
    def test_that_knows_as_much_goes_on(self, known):
        """Where it is the same within the noise, the lower rate is."""
        guard = self.guard()
        self.set(7)
        second = info(known, 1.2)
        assert self.judge(guard, second, 3) is None
        how = {"steps": 10, "raised": True, "at_start": True}
        assert self.judge(guard, info(0.3, 2.0), 4, **how)
        self.check(guard.restore(), self.START, Way.SECOND)  # Nor does this rate serve.
        assert self.judge(guard, info(0.5, 1.8), 5) is not None
        self.check(guard.restore(), second, Way.FIRST)
        assert self.weights() == 7
        assert self.judge(guard, info(0.3, 2.0), 6, **how)
        self.check(guard.restore(), second, Way.UNDO)  # None lower than that.

    def test_that_knows_less_makes_way_for_the_first(self):
        guard = self.guard()
        self.set(7)
        failure = self.judge(guard, info(0.8, 1.5), 3)
        assert "0.8 nats were learned, in the same time as 1 before" in failure
        self.check(guard.restore(), self.KNOWN, Way.FIRST)
        assert self.weights() == 1
        assert self.judge(guard, info(0.8, 1.2), 4) is None

    def test_that_fails_makes_way_too(self):
        guard = self.guard()
        assert "not finite" in guard.judge(info(1.1, 1.2), [], loss=np.nan, step=3)
        self.check(guard.restore(), self.KNOWN, Way.FIRST)
        assert self.weights() == 1

    def test_at_a_quarter_of_an_epoch(self):
        guard = self.guard(good=(0.25,), fails=0.5)
        assert self.back[1] is Way.SECOND
        assert self.judge(guard, info(0.8, 1.5), 0.75) is not None

    @pytest.mark.parametrize(
        "case",
        [
            {"at_start": False},
            {"steps": 4},  # Too little is left.
            {"steps": None},
            {"good": (0.25, 0.5), "fails": 0.75},  # The first is older than
            {"good": (0.25,), "fails": 1},  # or far younger than
            {"good": (1, 2), "fails": 3},  # the second would be.
        ],
    )
    def test_else_the_raise_is_undone(self, case):
        self.guard(**case)
        self.check(self.back, self.KNOWN, Way.UNDO)
        assert self.weights() == max(case.get("good", (1,)))

    def test_is_resumed(self):
        state, kept = (guard := self.guard()).state()
        again = Rollback(self.model)
        again.resume(json.loads(json.dumps(state)), guard.changed(kept))
        assert self.judge(again, info(0.8, 1.5), 3) is not None
        self.check(again.restore(), self.KNOWN, Way.FIRST)
        assert self.weights() == 1

    def test_a_loss_at_the_rate_of_the_start_is_none_later(self):
        """Or a small one: a high rate goes to and fro."""
        guard = Rollback(make_model())
        guard.keep(self.START, [self.START])
        at_start = {"steps": 10, "at_start": True}
        assert self.judge(guard, self.KNOWN, 1, **at_start) is None
        assert self.judge(guard, info(0.8, 1.5), 2, **at_start) is None
        assert self.judge(guard, info(1.6, 0.7), 3, **at_start) is None
        assert self.judge(guard, info(1.2, 1.1), 4, **at_start) is None

    @pytest.mark.parametrize(
        ("known", "step", "way"),
        [
            (1.3, 2, Way.SECOND),
            (1.3, 0.5, Way.SECOND),
            (1.0, 4, Way.RESTART),  # The first is much older than the second would be.
            (1.3, 4, None),  # Half is known.
        ],
    )
    def test_many_outputs_are_the_same(self, known, step, way):
        """Units are dead, though what is known has hardly become less."""
        guard = Rollback(make_model())
        guard.keep(self.START, [self.START])
        best = info(known, H - known)
        assert self.judge(guard, best, step / 2) is None
        for repeated in (0.05, 0.2):
            now = info(known - 0.1, best.cross_entropy + 0.1, repeated=repeated)
            assert self.judge(guard, now, step) is None  # The rate has served before.
        failure = self.judge(guard, now, step, steps=20, at_start=True)
        assert (failure is None) == (way is None)
        if way is not None:
            assert "20% have that of the one before" in failure
            self.check(guard.restore(), self.START, way)

    @pytest.mark.parametrize(
        "case", [{"known": 1.8}, {"first": 0.15}, {"repeated": 0.05}]
    )
    def test_outputs_that_may_be_the_same(self, case):
        """Of a network that is sure of both, or where samples are."""
        start = self.START._replace(repeated=case.get("first", 0.0))
        guard = Rollback(make_model())
        guard.keep(start, [start])
        known, repeated = case.get("known", 1.0), case.get("repeated", 0.2)
        for step in (1, 2):
            now = info(known, H - known, repeated=repeated)
            assert self.judge(guard, now, step, steps=20, at_start=True) is None

    def test_that_is_not_judged_any_more(self):
        """Whatever knows more is left, but for weights that somebody else has set."""
        for known, back in ((0.8, True), (1.2, False)):
            guard = self.guard()
            if not back:
                self.set(7)
                assert self.judge(guard, info(known, H - known), 2.5) is None
            assert bool(guard.unfinished()) == back
            if back:
                self.check(guard.restore(), self.KNOWN, Way.FIRST)
            assert self.weights() == (1 if back else 7)
            assert guard.unfinished() is None
        guard = self.guard()
        self.set(8)
        assert guard.unfinished() is None
        assert self.weights() == 8

    def test_ended_by_early_stopping(self, digits):
        class Stop(keras.callbacks.Callback):
            def on_epoch_end(self, epoch, logs=None):
                if callback._rollback.count > 0:
                    self.model.stop_training = True

        keras.utils.set_random_seed(0)
        model = make_model(keras.optimizers.SGD(0.2, momentum=0.9))
        callback = keras_milr.MutualInformationLR(probe_data=digits)
        fit = {"epochs": 12, "batch_size": 16, "verbose": 0}
        with pytest.warns(UserWarning, match="MutualInformationLR") as warned:
            model.fit(*digits, callbacks=[callback, Stop()], **fit)
        places = [re.search("are back at ([^.;]*)", str(w.message)) for w in warned]
        places = [place[1] for place in places if place]
        second = "the start, to try a lower rate for as long"
        assert places == [second, "what the first start had learned"]
        # Half of the rate of the first start, whose weights these are.
        assert float(model.optimizer.learning_rate) == pytest.approx(0.1)
        assert model.evaluate(*digits, verbose=0)[1] > 0.5

    def test_in_training(self, digits):
        """From a rate that learns, but much less than a lower one; from a failure."""
        for rate in (0.15, 0.2, 10.0):
            keras.utils.set_random_seed(0)
            model = make_model(keras.optimizers.SGD(rate, momentum=0.9))
            callback = keras_milr.MutualInformationLR(probe_data=digits)
            fit = {"epochs": 12, "batch_size": 16, "verbose": 0}
            with pytest.warns(UserWarning, match="are back at") as warned:
                logs = model.fit(*digits, callbacks=[callback], **fit)
            assert any("are back at the start" in str(w.message) for w in warned)
            assert logs.history["accuracy"][-1] > 0.97


@pytest.mark.parametrize("explores", [True, False])
def test_units_that_are_switched_off_for_good(explores, digits):
    """As too high a rate may leave them; no lower rate brings them back."""
    model = make_model("adam")

    def keep(reading):
        return reading.rate

    keep.undoes_raises = explores

    def switch_off(epoch, logs):
        if epoch == 6:
            bias = np.where(np.arange(64) < 4, 0.0, -100.0)
            model.layers[0].bias.assign(bias.astype("float32"))

    damage = keras.callbacks.LambdaCallback(on_epoch_begin=switch_off)
    callback = keras_milr.MutualInformationLR(keep, digits)
    warned = pytest.warns(UserWarning, match="for 3 readings .* stayed far below")
    with warned if explores else contextlib.nullcontext():
        logs = model.fit(*digits, epochs=12, verbose=0, callbacks=[damage, callback])
    assert (callback.history[9]["rollbacks"], callback.history[-1]["rollbacks"]) == (
        (0, 1) if explores else (0, 0)
    )
    assert (logs.history["accuracy"][-1] > 0.9) is explores


@pytest.mark.parametrize(("rate", "healthy"), [(0.1, True), (1.0, False)])
def test_of_few_batches_and_averages_that_lag(rate, healthy, digits):
    """The loss of the first epoch, of 3 batches, is above H(Y) where all is well."""
    x, y = (a[:96] for a in digits)
    layers = [keras.Input((64,))]
    for _ in range(6):
        layers += [
            keras.layers.Dense(64, use_bias=False),
            keras.layers.BatchNormalization(),
            keras.layers.ReLU(),
        ]
    model = keras.Sequential([*layers, keras.layers.Dense(10, activation="softmax")])
    model.compile(
        keras.optimizers.Adam(rate),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    callback = keras_milr.MutualInformationLR(lambda reading: reading.rate, (x, y))
    warned = pytest.warns(UserWarning, match="are back at the")
    with contextlib.nullcontext() if healthy else warned:
        logs = model.fit(x, y, epochs=12, verbose=0, callbacks=[callback]).history
    assert (callback.history[-1]["rollbacks"] == 0) is healthy
    assert logs["accuracy"][-1] > 0.9
    # The test is none if the loss and inference are not bad.
    assert logs["loss"][0] > H
    assert logs["probe_information"][0] < 0.1


@pytest.mark.parametrize("bias", [0.0, np.log(0.01 / 0.99)], ids=["even", "shares"])
@pytest.mark.parametrize("seed", [0, 1])
def test_never_for_class_weights(bias, seed):
    """A rare class, weighted up as it is usual: the probe knows nothing of that."""
    rng = np.random.default_rng(0)
    y = (rng.random(20_000) < 0.01).astype("int32")
    x = rng.normal(size=(len(y), 10)).astype("float32")
    x[:, :4] += 0.9 * y[:, None]

    def trained(callbacks):
        keras.utils.set_random_seed(seed)
        start = keras.initializers.Constant(bias)
        layers = [keras.Input((10,)), keras.layers.Dense(16, activation="relu")]
        layers.append(keras.layers.Dense(1, "sigmoid", bias_initializer=start))
        model = keras.Sequential(layers)
        model.compile("adam", "binary_crossentropy")
        model.fit(
            *(x, y),
            batch_size=256,
            epochs=6,
            class_weight={0: 0.5 / 0.99, 1: 0.5 / 0.01},
            callbacks=callbacks,
            verbose=0,
        )
        return model

    callback = keras_milr.MutualInformationLR(lambda reading: reading.rate, (x, y))
    for found, expected in zip(
        trained([callback]).get_weights(), trained([]).get_weights(), strict=True
    ):
        np.testing.assert_array_equal(found, expected)
    assert [r["rollbacks"] for r in callback.history] == [0] * 7
    worst = max(r["cross_entropy"] for r in callback.history[1:])
    assert worst > 3 * callback.history[-1]["entropy"]


def test_bad_argument(digits):
    with pytest.raises(TypeError, match=r"`rollback` must be True or False.*'yes'"):
        keras_milr.MutualInformationLR(probe_data=digits, rollback="yes")
