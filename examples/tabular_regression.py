"""Predicts numbers from a table, with a learning rate set by mutual information.

Mutual information needs classes, and targets here are numbers. So the callback reads
in which of a few bins a prediction falls, and in which the target does. The bins hold
about equal numbers of samples, and there are sqrt(n / 5) of them for n samples, at
least 2 and at most 16, which is what counts of n samples can serve. The information
can reach H(bins) at most. What happens within a bin is not seen: the loss is still
the squared error of the numbers, only the rate is set by bins. A good reading needs
targets of the scale of the output, so they are standardised.

Compares a constant rate with the rate that mutual information finds and sets, and both
with ridge regression, over several splits of the data. Prints a table, writes a figure.

    python examples/tabular_regression.py                     # diabetes of scikit-learn
    python examples/tabular_regression.py --dataset wine      # UCI sets, in the folder
    python examples/tabular_regression.py --dataset housing   # KERAS_MILR_UCI
"""

import argparse
import csv
import gzip
import os
from pathlib import Path

import keras
import numpy as np
from sklearn.datasets import load_diabetes
from sklearn.linear_model import RidgeCV
from sklearn.metrics import r2_score
from sklearn.model_selection import train_test_split

import keras_milr


def count(text):
    """An argument that is a whole number, 1 or more."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more. Received: {text}")
    return int(text)


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--dataset", choices=("diabetes", "wine", "housing"), default="diabetes")
    add("--learning-rate", type=float, default=1e-3, help="the constant one (0.001)")
    add("--epochs", type=count, default=40)
    add(
        "--batch-size", type=count, default=16, help="64 is enough for wine and housing"
    )
    add("--seeds", type=count, default=5, help="number of splits and trainings (5)")
    add(
        "--output", type=Path, default=Path("results/regression.png"), help="the figure"
    )
    return parser.parse_args()


WAYS = {
    "constant": None,
    "MI, decay": {"policy": "decay"},
    "MI, no rate given": {"policy": "decay", "learning_rate": "auto"},
}


def load(name):
    """Features and targets."""
    if name == "diabetes":
        return load_diabetes(return_X_y=True, scaled=False)
    folder = Path(os.environ.get("KERAS_MILR_UCI", "uci"))
    file = {"wine": "winequality-white.csv.gz", "housing": "cal.housing.npz"}[name]
    if not (folder / file).exists():
        raise SystemExit(
            f"--dataset {name} needs the file {file} in the folder that the "
            f"environment variable KERAS_MILR_UCI names. Received: {folder}"
        )
    if name == "housing":
        data = np.load(folder / file)
        return data["x"], data["y"]
    with gzip.open(folder / file, "rt") as opened:
        # UCI's own file has ";" between columns, and their names on top.
        rows = list(csv.reader(opened.read().replace(";", ",").splitlines()))
    if rows[0][0].startswith("fixed"):
        rows = rows[1:]
    table = np.array(rows, "float64")
    return table[:, :-1], table[:, -1]


def build_model(train_x):
    normalize = keras.layers.Normalization()
    normalize.adapt(train_x)  # On what is trained on, only.
    return keras.Sequential(
        [
            keras.Input(train_x.shape[1:]),
            normalize,
            keras.layers.Dense(32, activation="relu"),
            keras.layers.Dense(32, activation="relu"),
            keras.layers.Dense(1),
        ]
    )


def run(x, y, seed, arguments, progress):
    """R² on a test set of each way, and what the figure shows."""
    x, test_x, y, test_y = train_test_split(x, y, test_size=0.3, random_state=seed)
    mean, spread = y.mean(), y.std()
    scaled = ((y - mean) / spread).astype("float32")
    x, test_x = x.astype("float32"), test_x.astype("float32")
    held = len(y) // 5  # What decides which epoch was best, in the same way for all.
    train, validation = (x[held:], scaled[held:]), (x[:held], scaled[:held])
    found, callbacks = {}, {}
    for name, information in WAYS.items():
        keras.utils.set_random_seed(seed)
        model = build_model(x)
        # "mse" and a single unit say that the targets are numbers; with a loss of your
        # own, pass `targets="continuous"` to the callback.
        model.compile(keras.optimizers.Adam(arguments.learning_rate), "mse")
        best = keras.callbacks.EarlyStopping(
            patience=arguments.epochs, restore_best_weights=True
        )
        if information is not None:
            callbacks[name] = keras_milr.MutualInformationLR(
                probe_data=train, **information
            )
        model.fit(
            *train,
            validation_data=validation,
            batch_size=arguments.batch_size,
            epochs=arguments.epochs,
            callbacks=[*list(callbacks.values())[-1:], best, progress],
            verbose=0,
        )
        found[name] = mean + spread * model.predict(test_x, verbose=0)[:, 0]
    middle, width = x.mean(axis=0), x.std(axis=0)
    ridge = RidgeCV(np.logspace(-3, 3, 13)).fit((x - middle) / width, y)
    found["ridge regression"] = ridge.predict((test_x - middle) / width)
    scores = {name: r2_score(test_y, values) for name, values in found.items()}
    return scores, callbacks, (test_y, found["MI, no rate given"], y)


def print_table(scores):
    """Mean and standard deviation; difference to the first, and its standard error."""
    constant = np.array([score["constant"] for score in scores])
    print(f"\n{'':<20} {'test R²':>16} {'against constant':>18}")
    for name in scores[0]:
        values = np.array([score[name] for score in scores])
        gain = values - constant
        spread = error = ""
        if len(values) > 1:
            spread = f"±{values.std(ddof=1):.4f}"
            error = f"±{gain.std(ddof=1) / len(gain) ** 0.5:.4f} se"
        row = f"{name:<20} {values.mean():>8.4f} {spread:<7} {gain.mean():>+10.4f}"
        print(f"{row} {error}")


def write_figure(callbacks, last, title, path):
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(
        1, 3, figsize=(13, 4), layout="constrained"
    )
    for i, name in enumerate(callbacks[0]):
        for one in callbacks:
            records = one[name].history
            label = name if one is callbacks[0] else None
            look = {"color": f"C{i}", "alpha": 0.6, "label": label}
            left.plot([r["information"] for r in records], **look)
            middle.step(range(len(records)), [r["rate"] for r in records], **look)
    left.axhline(records[-1]["entropy"], color="k", ls="--", lw=1, label="H(bins)")
    left.set(xlabel="epochs trained", ylabel="information of bins (nats)")
    left.set_ylim(0, 1.4 * records[-1]["entropy"])
    left.legend(frameon=False, loc="upper left")
    middle.set(xlabel="epochs trained", ylabel="learning rate", yscale="log")
    target, predicted, train_y = last
    bins = records[-1]["bins"]
    for edge in np.quantile(train_y, np.arange(1, bins) / bins):
        right.axhline(edge, color="0.7", lw=0.7)
        right.axvline(edge, color="0.7", lw=0.7)
    right.plot(target, predicted, "C1.", ms=4, alpha=0.5)
    right.axline((target.mean(), target.mean()), slope=1, color="k", ls=":", lw=1)
    right.set(xlabel="target (test)", ylabel="prediction")
    right.set_title(f"what is read: {bins} bins", fontsize="medium")
    for axes in (left, middle):
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"Figure: {path}")


def main():
    arguments = parse_arguments()
    x, y = load(arguments.dataset)
    title = f"{arguments.dataset}: {len(y)} samples, {arguments.seeds} seed(s)"
    print(f"{title}, {x.shape[1]} features, {arguments.epochs} epochs")
    bar = keras.utils.Progbar(
        len(WAYS) * arguments.seeds * arguments.epochs, unit_name="epoch"
    )
    progress = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: bar.add(1)
    )
    results = [run(x, y, seed, arguments, progress) for seed in range(arguments.seeds)]
    scores, callbacks, shown = zip(*results, strict=True)
    print_table(scores)
    auto = callbacks[-1]["MI, no rate given"]
    reading = auto.history[-1]
    print(
        f"Read in {reading['bins']} bins: {reading['information']:.3f} of "
        f"{reading['entropy']:.3f} nats at the end, from the rate "
        f"{auto.lr_range.best_lr:.3g} on (last seed, no rate given)."
    )
    write_figure(callbacks, shown[-1], title, arguments.output)


if __name__ == "__main__":
    main()
