import json
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_milr
from keras_milr import LayerwiseOptimizer
from tests.backends import NAME, TORCH_COMPILE, update

NAMES = ["SGD", "RMSprop", "Adam", "AdamW", "Adadelta", "Adagrad", "Adamax"]
NAMES += ["Adafactor", "Nadam", "Ftrl", "Lion", "Lamb", "Muon", "ScheduleFreeAdamW"]


def not_here(name):
    """Why an optimizer cannot be tried with this Keras; None where it can."""
    if not hasattr(keras.optimizers, name):
        return f"Keras {keras.__version__} has no {name}"
    if name == "Muon" and NAME == "tensorflow":
        variable = keras.Variable(np.ones((2, 2), "float32"))
        try:
            keras.optimizers.Muon().apply([variable.value], [variable])
        except AttributeError as error:
            # Some read `path`, which a variable of TensorFlow has not, without us too.
            return f"Muon of Keras {keras.__version__} fails on TensorFlow: {error}"
    return None


OPTIMIZERS = [
    pytest.param(name, marks=pytest.mark.skipif(bool(why), reason=why or "it can"))
    for name, why in zip(NAMES, map(not_here, NAMES), strict=True)
]
OPTIONS = {
    "plain": {},
    "weight decay": {"weight_decay": 0.1},
    "EMA": {"use_ema": True, "ema_overwrite_frequency": 3},
    "accumulation": {"gradient_accumulation_steps": 2},
    "global_clipnorm": {"global_clipnorm": 0.5},
}
MULTIPLIERS = {"a": 0.1, "b": 0.5, "c": 2.0}
# The only ones whose arithmetic is ordered otherwise for scalars in other places.
ROUNDED = ("RMSprop", "Adagrad")


def one_by_one(name):
    """An optimizer's class, but that PyTorch updates one variable after the other.

    Keras' own classes there update all variables at once, which rounds otherwise.
    """
    return type(name, (getattr(keras.optimizers, name),), {})


def make_optimizer(name, rate=0.01, alone=False, **options):
    if name == "SGD":
        options["momentum"] = 0.9
    cls = one_by_one(name) if alone else getattr(keras.optimizers, name)
    return cls(learning_rate=rate, **options)


def make_model(optimizer=None, **compile_arguments):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(5, activation="relu", name="a"),
            keras.layers.Dense(4, activation="relu", name="b"),
            keras.layers.Dense(3, activation="softmax", name="c"),
        ]
    )
    if optimizer is not None:
        loss = "sparse_categorical_crossentropy"
        model.compile(optimizer, loss, **compile_arguments)
    return model


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    return rng.normal(size=(96, 6)).astype("float32"), rng.integers(0, 3, 96)


def fit(model, data, epochs=1, **arguments):
    arguments = {"batch_size": 32, "shuffle": False, "verbose": 0} | arguments
    return model.fit(*data, epochs=epochs, **arguments)


def gradients(variables, steps=10, seed=1):
    rng = np.random.default_rng(seed)
    return [
        [rng.normal(size=v.shape).astype("float32") for v in variables]
        for _ in range(steps)
    ]


def step(optimizer, grads, variables):
    update(optimizer, list(map(keras.ops.convert_to_tensor, grads)), variables)


def clipped(grads, norm):
    total = np.sqrt(sum(np.sum(g.astype("float64") ** 2) for g in grads))
    return [(g * (norm / max(total, norm))).astype("float32") for g in grads]


def distance(first, second):
    return max(float(np.abs(a - b).max()) for a, b in zip(first, second, strict=True))


