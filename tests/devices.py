"""Trainings on several devices, or workers, and the same on one: for test_devices.py.

    python -m tests.devices mirrored
    python -m tests.devices distribution
    python -m tests.devices worker INDEX PORT PORT FOLDER
    python -m tests.devices alone

Devices cannot be set up any more once a backend is in use, so each is a process of its
own. Prints a line of JSON.
"""

import contextlib
import json
import os
import sys
import warnings

import keras
import numpy as np
from sklearn.datasets import load_digits
from sklearn.metrics import mutual_info_score

import keras_milr
from keras_milr import probe, sampling
from tests import reference

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

SIZE, BATCH = 1280, 32
OPTIONS = {
    "network": {"learning_rate": "auto", "update_freq": 15},
    "layers": {"layers": ["body", "head"]},
    "metric": {},
    "thousands": {},  # By the metric too, of more classes than it has a table for.
    "failing": {"update_freq": 15},
}


def digits():
    x, y = load_digits(return_X_y=True)
    return (x[:SIZE] / 16).astype("float32"), y[:SIZE].astype("int32")


def make_model(kind, metric=None):
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(16, activation="relu", name="body")]
    if kind == "norm":
        layers.append(keras.layers.BatchNormalization())
    units = 1100 if kind == "thousands" else 10
    layers.append(keras.layers.Dense(units, activation="softmax", name="head"))
    if kind == "layers":
        layers.insert(0, keras.layers.Dense(16, activation="tanh", name="still"))
    model = keras.Sequential([keras.Input((64,)), *layers])
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
    if kind == "layers":
        optimizer = keras_milr.LayerwiseOptimizer(
            keras.optimizers.AdamW(0.01, weight_decay=0.1),
            multipliers={"still": 0, "body": 0.5},
        )
    metrics = [metric or keras_milr.MutualInformation()]
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=metrics)
    return model


class Poison(keras.callbacks.Callback):
    """Spoils the weights once."""

    def __init__(self, batch):
        super().__init__()
        self.left = batch

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        if self.left == 0:
            kernel = self.model.layers[-1].kernel
            kernel.assign(np.full(kernel.shape, np.nan))


def make_callbacks(kind, data):
    callback = keras_milr.MutualInformationLR(
        *("relative", None if kind in ("metric", "thousands") else data),
        probe_size=301,  # Which no number of devices divides.
        **OPTIONS[kind],
    )
    return callback, [Poison(40), callback] if kind == "failing" else [callback]


def fit(kind, scope, inside):
    """What came of a training, the model made within the scope, and `fit` as well?"""
    x, y = digits()
    with scope():
        model = make_model(kind)
    callback, callbacks = make_callbacks(kind, (x, y))
    with scope() if inside else contextlib.nullcontext():
        history = model.fit(
            *(x, y),
            validation_split=0.2,
            batch_size=BATCH,
            epochs=3,
            shuffle=False,
            verbose=0,
            callbacks=callbacks,
        )
    found = result(model, callback) | {"logs": history.history}
    found["evaluated"] = model.evaluate(x, y, verbose=0, return_dict=True)
    predicted = model.predict(x, verbose=0).argmax(axis=1)
    found["expected"] = (
        reference.fano(predicted, y, 1100)
        if kind == "thousands"
        else mutual_info_score(y, predicted)
    )
    return model, found


def result(model, callback):
    keys = ("rate", "information", "rollbacks")
    found = {key: [record[key] for record in callback.history] for key in keys}
    found["weights"] = [w.tolist() for w in model.get_weights()]
    return found


def variables(model):
    return [*model.variables, *model.optimizer.variables, *model.metrics_variables]


def replicas():
    """What differs between two devices, and what a range test changes there."""
    (cpu,) = tf.config.list_physical_devices("CPU")
    two = [tf.config.LogicalDeviceConfiguration()] * 2
    tf.config.set_logical_device_configuration(cpu, two)
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])

    def parts(variable):
        return [part.numpy() for part in variable.value.values]

    found = {}
    for kind in ("layers", "metric", "thousands", "network", "failing"):
        model, several = fit(kind, strategy.scope, inside=kind == "layers")
        found[kind] = [several, fit(kind, contextlib.nullcontext, False)[1]]
        kept = [parts(v) for v in [*model.variables, *model.optimizer.variables]]
        several["replicas"] = sorted({len(part) for part in kept})
        several["differ"] = max(float(np.max(np.abs(a - b))) for a, b in kept)

    with strategy.scope():
        model = make_model("norm")
    x, y = digits()
    model.fit(x, y, batch_size=BATCH, verbose=0)
    kept = [parts(v) for v in variables(model)]
    statistics = [v.path.split("/")[-1] for v in model.non_trainable_variables]
    differ = [
        bool(np.any(np.subtract(*parts(v)))) for v in model.non_trainable_variables
    ]
    found["statistics"] = dict(zip(statistics, differ, strict=True))
    keras_milr.lr_range_test(model, x, y, [1e-3, 1.0], 2, verbose=0)
    now = [parts(v) for v in variables(model)]
    found["traces"] = [
        v.path
        for v, before, after in zip(variables(model), kept, now, strict=True)
        if not np.array_equal(before, after)
    ]
    return found


