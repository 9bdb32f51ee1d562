import itertools
import json
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from sklearn.metrics import mutual_info_score

import keras_milr
from keras_milr import _keras, policies, readouts
from tests import reference
from tests.backends import OwnStep


def make_model(optimizer="adam", units=10, dropout=0.0, **compile_arguments):
    activation = "sigmoid" if units == 1 else "softmax"
    model = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(32, activation="relu"),
            keras.layers.Dropout(dropout),
            keras.layers.Dense(units, activation=activation),
        ]
    )
    loss = "binary_crossentropy" if units == 1 else "sparse_categorical_crossentropy"
    model.compile(optimizer, **({"loss": loss} | compile_arguments))
    return model


def fit(callback, data, model=None, epochs=3, **arguments):
    model = make_model() if model is None else model
    arguments = {"verbose": 0, "callbacks": [callback]} | arguments
    if isinstance(data, tuple):
        return model.fit(*data, epochs=epochs, **arguments)
    # Keras warns that it cannot shuffle a dataset or a generator.
    return model.fit(data, epochs=epochs, shuffle=False, **arguments)


def keep(reading):
    """A policy that changes nothing."""
    return reading.rate


def it(name="it"):
    return keras_milr.MutualInformation(name=name)


def two_outputs(**metrics):
    """Which digit it is, and whether it is above 4."""
    keras.utils.set_random_seed(0)
    x = keras.Input((64,))
    digit = keras.layers.Dense(10, activation="softmax", name="digit")(x)
    large = keras.layers.Dense(1, activation="sigmoid", name="large")(x)
    model = keras.Model(x, {"digit": digit, "large": large})
    losses = {"digit": "sparse_categorical_crossentropy", "large": "bce"}
    model.compile("adam", losses, run_eagerly=True, **metrics)
    return model


def halve(reading):
    return reading.rate / 2


def labels(row):
    return pytest.mark.supports("Labels", row)


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.hidden = keras.layers.Dense(32, activation="relu")
        self.drop = keras.layers.Dropout(0.2)
        self.out = keras.layers.Dense(10, activation="softmax")

    def call(self, x, training=None):
        return self.out(self.drop(self.hidden(x), training=training))


class NoTrainingArgument(Subclassed):
    def call(self, x):
        return self.out(self.hidden(x))


class TrainingWithoutDefault(Subclassed):
    def call(self, x, training):
        return self.out(self.drop(self.hidden(x), training=training))


class RawWeights(keras.Model):
    """Relies on autocasting: a matrix product of a float16 and a float32 one."""

    def __init__(self):
        super().__init__()
        self.hidden = keras.layers.Dense(32, activation="relu")
        self.w = self.add_weight(shape=(32, 10))

    def call(self, x):
        return keras.ops.softmax(tf.matmul(self.hidden(x), self.w))


class CustomStep(Subclassed, OwnStep):
    pass


class TestSettingTheRate:
    def test_the_policy_sets_the_rate_after_each_epoch(self, digits):
        callback = keras_milr.MutualInformationLR(halve, probe_data=digits)
        history = fit(callback, digits)
        rates = history.history["learning_rate"]
        np.testing.assert_allclose(rates, [1e-3, 5e-4, 2.5e-4], rtol=1e-6)
        rate = float(callback.model.optimizer.learning_rate)
        assert rate == pytest.approx(1.25e-4)

    @pytest.mark.supports("Backends", "rates as the plain controller's")
    @pytest.mark.parametrize("policy", ["relative", "reference", "decay"])
    def test_the_whole_loop_equals_the_plain_reference(self, digits, policy):
        """Rates and information, recomputed from the predictions after each epoch."""
        x, y = digits
        model = make_model(dropout=0.2)
        callback = keras_milr.MutualInformationLR(
            policy, probe_data=digits, probe_size=10_000
        )
        predictions = [model.predict(x, verbose=0)]
        record = keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs: predictions.append(
                model.predict(x, verbose=0)
            )
        )
        # In too few batches for readings within the first epoch.
        arguments = {"callbacks": [callback, record], "batch_size": 64}
        history = fit(callback, digits, model, 8, **arguments)

        plain = {"relative": reference.relative_change}
        plain["reference"] = reference.reference_level
        plain["decay"] = reference.threshold_decay
        rate = peak = 1e-3
        entropy = reference.entropy(np.bincount(y))
        previous, at_raise, best, rates = None, None, 0.0, []
        for step, p in enumerate(predictions):
            table = reference.contingency(p.argmax(axis=1), y, 10, 10)
            counted = reference.mutual_information(table, "miller_madow")
            bound, bound_error = reference.h_minus_ce(p, y)
            found = {
                "information": max(counted, bound),
                "noise": 0.15 * bound_error
                if bound > counted
                else 0.5 * reference.standard_error(table),
                "previous": max(counted, bound) if previous is None else previous,
                "reference": entropy,
                "rate": rate,
                "peak_rate": peak,
                "step": step,
                "steps": 8,
                "rollbacks": 0,
                "bound": bound,
                "searched": False,
                "attainable": callback.history[step]["attainable"],
                "at_raise": at_raise,
                "restarts": 0,
            }
            best = found["best"] = max(best, found["information"])
            for key in ("information", "noise", "previous", "reference", "rate"):
                assert callback.history[step][key] == pytest.approx(
                    found[key], rel=1e-3, abs=1e-4
                ), (step, key)
            previous = found["information"]
            at_raise = previous if step == 0 else at_raise
            if step > 0:
                before, rate = rate, plain[policy](found)
                at_raise = previous if rate > before else at_raise
                peak = max(peak, rate)
                # The last of ten steps, where it glides.
                glides = policy == "decay" and rate < before
                rates.append(rate + 0.05 * (before - rate) if glides else rate)
        rates = [1e-3, *rates[:-1]]
        np.testing.assert_allclose(history.history["learning_rate"], rates, rtol=1e-3)

    @pytest.mark.supports("Labels", "sparse")
    def test_the_probe_of_all_data_reads_what_scikit_learn_reads(self, digits):
        callback = keras_milr.MutualInformationLR(
            probe_data=digits, probe_size=len(digits[1])
        )
        model = make_model()
        fit(callback, digits, model)
        predicted = model.predict(digits[0], verbose=0).argmax(axis=1)
        assert callback.history[-1]["raw"] == pytest.approx(
            mutual_info_score(digits[1], predicted), abs=1e-4
        )

    def test_changing_nothing_leaves_training_bit_equal(self, digits):
        weights = []
        for make in (make_model, Subclassed):
            for callbacks in (
                [],
                [keras_milr.MutualInformationLR(keep, probe_data=digits)],
                [keras_milr.MutualInformationLR(keep, digits, update_freq=10)],
            ):
                keras.utils.set_random_seed(1)
                model = make(dropout=0.3) if make is make_model else make()
                if make is Subclassed:
                    model.compile("adam", "sparse_categorical_crossentropy")
                fit(None, digits, model, callbacks=callbacks)
                weights.append(model.get_weights())
            without, with_epochs, with_batches = weights[-3:]
            for a, b, c in zip(without, with_epochs, with_batches, strict=True):
                np.testing.assert_array_equal(a, b)
                np.testing.assert_array_equal(a, c)

    @pytest.mark.backends("tensorflow", reason="Keras' own `fit` fails on others")
    @pytest.mark.filterwarnings("ignore:.build... was called on layer")  # By Keras.
    @pytest.mark.parametrize("where", ["call", "train_step"])
    def test_layers_that_only_training_builds(self, where, digits):
        class Auxiliary(keras.Model):
            def __init__(self):
                super().__init__()
                self.hidden = keras.layers.Dense(16, activation="relu")
                self.out = keras.layers.Dense(10, activation="softmax")
                self.auxiliary = keras.layers.Dense(4)

            def regularize(self, x):
                small = keras.ops.mean(self.auxiliary(self.hidden(x)) ** 2)
                self.add_loss(0.1 * small)

            def call(self, x, training=False):
                if training and where == "call":
                    self.regularize(x)
                return self.out(self.hidden(x))

            def compute_loss(self, x, *args, **kwargs):
                if where == "train_step":
                    self.regularize(x)
                return super().compute_loss(x, *args, **kwargs)

        weights = []
        for callbacks in [], [keras_milr.MutualInformationLR(keep, digits)]:
            keras.utils.set_random_seed(1)
            model = Auxiliary()
            model.compile("adam", "sparse_categorical_crossentropy")
            fit(None, digits, model, callbacks=callbacks)
            weights.append(model.get_weights())
        assert len(weights[0]) == 6
        for plain, read in zip(*weights, strict=True):
            np.testing.assert_array_equal(plain, read)

    def test_same_seeds_same_rates(self, digits):
        runs = []
        for _ in range(2):
            keras.utils.set_random_seed(3)
            callback = keras_milr.MutualInformationLR(probe_data=digits, probe_size=300)
            fit(callback, digits, epochs=5)
            runs.append(callback.history)
        assert runs[0] == runs[1]

    def test_bounds(self, digits):
        for policy, limit in (
            (lambda r: r.rate * 100, {"max_lr": 0.002}),
            (lambda r: r.rate / 100, {"min_lr": 0.0005}),
        ):
            callback = keras_milr.MutualInformationLR(policy, digits, **limit)
            rates = fit(callback, digits).history["learning_rate"]
            (expected,) = limit.values()
            np.testing.assert_allclose(rates[1:], expected, rtol=1e-6)

    def test_without_an_upper_bound_a_thousand_times_the_start(self, digits):
        callback = keras_milr.MutualInformationLR(
            lambda r: r.rate * 10_000, digits, learning_rate=1e-5
        )
        rates = fit(callback, digits).history["learning_rate"]
        np.testing.assert_allclose(rates, [1e-5, 1e-2, 1e-2], rtol=1e-6)

    def test_learning_rate_argument(self, digits):
        callback = keras_milr.MutualInformationLR(keep, digits, learning_rate=0.02)
        rates = fit(callback, digits).history["learning_rate"]
        np.testing.assert_allclose(rates, 0.02, rtol=1e-6)

    def test_in_company_of_another_callback(self, digits):
        """Whoever else sets the rate is respected: ours goes on from there."""
        other = keras.callbacks.LearningRateScheduler(
            lambda epoch, rate: 0.004 if epoch == 1 else rate
        )
        ours = keras_milr.MutualInformationLR(halve, probe_data=digits)
        rates = fit(None, digits, callbacks=[other, ours]).history["learning_rate"]
        np.testing.assert_allclose(rates, [0.001, 0.004, 0.002], rtol=1e-6)

    def test_mixed_float16(self, digits):
        keras.config.set_dtype_policy("mixed_float16")
        try:
            model = make_model()
        finally:
            keras.config.set_dtype_policy("float32")
        callback = keras_milr.MutualInformationLR(halve, probe_data=digits)
        rates = fit(callback, digits, model).history["learning_rate"]
        np.testing.assert_allclose(rates, [1e-3, 5e-4, 2.5e-4], rtol=1e-6)
        assert callback.history[-1]["entropy"] == pytest.approx(np.log(10), abs=1e-3)