class TestExact:
    @pytest.mark.supports("Backends", "layer-wise rates exact")
    @pytest.mark.parametrize("options", OPTIONS)
    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_equals_independent_optimizers_at_the_scaled_rates(self, name, options):
        arguments = OPTIONS[options]
        model, other = make_model(), make_model()
        ours = LayerwiseOptimizer(make_optimizer(name, **arguments), MULTIPLIERS)
        norm = arguments.get("global_clipnorm")
        others = {k: v for k, v in arguments.items() if k != "global_clipnorm"}
        others["alone"] = True
        rates = {
            k: float(np.float32(0.01) * np.float32(m)) for k, m in MULTIPLIERS.items()
        }
        separate = [
            (make_optimizer(name, rates[layer.name], **others), slice(2 * i, 2 * i + 2))
            for i, layer in enumerate(other.layers)
        ]
        start = model.get_weights()
        for grads in gradients(model.trainable_variables):
            step(ours, grads, model.trainable_variables)
            # Clipped by the norm of all gradients, which separate ones cannot see.
            grads = grads if norm is None else clipped(grads, norm)
            for optimizer, part in separate:
                step(optimizer, grads[part], other.trainable_variables[part])
        tolerance = 0 if norm is None and name not in ROUNDED else 2e-6
        assert distance(model.get_weights(), other.get_weights()) <= tolerance
        assert distance(model.get_weights(), start) > 1e-4

    @pytest.mark.parametrize(
        "jit_compile",
        [
            False,
            pytest.param(
                True,
                marks=pytest.mark.backends("tensorflow", "jax", reason=TORCH_COMPILE),
            ),
        ],
    )
    @pytest.mark.parametrize("name", ["SGD", "AdamW", "Nadam"])
    def test_equals_multi_optimizer_in_fit(self, name, jit_compile, data):
        if not_here("MultiOptimizer"):
            pytest.skip(not_here("MultiOptimizer"))
        model = make_model(
            LayerwiseOptimizer(make_optimizer(name), MULTIPLIERS),
            jit_compile=jit_compile,
        )
        parts = {k: make_optimizer(name, 0.01 * m) for k, m in MULTIPLIERS.items()}
        multi = keras.optimizers.MultiOptimizer(lambda v: parts[v.path.split("/")[-2]])
        other = make_model(multi, jit_compile=jit_compile)
        for each in (model, other):
            fit(each, data, epochs=3)
        assert distance(model.get_weights(), other.get_weights()) < 2e-6

    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_without_multipliers_it_is_the_inner_optimizer(self, name, data):
        """As it is given: on PyTorch, the one that updates all variables at once."""
        weights = []
        for wrap in (lambda o: o, LayerwiseOptimizer):
            model = make_model(wrap(make_optimizer(name, weight_decay=0.01)))
            fit(model, data)
            weights.append(model.get_weights())
        rounded = 1e-7 if NAME == "tensorflow" else 1e-6
        exact = NAME == "tensorflow" and name not in ROUNDED
        assert distance(*weights) <= (0 if exact else rounded)

    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_a_multiplier_of_0_freezes(self, name):
        """Also in the middle of a training, when velocities are on their way."""
        model = make_model()
        inner = make_optimizer(name, weight_decay=0.1)
        optimizer = LayerwiseOptimizer(inner, {"a": 0})
        first = model.layers[0].get_weights()
        grads = gradients(model.trainable_variables)
        for each in grads[:5]:
            step(optimizer, each, model.trainable_variables)
        assert distance(model.layers[0].get_weights(), first) == 0
        optimizer.set_multipliers({"b": 0})
        second = model.layers[1].get_weights()
        third = model.layers[2].get_weights()
        for each in grads[5:]:
            step(optimizer, each, model.trainable_variables)
        assert distance(model.layers[0].get_weights(), first) == 0
        assert distance(model.layers[1].get_weights(), second) == 0
        assert distance(model.layers[2].get_weights(), third) > 1e-4
        # Nor is there anything left that breaks them once they train.
        optimizer.set_multipliers({"a": 1})
        step(optimizer, grads[0], model.trainable_variables)
        assert all(np.all(np.isfinite(w)) for w in model.get_weights())
        if name != "Adadelta":  # It goes by its past steps, of which there are none.
            assert distance(model.layers[0].get_weights(), first) > 1e-6

    def test_every_optimizer_of_keras_is_tested(self):
        known = {*NAMES, "Optimizer", "LossScaleOptimizer", "MultiOptimizer"}
        known |= {"OptimizerMap"}  # A dict.
        there = {name for name in dir(keras.optimizers) if name[0].isupper()}
        assert there - known == set()

    def test_an_optimizer_of_somebody_else(self):
        """It reads its own rate, and decays although that is 0."""

        class Own(keras.optimizers.Optimizer):
            def update_step(self, gradient, variable, learning_rate):
                step = keras.ops.multiply(gradient, self.learning_rate)
                self.assign_sub(variable, step + 0.01 * variable)

            def get_config(self):
                return super().get_config()

        model = make_model()
        start = [w.copy() for w in model.get_weights()]
        optimizer = LayerwiseOptimizer(Own(0.1), {"a": 0, "b": 0.5})
        (grads,) = gradients(model.trainable_variables, 1)
        step(optimizer, grads, model.trainable_variables)
        for i, rate in enumerate((0, 0, 0.05, 0.05, 0.1, 0.1)):
            expected = start[i] - (rate * grads[i] + 0.01 * start[i]) * (rate > 0)
            np.testing.assert_allclose(model.get_weights()[i], expected, atol=1e-7)

    def test_scaled_gradients_are_scaled_rates_for_plain_sgd_only(self):
        found = {}
        for name, make in (
            ("SGD", keras.optimizers.SGD),
            ("Adam", keras.optimizers.Adam),
        ):
            rates, scaled = make_model(), make_model()
            (grads,) = gradients(rates.trainable_variables, 1)
            step(LayerwiseOptimizer(make(0.01), {".*": 0.1}), grads, rates.variables)
            step(make(0.01), [0.1 * g for g in grads], scaled.variables)
            found[name] = distance(rates.get_weights(), scaled.get_weights())
        assert found["SGD"] < (1e-8 if NAME == "tensorflow" else 1e-7)
        assert found["Adam"] > 0.005

    @pytest.mark.backends("tensorflow", reason="only it has sparse gradients")
    @pytest.mark.parametrize("name", ["SGD", "Adagrad"])
    def test_sparse_gradients(self, name):
        weights = []
        for rate, wrap in (
            (0.1, lambda o: LayerwiseOptimizer(o, {".*": 0.5})),
            (0.05, None),
        ):
            keras.utils.set_random_seed(0)
            layer = keras.layers.Embedding(7, 3)
            layer.build()
            optimizer = getattr(keras.optimizers, name)(rate)
            optimizer = optimizer if wrap is None else wrap(optimizer)
            for _ in range(3):
                with tf.GradientTape() as tape:
                    loss = tf.reduce_sum(layer(tf.constant([1, 1, 4])) ** 2)
                grads = tape.gradient(loss, layer.trainable_variables)
                assert isinstance(grads[0], tf.IndexedSlices)
                optimizer.apply(grads, layer.trainable_variables)
            weights.append(layer.get_weights())
        assert distance(*weights) < 1e-7


