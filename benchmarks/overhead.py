"""What measuring costs: `fit` with the callback or the metric over `fit` without.

Trains the quickstart's small CNN on Fashion-MNIST with a constant rate and three kinds
of reading: none; the MutualInformation metric; MutualInformationLR with a probe. The
policy keeps the rate, so that all do the same training. The runs are interleaved, in
another order each time; a ratio compares the runs of one round, and the median over
rounds is reported with its range. Prints a table and writes JSON.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --samples 2000 --epochs 2 --rounds 2
"""

import argparse
import datetime
import json
import os
import platform
import sys
import time
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import keras_milr

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import quickstart

VARIANTS = ("without", "metric", "probe")


class EpochTimer(keras.callbacks.Callback):
    """Seconds of each epoch, whatever other callbacks do in it included."""

    def on_train_begin(self, logs=None):
        self.last = time.perf_counter()
        self.seconds = []

    def on_epoch_end(self, epoch, logs=None):
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now


def keep(reading):
    return reading.rate


def train(variant, x, y, arguments):
    """One `fit` from scratch: its seconds in all, and by epoch."""
    keras.backend.clear_session()
    keras.utils.set_random_seed(0)
    model = quickstart.build_model("cnn", x.shape[1:], "adam", 1e-3)
    metrics = [keras_milr.MutualInformation()] if variant == "metric" else []
    model.compile(
        model.optimizer,
        model.loss,
        metrics=["accuracy", *metrics],
        jit_compile=arguments.jit_compile,
    )
    timer = EpochTimer()
    callbacks = [timer]
    if variant == "probe":
        probe = keras_milr.MutualInformationLR(
            keep, probe_data=(x, y), probe_size=arguments.probe_size
        )
        callbacks = [probe, timer]
    started = time.perf_counter()
    model.fit(
        x,
        y,
        batch_size=arguments.batch_size,
        epochs=arguments.epochs,
        callbacks=callbacks,
        verbose=0,
    )
    return {"fit": time.perf_counter() - started, "epochs": timer.seconds}


def ratios(rounds, variant, value):
    return [value(r[variant]) / value(r["without"]) for r in rounds]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--samples", type=int, default=60_000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--probe-size", type=int, default=2048)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--jit-compile", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("results/overhead.json"))
    arguments = parser.parse_args()

    try:
        (x, y), _ = keras.datasets.fashion_mnist.load_data()
    except Exception as error:  # What Keras raises when a download fails.
        print(f"Skipped: Fashion-MNIST is neither here nor to be had: {error}")
        return
    x = x[: arguments.samples, ..., None].astype("float32") / 255
    y = y[: arguments.samples]
    rounds = []
    bar = keras.utils.Progbar(arguments.rounds * len(VARIANTS), unit_name="fit")
    train("probe", x[:2560], y[:2560], arguments)  # TensorFlow's own first steps
    for i in range(arguments.rounds):
        order = np.random.default_rng(i).permutation(VARIANTS)
        rounds.append({})
        for variant in order:
            rounds[-1][str(variant)] = train(variant, x, y, arguments)
            bar.add(1)

    measures = {
        "fit, all of it": lambda run: run["fit"],
        "steady epochs": lambda run: sum(run["epochs"][1:]),
    }
    print(f"\n{'time over `fit` without':<26} {'median':>8} {'range':>18}")
    table = {}
    for variant in VARIANTS[1:]:
        for name, value in measures.items():
            if name == "steady epochs" and arguments.epochs < 2:
                continue
            found = ratios(rounds, variant, value)
            table[f"{variant}, {name}"] = found
            print(
                f"{variant + ', ' + name:<26} {np.median(found):>8.3f} "
                f"{min(found):>9.3f} … {max(found):.3f}"
            )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(
        json.dumps(
            {
                "date": datetime.date.today().isoformat(),
                "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
                "versions": {"tensorflow": tf.__version__, "keras": keras.__version__},
                "arguments": vars(arguments) | {"output": str(arguments.output)},
                "rounds": rounds,
                "ratios": table,
            },
            indent=1,
        )
    )
    print(f"\nJSON: {arguments.output}")


if __name__ == "__main__":
    main()
