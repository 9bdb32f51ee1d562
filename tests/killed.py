"""Trainings that are killed at random moments, and resumed until they are done.

    python -m tests.killed --kills 60

On the backend that `KERAS_BACKEND` names. This process only imports; it forks one that
trains for each start, since to import TensorFlow takes longer than the training. The
one that trains tells what it is doing over a pipe, so that kills fall into every kind
of moment. Prints a line of JSON for each training, with its rates and those of the same
training when nobody kills it; and at the end, on stderr, how much they differ at most.
"""

import argparse
import collections
import contextlib
import importlib
import itertools
import json
import math
import os
import random
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from pathlib import Path

import keras
import numpy as np
from sklearn.datasets import load_digits

import keras_milr
from keras_milr import callbacks, rollback

EPOCHS = 8
_BEGIN, _END = 0, 1


class Spoil(keras.callbacks.Callback):
    """Spoils the weights in some epochs, in the same way each time.

    Args:
        poisoned: Epochs that begin with weights that are not finite.
        disturbed: Epochs near whose end noise is added to the weights.
    """

    def __init__(self, poisoned=(), disturbed=()):
        super().__init__()
        self.poisoned = poisoned
        self.disturbed = disturbed

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch
        kernel = self.model.layers[-1].kernel
        if epoch in self.poisoned:
            kernel.assign(np.full(kernel.shape, np.nan))

    def on_train_batch_begin(self, batch, logs=None):
        if self.epoch in self.disturbed and batch == 27:  # Of 29.
            kernel = self.model.layers[-1].kernel
            noise = np.random.default_rng(self.epoch).normal(0, 0.5, kernel.shape)
            kernel.assign_add(noise.astype("float32"))


# What is trained: arguments of the callback, rate, what is spoiled when.
SETTINGS = {
    "network": ({"policy": "decay"}, 3e-3, {}),
    "layers": ({"policy": "relative", "layers": "all"}, 3e-3, {}),
    "auto": ({"learning_rate": "auto"}, 0.1, {}),
    # To the start; then to a good reading that is not the last one.
    "rollback": (
        {"policy": "relative"},
        *(2e-3, {"poisoned": (1, 6), "disturbed": (5,)}),
    ),
    "metric": ({"probe_data": None, "update_freq": 10}, 3e-3, {}),
    "batches": ({"update_freq": 10}, 3e-3, {"poisoned": (3,)}),
    "checkpoint": ({}, 3e-3, {"poisoned": (6,), "disturbed": (5,)}),
}


def by_step(rates):
    """Of `rates`: the moments of the readings, their rates, and the last."""
    steps = [(epoch, batch, count) for epoch, batch, _, count in rates["readings"]]
    values = [
        list(rate.values()) if isinstance(rate, dict) else rate
        for _, _, rate, _ in rates["readings"]
    ]
    return steps, np.array(values), np.array(rates["final"])


def largest_difference(found, expected):
    """Of two `rates`, relative; infinite for readings at other moments."""
    found, expected = by_step(found), by_step(expected)
    if found[0] != expected[0]:
        return math.inf
    pairs = zip(found[1:], expected[1:], strict=True)
    return max(float(np.max(np.abs(a / b - 1))) for a, b in pairs)


def digits():
    x, y = load_digits(return_X_y=True)
    return (x / 16).astype("float32"), y.astype("int32")


def make_model(setting):
    arguments, rate, _ = SETTINGS[setting]
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(16, activation="relu", name="hidden"),
            keras.layers.Dense(10, activation="softmax", name="head"),
        ]
    )
    optimizer = keras.optimizers.Adam(rate)
    if arguments.get("layers"):
        optimizer = keras_milr.LayerwiseOptimizer(optimizer, {"hidden": 0.5})
    metrics = [keras_milr.MutualInformation()]
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=metrics)
    return model


def last_checkpoint(folder):
    """The model of the last checkpoint that is whole, its path and its epoch."""
    for path in sorted(folder.glob("*.keras"), reverse=True):
        with contextlib.suppress(Exception):
            return keras.models.load_model(path), path, int(path.stem)
    return None, None, 0


