"""How a model is trained: options of `compile` and `fit`, and loops of one's own."""

import functools

import keras
import numpy as np
import pytest
from sklearn.metrics import mutual_info_score

import keras_milr
from keras_milr import LayerwiseOptimizer, MutualInformationLR
from tests.backends import TORCH_COMPILE

shows = pytest.mark.supports


@pytest.fixture(scope="module")
def data(digits):
    return tuple(a[:600] for a in digits)


def make_model(layerwise=False, policy=None, optimizer_options=None, **arguments):
    keras.utils.set_random_seed(0)
    if policy is not None:
        keras.config.set_dtype_policy(policy)
    try:
        model = keras.Sequential(
            [
                keras.Input((64,)),
                keras.layers.Dense(16, activation="relu", name="body"),
                keras.layers.Dense(10, activation="softmax", name="head"),
            ]
        )
    finally:
        keras.config.set_dtype_policy("float32")
    optimizer = keras.optimizers.SGD(0.1, **(optimizer_options or {}))
    if layerwise:
        optimizer = LayerwiseOptimizer(optimizer)
    model.compile(optimizer, "sparse_categorical_crossentropy", **arguments)
    return model


def fit(callbacks, data, model, epochs=2, **arguments):
    arguments = {"batch_size": 60, "verbose": 0, "shuffle": False} | arguments
    return model.fit(*data, epochs=epochs, callbacks=callbacks, **arguments).history


def make(data, layers, **arguments):
    """Halves the rate of the network, or that of its second layer."""
    factors = 0.5 if layers is None else np.array([1.0, 0.5])
    return MutualInformationLR(
        lambda r: factors * r.rate, data, layers=layers, **arguments
    )


def check(model, callback, history, data, layers, raw=1e-4):
    """What was read is what scikit-learn reads; what was set is what was trained."""
    key = "learning_rate" if layers is None else "learning_rate/head"
    expected = 0.1 * 0.5 ** np.arange(len(history[key]))
    np.testing.assert_allclose(history[key], expected, rtol=1e-5)
    check_reading(model, callback, data, layers, raw)


def check_reading(model, callback, data, layers, raw):
    predicted = model.predict(data[0], verbose=0).argmax(axis=1)
    last = callback.history[-1] if layers is None else callback.history[-1]["output"]
    found = mutual_info_score(data[1], predicted)
    assert last["raw"] == pytest.approx(found, abs=raw)
    assert found > 0.1


def assert_same_weights(model, other, **tolerance):
    for a, b in zip(model.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, **({"rtol": 1e-4, "atol": 1e-6} | tolerance))


LAYERS = pytest.mark.parametrize("layers", [None, "all"])
OPTIONS = [
    pytest.param(
        {"jit_compile": False},
        id="not_compiled",
        marks=shows("Training options", "jit_compile"),
    ),
    pytest.param(
        {"jit_compile": True},
        id="jit_compile",
        marks=[
            shows("Training options", "jit_compile"),
            pytest.mark.backends("tensorflow", "jax", reason=TORCH_COMPILE),
        ],
    ),
    pytest.param(
        {"run_eagerly": True},
        id="run_eagerly",
        marks=shows("Training options", "run_eagerly"),
    ),
    pytest.param(
        {"steps_per_execution": 4},
        id="steps_per_execution",
        marks=[
            shows("Training options", "steps_per_execution"),
            pytest.mark.backends("tensorflow", "jax", reason="PyTorch has none"),
        ],
    ),
]


@LAYERS
@pytest.mark.parametrize("options", OPTIONS)
def test_options_of_compile(data, options, layers):
    """Rates and readings do not depend on them; nor does what is trained."""
    model, callback = make_model(layers is not None, **options), make(data, layers)
    history = fit([callback], data, model)
    check(model, callback, history, data, layers)
    plain = make_model(layers is not None)
    fit([by_hand(layers)], data, plain)
    assert_same_weights(model, plain)


def by_hand(layers):
    """Sets the same rates without a reading."""

    def change(epoch, logs):
        optimizer = callback.model.optimizer
        if layers is None:
            optimizer.learning_rate = 0.1 * 0.5**epoch
        else:
            optimizer.set_multipliers({"head": 0.5**epoch})

    def start(logs):
        if layers is not None:
            callback.model.optimizer.build(callback.model.trainable_variables)

    callback = keras.callbacks.LambdaCallback(
        on_epoch_begin=change, on_train_begin=start
    )
    return callback


@shows("Training options", "jit_compile")
@pytest.mark.backends("torch", reason="others compile for real above")
def test_compiled_by_pytorch(data, monkeypatch):
    """As far as PyTorch traces: its C++ compiler would need a minute."""
    import torch

    compiled = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", compiled)
    model, callback = make_model(True, jit_compile=True), make(data, "all")
    history = fit([callback], data, model)
    check(model, callback, history, data, "all")
    plain = make_model(True)
    fit([by_hand("all")], data, plain)
    assert_same_weights(model, plain)


@pytest.mark.refuses(
    "Training options",
    "steps_per_execution",
    error="ValueError of Keras: must be 1 with the PyTorch backend",
)
@pytest.mark.backends("torch", reason="others have it")
def test_no_steps_per_execution(data):
    with pytest.raises(ValueError, match="`steps_per_execution` must be 1 with"):
        fit([make(data, None)], data, make_model(steps_per_execution=4))