class TestLayers:
    def test_names_and_values(self):
        optimizer = LayerwiseOptimizer("adam", {"a": 0.5, "[bc]": 2})
        optimizer.build(make_model().trainable_variables)
        assert optimizer.multipliers == {"a": 0.5, "b": 2.0, "c": 2.0}
        optimizer.set_multipliers({"c": 0.25})
        assert optimizer.multipliers == {"a": 0.5, "b": 2.0, "c": 0.25}
        optimizer.set_multipliers(optimizer.multipliers)
        assert optimizer.multipliers == {"a": 0.5, "b": 2.0, "c": 0.25}

    def test_nested_shared_and_frozen(self):
        shared = keras.layers.Dense(4, name="shared")
        block = keras.Sequential(
            [keras.Input((4,)), keras.layers.Dense(4, name="dense")], name="block"
        )
        frozen = keras.layers.Dense(4, name="frozen", trainable=False)
        inputs = keras.Input((4,))
        x = frozen(shared(shared(inputs)))
        x = keras.layers.Dense(4, name="dense")(block(x))
        model = keras.Model(inputs, x, name="m")
        optimizer = LayerwiseOptimizer("sgd", {"block": 0.5, "shared": 2})
        optimizer.build(model.trainable_variables)
        (inner,) = [name for name in optimizer.multipliers if "block" in name]
        (outer,) = set(optimizer.multipliers) - {inner, "shared"}
        assert optimizer.multipliers == {"shared": 2.0, inner: 0.5, outer: 1.0}
        assert optimizer.layer_of(model.layers[-1].kernel) == outer
        with pytest.raises(ValueError, match="names no layer with 'frozen'"):
            optimizer.set_multipliers({"frozen": 0})

    def test_layer_decay(self):
        variables = make_model().trainable_variables
        optimizer = LayerwiseOptimizer("sgd", {"c": 10}, layer_decay=0.5)
        optimizer.build(variables)
        assert optimizer.multipliers == {"a": 0.25, "b": 0.5, "c": 10.0}
        optimizer = LayerwiseOptimizer("sgd", layer_decay=0.5, layer_order=["c", "a|b"])
        optimizer.build(variables)
        assert optimizer.multipliers == {"a": 1.0, "b": 1.0, "c": 0.5}

    def test_summary(self):
        optimizer = LayerwiseOptimizer(keras.optimizers.SGD(0.1), {"b": 0.5})
        model = make_model()
        optimizer.build(model.trainable_variables)
        lines = []
        optimizer.summary(print_fn=lines.append)
        rows = [line.split() for line in lines]
        assert rows[0] == ["layer", "parameters", "multiplier", "rate"]
        assert rows[1:] == [
            ["a", "35", "1", "0.1"],
            ["b", "24", "0.5", "0.05"],
            ["c", "15", "1", "0.1"],
        ]