class TestWithinAnEpoch:
    """Readings within the first epoch, and rates that go down step by step."""

    class Curious:
        """Wants readings within the first epoch, and changes nothing."""

        early_readings = 3

        def __init__(self):
            self.readings = []

        def __call__(self, reading):
            self.readings.append(reading)
            return reading.rate

    class Gliding:
        glides = True

        def __init__(self, factor):
            self.factor = factor

        def __call__(self, reading):
            return reading.rate * (self.factor if reading.step > 0 else 1)

    @staticmethod
    def rates_of_batches(callbacks, digits, **arguments):
        rates = []
        note = keras.callbacks.LambdaCallback()
        note.on_train_batch_begin = lambda batch, logs=None: rates.append(
            float(keras.ops.convert_to_numpy(note.model.optimizer.learning_rate))
        )
        arguments = {"callbacks": [*callbacks, note]} | arguments
        history = fit(None, digits, **arguments)
        return np.array(rates), history.history["learning_rate"]

    def test_early_readings_are_those_of_that_batch(self, digits):
        policy, every = self.Curious(), []
        for callback in (
            keras_milr.MutualInformationLR(policy, digits),
            keras_milr.MutualInformationLR(keep, digits, update_freq=29),
        ):
            keras.utils.set_random_seed(5)
            fit(callback, digits, epochs=2, batch_size=16)
            every.append(callback.history)
        early, by_batch = every
        assert [r["batch"] for r in early[:5]] == [0, 29, 57, 85, 113]
        assert early[1]["information"] == by_batch[1]["information"]
        assert early[1]["raw"] == by_batch[1]["raw"]
        assert len(early) == 6  # None in the second epoch.
        told = policy.readings[1:]
        assert [r.step for r in told] == [29 / 113, 57 / 113, 85 / 113, 1, 2]
        assert [r.steps for r in told] == [2] * 5
        before = [*early[:3], early[0], early[4]]  # An epoch ago, after the first.
        for now, previous in zip(told, before, strict=True):
            assert now.previous == previous["information"]

    @pytest.mark.parametrize(
        ("batch_size", "batches"),
        [(32, [29]), (47, []), (24, [25, 50])],
        ids=["57 batches", "39 batches", "75 batches"],
    )
    def test_at_least_twenty_batches_apart(self, digits, batch_size, batches):
        callback = keras_milr.MutualInformationLR(self.Curious(), digits)
        fit(callback, digits, epochs=1, batch_size=batch_size)
        within = [r["batch"] for r in callback.history if 0 < r["step"] < 1]
        assert within == batches

    def test_after_a_range_test_too(self, digits):
        callback = keras_milr.MutualInformationLR(
            self.Curious(), digits, learning_rate="auto"
        )
        fit(callback, digits, epochs=1, batch_size=16)
        assert sum(0 < r["step"] < 1 for r in callback.history) == 3

    def test_none_where_they_tell_nothing(self, digits):
        """Of rare classes."""
        few = np.flatnonzero((digits[1] > 0) | (np.arange(len(digits[1])) < 150))
        of_zeros = digits[0][few], (digits[1][few] == 0).astype("int32")
        rare = keras_milr.MutualInformationLR(self.Curious(), of_zeros)
        fit(rare, of_zeros, make_model(units=2), epochs=1, batch_size=16)
        assert rare.history[0]["entropy"] < 0.5 * np.log(2)
        assert [r["step"] for r in rare.history] == [0, 1]

    def test_a_rate_that_is_far_too_low_is_mended_in_the_first_epoch(self, digits):
        callback = keras_milr.MutualInformationLR(probe_data=digits, learning_rate=1e-6)
        fit(callback, digits, epochs=8, batch_size=16)
        rates = [r["rate"] for r in callback.history]
        np.testing.assert_allclose(rates[1:5], [1e-6, 3e-6, 9e-6, 2.7e-5], rtol=1e-5)

    def test_lower_rates_are_reached_step_by_step(self, digits):
        policy = self.Gliding(0.5)
        callback = keras_milr.MutualInformationLR(policy, digits)
        rates, logged = self.rates_of_batches([callback], digits, batch_size=16)
        np.testing.assert_allclose(rates[:113], 1e-3, rtol=1e-6)
        step = (np.arange(113) * 10 // 113 + 0.5) / 10
        np.testing.assert_allclose(rates[113:226], 1e-3 * (1 - step / 2), rtol=1e-6)
        np.testing.assert_allclose(rates[226:], 5e-4 * (1 - step / 2), rtol=1e-6)
        np.testing.assert_allclose(logged, rates[112::113], rtol=1e-6)
        # The policy is told where they have got to.
        told = [r["rate"] for r in callback.history]
        np.testing.assert_allclose(told, [1e-3, 1e-3, 5e-4, 2.5e-4], rtol=1e-6)

    def test_higher_rates_at_once(self, digits):
        callback = keras_milr.MutualInformationLR(self.Gliding(2.0), digits)
        rates, _ = self.rates_of_batches([callback], digits)
        expected = np.repeat([1e-3, 2e-3, 4e-3], 57)
        np.testing.assert_allclose(rates, expected, rtol=1e-6)

    def test_between_readings_of_batches(self, digits):
        callback = keras_milr.MutualInformationLR(
            self.Gliding(0.5), digits, update_freq=20
        )
        rates, _ = self.rates_of_batches([callback], digits, epochs=1)
        step = (np.arange(20) // 2 + 0.5) / 10
        np.testing.assert_allclose(rates[20:40], 1e-3 * (1 - step / 2), rtol=1e-6)

    def test_half_way_where_the_end_is_not_known(self, digits):
        """In a loop of one's own that calls no hook before a batch."""
        model = make_model()
        callback = keras_milr.MutualInformationLR(self.Gliding(0.5), digits)
        callback.set_model(model)
        callback.on_train_begin()
        rates = []
        for epoch in range(3):
            callback.on_epoch_begin(epoch)
            rates.append(float(model.optimizer.learning_rate))
            loss = model.train_on_batch(digits[0][:32], digits[1][:32])
            callback.on_train_batch_end(0, {"loss": loss})
            callback.on_epoch_end(epoch, {})
        np.testing.assert_allclose(rates, [1e-3, 7.5e-4, 3.75e-4], rtol=1e-6)

    def test_whoever_else_sets_the_rate_is_respected(self, digits):
        other = keras.callbacks.LearningRateScheduler(
            lambda epoch, rate: 0.004 if epoch == 1 else rate
        )
        ours = keras_milr.MutualInformationLR(self.Gliding(0.5), digits)
        rates, _ = self.rates_of_batches([other, ours], digits)
        np.testing.assert_allclose(rates[57:114], 0.004, rtol=1e-6)
        told = [r["rate"] for r in ours.history]
        np.testing.assert_allclose(told, [1e-3, 1e-3, 4e-3, 2e-3], rtol=1e-6)

    def test_a_file_saved_on_the_way_goes_on_with_it(self, digits, tmp_path):
        """Keras trains an epoch that was cut off from its beginning."""
        path = tmp_path / "model.keras"
        save = keras.callbacks.LambdaCallback()
        save.on_train_batch_end = lambda batch, logs=None: (
            save.model.save(path)
            if batch == 29 and 57 < int(save.model.optimizer.iterations) < 114
            else None
        )
        ours = keras_milr.MutualInformationLR(self.Gliding(0.5), digits)
        whole, _ = self.rates_of_batches([ours, save], digits)
        resumed = keras_milr.MutualInformationLR(self.Gliding(0.5), digits)
        resumed.load_state(path)
        rates, _ = self.rates_of_batches(
            [resumed], digits, model=keras.models.load_model(path), initial_epoch=1
        )
        np.testing.assert_allclose(rates, whole[57:], rtol=1e-6)

    @pytest.mark.parametrize("early", [-1, 0.5, "3"])
    def test_a_bad_number_of_early_readings(self, digits, early):
        policy = self.Curious()
        policy.early_readings = early
        with pytest.raises((TypeError, ValueError), match="early_readings` must be"):
            keras_milr.MutualInformationLR(policy, digits)


class TestFewEpochs:
    """A policy that anneals is shown readings within every epoch of a few."""

    class Annealing(TestWithinAnEpoch.Gliding):
        anneals = True

    @pytest.mark.parametrize(
        ("epochs", "batch_size", "batches"),
        [
            (1, 12, [25, 50, 75, 100, 125]),  # of 150
            (2, 12, [50, 100]),
            (5, 12, [75]),
            (6, 12, []),
            (1, 32, [29]),  # of 57: at least 20 apart
            (3, 47, []),  # of 39
        ],
    )
    def test_at_least_six_readings(self, digits, epochs, batch_size, batches):
        callback = keras_milr.MutualInformationLR(self.Annealing(1.0), digits)
        fit(callback, digits, epochs=epochs, batch_size=batch_size)
        length = -(-len(digits[1]) // batch_size)
        taken = [(r["epoch"], r["batch"]) for r in callback.history[1:]]
        each = [*batches, length]
        assert taken == [(epoch, batch) for epoch in range(epochs) for batch in each]
        steps = epochs * len(each)
        assert [r["step"] for r in callback.history] == list(range(steps + 1))
        assert {r["steps"] for r in callback.history} == {steps}
        # Ordinary readings: each is told of the one before.
        for before, now in itertools.pairwise(callback.history):
            assert now["previous"] == before["information"]

    @pytest.mark.filterwarnings("ignore:Your input ran out of data")
    def test_only_where_it_can(self, digits):
        """With a length that is known, and a policy that anneals."""
        x, y = digits
        batches = ((x[i : i + 12], y[i : i + 12]) for i in range(0, 1797, 12))
        for policy, data, batch_size in (
            (keep, digits, 12),
            (self.Annealing(1.0), batches, None),
        ):
            callback = keras_milr.MutualInformationLR(policy, digits)
            fit(callback, data, epochs=1, batch_size=batch_size)
            assert callback.history[-1]["step"] == 1

    @pytest.mark.parametrize("validation", [False, True])
    def test_of_the_metric(self, digits, validation):
        """Each reading is of what was trained on since the last one."""
        model = make_model(metrics=[keras_milr.MutualInformation()])
        data = digits if validation else None
        callback = keras_milr.MutualInformationLR()
        fit(callback, digits, model, epochs=2, batch_size=12, validation_data=data)
        taken = [(r["epoch"], r["batch"], r["step"]) for r in callback.history]
        batches = [(epoch, batch) for epoch in (0, 1) for batch in (50, 100, 150)]
        assert taken == [(*at, step) for step, at in enumerate(batches, 1)]
        entropy = callback.history[0]["entropy"]  # Of 600 labels, not of 1,797.
        assert 0 < abs(entropy - callback.history[1]["entropy"]) < 0.1
        informations = [r["information"] for r in callback.history]
        assert informations[0] < 1.5 < informations[-1]

    def test_of_a_metric_on_validation_data_after_each_epoch(self, digits):
        model = make_model(metrics=[keras_milr.MutualInformation()])
        callback = keras_milr.MutualInformationLR(monitor="val_mutual_information")
        fit(callback, digits, model, epochs=2, batch_size=12, validation_data=digits)
        assert [(r["epoch"], r["batch"]) for r in callback.history] == [
            *((0, 150), (1, 150))
        ]

    def test_of_a_metric_with_labels_in_their_order(self, digits):
        """A part of the epoch that has one class only waits for the next."""
        x, y = digits
        order = np.concatenate([np.flatnonzero(y == 8), np.flatnonzero(y == 9)])
        model = make_model(metrics=[keras_milr.MutualInformation()])
        callback = keras_milr.MutualInformationLR()
        data = x[order], y[order]
        fit(callback, data, model, epochs=1, batch_size=2, shuffle=False)
        assert len(order) == 354  # 174 eights, in the first 87 of 177 batches.
        assert [r["batch"] for r in callback.history] == [89]

    @pytest.mark.backends(
        "tensorflow", "jax", reason="PyTorch has no `steps_per_execution`"
    )
    @pytest.mark.parametrize(
        ("at_once", "batches"), [(10, [30, 50, 80, 100, 130]), (60, [60, 120])]
    )
    def test_steps_per_execution(self, digits, at_once, batches):
        callback = keras_milr.MutualInformationLR(self.Annealing(1.0), digits)
        model = make_model(steps_per_execution=at_once)
        fit(callback, digits, model, epochs=1, batch_size=12)
        assert [r["batch"] for r in callback.history] == [0, *batches, 150]
        assert callback.history[-1]["step"] == callback.history[-1]["steps"]

    def test_rates_glide_from_one_reading_to_the_next(self, digits):
        callback = keras_milr.MutualInformationLR(self.Annealing(0.5), digits)
        rates, _ = TestWithinAnEpoch.rates_of_batches(
            [callback], digits, epochs=1, batch_size=12
        )
        step = (np.arange(25) * 10 // 25 + 0.5) / 10
        expected = [1e-3 * 0.5**k * (1 - step / 2) for k in range(5)]
        np.testing.assert_allclose(rates[:25], 1e-3, rtol=1e-6)
        np.testing.assert_allclose(rates[25:], np.concatenate(expected), rtol=1e-6)

    def test_one_epoch_ends_at_next_to_nothing(self, digits):
        """And the rate is back at the highest for the next."""
        model = make_model()
        for _ in range(2):
            callback = keras_milr.MutualInformationLR(
                policies.ThresholdDecay(grow_steps=0), digits
            )
            rates, _ = TestWithinAnEpoch.rates_of_batches(
                [callback], digits, model=model, epochs=1, batch_size=12
            )
            np.testing.assert_allclose(rates[:25], 1e-3, rtol=1e-6)
            assert rates[-1] < 0.1 * 1e-3
            rate = keras.ops.convert_to_numpy(model.optimizer.learning_rate)
            np.testing.assert_allclose(rate, 1e-3, rtol=1e-6)

    @pytest.mark.parametrize("epochs", [2, 4])
    def test_goes_on_as_if_nothing_had_happened(self, digits, tmp_path, epochs):
        """Also where more epochs follow than were planned: in the same parts."""

        class Stop(keras.callbacks.Callback):
            def on_epoch_end(self, epoch, logs=None):
                raise KeyboardInterrupt

        path = tmp_path / "model.keras"
        save = keras.callbacks.ModelCheckpoint(path)
        whole = keras_milr.MutualInformationLR(self.Annealing(0.8), digits)
        callbacks = [whole, save, Stop()]
        with pytest.raises(KeyboardInterrupt):
            fit(None, digits, epochs=2, batch_size=12, callbacks=callbacks)
        resumed = keras_milr.MutualInformationLR(self.Annealing(0.8), digits)
        resumed.load_state(path)
        model = keras.models.load_model(path)
        fit(resumed, digits, model, epochs, initial_epoch=1, batch_size=12)
        assert resumed.history[:4] == whole.history
        assert [r["step"] for r in resumed.history] == list(range(3 * epochs + 1))
        assert resumed.history[-1]["steps"] == 3 * epochs
        rates = [r["rate"] for r in resumed.history]
        expected = 1e-3 * 0.8 ** np.maximum(np.arange(3 * epochs + 1) - 1, 0)
        np.testing.assert_allclose(rates, expected, rtol=1e-5)


class TestReadings:
    def test_what_a_policy_is_told(self, digits):
        readings = []

        def policy(reading):
            readings.append(reading)
            return reading.rate * (3 if reading.step == 1 else 0.5)

        callback = keras_milr.MutualInformationLR(policy, probe_data=digits)
        fit(callback, digits, epochs=4)
        readings = readings[1:]  # The first call only tries the policy.
        assert [r.step for r in readings] == [1, 2, 3, 4]
        assert {r.steps for r in readings} == {4}
        assert {r.rollbacks for r in readings} == {0}
        for before, now in itertools.pairwise(readings):
            assert now.previous == before.information
            assert now.best == max(before.best, now.information)
        np.testing.assert_allclose(
            [r.rate[0] for r in readings], [1e-3, 3e-3, 1.5e-3, 7.5e-4], rtol=1e-6
        )
        assert {r.start_rate[0] for r in readings} == {readings[0].rate[0]}
        peaks = [r.peak_rate[0] for r in readings]
        np.testing.assert_allclose(peaks, [1e-3, 3e-3, 3e-3, 3e-3], rtol=1e-6)
        at_raise = [r.at_raise for r in readings]
        assert at_raise == [readings[0].previous, *[readings[0].information] * 3]
        for reading in readings:
            arrays = [v for v in reading if isinstance(v, np.ndarray)]
            assert [a.shape for a in arrays] == [(1,)] * 11

    def test_history_has_every_field_and_serialises(self, digits):
        callback = keras_milr.MutualInformationLR(probe_data=digits)
        fit(callback, digits, epochs=6, batch_size=16)  # 113 batches
        fields = {"epoch", "batch", *policies.Reading._fields}
        fields |= set(readouts.Information._fields)
        early = [29, 57, 85]  # the first batches of the quarters
        steps = [0, *(batch / 113 for batch in early), *range(1, 7)]
        assert [r["step"] for r in callback.history] == steps
        assert [(r["epoch"], r["batch"]) for r in callback.history] == [
            *((0, batch) for batch in (0, *early)),
            *((epoch, 113) for epoch in range(6)),
        ]
        for record in callback.history:
            assert set(record) == fields
        assert json.loads(json.dumps(callback.history)) == callback.history

    def test_log_keys_from_the_first_epoch(self, digits, tmp_path):
        callback = keras_milr.MutualInformationLR(probe_data=digits)
        logger = keras.callbacks.CSVLogger(tmp_path / "log.csv")
        history = fit(None, digits, callbacks=[callback, logger]).history
        for key in ("probe_mutual_information", "probe_information", "learning_rate"):
            assert len(history[key]) == 3
        after_epochs = [r for r in callback.history if r["batch"] == 57]
        assert len(after_epochs) == 3
        values = [r["value"] for r in after_epochs]
        assert history["probe_mutual_information"] == values
        values = [r["information"] for r in after_epochs]
        assert history["probe_information"] == values
        header = (tmp_path / "log.csv").read_text().splitlines()[0]
        assert "probe_information" in header

    @pytest.mark.parametrize(
        "steps_per_execution",
        [
            1,
            pytest.param(
                4,
                marks=pytest.mark.backends(
                    "tensorflow", "jax", reason="PyTorch has no `steps_per_execution`"
                ),
            ),
        ],
    )
    def test_every_so_many_batches(self, digits, steps_per_execution):
        model = make_model(steps_per_execution=steps_per_execution)
        callback = keras_milr.MutualInformationLR(
            lambda r: r.rate * 0.9, digits, update_freq=20
        )
        history = fit(callback, digits, model, epochs=2)  # 57 batches an epoch
        taken = [(r["epoch"], r["batch"]) for r in callback.history]
        if steps_per_execution == 1:
            assert taken == [(0, 0), (0, 20), (0, 40), (1, 3), (1, 23), (1, 43)]
        else:
            assert taken == [(0, 0), (0, 20), (0, 40), (1, 4), (1, 24), (1, 44)]
        assert callback.history[-1]["steps"] == 2 * 57 // 20
        np.testing.assert_allclose(
            history.history["learning_rate"], [1e-3 * 0.9**2, 1e-3 * 0.9**5], rtol=1e-5
        )
        assert not callback.async_safe
        assert keras_milr.MutualInformationLR(keep, digits).async_safe

    def test_initial_epoch_and_a_second_fit(self, digits):
        callback = keras_milr.MutualInformationLR(halve, probe_data=digits)
        model = make_model()
        fit(callback, digits, model, epochs=5, initial_epoch=3)
        assert [r["epoch"] for r in callback.history] == [3, 3, 4]
        assert callback.history[-1]["steps"] == 2
        fit(callback, digits, model, epochs=1)
        assert [r["step"] for r in callback.history] == [0, 1]
        assert callback.history[0]["start_rate"] == pytest.approx(2.5e-4)

    @pytest.mark.supports("Data", "generators, drawn from once")
    def test_a_generator_is_drawn_from_once(self, digits):
        x, y = digits
        data = ((x[i : i + 100], y[i : i + 100]) for i in range(0, 1700, 100))
        callback = keras_milr.MutualInformationLR(keep, probe_data=data)
        model = make_model()
        fit(callback, digits, model, epochs=1)
        fit(callback, digits, model, epochs=1)
        assert len(callback.history) == 2

    def test_reference(self, digits):
        for argument, expected in ((1.5, 1.5), (lambda i: i.entropy / 2, None)):
            callback = keras_milr.MutualInformationLR(keep, digits, reference=argument)
            fit(callback, digits, epochs=1)
            record = callback.history[-1]
            expected = record["entropy"] / 2 if expected is None else expected
            assert record["reference"] == expected

    def test_logged_is_the_rate_that_was_trained_with(self, digits):
        """Also when the last batch of the epoch brings a reading."""
        callback = keras_milr.MutualInformationLR(halve, digits, update_freq=57)
        rates = fit(callback, digits).history["learning_rate"]
        np.testing.assert_allclose(rates, [1e-3, 5e-4, 2.5e-4], rtol=1e-6)

    def test_verbose(self, digits, capsys):
        fit(keras_milr.MutualInformationLR(halve, digits, verbose=1), digits, epochs=1)
        printed = capsys.readouterr().out
        assert printed.startswith("\nEpoch 1: MutualInformationLR setting learning")
        assert "rate to 0.0005." in printed
        raises = keras_milr.MutualInformationLR("decay", digits, verbose=1)
        slow = make_model(keras.optimizers.Adam(1e-4))
        fit(raises, digits, slow, epochs=8, batch_size=64)
        assert "setting learning rate to 0.0003." in capsys.readouterr().out
        fit(keras_milr.MutualInformationLR(halve, digits), digits, epochs=1)
        fit(keras_milr.MutualInformationLR(keep, digits, verbose=1), digits, epochs=1)
        assert capsys.readouterr().out == ""


class TestTheMetricAsSource:
    def compiled(self):
        return make_model(metrics=[keras_milr.MutualInformation()])

    def test_training_data(self, digits):
        callback = keras_milr.MutualInformationLR(halve)
        history = fit(callback, digits, self.compiled()).history
        values = [r["raw"] for r in callback.history]
        np.testing.assert_allclose(values, history["mutual_information"], atol=1e-5)
        np.testing.assert_allclose(
            history["learning_rate"], [1e-3, 5e-4, 2.5e-4], rtol=1e-6
        )
        assert callback.history[0]["entropy"] == pytest.approx(
            reference.entropy(np.bincount(digits[1])), abs=1e-6
        )
        assert callback.history[0]["previous"] == 0
        assert "probe_information" not in history

    def test_validation_data_where_there_are_some(self, digits):
        callback = keras_milr.MutualInformationLR(keep)
        model = self.compiled()
        history = fit(callback, digits, model, validation_split=0.3).history
        values = [r["raw"] for r in callback.history]
        np.testing.assert_allclose(values, history["val_mutual_information"], atol=1e-5)

    def test_monitor_decides(self, digits):
        callback = keras_milr.MutualInformationLR(keep, monitor="mutual_information")
        model = self.compiled()
        history = fit(callback, digits, model, validation_split=0.3).history
        values = [r["raw"] for r in callback.history]
        np.testing.assert_allclose(values, history["mutual_information"], atol=1e-5)

    @pytest.mark.parametrize("key", ["digit_mutual_information", "large_weighted_it"])
    def test_of_several_outputs_by_its_key_in_the_logs(self, digits, key):
        x, y = digits[0][:64], digits[1][:64]
        model = two_outputs(
            metrics={"digit": [keras_milr.MutualInformation()], "large": it()},
            weighted_metrics={"large": it()},
        )
        targets = {"digit": y, "large": y > 4}
        callback = keras_milr.MutualInformationLR(keep, monitor=key)
        history = fit(callback, (x, targets), model).history
        values = [r["raw"] for r in callback.history]
        np.testing.assert_allclose(values, history[key], atol=1e-5)
        message = "`monitor` must be one of.*'val_digit_mut.*'large_it'.*: None"
        with pytest.raises(ValueError, match=message):
            fit(keras_milr.MutualInformationLR(keep), (x, targets), model)

    @pytest.mark.parametrize(
        "metrics",
        [
            lambda: {"metrics": {"digit": it(), "large": it()}},
            lambda: {"metrics": {"large": [it(), it("other"), it()]}},
            lambda: {"metrics": [[it()], [it(), "accuracy"]]},
            lambda: {"weighted_metrics": [it(), it()]},
            lambda: {"metrics": [None, it()], "weighted_metrics": {"large": it()}},
            lambda: {
                "metrics": {"large": it()},
                "weighted_metrics": {"large": [it(), it(), it()], "digit": it()},
            },
        ],
    )
    def test_keys_are_those_of_keras(self, digits, metrics):
        x, y = digits[0][:64], digits[1][:64]
        model = two_outputs(**metrics())
        found = _keras.metrics(model)  # Before Keras has built them.
        ours = [key for key in found if key != "loss"]
        logs = model.fit(x, {"digit": y, "large": y > 4}, verbose=0).history
        assert sorted(k for k in logs if "loss" not in k and "acc" not in k) == (
            sorted(ours)
        )
        for key in ours:
            assert float(found[key].result()) == pytest.approx(logs[key][0], abs=1e-6)

    @pytest.mark.parametrize("functional", [False, True])
    def test_keys_of_one_output(self, digits, functional):
        model, metrics = make_model(), [it(), it()]
        if functional:
            x = keras.Input((64,))
            out = keras.layers.Dense(10, activation="softmax", name="digit")(x)
            model, metrics = keras.Model(x, out), {"digit": metrics}
        loss = "sparse_categorical_crossentropy"
        model.compile("sgd", loss, metrics=metrics, run_eagerly=True)
        ours = [key for key in _keras.metrics(model) if key != "loss"]
        assert ours == ["it", "it_1"]
        logs = model.fit(digits[0][:64], digits[1][:64], verbose=0).history
        assert set(ours) <= set(logs)

    def test_only_validated_epochs_are_read(self, digits):
        callback = keras_milr.MutualInformationLR(
            keep, monitor="val_mutual_information"
        )
        options = {"validation_split": 0.3, "validation_freq": 2}
        with pytest.warns(UserWarning, match="`val_mutual_information` is not avail"):
            fit(callback, digits, self.compiled(), epochs=4, **options)
        assert [r["epoch"] for r in callback.history] == [1, 3]

    @pytest.mark.filterwarnings("ignore:.* is not available:UserWarning")
    @pytest.mark.parametrize("every", [1, 2, 4, 5])
    def test_the_rate_comes_down_however_often_there_is_a_validation(
        self, digits, every
    ):
        callback = keras_milr.MutualInformationLR(monitor="val_mutual_information")
        options = {"validation_data": digits, "validation_freq": every}
        history = fit(callback, digits, self.compiled(), epochs=20, **options).history
        rates = history["learning_rate"]
        assert rates[-1] < 0.2 * max(rates)
        assert rates[11] > 0.5 * max(rates[:12])
        last = callback.history[-1]
        assert last["step"] == last["steps"] == 20 // every

    @pytest.mark.parametrize("update_freq", ["epoch", 1, 7])
    def test_a_loop_that_resets_the_metric_is_refused(self, digits, update_freq):
        """As `train_on_batch` does before each batch."""
        x, y = digits
        model = self.compiled()
        callback = keras_milr.MutualInformationLR(keep, update_freq=update_freq)
        hooks = keras.callbacks.CallbackList([callback], model=model, epochs=1)
        trained = []

        def loop():
            hooks.on_train_begin()
            hooks.on_epoch_begin(0)
            for i in range(30):
                logs = model.train_on_batch(x[i::30], y[i::30], return_dict=True)
                hooks.on_train_batch_end(i, logs)
                trained.append(i)
            hooks.on_epoch_end(0, logs)

        with pytest.raises(ValueError, match=r"was reset .*train_on_batch.*probe_data"):
            loop()
        assert len(trained) < 5  # Before the epoch is lost.

    @pytest.mark.backends("tensorflow", "torch", reason="a step on JAX has no state")
    @pytest.mark.parametrize("update_freq", ["epoch", 20])
    def test_an_evaluation_within_the_epoch_is_refused(self, digits, update_freq):
        x, y = digits
        meddler = keras.callbacks.LambdaCallback(
            on_train_batch_end=lambda batch, logs: (
                batch == 30 and meddler.model.evaluate(x[:99], y[:99], verbose=0)
            )
        )
        callback = keras_milr.MutualInformationLR(keep, update_freq=update_freq)
        callbacks = [callback, meddler]
        with pytest.raises(ValueError, match=r"reset within the epoch.*`evaluate`"):
            fit(None, digits, self.compiled(), callbacks=callbacks)
        if update_freq == "epoch":  # It does not matter to one on validation data.
            options = {"callbacks": callbacks, "validation_split": 0.3}
            fit(None, digits, self.compiled(), **options)

    def test_a_metric_used_since_is_refused(self, digits):
        x, y = digits
        meddler = keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs: meddler.model.evaluate(
                x[:99], y[:99], verbose=0
            )
        )
        callback = keras_milr.MutualInformationLR(keep)
        with pytest.raises(ValueError, match="Put MutualInformationLR before it"):
            fit(None, digits, self.compiled(), callbacks=[meddler, callback])
        fit(None, digits, self.compiled(), callbacks=[callback, meddler])

    def test_batch_readings_lose_no_counts_between_epochs(self, digits):
        callback = keras_milr.MutualInformationLR(keep, update_freq=20)
        fit(callback, digits, self.compiled(), epochs=3)  # 57 batches an epoch
        taken = [(r["epoch"], r["batch"]) for r in callback.history]
        assert taken == [
            *((0, 20), (0, 40)),
            *((1, 3), (1, 23), (1, 43)),
            *((2, 6), (2, 26), (2, 46)),
        ]
        # H(Y) of 20 batches each; a torn reading had it of 3 or 6.
        assert {r["estimator"] for r in callback.history} == {"counts"}

    def test_batch_readings_wait_for_a_second_class(self, digits):
        order = np.argsort(digits[1] > 4, kind="stable")
        x, y = digits[0][order], (digits[1][order] > 4).astype("int32")
        model = make_model(units=1, metrics=[keras_milr.MutualInformation()])
        callback = keras_milr.MutualInformationLR(keep, update_freq=10)
        fit(callback, (x, y), model, epochs=1, shuffle=False)
        # 901 of the first class: the second comes in batch 29, and then no other.
        assert [r["batch"] for r in callback.history] == [30]
        assert callback.history[0]["entropy"] < 0.3

    def test_every_so_many_batches(self, digits):
        """Each reading has the counts since the one before it."""
        model = self.compiled()
        callback = keras_milr.MutualInformationLR(keep, update_freq=19)
        tables = []

        class Watch(keras.callbacks.Callback):
            def on_train_batch_end(self, batch, logs=None):
                if batch in (18, 37):
                    assert self.model is model  # On JAX that brings its state back.
                    counts = callback._table._metric.counts
                    tables.append(keras.ops.convert_to_numpy(counts).copy())

        fit(None, digits, model, epochs=1, callbacks=[Watch(), callback])
        second = tables[1] - tables[0]
        assert second.sum() == 19 * 32
        assert callback.history[1]["raw"] == pytest.approx(
            reference.mutual_information(second), abs=1e-6
        )

    @pytest.mark.backends("tensorflow", "torch", reason="a step on JAX has no state")
    def test_the_model_may_own_the_metric(self, digits):
        class Owner(CustomStep):
            def __init__(self):
                super().__init__()
                self.information = keras_milr.MutualInformation()

            def count(self, y, outputs):
                self.information.update_state(y, outputs)

        model = Owner()
        model.compile("adam", "sparse_categorical_crossentropy")
        callback = keras_milr.MutualInformationLR(keep)
        history = fit(callback, digits, model).history
        values = [r["raw"] for r in callback.history]
        np.testing.assert_allclose(values, history["mutual_information"], atol=1e-5)


class TestModelsAndData:
    @pytest.mark.parametrize(
        "make",
        [
            *(Subclassed, CustomStep, NoTrainingArgument, TrainingWithoutDefault),
            *("functional", "dict output", "nested", "not built"),
        ],
    )
    def test_models(self, digits, make):
        if make == "functional":
            inputs = keras.Input((64,))
            outputs = keras.layers.Dense(10, activation="softmax")(inputs)
            model = keras.Model(inputs, outputs)
        elif make == "dict output":
            inputs = keras.Input((64,))
            outputs = keras.layers.Dense(10, activation="softmax", name="o")(inputs)
            model = keras.Model(inputs, {"o": outputs})
        elif make == "not built":
            model = keras.Sequential([keras.layers.Dense(10, activation="softmax")])
        elif make == "nested":
            model = keras.Sequential([keras.Input((64,)), make_model()])
        else:
            model = make()
        model.compile("adam", "sparse_categorical_crossentropy")
        callback = keras_milr.MutualInformationLR(probe_data=digits)
        fit(callback, digits, model, epochs=4)
        assert callback.history[-1]["value"] > 1.0
        predicted = model.predict(digits[0], verbose=0)
        predicted = predicted["o"] if make == "dict output" else predicted
        assert callback.history[-1]["raw"] == pytest.approx(
            mutual_info_score(digits[1], predicted.argmax(axis=1)), abs=1e-4
        )

    @pytest.mark.backends("tensorflow", reason="Keras refuses to build it on others")
    def test_a_model_that_only_a_trace_builds(self, digits):
        class Scale(keras.layers.Layer):
            def build(self, shape):
                array = np.ones(shape[-1], "float32")
                self.scale = keras.Variable(array, name="scale")

            def call(self, x):
                return x * self.scale

        class Scaled(Subclassed):
            def __init__(self):
                super().__init__()
                self.inner = keras.Sequential([Scale(), keras.layers.Dense(16)])

            def call(self, x):
                return super().call(self.inner(x))

        found = []
        for way in ("plain", "probe", "test"):
            keras.utils.set_random_seed(0)
            model = Scaled()
            model.compile("adam", "sparse_categorical_crossentropy")
            if way == "test":
                keras_milr.lr_range_test(model, *digits, verbose=0)
            read = keras_milr.MutualInformationLR(keep, digits, rollback=False)
            callbacks = [read] if way == "probe" else []
            logs = model.fit(*digits, shuffle=False, verbose=0, callbacks=callbacks)
            found.append((logs.history["loss"], len(model.variables)))
            if way != "plain":
                assert model.inner.input_shape == (None, 64)
        assert found == found[:1] * 3

    def test_an_optimizer_that_does_not_train_the_model(self, digits):
        """As of an adversarial network, whose step has optimizers of its own."""

        class Own(Subclassed):
            def train_step(self, *args):
                logs, state = {"loss": keras.ops.zeros(())}, args[:-1]
                return (logs, *state) if state else logs

        model = Own()
        model.compile("adam", "sparse_categorical_crossentropy")
        callback = keras_milr.MutualInformationLR(probe_data=digits)
        with pytest.warns(UserWarning, match="no step in the first epoch") as said:
            fit(callback, digits, model, epochs=3)
        assert sum("no step" in str(one.message) for one in said) == 1

    def test_the_sample_is_that_of_the_model_and_of_the_data(self, digits):
        """A callback is used again, as in a notebook or for each of several folds."""
        x, y = digits
        callback = keras_milr.MutualInformationLR(probe_data=(x, y))
        for logits in (True, False):
            last = None if logits else "softmax"
            model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(10, last)])
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=logits)
            model.compile("adam", loss)
            fit(callback, digits, model)
            expected = model.evaluate(x, y, verbose=0)
            found = callback.history[-1]["cross_entropy"]
            assert found == pytest.approx(expected, rel=1e-4)
        sample = callback._sample
        fit(callback, digits, model)
        assert callback._sample is sample
        callback.probe_data = x[:300], y[:300]
        fit(callback, digits, model)
        np.testing.assert_array_equal(callback._sample.x, x[:300])

    @pytest.mark.backends("tensorflow", reason="the model has operations of its own")
    def test_subclassed_in_mixed_precision(self, digits):
        keras.config.set_dtype_policy("mixed_float16")
        try:
            model = RawWeights()
        finally:
            keras.config.set_dtype_policy("float32")
        model.compile("adam", "sparse_categorical_crossentropy")
        callback = keras_milr.MutualInformationLR(probe_data=digits)
        fit(callback, digits, model, epochs=3)
        assert callback.history[-1]["value"] > 1.0

    @pytest.mark.supports("Models", "preprocessing layers")
    @pytest.mark.backends("tensorflow", reason="others have no strings")
    @pytest.mark.parametrize("kind", ["object", "str", "dataset"])
    def test_text(self, kind):
        """A model that takes strings."""
        x = np.array(["a good day", "so bad", "good good", "bad day"] * 20)
        y = np.array([1, 0, 1, 0] * 20)
        vectorize = keras.layers.TextVectorization(output_sequence_length=4)
        vectorize.adapt(x)
        inputs = keras.Input((), dtype="string")
        hidden = keras.layers.Embedding(10, 8, mask_zero=True)(vectorize(inputs))
        hidden = keras.layers.GlobalAveragePooling1D()(hidden)
        model = keras.Model(inputs, keras.layers.Dense(1, activation="sigmoid")(hidden))
        model.compile(keras.optimizers.Adam(0.1), "binary_crossentropy")
        dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(20)
        data = {"object": (x.astype(object), y), "str": (x, y), "dataset": dataset}
        callback = keras_milr.MutualInformationLR(probe_data=data[kind])
        fit(callback, dataset, model, epochs=5)
        assert callback.history[-1]["raw"] == pytest.approx(np.log(2))

    def test_one_feature_without_its_axis(self):
        x = np.linspace(-1, 1, 200, dtype="float32")
        y = (x > 0).astype("int32")
        model = keras.Sequential(
            [keras.Input((1,)), keras.layers.Dense(2, activation="softmax")]
        )
        model.compile(keras.optimizers.Adam(0.1), "sparse_categorical_crossentropy")
        callback = keras_milr.MutualInformationLR(probe_data=(x, y))
        fit(callback, (x, y), model, epochs=5)
        assert callback.history[-1]["raw"] > 0.5

    def test_training_data(self, digits):
        x, y = digits

        class Batches(keras.utils.PyDataset):
            def __len__(self):
                return 17

            def __getitem__(self, i):
                return x[100 * i : 100 * (i + 1)], y[100 * i : 100 * (i + 1)]

        def generate():
            while True:
                yield x[:100], y[:100]

        dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(100)
        for data, options in (
            (dataset, {}),
            (dataset.repeat(), {"steps_per_epoch": 5}),
            (Batches(), {}),
            (generate(), {"steps_per_epoch": 5}),
        ):
            callback = keras_milr.MutualInformationLR(halve, probe_data=dataset)
            history = fit(callback, data, epochs=2, **options).history
            np.testing.assert_allclose(
                history["learning_rate"], [1e-3, 5e-4], rtol=1e-6
            )

    @pytest.mark.parametrize(
        "units",
        [
            pytest.param(1, marks=labels("binary: one probability")),
            pytest.param(2, marks=labels("binary: two outputs")),
        ],
    )
    def test_two_classes(self, digits, units):
        x, y = digits[0], (digits[1] > 4).astype("int32")
        callback = keras_milr.MutualInformationLR(probe_data=(x, y))
        fit(callback, (x, y), make_model(units=units), epochs=5)
        assert 0.4 < callback.history[-1]["value"] <= np.log(2)

    @pytest.mark.supports("Labels", "one-hot")
    def test_one_hot_labels(self, digits):
        data = digits[0], np.eye(10, dtype="float32")[digits[1]]
        model = make_model(loss="categorical_crossentropy")
        callback = keras_milr.MutualInformationLR(probe_data=data)
        fit(callback, data, model)
        assert callback.history[-1]["value"] > 1.0

    @pytest.mark.parametrize(
        "units",
        [
            pytest.param(1, marks=labels("binary: one logit")),
            pytest.param(10, marks=labels("logits")),
        ],
    )
    def test_logits(self, digits, units):
        x, y = digits
        y = (y > 4).astype("int32") if units == 1 else y
        name = "Binary" if units == 1 else "SparseCategorical"
        loss = getattr(keras.losses, name + "Crossentropy")(from_logits=True)
        model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(units)])
        model.compile("adam", loss)
        callback = keras_milr.MutualInformationLR(probe_data=(x, y))
        fit(callback, (x, y), model)
        p = model.predict(x, verbose=0)
        predicted = p[:, 0] > 0 if units == 1 else p.argmax(axis=1)
        assert callback.history[-1]["raw"] == pytest.approx(
            mutual_info_score(y, predicted), abs=1e-4
        )
        assert callback.history[-1]["bound"] == pytest.approx(
            max(callback.history[-1]["entropy"] - model.evaluate(x, y, verbose=0), 0),
            abs=1e-4,
        )

    @pytest.mark.supports("Training options", "run_eagerly")
    def test_run_eagerly(self, digits):
        model = make_model(run_eagerly=True, jit_compile=False)
        callback = keras_milr.MutualInformationLR(halve, probe_data=digits)
        fit(callback, (digits[0][:200], digits[1][:200]), model, epochs=2)
        assert callback.history[-1]["rate"] == pytest.approx(5e-4)


