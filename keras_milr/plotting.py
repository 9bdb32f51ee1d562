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