def train(setting, folder, *others, watch=None):
    """What a user's script does: starts, or goes on with what there is.

    Args:
        setting: Key of `SETTINGS`.
        folder: Where the backup is.
        others: More callbacks.
        watch: Function of the callback, to be called before it trains.

    Returns:
        The callback and the model.
    """
    arguments, _, spoiled = SETTINGS[setting]
    x, y = digits()
    callback = keras_milr.MutualInformationLR(**({"probe_data": (x, y)} | arguments))
    model, first = None, 0
    if setting == "checkpoint":
        model, path, first = last_checkpoint(folder)
        if model is not None:
            callback.load_state(path)
        keeper = keras.callbacks.ModelCheckpoint(folder / "{epoch:02d}.keras")
    else:
        keeper = keras.callbacks.BackupAndRestore(
            folder / "backup", double_checkpoint=True
        )
    if model is None:
        model = make_model(setting)
    if watch is not None:
        watch(callback)
    model.fit(
        *(x, y),
        batch_size=64,
        epochs=EPOCHS,
        initial_epoch=first,
        shuffle=False,
        verbose=0,
        callbacks=[callback, keeper, Spoil(**spoiled), *others],
    )
    return callback, model


def rates(callback, model):
    """The rate of every reading, and the last."""
    found = [
        [r["epoch"], r["batch"], r["rate"], r["rollbacks"]] for r in callback.history
    ]
    final = float(keras.ops.convert_to_numpy(model.optimizer.learning_rate))
    if callback.layers is not None:
        final = [final * m for m in model.optimizer.multipliers.values()]
    return {"readings": found, "final": final}


# ------------------------------------------------------------------ with real kills

MOMENTS = ("epoch", "save", "reading", "range test", "roll back")
# A clock hits those that are long. The others are killed at one of the calls of
# functions that are made in them.
TIMED = MOMENTS[:2]
_MESSAGE = struct.Struct("<BBI")  # Moment, whether it ends, calls that were made in it


def announcing(pipe, function, moment, target):
    """The function, which tells when it begins and ends, and is killed in a call.

    Args:
        pipe: Where it tells.
        function: The function.
        moment: Of `MOMENTS`.
        target: Moment, which of that kind, and number of the call; or None.
    """
    number, seen = MOMENTS.index(moment), 0

    def announced(*args, **kwargs):
        nonlocal seen
        seen, calls = seen + 1, 0

        def count(frame, event, arg):
            nonlocal calls
            calls += event in ("call", "c_call")
            if (moment, seen, calls) == target:
                os.kill(os.getpid(), signal.SIGKILL)

        os.write(pipe, _MESSAGE.pack(number, _BEGIN, 0))
        if moment not in TIMED:
            sys.setprofile(count)
        try:
            return function(*args, **kwargs)
        finally:
            sys.setprofile(None)
            os.write(pipe, _MESSAGE.pack(number, _END, calls))

    return announced


def prepare():
    """What each process that is forked would do again, and more slowly."""
    # Keras imports it to save a model, on every backend.
    importlib.import_module("tensorflow")
    if keras.backend.backend() == "torch":
        import torch

        torch.set_num_threads(1)


def start(setting, folder, output, target=None):
    """Forks a process that trains. Returns its id and the pipe that it tells on."""

    def telling(function, moment):
        return announcing(pipe, function, moment, target)

    reader, pipe = os.pipe()
    process = os.fork()
    if process:
        os.close(pipe)
        return process, reader
    code = 1
    try:

        def watch(callback):
            callback._measure = telling(callback._measure, "reading")

        callbacks.lr_range_test = telling(callbacks.lr_range_test, "range test")
        rollback.Rollback.restore = telling(rollback.Rollback.restore, "roll back")
        for keeper in (
            keras.callbacks.BackupAndRestore,
            keras.callbacks.ModelCheckpoint,
        ):
            keeper._save_model = telling(keeper._save_model, "save")
        epochs = keras.callbacks.LambdaCallback(
            on_epoch_begin=lambda *_: os.write(pipe, _MESSAGE.pack(0, _BEGIN, 0)),
            on_epoch_end=lambda *_: os.write(pipe, _MESSAGE.pack(0, _END, 0)),
        )
        result = rates(*train(setting, folder, epochs, watch=watch))
        output.write_text(json.dumps(result))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def messages(reader, seconds=300):
    """Moment, whether it ends, and calls, until the process that tells is gone."""
    deadline = time.monotonic() + seconds
    while select.select([reader], [], [], max(deadline - time.monotonic(), 0))[0]:
        told = os.read(reader, _MESSAGE.size)
        if not told:
            return
        number, ends, calls = _MESSAGE.unpack(told)
        yield MOMENTS[number], ends == _END, calls
    raise TimeoutError(f"a training did not end in {seconds} s")