class TestComposes:
    def expected(self, data, rates):
        """Plain SGD at a rate for each epoch and layer."""
        model = make_model(LayerwiseOptimizer(keras.optimizers.SGD(1.0)))
        model.optimizer.build(model.trainable_variables)
        for rate in rates:
            model.optimizer.set_multipliers(
                {name: rate * m for name, m in MULTIPLIERS.items()}
            )
            fit(model, data)
        return model.get_weights()

    def test_with_callbacks_that_set_the_rate(self, data):
        rates = [0.1, 0.05, 0.2]
        model = make_model(LayerwiseOptimizer(keras.optimizers.SGD(1.0), MULTIPLIERS))
        scheduler = keras.callbacks.LearningRateScheduler(lambda epoch: rates[epoch])
        history = fit(model, data, 3, callbacks=[scheduler]).history
        np.testing.assert_allclose(history["learning_rate"], rates, rtol=1e-6)
        assert distance(model.get_weights(), self.expected(data, rates)) < 1e-6

    def test_with_a_schedule_inside(self, data):
        schedule = keras.optimizers.schedules.PiecewiseConstantDecay(
            [2, 5], [0.1, 0.05, 0.2]
        )
        inner = keras.optimizers.SGD(schedule)
        model = make_model(LayerwiseOptimizer(inner, MULTIPLIERS))
        fit(model, data, 3)
        expected = self.expected(data, [0.1, 0.05, 0.2])
        assert distance(model.get_weights(), expected) < 1e-6
        with pytest.raises(TypeError, match="not settable"):
            model.optimizer.learning_rate = 0.1

    def test_with_plateau_and_new_multipliers_on_the_way(self, data):
        optimizer = LayerwiseOptimizer(keras.optimizers.SGD(0.1), {"a": 0.5})
        model = make_model(optimizer)
        plateau = keras.callbacks.ReduceLROnPlateau(
            monitor="loss", factor=0.5, patience=1, min_delta=10
        )
        change = keras.callbacks.LambdaCallback(
            on_epoch_begin=lambda epoch, logs: (
                optimizer.set_multipliers({"b": 0.1}) if epoch == 2 else None
            )
        )
        fit(model, data, 4, callbacks=[plateau, change])
        assert float(optimizer.learning_rate) == pytest.approx(0.1 / 8)
        assert optimizer.multipliers == pytest.approx({"a": 0.5, "b": 0.1, "c": 1.0})

    @pytest.mark.backends("tensorflow", "jax", reason="PyTorch does not trace")
    def test_new_multipliers_do_not_retrace(self, data):
        traces = []

        class Traced(keras.layers.Layer):
            def call(self, x):
                traces.append(1)
                return x

        model = keras.Sequential([keras.Input((6,)), Traced(), make_model()])
        model.compile(LayerwiseOptimizer("adam"), "sparse_categorical_crossentropy")
        fit(model, data)
        traces.clear()
        before = model.get_weights()
        model.optimizer.set_multipliers({".*": 0})
        fit(model, data)
        assert distance(model.get_weights(), before) == 0
        model.optimizer.set_multipliers({".*": 1})
        fit(model, data)
        assert distance(model.get_weights(), before) > 0
        assert not traces

    def test_mixed_float16(self, data):
        keras.config.set_dtype_policy("mixed_float16")
        try:
            model = make_model(
                LayerwiseOptimizer(keras.optimizers.SGD(0.1), MULTIPLIERS)
            )
        finally:
            keras.config.set_dtype_policy("float32")
        assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
        rates = [0.1, 0.05]
        scheduler = keras.callbacks.LearningRateScheduler(lambda epoch: rates[epoch])
        plateau = keras.callbacks.ReduceLROnPlateau(
            monitor="loss", factor=0.5, patience=1, min_delta=10
        )
        warm_up = model.get_weights()
        history = fit(model, data, 2, callbacks=[scheduler, plateau]).history
        np.testing.assert_allclose(history["learning_rate"], rates, rtol=1e-6)
        assert float(model.optimizer.learning_rate) == pytest.approx(0.025)
        assert distance(model.get_weights(), warm_up) > 1e-3
        assert distance(model.get_weights(), self.expected(data, rates)) < 0.01

    @pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
    def test_swap_ema_weights(self, policy, data):
        """Evaluates the averages, which training does not touch."""
        keras.config.set_dtype_policy(policy)
        try:
            inner = keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5)
            model = make_model(LayerwiseOptimizer(inner, MULTIPLIERS))
        finally:
            keras.config.set_dtype_policy("float32")
        seen = []
        look = keras.callbacks.LambdaCallback(
            on_test_batch_begin=lambda batch, logs: seen.append(
                swap.model.get_weights()
            ),
            on_train_batch_end=lambda batch, logs: trained.append(
                swap.model.get_weights()
            ),
        )
        trained = []
        swap = keras.callbacks.SwapEMAWeights()
        fit(model, data, 2, callbacks=[swap, look], validation_data=data)
        average = trained[0]
        for weights in trained[1:]:
            average = [0.5 * a + 0.5 * w for a, w in zip(average, weights, strict=True)]
        assert distance(seen[-1], average) < 1e-5
        assert distance(seen[-1], trained[-1]) > 1e-5

    def test_swap_ema_weights_without_averages(self, data):
        model = make_model(LayerwiseOptimizer("sgd"))
        with pytest.raises(ValueError, match="`use_ema=True` is set"):
            fit(
                model,
                data,
                callbacks=[keras.callbacks.SwapEMAWeights()],
                validation_data=data,
            )

    def test_weight_decay_can_be_excluded(self):
        model = make_model()
        optimizer = LayerwiseOptimizer(keras.optimizers.SGD(0.1, weight_decay=0.1))
        optimizer.exclude_from_weight_decay(var_names=["bias"])
        for variable in model.trainable_variables:
            variable.assign(np.ones(variable.shape))
        zero = [np.zeros(v.shape, "float32") for v in model.trainable_variables]
        step(optimizer, zero, model.trainable_variables)
        for variable in model.trainable_variables:
            decayed = 0.99 if variable.name == "kernel" else 1.0
            np.testing.assert_allclose(variable.numpy(), decayed, rtol=1e-6)

    def test_loss_scale_factor(self):
        optimizer = LayerwiseOptimizer(keras.optimizers.SGD(0.1, loss_scale_factor=8.0))
        assert float(optimizer.scale_loss(2.0)) == 16
        optimizer.loss_scale_factor = None
        assert optimizer.scale_loss(2.0) == 2.0


