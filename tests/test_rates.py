"""The rates that a policy reads and sets: of the network, and of groups of layers."""

import json

import keras
import numpy as np
import pytest

from keras_milr import LayerwiseOptimizer, policies
from keras_milr.controller import Controller
from keras_milr.rates import LayerRates, NetworkRate
from keras_milr.readouts import Information
from keras_milr.rollback import Way

K = keras.layers


def make_model(optimizer, names=("a", "b", "c")):
    model = keras.Sequential(
        [keras.Input((4,)), *(K.Dense(4, name=name) for name in names)], name="m"
    )
    model.compile(optimizer, "mse")
    return model


def layerwise(rate=0.01, multipliers=None, inner=keras.optimizers.SGD):
    return LayerwiseOptimizer(inner(rate), multipliers=multipliers)


def fit(model, callbacks=(), epochs=1, **arguments):
    x = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
    return model.fit(
        *(x, x[:, ::-1]),
        **{"epochs": epochs, "callbacks": list(callbacks), "verbose": 0} | arguments,
    )


class TestNetworkRate:
    def test_get_and_set(self):
        model = make_model(keras.optimizers.SGD(0.25))
        rates = NetworkRate(model)
        assert rates.names is None
        np.testing.assert_array_equal(rates.get(), [0.25])
        rates.set(np.array([0.125]))
        assert float(model.optimizer.learning_rate) == 0.125
        model.optimizer.learning_rate = 0.5
        np.testing.assert_array_equal(rates.get(), [0.5])

    def test_the_base_of_a_layerwise_optimizer(self):
        model = make_model(layerwise(0.25, {"a": 0.5}))
        model.optimizer.build(model.trainable_variables)
        NetworkRate(model).set(np.array([0.125]))
        assert float(model.optimizer.learning_rate) == 0.125
        assert model.optimizer.multipliers == {"a": 0.5, "b": 1, "c": 1}

    def test_a_schedule_cannot_be_set(self):
        schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.5)
        model = make_model(keras.optimizers.SGD(schedule))
        with pytest.raises(ValueError, match="LearningRateSchedule"):
            NetworkRate(model)


