"""Real data and small networks to compare learning rates on.

Whatever is chosen, a policy, a constant, is chosen on those for tuning and for further
tuning; the latter are noisy and small, which the former do not show. The others are run
once everything is frozen; two of these, a group of their own, have labels that are no
classes, six have noisy ones, in another group digits are trained by other optimizers,
and one is of other networks: attention, recurrence, separable convolutions, dropout,
sigmoids. Four were made last, when these had been looked at often. Sets are cut to
10,000 samples and the trainings to few epochs, so that hundreds of them fit into hours.
The order of samples, and what is cut, never changes: seeds change initial weights and
batches.

MNIST, Fashion-MNIST and CIFAR-10 come from `keras.datasets`, digits from scikit-learn;
the others from a folder of UCI sets (`--uci`, or the environment variable
KERAS_MILR_UCI). A workload whose data are not there is skipped.
"""

import csv
import gzip
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
from sklearn.datasets import load_digits
from sklearn.metrics import balanced_accuracy_score, r2_score

UCI = os.environ.get("KERAS_MILR_UCI", "uci")


class Task(NamedTuple):
    """What is asked of the outputs.

    Attributes:
        loss: The loss that is trained.
        activation: That of the last layer.
        units: Function from the test labels to the number of outputs.
        score: Function from test labels and outputs to a score of at most 1.
    """

    loss: str
    activation: str | None
    units: Callable
    score: Callable


def _accuracy(y, outputs):
    return float(np.mean(outputs.argmax(axis=1) == y))


def _balanced_accuracy(y, outputs):
    return float(balanced_accuracy_score(y, outputs.argmax(axis=1)))


def _mean_balanced_accuracy(y, outputs):
    columns = zip(y.T, outputs.T > 0.5, strict=True)
    return float(np.mean([balanced_accuracy_score(*pair) for pair in columns]))


def _r2(y, outputs):
    finite = np.all(np.isfinite(outputs))
    return float(r2_score(y, outputs[:, 0])) if finite else -np.inf


CLASSES = Task(
    *("sparse_categorical_crossentropy", "softmax"),
    *(lambda y: int(y.max()) + 1, _accuracy),
)
BALANCED = CLASSES._replace(score=_balanced_accuracy)
MULTI_LABEL = Task(
    *("binary_crossentropy", "sigmoid"),
    *(lambda y: y.shape[1], _mean_balanced_accuracy),
)
REGRESSION = Task("mse", None, lambda y: 1, _r2)


# What is run only by the cosine, a constant rate, and the chief of ours.
IN_FEW_WAYS = (
    "made last",
    "noise",
    "few epochs",
    "few steps",
    "other networks",
    "other optimizers",
)


class Workload(NamedTuple):
    """What is trained on what, and for how long.

    Attributes:
        half: "tuning", "further tuning", "unseen", "other labels", or one of
            `IN_FEW_WAYS`.
        load: Function from the UCI folder to (x, y), (test x, test y).
        layers: Function from x to the layers of the network but for the last.
        optimizer: "sgd" (momentum 0.9), or a class of `keras.optimizers`.
        batch_size: Samples in a step.
        epochs: Length of a training.
        target: The score whose time is taken, fixed beforehand.
        task: What is asked of the outputs.
    """

    half: str
    load: Callable
    layers: Callable
    optimizer: str
    batch_size: int
    epochs: int
    target: float
    task: Task = CLASSES

    def network(self, x, y):
        """The network for inputs and labels like these."""
        last = keras.layers.Dense(self.task.units(y), activation=self.task.activation)
        return keras.Sequential([*self.layers(x), last])


def _split(x, y, train, test):
    order = np.random.default_rng(0).permutation(len(x))
    x, y = x[order], y[order]
    y = y if y.dtype == "float32" else y.astype("int32")
    return (x[:train], y[:train]), (x[train : train + test], y[train : train + test])


def _digits(uci, train=1437):
    x, y = load_digits(return_X_y=True)
    return _split((x / 16).astype("float32"), y, train, len(x) - train)


def _images(name, train=10_000, test=5_000):
    (x, y), (test_x, test_y) = getattr(keras.datasets, name).load_data()
    x, test_x = (
        (a.reshape(len(a), *x.shape[1:3], -1) / 255).astype("float32")
        for a in (x[:train], test_x[:test])
    )
    return (x, y[:train].astype("int32").ravel()), (
        test_x,
        test_y[:test].astype("int32").ravel(),
    )


