"""What measuring costs: `fit` with the callback or the metric over `fit` without.

Trains on Fashion-MNIST with a constant rate and up to six kinds of reading: none; the
MutualInformation metric; MutualInformationLR with a probe; with a probe that is read at
the quarters of the first epoch too, as the default policy asks for; or in the middle of
all epochs; and with a probe of all layers, the optimizer wrapped in a
LayerwiseOptimizer. The policy keeps the rates, so that all do the same training. A
second `fit` without readings shows what cannot be told apart. The settings differ in
the model (the quickstart's small CNN; the same with batch normalisation, which is read
by its batches and by its averages; or dense networks of 5, 20 and 100 layers) and in
how `fit` compiles and runs its steps.

The speed of a shared machine changes from second to second. So the `fit`s of a round,
each in a process of its own, take turns, a few batches each, and each is timed in its
turns only: a disturbance hits all alike. On a GPU a turn should be an epoch, by
`--turn 0`. What is compared is an epoch of a round with the same one without readings,
whose turns were next to its own: the median of these ratios counts, and their
quartiles. A process is a percent or two faster than another of the same code for as
long as it lives: the fastest turns of all rounds, say, tell that of the luckiest
process. Rounds tell more than epochs.

Prints tables and writes JSON with every turn: ratios of time, also of the first turn
(`start`), in which nearly all is traced and compiled; seconds from the start of `fit`
until the first reading is done, before the first batch; and the memory that the process
holds at the end beyond that of the `fit` without.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --settings cnn --epochs 10
    KERAS_BACKEND=jax python benchmarks/overhead.py --quick
"""

import argparse
import multiprocessing
import sys
import time
import traceback
from pathlib import Path

import keras
import numpy as np
import report

import keras_milr

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import quickstart

# What `fit` is given, and the kinds of reading to compare with none.
SETTINGS = {
    "cnn": ({}, ("without, again", "metric", "probe", "early", "batches", "layers")),
    "normalised cnn": ({}, ("without, again", "probe", "early", "layers")),
    "cnn, jit_compile": ({"jit_compile": True}, ("metric", "probe", "layers")),
    "cnn, steps_per_execution=4": (
        {"steps_per_execution": 4},
        ("metric", "probe", "layers"),
    ),
    "5 layers": ({}, ("layers",)),
    "20 layers": ({}, ("layers",)),
    "100 layers": ({}, ("layers",)),
}
PER_EPOCH = 5  # readings of the variant `batches`


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


class EpochClock(keras.callbacks.Callback):
    """Seconds of each epoch, whatever other callbacks do in it included: a turn each.

    It has no hook for batches: with one, Keras waits for the device after each of them.
    """

    def __init__(self, name, turns):
        super().__init__()
        self.name, self.turns = name, turns
        self.seconds = [[]]

    def start(self):
        self.turns.wait(self.name)
        self.since = time.perf_counter()

    def stop(self):
        now = time.perf_counter()
        self.seconds[-1].append(now - self.since)
        self.since = now

    def yield_turn(self):
        self.turns.pass_on(self.name)
        self.start()

    def on_epoch_end(self, epoch, logs=None):
        self.stop()
        self.seconds.append([])
        self.yield_turn()

    def on_train_end(self, logs=None):
        self.seconds.pop()  # The next epoch, which never came.


class BatchClock(EpochClock):
    """The same of turns of a few batches."""

    def __init__(self, name, turns, batches):
        super().__init__(name, turns)
        self.batches = batches

    def on_train_batch_end(self, batch, logs=None):
        last = min(batch + 1, self.params["steps"])
        if last // self.batches > self.done:  # Several steps may be done at once.
            self.done = last // self.batches
            self.stop()
            self.yield_turn()

    def on_epoch_begin(self, epoch, logs=None):
        self.done = 0


class Timed(keras_milr.MutualInformationLR):
    """Keeps the seconds that pass until the first reading is done."""

    before_training = 0.0

    def on_train_begin(self, logs=None):
        started = time.perf_counter()
        super().on_train_begin(logs)
        self.before_training += time.perf_counter() - started

    def on_epoch_begin(self, epoch, logs=None):
        started = time.perf_counter()
        super().on_epoch_begin(epoch, logs)
        if len(self.history) == 1:
            self.before_training += time.perf_counter() - started


def keep_rates(early_readings):
    """A policy that only reads, as often within the first epoch as it is told to."""

    def policy(reading):
        return reading.rate

    policy.early_readings = early_readings
    return policy