class TestLayerRates:
    @pytest.mark.parametrize("layers", ["all", ["a", "b", "c"], "a|b|c"])
    def test_get_and_set(self, layers):
        model = make_model(layerwise(0.01, {"a": 0.5, "b": 2}))
        rates = LayerRates(model, layers)
        assert rates.names == ["a", "b", "c"]
        np.testing.assert_allclose(rates.get(), [0.005, 0.02, 0.01], rtol=1e-6)
        rates.set(np.array([0.03, 0.02, 0.0]))
        multipliers = model.optimizer.multipliers
        np.testing.assert_allclose(list(multipliers.values()), [3, 2, 0], rtol=1e-6)
        np.testing.assert_allclose(rates.get(), [0.03, 0.02, 0.0], rtol=1e-6)
        assert float(model.optimizer.learning_rate) == np.float32(0.01)

    def test_setting_what_was_read_changes_no_bit(self):
        rng = np.random.default_rng(0)
        multipliers = dict(zip("abc", rng.uniform(0.1, 3, 3).tolist(), strict=True))
        model = make_model(layerwise(0.0123, multipliers))
        for layers in ("all", {"x": ["a", "b"], "y": "c"}):
            rates = LayerRates(model, layers)
            before = model.optimizer.multipliers
            rates.set(rates.get())
            assert model.optimizer.multipliers == before

    def test_layers_that_are_not_chosen_keep_theirs(self):
        model = make_model(layerwise(0.01, {"a": 0.5, "b": 2}))
        rates = LayerRates(model, "c")
        rates.set(np.array([0.1]))
        multipliers = model.optimizer.multipliers
        assert (multipliers["a"], multipliers["b"]) == (0.5, 2)
        assert multipliers["c"] == pytest.approx(10)

    def test_a_layer_below_one_of_the_same_name_keeps_its_own(self):
        """As a pattern, the name `x` means the block `x` too."""
        block = keras.Sequential([keras.Input((4,)), K.Dense(4, name="y")], name="x")
        outer = keras.Sequential([keras.Input((4,)), block], name="outer")
        model = keras.Sequential([keras.Input((4,)), K.Dense(4, name="x"), outer])
        model.compile(layerwise(0.01, {"y": 0}), "mse")
        rates = LayerRates(model, "all")
        assert len(rates.names) == 1
        rates.set(np.array([0.03]))
        values = list(model.optimizer.multipliers.values())
        np.testing.assert_allclose(values, [3, 0], rtol=1e-6)

    @pytest.mark.backends("tensorflow", "jax", reason="PyTorch forbids such names")
    def test_names_that_are_no_regular_expressions(self):
        model = make_model(layerwise(0.01), names=("a(1", "*", "c.d", "cxd"))
        rates = LayerRates(model, "all")
        rates.set(np.array([0.01, 0.02, 0.03, 0.04]))
        values = model.optimizer.multipliers
        np.testing.assert_allclose(list(values.values()), [1, 2, 3, 4], rtol=1e-6)

    def test_a_group_keeps_the_ratios_of_its_multipliers(self):
        model = make_model(layerwise(0.01, {"a": 0.5, "b": 2}))
        rates = LayerRates(model, {"low": ["a", "b"], "top": "c"})
        assert rates.names == ["low", "top"]
        np.testing.assert_allclose(rates.get(), [0.02, 0.01], rtol=1e-6)  # The highest.
        rates.set(np.array([0.08, 0.03]))
        values = list(model.optimizer.multipliers.values())
        np.testing.assert_allclose(values, [2, 8, 3], rtol=1e-6)
        rates.set(np.array([0.0, 0.03]))
        rates.set(np.array([0.04, 0.03]))  # Back from 0, too.
        values = list(model.optimizer.multipliers.values())
        np.testing.assert_allclose(values, [1, 4, 3], rtol=1e-6)

    def test_all_leaves_out_what_is_frozen(self):
        model = make_model(layerwise(0.01, {"b": 0}))
        rates = LayerRates(model, "all")
        assert rates.names == ["a", "c"]
        assert [g.name for g in rates.groups] == ["a", "c"]
        rates.set(np.array([0.02, 0.03]))
        values = list(model.optimizer.multipliers.values())
        np.testing.assert_allclose(values, [2, 0, 3], rtol=1e-6)

    def test_a_frozen_layer_of_a_group_stays_so(self):
        model = make_model(layerwise(0.01, {"b": 0}))
        LayerRates(model, {"x": ["a", "b"]}).set(np.array([0.05]))
        values = list(model.optimizer.multipliers.values())
        np.testing.assert_allclose(values, [5, 0, 1], rtol=1e-6)

    @pytest.mark.parametrize("layers", ["b", ["a", "b"], {"g": "b"}])
    def test_what_is_frozen_is_refused_by_name(self, layers):
        model = make_model(layerwise(0.01, {"b": 0}))
        name = "g" if isinstance(layers, dict) else "b"
        with pytest.raises(ValueError, match=f"'{name}', which has a multiplier of 0"):
            LayerRates(model, layers)

    def test_nothing_to_train(self):
        model = make_model(layerwise(0.01, {".*": 0}))
        message = "found nothing to train. Received: layers='all' for model 'm'"
        with pytest.raises(ValueError, match=message):
            LayerRates(model, "all")

    def test_a_layer_unfrozen_since_the_optimizer_was_built(self):
        model = make_model(layerwise())
        model.layers[0].trainable = False
        model.optimizer.build(model.trainable_variables)
        model.layers[0].trainable = True
        with pytest.raises(ValueError, match=r"compile again.*Received: 'a'"):
            LayerRates(model, "all")
        assert LayerRates(model, ["b", "c"]).names == ["b", "c"]

    @pytest.mark.parametrize("inner", ["SGD", "AdamW"])
    def test_without_the_wrapper_the_message_shows_the_line_to_change(self, inner):
        model = make_model(inner.lower())
        message = (
            r"`layers` needs an optimizer with a rate for each layer.*"
            r"model.compile\(keras_milr.LayerwiseOptimizer\("
            rf"keras.optimizers.{inner}\(\.\.\.\)\).*Received: {inner}"
        )
        with pytest.raises(ValueError, match=message):
            LayerRates(model, "all")

    def test_under_a_loss_scale_optimizer(self):
        inner = layerwise(0.01, {"a": 0.5})
        model = make_model(keras.optimizers.LossScaleOptimizer(inner))
        rates = LayerRates(model, "all")
        np.testing.assert_allclose(rates.get(), [0.005, 0.01, 0.01], rtol=1e-6)
        rates.set(np.array([0.02, 0.03, 0.04]))
        np.testing.assert_allclose(list(inner.multipliers.values()), [2, 3, 4], 1e-6)
        fit(model)
        assert rates.get()[0] == pytest.approx(0.02)
        plain = make_model(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD()))
        with pytest.raises(ValueError, match="Received: SGD"):
            LayerRates(plain, "all")

    def test_a_base_that_others_set(self):
        model = make_model(layerwise(0.01, {"a": 0.5}))
        rates = LayerRates(model, "all")
        seen = []
        scheduler = keras.callbacks.LearningRateScheduler(lambda epoch: 0.1 / 2**epoch)
        look = keras.callbacks.LambdaCallback(
            on_epoch_begin=lambda epoch, logs: seen.append(rates.get())
        )
        fit(model, [scheduler, look], epochs=3)
        expected = np.outer([0.1, 0.05, 0.025], [0.5, 1, 1])
        np.testing.assert_allclose(seen, expected, rtol=1e-6)
        rates.set(np.array([0.1, 0.2, 0.3]))
        assert float(model.optimizer.learning_rate) == pytest.approx(0.025)
        np.testing.assert_allclose(rates.get(), [0.1, 0.2, 0.3], rtol=1e-6)

    def test_a_schedule_inside(self):
        schedule = keras.optimizers.schedules.ExponentialDecay(
            0.1, 2, 0.5, staircase=True
        )
        model = make_model(layerwise(schedule, {"a": 0.5}))
        rates = LayerRates(model, "all")
        np.testing.assert_allclose(rates.get(), [0.05, 0.1, 0.1], rtol=1e-6)
        fit(model)  # Two batches.
        np.testing.assert_allclose(rates.get(), [0.025, 0.05, 0.05], rtol=1e-6)
        rates.set(np.array([0.05, 0.1, 0.2]))
        fit(model)
        np.testing.assert_allclose(rates.get(), [0.025, 0.05, 0.1], rtol=1e-6)

    def test_a_base_of_0(self):
        model = make_model(layerwise(0.01, {"a": 0.5}))
        rates = LayerRates(model, "all")
        model.optimizer.learning_rate = 0.0
        np.testing.assert_array_equal(rates.get(), [0, 0, 0])
        rates.set(np.array([1.0, 1.0, 1.0]))
        assert model.optimizer.multipliers == {"a": 0.5, "b": 1, "c": 1}


