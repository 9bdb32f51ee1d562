"""Beside other callbacks in any order, and in tools that run `fit` themselves."""

import copy
import csv
import pickle

import keras
import numpy as np
import pytest
import sklearn.pipeline  # noqa: F401 (Keras 3.10 forgets to)
from sklearn.metrics import mutual_info_score
from sklearn.model_selection import GridSearchCV

from keras_milr import LayerwiseOptimizer, MutualInformation, MutualInformationLR

KEYS = ("probe_mutual_information", "probe_information")
company = pytest.mark.supports


def make_model(layerwise=False, **arguments):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(16, activation="relu", name="body"),
            keras.layers.Dense(10, activation="softmax", name="head"),
        ]
    )
    optimizer = keras.optimizers.Adam(1e-3, **arguments)
    if layerwise:
        optimizer = LayerwiseOptimizer(optimizer)
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def halve(reading):
    return reading.rate / 2


def keep(reading):
    return reading.rate


@pytest.fixture(scope="module")
def data(digits):
    return tuple(a[:600] for a in digits)


def fit(callbacks, data, model=None, epochs=3, **arguments):
    model = make_model() if model is None else model
    arguments = {"batch_size": 60, "verbose": 0} | arguments
    return model.fit(*data, epochs=epochs, callbacks=callbacks, **arguments).history


def ours(data, policy=halve, **arguments):
    return MutualInformationLR(policy, data, **arguments)


class Watch(keras.callbacks.Callback):
    """What the predictions say when an epoch ends."""

    def __init__(self, data):
        super().__init__()
        self.data, self.found = data, []

    def on_epoch_end(self, epoch, logs=None):
        predicted = self.model.predict(self.data[0], verbose=0).argmax(axis=1)
        self.found.append(mutual_info_score(self.data[1], predicted))


def tensorboard(folder):
    """Scalars in the files of TensorBoard: tag to list of values."""
    from tensorboard.backend.event_processing import event_accumulator
    from tensorboard.util.tensor_util import make_ndarray

    events = event_accumulator.EventAccumulator(
        str(folder / "train"), {event_accumulator.TENSORS: 0}
    )
    events.Reload()
    return {
        tag: [float(make_ndarray(e.tensor_proto)) for e in events.Tensors(tag)]
        for tag in events.Tags()["tensors"]
        if tag.startswith("epoch_")
    }


# ------------------------------------------------------------ those that use our keys


@company("Company", "CSVLogger")
@pytest.mark.parametrize("place", [0, 1])
def test_csv_logger(data, tmp_path, place):
    callbacks = [keras.callbacks.CSVLogger(tmp_path / "log.csv")]
    callbacks.insert(place, ours(data, layers="all"))
    history = fit(callbacks, data, make_model(layerwise=True))
    with open(tmp_path / "log.csv") as file:
        rows = list(csv.DictReader(file))
    layers = [f"{key}/head" for key in ("learning_rate", "probe_mutual_information")]
    for key in (*KEYS, "learning_rate", *layers):
        np.testing.assert_allclose([float(r[key]) for r in rows], history[key])
    np.testing.assert_allclose(
        history["learning_rate/head"], [1e-3, 5e-4, 2.5e-4], rtol=1e-5
    )


@company("Company", "TensorBoard")
@pytest.mark.parametrize("place", [0, 1])
def test_tensorboard(data, tmp_path, place):
    pytest.importorskip("tensorboard")
    callbacks = [keras.callbacks.TensorBoard(tmp_path, write_graph=False)]
    callbacks.insert(place, ours(data))
    history = fit(callbacks, data)
    found = tensorboard(tmp_path)
    for key in KEYS:
        np.testing.assert_allclose(found[f"epoch_{key}"], history[key], rtol=1e-6)
    np.testing.assert_allclose(history["learning_rate"], [1e-3, 5e-4, 2.5e-4], 1e-6)
    # It asks the optimizer itself, which has the rate of the next epoch by then.
    np.testing.assert_allclose(
        found["epoch_learning_rate"], [5e-4, 2.5e-4, 1.25e-4], rtol=1e-6
    )


@company("Company", "EarlyStopping")
@pytest.mark.parametrize("mode", ["auto", "max"])
@pytest.mark.parametrize("place", [0, 1])
def test_early_stopping(data, place, mode):
    """It stops where its patience with the readings ends, computed anew."""
    stop = keras.callbacks.EarlyStopping(
        *("probe_mutual_information", 10.0, 2), mode=mode, restore_best_weights=True
    )
    callbacks = [stop]
    callbacks.insert(place, ours(data))
    history = fit(callbacks, data, epochs=6)
    assert len(history["loss"]) == 3  # The first, and two that are not 10 nats better.
    assert stop.best == history["probe_mutual_information"][0]