@LAYERS
@pytest.mark.parametrize(
    "policy",
    [
        pytest.param(f"mixed_{kind}", marks=shows("Training options", f"mixed_{kind}"))
        for kind in ("float16", "bfloat16")
    ],
)
def test_mixed_precision(data, policy, layers):
    model, callback = make_model(layers is not None, policy), make(data, layers)
    history = fit([callback], data, model)
    # Two compiled passes may round differently, and a class or two change.
    check(model, callback, history, data, layers, raw=0.05)
    scaled = isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert scaled == (policy == "mixed_float16")


@LAYERS
@pytest.mark.parametrize(
    "floatx",
    [
        pytest.param("float64", marks=shows("Training options", "floatx float64")),
        "float16",
    ],
)
@pytest.mark.filterwarnings("ignore:Explicitly requested dtype float64:UserWarning")
def test_floatx(data, layers, floatx):
    """What is read is in float32 all the same."""
    keras.config.set_floatx(floatx)
    try:
        metrics = [keras_milr.MutualInformation()]
        model = make_model(layers is not None, floatx, metrics=metrics)
        callback = make(data, layers)
        history = fit([callback], data, model)
        if floatx == "float64":
            check(model, callback, history, data, layers)
        else:  # In which Keras holds the rate, too.
            check_reading(model, callback, data, layers, raw=0.05)
    finally:
        keras.config.set_floatx("float32")
    assert history["mutual_information"][-1] > 0.1


@shows("Training options", "gradient accumulation")
@LAYERS
def test_gradient_accumulation(data, layers):
    """Two batches of 30 are one of 60, at the rates of that moment."""
    options = {"gradient_accumulation_steps": 2}
    model = make_model(layers is not None, optimizer_options=options)
    callback = make(data, layers)
    history = fit([callback], data, model, batch_size=30)
    check(model, callback, history, data, layers)
    plain = make_model(layers is not None)
    fit([by_hand(layers)], data, plain)
    assert_same_weights(model, plain)


@shows("Training options", "class_weight")
@LAYERS
def test_class_weight(data, layers):
    """It changes what is trained, and not what is read of that."""
    weight = {k: 1.0 + (k == 3) for k in range(10)}
    model, callback = make_model(layers is not None), make(data, layers)
    history = fit([callback], data, model, class_weight=weight)
    check(model, callback, history, data, layers)
    plain = make_model(layers is not None)
    fit([by_hand(layers)], data, plain, class_weight=weight)
    assert_same_weights(model, plain)
    without = make_model(layers is not None)
    fit([by_hand(layers)], data, without)
    assert np.abs(model.get_weights()[0] - without.get_weights()[0]).max() > 1e-3


@shows("Training options", "validation_freq")
@LAYERS
def test_validation_freq(data, layers):
    """A probe is read in each epoch, a metric on validation data where there is one."""
    metrics = [keras_milr.MutualInformation()]
    model = make_model(layers is not None, metrics=metrics)
    callback = make(data, layers)
    history = fit([callback], data, model, 4, validation_data=data, validation_freq=2)
    check(model, callback, history, data, layers)
    found = [
        (r if layers is None else r["output"])["raw"] for r in callback.history[2::2]
    ]
    np.testing.assert_allclose(found, history["val_mutual_information"], atol=1e-4)


@shows("Training options", "initial_epoch", "fit called again")
@LAYERS
def test_initial_epoch_and_fit_called_again(data, layers):
    """The rates go on from where they are, the readings begin anew."""
    model, callback = make_model(layers is not None), make(data, layers)
    first = fit([callback], data, model, epochs=3, initial_epoch=1)
    check(model, callback, first, data, layers)
    assert [r["epoch"] for r in callback.history] == [1, 1, 2]
    assert {r["steps"] for r in callback.history} == {2}
    again = fit([callback], data, model, epochs=1)
    assert [r["step"] for r in callback.history] == [0, 1]
    key = "learning_rate" if layers is None else "learning_rate/head"
    assert again[key] == pytest.approx([0.025], rel=1e-5)
    plain = make_model(layers is not None)
    fit([by_hand(layers)], data, plain, epochs=3)
    assert_same_weights(model, plain)


@shows("Training options", "train_on_batch, callback by hand")
@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("update_freq", ["epoch", 4])
@LAYERS
def test_train_on_batch(data, layers, update_freq, listed):
    """A loop of one's own is as `fit`, with a list of callbacks or ours alone."""
    by_fit, by_loop = (make(data, layers, update_freq=update_freq) for _ in range(2))
    trained, model = make_model(layers is not None), make_model(layers is not None)
    history = fit([by_fit], data, trained)
    logged = []
    hooks = by_loop
    if listed:
        hooks = keras.callbacks.CallbackList([by_loop], model=model, epochs=2, steps=10)
    else:
        by_loop.set_model(model)
    hooks.on_train_begin()
    for epoch in range(2):
        model.reset_metrics()
        hooks.on_epoch_begin(epoch)
        for i in range(10):
            hooks.on_train_batch_begin(i)
            batch = (a[60 * i : 60 * (i + 1)] for a in data)
            logs = model.train_on_batch(*batch, return_dict=True)
            hooks.on_train_batch_end(i, logs)
        logs = dict(logs)
        logged.append(logs)
        hooks.on_epoch_end(epoch, logs)
    hooks.on_train_end()
    assert_same_weights(model, trained)
    for a, b in zip(by_loop.history, by_fit.history, strict=True):
        assert (a["epoch"], a["batch"]) == (b["epoch"], b["batch"])
        assert a["rate"] == pytest.approx(b["rate"])
        assert a["steps"] == (b["steps"] if listed else None)
    if not listed:  # A list hands on a copy of the logs.
        for key in ("learning_rate", "probe_information"):
            assert [one[key] for one in logged] == pytest.approx(history[key], rel=1e-4)
