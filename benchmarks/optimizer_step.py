"""What a learning rate per layer costs: a training step with the wrapper over without.

Times the compiled training step of a dense network with the bare optimizer, with a
LayerwiseOptimizer around it, and with Keras' own MultiOptimizer, one optimizer for each
layer, where this Keras has it. The three take turns of a few steps, so that a
disturbance hits all alike, and the ratio is taken in each round of turns. Prints
the median and quartiles of the ratios and writes JSON.

    python benchmarks/optimizer_step.py
    python benchmarks/optimizer_step.py --rounds 3 --steps 5
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


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--units", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--steps", type=int, default=5, help="in a turn")
    parser.add_argument("--jit-compile", action="store_true")
    parser.add_argument(
        "--output", type=Path, default=Path("results/optimizer_step.json")
    )
    arguments = parser.parse_args()

    variants = {"bare": bare, "layerwise": layerwise}
    if hasattr(keras.optimizers, "MultiOptimizer"):
        variants["multi"] = multi
    rng = np.random.default_rng(0)
    x = rng.normal(size=(arguments.batch_size, 784)).astype("float32")
    y = rng.integers(0, 10, arguments.batch_size)
    seconds = {}
    bar = keras.utils.Progbar(len(OPTIMIZERS) * arguments.rounds, unit_name="round")
    for name in OPTIMIZERS:
        models = {
            key: build_model(wrap, name, arguments) for key, wrap in variants.items()
        }
        for model in models.values():
            model.train_on_batch(x, y)  # Traces and compiles.
        seconds[name] = {key: [] for key in models}
        for _ in range(arguments.rounds):
            for key in rng.permutation(list(models)).tolist():
                started = time.perf_counter()
                for _ in range(arguments.steps):
                    models[key].train_on_batch(x, y)
                seconds[name][key].append(time.perf_counter() - started)
            bar.add(1)
    ratios = {
        f"{name}, {key}": report.quartiles(np.array(turns[key]) / turns["bare"])
        for name, turns in seconds.items()
        for key in list(variants)[1:]
    }
    report.print_ratios("step over the bare optimizer", ratios)
    report.write(arguments.output, arguments, ratios, seconds=seconds)


if __name__ == "__main__":
    main()
