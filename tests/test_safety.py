"""What comes from a file is data: no code, and nothing that is taken as it comes."""

import json
import os
import re
import stat
import warnings
import zipfile
import zlib

import h5py
import keras
import numpy as np
import pytest

import keras_milr
from keras_milr import MutualInformationLR, policies, state
from tests import killed

DAMAGED = r"cannot be read: it is damaged, or of an"


@keras.saving.register_keras_serializable(package="tests")
class Halved:
    """A policy of one's own, with a constant."""

    def __init__(self, factor=0.5):
        self.factor = factor

    def __call__(self, reading):
        return self.factor * reading.rate

    def get_config(self):
        return {"factor": self.factor}

    @classmethod
    def from_config(cls, config):
        return cls(**config)


@keras.saving.register_keras_serializable(package="tests")
def kept(reading):
    return reading.rate


def unregistered(reading):
    return reading.rate


class Unregistered(Halved):
    pass


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model with all that we can put into one, saved in `fit`, and a JSON state."""
    folder = tmp_path_factory.mktemp("trained")
    x, y = killed.digits()
    model = killed.make_model("layers")
    callback = MutualInformationLR(Halved(0.9), (x, y), layers="all")

    class Save(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.save(folder / "model.keras")
            callback.save_state(folder / "state.json")

    options = {"epochs": 2, "batch_size": 256, "shuffle": False, "verbose": 0}
    model.fit(x, y, callbacks=[callback, Save()], **options)
    return folder, model, callback


class TestConfigurations:
    def test_a_model_is_loaded_in_safe_mode(self, trained):
        folder, model, _ = trained
        again = keras.models.load_model(folder / "model.keras", safe_mode=True)
        assert type(again.optimizer) is keras_milr.LayerwiseOptimizer
        assert again.optimizer.multipliers == model.optimizer.multipliers
        x, y = killed.digits()
        expected = model.evaluate(x, y, verbose=0, return_dict=True)
        found = again.evaluate(x, y, verbose=0, return_dict=True)
        assert found == pytest.approx(expected, abs=1e-6)
        assert found["mutual_information"] > 0.1

    def test_a_model_has_no_code_in_it(self, trained):
        """Only classes that are registered, or Keras' own, and no pickles."""
        with zipfile.ZipFile(trained[0] / "model.keras") as archive:
            names = set(archive.namelist())
            config = json.loads(archive.read("config.json"))
            assert archive.read("model.weights.h5")[:8] == b"\x89HDF\r\n\x1a\n"
        assert names == {"metadata.json", "config.json", "model.weights.h5"}
        classes = list(classes_in(config))
        assert "keras_milr>LayerwiseOptimizer" in [name for _, name, _ in classes]
        assert "keras_milr>MutualInformation" in [name for _, name, _ in classes]
        for class_name, registered, module in classes:
            assert class_name not in ("__lambda__", "Lambda", "function")
            ours = (registered or "").startswith("keras_milr>")
            assert ours or module.split(".")[0] == "keras", class_name

    @pytest.mark.parametrize(
        "policy",
        [
            *(policies.RelativeChange(), policies.ReferenceLevel(floor=0.2)),
            *(policies.ThresholdDecay(grow_steps=0), Halved(0.7), kept, "decay"),
        ],
    )
    def test_a_callback_comes_back_from_its_configuration(self, policy, digits):
        callback = MutualInformationLR(policy, digits)
        text = json.dumps(callback.get_config())
        assert "lambda" not in text
        again = MutualInformationLR.from_config(json.loads(text), probe_data=digits)
        assert again.get_config() == callback.get_config()
        assert type(again.policy) is type(policy)

    @pytest.mark.parametrize(
        "policy", [lambda reading: reading.rate, unregistered, Unregistered()]
    )
    @pytest.mark.parametrize("name", ["policy", "reference"])
    def test_what_is_not_registered_is_no_part_of_one(self, name, policy, digits):
        callback = MutualInformationLR(probe_data=digits, **{name: policy})
        message = rf"Argument `{name}` must be registered.*Received: {name}=<"
        with warnings.catch_warnings(), pytest.raises(ValueError, match=message):
            callback.get_config()

    def test_a_lambda_in_a_foreign_configuration_is_not_run(self, digits):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            code = keras.saving.serialize_keras_object(lambda reading: reading.rate)
        assert code["class_name"] == "__lambda__"
        config = MutualInformationLR(probe_data=digits).get_config()
        with pytest.raises(ValueError, match="lambda"):
            MutualInformationLR.from_config(config | {"policy": code})


