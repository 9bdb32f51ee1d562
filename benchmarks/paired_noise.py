"""How much of the error of one reading is left in a change between two of them.

Readings of the same samples share most of their error. Trains the quickstart's networks
and compares, after each epoch, the standard error of the change since the last epoch
(from the differences sample by sample) with that of one reading. `Information.noise`
rests on the medians that this prints.

    python benchmarks/paired_noise.py
"""

import sys
from pathlib import Path

import keras
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import quickstart


def information_by_sample(p, labels):
    """What each sample contributes to H(Y) − CE, and to the counted information."""
    rows = np.arange(len(labels))
    prior = np.bincount(labels, minlength=p.shape[1]) / len(labels)
    bound = np.log(np.clip(p[rows, labels], 1e-7, 1)) - np.log(prior[labels])
    predicted = p.argmax(axis=1)
    table = np.zeros((p.shape[1],) * 2)
    np.add.at(table, (predicted, labels), 1 / len(labels))
    margins = table.sum(axis=1, keepdims=True) * table.sum(axis=0)
    counted = np.log(table[predicted, labels] / margins[predicted, labels])
    return {"bound": bound, "counts": counted}


def main():
    for name, epochs, samples in (("digits", 20, 2048), ("fashion_mnist", 8, 10_000)):
        try:
            (x, y), *_ = quickstart.load(name)
        except Exception as error:  # What Keras raises when a download fails.
            print(f"Skipped {name}: {error}")
            continue
        x, y = x[:samples], y[:samples]
        keras.utils.set_random_seed(0)
        model = quickstart.build_model("mlp", x.shape[1:], "adam", 1e-3)
        left = {"bound": [], "counts": []}
        before = None
        for _ in range(epochs):
            model.fit(x, y, batch_size=32, epochs=1, verbose=0)
            now = information_by_sample(model.predict(x[:2048], verbose=0), y[:2048])
            for kind in left if before else ():
                change = np.std(now[kind] - before[kind])
                left[kind].append(change / np.std(now[kind]))
            before = now
        for kind, shares in left.items():
            print(
                f"{name}, {kind}: {np.median(shares):.2f} of the error is left "
                f"(from {min(shares):.2f} to {max(shares):.2f}, {epochs} epochs)"
            )


if __name__ == "__main__":
    main()
