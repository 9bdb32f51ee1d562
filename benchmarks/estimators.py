"""What a reading costs, beside the tools that could do it, and beside the limit.

Three estimates, each on the same arrays as its rivals, in turns within one process, and
so in several processes:

- `table`: outputs and labels to the information of (predicted class, label), argmax
  included. Rivals: scikit-learn's `mutual_info_score`, NumPy's `bincount`, and
  torchmetrics and infomeasure where they are installed. Limit: one pass over the
  outputs.
- `units`: activations to the information of each unit, binned, from edges that are
  known; `edges too` finds them. Rivals: scikit-learn's `mutual_info_score` in a loop,
  from bins that are ready, and NumPy's comparisons and one `bincount`, from the edges.
  `mutual_info_classif` estimates from neighbours instead of bins, and is not compared
  by value. Limit: one pass over the activations.
- `linear`: activations to the information that a held-out linear readout finds. Rival:
  scikit-learn's shrunk discriminant, twofold. Limit: the matrix product of the
  activations with themselves.

A rival that goes unit by unit is timed on 8 units and scaled, where there are more.
Values that should be the same must be, or the benchmark fails. Prints medians of the
ratios over rounds, writes JSON and a figure.

    python benchmarks/estimators.py
    KERAS_BACKEND=jax python benchmarks/estimators.py --quick
"""

import argparse
import importlib.util
import time
from pathlib import Path

import keras
import numpy as np
import report
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.feature_selection import mutual_info_classif
from sklearn.metrics import mutual_info_score
from sklearn.model_selection import cross_val_predict

from keras_milr import backend, information, readouts
from keras_milr.readouts import units as unit_readout

BINS = 16
LOOPED = 8  # units that a rival in a loop is timed on
# n, classes; n, units, classes; n, features, classes.
TABLE = [(1_000, 10), (10_000, 10), (100_000, 10), (1_000_000, 10)]
TABLE += [(100_000, 2), (100_000, 100), (10_000, 1000)]
UNITS = [(10_000, 8, 10), (10_000, 64, 10), (10_000, 512, 10), (10_000, 4096, 10)]
UNITS += [(1_000, 512, 10), (100_000, 64, 10), (10_000, 512, 2), (10_000, 512, 100)]
LINEAR = [(2_048, 64, 10), (2_048, 256, 10), (2_048, 512, 10), (2_048, 4096, 10)]
LINEAR += [(20_000, 256, 10), (2_048, 256, 2), (2_048, 256, 20)]
QUICK = {
    "table": [(1_000, 10), (100_000, 10)],
    "units": [(10_000, 64, 10), (10_000, 512, 10)],
    "linear": [(2_048, 256, 10)],
}


def table_case(n, classes, rng):
    """Methods that return nats, the array that one pass reads, the tolerance."""
    labels = rng.integers(0, classes, n).astype("int32")
    outputs = rng.normal(size=(n, classes)).astype("float32")
    outputs[np.arange(n), labels] += 1.5
    x, y = (keras.ops.convert_to_tensor(a) for a in (outputs, labels))

    def nats(outputs, labels):
        return information.mutual_information(
            readouts.prediction_counts(outputs, labels)
        )

    compiled = backend.jit(nats, fused=True)

    def numpy_counts():
        cells = np.argmax(outputs, axis=1) * classes + labels
        return np.bincount(cells, minlength=classes**2).reshape(classes, classes)

    methods = {
        "keras_milr": lambda: float(compiled(x, y)),
        "scikit-learn": lambda: mutual_info_score(labels, np.argmax(outputs, axis=1)),
        "NumPy": lambda: information.mutual_information(numpy_counts()),
    }
    if importlib.util.find_spec("torchmetrics"):
        import torch
        from torchmetrics.functional.clustering import mutual_info_score as of_torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        xt = torch.from_numpy(outputs).to(device)
        yt = torch.from_numpy(labels).long().to(device)
        methods["torchmetrics"] = lambda: of_torch(xt.argmax(1), yt).item()
    if importlib.util.find_spec("infomeasure"):
        import infomeasure

        methods["infomeasure"] = lambda: infomeasure.mutual_information(
            np.argmax(outputs, axis=1), labels, approach="discrete"
        )
    return methods, one_pass(x), 1e-4