class TestSaving:
    def trained(self, data, epochs=2):
        inner = keras.optimizers.AdamW(0.01, weight_decay=0.1)
        model = make_model(LayerwiseOptimizer(inner, {"a": 0.5}, layer_decay=0.5))
        fit(model, data, epochs)
        model.optimizer.set_multipliers({"b": 0.125})
        return model

    def test_keras_file_goes_on_where_it_was(self, data, tmp_path):
        model = self.trained(data)
        model.save(tmp_path / "model.keras")
        again = keras.saving.load_model(tmp_path / "model.keras")
        assert again.optimizer.multipliers == model.optimizer.multipliers
        assert again.optimizer.multipliers["b"] == 0.125
        for each in (model, again):
            fit(each, data)
        assert distance(model.get_weights(), again.get_weights()) == 0
        variables = model.optimizer.variables, again.optimizer.variables
        assert distance(*([v.numpy() for v in vs] for vs in variables)) == 0

    def test_paths_that_change_on_reload(self, data, tmp_path):
        """A subclassed model builds its layers under other names when loaded."""

        @keras.saving.register_keras_serializable(package="tests")
        class Late(keras.Model):
            def __init__(self):
                super().__init__()
                self.enc = keras.layers.Dense(5, name="enc")
                self.out = keras.layers.Dense(3, activation="softmax", name="out")

            def call(self, x):
                return self.out(self.enc(x))

            def get_config(self):
                return {}

            def build(self, input_shape):
                self.enc.build(input_shape)
                self.out.build((None, 5))

        model = Late()
        optimizer = LayerwiseOptimizer("sgd", {"late.*": 0.5, "enc": 0.25})
        model.compile(optimizer, "sparse_categorical_crossentropy")
        fit(model, data)
        model.save(tmp_path / "model.keras")
        keras.utils.set_random_seed(1)
        again = keras.saving.load_model(tmp_path / "model.keras")
        assert again.optimizer.multipliers == {"enc": 0.25, "out": 0.5}
        paths = [v.path for v in again.trainable_variables]
        assert paths != [v.path for v in model.trainable_variables]
        assert again.optimizer.layer_of(again.enc.kernel) == "enc"

    def test_save_weights(self, data, tmp_path):
        model = self.trained(data)
        model.save_weights(tmp_path / "model.weights.h5")
        again = make_model(LayerwiseOptimizer(keras.optimizers.AdamW(0.01)))
        again.optimizer.build(again.trainable_variables)
        again.load_weights(tmp_path / "model.weights.h5")
        assert again.optimizer.multipliers == model.optimizer.multipliers

    def test_each_variable_is_saved_once(self, data, tmp_path):
        import h5py

        model = self.trained(data)
        model.save_weights(tmp_path / "model.weights.h5")
        sizes = []
        with h5py.File(tmp_path / "model.weights.h5") as file:
            file["optimizer"].visititems(
                lambda name, item: sizes.append(getattr(item, "size", 0))
            )
        variables = model.optimizer.variables
        assert sum(sizes) == sum(int(np.prod(v.shape)) for v in variables)

    def test_clone_and_compile_from_config(self, data):
        model = self.trained(data)
        clone = keras.models.clone_model(model)
        clone.compile_from_config(model.get_compile_config())
        assert clone.optimizer.multipliers == model.optimizer.multipliers
        assert clone.optimizer.inner_optimizer.weight_decay == 0.1
        fit(clone, data)

    def test_config(self, data):
        optimizer = LayerwiseOptimizer(
            keras.optimizers.Adam(0.02), {"a": 0.5}, 0.5, ["a", "b", "c"], name="mine"
        )
        config = json.loads(json.dumps(optimizer.get_config()))
        again = LayerwiseOptimizer.from_config(config)
        assert again.get_config() == optimizer.get_config()
        again.build(make_model().trainable_variables)
        assert again.multipliers == {"a": 0.125, "b": 0.5, "c": 1.0}
        assert float(again.learning_rate) == pytest.approx(0.02)
        assert again.name == "mine"

    def test_a_configuration_for_other_variables(self, data):
        config = self.trained(data).optimizer.get_config()
        optimizer = LayerwiseOptimizer.from_config(config)
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="a")])
        with pytest.warns(UserWarning, match="made for other variables"):
            optimizer.build(model.trainable_variables)
        assert optimizer.multipliers == {"a": 0.5}

    def test_set_weights(self, data):
        model = self.trained(data)
        values = [v.numpy() for v in model.optimizer.variables]
        fit(model, data)
        model.optimizer.set_weights(values)
        assert distance(values, [v.numpy() for v in model.optimizer.variables]) == 0


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            (
                {"multipliers": {"a": -1}},
                ValueError,
                r"`multipliers\['a'\]`.*at least 0",
            ),
            ({"multipliers": {"a": float("nan")}}, ValueError, "finite.*nan"),
            ({"multipliers": {"a": float("inf")}}, ValueError, "finite.*inf"),
            ({"multipliers": {"a": "1"}}, TypeError, r"`multipliers\['a'\]`.*str"),
            ({"multipliers": [1, 2]}, TypeError, "`multipliers` must be a dict"),
            ({"layer_decay": 0}, ValueError, "`layer_decay`.*above 0"),
            ({"layer_decay": 1.5}, ValueError, "`layer_decay`.*at most 1"),
            ({"layer_decay": "x"}, TypeError, "`layer_decay`"),
            ({"layer_order": ["a"]}, ValueError, "without `layer_decay`"),
            (
                {"layer_order": "a", "layer_decay": 0.5},
                TypeError,
                "`layer_order` must be a list",
            ),
            ({"inner_optimizer": 3}, ValueError, "Could not interpret optimizer"),
            ({"inner_optimizer": None}, ValueError, "`inner_optimizer` must be"),
            ({"inner_optimizer": {"a": 1}}, ValueError, "`inner_optimizer` must be"),
            ({"multipliers": {"a": 1e39}}, ValueError, "at most 3.4"),
        ],
        ids=str,
    )
    def test_arguments(self, arguments, error, message):
        with pytest.raises(error, match=message):
            LayerwiseOptimizer(**({"inner_optimizer": "sgd"} | arguments))

    def test_optimizers_that_cannot_be_inside(self):
        loss_scale = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())
        with pytest.raises(ValueError, match=r"LossScaleOptimizer\(LayerwiseOptimizer"):
            LayerwiseOptimizer(loss_scale)
        with pytest.raises(ValueError, match=r"one learning rate.*LayerwiseOptimizer"):
            LayerwiseOptimizer(LayerwiseOptimizer("sgd"))
        if hasattr(keras.optimizers, "MultiOptimizer"):
            multi = keras.optimizers.MultiOptimizer(lambda v: keras.optimizers.SGD())
            with pytest.raises(ValueError, match=r"one learning rate.*MultiOptimizer"):
                LayerwiseOptimizer(multi)
        used = keras.optimizers.SGD()
        used.build(make_model().trainable_variables)
        with pytest.raises(ValueError, match="has been used already"):
            LayerwiseOptimizer(used)
        twice = keras.optimizers.Adam()  # As in a cell of a notebook that runs again.
        first = LayerwiseOptimizer(twice, {"a": 0})
        with pytest.raises(ValueError, match=r"new.*Adam that is inside of another"):
            LayerwiseOptimizer(twice, {"a": 0.5})
        first.build(make_model().trainable_variables)
        assert first.multipliers == {"a": 0, "b": 1, "c": 1}

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"multipliers": {"d": 1}}, "names no layer with 'd'.*are: a, b, c"),
            (
                {"multipliers": {"[ab]": 1, "[bc]": 2}},
                "different values to the layer 'b'",
            ),
            (
                {"layer_decay": 0.5, "layer_order": ["c", "a"]},
                "`layer_order` must name every layer.*without b",
            ),
        ],
    )
    def test_in_fit_before_anything_is_trained(self, arguments, message, data):
        model = make_model(LayerwiseOptimizer("sgd", **arguments))
        before = model.get_weights()
        with pytest.raises(ValueError, match=message):
            fit(model, data)
        assert distance(model.get_weights(), before) == 0

    def test_the_name_of_a_functional_model(self):
        """Which no variable has; what to write instead is said."""
        inputs = keras.Input((6,))
        model = keras.Sequential(
            [
                keras.Model(inputs, keras.layers.Dense(4)(inputs), name="backbone"),
                keras.layers.Dense(3, name="head"),
            ]
        )
        message = r"no layer with 'backbone'.* functional model .*'\.\*' all .*, head"
        for arguments in (
            {"multipliers": {"backbone": 0.1}},
            {"layer_decay": 0.5, "layer_order": ["backbone", "head"]},
        ):
            with pytest.raises(ValueError, match=message):
                LayerwiseOptimizer("sgd", **arguments).build(model.trainable_variables)

    def test_before_it_is_built(self):
        optimizer = LayerwiseOptimizer("sgd")
        for use in (
            lambda: optimizer.multipliers,
            lambda: optimizer.set_multipliers({"a": 1}),
            optimizer.summary,
        ):
            with pytest.raises(ValueError, match="known once the optimizer is built"):
                use()

    def test_set_multipliers(self):
        optimizer = LayerwiseOptimizer("sgd")
        optimizer.build(make_model().trainable_variables)
        for bad in ({"a": -1}, {"b": 1, "a": float("nan")}, {"d": 1}):
            with pytest.raises(ValueError, match="`multipliers"):
                optimizer.set_multipliers(bad)
        assert optimizer.multipliers == {"a": 1, "b": 1, "c": 1}


