"""A training that was killed goes on as if nobody had killed it."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_milr
from keras_milr import MutualInformationLR, callbacks, state
from keras_milr.controller import Controller
from keras_milr.readouts import Information
from keras_milr.rollback import Rollback
from tests import killed
from tests.backends import NAME

pytestmark = pytest.mark.filterwarnings(
    "ignore:MutualInformationLR. epoch .* are back at the"
)
ROOT = Path(__file__).parent.parent
# Elsewhere than on TensorFlow a start takes longer: what most depends on the backend.
# The long setting: KERAS_MILR_KILLS=60.
SETTINGS = ["rollback", "layers", "checkpoint"]
if NAME == "tensorflow":
    SETTINGS += ["auto", "metric", "network"]
KILLS = int(os.environ.get("KERAS_MILR_KILLS", len(SETTINGS)))


def assert_same(found, expected):
    """The same readings at the same moments, and rates that differ by 1e-6 at most."""
    found, expected = killed.by_step(found), killed.by_step(expected)
    assert found[0] == expected[0]
    for a, b in zip(found[1:], expected[1:], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Function of a setting: its rates when nobody kills it."""
    done = {}

    def rates(setting):
        if setting not in done:
            folder = tmp_path_factory.mktemp(setting)
            done[setting] = killed.rates(*killed.train(setting, folder))
        return done[setting]

    return rates


