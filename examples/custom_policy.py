"""Writes a learning-rate policy of its own, as a function and as a class.

A policy is a pure function from a `keras_milr.policies.Reading` to the next rates:
arrays with an entry for each rate, so one rule serves a network and its layers. What
it must know is in the reading; it keeps nothing itself, so a training that was killed
can go on. This script

- shows the fields of a reading, with what they were in a training;
- trains with a policy that is a function, and with one that is a class with constants,
  registered so that it is saved with the callback;
- checks both: the class has the formula of the built-in `"relative"`, and must set the
  same rates; a policy that keeps the rate must train as if there were no callback.

    python examples/custom_policy.py
"""

import argparse
from pathlib import Path

import keras
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import keras_milr


def patient(reading):
    """Lowers the rate when the information has not grown beyond its noise."""
    stuck = reading.information <= reading.previous + reading.noise
    return np.where(stuck, 0.7 * reading.rate, reading.rate)


def keep(reading):
    """The rate stays as it is."""
    return reading.rate


@keras.saving.register_keras_serializable(package="my_project")
class Growth:
    """The rate follows the relative growth of the information, up and down.

    Args:
        expected: Relative growth per reading at which the rate stays.
        max_factor: Largest change in one reading.
    """

    def __init__(self, expected=0.05, max_factor=1.5):
        if not expected >= 0:
            raise ValueError(f"`expected` must be at least 0. Received: {expected}")
        if not max_factor > 1:
            raise ValueError(f"`max_factor` must be above 1. Received: {max_factor}")
        self.expected = expected
        self.max_factor = max_factor

    def __call__(self, reading):
        change = reading.information - reading.previous
        change = np.where(np.abs(change) <= reading.noise, 0.0, change)
        # From next to nothing any growth would be infinite.
        base = np.maximum(reading.previous, 0.1 * reading.reference)
        base = np.maximum(base, reading.noise)
        factor = (1 + change / base) / (1 + self.expected)
        return reading.rate * np.clip(factor, 1 / self.max_factor, self.max_factor)

    def get_config(self):
        return {"expected": self.expected, "max_factor": self.max_factor}

    @classmethod
    def from_config(cls, config):
        return cls(**config)


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
    add("--expected", type=float, default=0.05, help="a constant of the class (0.05)")
    add("--learning-rate", type=float, default=1e-2, help="to start with (0.01)")
    add("--epochs", type=count, default=20)
    add("--seeds", type=count, default=3, help="number of repetitions (3)")
    add("--output", type=Path, default=Path("results/policy.png"), help="the figure")
    return parser.parse_args()


def load():
    images, labels = load_digits(return_X_y=True)
    x, test_x, y, test_y = train_test_split(
        (images / 16).astype("float32"), labels, stratify=labels, random_state=0
    )
    return (x, y), (test_x, test_y)