def test_is_exported():
    assert keras_milr.LayerwiseOptimizer is LayerwiseOptimizer


def two_layers(frozen=False):
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(3, name="a"),
            keras.layers.Dense(1, name="b"),
        ]
    )
    model.layers[0].trainable = not frozen
    multipliers = {"b": 1.0} if frozen else {"a": 0.5, "b": 0.25}
    model.compile(LayerwiseOptimizer("adam", multipliers), "mse")
    return model


@pytest.mark.parametrize("kind", ["model.keras", "model.weights.h5"])
def test_a_file_of_more_layers_than_are_trained_now(kind, tmp_path):
    """As Keras does it: the weights are loaded, and the optimizer is left out."""
    x = np.ones((8, 4), "float32")
    model = two_layers()
    model.fit(x, x[:, :1], verbose=0)
    model.layers[0].trainable = False
    path = tmp_path / kind
    whole = kind.endswith("keras")
    (model.save if whole else model.save_weights)(path)
    loaded = two_layers(frozen=True)
    loaded.optimizer.build(loaded.trainable_variables)
    load = keras.models.load_model if whole else loaded.load_weights
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        loaded = load(path) or loaded
    said = [str(one.message) for one in said if one.category is UserWarning]
    assert (
        sum("Skipping variable loading for optimizer 'layerw" in m for m in said) == 1
    )
    assert loaded.optimizer.multipliers == {"b": 0.25 if whole else 1.0}
    for a, b in zip(model.weights, loaded.weights, strict=True):
        np.testing.assert_array_equal(*map(keras.ops.convert_to_numpy, (a, b)))