@pytest.mark.slow
@pytest.mark.supports("Backends", "resuming after a kill")
@pytest.mark.supports("Company", "BackupAndRestore", "ModelCheckpoint")
@pytest.mark.supports("Training options", "initial_epoch")
def test_killed_at_random_moments():
    """Processes that end by SIGKILL, at moments drawn at random."""
    run = subprocess.run(
        [
            *(sys.executable, "-W", "ignore", "-m", "tests.killed"),
            *("--kills", str(KILLS), "--settings", *SETTINGS),
        ],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    trainings = [json.loads(line) for line in run.stdout.splitlines()]
    hit = [moment for training in trainings for moment in training["killed_in"]]
    print(f"{len(hit)} kills: { {moment: hit.count(moment) for moment in set(hit)} }")
    assert len(hit) >= KILLS
    assert "roll back" in hit
    assert "range test" in hit or "auto" not in SETTINGS
    assert {training["setting"] for training in trainings} == set(SETTINGS)
    for training in trainings:
        assert_same(training["found"], training["expected"])
    (rolled_back, *_) = (t for t in trainings if t["setting"] == "rollback")
    assert rolled_back["expected"]["readings"][-1][-1] == 2


class Killed(BaseException):
    """Stands in for a kill: what was trained with is given up, as it is."""


class Kill:
    """Ends a training inside of a function, when it is called for the second time."""

    def __init__(self, monkeypatch, owner, name, after=False):
        self.calls = 0
        function = getattr(owner, name)

        def replaced(*args, **kwargs):
            self.calls += 1
            if self.calls == 2 and not after:
                raise Killed
            result = function(*args, **kwargs)
            if self.calls == 2:
                raise Killed
            return result

        monkeypatch.setattr(owner, name, replaced)


def in_the_middle_of_the_weights(monkeypatch):
    save = keras.Model.save_weights
    calls = []

    def half(model, filepath, **kwargs):
        save(model, filepath, **kwargs)
        calls.append(filepath)
        if len(calls) == 2:
            os.truncate(filepath, os.path.getsize(filepath) // 2)
            raise Killed

    monkeypatch.setattr(keras.Model, "save_weights", half)


MOMENTS = [
    # In the third epoch and later ones, each run goes on where the last one ended.
    lambda patch: Kill(patch, MutualInformationLR, "_measure", after=True),
    lambda patch: Kill(patch, Controller, "act"),
    # Between the file of the weights and that of the epoch.
    lambda patch: Kill(patch, keras.Model, "save_weights", after=True),
    in_the_middle_of_the_weights,
    lambda patch: Kill(patch, Controller, "roll_back"),
]


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["rollback", "layers", "metric", "batches"])
def test_given_up_at_every_kind_of_moment(setting, alone, tmp_path, monkeypatch):
    """The same without processes, at moments that a clock would hardly meet."""
    ended = 0
    for moment in MOMENTS:
        with monkeypatch.context() as patch:
            moment(patch)
            try:
                result = killed.train(setting, tmp_path)
                break
            except Killed:
                ended += 1
    else:
        result = killed.train(setting, tmp_path)
    assert ended >= 4
    assert_same(killed.rates(*result), alone(setting))


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """Function of setting, epoch and folder: a training that ends in an epoch."""

    def stop(setting, epoch, folder=tmp_path, **options):
        ending = keras.callbacks.LambdaCallback(on_epoch_begin=end_at(epoch))
        with pytest.raises(Killed):
            killed.train(setting, folder, ending, **options)
        return folder

    return stop


class TestBackup:
    """What a kill can leave of the files of `BackupAndRestore`."""

    @pytest.mark.parametrize(
        "metadata", ['{"epoch": 2, "batch": 0}', '{"epo', "", None]
    )
    def test_of_which_the_epoch_is_that_before(self, metadata, stopped, alone):
        folder = stopped("network", 3)
        path = folder / "backup" / "training_metadata.json"
        assert json.loads(path.read_text())["epoch"] == 3
        path.unlink() if metadata is None else path.write_text(metadata)
        callback, model = killed.train("network", folder)
        assert_same(killed.rates(callback, model), alone("network"))

    @pytest.mark.parametrize("opens", [False, True])
    def test_of_which_the_weights_are_cut(self, opens, stopped, alone):
        """Keras goes back to the file before where it cannot open this one only."""
        folder = stopped("network", 3)
        weights = folder / "backup" / "latest.weights.h5"
        whole = weights.read_bytes()
        weights.write_bytes(whole[: len(whole) // 2])
        if opens:
            # As a kill has left it: what comes first says how long it is.
            weights.write_bytes(whole[:2048] + bytes(len(whole) - 2048))
            model = killed.make_model("network")
            model.optimizer.build(model.trainable_variables)
            with pytest.raises((KeyError, RuntimeError, ValueError)):
                model.load_weights(weights)
            with pytest.raises(ValueError, match="cannot be read: it is damaged"):
                MutualInformationLR().load_state(weights)
        callback, model = killed.train("network", folder)
        assert_same(killed.rates(callback, model), alone("network"))

    def test_that_was_the_first_and_is_cut(self, stopped, alone):
        folder = stopped("network", 1)
        (folder / "backup" / "training_metadata.json").unlink()
        os.truncate(folder / "backup" / "latest.weights.h5", 100)
        with pytest.warns(UserWarning, match="killed while its first backup was writt"):
            callback, model = killed.train("network", folder)
        assert_same(killed.rates(callback, model), alone("network"))

    def test_that_was_being_deleted(self, stopped, alone):
        folder = stopped("network", 3)
        (folder / "backup" / "latest.weights.h5").unlink()
        with pytest.warns(UserWarning, match="or the last one deleted"):
            callback, model = killed.train("network", folder)
        assert_same(killed.rates(callback, model), alone("network"))

    def test_without_a_state(self, tmp_path):
        """Of a run without the callback."""
        x, y = killed.digits()
        folder = tmp_path / "backup"
        backup = keras.callbacks.BackupAndRestore(folder, delete_checkpoint=False)
        model = killed.make_model("network")
        model.fit(x, y, epochs=2, verbose=0, callbacks=[backup])
        with pytest.warns(UserWarning, match="the backup has no state of it"):
            callback, _ = killed.train("network", tmp_path)
        assert [r["epoch"] for r in callback.history] == [2, 2, 3, 4, 5, 6, 7]

    def test_of_other_arguments(self, stopped):
        """Readings that cannot be compared."""
        folder = stopped("network", 3)
        for setting in ("batches", "metric"):
            with pytest.raises(ValueError, match=r"training with other arguments.*Rec"):
                killed.train(setting, folder)

    def test_history_goes_on_and_the_range_test_is_not_run_again(
        self, stopped, monkeypatch
    ):
        folder = stopped("auto", 3)

        def fail(*args, **kwargs):
            raise AssertionError("a second range test")

        monkeypatch.setattr(callbacks, "lr_range_test", fail)
        callback, _ = killed.train("auto", folder)
        assert [r["step"] for r in callback.history] == list(range(9))
        assert {r["steps"] for r in callback.history} == {8}
        assert isinstance(callback.lr_range, keras_milr.LRRange)
        assert callback.lr_range.failed.dtype == bool
        assert json.loads(json.dumps(callback.history)) is not None

    def test_is_small_while_the_training_goes_well(self, stopped):
        """The weights to roll back to are those that are saved anyway."""
        folder = stopped("network", 6)
        entry = keras_milr.state._keras.saved_entry(
            str(folder / "backup" / "latest.weights.h5"), "_keras_milr"
        )
        assert sum(array.size for name, array in entry.items() if name != "state") <= 2

    @pytest.mark.slow
    def test_while_saved_in_the_middle_of_an_epoch(self, tmp_path):
        """Keras then begins the epoch anew, and so do the readings of it."""
        x, y = killed.digits()

        def fit(*others):
            model = killed.make_model("network")
            callback = MutualInformationLR("relative", (x, y))
            backup = keras.callbacks.BackupAndRestore(tmp_path / "b", save_freq=10)
            model.fit(
                *(x, y),
                batch_size=64,
                epochs=4,
                shuffle=False,
                verbose=0,
                callbacks=[callback, backup, *others],
            )
            return callback

        seen = {}

        class Stop(keras.callbacks.Callback):
            def on_epoch_begin(self, epoch, logs=None):
                self.epoch = epoch

            def on_train_batch_end(self, batch, logs=None):
                seen[iterations(self.model)] = self.model.get_weights()
                if (self.epoch, batch) == (2, 25):
                    raise Killed

        with pytest.raises(Killed):
            fit(Stop())
        # On JAX the trainer has the weights within an epoch: it must save them.
        model = killed.make_model("network")
        model.optimizer.build(model.trainable_variables)
        model.load_weights(tmp_path / "b" / "latest.weights.h5")
        assert 2 * 29 + 10 < iterations(model) < 2 * 29 + 26
        for found, then in zip(
            model.get_weights(), seen[iterations(model)], strict=True
        ):
            np.testing.assert_array_equal(found, then)
        callback = fit()
        assert [r["step"] for r in callback.history] == [0, 1, 2, 3, 4]
        assert [r["epoch"] for r in callback.history] == [0, 0, 1, 2, 3]

    @pytest.mark.parametrize(
        ("epochs", "update_freq"), [(4, 10), (1, "epoch"), (2, "epoch")]
    )
    def test_readings_that_are_taken_again_are_planned_again(
        self, epochs, update_freq, tmp_path
    ):
        """Else the rate would be at its lowest long before the end."""
        x, y = killed.digits()
        for kill in (True, False):
            model = killed.make_model("network")
            callback = MutualInformationLR(
                probe_data=(x, y), update_freq=update_freq, rollback=False
            )
            backup = keras.callbacks.BackupAndRestore(tmp_path / "b", save_freq=10)

            def end(batch, logs=None, kill=kill, model=model, epochs=epochs):
                if kill and iterations(model) >= 225 * epochs - 50:
                    raise Killed

            ending = keras.callbacks.LambdaCallback(on_train_batch_end=end)
            with pytest.raises(Killed) if kill else contextlib.nullcontext():
                model.fit(
                    *(x, y),
                    batch_size=8,
                    epochs=epochs,
                    verbose=0,
                    callbacks=[callback, backup, ending],
                )
        again = [r for r in callback.history[1:] if r["epoch"] == epochs - 1]
        assert again[0]["batch"] > again[-1]["batch"] - 225
        batches = [r["batch"] for r in again]
        (restart,) = [i for i in range(1, len(again)) if batches[i] <= batches[i - 1]]
        left = [r["steps"] - r["step"] for r in again[restart:]]
        assert left == list(range(len(left)))[::-1]


def iterations(model):
    return int(keras.ops.convert_to_numpy(model.optimizer.iterations))


def test_the_masks_of_dropout_go_on(tmp_path, digits):
    """Keras does not save the states of seeds: they would begin anew."""

    def fit(*others):
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [
                keras.Input((64,)),
                keras.layers.Dense(16, activation="relu"),
                keras.layers.Dropout(0.3),
                keras.layers.Dense(10, activation="softmax"),
            ]
        )
        model.compile("adam", "sparse_categorical_crossentropy")
        options = {"epochs": 4, "shuffle": False, "verbose": 0}
        callbacks = [MutualInformationLR(probe_data=digits), *others]
        return model.fit(*digits, callbacks=callbacks, **options).history["loss"]

    expected = fit()
    backup = keras.callbacks.BackupAndRestore(tmp_path / "b")
    with pytest.raises(Killed):
        fit(backup, keras.callbacks.LambdaCallback(on_epoch_begin=end_at(2)))
    found = fit(keras.callbacks.BackupAndRestore(tmp_path / "b"))
    np.testing.assert_allclose(found, expected[2:], rtol=1e-5)


class TestOrder:
    @pytest.mark.parametrize("nested", [False, True])
    def test_behind_the_backup(self, nested, tmp_path, digits):
        model = killed.make_model("network")
        before = model.get_weights()
        backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
        ours = MutualInformationLR(probe_data=digits)
        for order, received in (
            ([backup, ours], r"\['BackupAndRestore', 'MutualInformationLR'\]"),
            ([ours, MutualInformationLR(probe_data=digits), backup], "LR', 'Mutual"),
        ):
            order = [order] if nested else order
            with pytest.raises(ValueError, match=f"must stand before.*{received}"):
                model.fit(*digits, epochs=1, verbose=0, callbacks=order)
        for a, b in zip(model.get_weights(), before, strict=True):
            np.testing.assert_array_equal(a, b)

    def test_behind_a_checkpoint_the_reading_is_taken_later(self, alone, tmp_path):
        """It saves before the reading of the epoch: the same is read when resumed."""
        ending = keras.callbacks.LambdaCallback(on_epoch_begin=end_at(3))
        with pytest.raises(Killed):
            checkpointed(tmp_path, killed.make_model("network"), ending, first=True)
        result = checkpointed(tmp_path, 3)
        assert_same(killed.rates(*result), alone("network"))

    def test_behind_a_checkpoint_with_a_metric(self, tmp_path):
        ending = keras.callbacks.LambdaCallback(on_epoch_begin=end_at(3))
        options = {"first": True, "probe_data": None}
        with pytest.raises(Killed):
            checkpointed(tmp_path, killed.make_model("metric"), ending, **options)
        with pytest.raises(
            ValueError, match=r"must stand before the callback that sav"
        ):
            checkpointed(tmp_path, 3, **options)


def end_at(epoch):
    def end(now, logs=None):
        if now == epoch:
            raise Killed

    return end


def checkpointed(folder, start, *others, first=False, load=None, **arguments):
    """Trains with `ModelCheckpoint`.

    Args:
        folder: Where it saves.
        start: A model, or the epoch to go on from.
        others: More callbacks.
        first: Whether it comes before ours.
        load: What to load the state from, where not from the model's file.
        arguments: Of ours.
    """
    x, y = killed.digits()
    callback = MutualInformationLR(**({"probe_data": (x, y)} | arguments))
    keeper = keras.callbacks.ModelCheckpoint(folder / "{epoch:02d}.keras")
    order = [keeper, callback] if first else [callback, keeper]
    epoch, model = 0, start
    if isinstance(start, int):
        path = folder / f"{start:02d}.keras"
        epoch, model = start, keras.models.load_model(path)
        callback.load_state(load or path)
    model.fit(
        *(x, y),
        batch_size=64,
        epochs=killed.EPOCHS,
        initial_epoch=epoch,
        shuffle=False,
        verbose=0,
        callbacks=[*order, *others],
    )
    return callback, model


@pytest.fixture
def checkpoints(tmp_path):
    """Folder of a training that ended in its sixth epoch, with a file for each."""
    ending = keras.callbacks.LambdaCallback(on_epoch_begin=end_at(5))
    with pytest.raises(Killed):
        checkpointed(tmp_path, killed.make_model("network"), ending)
    return tmp_path


class TestLoadState:
    def test_goes_on_from_any_file_of_a_model(self, checkpoints, alone):
        for epoch in (1, 4):
            assert_same(
                killed.rates(*checkpointed(checkpoints, epoch)), alone("network")
            )

    def test_a_rate_that_is_given_is_not_set_again(self, checkpoints, alone):
        result = checkpointed(checkpoints, 4, learning_rate=3e-3)
        assert_same(killed.rates(*result), alone("network"))

    def test_a_second_fit_starts_anew(self, checkpoints):
        callback, model = checkpointed(checkpoints, 4)
        model.fit(*killed.digits(), epochs=1, verbose=0, callbacks=[callback])
        taken = [(r["step"], r["batch"]) for r in callback.history]
        assert taken == [(0, 0), (1, 29), (2, 57)]

    def test_of_weights(self, checkpoints, alone, tmp_path):
        """With those of the optimizer, which has to be built to take them."""
        x, y = killed.digits()
        model = keras.models.load_model(checkpoints / "04.keras")
        path = tmp_path / "4.weights.h5"
        saver = keras.callbacks.LambdaCallback(
            on_epoch_begin=lambda *_: model.save_weights(path)
        )
        callback = MutualInformationLR(probe_data=(x, y))
        callback.load_state(checkpoints / "04.keras")
        ending = keras.callbacks.LambdaCallback(on_train_batch_begin=end_at(3))
        options = {"batch_size": 64, "epochs": 8, "shuffle": False, "verbose": 0}
        options["initial_epoch"] = 4
        with pytest.raises(Killed):
            model.fit(x, y, callbacks=[callback, saver, ending], **options)
        for built in (True, False):
            model = killed.make_model("network")
            if built:
                model.optimizer.build(model.trainable_variables)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Skipping variable loading for opti")
                model.load_weights(path)
            callback = MutualInformationLR(probe_data=(x, y))
            callback.load_state(path)
            if built:
                model.fit(x, y, callbacks=[callback], **options)
                assert_same(killed.rates(callback, model), alone("network"))
                continue
            with pytest.raises(ValueError, match=r"build its optimizer before.*made 0"):
                model.fit(x, y, callbacks=[callback], **options)

    def test_of_other_weights_or_another_epoch(self, checkpoints):
        with pytest.raises(ValueError, match=r"of other weights.*after 58 training st"):
            checkpointed(checkpoints, 4, load=checkpoints / "02.keras")
        shutil.copy(checkpoints / "04.keras", checkpoints / "05.keras")
        with pytest.raises(ValueError, match=r"`initial_epoch=4`.*initial_epoch=5"):
            checkpointed(checkpoints, 5)

    def test_that_was_refused_can_be_used_yet(self, checkpoints, alone):
        x, y = killed.digits()
        model = keras.models.load_model(checkpoints / "04.keras")
        callback = MutualInformationLR(probe_data=(x, y))
        callback.load_state(checkpoints / "04.keras")
        options = {"batch_size": 64, "epochs": killed.EPOCHS, "shuffle": False}
        options |= {"verbose": 0, "callbacks": [callback]}
        with pytest.raises(ValueError, match="goes on with `initial_epoch=4`"):
            model.fit(x, y, **options)
        model.fit(x, y, initial_epoch=4, **options)
        assert_same(killed.rates(callback, model), alone("network"))

    @pytest.mark.parametrize("first", [False, True])
    def test_of_a_training_that_has_ended(self, first, tmp_path):
        """With more epochs it goes on from the highest rate, as in another `fit`."""
        _, model = checkpointed(tmp_path, killed.make_model("network"), first=first)
        highest = float(keras.ops.convert_to_numpy(model.optimizer.learning_rate))
        path = tmp_path / f"{killed.EPOCHS:02d}.keras"
        model = keras.models.load_model(path)
        assert model.optimizer.learning_rate < 0.1 * highest
        callback = MutualInformationLR(probe_data=killed.digits())
        callback.load_state(path)
        logs = model.fit(
            *killed.digits(),
            batch_size=64,
            verbose=0,
            callbacks=[callback],
            initial_epoch=killed.EPOCHS,
            epochs=2 * killed.EPOCHS,
        )
        rates = logs.history["learning_rate"]
        assert rates[0] >= 0.9 * highest
        assert rates[-1] < 0.1 * highest

    def test_of_another_model(self, tmp_path, stopped):
        """Told by the weights to roll back to, which it has while little is known."""
        stopped("rollback", 1)
        path = tmp_path / "backup" / "latest.weights.h5"
        x, y = killed.digits()
        model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(10)])
        model.compile("adam", "mse")
        model.optimizer.iterations.assign(29)
        callback = MutualInformationLR("relative", (x, y))
        callback.load_state(path)
        with pytest.raises(ValueError, match="to resume is of another model"):
            model.fit(x, y, initial_epoch=1, epochs=2, verbose=0, callbacks=[callback])

    def test_where_there_is_none(self, checkpoints, tmp_path):
        callback = MutualInformationLR()
        path = tmp_path / "plain.keras"
        killed.make_model("network").save(path)
        with pytest.raises(ValueError, match=r"which has no state of one"):
            callback.load_state(path)
        with pytest.raises(ValueError, match=r"`path` must end in '.keras'.*\.h5'"):
            callback.load_state(tmp_path / "model.h5")
        with pytest.raises(OSError, match=r"none\.keras"):
            callback.load_state(tmp_path / "none.keras")


