"""How good a rate the range test finds: against the best of a grid, on test data.

For each data set, optimizer and seed: `lr_range_test` with its defaults, and trainings
with a cosine (by epochs) from each rate of a grid, from the rate found, and from the
rate with the most information, which the one found is a part of; all from the same
initial weights. The best of the grid is chosen on the test data, so it is
flattered. Prints a line for each case, and writes JSON with the tables.

    python benchmarks/range_test.py
    python benchmarks/range_test.py --workloads digits --seeds 1
"""

import argparse
import json
import time
from pathlib import Path

import keras
import numpy as np
from sklearn.datasets import load_digits
from workloads import UCI

import keras_milr

GRID = (1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)


def digits():
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = (x[order] / 16).astype("float32"), y[order]
    return (x[:1437], y[:1437]), (x[1437:], y[1437:]), 32, 20


def pendigits(uci):
    data = np.load(Path(uci) / "pendigits.npz")
    x, y = (data["x"] / 100).astype("float32"), data["y"].astype("int32")
    order = np.random.default_rng(0).permutation(len(x))
    x, y = x[order], y[order]
    return (x[:7494], y[:7494]), (x[7494:], y[7494:]), 32, 8


def fashion():
    (x, y), test = keras.datasets.fashion_mnist.load_data()
    scale = [(a[..., None] / 255).astype("float32") for a in (x[:10_000], test[0])]
    return (scale[0], y[:10_000]), (scale[1], test[1]), 64, 4


def mlp(shape):
    return [
        keras.Input(shape),
        keras.layers.Dense(64, activation="relu"),
        keras.layers.Dense(64, activation="relu"),
        keras.layers.Dense(10, activation="softmax"),
    ]


def cnn(shape):
    return [
        keras.Input(shape),
        keras.layers.Conv2D(12, 5, strides=2, activation="relu"),
        keras.layers.Conv2D(24, 3, strides=2, activation="relu"),
        keras.layers.Flatten(),
        keras.layers.Dense(64, activation="relu"),
        keras.layers.Dense(10, activation="softmax"),
    ]


OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.01, momentum=0.9),
    "adam": lambda: keras.optimizers.Adam(),
}


class Case:
    """One model, compiled once, that is trained again and again from a start."""

    def __init__(self, layers, optimizer, data):
        (self.x, self.y), (test_x, test_y), self.batch_size, self.epochs = data
        self.test = test_x, test_y
        self.model = keras.Sequential(layers(self.x.shape[1:]))
        self.model.compile(
            OPTIMIZERS[optimizer](),
            "sparse_categorical_crossentropy",
            metrics=["accuracy"],
        )
        self.model.optimizer.build(self.model.trainable_variables)
        self.slots = [v.numpy().copy() for v in self.model.optimizer.variables]

    def start(self, seed):
        """Initial weights of a seed, and an optimizer that has done nothing yet."""
        keras.utils.set_random_seed(seed)
        for layer in self.model.layers:
            if layer.weights:
                initial = keras.initializers.GlorotUniform()(layer.kernel.shape)
                layer.set_weights([initial, np.zeros(layer.bias.shape)])
        for variable, value in zip(
            self.model.optimizer.variables, self.slots, strict=True
        ):
            variable.assign(value)

    def find(self, seed, **arguments):
        self.start(seed)
        begin = time.perf_counter()
        found = keras_milr.lr_range_test(
            self.model,
            self.x,
            self.y,
            batch_size=self.batch_size,
            seed=seed,
            verbose=0,
            **arguments,
        )
        return found, time.perf_counter() - begin

    def accuracy(self, seed, rate):
        self.start(seed)

        def cosine(epoch, _):
            return float(rate * 0.5 * (1 + np.cos(np.pi * epoch / self.epochs)))

        self.model.fit(
            self.x,
            self.y,
            batch_size=self.batch_size,
            epochs=self.epochs,
            callbacks=[keras.callbacks.LearningRateScheduler(cosine)],
            verbose=0,
        )
        return self.model.evaluate(*self.test, batch_size=1000, verbose=0)[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = ["digits", "pendigits", "fashion"]
    parser.add_argument("--workloads", nargs="+", default=names, choices=names)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--uci", default=UCI, help="folder of UCI sets")
    parser.add_argument("--output", default="range_test.json")
    arguments = parser.parse_args()
    data = {
        "digits": digits,
        "pendigits": lambda: pendigits(arguments.uci),
        "fashion": fashion,
    }
    results = []
    for workload in arguments.workloads:
        loaded = data[workload]()
        for optimizer in OPTIMIZERS:
            case = Case(cnn if workload == "fashion" else mlp, optimizer, loaded)
            for seed in range(arguments.seeds):
                found, seconds = case.find(seed)
                grid = {rate: case.accuracy(seed, rate) for rate in GRID}
                result = {
                    "workload": workload,
                    "optimizer": optimizer,
                    "seed": seed,
                    "seconds": seconds,
                    "grid": grid,
                    "best": case.accuracy(seed, found.best_lr),
                    "peak": case.accuracy(seed, found.peak_lr),
                    "range": {
                        name: np.asarray(value).tolist()
                        for name, value in found._asdict().items()
                    },
                }
                results.append(result)
                best = max(grid, key=grid.get)
                epoch = -(-len(case.x) // case.batch_size)
                print(
                    f"{workload:9} {optimizer:4} seed {seed}: "
                    f"{found.steps / epoch:4.0%} of an epoch, {seconds:.1f} s; "
                    f"best_lr {found.best_lr:.2g}: {result['best']:.3f}; "
                    f"peak_lr {found.peak_lr:.2g}: {result['peak']:.3f}; "
                    f"grid's best {best:g}: {grid[best]:.3f}",
                    flush=True,
                )
                Path(arguments.output).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
