"""Trainings that are killed at random moments, and resumed until they are done.

    python -m tests.killed --kills 60

This process only imports; it forks one that trains for each start, since to import
TensorFlow takes longer than the training. The one that trains tells what it is doing
over a pipe, so that kills fall into every kind of moment. Prints a line of JSON for
each training, with its rates and those of the same training when nobody kills it.
"""

import argparse
import collections
import contextlib
import json
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
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

MOMENTS = ("epoch", "reading", "range test", "roll back", "save")


def announcing(pipe, function, moment):
    def announced(*args, **kwargs):
        os.write(pipe, bytes([MOMENTS.index(moment), _BEGIN]))
        try:
            return function(*args, **kwargs)
        finally:
            os.write(pipe, bytes([MOMENTS.index(moment), _END]))

    return announced


def start(setting, folder, output):
    """Forks a process that trains. Returns its id and the pipe that it tells on."""
    reader, pipe = os.pipe()
    process = os.fork()
    if process:
        os.close(pipe)
        return process, reader
    code = 1
    try:

        def watch(callback):
            callback._measure = announcing(pipe, callback._measure, "reading")

        callbacks.lr_range_test = announcing(
            pipe, callbacks.lr_range_test, "range test"
        )
        restore = announcing(pipe, rollback.Rollback.restore, "roll back")
        rollback.Rollback.restore = restore
        for keeper in (
            keras.callbacks.BackupAndRestore,
            keras.callbacks.ModelCheckpoint,
        ):
            keeper._save_model = announcing(pipe, keeper._save_model, "save")
        epochs = keras.callbacks.LambdaCallback(
            on_epoch_begin=lambda *_: os.write(pipe, bytes([0, _BEGIN])),
            on_epoch_end=lambda *_: os.write(pipe, bytes([0, _END])),
        )
        result = rates(*train(setting, folder, epochs, watch=watch))
        output.write_text(json.dumps(result))
        code = 0
    finally:
        sys.stdout.flush()
        os._exit(code)


def messages(reader, seconds=120):
    """(time, moment, whether it ends) as they are told, until the process is gone."""
    deadline = time.monotonic() + seconds
    while select.select([reader], [], [], max(deadline - time.monotonic(), 0))[0]:
        told = os.read(reader, 2)
        if not told:
            return
        yield time.monotonic(), MOMENTS[told[0]], told[1] == _END
    raise TimeoutError(f"a training did not end in {seconds} s")


def finish(process, reader):
    """Lets a training come to its end; how long it was in each moment."""
    durations, begun = collections.defaultdict(list), {}
    for now, moment, ends in messages(reader):
        if not ends:
            begun[moment] = now
        elif moment in begun:
            durations[moment].append(now - begun.pop(moment))
    os.close(reader)
    _, status = os.waitpid(process, 0)
    if status != 0:
        raise RuntimeError(f"a training ended with status {status}")
    return durations


def kill(process, reader, moment, number, delay):
    """Kills a training some time after the beginning of a moment.

    Returns:
        The innermost moment that it was in, or None where it came to its end before.
    """
    inside, killed, seen = [], False, 0
    for _, told, ends in messages(reader):
        if ends:
            inside = [one for one in inside if one != told]
        else:
            inside.append(told)
        if not killed and not ends and told == moment:
            seen += 1
            if seen == number:
                time.sleep(delay)
                os.kill(process, signal.SIGKILL)
                killed = True
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
    durations = finish(*start(setting, alone, output))
    expected = json.loads(output.read_text())
    output.unlink()
    shutil.rmtree(alone)
    hit = []
    while len(hit) < kills:
        moments = [m for m in MOMENTS if durations[m]]
        rare = [3 if len(durations[m]) < 3 else 1 for m in moments]
        (moment,) = rng.choices(moments, rare)
        number = rng.randint(1, min(3, len(durations[moment])))
        delay = rng.uniform(0, max(durations[moment][-3:]))
        found = kill(*start(setting, folder, output), moment, number, delay)
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


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS))
    arguments = parser.parse_args()
    rng, total = random.Random(arguments.seed), 0
    while total < arguments.kills:
        for setting in arguments.settings:
            with tempfile.TemporaryDirectory() as folder:
                each = -(-arguments.kills // len(arguments.settings))
                kills = min(each, arguments.kills - total)
                if kills == 0:
                    return
                result = run(setting, Path(folder), kills, rng)
            total += len(result["killed_in"])
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