class TestJSON:
    """Weights that are saved by other means."""

    def test_goes_on(self, tmp_path, alone):
        kept = {}
        path = tmp_path / "state.json"

        class Save(keras.callbacks.Callback):
            def on_epoch_end(self, epoch, logs=None):
                if epoch == 3:
                    ours.save_state(path)
                    kept["weights"] = self.model.get_weights()
                    kept["slots"] = [
                        keras.ops.convert_to_numpy(v).copy()
                        for v in self.model.optimizer.variables
                    ]
                    raise Killed

        x, y = killed.digits()
        model, ours = killed.make_model("network"), MutualInformationLR("decay", (x, y))
        options = {"batch_size": 64, "epochs": 8, "shuffle": False, "verbose": 0}
        with pytest.raises(Killed):
            model.fit(x, y, callbacks=[ours, Save()], **options)
        assert json.loads(path.read_text())["epoch"] == 4
        assert os.listdir(tmp_path) == ["state.json"]

        model, callback = (
            killed.make_model("network"),
            MutualInformationLR("decay", (x, y)),
        )
        model.set_weights(kept["weights"])
        model.optimizer.build(model.trainable_variables)
        for variable, value in zip(
            model.optimizer.variables, kept["slots"], strict=True
        ):
            variable.assign(value)
        callback.load_state(path)
        model.fit(x, y, initial_epoch=4, callbacks=[callback], **options)
        assert_same(killed.rates(callback, model), alone("network"))
        callback.save_state(path)  # After the training too.
        assert json.loads(path.read_text())["epoch"] == 8

    def test_without_the_weights_to_roll_back_to(self, tmp_path):
        """Those of that moment stand in, with what was read of them."""
        x, y = killed.digits()
        model = killed.make_model("network")
        callback = MutualInformationLR(probe_data=(x, y))
        model.fit(x, y, verbose=0, callbacks=[callback])
        callback.save_state(tmp_path / "state.json")
        _, arrays = state.read(tmp_path / "state.json")
        good = Information(1.8, 1.8, np.log(10), 0.0, 0.02)
        worse = good._replace(value=1.0)
        guard, resumed = Rollback(model), Rollback(model)
        guard.keep(good, [good])
        model.train_on_batch(x, y)
        guard.keep(worse, [worse])
        resumed.resume(json.loads(json.dumps(guard.state()[0])), arrays)
        present = model.get_weights()
        model.train_on_batch(x, y)
        assert resumed.restore()[0][0].value == 1.0
        for found, expected in zip(model.get_weights(), present, strict=True):
            np.testing.assert_array_equal(found, expected)

    def test_it_is_replaced_as_a_whole_or_not_at_all(self, tmp_path, monkeypatch):
        x, y = killed.digits()
        callback = MutualInformationLR(probe_data=(x, y))
        path = tmp_path / "state.json"
        with pytest.raises(ValueError, match="no state to save before its first read"):
            callback.save_state(path)
        with pytest.raises(ValueError, match=r"`path` must end in '.json'"):
            callback.save_state(tmp_path / "state")
        killed.make_model("network").fit(x, y, verbose=0, callbacks=[callback])
        callback.save_state(path)
        whole = path.read_text()

        def full(*args):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(state.os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            callback.save_state(path)
        assert path.read_text() == whole
        assert os.listdir(tmp_path) == ["state.json"]

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b'{"format": "keras_milr.state", "ver',
            b"[1, 2]",
            b"{}",
            b'{"epoch": 3, "batch": 0}',
            b'{"format": "keras_milr.state", "version": 2}',
            b"\xff\xfe\x00",
        ],
    )
    def test_that_is_damaged_or_foreign(self, content, tmp_path):
        path = tmp_path / "state.json"
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match=r"cannot be read: it is damaged, or of an"
        ):
            MutualInformationLR().load_state(path)

    @pytest.mark.parametrize(
        ("old", "new"), [('"version": 4', '"version": 5'), ('"step": 1', '"step": 3')]
    )
    def test_that_was_changed(self, old, new, tmp_path):
        x, y = killed.digits()
        callback = MutualInformationLR(probe_data=(x, y))
        killed.make_model("network").fit(x, y, verbose=0, callbacks=[callback])
        path = tmp_path / "state.json"
        callback.save_state(path)
        callback.load_state(path)
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))
        with pytest.raises(ValueError, match=r"damaged.*Received: (version 5|another)"):
            callback.load_state(path)