def classes_in(config):
    if isinstance(config, dict):
        if "class_name" in config:
            yield (
                *(config["class_name"], config.get("registered_name")),
                config.get("module"),
            )
        config = list(config.values())
    for one in config if isinstance(config, list) else ():
        yield from classes_in(one)


class TestFiles:
    @pytest.mark.parametrize("mask", [0o000, 0o022])
    def test_a_state_is_private(self, mask, tmp_path):
        """Also while it is written."""
        seen = []
        replace = os.replace

        def watched(old, new):
            seen.append(stat.S_IMODE(os.stat(old).st_mode))
            replace(old, new)

        before = os.umask(mask)
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(state.os, "replace", watched)
                state.write(tmp_path / "state.json", {"a": 1})
        finally:
            os.umask(before)
        assert seen == [0o600]
        assert stat.S_IMODE((tmp_path / "state.json").stat().st_mode) == 0o600
        assert os.listdir(tmp_path) == ["state.json"]

    @pytest.mark.parametrize("error", [OSError(28, "No space"), KeyboardInterrupt()])
    @pytest.mark.parametrize("where", ["_encode", "replace"])
    def test_nothing_is_left_of_a_state_that_fails(
        self, where, error, tmp_path, monkeypatch
    ):
        def fail(*args):
            raise error

        monkeypatch.setattr(state if where == "_encode" else state.os, where, fail)
        with pytest.raises(type(error)):
            state.write(tmp_path / "state.json", {"a": 1})
        assert os.listdir(tmp_path) == []

    def test_a_reading_leaves_no_temporary_file(self, tmp_path, monkeypatch, digits):
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        monkeypatch.setattr("tempfile.tempdir", None)
        callback = MutualInformationLR("relative", digits, learning_rate="auto")
        killed.make_model("network").fit(*digits, callbacks=[callback], verbose=0)
        assert os.listdir(tmp_path) == []


def signed(content) -> str:
    """As one who knows the format would forge it."""
    content = {n: v for n, v in content.items() if n != "checksum"}
    return json.dumps(content | {"checksum": zlib.crc32(json.dumps(content).encode())})


def nested(levels):
    return "[" * levels + "]" * levels


