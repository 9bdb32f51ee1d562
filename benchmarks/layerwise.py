r"""Does the information in layers say where learning rates belong?

Fine-tunes the pretrained CNN of `examples/finetune.py` on a few samples of three tasks:
the other five classes, with a new head (`classes`); and the same five classes with the
old head, from images that are noisy (`noise`) or inverted (`inverted`). Compares one
rate, a cosine, ladders by hand and a frozen backbone with four ways to set the rates of
layers from mutual information:

- `relative`: each layer by the relative change of its reading, `RelativeChange`;
- `groups`: the same, for the convolutions as one group and the rest as another, so that
  readings rise above their noise;
- `catch-up`: (information of the output / of the layer)², at most 1: layers below learn
  as the head catches up with what they already say;
- `source`: where information is lost. Linear readouts are fitted to each layer on the
  data of the pretraining, and read the new data once before training. A layer's
  multiplier is in proportion to what it loses of the least that the layers below had,
  beyond a noise of .05. With a new head the readouts are fitted to the new labels.
- `source-floor`: the same, but no multiplier below a tenth. It was added after the
  first five seeds had shown that layers which lose nothing must not stand still, so
  judge it by other seeds: `--first-seed 5 --ways "one rate" "source-floor"`.

Each comes with two controls: its multipliers shuffled among the layers, and their mean
for all. A way that does not beat both gains nothing by *where* it puts the rates. Every
result is appended to a file as soon as it exists, and a second start goes on from
there. All ways train the same weights on the same batches.

    python benchmarks/layerwise.py
    python benchmarks/layerwise.py --seeds 1 --epochs 2 --tasks noise --optimizers sgd
    python benchmarks/layerwise.py --first-seed 5 --ways "one rate" "layer_decay=0.75" \
        "layer_decay=0.5" source-floor
"""

import argparse
import datetime
import json
import os
import platform
import sys
import tempfile
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

import keras_milr

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import finetune

NOISE = 0.05  # of a share of information, from 100 samples
LAYERS = ("conv1", "conv2", "conv3", "hidden", "head")
FLOOR = 0.1
MI_WAYS = ("relative", "groups", "catch-up", "source", "source-floor")
WAYS = (
    *("one rate", "cosine", "layer_decay=0.75", "layer_decay=0.5", "frozen backbone"),
    *MI_WAYS,
)


def noisy(x):
    rng = np.random.default_rng(0)
    return np.clip(0.5 * x + 0.4 * rng.random(x.shape), 0, 1).astype("float32")


def inverted(x):
    return 1 - x


# Which half of the classes, what is done to the images, whether the head is new.
TASKS = {
    "classes": (True, lambda x: x, True),
    "noise": (False, noisy, False),
    "inverted": (False, inverted, False),
}