class TestTheModel:
    def test_is_what_it_was(self, tmp_path):
        x, y = killed.digits()
        model, plain = killed.make_model("network"), killed.make_model("network")
        seen = []

        class Look(keras.callbacks.Callback):
            def on_epoch_begin(self, epoch, logs=None):
                model = self.model
                seen.append([v.path for v in model.variables])
                seen.append([layer.name for layer in model.layers])
                seen.append(model.to_json())
                model.save_weights(tmp_path / f"{len(seen)}.weights.h5")

        model.fit(x, y, verbose=0, callbacks=[Look()])
        name = model.name
        without, seen[:] = list(seen), []
        ours = MutualInformationLR(probe_data=(x, y))
        model.fit(x, y, verbose=0, callbacks=[ours, Look()])
        assert seen == without
        assert model.name == name
        assert not [key for key in vars(model) if "milr" in key]
        plain.optimizer.build(plain.trainable_variables)
        plain.load_weights(tmp_path / "3.weights.h5")

    def test_weights_may_be_loaded_while_it_trains(self, checkpoints):
        """Of whatever file: only what is restored before the start is resumed."""
        path = checkpoints / "weights.weights.h5"

        class Load(keras.callbacks.Callback):
            def on_epoch_begin(self, epoch, logs=None):
                if epoch == 1:
                    self.model.save_weights(path)
                elif epoch > 1:
                    self.model.load_weights(path)

        x, y = killed.digits()
        callback = MutualInformationLR(keep, (x, y))
        killed.make_model("network").fit(
            x, y, epochs=4, verbose=0, callbacks=[callback, Load()]
        )
        assert [r["step"] for r in callback.history] == [0, 1, 2, 3, 4]