class TestForgedStates:
    @pytest.mark.parametrize(
        "text",
        [
            nested(100_000),
            '{"format": "keras_milr.state", "version": 3, "a": '
            + nested(100_000)
            + "}",
            "9" * 100_000,
            "NaN",
            "null",
            '"keras_milr.state"',
            '{"format": "keras_milr.state", "version": NaN}',
            '{"format": ["keras_milr.state"], "version": {}}',
        ],
        ids=lambda text: text[:20],
    )
    def test_json(self, text, tmp_path):
        path = tmp_path / "state.json"
        path.write_text(text)
        with pytest.raises(ValueError, match=DAMAGED):
            MutualInformationLR().load_state(path)

    def test_larger_than_any_state(self, tmp_path):
        path = tmp_path / "state.json"
        with open(path, "wb") as file:
            file.truncate(2**40)  # On disk it has nothing in it.
        with pytest.raises(ValueError, match=DAMAGED + r".*more than \d+ bytes"):
            MutualInformationLR().load_state(path)

    @pytest.mark.parametrize("value", [np.nan, -1, 1e400, "x", None, [], {}, True])
    @pytest.mark.parametrize(
        "name",
        [
            *("epoch", "first_epoch", "divided", "since_reading", "iterations"),
            *("trained",),
            *("settings", "controller", "rates", "history", "rollback", "max_lr"),
            *("lr_range", "table"),
        ],
    )
    def test_with_the_right_checksum(self, name, value, trained, tmp_path):
        """Refused when it is read or taken up, and never by another error."""
        optional = name in ("rollback", "max_lr", "lr_range", "table")
        if (value is None and optional) or (value == [] and name == "history"):
            pytest.skip("as a training without it writes it")
        if name == "table" and value == {}:
            pytest.skip("that of a metric is not read by a probe")
        self.is_refused({name: value}, trained, tmp_path)

    @pytest.mark.parametrize("value", ["x", None, {}, [[1.0]], [np.nan, 1.0]])
    @pytest.mark.parametrize(
        "name",
        [
            *("start", "peak", "previous", "latest", "best", "at_raise"),
            *("step", "rollbacks", "glide"),
        ],
    )
    def test_in_the_controller(self, name, value, trained, tmp_path):
        if name == "glide" and value is None:
            pytest.skip("as a training whose rate is not on its way writes it")
        content = json.loads((trained[0] / "state.json").read_text())["controller"]
        assert name in content
        self.is_refused({"controller": content | {name: value}}, trained, tmp_path)

    def test_epochs_in_no_parts(self, trained, tmp_path):
        self.is_refused({"divided": 0}, trained, tmp_path)

    def is_refused(self, forged, trained, tmp_path):
        content = json.loads((trained[0] / "state.json").read_text())
        path = tmp_path / "state.json"
        path.write_text(signed(content | forged))
        message = rf"{DAMAGED}|MutualInformationLR is to resume"
        with pytest.raises(ValueError, match=message):
            resume(path, trained)

    @pytest.mark.parametrize("name", ["controller", "rates", "rollback", "settings"])
    def test_of_which_an_entry_is_missing(self, name, trained, tmp_path):
        content = json.loads((trained[0] / "state.json").read_text())
        content[name] = dict(list(content[name].items())[1:])
        path = tmp_path / "state.json"
        path.write_text(signed(content))
        with pytest.raises(ValueError, match="MutualInformationLR is to resume"):
            resume(path, trained)

    def test_as_it_is_it_is_taken_up(self, trained, tmp_path):
        path = tmp_path / "state.json"
        content = json.loads((trained[0] / "state.json").read_text())
        path.write_text(signed(content))
        assert resume(path, trained) == content["history"]

    @pytest.mark.parametrize(
        "value", [b"", b"{}", nested(100_000).encode(), b"\x80\x04N.", np.ones(3) / 3]
    )
    @pytest.mark.parametrize("ending", [".weights.h5", ".keras"])
    def test_in_a_foreign_model(self, ending, value, tmp_path):
        path = tmp_path / f"model{ending}"
        weights = path if ending != ".keras" else tmp_path / "inner.h5"
        value = np.frombuffer(value, "uint8") if isinstance(value, bytes) else value
        with h5py.File(weights, "w") as file:
            file.create_group("_keras_milr/vars")["state"] = value
        if ending == ".keras":
            with zipfile.ZipFile(path, "w") as archive:
                archive.write(weights, "model.weights.h5")
        with pytest.raises(ValueError, match=DAMAGED):
            MutualInformationLR().load_state(path)

    @pytest.mark.parametrize("content", [None, b"no archive", b""])
    def test_of_a_file_that_is_no_model(self, content, tmp_path):
        path = tmp_path / "model.keras"
        if content is None:
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("config.json", "{}")
        else:
            path.write_bytes(content)
        with pytest.raises(ValueError, match=DAMAGED):
            MutualInformationLR().load_state(path)


def resume(path, trained):
    """Takes up a state with the model that it is of, and says what it brings."""
    folder, _, _ = trained
    x, y = killed.digits()
    model = keras.models.load_model(folder / "model.keras")
    callback = MutualInformationLR(Halved(0.9), (x, y), layers="all")
    callback.load_state(path)
    epoch = json.loads(path.read_text())["epoch"]
    callback.set_model(model)
    callback.set_params({"epochs": 4, "steps": 8})
    callback.on_train_begin()
    callback.on_epoch_begin(epoch if type(epoch) is int else 2)
    return callback.history


def test_no_code_is_read_from_anywhere():
    """The package unpickles and evaluates nothing."""
    folder = os.path.dirname(keras_milr.__file__)
    found = []
    for root, _, files in os.walk(folder):
        for name in files:
            if name.endswith(".py"):
                with open(os.path.join(root, name), encoding="utf-8") as file:
                    text = file.read()
                bad = r"\b(pickle|marshal|dill|joblib|allow_pickle|safe_mode)\b"
                bad += r"|(?<![\w.])(eval|exec|compile)\(|enable_unsafe"
                found += [f"{name}: {m.group()}" for m in re.finditer(bad, text)]
    assert found == []
