"""`learning_rate="auto"`: the range test in `fit`, then the policy in its bounds."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_milr
from keras_milr import MutualInformationLR, callbacks, lr_range_test
from tests.backends import NAME


@pytest.fixture(scope="module")
def data(digits):
    return tuple(a[:640] for a in digits)


def make_model(optimizer=None, seed=0):
    keras.utils.set_random_seed(seed)
    model = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(16, activation="relu", name="body"),
            keras.layers.BatchNormalization(momentum=0.9, name="norm"),
            keras.layers.Dropout(0.1),
            keras.layers.Dense(10, activation="softmax", name="head"),
        ]
    )
    model.compile(
        optimizer or keras.optimizers.SGD(0.123, momentum=0.9),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    return model


def fit(model, data, callback, **arguments):
    arguments = {"epochs": 3, "verbose": 0, "batch_size": 10} | arguments
    return model.fit(*data, callbacks=[callback], **arguments)


class SearchedFor(keras_milr.policies.ThresholdDecay):
    """Takes the rate at the start for one that a range test found."""

    def __call__(self, reading):
        return super().__call__(reading._replace(searched=True))


@pytest.mark.slow
def test_it_trains_as_from_the_rate_that_the_range_test_finds(data):
    """Bit for bit: the range test in `fit` leaves no trace in what follows."""
    auto = MutualInformationLR(probe_data=data, learning_rate="auto")
    model = make_model()
    logs = fit(model, data, auto).history
    found = lr_range_test(make_model(), *data, batch_size=10, verbose=0)
    by_hand = MutualInformationLR(
        SearchedFor(), data, learning_rate=found.best_lr, max_lr=found.max_lr
    )
    other = make_model()
    assert fit(other, data, by_hand).history == logs
    for a, b in zip(model.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert {record.pop("searched") for record in auto.history} == {True}
    assert {record.pop("searched") for record in by_hand.history} == {False}
    if NAME == "tensorflow":
        assert auto.history == by_hand.history
    for a, b in zip(auto.history, by_hand.history, strict=True):
        # Two compiled sums over the same outputs; on JAX their last digit may differ.
        assert a.pop("estimator") == b.pop("estimator")
        np.testing.assert_allclose([*a.values()], [*b.values()], rtol=1e-6)
    for a, b in zip(auto.lr_range, found, strict=True):
        np.testing.assert_array_equal(a, b)
    assert auto.history[0]["rate"] == pytest.approx(found.best_lr)


def test_the_policy_stays_within_the_rates_that_trained(data):
    callback = MutualInformationLR(
        lambda reading: 1e3 * reading.rate, data, learning_rate="auto", rollback=False
    )
    rates = fit(make_model(), data, callback).history["learning_rate"]
    assert rates[-1] == pytest.approx(callback.lr_range.max_lr)


@pytest.mark.parametrize(("batch_size", "highest"), [(20, 0.5), (23, 0.04)])
def test_epochs_of_few_steps_raise_to_what_learned_fastest(
    data, batch_size, highest, monkeypatch
):
    """Those of 28 steps; of 32 as in others, to the highest that trained."""

    def search(*args, **arguments):
        found = lr_range_test(*args, **arguments)
        assert found.found
        return found._replace(best_lr=0.01, peak_lr=0.04, max_lr=0.5)

    monkeypatch.setattr(callbacks, "lr_range_test", search)
    rates = {}
    for factor in (1.5, 1e3):
        callback = MutualInformationLR(
            lambda reading, factor=factor: factor * reading.rate,
            data,
            learning_rate="auto",
            rollback=False,
        )
        logs = fit(make_model(), data, callback, batch_size=batch_size).history
        rates[factor] = logs["learning_rate"]
    np.testing.assert_allclose(rates[1.5], [0.01, 0.015, 0.0225], rtol=1e-6)
    np.testing.assert_allclose(rates[1e3], [0.01, highest, highest], rtol=1e-6)


def test_two_batches_in_an_epoch(data):
    """Each rate has one step, which is more than an epoch. What to do is said."""
    few = tuple(a[:60] for a in data)
    callback = MutualInformationLR(probe_data=few, learning_rate="auto")
    message = (
        r"best. To find out, call .*max_steps=.* more than the \d .* `found.best_lr"
    )
    with pytest.warns(UserWarning, match=message):
        fit(make_model(), few, callback, batch_size=30)
    assert callback.lr_range.steps == 7
    assert callback.history[0]["rate"] == np.float32(callback.lr_range.best_lr)


@pytest.mark.filterwarnings("ignore:lr_range_test. .* counts as best")
@pytest.mark.parametrize("steps", [1, 2])
def test_where_the_range_test_finds_nothing_the_rate_may_rise(data, steps):
    """It is as if none had been asked for: a policy tries higher rates."""
    few = tuple(a[: 16 * 7 * steps] for a in data)
    auto = MutualInformationLR(probe_data=few, learning_rate="auto")
    rates = []
    for callback in (auto, MutualInformationLR(probe_data=few)):
        keras.utils.set_random_seed(0)
        # Slow to begin.
        hidden = [keras.layers.Dense(16, activation="sigmoid") for _ in range(3)]
        model = keras.Sequential(
            [keras.Input((64,)), *hidden, keras.layers.Dense(10, activation="softmax")]
        )
        model.compile(keras.optimizers.SGD(1e-4), "sparse_categorical_crossentropy")
        logs = fit(model, few, callback, batch_size=16, epochs=5).history
        rates.append(logs["learning_rate"])
    found = auto.lr_range
    assert not found.found
    assert found.steps == steps * len(found.rates)
    assert found.best_lr == pytest.approx(1e-4)
    assert found.peak_lr == found.max_lr > 1e-2
    assert max(rates[0]) > 2e-4
    np.testing.assert_allclose(rates[0], rates[1], rtol=1e-6)


@pytest.mark.parametrize("bounds", [{"max_lr": 1e-3}, {"min_lr": 0.5}])
def test_given_bounds_hold(data, bounds):
    callback = MutualInformationLR(
        *(lambda reading: reading.rate, data),
        learning_rate="auto",
        rollback=False,
        **bounds,
    )
    rates = fit(make_model(), data, callback, epochs=1).history["learning_rate"]
    assert rates == pytest.approx(list(bounds.values()))


def test_batches_of_a_dataset_are_its_own(data, capsys):
    dataset = tf.data.Dataset.from_tensor_slices(data).batch(8)
    callback = MutualInformationLR(
        probe_data=dataset, learning_rate="auto", rollback=False, verbose=1
    )
    make_model().fit(dataset, epochs=1, verbose=0, callbacks=[callback], shuffle=False)
    printed = capsys.readouterr().out
    assert "of 8 samples each" in printed
    assert f"starting with learning rate {callback.lr_range.best_lr:.4g}" in printed


def test_weights_are_taken_along(data):
    weight = np.random.default_rng(0).random(len(data[1])).astype("float32")
    weighted = (*data, weight)
    callback = MutualInformationLR(probe_data=weighted, learning_rate="auto")
    fit(make_model(), data, callback, epochs=1)
    found = lr_range_test(
        make_model(), *data, sample_weight=weight, batch_size=10, verbose=0
    )
    np.testing.assert_array_equal(callback.lr_range.loss, found.loss)


def test_with_layers_the_base_is_found_and_multipliers_start_as_they_are(data):
    optimizer = keras_milr.LayerwiseOptimizer(
        keras.optimizers.SGD(0.123, momentum=0.9), {"body": 0.5}
    )
    callback = MutualInformationLR(
        lambda reading: reading.rate, data, layers="all", learning_rate="auto"
    )
    logs = fit(make_model(optimizer), data, callback, epochs=1).history
    best = callback.lr_range.best_lr
    assert logs["learning_rate"] == pytest.approx([best])
    assert logs["learning_rate/body"] == pytest.approx([0.5 * best])
    assert logs["learning_rate/head"] == pytest.approx([best])


# A few steps may add nothing to what the first `fit` has learned.
@pytest.mark.filterwarnings("ignore:lr_range_test. 9 step")
def test_a_second_fit_finds_anew(data):
    model = make_model()
    callback = MutualInformationLR(probe_data=data, learning_rate="auto")
    fit(model, data, callback)
    first = callback.lr_range
    fit(model, data, callback)
    assert callback.lr_range.start > first.start


class TestRefused:
    def test_without_a_probe(self):
        with pytest.raises(ValueError, match="`learning_rate` needs `probe_data`"):
            MutualInformationLR(learning_rate="auto")

    @pytest.mark.parametrize("rate", ["Auto", True, [1e-3]])
    def test_other_than_a_number_or_auto(self, rate, data):
        with pytest.raises(TypeError, match=r"`learning_rate` must be .* or 'auto'"):
            MutualInformationLR(probe_data=data, learning_rate=rate)

    def test_a_schedule_in_the_optimizer(self, data):
        schedule = keras.optimizers.schedules.CosineDecay(0.1, 10)
        for optimizer, layers in (
            (keras.optimizers.SGD(schedule), None),
            (keras_milr.LayerwiseOptimizer(keras.optimizers.SGD(schedule)), "all"),
        ):
            callback = MutualInformationLR(
                probe_data=data, learning_rate="auto", layers=layers
            )
            model = make_model(optimizer)
            before = model.get_weights()
            with pytest.raises(ValueError, match="LearningRateSchedule"):
                fit(model, data, callback)
            for a, b in zip(model.get_weights(), before, strict=True):
                np.testing.assert_array_equal(a, b)

    def test_data_that_can_be_read_only_once(self, data):
        batches = (tuple(a[i : i + 20] for a in data) for i in range(0, 200, 20))
        callback = MutualInformationLR(probe_data=batches, learning_rate="auto")
        with pytest.raises(ValueError, match="`probe_data` must be data that can be"):
            fit(make_model(), data, callback)


def test_config(data):
    callback = MutualInformationLR(probe_data=data, learning_rate="auto")
    again = MutualInformationLR.from_config(callback.get_config(), probe_data=data)
    assert again.learning_rate == "auto"