def units_case(n, units, classes, rng):
    labels = rng.integers(0, classes, n).astype("int32")
    activations = rng.normal(size=(n, units)) + labels[:, None] * rng.normal(size=units)
    activations = np.maximum(activations, 0).astype("float32")
    x = keras.ops.convert_to_tensor(activations)
    looped = min(units, LOOPED)
    edges = unit_readout.edges(x, np.ones(n, "float32"), BINS)
    ids = np.zeros((units, n), "int32")
    for u in range(units):
        ids[u] = np.digitize(activations[:, u], edges[:, u])
        ids[u][activations[:, u] == 0] = BINS
    size = (units, BINS + 2, classes)

    def counted():
        return unit_readout.counts(x, edges, labels, None, classes)

    def numpy_counts():
        found = np.zeros(activations.shape, "int32")
        for edge in edges:
            found += activations >= edge
        found[activations == 0] = BINS
        cells = (np.arange(units) * (BINS + 2) + found) * classes + labels[:, None]
        return np.bincount(cells.ravel(), minlength=np.prod(size)).reshape(size)

    def loop():
        return np.array([mutual_info_score(ids[u], labels) for u in range(looped)])

    def neighbours():
        return mutual_info_classif(activations[:, :looped], labels, random_state=0)

    readout = readouts.UnitHistogram(BINS, reduce=None)
    methods = {
        "keras_milr": lambda: information.mutual_information(counted()),
        "keras_milr, edges too": lambda: readout.measure(x, labels, classes).raw,
        "scikit-learn": loop,
        "NumPy": lambda: information.mutual_information(numpy_counts()),
        "mutual_info_classif": neighbours,
    }
    if n * classes > 1_000_000 or units > 512:
        del methods["mutual_info_classif"]  # Minutes.
    scale = dict.fromkeys(("scikit-learn", "mutual_info_classif"), units / looped)
    return methods, one_pass(x), 1e-5, scale


def linear_case(n, features, classes, rng):
    labels = rng.integers(0, classes, n).astype("int32")
    centers = rng.normal(size=(classes, features)) * 2 / np.sqrt(features)
    activations = (centers[labels] + rng.normal(size=(n, features))).astype("float32")
    x = keras.ops.convert_to_tensor(activations)
    readout = readouts.LinearReadout()
    width = readout.features(x[:2]).shape[-1]  # After the sketch.
    product = backend.jit(lambda a: keras.ops.matmul(keras.ops.transpose(a), a))
    discriminant = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")

    def scikit_learn():
        predicted = cross_val_predict(discriminant, activations, labels, cv=2)
        return mutual_info_score(labels, predicted)

    methods = {
        "keras_milr": lambda: readout.measure(x, labels, classes).raw,
        "scikit-learn": scikit_learn,
    }
    if features > 512:
        del methods["scikit-learn"]  # Minutes, and it has no sketch.
    # Other halves, another shrinkage: about the same, if it is the same readout.
    a = x[:, :width]
    return methods, ("product", lambda: keras.ops.convert_to_numpy(product(a))), 0.15


CASES = {"table": table_case, "units": units_case, "linear": linear_case}


def one_pass(x):
    total = backend.jit(lambda a: keras.ops.sum(a))
    return "pass", lambda: keras.ops.convert_to_numpy(total(x))