def controller(rates, policy, min_lr=0.0, max_lr=None, state=None):
    return Controller(
        *(rates, policy, None, min_lr, max_lr, 10, lambda info: info.noise, False),
        state=state,
    )


def act(control, times=1):
    info = Information(1.0, 1.0, 2.0, 0.0, 0.01)
    for _ in range(times):
        reading = control.read([info] * len(control.rates.get()))
        control.act(reading)


class TestCeiling:
    def test_of_a_network_a_thousand_times_the_start(self):
        model = make_model(keras.optimizers.SGD(1e-4))
        control = controller(NetworkRate(model), lambda r: r.rate * 20)
        act(control, 3)
        assert float(model.optimizer.learning_rate) == pytest.approx(0.1)

    def test_of_layers_ten_times_the_highest_at_the_start(self):
        model = make_model(layerwise(0.01, {"a": 2}))
        control = controller(LayerRates(model, "all"), lambda r: r.rate * 8)
        act(control, 3)
        values = list(model.optimizer.multipliers.values())
        np.testing.assert_allclose(values, [20, 20, 20], rtol=1e-6)

    @pytest.mark.parametrize("start", [0.0, 1e-5])
    def test_a_warm_up_of_the_base_composes(self, start):
        """A policy that keeps the rates keeps the multipliers while others warm up."""
        model = make_model(layerwise(start, {"a": 0.5}))
        control = controller(LayerRates(model, "all"), lambda r: r.rate)
        for base in (start, 1e-3, 0.1, 1.0):
            model.optimizer.learning_rate = base
            act(control)
            assert model.optimizer.multipliers == {"a": 0.5, "b": 1, "c": 1}

    def test_a_base_that_decays_lets_no_multiplier_explode(self):
        model = make_model(layerwise(0.01))
        control = controller(LayerRates(model, "all"), lambda r: r.rate, min_lr=1e-4)
        for base in (1e-3, 1e-6, 1e-9):
            model.optimizer.learning_rate = base
            act(control)
            assert max(model.optimizer.multipliers.values()) < 10.001

    def test_a_given_bound_stands(self):
        model = make_model(layerwise(0.01))
        control = controller(
            LayerRates(model, "all"), lambda r: r.rate * [0.1, 1, 1000], 0.005, 0.5
        )
        act(control)
        np.testing.assert_allclose(control.rates.get(), [0.005, 0.01, 0.5], rtol=1e-6)