def _noisy(load, share, classes):
    """Some training labels are drawn anew; test labels are as they were."""

    def noisy(uci):
        (x, y), test = load(uci)
        rng = np.random.default_rng(1)
        drawn = rng.integers(0, classes, len(y)).astype("int32")
        return (x, np.where(rng.random(len(y)) < share, drawn, y)), test

    return noisy


def _table(name, train, test, divisor=None):
    def load(uci):
        data = np.load(Path(uci) / f"{name}.npz")
        x = data["x"] / divisor if divisor else np.log1p(data["x"])
        return _split(x.astype("float32"), data["y"], train, test)

    return load


def _long_tail(load, ratio):
    """Class k keeps a share ratio^(−k / (K − 1)) of its training samples."""

    def tail(uci):
        (x, y), test = load(uci)
        classes = y.max() + 1
        rank = np.array([np.sum(y[:i] == y[i]) for i in range(len(y))])
        share = ratio ** (-np.arange(classes) / (classes - 1))
        kept = rank < (share * np.bincount(y).min())[y]
        return (x[kept], y[kept]), test

    return tail


def _adult_columns(uci):
    """The columns of the census, text as it is."""
    with gzip.open(Path(uci) / "adult-train.csv.gz", "rt") as file:
        rows = [[c.strip() for c in row] for row in csv.reader(file) if len(row) == 15]
    return list(zip(*rows, strict=True))


def _encoded(columns):
    """Numbers standardised, of their logarithm, and a column for each text."""
    encoded = []
    for column in columns:
        try:
            values = np.array(column, "float64")
            values = np.log1p(values)
            encoded.append((values - values.mean()) / values.std())
        except ValueError:
            encoded.extend(
                np.array([c == kind for c in column], "float64")
                for kind in sorted(set(column))
            )
    return np.stack(encoded, 1).astype("float32")


def _adult(uci, train=10_000):
    *columns, income = _adult_columns(uci)
    y = np.array([value == ">50K" for value in income])
    return _split(_encoded(columns), y, train, 5_000)


def _adult_questions(uci):
    """Income, marriage, sex and overtime, from what does not say them outright."""
    columns = _adult_columns(uci)
    relationship, hours = 7, np.array(columns[12], "int32")
    asked = {14: ">50K", 5: "Married-civ-spouse", 9: "Male"}
    y = [np.array([v == yes for v in columns[i]]) for i, yes in asked.items()]
    left = set(range(15)) - {*asked, relationship, 12}
    x = _encoded([columns[i] for i in sorted(left)])
    return _split(x, np.stack([*y, hours > 40], axis=1), 10_000, 5_000)


def _housing(uci):
    data = np.load(Path(uci) / "cal.housing.npz")
    x = data["x"].astype("float64")
    x[:, 3:7] = np.log1p(x[:, 3:7])  # Rooms, bedrooms, people, households.
    x, y = ((a - a.mean(0)) / a.std(0) for a in (x, data["y"].astype("float64")))
    return _split(x.astype("float32"), y.astype("float32"), 10_000, 5_000)


def _sms(uci):
    with gzip.open(Path(uci) / "SMSSpamCollection.gz", "rt", encoding="utf-8") as file:
        pairs = [line.rstrip("\n").split("\t", 1) for line in file]
    vectors = keras.layers.TextVectorization(4000, output_sequence_length=40)
    texts = [text for _, text in pairs]
    vectors.adapt(texts)
    x = keras.ops.convert_to_numpy(vectors(texts)).astype("int32")
    return _split(x, np.array([kind == "spam" for kind, _ in pairs]), 3_500, 2_074)


def _two_classes(first, second, few):
    """Two kinds of Fashion-MNIST that look alike, the second one rare."""

    def load(uci):
        (x, y), (test_x, test_y) = _images("fashion_mnist", 60_000, 10_000)
        chosen = np.concatenate(
            [np.flatnonzero(y == first)[:5_000], np.flatnonzero(y == second)[:few]]
        )
        chosen = np.random.default_rng(0).permutation(chosen)
        shown = (test_y == first) | (test_y == second)
        return (x[chosen], (y[chosen] == second).astype("int32")), (
            test_x[shown],
            (test_y[shown] == second).astype("int32"),
        )

    return load


def _mlp(x):
    return [
        keras.Input(x.shape[1:]),
        keras.layers.Flatten(),
        keras.layers.Dense(64, activation="relu"),
        keras.layers.Dense(64, activation="relu"),
    ]