class TestBadInput:
    """Each error comes before a single batch is trained."""

    def raises(self, digits, message, model=None, error=ValueError, **arguments):
        model = make_model() if model is None else model
        before = model.get_weights()
        arguments = {"probe_data": digits} | arguments
        with pytest.raises(error, match=f"(?s){message}"):
            fit(keras_milr.MutualInformationLR(**arguments), digits, model)
        for old, new in zip(before, model.get_weights(), strict=True):
            np.testing.assert_array_equal(old, new)

    def test_neither_probe_nor_metric(self, digits):
        message = (
            r"probe_data=\(x_train, y_train\).*"
            r"metrics=\[keras_milr.MutualInformation\(\)\]"
        )
        self.raises(digits, message, probe_data=None)
        with_others = make_model(metrics=["accuracy"])
        self.raises(digits, message, with_others, probe_data=None)

    def test_monitor(self, digits):
        model = make_model(metrics=[keras_milr.MutualInformation()])
        message = "`monitor` must be one of.*'val_mutual_information'.*'val_loss'"
        self.raises(digits, message, model, probe_data=None, monitor="val_loss")
        self.raises(digits, "exclude each other", monitor="mutual_information")
        with pytest.raises(ValueError, match="`update_freq` must be 'epoch' with it"):
            keras_milr.MutualInformationLR(monitor="val_mi", update_freq=10)

    def test_policies(self, digits):
        self.raises(digits, "`policy` must be one of.*'cosine'", policy="cosine")
        for bad in (np.nan, np.inf, -1e-3):
            self.raises(
                digits,
                f"`policy` must return finite rates.*Received: {bad}",
                policy=lambda r, bad=bad: r.rate * 0 + bad,
            )
        for result, received in (
            (np.ones(3), r"array\(\[1., 1., 1.\]\)"),
            ("fast", "'fast'"),
            (None, "None"),
            ("0.01", "'0.01'"),
            (True, "True"),
            (1j, "1j"),
            ([[1.0], [1.0, 2.0]], r"\[\[1.0\]"),
        ):
            self.raises(
                digits,
                f"`policy` must return.*{received}",
                policy=lambda r, v=result: v,
            )

    def test_a_policy_that_computes_in_place(self, digits):
        """It would overwrite the rate that its result is compared with."""

        def policy(reading):
            rate = reading.rate
            rate *= 0.5
            return rate

        self.raises(digits, "read-only", policy=policy)

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"min_lr": 0.1, "max_lr": 0.01}, ValueError, "`min_lr` must not be above"),
            ({"min_lr": -1e-3}, ValueError, "`min_lr`.*at least 0.*-0.001"),
            ({"min_lr": float("nan")}, ValueError, "`min_lr`.*nan"),
            ({"max_lr": 0.0}, ValueError, "`max_lr`.*above 0"),
            ({"max_lr": "high"}, TypeError, "`max_lr`.*of type str"),
            ({"learning_rate": 0}, ValueError, "`learning_rate`.*above 0.*0"),
            ({"learning_rate": -0.1}, ValueError, "`learning_rate`.*-0.1"),
            ({"learning_rate": "fast"}, TypeError, "`learning_rate`.*of type str"),
            ({"learning_rate": 0.1, "max_lr": 0.01}, ValueError, "between `min_lr`"),
            ({"max_lr": 1e-5}, ValueError, "learning rate 0.001"),
            ({"probe_size": 0}, ValueError, "`probe_size`.*at least 2"),
            ({"probe_size": 19}, ValueError, "at least 2 for each class"),
            ({"probe_size": 10.5}, ValueError, "`probe_size`.*integer"),
            ({"update_freq": 0}, ValueError, "`update_freq`.*at least 1, or 'epoch'"),
            ({"update_freq": "batch"}, ValueError, "`update_freq`.*'batch'"),
            ({"update_freq": None}, TypeError, "`update_freq`.*NoneType"),
            ({"min_lr": 10**400}, ValueError, "`min_lr`.*finite"),
            ({"learning_rate": 1e39}, ValueError, "`learning_rate`.*at most 3.4"),
            ({"update_freq": np.ones(2)}, TypeError, "`update_freq`.*ndarray"),
            ({"readout": np.ones(2)}, TypeError, "`readout` must be 'auto'"),
            ({"seed": -1}, ValueError, "`seed`.*at least 0"),
            ({"seed": 2**32}, ValueError, "`seed`.*at most 4294967295"),
            ({"verbose": "auto"}, TypeError, "`verbose` must be 0 or 1"),
            ({"probe_data": None, "monitor": 3}, TypeError, "`monitor` must be a log"),
            ({"reference": lambda i: None}, ValueError, "`reference` must return"),
            ({"reference": lambda i: [1.0]}, ValueError, "`reference` must return"),
            ({"reference": -1.0}, ValueError, "`reference`.*-1.0"),
            ({"reference": 1e39}, ValueError, "`reference`.*at most 3.4"),
            ({"reference": lambda i: 10**400}, ValueError, "`reference` must return"),
            ({"reference": lambda i: -1.0}, ValueError, "`reference` must return"),
            ({"readout": "hidden"}, TypeError, "`readout` must be 'auto'"),
        ],
    )
    def test_arguments(self, digits, arguments, error, message):
        self.raises(digits, message, error=error, **arguments)

    def test_data(self, digits):
        x, y = digits
        nan = x.copy()
        nan[5, 5] = np.nan
        for data, message in (
            ((x, y[:-1]), "same length"),
            ((x[:0], y[:0]), "`probe_data` is empty"),
            (x, "must have labels"),
            ((x, y - 1), r"`probe_data`: .*whole numbers in \[0, 10\).*-1"),
            ((x, y + 1), r"whole numbers in \[0, 10\).*10"),
            ((x, np.zeros_like(y)), "at least two classes"),
            ((nan, y), "must be finite.*1 NaN"),
        ):
            self.raises(digits, message, probe_data=data)

    def test_a_schedule_in_the_optimizer(self, digits):
        schedule = keras.optimizers.schedules.CosineDecay(0.01, 100)
        model = make_model(keras.optimizers.Adam(schedule))
        self.raises(digits, "LearningRateSchedule.*Compile with a number", model)

    def test_an_optimizer_without_one_rate(self, digits):
        multi = getattr(keras.optimizers, "MultiOptimizer", None)
        if multi is None:
            pytest.skip("this Keras has no MultiOptimizer")
        model = make_model()
        first, last = keras.optimizers.SGD(), keras.optimizers.SGD()
        optimizer = multi(lambda v: first if v is model.weights[0] else last)
        model.compile(optimizer, "sparse_categorical_crossentropy")
        self.raises(digits, "one learning rate that can be set", model)

    def test_a_rate_that_is_a_function(self, digits):
        model = make_model(keras.optimizers.Adam(lambda: 1e-3))
        self.raises(digits, "a number and no function. Received: Adam", model)

    def test_a_model_that_is_not_compiled(self, digits):
        model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(10)])
        callback = keras_milr.MutualInformationLR(probe_data=digits)
        callback.set_model(model)
        with pytest.raises(ValueError, match="which is not compiled"):
            callback.on_train_begin()

    def test_a_single_output_that_is_no_probability(self, digits):
        data = digits[0], (digits[1] > 4).astype("float32")
        model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(1)])
        model.compile("adam", "mse")
        self.raises(data, r"single output.*from_logits=True", model)

    def test_metric_without_counts(self, digits):
        model = make_model(metrics=[keras_milr.MutualInformation()])
        data = digits[0], np.zeros_like(digits[1])
        with pytest.raises(ValueError, match="fewer than two classes"):
            fit(keras_milr.MutualInformationLR(), data, model)


