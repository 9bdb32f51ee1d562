"""Figures of a training. Matplotlib is imported on use only."""

import keras
import numpy as np

from keras_milr import _keras, policies
from keras_milr.metrics import MutualInformation

_MOST_LINES = 8  # More layers than this are shown as a map.
_POINTS = 20  # from one reading to the next: a straight line has a bend on this axis


def plot_history(history):
    """Plots information and learning rate over the epochs.

    With rates for layers, both are drawn for each layer (or group), coloured from
    input to output: as lines for up to 8 layers, as maps with a row for each layer
    for more.

    Args:
        history: A trained `MutualInformationLR`, whose records also have H(Y) and
            the noise, or the `keras.callbacks.History` that `fit` returned.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ImportError: without matplotlib (`pip install keras-milr[plot]`).
        TypeError: for anything else than a callback or a History.
        ValueError: where nothing has been recorded.
    """
    pyplot = _pyplot("plot_history")
    series = _series(history)
    layers = series.get("layers", [])
    many = len(layers) > _MOST_LINES
    height = 2.5 + 0.14 * len(layers) if many else 3.0
    figure, (top, bottom) = pyplot.subplots(
        2,
        1,
        sharex=True,
        figsize=(7, 2 * height if many else 5.5),
        height_ratios=(1, 1) if many else (3, 2),
        layout="constrained",
    )
    draw = _draw_network if not layers else _draw_maps if many else _draw_layers
    draw(figure, top, bottom, series)
    bottom.set_xlabel("epochs trained")
    bottom.xaxis.get_major_locator().set_params(integer=True)
    return figure


def _draw_network(figure, top, bottom, series):
    epochs = series["epoch"]
    if "entropy" in series:
        top.plot(
            epochs, series["entropy"], "k--", lw=1, label="H(Y), all there is to know"
        )
    if "noise" in series:
        low = series["information"] - series["noise"]
        high = series["information"] + series["noise"]
        top.fill_between(epochs, low, high, color="C0", alpha=0.2, label="± noise")
    for key, label, style in (
        ("information", "information (sets the rate)", "C0-"),
        ("value", "counted mutual information", "C1--"),
    ):
        if key in series:
            top.plot(epochs, series[key], style, marker=".", label=label)
    _draw_rate(bottom, epochs, series["rate"], series["glides"], "C2")
    _finish_lines(top, bottom)


def _draw_layers(figure, top, bottom, series):
    from matplotlib import colormaps

    epochs, layers = series["epoch"], series["layers"]
    if "entropy" in series:
        top.plot(epochs, series["entropy"], "k--", lw=1, label="H(Y)")
    if "output" in series:
        top.plot(epochs, series["output"], "k:", label="output")
    colors = colormaps["viridis"](np.linspace(0, 0.9, len(layers)))
    rows = zip(layers, series["information"], series["rate"], colors, strict=True)
    for name, information, rate, color in rows:
        top.plot(epochs, information, marker=".", color=color, label=name)
        _draw_rate(bottom, epochs, rate, series["glides"], color)
    _finish_lines(top, bottom)
    top.get_legend().remove()
    figure.legend(loc="outside right upper", frameon=False)


def _draw_rate(axes, epochs, rates, glides, color):
    """The rate of every epoch. A point has the rate that led up to it."""
    x, y = [epochs[:1]], [rates[:1]]
    ends = zip(epochs[:-1], epochs[1:], rates[:-1], rates[1:], strict=True)
    for start, end, before, after in ends:
        if not (glides and after < before):
            before = after
        x.append(np.linspace(start, end, _POINTS))
        y.append(np.linspace(before, after, _POINTS))
    x, y = np.concatenate(x), np.concatenate(y)
    axes.plot(x, y, color=color, marker=".", markevery=_POINTS)


def _finish_lines(top, bottom):
    top.set_ylabel("nats")
    top.set_ylim(bottom=0)
    top.legend(loc="lower right", frameon=False)
    if any(np.any(line.get_ydata() > 0) for line in bottom.get_lines()):
        bottom.set_yscale("log")  # Which cannot show that all are frozen.
    bottom.set_ylabel("learning rate")
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)


def _draw_maps(figure, top, bottom, series):
    from matplotlib.colors import LogNorm

    epochs, layers = series["epoch"], series["layers"]
    # A cell reaches from the reading before, whose rates led up to this one, to it.
    step = epochs[1] - epochs[0] if len(epochs) > 1 else 1.0
    edges = np.concatenate([[epochs[0] - step], epochs])
    rates = np.ma.masked_less_equal(series["rate"], 0)  # Frozen: left blank.
    norm = LogNorm(rates.min(), rates.max()) if rates.count() else None
    for axes, values, label, options in (
        (top, series["information"], "nats", {"vmin": 0}),
        (bottom, rates, "learning rate", {"norm": norm}),
    ):
        image = axes.pcolormesh(
            edges, np.arange(len(layers) + 1) - 0.5, values, **options
        )
        figure.colorbar(image, ax=axes, label=label)
        axes.set_yticks(np.arange(len(layers)), layers, fontsize=6)
        axes.set_ylabel("input → output")