def keep(reading):
    return reading.rate


@pytest.mark.parametrize("where", [0, 1, 3])
def test_layers_with_automatic_names(where, tmp_path):
    """Which count on in a process, and so are others after a resume."""
    x, y = killed.digits()
    shares = {0: "all", 1: ["dense.*"], 3: {"body": "dense.*"}}

    def fit(*others):
        keras.utils.set_random_seed(0)
        layers = [keras.Input((64,)), keras.layers.Dense(8), keras.layers.Dense(10)]
        model = keras.Sequential(layers)
        optimizer = keras_milr.LayerwiseOptimizer("adam", layer_decay=0.5)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(optimizer, loss)
        callback = MutualInformationLR("relative", (x, y), layers=shares[where])
        backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
        callbacks = [callback, backup, *others]
        options = {"batch_size": 64, "epochs": 4, "shuffle": False, "verbose": 0}
        model.fit(x, y, callbacks=callbacks, **options)
        return callback, list(model.optimizer.multipliers.values())

    expected = fit()
    with pytest.raises(Killed):
        fit(keras.callbacks.LambdaCallback(on_epoch_begin=end_at(2)))
    found = fit()
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-6)
    names = set(found[0]._rates.names)
    for a, b in zip(found[0].history, expected[0].history, strict=True):
        assert set(a["rate"]) == names
        np.testing.assert_allclose(
            list(a["rate"].values()), list(b["rate"].values()), rtol=1e-6
        )
