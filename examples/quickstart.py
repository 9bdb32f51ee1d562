"""Compares learning rates set from mutual information with a constant rate.

Trains the same network from the same seeds with a constant rate, with
ReduceLROnPlateau, with each policy of MutualInformationLR, and with a rate that
MutualInformationLR finds itself; prints one table and writes a figure.

    python examples/quickstart.py
    python examples/quickstart.py --dataset fashion_mnist --epochs 8 --seeds 1
"""

import argparse
import time
from pathlib import Path

import keras
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import keras_milr


def count(text):
    """An argument that is a whole number, 1 or more."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more. Received: {text}")
    return int(text)


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--dataset",
        choices=["digits", "mnist", "fashion_mnist"],
        default="digits",
        help="digits ships with scikit-learn; Keras downloads the others",
    )
    parser.add_argument("--model", choices=["auto", "mlp", "cnn"], default="auto")
    parser.add_argument("--epochs", type=count, default=25)
    parser.add_argument(
        "--batch-size", type=count, default=None, help="32, or 128 (cnn)"
    )
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--optimizer", default="adam")
    parser.add_argument("--seeds", type=count, default=3, help="number of repetitions")
    parser.add_argument("--output", type=Path, default=None, help="figure to write")
    return parser.parse_args()


def load_for(arguments):
    """The data, and what else depends on which data they are."""
    try:
        data = load(arguments.dataset)
    except Exception as error:  # What Keras raises when a download fails.
        print(f"{arguments.dataset} cannot be had, so digits instead: {error}")
        arguments.dataset = "digits"
        data = load(arguments.dataset)
    if arguments.model == "auto":
        arguments.model = "mlp" if arguments.dataset == "digits" else "cnn"
    if arguments.batch_size is None:
        arguments.batch_size = 32 if arguments.model == "mlp" else 128
    if arguments.output is None:
        arguments.output = Path("results") / f"quickstart-{arguments.dataset}.png"
    return data


def load(name):
    """Training, validation and test data: (x, y) each, images in [0, 1]."""
    if name == "digits":
        images, labels = load_digits(return_X_y=True)
        images = images.reshape(-1, 8, 8, 1).astype("float32") / 16
        rest, test = split(images, labels, 0.2)
        return (*split(*rest, 0.25), test)
    (x, y), (x_test, y_test) = getattr(keras.datasets, name).load_data()
    x, x_test = (a[..., None].astype("float32") / 255 for a in (x, x_test))
    return (*split(x, y, 0.1), (x_test, y_test))


def split(x, y, share):
    x, x_held, y, y_held = train_test_split(
        x, y, test_size=share, stratify=y, random_state=0
    )
    return (x, y), (x_held, y_held)


def build_model(kind, input_shape, optimizer, learning_rate):
    layers = [keras.Input(input_shape)]
    if kind == "cnn":
        for filters in (32, 64):
            layers.append(keras.layers.Conv2D(filters, 3, activation="relu"))
            layers.append(keras.layers.MaxPooling2D(padding="same"))
    layers.append(keras.layers.Flatten())
    layers.append(keras.layers.Dense(128, activation="relu"))
    layers.append(keras.layers.Dense(10, activation="softmax"))
    model = keras.Sequential(layers)
    optimizer = keras.optimizers.get(optimizer)
    optimizer.learning_rate = learning_rate
    model.compile(
        optimizer=optimizer,
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy", keras_milr.MutualInformation()],
    )
    return model


def methods(train):
    """What sets the learning rate, by name: fresh callbacks for one run."""

    def information(policy, **arguments):
        return lambda: keras_milr.MutualInformationLR(
            policy, probe_data=train, **arguments
        )

    return {
        "constant": lambda: None,
        "ReduceLROnPlateau": lambda: keras.callbacks.ReduceLROnPlateau(
            factor=0.5, patience=3
        ),
        "MI, relative": information("relative"),
        "MI, reference": information("reference"),
        "MI, decay": information("decay"),
        "MI, no rate given": information("decay", learning_rate="auto"),
    }


def run(method, seed, data, arguments, progress):
    train, validation, test = data
    keras.utils.set_random_seed(seed)
    model = build_model(
        arguments.model,
        train[0].shape[1:],
        arguments.optimizer,
        arguments.learning_rate,
    )
    callback = method()
    started = time.perf_counter()
    history = model.fit(
        *train,
        batch_size=arguments.batch_size,
        epochs=arguments.epochs,
        validation_data=validation,
        callbacks=[progress] if callback is None else [callback, progress],
        verbose=0,
    )
    seconds = time.perf_counter() - started
    scores = model.evaluate(*test, verbose=0, return_dict=True)
    constant = [arguments.learning_rate] * arguments.epochs
    return {
        "accuracy": scores["accuracy"],
        "best_epoch": int(np.argmax(history.history["val_accuracy"])) + 1,
        "seconds": seconds,
        "information": scores["mutual_information"],
        "curve": history.history["val_mutual_information"],
        "rates": history.history.get("learning_rate", constant),
    }


def print_table(results):
    print(
        f"\n{'learning rate':<18} {'test accuracy':>16} {'best epoch':>11} "
        f"{'seconds':>8} {'test MI (nats)':>15}"
    )
    for name, runs in results.items():
        columns = ("accuracy", "best_epoch", "seconds", "information")
        mean = {key: np.mean([r[key] for r in runs]) for key in columns}
        accuracies = [r["accuracy"] for r in runs]
        spread = f"±{np.std(accuracies, ddof=1):.4f}" if len(runs) > 1 else ""
        print(
            f"{name:<18} {mean['accuracy']:>9.4f} {spread:<7} "
            f"{mean['best_epoch']:>11.1f} {mean['seconds']:>8.1f} "
            f"{mean['information']:>15.3f}"
        )


def write_figure(results, entropy, arguments):
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(10, 3.8), layout="constrained"
    )
    for name, runs in results.items():
        style = ":" if name == "ReduceLROnPlateau" else "-"
        epochs = np.arange(1, len(runs[0]["curve"]) + 1)
        curves = np.array([r["curve"] for r in runs])
        (line,) = left.plot(epochs, curves.mean(axis=0), style, lw=2, label=name)
        look = {"color": line.get_color(), "alpha": 0.8}
        low, high = curves.min(axis=0), curves.max(axis=0)
        left.fill_between(epochs, low, high, **look | {"alpha": 0.15})
        for r in runs:
            right.step(epochs, r["rates"], style, where="mid", **look)
    left.axhline(entropy, color="k", ls="--", lw=1, label="H(Y)")
    left.set(xlabel="epoch", ylabel="validation MI (nats)")
    left.legend(frameon=False)
    right.set(xlabel="epoch", ylabel="learning rate", yscale="log")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{arguments.dataset}, {arguments.model}, {arguments.optimizer}, "
        f"{arguments.seeds} seed(s): mean, and range as a band"
    )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.output, dpi=120)
    print(f"\nFigure: {arguments.output}")


def main():
    arguments = parse_arguments()
    data = load_for(arguments)
    sizes = [len(labels) for _, labels in data]
    print(
        f"{arguments.dataset}: {sizes[0]} training, {sizes[1]} validation, {sizes[2]} "
        f"test samples; {arguments.model}, {arguments.optimizer} at "
        f"{arguments.learning_rate:g}, {arguments.epochs} epochs, "
        f"{arguments.seeds} seed(s)"
    )
    named = methods(data[0])
    bar = keras.utils.Progbar(
        len(named) * arguments.seeds * arguments.epochs, unit_name="epoch"
    )
    progress = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: bar.add(1)
    )
    results = {name: [] for name in named}
    for seed in range(arguments.seeds):  # Interleaved, so that times compare.
        for name, method in named.items():
            results[name].append(run(method, seed, data, arguments, progress))
    print_table(results)
    entropy = keras_milr.information.entropy(np.bincount(data[1][1]))
    write_figure(results, float(entropy), arguments)


if __name__ == "__main__":
    main()
