"""Classifies texts of your own, with a learning rate set by mutual information.

Trains a small network on word counts that it learns itself (`TextVectorization`, an
embedding, their mean), several times: at a constant rate, by a policy from the same
rate, and at a rate that mutual information finds. Prints one table, writes a figure,
and saves a model that takes strings.

    python examples/text_classification.py --text_file reviews.tsv
    python examples/text_classification.py --text_file folder --saved_model texts.keras

`--text_file` is a CSV or TSV file (also .gz) whose first two columns are label and
text, or a folder with a subfolder of text files for each label. Without it: the UCI
SMS spam collection where the environment variable KERAS_MILR_UCI names a folder that
has it, else what is there on any machine, the first sentences of docstrings in NumPy,
SciPy, scikit-learn and Keras, each to be told by its package.
"""

import argparse
import ast
import csv
import gzip
import importlib.util
import os
import re
from pathlib import Path

import keras
import numpy as np
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import train_test_split

import keras_milr

PACKAGES = ("numpy", "scipy", "sklearn", "keras")
NAMES = re.compile(r"\b(numpy|scipy|sklearn|scikit|keras|tensorflow|np|tf)\b", re.I)


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
    add("--text-file", "--text_file", type=Path, help="file or folder, see above")
    add("--words", type=count, default=4000, help="size of the vocabulary (4000)")
    add("--length", type=count, default=40, help="words of a text that are read (40)")
    add("--learning-rate", type=float, default=1e-3, help="of the first two (0.001)")
    add("--epochs", type=count, default=10)
    add("--batch-size", type=count, default=32)
    add("--seeds", type=count, default=3, help="number of repetitions (3)")
    add("--saved-model", "--saved_model", type=Path, help=".keras file to write")
    add("--output", type=Path, default=Path("results/text.png"), help="the figure")
    arguments = parser.parse_args()
    if arguments.text_file and not arguments.text_file.exists():
        parser.error(f"--text-file does not exist. Received: {arguments.text_file}")
    saved = arguments.saved_model
    if saved and saved.suffix != ".keras":  # Not after all trainings.
        parser.error(f"--saved-model must end in .keras. Received: {saved}")
    if arguments.words < 3:  # Two stand for padding and for words not among them.
        parser.error(f"--words must be 3 or more. Received: {arguments.words}")
    return arguments


# ---------------------------------------------------------------------- the data


def load_texts(path):
    """What the data are, the texts, and the label of each."""
    if path is None:
        path = Path(os.environ.get("KERAS_MILR_UCI", "uci")) / "SMSSpamCollection.gz"
        if not path.exists():
            return "docstrings", *docstrings()
    if path.is_dir():
        files = sorted(file for file in path.glob("*/*") if file.is_file())
        texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
        return path.name, texts, [file.parent.name for file in files]
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8", newline="") as file:
        if ".csv" in path.suffixes:
            rows = list(csv.reader(file))
        else:  # Quotes are quotes there.
            rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    rows = [row for row in rows if row]
    bad = next((i for i, row in enumerate(rows) if len(row) < 2), None)
    if bad is not None:
        raise SystemExit(
            f"--text-file must have a label and a text in each row. Received: row "
            f"{bad + 1} of {path}, {rows[bad]}"
        )
    if [name.lower() for name in rows[0][:2]] == ["label", "text"]:
        rows = rows[1:]
    return path.name, [row[1] for row in rows], [row[0] for row in rows]


def docstrings():
    """First sentences of docstrings, without the names that would give them away."""
    package_of = {}
    for package in PACKAGES:
        folder = Path(importlib.util.find_spec(package).origin).parent
        for file in sorted(folder.rglob("*.py")):
            if "tests" in file.parts or file.stat().st_size > 200_000:
                continue
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                    continue
                text = (ast.get_docstring(node) or "").split("\n\n")[0]
                text = " ".join(NAMES.sub(" ", text).split())
                if len(text.split()) >= 4:
                    package_of.setdefault(text, package)  # One of each.
    return list(package_of), list(package_of.values())


def prepare(texts, labels, arguments):
    """Training and test data as numbers of words, the vectorizer, and the classes."""
    classes, ids = np.unique(labels, return_inverse=True)
    rare = [str(c) for c in classes[np.bincount(ids) < 5]]
    if len(classes) < 2 or rare:
        raise SystemExit(
            "--text-file must have two labels or more, each with five texts or more. "
            f"Received: {len(classes)} label(s), with fewer: {rare[:5]}"
        )
    texts, test_texts, y, test_y = train_test_split(
        texts, ids, test_size=0.3, stratify=ids, random_state=0
    )
    # Strings are turned into numbers once, before the training, and not in each
    # reading. (A network that takes strings can be read too, on TensorFlow, where
    # strings exist. This layer has no weights: it never has a rate of its own.)
    vectorize = keras.layers.TextVectorization(
        arguments.words, output_sequence_length=arguments.length
    )
    vectorize.adapt(texts)  # On what is trained on, only.
    x, test_x = (
        keras.ops.convert_to_numpy(vectorize(np.array(part)))
        for part in (texts, test_texts)
    )
    return (x, y), (test_x, test_y), vectorize, classes


