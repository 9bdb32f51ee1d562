import keras
import numpy as np
import pytest
from matplotlib.figure import Figure

import keras_milr


@pytest.fixture(scope="module")
def trained(digits):
    x, y = digits
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((64,)), keras.layers.Dense(10, activation="softmax")]
    )
    model.compile(
        "adam",
        "sparse_categorical_crossentropy",
        metrics=[keras_milr.MutualInformation()],
    )
    callback = keras_milr.MutualInformationLR(probe_data=(x, y))
    return callback, model.fit(x, y, epochs=3, verbose=0, callbacks=[callback])


def lines(figure):
    return {line.get_label(): line for axes in figure.axes for line in axes.get_lines()}


def test_of_a_callback(trained):
    callback, _ = trained
    figure = keras_milr.plot_history(callback)
    assert isinstance(figure, Figure)
    top, bottom = figure.axes
    drawn = lines(figure)
    counted = drawn["counted mutual information"]
    # Of 57 batches; with one reading within each of the three epochs.
    half = 29 / 57
    expected = [0, half, 1, 1 + half, 2, 2 + half, 3]
    np.testing.assert_allclose(counted.get_xdata(), expected)
    np.testing.assert_allclose(
        counted.get_ydata(), [r["value"] for r in callback.history]
    )
    (entropy,) = (v for k, v in drawn.items() if k.startswith("H(Y)"))
    np.testing.assert_allclose(entropy.get_ydata(), np.log(10), atol=1e-3)
    (band,) = top.collections
    last = callback.history[-1]
    edges = band.get_paths()[0].vertices
    at_end = edges[np.isclose(edges[:, 0], 3), 1]
    np.testing.assert_allclose(at_end.max(), last["information"] + last["noise"])
    np.testing.assert_allclose(at_end.min(), last["information"] - last["noise"])
    (rate,) = bottom.get_lines()
    at_readings = rate.get_xydata()[:: rate.get_markevery()]
    rates = [r["rate"] for r in callback.history]
    np.testing.assert_allclose(at_readings[:, 1], rates)
    last = rate.get_xydata()[-rate.get_markevery() :]
    # From the last but one down a straight line.
    line = np.polyfit(*last.T, 1)
    np.testing.assert_allclose(np.polyval(line, last[:, 0]), last[:, 1], atol=1e-9)
    np.testing.assert_allclose(np.polyval(line, [2 + half, 3]), rates[-2:], atol=1e-9)
    assert rates[-1] < 0.01 * rates[-2]
    assert bottom.get_yscale() == "log"


def test_of_a_keras_history(trained):
    _, history = trained
    drawn = lines(keras_milr.plot_history(history))
    counted = drawn["counted mutual information"]
    np.testing.assert_allclose(counted.get_xdata(), [1, 2, 3])
    np.testing.assert_allclose(
        counted.get_ydata(), history.history["probe_mutual_information"]
    )


def test_of_a_history_with_the_metric_only(trained):
    history = keras.callbacks.History()
    history.epoch = [0, 1]
    history.history = {
        "learning_rate": [0.1, 0.2],
        "mutual_information": [0.5, 0.6],
        "val_mutual_information": [0.4, 0.5],
    }
    drawn = lines(keras_milr.plot_history(history))
    np.testing.assert_allclose(
        drawn["counted mutual information"].get_ydata(), [0.4, 0.5]
    )
    # Validated every other epoch: only the training curve has a place on the axis.
    history.history["val_mutual_information"] = [0.5]
    drawn = lines(keras_milr.plot_history(history))
    np.testing.assert_allclose(
        drawn["counted mutual information"].get_ydata(), [0.5, 0.6]
    )


def test_bad_input(trained):
    with pytest.raises(TypeError, match="`history` must be a MutualInformationLR"):
        keras_milr.plot_history([1, 2])
    with pytest.raises(ValueError, match="no records"):
        keras_milr.plot_history(keras_milr.MutualInformationLR())
    with pytest.raises(ValueError, match="in its logs"):
        keras_milr.plot_history(keras.callbacks.History())
    history = keras.callbacks.History()
    history.epoch = [0, 1]
    for logs in (
        {"probe_mutual_information/a": [0.1, 0.2]},  # without its rate
        {"learning_rate": 0.1, "probe_information": [0.1, 0.2]},
        {"learning_rate": [0.1], "probe_information": [0.1]},  # of other epochs
    ):
        history.history = logs
        with pytest.raises(ValueError, match="`history` must have a learning rate"):
            keras_milr.plot_history(history)