@company("Company", "ModelCheckpoint")
@pytest.mark.parametrize("place", [0, 1])
def test_model_checkpoint(data, tmp_path, place):
    """The best by a key of ours is what is on disk, with the reading that it had."""
    path = tmp_path / "best.keras"
    callbacks = [
        keras.callbacks.ModelCheckpoint(
            path, "probe_information", save_best_only=True, mode="max"
        )
    ]
    callbacks.insert(place, ours(data))
    history = fit(callbacks, data)["probe_information"]
    assert callbacks[1 - place].best == max(history)
    loaded = keras.saving.load_model(path)
    p = loaded.predict(data[0], verbose=0)
    cross_entropy = -np.log(p[np.arange(len(p)), data[1]]).mean()
    best = callbacks[place].history[1 + int(np.argmax(history))]
    assert best["cross_entropy"] == pytest.approx(cross_entropy, abs=1e-4)


@company("Company", "SwapEMAWeights")
@pytest.mark.parametrize("swap_on_epoch", [False, True])
@pytest.mark.parametrize("place", [0, 1])
def test_swap_ema_weights(data, tmp_path, place, swap_on_epoch):
    """Readings are of the weights that are trained; what is saved are the averages."""
    path = tmp_path / "averages.keras"
    swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=swap_on_epoch)
    save = keras.callbacks.ModelCheckpoint(path)
    callback, model = ours(data), make_model(use_ema=True, ema_momentum=0.9)
    callbacks = [swap, save]
    callbacks.insert(2 * place, callback)
    fit(callbacks, data, model, validation_data=data)

    plain = make_model()  # Averages do not change what is trained.
    plain.optimizer.learning_rate = 1e-3
    watch = Watch(data)
    by_hand = keras.callbacks.LearningRateScheduler(lambda e: 1e-3 * 0.5**e)
    fit([by_hand, watch], data, plain)
    np.testing.assert_allclose(
        [r["raw"] for r in callback.history[1:]], watch.found, atol=1e-4
    )
    if swap_on_epoch:
        saved = keras.saving.load_model(path)
        for a, b in zip(saved.get_weights(), model.get_weights(), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)
        assert np.abs(saved.get_weights()[0] - plain.get_weights()[0]).max() > 1e-3


@company("Company", "BackupAndRestore")
def test_backup_and_restore(data, tmp_path):
    def callbacks(*more):
        backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
        return [ours(data), backup, *more]

    def stop(epoch, logs):
        if epoch == 2:
            raise RuntimeError("stop")

    expected = fit([ours(data)], data, epochs=4, shuffle=False)
    stopping = keras.callbacks.LambdaCallback(on_epoch_begin=stop)
    with pytest.raises(RuntimeError, match="stop"):
        fit(callbacks(stopping), data, epochs=4, shuffle=False)
    found = fit(callbacks(), data, epochs=4, shuffle=False)
    for key in ("learning_rate", *KEYS):
        np.testing.assert_allclose(found[key], expected[key][2:], rtol=1e-4)
    with pytest.raises(ValueError, match=r"must stand before.*\['BackupAndRestore', "):
        fit(callbacks()[::-1], data)


# --------------------------------------------------------- those that set the rate too


def schedule(epoch, rate):
    return 0.004 if epoch == 0 else rate


