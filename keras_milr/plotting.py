"""Figures of a training. Matplotlib is imported on use only."""

import keras
import numpy as np


def plot_history(history):
    """Plots information and learning rate over the epochs.

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
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            "`plot_history` needs matplotlib: pip install 'keras-milr[plot]'"
        ) from error

    series = _series(history)
    figure, (top, bottom) = pyplot.subplots(
        2, 1, sharex=True, figsize=(7, 5.5), height_ratios=(3, 2), layout="constrained"
    )
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
    top.set_ylabel("nats")
    top.set_ylim(bottom=0)
    top.legend(loc="lower right", frameon=False)
    # A point has the rate that led up to it.
    bottom.step(epochs, series["rate"], "C2", where="pre", marker=".")
    bottom.set_yscale("log")
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("epochs trained")
    bottom.xaxis.get_major_locator().set_params(integer=True)
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _series(history):
    """Arrays to draw, by name: `epoch`, `rate`, and what is known of the rest."""
    if isinstance(history, keras.callbacks.History):
        logs = history.history
        names = {
            "rate": "learning_rate",
            "information": "probe_information",
            "value": "probe_mutual_information",
        }
        if "probe_information" not in logs:
            # A validation that was not in every epoch has no place on the axis.
            metrics = ("val_mutual_information", "mutual_information")
            epochs = len(logs.get("learning_rate", ()))
            whole = [key for key in metrics if len(logs.get(key, ())) == epochs > 0]
            names["value"] = whole[0] if whole else ""
        series = {k: np.asarray(logs[v]) for k, v in names.items() if v in logs}
        if "rate" not in series or len(series) == 1:
            raise ValueError(
                "Argument `history` must have a learning rate and a mutual information "
                f"in its logs. Received: keys {sorted(logs)}"
            )
        series["epoch"] = np.asarray(history.epoch) + 1
        return series
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
    names = ("epoch", "batch", "rate", "information", "value", "entropy", "noise")
    series = {name: np.array([record[name] for record in records]) for name in names}
    batches = history.params.get("steps") or max(series["batch"].max(), 1)
    series["epoch"] = series["epoch"] + series["batch"] / batches
    return series


def plot_range(found):
    """Draws a `keras_milr.LRRange`; see its `plot`."""
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            "`LRRange.plot` needs matplotlib: pip install 'keras-milr[plot]'"
        ) from error

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
