"""`MutualInformationLR(layers=...)` in `fit`."""

import csv
import json

import keras
import numpy as np
import pytest

from keras_milr import LayerwiseOptimizer, MutualInformationLR, policies, readouts

LAYERS = ["first", "second", "out"]


def make_model(rate=1e-3, multipliers=None, optimizer=None, **compile_arguments):
    model = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(16, activation="relu", name="first"),
            keras.layers.Dropout(0.2),
            keras.layers.Dense(16, activation="relu", name="second"),
            keras.layers.Dense(10, activation="softmax", name="out"),
        ]
    )
    if optimizer is None:
        optimizer = LayerwiseOptimizer(keras.optimizers.Adam(rate), multipliers)
    model.compile(optimizer, "sparse_categorical_crossentropy", **compile_arguments)
    return model


def fit(callbacks, data, model=None, epochs=2, **arguments):
    model = make_model() if model is None else model
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    arguments = {"batch_size": 128, "verbose": 0} | arguments
    return model.fit(*data, epochs=epochs, callbacks=callbacks, **arguments)


def make(policy, data, layers="all", **arguments):
    arguments = {"probe_size": 200} | arguments
    return MutualInformationLR(policy, data, layers=layers, **arguments)


def keep(reading):
    return reading.rate


def spread(reading):
    """A rate of its own for each layer."""
    return reading.rate * np.array([0.5, 1.0, 2.0])


class TestLogs:
    def test_keys_from_the_first_epoch(self, digits, tmp_path):
        callback = make(spread, digits)
        logger = keras.callbacks.CSVLogger(tmp_path / "log.csv")
        history = fit([callback, logger], digits, epochs=3).history
        with open(tmp_path / "log.csv") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == 3
        factors = dict(zip(LAYERS, (0.5, 1, 2), strict=True))
        for name, factor in factors.items():
            rates = [1e-3 * factor**epoch for epoch in range(3)]
            key = f"learning_rate/{name}"
            np.testing.assert_allclose(history[key], rates, rtol=1e-6)
            np.testing.assert_allclose([float(r[key]) for r in rows], rates, rtol=1e-6)
            key = f"probe_mutual_information/{name}"
            expected = [record["value"][name] for record in callback.history[1:]]
            assert history[key] == expected
            np.testing.assert_allclose([float(r[key]) for r in rows], expected)
        np.testing.assert_allclose(history["learning_rate"], 1e-3, rtol=1e-6)
        assert history["probe_mutual_information"] == [
            record["output"]["value"] for record in callback.history[1:]
        ]

    def test_readings_are_those_of_the_layers(self, digits):
        x, y = digits
        model, callback = make_model(), make(keep, digits, probe_size=10_000)
        history = fit(callback, digits, model).history
        for name in LAYERS:
            layer = keras.Model(model.inputs[0], model.get_layer(name).output)
            activations = layer.predict(x, verbose=0)
            info = readouts.LinearReadout().measure(activations, y, 10)
            last = callback.history[-1]
            assert last["value"][name] == pytest.approx(info.value, abs=1e-4)
            assert last["information"][name] == pytest.approx(info.accessible, abs=1e-4)
            assert history[f"probe_mutual_information/{name}"][-1] == pytest.approx(
                info.value, abs=1e-4
            )

    def test_history_has_each_layer_and_serialises(self, digits):
        callback = make("relative", digits)
        fit(callback, digits)
        scalars = {"step", "steps", "rollbacks", "searched", "restarts"}
        arrays = set(policies.Reading._fields) - scalars
        arrays |= set(readouts.Information._fields)
        assert [r["step"] for r in callback.history] == [0, 1, 2]
        for record in callback.history:
            for key in arrays:
                assert list(record[key]) == LAYERS
            assert set(record["output"]) == set(readouts.Information._fields)
            assert set(record) == arrays | scalars | {"epoch", "batch", "output"}
        assert json.loads(json.dumps(callback.history)) == callback.history

    def test_messages(self, digits, capsys):
        fit(make(spread, digits, verbose=1), digits, epochs=1)
        message = "setting learning rates to first: 0.0005, second: 0.001, out: 0.002."
        assert message in capsys.readouterr().out