# ------------------------------------------------------------------ the training


def build_model(arguments, classes):
    return keras.Sequential(
        [
            keras.Input((arguments.length,), dtype="int32"),
            # No mask: the mean over a text without any word would be 0 / 0.
            keras.layers.Embedding(arguments.words, 16),
            keras.layers.GlobalAveragePooling1D(),
            keras.layers.Dense(32, activation="relu"),
            keras.layers.Dense(classes, activation="softmax"),
        ]
    )


def run(seed, train, test, classes, arguments, progress, **information):
    """A training; without arguments of the callback its rate is constant."""
    keras.utils.set_random_seed(seed)
    model = build_model(arguments, classes)
    model.compile(
        keras.optimizers.Adam(arguments.learning_rate),
        "sparse_categorical_crossentropy",
        metrics=["accuracy", keras_milr.MutualInformation()],
    )
    callbacks = [progress]
    if information:
        callback = keras_milr.MutualInformationLR(probe_data=train, **information)
        callbacks = [callback, progress]
    logs = model.fit(
        *train,
        validation_data=test,  # Only shown: no rate depends on it.
        batch_size=arguments.batch_size,
        epochs=arguments.epochs,
        callbacks=callbacks,
        verbose=0,
    ).history
    found = model.predict(test[0], verbose=0).argmax(axis=-1)
    return model, {
        "accuracy": np.mean(found == test[1]),
        "balanced": balanced_accuracy_score(test[1], found),
        "curve": logs["val_mutual_information"],
        "rates": logs.get(
            "learning_rate", arguments.epochs * [arguments.learning_rate]
        ),
    }


def print_table(results, entropy):
    print(
        f"\n{'learning rate':<18} {'accuracy':>16} {'balanced':>16} {'MI (nats)':>10}"
    )
    for name, runs in results.items():
        print(f"{name:<18}", end="")
        for key in ("accuracy", "balanced"):
            values = [run[key] for run in runs]
            spread = f"±{np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
            print(f" {np.mean(values):>8.4f} {spread:<7}", end="")
        print(f" {np.mean([run['curve'][-1] for run in runs]):>10.3f}")
    print(f"Of the test labels there are {entropy:.3f} nats to know, H(Y).")


def write_figure(results, entropy, title, path):
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(10, 3.8), layout="constrained"
    )
    for name, runs in results.items():
        epochs = np.arange(1, len(runs[0]["curve"]) + 1)
        curves = np.array([run["curve"] for run in runs])
        (line,) = left.plot(epochs, curves.mean(axis=0), label=name)
        band = {"color": line.get_color(), "alpha": 0.15}
        left.fill_between(epochs, curves.min(axis=0), curves.max(axis=0), **band)
        for run in runs:
            right.step(epochs, run["rates"], color=line.get_color(), where="mid")
    left.axhline(entropy, color="k", ls="--", lw=1, label="H(Y)")
    left.set(xlabel="epoch", ylabel="MI on test texts (nats)")
    left.legend(frameon=False)
    right.set(xlabel="epoch", ylabel="learning rate", yscale="log")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"Figure: {path}")


def main():
    arguments = parse_arguments()
    name, texts, labels = load_texts(arguments.text_file)
    train, test, vectorize, classes = prepare(texts, labels, arguments)
    sizes = ", ".join(
        f"{n} {c}" for c, n in zip(*np.unique(labels, return_counts=True), strict=True)
    )
    print(f"{name}: {len(texts)} texts, of which {len(test[1])} to test: {sizes}")
    ways = {
        "constant": {},
        "MI, decay": {"policy": "decay"},
        "MI, no rate given": {"policy": "decay", "learning_rate": "auto"},
    }
    total = len(ways) * arguments.seeds * arguments.epochs
    bar = keras.utils.Progbar(total, unit_name="epoch")
    progress = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: bar.add(1)
    )
    results = {way: [] for way in ways}
    for seed in range(arguments.seeds):
        for way, information in ways.items():
            model, result = run(
                seed, train, test, len(classes), arguments, progress, **information
            )
            results[way].append(result)
    entropy = float(keras_milr.information.entropy(np.bincount(test[1])))
    print_table(results, entropy)
    title = f"{name}, {arguments.seeds} seed(s): mean, and range as a band"
    write_figure(results, entropy, title, arguments.output)
    if arguments.saved_model:  # The last one, of strings.
        strings = keras.Input((), dtype="string")
        keras.Model(strings, model(vectorize(strings))).save(arguments.saved_model)
        print(f"Classes of {arguments.saved_model}: {', '.join(classes)}")


if __name__ == "__main__":
    main()