def _cnn(x):
    return [
        keras.Input(x.shape[1:]),
        keras.layers.Conv2D(12, 5, strides=2, activation="relu"),
        keras.layers.Conv2D(24, 3, strides=2, activation="relu"),
        keras.layers.Flatten(),
        keras.layers.Dense(64, activation="relu"),
    ]


def _bag_of_words(x):
    return [
        keras.Input(x.shape[1:], dtype="int32"),
        keras.layers.Embedding(4000, 16),
        keras.layers.GlobalAveragePooling1D(),
        keras.layers.Dense(32, activation="relu"),
    ]


def _resnet(x):
    """Batch normalisation and residuals, as a list of one functional block."""
    inputs = keras.Input(x.shape[1:])
    h = keras.layers.Conv2D(12, 3, strides=2, use_bias=False)(inputs)
    for filters, stride in ((12, 1), (24, 2)):
        h = keras.layers.BatchNormalization(momentum=0.9)(h)
        h = keras.layers.ReLU()(h)
        r = keras.layers.Conv2D(filters, 3, stride, "same", use_bias=False)(h)
        r = keras.layers.BatchNormalization(momentum=0.9)(r)
        r = keras.layers.ReLU()(r)
        r = keras.layers.Conv2D(filters, 3, padding="same", use_bias=False)(r)
        h = keras.layers.Conv2D(filters, 1, stride, use_bias=False)(h)
        h = keras.layers.Add()([h, r])
    h = keras.layers.BatchNormalization(momentum=0.9)(h)
    h = keras.layers.GlobalAveragePooling2D()(keras.layers.ReLU()(h))
    return [inputs, keras.Model(inputs, h)]


def _transformer(x):
    """Two blocks of attention over 16 patches; a convolution tells their positions."""
    inputs = keras.Input(x.shape[1:])
    h = keras.layers.Conv2D(32, 7, strides=7)(inputs)
    h = keras.layers.Add()([h, keras.layers.DepthwiseConv2D(3, padding="same")(h)])
    h = keras.layers.Reshape((-1, 32))(h)
    for _ in range(2):
        normed = keras.layers.LayerNormalization()(h)
        attended = keras.layers.MultiHeadAttention(4, 8)(normed, normed)
        h = keras.layers.Add()([h, attended])
        wide = keras.layers.LayerNormalization()(h)
        wide = keras.layers.Dense(64, activation="gelu")(wide)
        h = keras.layers.Add()([h, keras.layers.Dense(32)(wide)])
    h = keras.layers.GlobalAveragePooling1D()(keras.layers.LayerNormalization()(h))
    return [inputs, keras.Model(inputs, h)]


def _gru(x):
    """The rows of an image, one after the other."""
    return [
        keras.Input(x.shape[1:]),
        keras.layers.Reshape(x.shape[1:3]),
        keras.layers.GRU(48),
    ]


def _lstm(x):
    return [
        keras.Input(x.shape[1:], dtype="int32"),
        keras.layers.Embedding(4000, 16, mask_zero=True),
        keras.layers.LSTM(32),
    ]


def _separable(x):
    layers = [keras.Input(x.shape[1:])]
    for filters, stride in ((16, 2), (32, 1), (64, 2)):
        layers += [
            keras.layers.SeparableConv2D(filters, 3, stride, "same", use_bias=False),
            keras.layers.BatchNormalization(momentum=0.9),
            keras.layers.ReLU(),
        ]
    return [*layers, keras.layers.GlobalAveragePooling2D()]


def _dropout(x):
    return [
        keras.Input(x.shape[1:]),
        keras.layers.Dense(128, activation="relu"),
        keras.layers.Dropout(0.5),
        keras.layers.Dense(128, activation="relu"),
        keras.layers.Dropout(0.5),
    ]


def _sigmoid(x):
    return [
        keras.Input(x.shape[1:]),
        keras.layers.Dense(64, activation="sigmoid"),
        keras.layers.Dense(64, activation="sigmoid"),
    ]


def _wine(uci):
    """White wine in three grades."""
    file = Path(uci) / "winequality-white.csv.gz"
    *columns, grade = np.loadtxt(file, delimiter=",").T
    x = np.stack([(c - c.mean()) / c.std() for c in columns], axis=1)
    return _split(x.astype("float32"), np.clip(grade, 5, 7) - 5, 3_400, 1_498)


def _mnist(uci):
    return _images("mnist")


def _fashion(uci):
    return _images("fashion_mnist")