class TestRates:
    def test_the_policy_is_handed_an_entry_for_each_layer(self, digits):
        readings = []

        def policy(reading):
            readings.append(reading)
            return reading.rate

        fit(make(policy, digits), digits, make_model(multipliers={"out": 2}))
        assert len(readings) == 3
        for reading in readings:
            arrays = [v for v in reading if isinstance(v, np.ndarray)]
            assert [a.shape for a in arrays] == [(3,)] * 11
            np.testing.assert_allclose(reading.rate, [1e-3, 1e-3, 2e-3], rtol=1e-6)
            np.testing.assert_allclose(reading.reference, np.log(10), rtol=1e-2)
        assert np.any(readings[0].information != readings[1].information)
        np.testing.assert_array_equal(readings[1].previous, readings[0].information)

    @pytest.mark.parametrize("update_freq", ["epoch", 5])
    def test_changing_nothing_leaves_training_bit_equal(self, digits, update_freq):
        weights = []
        multipliers = {"first": 0.3, "out": 1.7}
        for layers in (None, "all", {"body": ["first", "second"]}):
            keras.utils.set_random_seed(1)
            model = make_model(0.0123, multipliers)
            callback = make(keep, digits, layers, update_freq=update_freq)
            fit([] if layers is None else callback, digits, model)
            weights.append(model.get_weights())
        for one, *others in zip(*weights, strict=True):
            for other in others:
                np.testing.assert_array_equal(one, other)

    def test_same_seeds_same_rates(self, digits):
        runs = []
        for _ in range(2):
            keras.utils.set_random_seed(3)
            callback = make("relative", digits, seed=5)
            fit(callback, digits)
            runs.append(callback.history)
        assert runs[0] == runs[1]
        assert runs[0][-1]["rate"] != runs[0][0]["rate"]

    def test_weights_equal_those_of_multipliers_set_by_hand(self, digits):
        def run(make_callback):
            keras.utils.set_random_seed(2)
            model = make_model(0.004, {"first": 0.5})
            fit(make_callback(model), digits, model, epochs=3)
            return model

        def by_hand(model):
            def change(epoch, logs):
                power = epoch + 1
                model.optimizer.set_multipliers(
                    {"first": 0.5 * 0.5**power, "out": 2.0**power}
                )

            return keras.callbacks.LambdaCallback(on_epoch_end=change)

        ours = run(lambda model: make(spread, digits))
        reference = run(by_hand)
        plain = run(lambda model: [])
        for a, b in zip(ours.get_weights(), reference.get_weights(), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        assert ours.optimizer.multipliers == pytest.approx(
            reference.optimizer.multipliers
        )
        assert np.abs(ours.get_weights()[0] - plain.get_weights()[0]).max() > 1e-3

    def test_every_so_many_batches(self, digits):
        callback = make(spread, digits, update_freq=4)
        history = fit(callback, digits).history  # 15 batches an epoch
        taken = [(r["epoch"], r["batch"]) for r in callback.history]
        assert taken == [
            (0, 0),
            *((0, b) for b in (4, 8, 12)),
            (1, 1),
            (1, 5),
            (1, 9),
            (1, 13),
        ]
        np.testing.assert_allclose(
            history["learning_rate/first"], [1e-3 / 2**3, 1e-3 / 2**7], rtol=1e-5
        )
        # Ten times the highest at the start.
        np.testing.assert_allclose(
            history["learning_rate/out"], [8e-3, 1e-2], rtol=1e-5
        )

    def test_logged_are_the_rates_of_the_last_batch(self, digits):
        """Where a reading after it has changed them already."""
        history = fit(make(spread, digits, update_freq=5), digits, epochs=1).history
        assert history["learning_rate/first"] == pytest.approx([1e-3 / 2**2])
        assert history["learning_rate/out"] == pytest.approx([1e-3 * 2**2])

    def test_groups(self, digits):
        model = make_model(multipliers={"first": 0.5})
        layers = {"body": ["first", "second"], "head": "out"}
        callback = make(lambda r: r.rate * [0.5, 2.0], digits, layers)
        history = fit(callback, digits, model).history
        np.testing.assert_allclose(history["learning_rate/body"], [1e-3, 5e-4], 1e-6)
        np.testing.assert_allclose(history["learning_rate/head"], [1e-3, 2e-3], 1e-6)
        values = list(model.optimizer.multipliers.values())
        np.testing.assert_allclose(values, [0.125, 0.25, 4], rtol=1e-6)
        assert set(callback.history[0]["value"]) == {"body", "head"}
        second = keras.Model(model.inputs[0], model.get_layer("second").output)
        info = readouts.LinearReadout().measure(
            second.predict(callback._sample.x, verbose=0),
            callback._sample.class_ids,
            10,
        )
        assert callback.history[-1]["value"]["body"] == pytest.approx(
            info.value, abs=1e-4
        )

    def test_one_layer(self, digits):
        model = make_model()
        fit(make(lambda r: r.rate / 2, digits, "second"), digits, model, epochs=1)
        assert model.optimizer.multipliers == {"first": 1, "second": 0.5, "out": 1}

    def test_bounds(self, digits):
        model = make_model()
        callback = make(
            lambda r: r.rate * [0.01, 1, 100], digits, min_lr=5e-4, max_lr=3e-3
        )
        fit(callback, digits, model)
        values = list(model.optimizer.multipliers.values())
        np.testing.assert_allclose(values, [0.5, 1, 3], rtol=1e-6)
        with pytest.raises(ValueError, match="must lie between"):
            fit(make(keep, digits, max_lr=5e-4), digits)
        # Where a layer is below the bound it may stay there.
        model = make_model(multipliers={"first": 1e-4})
        fit(make(lambda r: r.rate * [0.5, 1, 1], digits), digits, model)
        assert model.optimizer.multipliers["first"] == pytest.approx(1e-4)

    def test_the_start_by_the_callback_is_the_base(self, digits):
        model = make_model(multipliers={"first": 0.5})
        history = fit(make(keep, digits, learning_rate=0.01), digits, model).history
        np.testing.assert_allclose(history["learning_rate"], 0.01, rtol=1e-6)
        np.testing.assert_allclose(history["learning_rate/first"], 0.005, rtol=1e-6)

    @pytest.mark.parametrize("place", [0, 1])
    def test_others_set_the_base(self, digits, place):
        scheduler = keras.callbacks.LearningRateScheduler(lambda e: 1e-3 * 4**e)
        callbacks = [make(spread, digits)]
        callbacks.insert(place, scheduler)
        model = make_model()
        history = fit(callbacks, digits, model, epochs=3).history
        np.testing.assert_allclose(
            history["learning_rate"], [1e-3, 4e-3, 16e-3], rtol=1e-6
        )
        np.testing.assert_allclose(
            history["learning_rate/first"], [1e-3, 2e-3, 4e-3], rtol=1e-5
        )
        values = list(model.optimizer.multipliers.values())
        np.testing.assert_allclose(values, [0.125, 1, 8], rtol=1e-5)

    def test_a_warm_up_from_0(self, digits):
        """The base is not ours, nor is the bound for it."""
        warm_up = keras.optimizers.schedules.CosineDecay(
            0.0, 40, warmup_target=1e-2, warmup_steps=10
        )
        model = make_model(warm_up)
        history = fit(make("decay", digits), digits, model, epochs=6).history
        assert history["loss"][-1] < history["loss"][0]
        scheduler = keras.callbacks.LearningRateScheduler(lambda e: 1e-3 * e)
        history = fit([scheduler, make(spread, digits)], digits, epochs=3).history
        # At 0 there is no rate to set.
        np.testing.assert_allclose(
            history["learning_rate/first"], [0, 1e-3, 1e-3], rtol=1e-5
        )

    @pytest.mark.parametrize("place", [0, 1])
    def test_reduce_on_plateau_beside_it(self, digits, place):
        plateau = keras.callbacks.ReduceLROnPlateau(
            "loss", factor=0.5, patience=1, min_delta=100.0
        )
        callbacks = [make(spread, digits)]
        callbacks.insert(place, plateau)
        model = make_model()
        fit(callbacks, digits, model)
        base = float(model.optimizer.learning_rate)
        assert base == pytest.approx(5e-4)
        values = list(model.optimizer.multipliers.values())
        np.testing.assert_allclose(values, [0.25, 1, 4], rtol=1e-5)

    def test_a_schedule_inside(self, digits):
        schedule = keras.optimizers.schedules.ExponentialDecay(
            8e-3, 15, 0.5, staircase=True
        )
        model = make_model(schedule)
        history = fit(make(spread, digits), digits, model).history
        np.testing.assert_allclose(history["learning_rate"], [4e-3, 2e-3], rtol=1e-5)
        values = list(model.optimizer.multipliers.values())
        np.testing.assert_allclose(values, [0.25, 1, 4], rtol=1e-5)

    def test_mixed_float16(self, digits):
        keras.config.set_dtype_policy("mixed_float16")
        try:
            model = make_model(jit_compile=False)
        finally:
            keras.config.set_dtype_policy("float32")
        assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
        history = fit(make(spread, digits), digits, model).history
        np.testing.assert_allclose(
            history["learning_rate/out"], [1e-3, 2e-3], rtol=1e-5
        )
        values = list(model.optimizer.inner_optimizer.multipliers.values())
        np.testing.assert_allclose(values, [0.25, 1, 4], rtol=1e-5)


class TestAgain:
    def test_a_second_fit_begins_where_the_first_ended(self, digits):
        model, callback = make_model(), make(spread, digits)
        fit(callback, digits, model)
        history = fit(callback, digits, model, epochs=1).history
        np.testing.assert_allclose(history["learning_rate/first"], [2.5e-4], rtol=1e-5)
        np.testing.assert_allclose(history["learning_rate/out"], [4e-3], rtol=1e-5)
        assert [r["step"] for r in callback.history] == [0, 1]
        assert callback.history[0]["start_rate"]["out"] == pytest.approx(4e-3)

    def test_rates_that_came_down_are_back_at_the_highest(self, digits):
        def fade(reading):
            return reading.rate * np.array([0.1, 0.5, 1.0])

        fade.anneals = True
        model = make_model()
        history = fit(make(fade, digits), digits, model).history
        np.testing.assert_allclose(history["learning_rate/first"], [1e-3, 1e-4], 1e-5)
        values = list(model.optimizer.multipliers.values())
        np.testing.assert_allclose(values, [1, 1, 1], rtol=1e-5)

    def test_multipliers_ride_along_with_the_model(self, digits, tmp_path):
        model = make_model()
        fit(make(spread, digits), digits, model)
        model.save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(tmp_path / "model.keras")
        assert loaded.optimizer.multipliers == model.optimizer.multipliers
        callback = make(spread, digits)
        history = fit(callback, digits, loaded, epochs=1).history
        np.testing.assert_allclose(history["learning_rate/first"], [2.5e-4], rtol=1e-5)
        values = list(loaded.optimizer.multipliers.values())
        np.testing.assert_allclose(values, [0.125, 1, 8], rtol=1e-5)

    def test_backup_and_restore(self, digits, tmp_path):
        class Stop(keras.callbacks.Callback):
            def on_epoch_begin(self, epoch, logs=None):
                if epoch == 1:
                    raise RuntimeError("stop")

        def callbacks():
            backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
            return [make(spread, digits), backup]

        with pytest.raises(RuntimeError, match="stop"):
            fit([*callbacks(), Stop()], digits, epochs=3)
        model = make_model()
        history = fit(callbacks(), digits, model, epochs=3).history
        np.testing.assert_allclose(
            history["learning_rate/first"], [5e-4, 2.5e-4], rtol=1e-5
        )

    def test_configuration(self, digits):
        for layers in ("all", ["first", "o.*"], {"body": ["first", "second"]}):
            callback = make(
                policies.RelativeChange(expected=0.2),
                digits,
                layers,
                readout=readouts.UnitHistogram(bins=4),
            )
            config = json.loads(json.dumps(callback.get_config()))
            again = MutualInformationLR.from_config(config, probe_data=digits)
            assert again.layers == layers
            assert again.readout.bins == 4
            assert again.get_config() == callback.get_config()
        fit(again, digits, epochs=1)
        assert list(again.history[0]["rate"]) == ["body"]


class TestReadouts:
    def test_unit_histograms(self, digits):
        x, y = digits
        readout = readouts.UnitHistogram(bins=8, reduce="max")
        model = make_model()
        callback = make(keep, digits, probe_size=10_000, readout=readout)
        fit(callback, digits, model, epochs=1)
        layer = keras.Model(model.inputs[0], model.get_layer("second").output)
        info = readout.measure(layer.predict(x, verbose=0), y, 10)
        assert callback.history[-1]["value"]["second"] == pytest.approx(
            info.value, abs=1e-4
        )
        assert callback.history[-1]["information"]["second"] == pytest.approx(
            info.value, abs=1e-4
        )

    def test_a_readout_of_the_output_leaves_the_layers_theirs(self, digits):
        first = make(keep, digits, readout=readouts.Predictions())
        second = make(keep, digits)
        for callback in (first, second):
            keras.utils.set_random_seed(0)
            fit(callback, digits, epochs=1)
        assert first.history == second.history

    @pytest.mark.parametrize(
        ("layers", "readout", "error", "message"),
        [
            ("all", "linear", TypeError, "must be 'auto' or a readouts.Predictions"),
            ("all", readouts.LinearReadout, TypeError, "Received: readout=<class"),
            (None, readouts.LinearReadout(), TypeError, "layers=None"),
            (
                *("all", readouts.UnitHistogram(reduce=None), ValueError),
                "one number for each layer: set `reduce`",
            ),
        ],
    )
    def test_wrong_readouts(self, digits, layers, readout, error, message):
        with pytest.raises(error, match=message):
            make(keep, digits, layers, readout=readout)


class TestErrors:
    """All of them before the first batch."""

    def test_without_probe_data(self):
        message = "`layers` needs `probe_data`.*Received: layers='all', probe_data=None"
        with pytest.raises(ValueError, match=message):
            MutualInformationLR(layers="all")

    def test_without_the_wrapper(self, digits):
        message = r"LayerwiseOptimizer\(keras.optimizers.Adam\(\.\.\.\)\)"
        model = make_model(optimizer="adam")
        before = model.get_weights()
        with pytest.raises(ValueError, match=message):
            fit(make(keep, digits), digits, model)
        for a, b in zip(before, model.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)

    @pytest.mark.parametrize(
        ("layers", "error", "message"),
        [
            (3, TypeError, "`layers` must be 'all'.*Received: layers=3"),
            ({}, TypeError, r"`layers` must be 'all'.*Received: layers=\{\}"),
            ("third", ValueError, "no layer with 'third'.*first, second, out"),
            ("dropout.*", ValueError, "no layer with 'dropout.*first, second, out"),
        ],
    )
    def test_bad_layers(self, digits, layers, error, message):
        with pytest.raises(error, match=message):
            fit(make(keep, digits, layers), digits)

    def test_a_policy_of_another_shape(self, digits):
        with pytest.raises(ValueError, match=r"shape of `reading.rate`, \(3,\)"):
            fit(make(lambda r: [1e-3, 1e-3], digits), digits)
        with pytest.raises(ValueError, match="finite rates"):
            fit(make(lambda r: r.rate * [1, -1, 1], digits), digits)

    def test_one_rate_for_all_layers(self, digits):
        model = make_model()
        fit(make(lambda r: 5e-4, digits), digits, model, epochs=1)
        values = list(model.optimizer.multipliers.values())
        np.testing.assert_allclose(values, [0.5, 0.5, 0.5], rtol=1e-6)


class Break(keras.callbacks.Callback):
    """Breaks the first layer in the second epoch."""

    def on_epoch_begin(self, epoch, logs=None):
        kernel = self.model.layers[0].kernel
        if epoch == 1:
            kernel.assign(np.full(kernel.shape, np.nan, "float32"))


def test_a_base_that_nobody_can_set_stays_after_a_roll_back(digits):
    model = make_model(lambda: 1e-3)
    with pytest.warns(UserWarning, match="epoch 2, .* not finite"):
        fit([Break(), make(keep, digits)], digits, model, epochs=3)
    assert float(model.optimizer.learning_rate) == pytest.approx(1e-3)
    assert all(0 < value < 1 for value in model.optimizer.multipliers.values())


def test_a_base_that_is_lowered_stays_after_a_roll_back(digits):
    """By another callback; layers that are not named would train at the old one."""

    class Lower(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                self.model.optimizer.learning_rate = 1e-4

        def on_epoch_end(self, epoch, logs=None):
            bases.append(float(self.model.optimizer.learning_rate))

    bases, model = [], make_model()
    callbacks = [Break(), make(keep, digits, layers="out"), Lower()]
    with pytest.warns(UserWarning, match="epoch 2, .* not finite"):
        fit(callbacks, digits, model, epochs=3)
    np.testing.assert_allclose(bases, [1e-3, 1e-4, 1e-4], rtol=1e-6)
    multipliers = model.optimizer.multipliers
    assert multipliers["first"] == 1 > multipliers["out"] > 0


@pytest.mark.parametrize("start", [0.0, 1e-6])
def test_a_roll_back_within_a_warm_up(start, digits):
    """The schedule goes back with the weights: its base is next to nothing again."""
    warm_up = keras.optimizers.schedules.CosineDecay(
        start, 90, warmup_target=1e-2, warmup_steps=30
    )

    class Break(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 0:
                kernel = self.model.layers[-1].kernel
                kernel.assign(np.full(kernel.shape, np.nan))

    model = make_model(warm_up)
    with pytest.warns(UserWarning, match="back at the start"):
        fit([Break(), make(keep, digits)], digits, model)
    # A restart is at .1, and not above what has failed.
    values = list(model.optimizer.multipliers.values())
    np.testing.assert_allclose(values, 0.1, rtol=1e-3)


def test_a_schedule_of_the_base_does_not_end_in_the_multipliers(digits):
    def lower(epoch):
        return 1e-3 * 0.1**epoch

    model = make_model()
    scheduler = keras.callbacks.LearningRateScheduler(lower)
    callback = make("decay", digits)
    fit([scheduler, callback], digits, model, epochs=5)
    assert float(model.optimizer.learning_rate) == pytest.approx(1e-7, rel=1e-3)
    highest = {
        name: max(
            record["rate"][name] / lower(max(record["epoch"], 0))
            for record in callback.history
        )
        for name in LAYERS
    }
    found = model.optimizer.multipliers
    assert max(found.values()) <= 10.0
    for name in LAYERS:
        assert found[name] >= 0.99 * min(highest[name], 1.0)


@pytest.mark.parametrize("mode", ["int8", "float8"])
def test_quantized_layers_are_read(digits, mode):
    model = make_model()
    if mode == "int8":  # Of which Keras trains what LoRA adds.
        model.layers[0].enable_lora(2)
    model.layers[0].quantize(mode)
    optimizer = LayerwiseOptimizer(keras.optimizers.Adam(1e-2))
    model.compile(optimizer, "sparse_categorical_crossentropy")
    callback = make(keep, digits)
    fit(callback, digits, model, epochs=3)
    assert list(callback.history[-1]["value"]) == LAYERS
    assert callback.history[-1]["value"]["first"] > 1.0
    assert "quantized_call" not in vars(model.layers[0])
