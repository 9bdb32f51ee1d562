"""What measuring costs: `fit` with the callback or the metric over `fit` without.

Trains the quickstart's small CNN on Fashion-MNIST with a constant rate and four kinds
of reading: none; the MutualInformation metric; MutualInformationLR with a probe; and
with a probe of all layers, the optimizer wrapped in a LayerwiseOptimizer. The policy
keeps the rates, so that all do the same training.

The speed of a shared machine changes from second to second. So the `fit`s of a round
take turns, a few batches each, and each is timed in its turns only: a disturbance hits
all alike. Even so a machine may stall for longer than an epoch takes, and a stall only
ever adds. So the time of an epoch is put together turn by turn, from the fastest of
each turn over the rounds (and, after the first epoch, which compiles, over the epochs).
The quartiles are those of the same sums over 1,000 bootstrap samples of the rounds and
epochs. Prints a table and writes JSON with every turn.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --samples 2000 --epochs 2 --rounds 2
"""

import argparse
import concurrent.futures
import datetime
import json
import os
import platform
import sys
import threading
import time
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import keras_milr

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import quickstart

VARIANTS = ("without", "metric", "probe", "layers")


class Turns:
    """Lets one thread run at a time, in turn."""

    def __init__(self, names):
        self.waiting = list(names)
        self.changed = threading.Condition()

    def wait(self, name):
        with self.changed:
            self.changed.wait_for(lambda: self.waiting[0] == name)

    def pass_on(self):
        with self.changed:
            self.waiting.append(self.waiting.pop(0))
            self.changed.notify_all()

    def leave(self):
        with self.changed:
            self.waiting.pop(0)
            self.changed.notify_all()


class Clock(keras.callbacks.Callback):
    """Seconds of each turn, by epoch, whatever other callbacks do in it included."""

    def __init__(self, name, turns, batches):
        super().__init__()
        self.name, self.turns, self.batches = name, turns, batches
        self.seconds = [[]]

    def start(self):
        self.turns.wait(self.name)
        self.since = time.perf_counter()

    def stop(self):
        now = time.perf_counter()
        self.seconds[-1].append(now - self.since)
        self.since = now

    def on_train_batch_end(self, batch, logs=None):
        if (batch + 1) % self.batches == 0:
            self.stop()
            self.turns.pass_on()
            self.start()

    def on_epoch_end(self, epoch, logs=None):
        self.stop()
        self.seconds.append([])

    def on_train_end(self, logs=None):
        self.seconds.pop()  # The next epoch, which never came.


def keep(reading):
    return reading.rate


def train(variant, clock, x, y, arguments):
    """One `fit` from scratch, timed by `clock`."""
    clock.start()
    try:
        keras.utils.set_random_seed(0)
        model = quickstart.build_model("cnn", x.shape[1:], "adam", 1e-3)
        metrics = [keras_milr.MutualInformation()] if variant == "metric" else []
        layers, optimizer = None, model.optimizer
        if variant == "layers":
            layers, optimizer = "all", keras_milr.LayerwiseOptimizer(optimizer)
        model.compile(
            optimizer,
            model.loss,
            metrics=["accuracy", *metrics],
            jit_compile=arguments.jit_compile,
        )
        callbacks = [clock]
        if variant in ("probe", "layers"):
            probe = keras_milr.MutualInformationLR(
                keep, (x, y), probe_size=arguments.probe_size, layers=layers
            )
            callbacks = [probe, clock]
        clock.since = time.perf_counter()
        model.fit(
            x,
            y,
            batch_size=arguments.batch_size,
            epochs=arguments.epochs,
            callbacks=callbacks,
            verbose=0,
        )
    finally:
        clock.turns.leave()


def run_round(x, y, arguments, order=VARIANTS):
    """Seconds of each turn of each epoch, by variant; the `fit`s take turns."""
    turns = Turns(order)
    clocks = {name: Clock(name, turns, arguments.turn) for name in order}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        fits = [
            pool.submit(train, name, clock, x, y, arguments)
            for name, clock in clocks.items()
        ]
        for fit in fits:
            fit.result()
    keras.backend.clear_session()
    return {name: clock.seconds for name, clock in clocks.items()}


def compare(rounds, seed=0):
    """Ratios to `fit` without: lower quartile, median, upper quartile."""
    # Shape (rounds, epochs, turns). The same resampling for all variants.
    turns = {name: np.array([r[name] for r in rounds]) for name in VARIANTS}
    count, epochs, _ = turns["without"].shape
    rng = np.random.default_rng(seed)

    def times(choose):
        first = choose(count)
        later = choose(count * (epochs - 1))
        found = {}
        for name, seconds in turns.items():
            once = np.min(seconds[first, 0], axis=0).sum()
            rest = seconds[:, 1:].reshape(-1, seconds.shape[2])[later]
            again = np.min(rest, axis=0).sum() if epochs > 1 else 0.0
            found[name] = {
                "first epoch": once,
                "later epochs": again,
                "whole fit": once + (epochs - 1) * again,
            }
        return found

    measured = times(np.arange)
    resampled = [times(lambda n: rng.integers(0, max(n, 1), n)) for _ in range(1000)]
    table = {}
    for name in VARIANTS[1:]:
        for part in ("whole fit", "first epoch", "later epochs"):
            if measured["without"][part] == 0:
                continue
            spread = [t[name][part] / t["without"][part] for t in resampled]
            low, high = np.quantile(spread, [0.25, 0.75])
            ratio = measured[name][part] / measured["without"][part]
            table[f"{name}, {part}"] = [float(v) for v in (low, ratio, high)]
    return table


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
    parser.add_argument("--turn", type=int, default=20, help="batches in a turn")
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
    # TensorFlow's own first steps, which would count as the first variant's.
    run_round(x[:640], y[:640], argparse.Namespace(**vars(arguments) | {"epochs": 1}))
    rounds = []
    bar = keras.utils.Progbar(arguments.rounds, unit_name="round")
    for i in range(arguments.rounds):
        order = np.random.default_rng(i).permutation(VARIANTS).tolist()
        rounds.append(run_round(x, y, arguments, order))
        bar.add(1)

    table = compare(rounds)
    print(f"\n{'time over `fit` without':<26} {'ratio':>7} {'quartiles':>17}")
    for name, (low, ratio, high) in table.items():
        print(f"{name:<26} {ratio:>7.3f} {low:>8.3f} … {high:.3f}")
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
