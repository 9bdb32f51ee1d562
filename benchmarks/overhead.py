"""What measuring costs: `fit` with the callback or the metric over `fit` without.

Trains the quickstart's small CNN on Fashion-MNIST with a constant rate and four kinds
of reading: none; the MutualInformation metric; MutualInformationLR with a probe; and
with a probe of all layers, the optimizer wrapped in a LayerwiseOptimizer. The policy
keeps the rates, so that all do the same training.

The speed of a shared machine changes from second to second. So the `fit`s of a round,
each in a process of its own, take turns, a few batches each, and each is timed in its
turns only: a disturbance hits all alike. Even so a machine may stall for longer than
an epoch takes, and a stall only ever adds. So the time of an epoch is put together
turn by turn, from the fastest of each turn over the rounds (and, after the first
epoch, which compiles, over the epochs). The quartiles are those of the same sums over
1,000 bootstrap samples of the rounds and epochs. Prints a table and writes JSON with
every turn.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --samples 2000 --epochs 2 --rounds 2
"""

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import sys
import time
import traceback
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import keras_milr

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import quickstart

VARIANTS = ("without", "metric", "probe", "layers")


class Turns:
    """Lets one process run at a time, in turn; all take the same number of turns."""

    def __init__(self, context, names):
        self.mine = {name: context.Semaphore(0) for name in names}
        self.mine[names[0]].release()
        self.following = dict(zip(names, [*names[1:], names[0]], strict=True))

    def wait(self, name):
        self.mine[name].acquire()

    def pass_on(self, name):
        self.mine[self.following[name]].release()


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
            self.turns.pass_on(self.name)
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


def load(samples):
    (x, y), _ = keras.datasets.fashion_mnist.load_data()
    return x[:samples, ..., None].astype("float32") / 255, y[:samples]


def run_variant(name, turns, arguments, results):
    """In a process of its own: warms up, waits for its turns, sends their seconds."""
    try:
        clock = Clock(name, turns, arguments.turn)
        x, y = load(arguments.samples)
        clock.start()
        # TensorFlow's own first steps, which are no part of any variant.
        quickstart.build_model("mlp", x.shape[1:], "adam", 1e-3).fit(
            x[:640], y[:640], verbose=0
        )
        train(name, clock, x, y, arguments)
        turns.pass_on(name)
        results.put((name, clock.seconds))
    except BaseException:
        results.put((name, traceback.format_exc()))


def run_round(arguments, order):
    """Seconds of each turn of each epoch, by variant; the `fit`s take turns."""
    context = multiprocessing.get_context("spawn")
    turns, results = Turns(context, order), context.Queue()
    processes = [
        context.Process(
            target=run_variant, args=(name, turns, arguments, results), daemon=True
        )
        for name in order
    ]
    try:
        for process in processes:
            process.start()
        found = {}
        while len(found) < len(order):
            name, seconds = results.get()
            if isinstance(seconds, str):
                raise RuntimeError(f"The variant {name} failed:\n{seconds}")
            found[name] = seconds
        return found
    finally:
        for process in processes:
            process.kill()


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
        load(1)
    except Exception as error:  # What Keras raises when a download fails.
        print(f"Skipped: Fashion-MNIST is neither here nor to be had: {error}")
        return
    rounds = []
    bar = keras.utils.Progbar(arguments.rounds, unit_name="round")
    for i in range(arguments.rounds):
        order = np.random.default_rng(i).permutation(VARIANTS).tolist()
        rounds.append(run_round(arguments, order))
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
