"""The scripts run as a user runs them, in a small setting."""

import contextlib
import importlib.util
import io
import json
import os
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import keras
import numpy as np
import pytest
import tensorflow as tf
from sklearn.datasets import load_diabetes, load_digits, load_wine
from sklearn.linear_model import RidgeCV
from sklearn.metrics import r2_score
from sklearn.model_selection import train_test_split

import keras_milr

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]


class Done(NamedTuple):
    """How a script has ended, as of `subprocess.run`."""

    returncode: int | str | None
    stdout: str
    stderr: str


def run(script, *arguments):
    """A script run in this process, since to import TensorFlow takes longest."""
    path, said, complained, code = ROOT / script, io.StringIO(), io.StringIO(), 0
    keras.backend.clear_session()  # Names of layers begin anew.
    with (
        mock.patch.object(sys, "argv", [str(path), *map(str, arguments)]),
        mock.patch.object(sys, "path", [str(path.parent), *sys.path]),
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(complained),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # They are for a user to read.
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as end:
            code = end.code
    return Done(code or 0, said.getvalue(), complained.getvalue())


def run_apart(script, *arguments, **environment):
    """The same in a process of its own."""
    return subprocess.run(
        [sys.executable, ROOT / script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | environment,
        check=False,
    )


def refusal(script, *arguments):
    """What it says before it ends, at once."""
    done = run(script, *arguments)
    assert done.returncode != 0
    return f"{done.stderr}{done.returncode}"


def test_quickstart(tmp_path):
    figure = tmp_path / "figures" / "digits.png"
    done = run_apart(
        "examples/quickstart.py", "--epochs=6", "--seeds=2", "--output", figure
    )
    assert done.returncode == 0, done.stderr
    assert figure.stat().st_size > 10_000
    rows = re.findall(r"^(.{18}) +(0\.\d+) ±(0\.\d+)", done.stdout, re.MULTILINE)
    names = [name.strip() for name, *_ in rows]
    ours = ["MI, relative", "MI, reference", "MI, decay", "MI, no rate given"]
    assert names == ["constant", "ReduceLROnPlateau", *ours]
    for name, accuracy, spread in rows:
        assert float(accuracy) > 0.9, name
        assert float(spread) < 0.05


def test_quickstart_without_a_download(tmp_path):
    """Where MNIST cannot be had it says so, and shows digits."""
    done = run_apart(
        "examples/quickstart.py",
        "--dataset=mnist",
        "--epochs=1",
        "--seeds=1",
        f"--output={tmp_path / 'f.png'}",
        KERAS_HOME=str(tmp_path),
        http_proxy="http://127.0.0.1:9",
        https_proxy="http://127.0.0.1:9",
    )
    assert done.returncode == 0, done.stderr
    assert "mnist cannot be had, so digits instead" in done.stdout
    assert "digits: 1077 training" in done.stdout


def test_finetune(tmp_path):
    figure = tmp_path / "finetune.png"
    done = run(
        "examples/finetune.py",
        "--dataset=digits",
        "--pretrain-epochs=8",
        "--epochs=8",
        "--seeds=1",
        "--output",
        figure,
    )
    assert done.returncode == 0, done.stderr
    assert figure.stat().st_size > 10_000
    rows = dict(re.findall(r"^(.{20}) +(0\.\d+)", done.stdout, re.MULTILINE))
    rows = {name.strip(): float(accuracy) for name, accuracy in rows.items()}
    assert set(rows) == {
        *("one rate", "cosine", "layer_decay=0.75", "layer_decay=0.5"),
        *("frozen backbone", "MI, layer-wise", "control: shuffled", "control: mean"),
    }
    assert rows["MI, layer-wise"] > 0.6
    assert rows["one rate"] > 0.6


RETRAIN = "examples/retrain_image_classifier.py"
HELD_OUT = r"^(\S.+?) +([01]\.\d+) +0\.\d+$"


def test_retraining(tmp_path):
    """The model that it saves has the accuracy that it prints."""
    done = run(
        RETRAIN,
        *("--dataset=digits", "--samples=200", "--epochs=4", "--compare"),
        "--batch-size=8",
        f"--output={tmp_path / 'figures' / 'retrain.png'}",
        f"--saved_model={tmp_path / 'digits.keras'}",
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "figures" / "retrain.png").stat().st_size > 10_000
    found = dict(re.findall(HELD_OUT, done.stdout, re.MULTILINE))
    assert set(found) == {"MI, relative, parts", "constant rate"}
    assert re.search(r"difference: [+-]\d+\.\d+ points ± \d", done.stdout)
    model = keras.models.load_model(tmp_path / "digits.keras")
    assert isinstance(model.optimizer, keras_milr.LayerwiseOptimizer)
    images, labels = load_digits(return_X_y=True)
    images = (images * 255 / 16).reshape(-1, 8, 8, 1)
    _, x, _, y = train_test_split(images, labels, random_state=0)
    right = model.predict(x[y >= 5], verbose=0).argmax(axis=-1) == y[y >= 5] - 5
    accuracy = float(found["MI, relative, parts"])
    assert np.mean(right) == pytest.approx(accuracy, abs=1e-4)
    assert accuracy > 0.6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of noughts and ones, in colours."""
    images, labels = load_digits(n_class=2, return_X_y=True)
    path = tmp_path_factory.mktemp("images")
    for name in ("one", "nought"):
        (path / name).mkdir()
    for i, (image, label) in enumerate(zip(images[:120], labels[:120], strict=True)):
        image = np.repeat(image.reshape(8, 8, 1), 3, axis=2)
        name = ("nought", "one")[label]
        keras.utils.save_img(path / name / f"{i}.png", image * 15, scale=False)
    return path


def retrain(folder, tmp_path, *arguments):
    output = f"--output={tmp_path / 'retrain.png'}"
    done = run(RETRAIN, f"--image_dir={folder}", output, *arguments)
    assert done.returncode == 0, done.stderr
    assert "2 classes: nought, one" in done.stdout
    assert (tmp_path / "retrain.png").stat().st_size > 10_000
    ((_, accuracy),) = re.findall(HELD_OUT, done.stdout, re.MULTILINE)
    return float(accuracy)


def test_retraining_a_saved_model(folder, tmp_path):
    """Its weights are trained too: what is exported has others."""
    keras.utils.set_random_seed(0)
    features = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            keras.layers.Conv2D(8, 3, activation="relu"),
            keras.layers.Flatten(),
        ]
    )
    features.export(tmp_path / "features", verbose=False)
    accuracy = retrain(
        *(folder, tmp_path, f"--handle={tmp_path / 'features'}"),
        *("--epochs=8", "--learning-rate=0.01"),
        f"--saved_model={tmp_path / 'model'}",
    )
    assert accuracy > 0.8
    model = tf.saved_model.load(tmp_path / "model")
    x = np.zeros((4, 8, 8, 3), "float32")
    assert model.serve(x).shape == (4, 2)
    kernels = [v.numpy() for v in model.variables if v.shape == (3, 3, 3, 8)]
    assert len(kernels) == 1
    assert np.abs(kernels[0] - features.weights[0].numpy()).max() > 1e-3


def test_retraining_an_application(folder, tmp_path):
    """Without weights there are no features to speak of; it must run."""
    options = ("--handle=MobileNet", "--image-size=32", "--freeze", "--epochs=1")
    assert 0 <= retrain(folder, tmp_path, *options) <= 1


def test_retraining_a_preset(folder, tmp_path):
    keras_hub = pytest.importorskip("keras_hub")
    backbone = keras_hub.models.ResNetBackbone(
        *([64], [3], [64], [1], [1], "basic_block"), image_shape=(None, None, 3)
    )
    backbone.save_to_preset(str(tmp_path / "preset"))
    handle = f"--handle={tmp_path / 'preset'}"
    retrain(folder, tmp_path, handle, "--image-size=16", "--epochs=1")


def test_retraining_without_keras_hub(tmp_path):
    (tmp_path / "keras_hub.py").write_text("raise ImportError('not there')")
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    options = ("--handle=resnet_18_imagenet", "--dataset=digits")
    done = run_apart(RETRAIN, *options, PYTHONPATH=paths)
    assert done.returncode == 1
    assert "pip install keras-hub. (not there)" in done.stderr
    assert "Traceback" not in done.stderr


TEXT = "examples/text_classification.py"


def test_texts(tmp_path):
    """Lines of the descriptions of two data sets, to be told apart."""
    described = {"digits": load_digits().DESCR, "wine": load_wine().DESCR}
    path = tmp_path / "lines.tsv"
    with path.open("w", encoding="utf-8") as file:
        print("label\ttext", file=file)
        for name, text in described.items():
            for line in text.splitlines():
                if len(line.split()) > 2:
                    print(name, line, sep="\t", file=file)
    rows = len(path.read_text(encoding="utf-8").splitlines()) - 1
    done = run(
        TEXT,
        *(f"--text_file={path}", "--epochs=3", "--seeds=2", "--batch-size=8"),
        *("--learning-rate=0.01", f"--output={tmp_path / 'text.png'}"),
        f"--saved_model={tmp_path / 'text.keras'}",
    )
    assert done.returncode == 0, done.stderr
    assert f"lines.tsv: {rows} texts" in done.stdout
    assert (tmp_path / "text.png").stat().st_size > 10_000
    row = r"^(.{18}) +(0\.\d+) ±0\.\d+ +(0\.\d+) ±0\.\d+ +(-?\d\.\d+)$"
    found = {name.strip() for name, *_ in re.findall(row, done.stdout, re.MULTILINE)}
    assert found == {"constant", "MI, decay", "MI, no rate given"}
    assert "Classes of" in done.stdout
    model = keras.models.load_model(tmp_path / "text.keras")
    strings = tf.constant(["number of instances", "alcohol and malic acid"])
    assert model.predict(strings, verbose=0).shape == (2, 2)


def test_texts_in_a_folder(tmp_path):
    """Of any kind; five of each class are needed, and it says so."""
    for name, number in (("a", 6), ("b", 4)):
        (tmp_path / name).mkdir()
        for i in range(number):
            (tmp_path / name / f"{i}.txt").write_text(f"text {i} of {name}")
    said = refusal(TEXT, f"--text_file={tmp_path}")
    assert "each with five texts or more. Received: 2 label(s)" in said
    assert "['b']" in said


def test_texts_without_a_file(tmp_path, monkeypatch):
    """Without the UCI set it takes docstrings, the same on any machine."""
    monkeypatch.setenv("KERAS_MILR_UCI", str(tmp_path))
    output = f"--output={tmp_path / 'text.png'}"
    options = ("--epochs=1", "--seeds=1", "--batch-size=512", output)
    done = run(TEXT, *options)
    assert done.returncode == 0, done.stderr
    (number,) = re.findall(r"^docstrings: (\d+) texts", done.stdout, re.MULTILINE)
    assert int(number) > 3000
    for package in ("keras", "numpy", "scipy", "sklearn"):
        assert re.search(rf"\d{{3,}} {package}", done.stdout)


REGRESSION = "examples/tabular_regression.py"


def test_regression(tmp_path):
    """Ridge regression, which does not depend on our package, is what it says."""
    output = f"--output={tmp_path / 'regression.png'}"
    done = run(REGRESSION, "--epochs=3", "--seeds=2", "--batch-size=32", output)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "regression.png").stat().st_size > 10_000
    row = r"^(.{20}) +(-?\d\.\d+) ±"
    found = {k.strip(): float(v) for k, v in re.findall(row, done.stdout, re.MULTILINE)}
    ways = ["constant", "MI, decay", "MI, no rate given", "ridge regression"]
    assert list(found) == ways
    scores = []
    for seed in (0, 1):
        x, y = load_diabetes(return_X_y=True)  # Scaled, which ridge does not mind.
        x, test_x, y, test_y = train_test_split(x, y, test_size=0.3, random_state=seed)
        middle, width = x.mean(axis=0), x.std(axis=0)
        ridge = RidgeCV(np.logspace(-3, 3, 13)).fit((x - middle) / width, y)
        scores.append(r2_score(test_y, ridge.predict((test_x - middle) / width)))
    assert found["ridge regression"] == pytest.approx(np.mean(scores), abs=2e-3)
    # 442 samples, less those of test and validation; sqrt(n / 5) bins.
    bins = int(np.sqrt((len(y) - len(y) // 5) / 5))
    assert f"Read in {bins} bins: " in done.stdout


@pytest.mark.skipif("KERAS_MILR_UCI" not in os.environ, reason="no UCI sets")
def test_regression_on_wine(tmp_path):
    options = ("--dataset=wine", "--epochs=1", "--seeds=1", "--batch-size=512")
    done = run(REGRESSION, *options, f"--output={tmp_path / 'regression.png'}")
    assert done.returncode == 0, done.stderr
    assert "wine: 4898 samples, 1 seed(s), 11 features" in done.stdout
    assert "Read in " in done.stdout


def test_policy(tmp_path):
    """It compares itself with the built-in policy, and fails where they differ."""
    output = f"--output={tmp_path / 'policy.png'}"
    done = run("examples/custom_policy.py", "--epochs=3", "--seeds=1", output)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "policy.png").stat().st_size > 10_000
    assert done.stdout.count(": True") == 3
    assert "  reference         2.302" in done.stdout


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param(
            "tensorflow", marks=pytest.mark.supports("Models", "custom `train_step`")
        ),
        "jax",
        "torch",
    ],
)
def test_train_step(backend, tmp_path):
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    done = run_apart(
        "examples/custom_train_step.py",
        *("--epochs=3", f"--output={tmp_path / 'step.png'}"),
        KERAS_BACKEND=backend,
    )
    assert done.returncode == 0, done.stderr
    assert f"Keras on {backend}" in done.stdout
    assert (tmp_path / "step.png").stat().st_size > 10_000
    (same, difference) = re.search(
        r"the same rates (\w+), largest difference of a weight (\S+)", done.stdout
    ).groups()
    assert same == "True"
    assert float(difference) < 1e-6


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (RETRAIN, ["--image_dir=/none"], "--image-dir must be a folder. Received: /no"),
        (TEXT, ["--text_file=/none"], "--text-file does not exist. Received: /none"),
        (REGRESSION, ["--dataset=wine"], "variable KERAS_MILR_UCI names. Received: /n"),
        (
            TEXT,
            ["--saved_model=texts"],
            "--saved-model must end in .keras. Received: t",
        ),
        (TEXT, ["--words=2"], "--words must be 3 or more. Received: 2"),
        *(
            (f"examples/{name}.py", [f"--{flag}=0"], f"--{flag}: must be 1 or more")
            for name, flag in (
                *(("quickstart", "seeds"), ("quickstart", "epochs")),
                *(("text_classification", "length"), ("tabular_regression", "seeds")),
                *(("finetune", "samples"), ("retrain_image_classifier", "epochs")),
                *(("custom_policy", "seeds"), ("custom_train_step", "epochs")),
            )
        ),
        ("examples/quickstart.py", ["--seeds=x"], "invalid count value: 'x'"),
        ("examples/custom_policy.py", ["--expected=-1"], "at least 0. Received: -1.0"),
        ("examples/custom_train_step.py", ["--learning-rate=high"], "invalid rate"),
    ],
)
def test_wrong_flags(script, arguments, message, monkeypatch):
    monkeypatch.setenv("KERAS_MILR_UCI", "/none")
    assert message in refusal(script, *arguments)


def test_optimizer_step_benchmark(tmp_path):
    output = tmp_path / "step.json"
    done = run(
        "benchmarks/optimizer_step.py",
        *("--builds=2", "--rounds=2", "--steps=1", "--units=8", "--layers=2"),
        f"--output={output}",
    )
    assert done.returncode == 0, done.stderr
    ratios = json.loads(output.read_text())["ratios"]
    names = ("bare, again / bare", "layerwise / bare")
    assert {f"{o}, {n}" for o in ("SGD", "Adam", "AdamW") for n in names} <= set(ratios)


def test_overhead_benchmark(tmp_path):
    output = tmp_path / "overhead.json"
    done = run_apart(
        "benchmarks/overhead.py",
        *("--settings", "5 layers", "--dataset", "digits", "--samples", 600),
        *("--probe-size", 100, "--epochs", 3, "--rounds", 1, "--turn", 2),
        f"--output={output}",
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    assert "5 layers: layers, later epochs" in found["ratios"]
    assert 0.0 < found["first_reading_seconds"]["5 layers: layers"] < 60.0


def test_overhead_is_of_epochs_beside_each_other(monkeypatch):
    """Machines that slow down from epoch to epoch, and from round to round."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import overhead

    def spent(*epochs):
        return {"turns": [[epoch / 4, 3 * epoch / 4] for epoch in epochs]}

    rounds = [
        {"without": spent(4, 10, 20), "probe": spent(6, 11, 24)},
        {"without": spent(40, 100, 200), "probe": spent(80, 130, 280)},
    ]
    rounds[0]["probe"]["turns"][0] = [3, 3]
    later = np.quantile([1.1, 1.2, 1.3, 1.4], [0.25, 0.5, 0.75])
    found = overhead.compare(rounds)
    assert found["probe, start"] == pytest.approx([2.25, 2.5, 2.75])
    assert found["probe, first epoch"] == pytest.approx([1.625, 1.75, 1.875])
    assert found["probe, later epochs"] == pytest.approx(later)
    whole = np.quantile([41 / 34, 490 / 340], [0.25, 0.5, 0.75])
    assert found["probe, whole fit"] == pytest.approx(whole)
    assert set(overhead.compare(rounds[:1])) == {"probe, later epochs"}


def test_overhead_of_what_a_setting_does_not_have():
    said = refusal(
        *("benchmarks/overhead.py", "--settings", "5 layers", "--variants", "metric")
    )
    assert "'5 layers' has the variants ('layers',). Received: --variants ['m" in said


def test_estimators_benchmark(tmp_path):
    """It fails by itself where a value is not that of the other tools."""
    output = tmp_path / "estimators.json"
    done = run("benchmarks/estimators.py", "--quick", "--rounds=1", "--output", output)
    assert done.returncode == 0, done.stderr
    assert output.with_suffix(".png").stat().st_size > 10_000
    ratios = json.loads(output.read_text())["ratios"]
    assert "table 100,000 × 10, ours / scikit-learn" in ratios
    assert "units 10,000 × 512 × 10, ours / NumPy" in ratios
    assert "linear 2,048 × 256 × 10, ours / product" in ratios


def test_comparison_of_benchmarks(tmp_path):
    def write(folder, ratios, scores):
        path = tmp_path / folder
        path.mkdir()
        (path / "overhead.json").write_text(json.dumps({"ratios": ratios}))
        row = {"workload": "digits", "way": "auto", "rate": None}
        lines = [json.dumps(row | {"scores": [0.1, score]}) for score in scores]
        (path / "schedules.jsonl").write_text("\n".join(lines))
        return path

    spread, moved = [0.9, 1.0, 1.1], [1.2, 1.3, 1.4]
    old = {"same": spread, "slow": spread, "fast": moved}
    new = {"same": [1.12, 1.2, 1.3], "slow": moved, "fast": spread}
    before, after = write("before", old, [0.9, 0.9]), write("after", new, [0.8])
    same = run("benchmarks/compare.py", before, before)
    assert same.returncode == 0
    assert "worse" not in same.stdout
    done = run("benchmarks/compare.py", before, after)
    assert done.returncode == 1
    words = re.findall(r"^  (worse|better): ([^ ,]+)", done.stdout, re.MULTILINE)
    assert words == [("worse", "slow"), ("better", "fast"), ("worse", "digits")]


def test_schedules_benchmark_goes_on_where_it_was(tmp_path):
    output = tmp_path / "schedules.jsonl"
    done_before = {"workload": "digits", "way": "Adam", "rate": None, "seed": 0}
    output.write_text(json.dumps(done_before) + "\n")
    done = run_apart(
        *("benchmarks/schedules.py", "--workloads=digits", "--processes=1"),
        *("--ways", "Adam", "auto by accuracy", "--seeds", 0, 1),
        f"--output={output}",
    )
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in output.read_text().splitlines()]
    assert results[0] == done_before
    added = [(result["way"], result["seed"]) for result in results[1:]]
    assert added == [("Adam", 1), ("auto by accuracy", 0), ("auto by accuracy", 1)]
    for result in results[1:]:
        assert len(result["scores"]) == len(result["seconds"]) == 20
        assert result["scores"][-1] > 0.9


def test_spectral_rates(monkeypatch):
    """Noise has no low-rank part; of a matrix of rank r, r singular values are kept."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import adas

    rng = np.random.default_rng(0)
    noise = rng.normal(size=(40, 60))
    assert adas.knowledge_gain(noise) == 0
    low = 100 * sum(np.outer(rng.normal(size=40), rng.normal(size=60)) for _ in "ab")
    one, two = np.linalg.svd(noise + low, compute_uv=False)[:2]
    assert adas.knowledge_gain(noise + low) == pytest.approx((1 + two / one) / 40)
    folded = np.stack([noise + low, noise], axis=-1).reshape(4, 10, 60, 2)
    assert 0 < adas.knowledge_gain(folded) < 1

    model = keras.Sequential(
        [
            keras.Input((40,)),
            keras.layers.Dense(60, name="body"),
            keras.layers.BatchNormalization(name="norm"),
            keras.layers.Dense(3, name="head"),
        ]
    )
    model.compile(keras_milr.LayerwiseOptimizer("sgd"), "mse")
    rates = adas.SpectralRates(start=0.1, momentum=0.5)
    rates.set_model(model)
    model.optimizer.build(model.trainable_variables)
    model.get_layer("body").kernel.assign(noise)
    rates.on_train_begin()
    model.get_layer("body").kernel.assign(noise + low)
    rates.on_epoch_end(0)
    gained = adas.knowledge_gain(noise + low)
    expected = {"body": 0.05 + gained, "norm": 0.05 + gained / 2, "head": 0.05}
    found = {k: 0.1 * m for k, m in model.optimizer.multipliers.items()}
    assert found == pytest.approx(expected, rel=1e-5)


def test_schedules_report(tmp_path):
    """Against scores whose table is known: the best rate, pairs by seed, failures."""
    lines = []

    def add(way, rate, scores):
        for seed, score in enumerate(scores):
            result = {"workload": "digits", "way": way, "rate": rate, "seed": seed}
            result |= {"scores": [0.5, score], "seconds": [1.0, 2.0]}
            lines.append(json.dumps(result))

    for rate in (1e-3, 3e-3, 1e-2, 0.1, 0.3, 1.0):
        add("cosine", rate, [0.8, 0.8])
    add("cosine", 3e-2, [0.9, 0.96])
    add("auto", None, [0.92, 0.94])  # +2 and -2 points.
    add("decay", None, [0.91, 0.5])  # +1 and -46, a failure.
    path = tmp_path / "schedules.jsonl"
    path.write_text("\n".join(lines))
    done = run("benchmarks/schedules_report.py", path, f"--figures={tmp_path}")
    assert done.returncode == 0, done.stderr
    auto = (
        "| auto | +0.00 (2.00) | +0.00 | +0.00 digits | -2.00 | 1/1 | 0 | 1.0 | 0.14 |"
    )
    decay = (
        "| decay | -22.50 (23.50) | -22.50 | -22.50 digits | -46.00 | 0/1 | 1 "
        "| 2.0 | 0.14 |"
    )
    assert auto in done.stdout
    assert decay in done.stdout
    assert (tmp_path / "schedules.png").stat().st_size > 10_000
