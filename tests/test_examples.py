"""The scripts run as a user runs them, in a small setting."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_milr

ROOT = Path(__file__).resolve().parents[1]


def run(script, *arguments, **environment):
    return subprocess.run(
        [sys.executable, ROOT / script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | environment,
        check=False,
    )


def test_quickstart(tmp_path):
    figure = tmp_path / "figures" / "digits.png"
    done = run("examples/quickstart.py", "--epochs=6", "--seeds=2", "--output", figure)
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
    done = run(
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


def test_optimizer_step_benchmark(tmp_path):
    output = tmp_path / "step.json"
    done = run(
        "benchmarks/optimizer_step.py",
        "--rounds=2",
        "--steps=1",
        "--units=8",
        "--output",
        output,
    )
    assert done.returncode == 0, done.stderr
    ratios = json.loads(output.read_text())["ratios"]
    assert {"SGD, layerwise", "Adam, layerwise", "AdamW, layerwise"} <= set(ratios)


def test_overhead_benchmark(tmp_path):
    output = tmp_path / "overhead.json"
    done = run(
        "benchmarks/overhead.py",
        *("--settings", "5 layers", "--dataset", "digits", "--samples", 600),
        *("--probe-size", 100, "--epochs", 2, "--rounds", 1, "--turn", 2),
        f"--output={output}",
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    assert "5 layers: layers, later epochs" in found["ratios"]
    assert 0.0 < found["first_reading_seconds"]["5 layers: layers"] < 60.0


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
    command = ("benchmarks/schedules.py", "--workloads=digits", "--processes=1")
    for seeds in ("0",), ("0", "1"):
        done = run(
            *command,
            *("--ways", "Adam", "auto by accuracy"),
            *("--seeds", *seeds),
            f"--output={output}",
        )
        assert done.returncode == 0, done.stderr
        results = [json.loads(line) for line in output.read_text().splitlines()]
        assert len(results) == 2 * len(seeds)
    for result in results:
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
    auto = "| auto | +0.00 (2.00) | +0.00 | +0.00 digits | 1/1 | 0 | 1.0 | 0.14 |"
    decay = "| decay | -22.50 (23.50) | -22.50 | -22.50 digits | 0/1 | 1 | 2.0 | 0.14 |"
    assert auto in done.stdout
    assert decay in done.stdout
    assert (tmp_path / "schedules.png").stat().st_size > 10_000
