"""A training of very many readings of very many layers, and a metric of many samples.

    python -m tests.long_run --readings 1000 --layers 100 --samples 10000000

Prints a line for each epoch of the training, and a line of JSON for each of the two.
Memory, time and traces are compared between the readings after the first ones, in which
all is compiled, and the last ones. Times are of the processor, so that other work on
the machine disturbs them little.
"""

import argparse
import gc
import json
import os
import resource
import statistics
import sys
import time

import keras
import numpy as np

import keras_milr

TRACES = []


class Traced(keras.layers.Layer):
    """Its Python code runs only when a model is traced."""

    def call(self, x):
        TRACES.append(1)
        return x


class Watch(keras.callbacks.Callback):
    """Notes, batch by batch, what has been used by then; stands behind ours."""

    def __init__(self):
        super().__init__()
        self.times, self.memory, self.objects, self.traces = [], [], [], []

    def on_train_batch_begin(self, batch, logs=None):
        if not self.times or batch == 0:
            self._last = time.process_time()

    def on_train_batch_end(self, batch, logs=None):
        now = time.process_time()
        self.times.append(now - self._last)
        self.memory.append(resident())
        self.traces.append(len(TRACES))
        if len(self.times) % 50 == 0:
            self.objects.append(len(gc.get_objects()))
        self._last = time.process_time()


def resident() -> float:
    """Memory that the process has at present, in MiB."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            pages = int(file.read().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    except OSError:  # The most that it ever had, where the present is not told.
        unit = 2**20 if sys.platform == "darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def readings(number: int, layers: int, warm_up: int) -> dict:
    """Trains with a reading of all layers after each batch."""
    keras.utils.set_random_seed(0)
    TRACES.clear()
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(4, 8))
    y = rng.integers(0, 4, 2048)
    x = (centres[y] + rng.normal(size=(len(y), 8))).astype("float32")
    outputs = inputs = keras.Input((8,))
    for _ in range(layers - 1):
        # Deep as it is, it trains: each layer adds a little to what there is.
        dense = keras.layers.Dense(8, activation="tanh")(outputs)
        outputs = keras.layers.Add()([outputs, keras.layers.Rescaling(0.1)(dense)])
    outputs = keras.layers.Dense(4, activation="softmax")(Traced()(outputs))
    model = keras.Model(inputs, outputs)
    optimizer = keras_milr.LayerwiseOptimizer(keras.optimizers.Adam(1e-3))
    model.compile(optimizer, "sparse_categorical_crossentropy")
    callback = keras_milr.MutualInformationLR(
        "relative", (x, y), probe_size=256, layers="all", update_freq=1
    )
    watch = Watch()
    epochs, batch_size = -(-number // 64), 32  # 64 batches of 32 an epoch.
    model.fit(
        *(x, y),
        epochs=epochs,
        steps_per_epoch=64 if number >= 64 else number,
        batch_size=batch_size,
        callbacks=[callback, watch],
        verbose=2,  # A line for each epoch, of 64 readings.
    )
    part = min(100, len(watch.times) // 3)
    first = watch.times[warm_up : warm_up + part]
    last = watch.times[-part:]
    history = len(json.dumps(callback.history, default=float))
    return {
        "readings": len(callback.history),
        "layers": layers,
        "traces_after_warm_up": watch.traces[-1] - watch.traces[warm_up],
        "seconds_first": statistics.median(first),
        "seconds_last": statistics.median(last),
        "MiB_after_warm_up": watch.memory[warm_up],
        "MiB_end": watch.memory[-1],
        "objects_per_50_readings": np.diff(watch.objects).tolist(),
        "history_MiB_as_JSON": history / 2**20,
    }


def stream(samples: int, shares=(0.1,) * 10, batch: int = 100_000) -> dict:
    """Counts of the metric against those of NumPy, in integers.

    Args:
        samples: How many in all.
        shares: Of the classes among the labels.
        batch: Number of samples in each batch.
    """
    classes = len(shares)
    rng = np.random.default_rng(0)
    metric = keras_milr.MutualInformation()
    expected = np.zeros((classes + 1, classes), "int64")
    start = time.process_time()
    for _ in range(samples // batch):
        labels = rng.choice(classes, batch, p=shares)
        wrong = rng.random(batch) < 0.3
        said = np.where(wrong, rng.integers(0, classes, batch), labels)
        metric.update_state(labels, np.eye(classes, dtype="float32")[said])
        pairs = np.bincount(said * classes + labels, minlength=expected.size)
        expected += pairs.reshape(expected.shape)
    return {
        "samples": int(expected.sum()),
        "classes": classes,
        "largest_cell": int(expected.max()),
        "counts_that_differ": int(np.sum(metric.table() != expected)),
        "nats": float(metric.result()),
        "seconds": time.process_time() - start,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--readings", type=int, default=1000)
    parser.add_argument("--layers", type=int, default=100)
    parser.add_argument("--warm-up", type=int, default=50)
    parser.add_argument("--samples", type=int, default=10_000_000)
    args = parser.parse_args()
    if args.samples:
        print(json.dumps(stream(args.samples)), flush=True)
        # Most of them in one cell: a float32 counts to 16.8 million.
        print(json.dumps(stream(3 * args.samples, (0.95, 0.05))), flush=True)
    if args.readings:
        found = readings(args.readings, args.layers, args.warm_up)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