def distributions():
    """The same on JAX, with data or weights on two devices."""
    devices = keras.distribution.list_devices()
    mesh = keras.distribution.DeviceMesh((1, 2), ("batch", "model"), devices)
    layout = keras.distribution.LayoutMap(mesh)
    layout[".*body/kernel"] = (None, "model")
    layout[".*body/bias"] = ("model",)
    kinds = {
        "DataParallel": keras.distribution.DataParallel(devices=devices),
        "ModelParallel": keras.distribution.ModelParallel(
            layout_map=layout, batch_dim_name="batch"
        ),
    }
    found = {}
    untried = ("metric", "thousands", "failing")
    for kind in OPTIONS:
        found[kind] = {"one": fit(kind, contextlib.nullcontext, False)[1]}
        for name, distribution in kinds.items():
            if name == "ModelParallel" and kind in untried:
                continue
            model, several = fit(kind, distribution.scope, inside=True)
            several["rows"] = rows_of_readings(model, distribution)
            several["sharding"] = {
                v.path.split("/", 1)[1]: list(v.value.sharding.spec)
                for v in model.trainable_variables
            }
            found[kind][name] = several
    return found


def rows_of_readings(model, distribution):
    """How many rows of a batch of the probe each device has."""
    with distribution.scope():
        sample = sampling.draw_sample(digits(), model, 301)
        x = probe.Probe(model, sample)._batches[0][0]
    (rows,) = {shard.data.shape[0] for shard in x.addressable_shards}
    return {"batch": len(x), "device": rows, "devices": len(x.addressable_shards)}


# ------------------------------------------------------------------ several workers


def by_hand(strategy, kind, data, backup=None, stop=None):
    """A training in a loop of one's own, as it must be where `fit` does not work."""
    (x, y), epochs = digits(), 3
    with strategy.scope():
        metric = keras_milr.MutualInformation()
        model = make_model(kind, metric)
        model.optimizer.build(model.trainable_variables)
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = (
        tf.data.experimental.AutoShardPolicy.DATA
    )
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH)
    dataset = strategy.experimental_distribute_dataset(dataset.with_options(options))

    def step(batch):
        x, y = batch
        with tf.GradientTape() as tape:
            p = model(x, training=True)
            loss = keras.losses.sparse_categorical_crossentropy(y, p)
            loss = tf.reduce_sum(loss) / BATCH
        gradients = tape.gradient(loss, model.trainable_variables)
        model.optimizer.apply(gradients, model.trainable_variables)
        metric.update_state(y, p)
        return loss

    @tf.function
    def train(batch):
        return strategy.reduce("SUM", strategy.run(step, args=(batch,)), axis=None)

    callback, callbacks = make_callbacks(kind, data)
    if backup is not None:
        callbacks.append(keras.callbacks.BackupAndRestore(backup))
    callbacks = keras.callbacks.CallbackList(
        callbacks, model=model, epochs=epochs, steps=len(x) // BATCH
    )
    callbacks.on_train_begin()
    for epoch in range(model._initial_epoch or 0, epochs):
        metric.reset_state()
        callbacks.on_epoch_begin(epoch)
        losses = []
        for number, batch in enumerate(dataset):
            callbacks.on_train_batch_begin(number)
            losses.append(float(train(batch)))
            callbacks.on_train_batch_end(number, {"loss": np.mean(losses)})
        callbacks.on_epoch_end(epoch, {"loss": np.mean(losses)})
        if epoch == stop:  # As if it were killed.
            return None
    callbacks.on_train_end()
    return result(model, callback)


def error_of(function):
    try:
        function()
    except ValueError as error:
        return str(error)
    return None


def plain_fit(strategy):
    with strategy.scope():
        model = make_model("metric")
    model.fit(*digits(), batch_size=BATCH, verbose=0)


def own_data(index):
    """Not the same for each worker: that of the first one counts."""
    rows = np.roll(np.arange(SIZE), 100 * index)[: 500 - 50 * index]
    return tuple(a[rows] for a in digits())


def worker(index, *ports_and_folder):
    """What came of trainings on two workers, and the errors that a user gets there."""
    *ports, folder = ports_and_folder
    cluster = {"worker": [f"127.0.0.1:{port}" for port in ports]}
    task = {"type": "worker", "index": int(index)}
    os.environ["TF_CONFIG"] = json.dumps({"cluster": cluster, "task": task})
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    data = own_data(int(index))
    found = {kind: by_hand(strategy, kind, data) for kind in ("metric", "failing")}
    backup = os.path.join(folder, index)
    by_hand(strategy, "layers", data, backup, stop=1)
    found["layers"] = by_hand(strategy, "layers", data, backup)
    found["auto"] = error_of(lambda: by_hand(strategy, "network", data))
    found["fit"] = error_of(lambda: plain_fit(strategy))
    return found


def alone():
    """The same in one process."""
    strategy, data = tf.distribute.get_strategy(), own_data(0)
    kinds = ("metric", "failing", "layers")
    return {kind: by_hand(strategy, kind, data) for kind in kinds}


RUNS = {
    "mirrored": replicas,
    "distribution": distributions,
    "worker": worker,
    "alone": alone,
}


def main(kind, *args):
    warnings.filterwarnings("ignore", "MutualInformationLR: epoch|lr_range_test: 2 ste")
    print(json.dumps(RUNS[kind](*args)))


if __name__ == "__main__":
    main(*sys.argv[1:])