def measure(kind, shape, rounds, rng):
    """Seconds of each round for each method, and peak memory; checks the values."""
    methods, (limit, work), tolerance, *scale = CASES[kind](*shape, rng)
    scale = scale[0] if scale else {}
    values = {name: np.asarray(method()) for name, method in methods.items()}
    for name, value in values.items():
        same = name not in ("mutual_info_classif", "keras_milr, edges too")
        ours = (
            values["keras_milr"][: value.size] if value.ndim else values["keras_milr"]
        )
        if same and not np.allclose(value, ours, atol=tolerance):
            raise AssertionError(f"{kind} {shape}: {name} {value}, keras_milr {ours}")
    methods = {**methods, limit: work}
    work()
    peak = {name: report.peak_memory(method) for name, method in methods.items()}
    seconds = {name: [] for name in methods}
    for _ in range(rounds):
        for name in rng.permutation(list(methods)).tolist():
            started = time.perf_counter()
            methods[name]()
            took = time.perf_counter() - started
            seconds[name].append(took * scale.get(name, 1.0))
    return {
        "kind": kind,
        "shape": list(shape),
        "seconds": seconds,
        "peak_bytes": peak,
        "nats": {name: float(np.mean(value)) for name, value in values.items()},
        "limit": limit,
    }


def ratios_of(cases):
    """Time of ours over that of each other: lower quartile, median, upper quartile."""
    found = {}
    for case in cases:
        ours = np.array(case["seconds"]["keras_milr"])
        for name, seconds in case["seconds"].items():
            if name != "keras_milr":
                each = ours / np.array(seconds)
                found[f"{report.title(case)}, ours / {name}"] = report.quartiles(each)
    return found


def plot(cases, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = [
        ("table", 0, "samples (10 classes)", lambda s: s[1] == 10),
        (
            "units",
            1,
            "units (10,000 samples, 10 classes)",
            lambda s: s[::2] == [10_000, 10],
        ),
        (
            "linear",
            1,
            "features (2,048 samples, 10 classes)",
            lambda s: s[::2] == [2048, 10],
        ),
    ]
    titles = {
        "table": "Predicted class and label",
        "units": "Units, binned",
        "linear": "Linear readout of a layer",
    }
    styles = {"keras_milr": ("C0", "-"), "keras_milr, edges too": ("C0", "--")}
    styles |= {"scikit-learn": ("C1", "-"), "NumPy": ("C2", "-")}
    styles |= {"mutual_info_classif": ("C1", ":"), "torchmetrics": ("C4", "-")}
    styles |= {
        "infomeasure": ("C5", "-"),
        "pass": ("0.5", "--"),
        "product": ("0.5", "--"),
    }
    names = {
        "pass": "limit: one pass over the memory",
        "product": "limit: the matrix product",
    }
    figure, axes = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
    for axis, (kind, at, label, chosen) in zip(axes, panels, strict=True):
        rows = [c for c in cases if c["kind"] == kind and chosen(c["shape"])]
        rows.sort(key=lambda c: c["shape"][at])
        for name in dict.fromkeys(name for c in rows for name in c["seconds"]):
            points = [
                (c["shape"][at], 1e3 * np.median(c["seconds"][name]))
                for c in rows
                if name in c["seconds"]
            ]
            color, line = styles[name]
            axis.loglog(
                *zip(*points, strict=True),
                *("o" + line,),
                color=color,
                markersize=4,
                label=names.get(name, name),
            )
        axis.set(title=titles[kind], xlabel=label)
        axis.grid(alpha=0.3)
        room = 10 ** (0.4 * len(axis.get_lines()))  # For the legend.
        axis.set_ylim(top=room * axis.get_ylim()[1])
        axis.legend(fontsize=8, loc="upper left")
    axes[0].set_ylabel("milliseconds")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=5, help="in each process")
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--quick", action="store_true", help="few shapes, in this process only"
    )
    parser.add_argument("--output", type=Path, default=Path("results/estimators.json"))
    arguments = parser.parse_args()

    shapes = {"table": TABLE, "units": UNITS, "linear": LINEAR}
    if arguments.quick:
        shapes, arguments.processes = QUICK, 0
    cases = report.measured(shapes, measure, arguments, arguments.processes)
    ratios = ratios_of(cases)
    report.print_ratios("time of ours over that of another", ratios)
    report.write(arguments.output, arguments, ratios, cases=cases)
    plot(cases, arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