def test_a_step_that_is_interrupted_leaves_the_rate_alone():
    class Interrupted(keras.optimizers.SGD):
        def update_step(self, gradient, variable, learning_rate):
            if interrupts:
                raise KeyboardInterrupt
            super().update_step(gradient, variable, learning_rate)

    interrupts = True
    variable = keras.Variable(np.ones(2, "float32"), name="v")
    optimizer = LayerwiseOptimizer(Interrupted(0.5), {"v": 0.1})
    optimizer.build([variable])
    with pytest.raises(KeyboardInterrupt):
        update(optimizer, [keras.ops.ones(2)], [variable])
    assert float(optimizer.learning_rate) == 0.5
    interrupts = False
    update(optimizer, [keras.ops.ones(2)], [variable])
    np.testing.assert_allclose(keras.ops.convert_to_numpy(variable), 0.95)


def test_apply_gradients_returns_the_number_of_steps():
    variable = keras.Variable(np.ones(2, "float32"), name="v")
    optimizer = LayerwiseOptimizer("sgd")
    for step in (1, 2):
        made = optimizer.apply_gradients([(keras.ops.ones(2), variable)])
        assert int(made) == step


def test_a_name_is_not_a_regular_expression():
    names = ["conv+1", "convv1"]
    variables = [
        keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, name=name)])
        for name in names
    ]
    variables = [v for model in variables for v in model.trainable_variables]
    optimizer = LayerwiseOptimizer("sgd", {"conv+1": 0.5})
    optimizer.build(variables)
    assert list(optimizer.multipliers.values()) == [0.5, 1.0]