@company("Company", "LearningRateScheduler")
@pytest.mark.parametrize("layers", [None, "all"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_learning_rate_scheduler(data, place, layers):
    """The first rate is the schedule's, and what is logged was trained with."""
    rates = []
    watch = keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda batch, logs: rates.append(
            float(keras.ops.convert_to_numpy(watch.model.optimizer.learning_rate))
        )
    )
    scheduler = keras.callbacks.LearningRateScheduler(schedule)
    callbacks = [scheduler, keras.callbacks.History()]
    callbacks.insert(place, ours(data, layers=layers))
    model = make_model(layers is not None)
    history = fit([*callbacks, watch], data, model)
    np.testing.assert_array_equal(history["learning_rate"], rates[::10])
    key = "learning_rate" if layers is None else "learning_rate/head"
    np.testing.assert_allclose(history[key], [4e-3, 2e-3, 1e-3], rtol=1e-5)
    first = callbacks[place].history[0]["start_rate"]
    first = first if layers is None else first["head"]
    assert first == pytest.approx(4e-3)


@company("Company", "ReduceLROnPlateau")
@pytest.mark.parametrize("layers", [None, "all"])
@pytest.mark.parametrize("place", [0, 1])
def test_reduce_on_plateau(data, place, layers):
    """Both factors, in each order; logged is what was trained with."""
    plateau = keras.callbacks.ReduceLROnPlateau(
        "loss", factor=0.1, patience=1, min_delta=100.0
    )
    callbacks = [plateau]
    callbacks.insert(place, ours(data, layers=layers))
    model = make_model(layers is not None)
    history = fit(callbacks, data, model)
    rates = [1e-3, 5e-4, 2.5e-5]  # A first epoch is no plateau.
    if layers is None:
        np.testing.assert_allclose(history["learning_rate"], rates, rtol=1e-5)
    else:
        base = [1e-3, 1e-3, 1e-4]
        np.testing.assert_allclose(history["learning_rate"], base, rtol=1e-5)
        np.testing.assert_allclose(history["learning_rate/head"], rates, rtol=1e-5)


@company("Company", "ReduceLROnPlateau")
@pytest.mark.parametrize("place", [0, 1])
def test_reduce_on_plateau_of_a_reading(data, place):
    """It sets the base, by what ours has read; layers have their own multipliers."""
    plateau = keras.callbacks.ReduceLROnPlateau(
        "probe_information", factor=0.1, patience=1, min_delta=100.0
    )
    callbacks = [plateau]
    callbacks.insert(place, ours(data, layers="all"))
    history = fit(callbacks, data, make_model(layerwise=True))
    np.testing.assert_allclose(history["learning_rate"], [1e-3, 1e-3, 1e-4], rtol=1e-5)
    np.testing.assert_allclose(
        history["learning_rate/head"], [1e-3, 5e-4, 2.5e-5], rtol=1e-5
    )


@pytest.mark.parametrize("place", [0, 1])
def test_a_schedule_that_ignores_the_rate_is_said(data, place):
    callbacks = [keras.callbacks.LearningRateScheduler(lambda epoch: 1e-3)]
    callbacks.insert(place, ours(data))
    with pytest.warns(UserWarning, match="each epoch so far, this one to 0.001, after"):
        history = fit(callbacks, data, epochs=4)
    np.testing.assert_allclose(history["learning_rate"], 1e-3)
    # Not where ours changes nothing, nor where the rates of layers are set.
    fit([ours(data, keep), callbacks[1 - place]], data, epochs=4)
    both = [ours(data, layers="all"), callbacks[1 - place]]
    fit(both, data, make_model(layerwise=True), epochs=4)


def test_all_orders_are_one(data, tmp_path):
    """Whatever the order, the same rates, readings and files."""

    def company_of(folder):
        return [
            keras.callbacks.LearningRateScheduler(schedule),
            keras.callbacks.CSVLogger(folder / "log.csv"),
            keras.callbacks.EarlyStopping("probe_information", patience=1),
            ours(data),
        ]

    found = []
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 2, 0], [2, 0, 3, 1]):
        folder = tmp_path / str(order)
        folder.mkdir()
        callbacks = company_of(folder)
        history = fit([callbacks[i] for i in order], data, epochs=2)
        found.append((history, (folder / "log.csv").read_text()))
    for history, rows in found[1:]:
        assert history == found[0][0]
        assert rows == found[0][1]


# ------------------------------------------------------------ tools that run `fit`


def test_one_callback_in_several_trainings(data):
    """Each begins anew; a copy shares the data, and nothing that was trained."""
    callback = ours(data)
    fit([callback], data, epochs=2)
    first = copy.deepcopy(callback)
    assert first.history == callback.history
    assert first.probe_data is callback.probe_data
    fit([first], data, make_model(), epochs=2)
    fit([callback], data, make_model(), epochs=2)
    assert [r["rate"] for r in first.history] == [r["rate"] for r in callback.history]
    np.testing.assert_allclose(
        [r["information"] for r in first.history],
        [r["information"] for r in callback.history],
        atol=1e-5,
    )
    batches = ((data[0][i : i + 60], data[1][i : i + 60]) for i in range(0, 600, 60))
    once = copy.deepcopy(ours(batches))  # Which has no copy.
    fit([once], data, epochs=1)
    with pytest.raises(ValueError, match="`probe_data` is empty"):
        fit([ours(batches)], data, epochs=1)