def _series(history):
    """Arrays to draw, by name: `epoch`, `rate`, and what is known of the rest.

    With rates for layers, `layers` has their names, and `rate` and `information` a row
    for each.
    """
    if isinstance(history, keras.callbacks.History):
        return _series_of_logs(history)
    records = getattr(history, "history", None)
    if not isinstance(records, list):
        raise TypeError(
            "Argument `history` must be a MutualInformationLR or a "
            f"keras.callbacks.History. Received: {history!r}"
        )
    if not records:
        raise ValueError(
            "Argument `history` has no records. Received a callback not used in `fit`"
        )
    layers = list(records[0]["rate"]) if isinstance(records[0]["rate"], dict) else []

    def values(name):
        if not layers or not isinstance(records[0][name], dict):
            return np.array([record[name] for record in records])
        return np.array([[record[name][k] for record in records] for k in layers])

    names = ("epoch", "batch", "rate", "information", "value", "entropy", "noise")
    series = {name: values(name) for name in names}
    if layers:
        series["layers"] = layers
        series["entropy"] = series["entropy"][0]  # The same for all.
        # fmax: the larger of the two bounds, where there are two.
        outputs = [record["output"] for record in records]
        series["output"] = np.array([np.fmax(o["value"], o["bound"]) for o in outputs])
    batches = (history.params or {}).get("steps") or max(series["batch"].max(), 1)
    series["epoch"] = series["epoch"] + series["batch"] / batches
    series["glides"] = getattr(policies.get(history.policy), "glides", False)
    return series


def _series_of_logs(history):
    # A validation that was not in every epoch has no place on the axis.
    logs = {
        key: values
        for key, values in history.history.items()
        if isinstance(values, list) and len(values) == len(history.epoch) > 0
    }
    prefix = "probe_mutual_information/"
    layers = [key.removeprefix(prefix) for key in logs if key.startswith(prefix)]
    layers = [name for name in layers if f"learning_rate/{name}" in logs]
    if layers:
        series = {
            "layers": layers,
            "rate": np.array([logs[f"learning_rate/{name}"] for name in layers]),
            "information": np.array([logs[prefix + name] for name in layers]),
        }
        names = {"output": "probe_information"}
    else:
        series = {}
        names = {
            "rate": "learning_rate",
            "information": "probe_information",
            "value": "probe_mutual_information",
        }
        if "probe_information" not in logs:
            names["value"] = next(filter(logs.get, _metrics(history.model)), "")
    series |= {k: np.asarray(logs[v]) for k, v in names.items() if v in logs}
    if "rate" not in series or len(series) == 1:
        raise ValueError(
            "Argument `history` must have a learning rate and a mutual information "
            f"in its logs. Received: keys {sorted(logs)}"
        )
    return series | {"epoch": np.asarray(history.epoch) + 1, "glides": False}


def _metrics(model):
    """Log keys that `MutualInformation` metrics may have, of validation first."""
    metrics = {} if model is None else _keras.metrics(model)
    found = [k for k, one in metrics.items() if isinstance(one, MutualInformation)]
    found = found or ["mutual_information"]  # Logs may come without their model.
    return [prefix + key for prefix in ("val_", "") for key in found]


def _pyplot(asking):
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            f"`{asking}` needs matplotlib: pip install 'keras-milr[plot]'"
        ) from error
    return pyplot


def plot_range(found):
    """Draws a `keras_milr.LRRange`; see its `plot`."""
    pyplot = _pyplot("LRRange.plot")
    figure, axes = pyplot.subplots(
        3, 1, sharex=True, figsize=(7, 7), height_ratios=(3, 2, 2), layout="constrained"
    )
    top, middle, bottom = axes
    top.axhline(found.entropy, color="k", ls="--", lw=1, label="H(Y), all there is")
    top.axhline(found.start, color="k", ls=":", lw=1, label="before training")
    low, high = found.information - found.noise, found.information + found.noise
    top.fill_between(found.rates, low, high, color="C0", alpha=0.2, label="± noise")
    top.plot(found.rates, found.information, "C0.-", label="information")
    top.set_ylabel("information (nats)")
    top.set_ylim(bottom=0)
    middle.plot(found.rates, found.loss, "C1.-")
    middle.axhline(found.entropy, color="k", ls="--", lw=1)
    middle.set_ylabel("cross-entropy (nats)")
    # A loss that explodes would press the others flat.
    middle.set_ylim(0, 2.5 * found.entropy)
    bottom.plot(found.rates, found.accuracy, "C2.-")
    bottom.set_ylabel("accuracy")
    bottom.set_ylim(0, 1)
    bottom.set_xlabel("learning rate")
    bottom.set_xscale("log")
    if len(found.rates) == 1:
        bottom.set_xlim(found.rates[0] / 3, found.rates[0] * 3)
    for part in axes:
        part.axvspan(found.min_lr, found.max_lr, color="C0", alpha=0.07)
        part.axvline(found.best_lr, color="C3", lw=1)
        for rate in found.rates[found.failed]:
            part.axvline(rate, color="0.6", ls="--", lw=1)
        part.grid(alpha=0.3)
        part.spines[["top", "right"]].set_visible(False)
    label = f"best, below the peak: {found.best_lr:.3g}"
    top.axvline(found.best_lr, color="C3", lw=1, label=label)
    if found.failed.any():
        top.plot([], [], color="0.6", ls="--", lw=1, label="failed")
    figure.legend(
        *top.get_legend_handles_labels(),
        loc="outside upper center",
        ncols=3,
        frameon=False,
        fontsize="small",
    )
    return figure