@pytest.mark.parametrize("undoes", [True, False])
def test_a_policy_that_tries_rates_says_so(undoes):
    model = make_model(keras.optimizers.SGD(0.07))
    factor = 2.0

    def policy(reading):
        return reading.rate * factor

    policy.undoes_raises = undoes
    control = controller(NetworkRate(model), policy)
    infos = [Information(0.1, 0.1, 1.0, 0.0, 0.01)]
    control.read(infos)
    assert not control.tries()  # The start is nobody's raise.
    control.act(control.read(infos))
    assert control.tries() is undoes
    resumed = controller(NetworkRate(model), policy, state=control.state())
    assert resumed.tries() is undoes
    factor = 1.0
    control.act(control.read(infos))
    assert not control.tries()
    reading = resumed.read(infos)
    assert control.state()["before"] is None
    resumed.roll_back(infos, reading.rate, Way.UNDO)
    np.testing.assert_allclose(resumed.rates.get(), 0.035)  # Half of the start's.
    assert not resumed.tries()
    # Rounded to float32, the rate is still the highest so far.
    assert resumed.read(infos).rate == resumed.read(infos).peak_rate


def test_readings_further_apart_are_fewer():
    """Of ten that were planned, one in three is taken."""
    seen = []
    control = controller(
        NetworkRate(make_model("sgd")), lambda r: seen.append(r) or r.rate
    )
    infos = [Information(1.0, 1.0, 2.0, 0.0, 0.01)]
    for apart in (1, 3, 3):
        control.act(control.read(infos, apart=apart))
    resumed = controller(control.rates, lambda r: r.rate, state=control.state())
    last = resumed.read(infos, apart=3)
    # At 0, 3, 6 and 9 of 10: one is left while there is any time.
    assert [(r.step, r.steps) for r in (*seen, last)] == [
        *((0, 10), (1, 3), (2, 3), (3, 4)),
    ]


def test_no_multiplier_makes_up_for_a_base_below_the_bound():
    """Another callback brings it down to next to nothing."""
    model = make_model(layerwise(0.01))
    control = controller(LayerRates(model, "all"), lambda r: r.rate / 2, min_lr=1e-6)
    act(control)
    model.optimizer.learning_rate = 1e-8
    act(control, 2)
    np.testing.assert_allclose(list(model.optimizer.multipliers.values()), 0.5)


def test_what_anneals_ends_at_the_highest_multipliers():
    """And not at multipliers that would give the highest rates at the base of then."""
    model = make_model(layerwise(0.01, {"c": 0.5}))
    control = controller(LayerRates(model, "all"), policies.ThresholdDecay())
    infos = [Information(1.0, 1.0, 2.0, 0.0, 0.01)] * 3
    for base, own in ((0.01, [1.0, 1.0, 2.0]), (1e-8, [0.1, 3.0, 0.1])):
        model.optimizer.learning_rate = base
        control.rates.set_own(np.array(own))
        control.read(infos)
    control.rates.set_own(np.array([0.1, 0.1, 0.1]))
    control.end()
    values = list(model.optimizer.multipliers.values())
    np.testing.assert_allclose(values, [1.0, 3.0, 2.0], rtol=1e-6)