@pytest.mark.parametrize("fitted", [False, True])
def test_pickled(data, fitted):
    """As Keras' own callbacks: for `n_jobs` of scikit-learn, and other processes."""
    callback = ours(data)
    if fitted:
        fit([callback], data, epochs=2)
    sent = pickle.loads(pickle.dumps(callback))
    assert sent.history == callback.history
    fit([callback], data, make_model(), epochs=2)
    fit([sent], data, make_model(), epochs=2)
    assert sent.history == callback.history


@pytest.mark.slow
@company("Company", "Keras Tuner")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_keras_tuner(data, tmp_path):
    """It searches over our arguments, by one of our keys."""
    tuner_of = pytest.importorskip("keras_tuner")
    made = []

    class Hyper(tuner_of.HyperModel):
        def build(self, hp):
            model = make_model()
            decay = hp.Choice("layer_decay", [0.5, 1.0])
            optimizer = LayerwiseOptimizer(
                keras.optimizers.Adam(1e-3), layer_decay=decay
            )
            model.compile(optimizer, model.loss)
            return model

        def fit(self, hp, model, *args, callbacks, **arguments):
            factor = hp.Choice("factor", [1.0, 0.01])
            callback = MutualInformationLR(
                lambda r: factor * r.rate, data, layers="all", min_lr=0
            )
            made.append((hp.get("factor"), hp.get("layer_decay"), callback))
            return model.fit(*args, callbacks=[*callbacks, callback], **arguments)

    tuner = tuner_of.GridSearch(
        Hyper(),
        tuner_of.Objective("probe_information", "max"),
        max_trials=4,
        directory=tmp_path,
    )
    other = ours(data, keep)
    tuner.search(*data, epochs=3, batch_size=60, verbose=0, callbacks=[other])
    assert len(made) == 4
    for factor, decay, callback in made:
        first = callback.history[0]
        assert first["rate"]["body"] == pytest.approx(1e-3 * decay)
        last = callback.history[-1]["rate"]["head"]
        assert last == pytest.approx(1e-3 * factor**2, rel=1e-4)
    best = max(made, key=lambda m: max(r["output"]["value"] for r in m[2].history))
    assert best[0] == tuner.get_best_hyperparameters()[0].get("factor") == 1.0
    assert other.history == []  # Each trial had a copy.


@pytest.mark.slow
@company("Company", "scikit-learn's grid search")
def test_grid_search_of_scikit_learn(data):
    x, y = data

    def make(X, y):
        model = make_model()
        model.compile(keras.optimizers.Adam(1e-2), "categorical_crossentropy")
        return model

    def arguments(policy):
        callback = MutualInformationLR(policy, (x, np.eye(10)[y]))
        return {"callbacks": [callback], "epochs": 3, "batch_size": 60, "verbose": 0}

    def tiny(reading):
        return 1e-6 * reading.rate**0

    grid = GridSearchCV(
        keras.wrappers.SKLearnClassifier(make),
        {"fit_kwargs": [arguments(policy) for policy in (tiny, "decay", "relative")]},
        cv=2,
        error_score="raise",
    )
    grid.fit(x, y)
    assert np.argmin(grid.cv_results_["mean_test_score"]) == 0
    callback = grid.best_estimator_.fit_kwargs["callbacks"][0]
    assert callback.policy in ("decay", "relative")
    predicted = grid.best_estimator_.model_.predict(x, verbose=0).argmax(axis=1)
    assert callback.history[-1]["raw"] == pytest.approx(
        mutual_info_score(y, predicted), abs=1e-4
    )


def test_early_stopping_of_one_of_several_outputs(data):
    """Keras asks which way is better, of a metric whose key begins with the output."""
    x, y = data
    inputs = keras.Input((64,))
    layers = [keras.layers.Dense(10, activation="softmax", name=n) for n in "ab"]
    model = keras.Model(inputs, {layer.name: layer(inputs) for layer in layers})
    loss = "sparse_categorical_crossentropy"
    metrics = {"a": [MutualInformation()]}
    model.compile("adam", {"a": loss, "b": loss}, metrics=metrics)

    def fit(**mode):
        stop = keras.callbacks.EarlyStopping("a_mutual_information", **mode)
        labels = {"a": y, "b": y}
        return model.fit(x, labels, verbose=0, callbacks=[stop]).history

    with pytest.raises(ValueError, match="Pass `mode='max'`"):
        fit()
    assert "a_mutual_information" in fit(mode="max")