def finish(process, reader):
    """Lets a training come to its end.

    Returns:
        From each moment to how long it took, each time: in seconds or in calls.
    """
    lengths, begun = collections.defaultdict(list), {}
    for moment, ends, calls in messages(reader):
        if not ends:
            begun[moment] = time.monotonic()
        elif moment in begun:
            seconds = time.monotonic() - begun.pop(moment)
            lengths[moment].append(seconds if moment in TIMED else calls)
    os.close(reader)
    _, status = os.waitpid(process, 0)
    if status != 0:
        raise RuntimeError(f"a training ended with status {status}")
    return lengths


def kill(process, reader, moment, number, delay):
    """Kills a training some time after the beginning of a moment, if it has a clock.

    Returns:
        The innermost moment that it was in, or None where it came to its end before.
    """
    inside, seen = [], 0
    for told, ends, _ in messages(reader):
        if ends:
            inside = [one for one in inside if one != told]
            continue
        inside.append(told)
        seen += told == moment
        if moment in TIMED and told == moment and seen == number:
            time.sleep(delay)
            os.kill(process, signal.SIGKILL)
    os.close(reader)
    _, status = os.waitpid(process, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return inside[-1] if inside else "between"
    if status != 0:
        raise RuntimeError(f"a training ended with status {status}")
    return None


def run(setting, folder, kills, rng):
    """One training, killed so many times, and the same when nobody kills it."""
    alone, output = folder / "alone", folder / "rates.json"
    alone.mkdir()
    lengths = finish(*start(setting, alone, output))
    expected = json.loads(output.read_text())
    output.unlink()
    shutil.rmtree(alone)
    hit = []
    while len(hit) < kills:
        moments = [m for m in MOMENTS if lengths[m]]
        if not hit and moments[-1] in MOMENTS[-2:]:
            moments = moments[-1:]  # Which are rare.
        moment = rng.choice(moments)
        number = rng.randint(1, min(3, len(lengths[moment])))
        length, target = max(lengths[moment][-3:]), None
        if moment not in TIMED:
            length = lengths[moment][number - 1]  # The first one may compile.
            target = moment, number, rng.randint(1, length)
        process = start(setting, folder, output, target)
        found = kill(*process, moment, number, rng.random() * length)
        if found is None:
            break  # It came to its end.
        hit.append(found)
    if not output.exists():
        finish(*start(setting, folder, output))
    return {
        "setting": setting,
        "killed_in": hit,
        "expected": expected,
        "found": json.loads(output.read_text()),
    }


def trainings(settings, kills, rng):
    """Trains with each setting in turn, until there are so many kills."""
    total, each = 0, -(-kills // len(settings))
    for setting in itertools.cycle(settings):
        if total == kills:
            return
        with tempfile.TemporaryDirectory() as folder:
            result = run(setting, Path(folder), min(each, kills - total), rng)
        total += len(result["killed_in"])
        yield result


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS))
    arguments = parser.parse_args()
    prepare()
    rng, hit, differences = random.Random(arguments.seed), [], []
    for result in trainings(arguments.settings, arguments.kills, rng):
        print(json.dumps(result), flush=True)
        hit += result["killed_in"]
        differences.append(largest_difference(result["found"], result["expected"]))
    moments = dict(collections.Counter(hit))
    print(
        f"{keras.backend.backend()}: {len(hit)} kills {moments} in {len(differences)} "
        f"trainings; largest difference of rates {max(differences):.3g}",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