def build_model(setting, input_shape):
    kind = setting.split(",")[0]
    if kind.endswith("cnn"):
        model = quickstart.build_model("cnn", input_shape, "adam", 1e-3)
        return normalised(model) if kind == "normalised cnn" else model
    layers = [keras.layers.Input(input_shape), keras.layers.Flatten()]
    for _ in range(int(kind.split()[0]) - 1):
        layers.append(keras.layers.Dense(64, activation="relu"))
    model = keras.Sequential([*layers, keras.layers.Dense(10, activation="softmax")])
    model.compile("adam", "sparse_categorical_crossentropy")
    return model


def normalised(model):
    """The same with batch normalisation after each convolution."""
    layers = [keras.layers.Input(model.input_shape[1:])]
    for layer in model.layers:
        layers.append(layer)
        if isinstance(layer, keras.layers.Conv2D):
            layers.append(keras.layers.BatchNormalization())
    result = keras.Sequential(layers)
    result.compile("adam", model.loss)
    return result


def train(setting, variant, clock, x, y, arguments):
    """One `fit` from scratch, timed by `clock`; its callback, or None."""
    keras.utils.set_random_seed(0)
    model = build_model(setting, x.shape[1:])
    metrics = [keras_milr.MutualInformation()] if variant == "metric" else []
    layers, optimizer = None, model.optimizer
    if variant == "layers":
        layers, optimizer = "all", keras_milr.LayerwiseOptimizer(optimizer)
    # JAX trains that way or not compiled at all.
    options = {"jit_compile": keras.backend.backend() == "jax", **SETTINGS[setting][0]}
    model.compile(optimizer, model.loss, metrics=["accuracy", *metrics], **options)
    callback = None
    if variant in ("probe", "early", "batches", "layers"):
        batches = -(-len(x) // arguments.batch_size)
        callback = Timed(
            *(keep_rates(3 if variant == "early" else 0), (x, y)),
            *(arguments.probe_size, layers),
            update_freq=batches // PER_EPOCH if variant == "batches" else "epoch",
        )
    clock.since = time.perf_counter()
    model.fit(
        **training_data(x, y, arguments.batch_size),
        epochs=arguments.epochs,
        callbacks=[callback, clock] if callback else [clock],
        verbose=0,
    )
    return callback


def training_data(x, y, batch_size):
    """Arguments of `fit`: on TensorFlow a dataset that shuffles as Keras' own does.

    At the end of an epoch tf.data waits for the thread that tunes its buffers, which
    may sleep for as long as the epoch has lasted: a stall of seconds that has nothing
    to do with what is measured. Without tuning there is no such thread.
    """
    if keras.backend.backend() != "tensorflow":
        return {"x": x, "y": y, "batch_size": batch_size}
    import tensorflow as tf

    options = tf.data.Options()
    options.autotune.enabled = False
    x, y = tf.convert_to_tensor(x), tf.convert_to_tensor(y)
    rows = tf.data.Dataset.range(len(x)).shuffle(len(x)).batch(batch_size)
    batches = rows.map(lambda i: (tf.gather(x, i), tf.gather(y, i))).prefetch(2)
    return {"x": batches.with_options(options), "shuffle": False}  # Done above.


def load(name, samples):
    if name == "digits":
        (x, y), *_ = quickstart.load(name)
    else:
        (x, y), _ = getattr(keras.datasets, name).load_data()
        x = x[..., None].astype("float32") / 255
    return x[:samples], y[:samples]


def run_variant(setting, name, turns, arguments, results):
    """In a process of its own: warms up, waits for its turns, sends what it found."""
    try:
        clock = EpochClock(name, turns)
        if arguments.turn:
            clock = BatchClock(name, turns, arguments.turn)
        x, y = load(arguments.dataset, arguments.samples)
        clock.start()
        # The backend's own first steps, which are no part of any variant.
        quickstart.build_model("mlp", x.shape[1:], "adam", 1e-3).fit(
            x[:640], y[:640], verbose=0
        )
        callback = train(setting, name, clock, x, y, arguments)
        turns.pass_on(name)
        found = {"turns": clock.seconds, "bytes": report.memory()}
        found["first reading"] = callback.before_training if callback else None
        results.put((name, found))
    except BaseException:
        results.put((name, traceback.format_exc()))


def run_round(setting, order, arguments):
    """What each variant found: seconds of each turn of each epoch, and more."""
    context = multiprocessing.get_context("spawn")
    turns, results = Turns(context, order), context.Queue()
    processes = [
        context.Process(
            target=run_variant,
            args=(setting, name, turns, arguments, results),
            daemon=True,
        )
        for name in order
    ]
    try:
        for process in processes:
            process.start()
        found = {}
        while len(found) < len(order):
            name, result = results.get()
            if isinstance(result, str):
                raise RuntimeError(f"The variant {name} failed:\n{result}")
            found[name] = result
        return found
    finally:
        for process in processes:
            process.kill()


def compare(rounds):
    """Ratios to `fit` without: lower quartile, median, upper quartile.

    Of what was done once there is no spread, and no ratio.
    """
    # Seconds of each epoch, shape (rounds, epochs).
    seconds = {
        name: np.array([[sum(epoch) for epoch in r[name]["turns"]] for r in rounds])
        for name in rounds[0]
    }
    starts = {
        name: np.array([r[name]["turns"][0][0] for r in rounds]) for name in seconds
    }
    base = seconds.pop("without")
    table = {}
    for name, taken in seconds.items():
        ratios = {
            "start": starts[name] / starts["without"],
            "whole fit": taken.sum(axis=1) / base.sum(axis=1),
            "first epoch": taken[:, 0] / base[:, 0],
            "later epochs": (taken / base)[:, 1:].ravel(),
        }
        for part, values in ratios.items():
            if values.size > 1:
                quartiles = np.quantile(values, [0.25, 0.5, 0.75])
                table[f"{name}, {part}"] = [float(v) for v in quartiles]
    return table


def extras(rounds):
    """Medians over rounds: seconds to the first reading, bytes beyond `without`."""
    seconds, held = {}, {}
    for name in rounds[0].keys() - {"without"}:
        if rounds[0][name]["first reading"] is not None:
            seconds[name] = float(np.median([r[name]["first reading"] for r in rounds]))
        if rounds[0][name]["bytes"] is not None:
            beyond = [r[name]["bytes"] - r["without"]["bytes"] for r in rounds]
            held[name] = float(np.median(beyond))
    return seconds, held


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=[*SETTINGS])
    every = {name for _, variants in SETTINGS.values() for name in variants}
    parser.add_argument(
        *("--variants",),
        nargs="+",
        choices=sorted(every),
        default=sorted(every),
        help="kinds of reading, of those that a setting has",
    )
    parser.add_argument("--dataset", default="fashion_mnist")
    parser.add_argument("--samples", type=int, default=60_000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--probe-size", type=int, default=2048)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        *("--turn",),
        type=int,
        default=20,
        help="batches in a turn; 0 for an epoch, so that a GPU is not waited for",
    )
    parser.add_argument(
        "--quick", action="store_true", help="the CNN on digits, one round"
    )
    parser.add_argument("--output", type=Path, default=Path("results/overhead.json"))
    arguments = parser.parse_args()
    for setting in arguments.settings:
        if not set(SETTINGS[setting][1]) & {*arguments.variants}:
            parser.error(
                f"--settings {setting!r} has the variants {SETTINGS[setting][1]}. "
                f"Received: --variants {arguments.variants}"
            )
    if arguments.quick:
        vars(arguments).update(settings=["cnn"], dataset="digits", batch_size=32)
        vars(arguments).update(turn=10, rounds=1)

    try:
        load(arguments.dataset, 1)
    except Exception as error:  # What Keras raises when a download fails.
        print(f"Skipped: {arguments.dataset} is neither here nor to be had: {error}")
        return
    rounds = {setting: [] for setting in arguments.settings}
    bar = keras.utils.Progbar(arguments.rounds * len(rounds), unit_name="round")
    for i in range(arguments.rounds):
        for setting, done in rounds.items():
            chosen = [n for n in SETTINGS[setting][1] if n in arguments.variants]
            names = ["without", *chosen]
            order = np.random.default_rng(i).permutation(names).tolist()
            done.append(run_round(setting, order, arguments))
            bar.add(1)

    ratios, first, held = {}, {}, {}
    for setting, done in rounds.items():
        for name, ratio in sorted(compare(done).items()):
            ratios[f"{setting}: {name}"] = ratio
        for found, values in zip((first, held), extras(done), strict=True):
            found.update({f"{setting}: {k}": v for k, v in sorted(values.items())})
    report.print_ratios("time over `fit` without", ratios)
    print("\nseconds until the first reading is done, before the first batch")
    for name, value in first.items():
        print(f"{name:<40} {value:>8.2f}")
    print("\nMB that the process holds at the end beyond `fit` without")
    for name, value in held.items():
        print(f"{name:<40} {value / 1e6:>8.1f}")
    report.write(
        *(arguments.output, arguments, ratios),
        first_reading_seconds=first,
        held_bytes=held,
        rounds=rounds,
    )


if __name__ == "__main__":
    main()