def train(policy, seed, data, arguments, progress):
    """Test accuracy, the callback, and the weights; without a policy no callback."""
    (x, y), test = data
    keras.utils.set_random_seed(seed)
    layers = [keras.Input(x.shape[1:])]
    layers.append(keras.layers.Dense(64, activation="relu"))
    layers.append(keras.layers.Dense(10, activation="softmax"))
    model = keras.Sequential(layers)
    model.compile(
        keras.optimizers.Adam(arguments.learning_rate),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    callback, callbacks = None, [progress]
    if policy is not None:
        callback = keras_milr.MutualInformationLR(policy, probe_data=(x, y))
        callbacks = [callback, progress]
    model.fit(x, y, epochs=arguments.epochs, callbacks=callbacks, verbose=0)
    accuracy = model.evaluate(*test, verbose=0)[1]
    return accuracy, callback, model.get_weights()


def rates(callback):
    return [record["rate"] for record in callback.history]


def print_reading(record):
    """The fields of a reading, as the policy saw them."""
    words = {
        "rate": "the present rate",
        "start_rate": "the rate at the start",
        "peak_rate": "the highest so far",
        "information": "what the network knows of the labels now, nats",
        "previous": "the same an epoch before",
        "best": "the largest so far",
        "reference": "all there is to know, H(Y)",
        "noise": "standard error of a change; less than that is none",
        "step": "number of the reading, a share within the first epoch",
        "steps": "number of readings planned, after epochs",
        "rollbacks": "how often the training failed and was taken back",
        "bound": "the part of it that the probabilities say, H(Y) - CE",
        "searched": "whether a range test found the rate at the start",
        "attainable": "what there seems to be to know of noisy labels",
        "at_raise": "what was known when the rate was last raised",
        "restarts": "how often it started again, far lower",
    }
    print(f"\nA reading: that after epoch {record['epoch'] + 1}")
    for name in keras_milr.policies.Reading._fields:
        print(f"  {name:<12} {record[name]:>10.4g}   {words[name]}")


def check(results, policy):
    """What must hold exactly: the same rates, the same weights, the same class."""
    pairs = zip(results["class Growth"], results["built-in relative"], strict=True)
    same = all(
        np.allclose(rates(mine[1]), rates(theirs[1]), rtol=1e-12, atol=0)
        for mine, theirs in pairs
    )
    pairs = zip(results["function keep"], results["no callback"], strict=True)
    untouched = all(
        np.array_equal(mine, theirs)
        for one, other in pairs
        for mine, theirs in zip(one[2], other[2], strict=True)
    )
    callback = keras_milr.MutualInformationLR(policy)
    again = type(callback).from_config(callback.get_config()).policy
    saved = type(again) is Growth and again.get_config() == policy.get_config()
    print("\nChecked:")
    if policy.get_config() == Growth().get_config():
        print(f"  Growth sets the rates of the built-in one: {same}")
    else:
        print("  Growth has other constants than the built-in one: not compared")
        same = True
    print(f"  keep trains to the very weights of no callback: {untouched}")
    print(f"  Growth comes back from the callback's configuration: {saved}")
    return same and untouched and saved


def write_figure(results, path):
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(10, 3.8), layout="constrained"
    )
    styles = {"class Growth": "-", "built-in relative": "k:"}
    for name, runs in results.items():
        if runs[0][1] is None:
            continue
        records = runs[0][1].history
        readings = [record["step"] for record in records]
        style = styles.get(name, "-")
        information = [record["information"] for record in records]
        left.plot(readings, information, style, label=name)
        right.plot(readings, rates(runs[0][1]), style, drawstyle="steps-post")
    left.axhline(records[0]["entropy"], color="k", ls="--", lw=1, label="H(Y)")
    left.set(xlabel="reading", ylabel="information (nats)")
    left.legend(frameon=False)
    right.set(xlabel="reading", ylabel="learning rate", yscale="log")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle("Policies on digits, the first seed")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"Figure: {path}")


def main():
    arguments = parse_arguments()
    data = load()
    try:
        growth = Growth(arguments.expected)
    except ValueError as error:
        raise SystemExit(f"--expected: {error}") from error
    policies = {
        "no callback": None,
        "function keep": keep,
        "function patient": patient,
        "class Growth": growth,
        "built-in relative": "relative",
        "built-in decay": "decay",
    }
    total = len(policies) * arguments.seeds * arguments.epochs
    bar = keras.utils.Progbar(total, unit_name="epoch")
    progress = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: bar.add(1)
    )
    results = {
        name: [
            train(policy, seed, data, arguments, progress)
            for seed in range(arguments.seeds)
        ]
        for name, policy in policies.items()
    }
    print(f"\n{'policy':<20} {'test accuracy':>16} {'last rate':>11}")
    for name, runs in results.items():
        values = [run[0] for run in runs]
        spread = f"±{np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
        last = arguments.learning_rate if runs[0][1] is None else rates(runs[0][1])[-1]
        print(f"{name:<20} {np.mean(values):>8.4f} {spread:<7} {last:>11.2e}")
    print_reading(results["function patient"][0][1].history[1])
    correct = check(results, growth)
    write_figure(results, arguments.output)
    return 0 if correct else 1


if __name__ == "__main__":
    raise SystemExit(main())