class TestWaysBack:
    INFOS = (Information(0.5, 0.5, 2.0, 0.0, 0.01),)

    def control(self, factor=2.0):
        control = controller(NetworkRate(make_model("sgd")), lambda r: r.rate * factor)
        act(control)
        reading = control.read(self.INFOS)
        return control, reading, control.is_at_start(reading)

    def test_a_second_start_and_back_to_the_first(self):
        control, reading, at_start = self.control()
        assert at_start
        control.roll_back(self.INFOS, reading.rate, Way.SECOND)
        np.testing.assert_allclose(control.rates.get(), 0.003, rtol=1e-6)
        state = json.loads(json.dumps(control.state(), default=np.ndarray.tolist))
        resumed = controller(control.rates, control._policy, state=state)
        for one in (control, resumed):
            control.rates.set(np.array([0.003]))
            reading = one.read(self.INFOS)
            assert (reading.rollbacks, reading.restarts) == (1, 0)
            one.roll_back(self.INFOS, reading.rate, Way.FIRST)
            np.testing.assert_allclose(control.rates.get(), 0.005, rtol=1e-6)
            assert one.state()["other"] is None

    def test_what_was_raised_is_not_at_the_start(self):
        control, reading, _ = self.control()
        control._searched = True  # Nor what a range test found.
        assert not control.is_at_start(reading)
        control._searched = False
        control.act(reading)
        assert not control.is_at_start(control.read(self.INFOS))
        control._policy = lambda reading: reading.rate  # The raise has served.
        control.act(control.read(self.INFOS))
        assert not control.is_at_start(control.read(self.INFOS))

    @pytest.mark.parametrize(
        ("factor", "searched", "rates"),
        [
            (1.0, False, [0.0001, 0.0002, 0.0004, 0.0008, 0.001, 0.001]),
            (1.0, True, [0.0003, 0.0006, 0.001, 0.001]),  # A range test served.
            (2.0, False, [0.0006, 0.0012, 0.002, 0.002]),  # A lower rate did.
        ],
    )
    def test_a_restart_stays_below_a_tenth_of_what_failed(
        self, factor, searched, rates
    ):
        control, reading, _ = self.control(factor)
        control._searched = searched
        control._policy.undoes_raises = True  # It raises rates to see what comes.
        control.roll_back(self.INFOS, reading.rate, Way.RESTART)
        np.testing.assert_allclose(control.rates.get(), rates[0], rtol=1e-6)
        resumed = controller(control.rates, lambda r: 2 * r.rate, state=control.state())
        for expected in rates[1:]:
            reading = resumed.read(self.INFOS)
            assert (reading.rollbacks, reading.restarts) == (1, 1)
            np.testing.assert_allclose(reading.start_rate, rates[0], rtol=1e-6)
            resumed.act(reading)
            np.testing.assert_allclose(resumed.rates.get(), expected, rtol=1e-6)

    def test_a_restart_of_a_policy_that_raises_nothing(self):
        rates = NetworkRate(make_model("sgd"))
        control = controller(rates, lambda reading: 5 * reading.rate)
        control.roll_back(self.INFOS, control.read(self.INFOS).rate, Way.RESTART)
        for _ in range(2):
            np.testing.assert_allclose(rates.get(), 0.001, rtol=1e-6)
            act(control, 1)

    def test_a_restart_respects_the_lower_bound(self):
        rates = NetworkRate(make_model("sgd"))
        control = controller(rates, lambda r: r.rate, min_lr=0.005)
        control.roll_back(self.INFOS, control.read(self.INFOS).rate, Way.RESTART)
        np.testing.assert_allclose(rates.get(), 0.005, rtol=1e-6)


def test_only_a_layer_that_was_raised_from_its_start_comes_back_at_a_half():
    """`a` was raised once, `b` twice, `c` never."""
    rates = LayerRates(make_model(layerwise(0.01)), "all")
    factors = iter(([1.0, 2.0, 1.0], [2.0, 2.0, 1.0]))
    control = controller(rates, lambda reading: reading.rate * next(factors))
    act(control, 2)
    np.testing.assert_allclose(rates.get(), [0.02, 0.04, 0.01], rtol=1e-6)
    infos = [Information(1.0, 1.0, 2.0, 0.0, 0.01)] * 3
    control.roll_back(infos, control.read(infos).rate, Way.UNDO)
    np.testing.assert_allclose(rates.get(), [0.005, 0.02, 0.01], rtol=1e-6)