class Trial:
    """Fine-tuning on one task with one optimizer; compiled once."""

    def __init__(self, path, task, optimizer, source, train, test, arguments):
        second, transform, self.new_head = TASKS[task]
        train, test, self.source = (
            finetune.half(data, chosen)
            for data, chosen in ((train, second), (test, second), (source, False))
        )
        self.train = transform(train[0]), train[1]
        self.test = transform(test[0]), test[1]
        self.arguments = arguments
        self.rate = finetune.RATES[optimizer]
        self.model = finetune.with_new_head(path, seed=0)
        if not self.new_head:
            old = keras.models.load_model(path, compile=False).layers[-1]
            self.model.get_layer("head").set_weights(old.get_weights())
        inner = finetune.OPTIMIZERS[optimizer](self.rate)
        self.model.compile(
            keras_milr.LayerwiseOptimizer(inner),
            "sparse_categorical_crossentropy",
            metrics=["accuracy"],
        )
        self.model.optimizer.build(self.model.trainable_variables)
        self.start = [
            (v, keras.ops.convert_to_numpy(v))
            for v in (*self.model.weights, *self.model.optimizer.variables)
        ]

    def samples(self, seed):
        return finetune.few(self.train, self.arguments.samples, seed)

    def accuracy(self, seed, callbacks=()):
        """Test accuracy after training from the start."""
        for variable, value in self.start:
            variable.assign(value)
        keras.utils.set_random_seed(seed)
        head = self.model.get_layer("head")
        if self.new_head:  # Drawn anew, by a seed of the global generator.
            head.kernel.assign(head.kernel_initializer.clone()(head.kernel.shape))
        self.model.fit(
            *self.samples(seed),
            batch_size=self.arguments.batch_size,
            epochs=self.arguments.epochs,
            callbacks=list(callbacks),
            verbose=0,
        )
        return self.model.evaluate(*self.test, batch_size=500, verbose=0)[1]

    def features(self, x):
        """What a linear readout keeps of each layer."""
        outputs = [self.model.get_layer(name).output for name in LAYERS]
        outputs = keras.Model(self.model.inputs, outputs).predict(
            x, batch_size=100, verbose=0
        )
        readout = keras_milr.readouts.LinearReadout()
        return [keras.ops.convert_to_numpy(readout.features(a)) for a in outputs]

    def multipliers_by_source(self, seed):
        """What each layer loses of the information that the ones below still had."""
        for variable, value in self.start:
            variable.assign(value)
        x, y = self.samples(seed)
        old_x, old_y = finetune.few(self.source, 2500, 0)
        rows = zip(self.features(x), self.features(old_x), strict=True)
        if self.new_head:
            readout = keras_milr.readouts.LinearReadout()
            share = [readout.read(new, y, 5).accessible / np.log(5) for new, _ in rows]
            below = np.maximum.accumulate([share[0], *share[:-1]])
        else:
            share = []
            for new, old in rows:
                fitted = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")
                fitted.fit(old[::2], old_y[::2])
                before = counted(fitted.predict(old[1::2]), old_y[1::2])
                share.append(counted(fitted.predict(new), y) / before)
            below = np.minimum.accumulate([1.0, *share[:-1]])
        lost = np.maximum(below - np.array(share) - NOISE, 0.0)
        return lost / lost.max() if lost.max() > 0 else np.ones(len(lost))


def counted(predictions, labels):
    table = keras_milr.information.contingency(predictions, labels, 5, 5)
    return float(
        keras_milr.information.mutual_information(
            keras.ops.convert_to_numpy(table), "miller_madow"
        )
    )


def catch_up(reading):
    share = reading.information[-1] / np.maximum(reading.information, 1e-6)
    return reading.start_rate * np.clip(share, 0.1, 1.0) ** 2


def with_controls(way):
    return [way, f"{way}, shuffled", f"{way}, mean"] if way in MI_WAYS else [way]


def run_one(trial, way, seed, recorded):
    """Accuracy of one way; those of mutual information leave what they set."""
    epochs = trial.arguments.epochs
    by_layer = {
        "layer_decay=0.75": 0.75 ** np.arange(4, -1, -1),
        "layer_decay=0.5": 0.5 ** np.arange(4, -1, -1),
        "frozen backbone": np.array([0, 0, 0, 0, 1.0]),
    }
    base, _, control = way.partition(", ")
    if control:
        change = (
            finetune.averaged
            if control == "mean"
            else lambda m: finetune.shuffled(m, seed)
        )
        callbacks = [finetune.Replayed(change(recorded[base]))]
    elif way == "cosine":
        # As Keras' CosineDecay, which is per batch; the optimizer here has no schedule.
        callbacks = [
            keras.callbacks.LearningRateScheduler(
                lambda epoch, _: trial.rate * (1 + np.cos(np.pi * epoch / epochs)) / 2
            )
        ]
    elif way in by_layer or way.startswith("source"):
        values = by_layer.get(way)
        if values is None:
            floor = FLOOR if way == "source-floor" else 0.0
            values = np.maximum(trial.multipliers_by_source(seed), floor)
        multipliers = dict(zip(LAYERS, map(float, values), strict=True))
        recorded[way] = [multipliers] * epochs
        callbacks = [finetune.Replayed(recorded[way])]
    elif way == "one rate":
        callbacks = []
    else:
        policy = catch_up if way == "catch-up" else "relative"
        groups = {"body": "conv.", "top": ["hidden", "head"]}
        recorder = finetune.Recorded()
        callbacks = [
            keras_milr.MutualInformationLR(
                policy,
                trial.samples(seed),
                layers=groups if way == "groups" else "all",
            ),
            recorder,
        ]
        recorded[way] = recorder.multipliers
    return trial.accuracy(seed, callbacks)