def test_outputs_that_are_no_probabilities_warn(digits):
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(10)])
    model.compile("adam", "mse")
    data = digits[0], np.eye(10)[digits[1]]
    callback = keras_milr.MutualInformationLR(probe_data=data)
    with pytest.warns(UserWarning, match="outputs are not probabilities"):
        fit(callback, data, model, epochs=1)
    assert callback.history[-1]["information"] == callback.history[-1]["value"]
    json.dumps(callback.history)


def test_a_diverged_model_reads_as_knowing_nothing(digits):
    model = make_model("sgd")
    callback = keras_milr.MutualInformationLR(
        lambda r: r.rate, digits, learning_rate=1e30, verbose=0
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(callback, digits, model, epochs=1)
    assert callback.history[-1]["information"] == 0
    assert callback.history[-1]["entropy"] > 2.3


def test_config(digits):
    callback = keras_milr.MutualInformationLR(
        policies.ReferenceLevel(share=0.2),
        digits,
        probe_size=100,
        readout=readouts.Predictions(from_logits=True),
        max_lr=0.1,
        update_freq=7,
        seed=3,
    )
    config = callback.get_config()
    json.dumps(config)
    again = keras_milr.MutualInformationLR.from_config(config, probe_data=digits)
    assert again.get_config() == config
    assert again._policy.share == 0.2
    assert again.readout.from_logits is True


def test_batches_are_counted_although_their_hooks_run_in_several_threads(digits):
    callback = keras_milr.MutualInformationLR("relative", digits, 100)
    x, y = digits[0][:800], digits[1][:800]
    make_model().fit(x, y, batch_size=2, epochs=4, verbose=0, callbacks=[callback])
    assert [r["batch"] for r in callback.history] == [0, 400, 400, 400, 400]
