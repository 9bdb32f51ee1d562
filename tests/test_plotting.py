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
    callback, history = trained
    figure = keras_milr.plot_history(callback)
    assert isinstance(figure, Figure)
    top, bottom = figure.axes
    drawn = lines(figure)
    counted = drawn["counted mutual information"]
    np.testing.assert_allclose(counted.get_xdata(), [0, 1, 2, 3])
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
    np.testing.assert_allclose(rate.get_ydata()[1:], history.history["learning_rate"])
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