def read(path):
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def print_tables(rows, tasks, optimizers, ways, seeds):
    """Mean differences in points, with their standard errors over seeds."""

    def accuracies(task, optimizer, way):
        found = {
            r["seed"]: 100 * r["accuracy"]
            for r in rows
            if (r["task"], r["optimizer"], r["way"]) == (task, optimizer, way)
        }
        return np.array([found[seed] for seed in seeds])

    def difference(values, other):
        gain = values - other
        error = np.std(gain, ddof=1) / np.sqrt(len(gain)) if len(gain) > 1 else np.nan
        return f"{np.mean(gain):+.2f} ({error:.2f})"

    for task in tasks:
        for optimizer in optimizers:
            one = accuracies(task, optimizer, "one rate")
            print(f"\n{task}, {optimizer}: one rate {np.mean(one):.2f} %")
            print(f"{'':<18}{'− one rate':>14}{'− shuffled':>14}{'− mean':>14}")
            for way in ways:
                if way == "one rate":
                    continue
                values = accuracies(task, optimizer, way)
                line = f"{way:<18}{difference(values, one):>14}"
                if way in MI_WAYS:
                    for control in ("shuffled", "mean"):
                        other = accuracies(task, optimizer, f"{way}, {control}")
                        line += f"{difference(values, other):>14}"
                print(line)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument(
        "--optimizers", nargs="+", choices=("adam", "sgd"), default=["adam", "sgd"]
    )
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--pretrain-epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument(
        "--ways",
        nargs="+",
        choices=WAYS,
        default=list(WAYS),
        help="with their controls",
    )
    parser.add_argument("--output", type=Path, default=Path("results/layerwise.jsonl"))
    arguments = parser.parse_args()

    name, train, test = finetune.load(None)
    setting = {
        "data": name,
        **{
            k: getattr(arguments, k)
            for k in ("samples", "epochs", "batch_size", "pretrain_epochs")
        },
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "versions": f"tensorflow {tf.__version__}, keras {keras.__version__}",
    }
    rows = [r for r in read(arguments.output) if setting.items() <= r.items()]
    done = {(r["task"], r["optimizer"], r["seed"], r["way"]) for r in rows}
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    # One rate is what all others are compared with.
    ways = list(dict.fromkeys(["one rate", *arguments.ways]))
    todo = {}
    for task in arguments.tasks:
        for optimizer in arguments.optimizers:
            todo[task, optimizer] = [
                (seed, way)
                for seed in seeds
                for way in ways
                if not {(task, optimizer, seed, w) for w in with_controls(way)} <= done
            ]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    bar = keras.utils.Progbar(
        sum(len(with_controls(way)) for rest in todo.values() for _, way in rest),
        unit_name="training",
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pretrained.keras"
        if any(todo.values()):
            first_half = [finetune.half(data, False) for data in (train, test)]
            finetune.pretrain(*first_half, arguments.pretrain_epochs, path)
        for (task, optimizer), rest in todo.items():
            if not rest:
                continue
            trial = Trial(path, task, optimizer, train, train, test, arguments)
            for seed, way in rest:
                recorded, found = {}, []
                for each in with_controls(way):
                    accuracy = run_one(trial, each, seed, recorded)
                    row = {"task": task, "optimizer": optimizer, "way": each}
                    row |= {"seed": seed, "accuracy": accuracy}
                    row |= {"date": datetime.date.today().isoformat()} | setting
                    found.append(row)
                    bar.add(1)
                rows.extend(found)
                with arguments.output.open("a") as file:
                    file.writelines(json.dumps(row) + "\n" for row in found)
    print_tables(rows, arguments.tasks, arguments.optimizers, ways, seeds)
    print(f"\nResults: {arguments.output}")


if __name__ == "__main__":
    main()