_pendigits = _table("pendigits", 7_494, 3_498, 100)
_optdigits = _table("optdigits", 3_823, 1_797, 16)
_optdigits_few = _table("optdigits", 200, 5_000, 16)
_spam = _table("spambase", 3_000, 1_601)

# Not Adafactor and Ftrl, by which this network learns nothing at rates of 1e-4 … 1.
_OTHER_OPTIMIZERS = (
    *("AdamW", "Nadam", "Adamax", "RMSprop", "Lion", "Lamb", "Muon"),
    *("SGD", "Adagrad", "Adadelta"),
)

WORKLOADS = {
    "digits": Workload("tuning", _digits, _mlp, "sgd", 32, 20, 0.96),
    "fashion, MLP": Workload("tuning", _fashion, _mlp, "sgd", 64, 10, 0.84),
    "fashion, CNN": Workload("tuning", _fashion, _cnn, "Adam", 64, 6, 0.84),
    "adult": Workload("tuning", _adult, _mlp, "Adam", 64, 8, 0.84),
    "pendigits, long tail": Workload(
        *("tuning", _long_tail(_pendigits, 50), _mlp, "sgd", 32, 25, 0.90, BALANCED)
    ),
    "fashion, 20 % noise": Workload(
        *("tuning", _noisy(_fashion, 0.2, 10), _mlp, "sgd", 64, 10, 0.80)
    ),
    "fashion, CNN, 30 % noise": Workload(
        *("further tuning", _noisy(_fashion, 0.3, 10), _cnn, "Adam", 64, 6, 0.80)
    ),
    "fashion, 500 samples": Workload(
        *("further tuning", lambda uci: _images("fashion_mnist", 500)),
        *(_cnn, "Adam", 32, 25, 0.75),
    ),
    "digits, 200 samples": Workload(
        *("further tuning", lambda uci: _digits(uci, 200), _mlp, "Adam", 16, 30, 0.90)
    ),
    "pendigits, 40 % noise": Workload(
        *("further tuning", _noisy(_pendigits, 0.4, 10), _mlp, "Adam", 64, 10, 0.95)
    ),
    "wine": Workload("further tuning", _wine, _mlp, "Adam", 32, 20, 0.60),
    "MNIST, CNN": Workload("unseen", _mnist, _cnn, "sgd", 64, 6, 0.96),
    "pendigits": Workload("unseen", _pendigits, _mlp, "Adam", 64, 10, 0.97),
    "spam": Workload("unseen", _spam, _mlp, "sgd", 32, 15, 0.92),
    "SMS": Workload("unseen", _sms, _bag_of_words, "Adam", 32, 10, 0.92, BALANCED),
    "fashion, ResNet": Workload(*("unseen", _fashion, _resnet, "sgd", 64, 5, 0.82)),
    "optdigits, 200 samples": Workload(
        *("unseen", _optdigits_few, _mlp, "Adam", 16, 30, 0.88)
    ),
    "shirts, 96:4": Workload(
        *("unseen", _two_classes(0, 6, 208), _mlp, "sgd", 64, 12, 0.65, BALANCED)
    ),
    "MNIST, 30 % noise": Workload(
        *("unseen", _noisy(_mnist, 0.3, 10), _cnn, "Adam", 64, 6, 0.90)
    ),
    "CIFAR-10": Workload(
        *("unseen", lambda uci: _images("cifar10"), _cnn, "Adam", 64, 8, 0.50)
    ),
    "adult, four questions": Workload(
        *("other labels", _adult_questions, _mlp, "Adam", 64, 8, 0.70, MULTI_LABEL)
    ),
    "housing": Workload(
        *("other labels", _housing, _mlp, "sgd", 64, 10, 0.70, REGRESSION)
    ),
    "adult, 20 % noise": Workload(
        *("made last", _noisy(_adult, 0.2, 2), _mlp, "Adam", 64, 8, 0.80)
    ),
    "spam, 20 % noise": Workload(
        *("made last", _noisy(_spam, 0.2, 2), _mlp, "sgd", 32, 15, 0.85)
    ),
    "MNIST, MLP": Workload("made last", _mnist, _mlp, "Adam", 64, 8, 0.93),
    "optdigits": Workload("made last", _optdigits, _mlp, "sgd", 32, 20, 0.96),
    "optdigits, 30 % noise": Workload(
        *("noise", _noisy(_optdigits, 0.3, 10), _mlp, "Adam", 64, 10, 0.90)
    ),
    "digits, 30 % noise": Workload(
        *("noise", _noisy(_digits, 0.3, 10), _mlp, "sgd", 32, 20, 0.90)
    ),
    "fashion, 40 % noise": Workload(
        *("noise", _noisy(_fashion, 0.4, 10), _mlp, "Adam", 64, 6, 0.80)
    ),
    "MNIST, MLP, 20 % noise": Workload(
        *("noise", _noisy(_mnist, 0.2, 10), _mlp, "sgd", 64, 8, 0.90)
    ),
    "pendigits, 20 % noise": Workload(
        *("noise", _noisy(_pendigits, 0.2, 10), _mlp, "sgd", 64, 8, 0.90)
    ),
    "fashion, CNN, 20 % noise": Workload(
        *("noise", _noisy(_fashion, 0.2, 10), _cnn, "sgd", 64, 6, 0.80)
    ),
    "fashion 60,000, 1 epoch": Workload(
        *("few epochs", lambda uci: _images("fashion_mnist", 60_000)),
        *(_mlp, "sgd", 32, 1, 0.84),
    ),
    "MNIST 60,000, CNN, 1 epoch": Workload(
        *("few epochs", lambda uci: _images("mnist", 60_000)),
        *(_cnn, "sgd", 32, 1, 0.96),
    ),
    "adult 27,000, 1 epoch": Workload(
        *("few epochs", lambda uci: _adult(uci, 27_000), _mlp, "Adam", 32, 1, 0.84)
    ),
    "fashion 20,000, ResNet, 1 epoch": Workload(
        *("few epochs", lambda uci: _images("fashion_mnist", 20_000)),
        *(_resnet, "sgd", 32, 1, 0.82),
    ),
    "fashion, CNN, 2 epochs": Workload(
        *("few epochs", _fashion, _cnn, "Adam", 64, 2, 0.80)
    ),
    "fashion 60,000, 30 % noise, 2 epochs": Workload(
        *("few epochs", _noisy(lambda uci: _images("fashion_mnist", 60_000), 0.3, 10)),
        *(_mlp, "Adam", 32, 2, 0.82),
    ),
    "pendigits, 3 epochs": Workload(
        *("few epochs", _pendigits, _mlp, "Adam", 64, 3, 0.93)
    ),
    "fashion, batches of 500": Workload(
        *("few steps", _fashion, _mlp, "Adam", 500, 20, 0.82)
    ),
    "fashion, CNN, batches of 400": Workload(
        *("few steps", _fashion, _cnn, "sgd", 400, 8, 0.80)
    ),
    "fashion, 30 % noise, batches of 400": Workload(
        *("few steps", _noisy(_fashion, 0.3, 10), _mlp, "Adam", 400, 12, 0.80)
    ),
    "pendigits, batches of 300": Workload(
        *("few steps", _pendigits, _mlp, "sgd", 300, 20, 0.97)
    ),
    "optdigits, batches of 200": Workload(
        *("few steps", _optdigits, _mlp, "Adam", 200, 20, 0.95)
    ),
    "digits, 400 samples": Workload(
        *("few steps", lambda uci: _digits(uci, 400), _mlp, "Adam", 16, 30, 0.93)
    ),
    "fashion, transformer": Workload(
        *("other networks", _fashion, _transformer, "AdamW", 64, 8, 0.80)
    ),
    "MNIST, GRU": Workload("other networks", _mnist, _gru, "Adam", 64, 6, 0.95),
    "SMS, LSTM": Workload(
        *("other networks", _sms, _lstm, "Adam", 32, 10, 0.92, BALANCED)
    ),
    "fashion, separable": Workload(
        *("other networks", _fashion, _separable, "sgd", 64, 8, 0.80)
    ),
    "pendigits, sigmoid": Workload(
        *("other networks", _pendigits, _sigmoid, "sgd", 32, 15, 0.95)
    ),
    "optdigits, dropout": Workload(
        *("other networks", _optdigits, _dropout, "sgd", 64, 60, 0.97)
    ),
    "fashion, batches of 1,000": Workload(
        *("other networks", _fashion, _mlp, "Adam", 1_000, 20, 0.82)
    ),
    "digits, 100 epochs": Workload(
        *("other networks", _digits, _mlp, "Adam", 32, 100, 0.96)
    ),
    **{
        f"digits, {name}": Workload(
            *("other optimizers", _digits, _mlp, name, 32, 20, 0.96)
        )
        for name in _OTHER_OPTIMIZERS
        if hasattr(keras.optimizers, name)  # Older Keras has no Muon.
    },
}
