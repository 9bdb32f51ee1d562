"""Fine-tunes a pretrained network on a few samples, with a learning rate per layer.

A small CNN learns one half of Fashion-MNIST's classes and is saved. Loaded again and
given a new head, it learns the other half from a few samples, in several ways: one
rate, a cosine, a ladder of rates by hand (`layer_decay`), a frozen backbone, rates of
layers set by mutual information, and two controls of these: the same multipliers
shuffled among the layers, and their mean for all layers. What mutual information gains
over both controls is due to *where* it puts the rates. Prints a table and writes a
figure.

    python examples/finetune.py                     # 5 seeds, some minutes
    python examples/finetune.py --optimizer sgd
    python examples/finetune.py --dataset digits --seeds 2 --epochs 5   # seconds
"""

import argparse
import tempfile
from pathlib import Path

import keras
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import keras_milr

OPTIMIZERS = {
    "adam": lambda rate: keras.optimizers.Adam(rate),
    "sgd": lambda rate: keras.optimizers.SGD(rate, momentum=0.9),
}
RATES = {"adam": 1e-3, "sgd": 1e-2}


def count(text):
    """An argument that is a whole number, 1 or more."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more. Received: {text}")
    return int(text)


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--dataset", choices=("fashion_mnist", "mnist", "digits"), default=None,
        help="default: fashion_mnist where it can be had, else digits",
    )  # fmt: skip
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adam")
    parser.add_argument(
        "--learning-rate", type=float, help="default: 1e-3 for adam, 1e-2 for sgd"
    )
    parser.add_argument("--samples", type=count, default=100, help="to fine-tune on")
    parser.add_argument("--epochs", type=count, default=30)
    parser.add_argument("--batch-size", type=count, default=16)
    parser.add_argument("--pretrain-epochs", type=int, default=3)
    parser.add_argument("--seeds", type=count, default=5)
    parser.add_argument(
        "--policy", choices=("relative", "reference", "decay"), default="relative"
    )
    parser.add_argument("--output", type=Path, help="of the figure")
    arguments = parser.parse_args(arguments)
    if arguments.learning_rate is None:
        arguments.learning_rate = RATES[arguments.optimizer]
    return arguments


def load(name):
    """Name of the data, and (x, y) of training and test; digits come with sklearn."""
    if name != "digits":
        try:
            data = getattr(keras.datasets, name or "fashion_mnist").load_data()
            train, test = ((x[..., None] / np.float32(255), y) for x, y in data)
            return name or "fashion_mnist", train, test
        except Exception as error:  # What Keras raises when a download fails.
            print(
                f"{name or 'fashion_mnist'} cannot be had, so digits instead: {error}"
            )
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8, 1).astype("float32") / 16
    x, x_test, y, y_test = train_test_split(
        images, labels, test_size=0.3, stratify=labels, random_state=0
    )
    return "digits", (x, y), (x_test, y_test)


def half(data, second):
    """The samples of classes 0 to 4, or of 5 to 9, with labels from 0."""
    x, y = data
    chosen = (y >= 5) == second
    return x[chosen], y[chosen] - 5 * second


def few(data, number, seed):
    """`number` samples, as many of each class."""
    x, y = data
    rng = np.random.default_rng(seed)
    each = [rng.permutation(np.flatnonzero(y == k))[: number // 5] for k in range(5)]
    rows = rng.permutation(np.concatenate(each))
    return x[rows], y[rows]


def pretrain(train, test, epochs, path):
    """Trains a CNN on the first five classes and saves it."""
    keras.utils.set_random_seed(0)
    layers = [keras.Input(train[0].shape[1:])]
    for i, filters in enumerate((16, 32, 64), start=1):
        layers.append(
            keras.layers.Conv2D(
                filters, 3, padding="same", activation="relu", name=f"conv{i}"
            )
        )
        if i < 3:
            layers.append(keras.layers.MaxPooling2D())
    layers.append(keras.layers.Flatten())
    layers.append(keras.layers.Dense(64, activation="relu", name="hidden"))
    layers.append(keras.layers.Dense(5, activation="softmax", name="old_head"))
    model = keras.Sequential(layers)
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(*train, batch_size=128, epochs=epochs, verbose=0)
    accuracy = model.evaluate(*test, verbose=0)[1]
    print(f"Pretrained on classes 0 to 4: test accuracy {accuracy:.4f}")
    model.save(path)


def with_new_head(path, seed):
    """The saved model with a fresh last layer."""
    model = keras.models.load_model(path, compile=False)
    keras.utils.set_random_seed(seed)
    head = keras.layers.Dense(5, activation="softmax", name="head")
    return keras.Model(model.inputs, head(model.layers[-2].output))


class Recorded(keras.callbacks.Callback):
    """Keeps the multipliers that each epoch was trained with."""

    def __init__(self):
        super().__init__()
        self.multipliers = []

    def on_epoch_end(self, epoch, logs=None):
        self.multipliers.append(self.model.optimizer.multipliers)


class Replayed(keras.callbacks.Callback):
    """Trains each epoch with multipliers that were recorded in another training."""

    def __init__(self, multipliers):
        super().__init__()
        self.multipliers = multipliers

    def on_epoch_begin(self, epoch, logs=None):
        if not self.model.optimizer.built:
            self.model.optimizer.build(self.model.trainable_variables)
        self.model.optimizer.set_multipliers(self.multipliers[epoch])


def shuffled(multipliers, seed):
    """The same numbers, each at another layer, the same for all epochs."""
    names = list(multipliers[0])
    rng = np.random.default_rng(seed)
    other = rng.permutation(len(names))
    while np.any(other == np.arange(len(names))):
        other = rng.permutation(len(names))
    values = [list(m.values()) for m in multipliers]
    return [{n: v[o] for n, o in zip(names, other, strict=True)} for v in values]


def averaged(multipliers):
    """Their mean for all layers."""
    return [dict.fromkeys(m, float(np.mean(list(m.values())))) for m in multipliers]


def fine_tune(model, optimizer, train, test, arguments, seed, callbacks=()):
    """Test accuracy after `fit`, with the same batches for the same seed."""
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    keras.utils.set_random_seed(seed)
    model.fit(
        *train,
        batch_size=arguments.batch_size,
        epochs=arguments.epochs,
        callbacks=list(callbacks),
        verbose=0,
    )
    return model.evaluate(*test, batch_size=500, verbose=0)[1]


def run(path, train, test, arguments, seed, progress):
    """Accuracy of each way to fine-tune, and the multipliers of mutual information."""
    accuracy = {}

    def optimizer(rate=arguments.learning_rate):
        return OPTIMIZERS[arguments.optimizer](rate)

    def layerwise(**options):
        return keras_milr.LayerwiseOptimizer(optimizer(), **options)

    def attempt(name, optimizer, callbacks=(), freeze=False):
        model = with_new_head(path, seed)
        for layer in model.layers[:-1]:
            layer.trainable = not freeze
        accuracy[name] = fine_tune(
            model, optimizer, train, test, arguments, seed, callbacks
        )
        progress.add(1)

    steps = arguments.epochs * -(-len(train[0]) // arguments.batch_size)
    cosine = keras.optimizers.schedules.CosineDecay(arguments.learning_rate, steps)
    attempt("one rate", optimizer())
    attempt("cosine", optimizer(cosine))
    attempt("layer_decay=0.75", layerwise(layer_decay=0.75))
    attempt("layer_decay=0.5", layerwise(layer_decay=0.5))
    attempt("frozen backbone", optimizer(), freeze=True)
    recorded = Recorded()
    attempt(
        "MI, layer-wise",
        layerwise(),
        [
            keras_milr.MutualInformationLR(
                arguments.policy, probe_data=train, layers="all"
            ),
            recorded,
        ],
    )
    multipliers = recorded.multipliers
    attempt("control: shuffled", layerwise(), [Replayed(shuffled(multipliers, seed))])
    attempt("control: mean", layerwise(), [Replayed(averaged(multipliers))])
    return accuracy, multipliers


NUMBER_OF_WAYS = 8


def print_table(accuracies):
    """Mean and standard deviation; difference to one rate and its standard error."""
    print(f"\n{'':<20} {'test accuracy':>16} {'against one rate, points':>26}")
    base = np.array([a["one rate"] for a in accuracies])
    for name in accuracies[0]:
        values = np.array([a[name] for a in accuracies])
        gain = 100 * (values - base)
        spread = error = ""
        if len(values) > 1:
            spread = f"±{np.std(values, ddof=1):.4f}"
            error = f"±{np.std(gain, ddof=1) / np.sqrt(len(gain)):.2f} se"
        print(
            f"{name:<20} {np.mean(values):>9.4f} {spread:<7} "
            f"{np.mean(gain):>+13.2f} {error:<10}"
        )


def write_figure(accuracies, multipliers, title, path):
    from matplotlib import colormaps, pyplot

    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(11, 4), width_ratios=(3, 2), layout="constrained"
    )
    names = list(accuracies[0])
    for row, name in enumerate(names):
        values = [a[name] for a in accuracies]
        color = "C1" if name.startswith("MI") else "C0"
        left.plot(values, [row] * len(values), "o", color=color, alpha=0.4, mec="none")
        left.plot(np.mean(values), row, "|", color=color, ms=22, mew=3)
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    left.set_xlabel("test accuracy: a dot for each seed, and the mean")
    layers = list(multipliers[0][0])
    colors = colormaps["viridis"](np.linspace(0, 0.9, len(layers)))
    for layer, color in zip(layers, colors, strict=True):
        values = np.array([[m[layer] for m in run] for run in multipliers])
        epochs = np.arange(1, values.shape[1] + 1)
        right.plot(epochs, values.mean(axis=0), color=color, label=layer)
        right.fill_between(
            epochs, values.min(axis=0), values.max(axis=0), color=color, alpha=0.15
        )
    right.set(xlabel="epoch", ylabel="multiplier set by MI", yscale="log")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"\nFigure: {path}")


def main():
    arguments = parse_arguments()
    name, train, test = load(arguments.dataset)
    output = arguments.output
    if output is None:
        output = Path("results") / f"finetune-{name}-{arguments.optimizer}.png"
    accuracies, multipliers = [], []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pretrained.keras"
        pretrain(half(train, False), half(test, False), arguments.pretrain_epochs, path)
        title = (
            f"{name}, classes 5 to 9 from {arguments.samples} samples, "
            f"{arguments.optimizer} at {arguments.learning_rate:g}, "
            f"{arguments.epochs} epochs, {arguments.seeds} seed(s)"
        )
        print(title)
        progress = keras.utils.Progbar(
            NUMBER_OF_WAYS * arguments.seeds, unit_name="training"
        )
        for seed in range(arguments.seeds):
            samples = few(half(train, True), arguments.samples, seed)
            accuracy, rates = run(
                path, samples, half(test, True), arguments, seed, progress
            )
            accuracies.append(accuracy)
            multipliers.append(rates)
    print_table(accuracies)
    write_figure(accuracies, multipliers, title, output)


if __name__ == "__main__":
    main()
