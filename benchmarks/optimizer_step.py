"""What a learning rate per layer costs: a training step with the wrapper over without.

Times the compiled training step of a dense network with the bare optimizer, with a
LayerwiseOptimizer around it, and with Keras' own MultiOptimizer, one optimizer for each
layer, where this Keras has it. They take turns of a few steps, so that a disturbance
hits all alike, and the ratio is taken in each round of turns. Where a network lies in
memory makes a difference too, for as long as it lives; so all are built anew several
times. A second network with the bare optimizer takes turns with them: what its ratio is
off 1 is what cannot be told apart here. Prints the median ratios over the rounds, the
mean of these over the builds with its standard error, and writes JSON.

    python benchmarks/optimizer_step.py
    python benchmarks/optimizer_step.py --builds 2 --rounds 3 --steps 5
"""

import argparse
import time
from pathlib import Path

import keras
import numpy as np
import report

import keras_milr

OPTIMIZERS = {
    "SGD": lambda rate: keras.optimizers.SGD(rate, momentum=0.9),
    "Adam": keras.optimizers.Adam,
    "AdamW": keras.optimizers.AdamW,
}


PAIRS = (
    ("bare, again", "bare"),
    ("layerwise", "bare"),
    ("multi", "bare"),
    ("layerwise", "multi"),
)


def build_model(wrap, name, arguments):
    """A dense network whose optimizer is `wrap`ped, after its first step."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((784,))])
    for i in range(arguments.layers - 1):
        model.add(
            keras.layers.Dense(arguments.units, activation="relu", name=f"dense_{i}")
        )
    model.add(keras.layers.Dense(10, name="head"))
    model.compile(
        wrap(model, OPTIMIZERS[name]),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=arguments.jit_compile,
    )
    return model


def bare(model, optimizer):
    return optimizer(1e-3)


def layerwise(model, optimizer):
    return keras_milr.LayerwiseOptimizer(optimizer(1e-3), multipliers={"dense_.*": 0.5})


def multi(model, optimizer):
    parts = {
        layer.name: optimizer(1e-3 if layer.name == "head" else 5e-4)
        for layer in model.layers
    }
    return keras.optimizers.MultiOptimizer(lambda v: parts[v.path.split("/")[-2]])


def take_turns(variants, name, x, y, rng, arguments):
    """Seconds of each turn of each variant, freshly built."""
    keras.backend.clear_session()
    models = {key: build_model(wrap, name, arguments) for key, wrap in variants.items()}
    for model in models.values():
        model.train_on_batch(x, y)  # Traces and compiles.
    seconds = {key: [] for key in models}
    for _ in range(arguments.rounds):
        for key in rng.permutation(list(models)).tolist():
            started = time.perf_counter()
            for _ in range(arguments.steps):
                models[key].train_on_batch(x, y)
            seconds[key].append(time.perf_counter() - started)
    return seconds


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--units", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--builds", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=60, help="of each build")
    parser.add_argument("--steps", type=int, default=5, help="in a turn")
    parser.add_argument("--jit-compile", action="store_true")
    parser.add_argument(
        "--output", type=Path, default=Path("results/optimizer_step.json")
    )
    arguments = parser.parse_args()

    if arguments.builds < 2:
        parser.error(f"--builds must be at least 2. Received: {arguments.builds}")
    variants = {"bare": bare, "bare, again": bare, "layerwise": layerwise}
    if hasattr(keras.optimizers, "MultiOptimizer"):
        variants["multi"] = multi
    rng = np.random.default_rng(0)
    x = rng.normal(size=(arguments.batch_size, 784)).astype("float32")
    y = rng.integers(0, 10, arguments.batch_size)
    bar = keras.utils.Progbar(len(OPTIMIZERS) * arguments.builds, unit_name="build")
    seconds = {name: [] for name in OPTIMIZERS}
    for name in list(OPTIMIZERS) * arguments.builds:
        seconds[name].append(take_turns(variants, name, x, y, rng, arguments))
        bar.add(1)
    medians = {
        f"{name}, {key} / {base}": [
            float(np.median(np.array(turns[key]) / turns[base])) for turns in builds
        ]
        for name, builds in seconds.items()
        for key, base in PAIRS
        if {key, base} <= variants.keys()
    }
    width = max(map(len, medians))
    print(f"\n{'step':<{width}} {'ratio':>7} {'error':>6}")
    for name, values in medians.items():
        error = np.std(values, ddof=1) / np.sqrt(len(values))
        print(f"{name:<{width}} {np.mean(values):>7.3f} {error:>6.3f}")
    ratios = {name: report.quartiles(values) for name, values in medians.items()}
    report.write(arguments.output, arguments, ratios, medians=medians)


if __name__ == "__main__":
    main()