@pytest.fixture(scope="module", params=[3, 12], ids=["lines", "maps"])
def with_layers(request, digits):
    """As many layers; few enough for lines, or too many."""
    x, y = digits
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(8, "relu", name=f"d{i}") for i in range(request.param)]
    head = keras.layers.Dense(10, activation="softmax", name="head")
    model = keras.Sequential([keras.Input((64,)), *layers[1:], head])
    model.compile(
        keras_milr.LayerwiseOptimizer("adam"), "sparse_categorical_crossentropy"
    )
    callback = keras_milr.MutualInformationLR(
        "relative", probe_data=(x, y), layers="all"
    )
    history = model.fit(x, y, epochs=3, verbose=0, callbacks=[callback])
    return callback, history, [*(layer.name for layer in layers[1:]), "head"]


@pytest.mark.parametrize("of", ["callback", "history"])
def test_of_layers(with_layers, of):
    callback, history, names = with_layers
    figure = keras_milr.plot_history(callback if of == "callback" else history)
    top, bottom = figure.axes[:2]
    start = 0 if of == "callback" else 1  # The reading before the training.
    records = callback.history[start:]
    logged = of == "history"
    information = [
        [r["value" if logged else "information"][name] for r in records]
        for name in names
    ]
    rates = [history.history[f"learning_rate/{name}"] for name in names]
    if len(names) <= 8:
        drawn = {line.get_label(): line for line in top.get_lines()}
        for name, values in zip(names, information, strict=True):
            np.testing.assert_allclose(drawn[name].get_xdata(), range(start, 4))
            np.testing.assert_allclose(drawn[name].get_ydata(), values)
        outputs = [r["output"] for r in records]
        np.testing.assert_allclose(
            drawn["output"].get_ydata(), [max(o["value"], o["bound"]) for o in outputs]
        )
        assert ("H(Y)" in drawn) == (of == "callback")
        for line, values in zip(bottom.get_lines(), rates, strict=True):
            drawn = line.get_ydata()[:: line.get_markevery()]
            np.testing.assert_allclose(drawn[1 - start :], values)
        return
    (upper,), (lower,) = top.collections, bottom.collections
    np.testing.assert_allclose(upper.get_array(), information)
    np.testing.assert_allclose(lower.get_array()[:, 1 - start :], rates)
    # A cell ends where its reading was taken.
    np.testing.assert_allclose(upper.get_coordinates()[0, 1:, 0], range(start, 4))
    assert [label.get_text() for label in top.get_yticklabels()] == names
    assert [axes.get_ylabel() for axes in figure.axes[2:]] == ["nats", "learning rate"]


def test_of_frozen_layers(with_layers):
    """A rate of 0, which a logarithm cannot show, is left out."""
    callback, *_ = with_layers
    frozen = keras_milr.MutualInformationLR(probe_data=callback.probe_data)
    frozen.set_params(callback.params)
    frozen.history = [
        record | {"rate": dict.fromkeys(record["rate"], 0.0)}
        for record in callback.history
    ]
    figure = keras_milr.plot_history(frozen)
    figure.canvas.draw()


def test_of_a_metric_of_another_name(digits):
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(10, "softmax")])
    metrics = ["accuracy", keras_milr.MutualInformation(name="nats")]
    model.compile("adam", "sparse_categorical_crossentropy", metrics=metrics)
    callback = keras_milr.MutualInformationLR()
    history = model.fit(*digits, epochs=2, verbose=0, callbacks=[callback])
    figure = keras_milr.plot_history(history)
    drawn = lines(figure)["counted mutual information"].get_ydata()
    np.testing.assert_allclose(drawn, history.history["nats"])


def test_of_a_single_candidate(digits):
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(10, "softmax")])
    model.compile("adam", "sparse_categorical_crossentropy")
    found = keras_milr.lr_range_test(
        model, *digits, candidates=[0.01], steps=10, verbose=0
    )
    figure = found.plot()
    figure.canvas.draw()
    low, high = figure.axes[-1].get_xlim()
    assert 0 < low < 0.005 < 0.02 < high < 0.1
