"""The callback among others: where it stands, and who else sets the rate."""

import math
import warnings

import keras

from keras_milr import _keras

KEYS = ("probe_mutual_information", "probe_information")
# These set the rate, of an epoch or from now on.
_BEFORE = (keras.callbacks.LearningRateScheduler, keras.callbacks.ReduceLROnPlateau)
# These use what is in the logs, or change the weights.
_BEHIND = (
    keras.callbacks.CSVLogger,
    keras.callbacks.History,
    keras.callbacks.RemoteMonitor,
    keras.callbacks.SwapEMAWeights,
    keras.callbacks.TensorBoard,
)


def take_place(callback):
    """Makes its caller call a callback before those that use its keys.

    The caller is a `CallbackList`. Before anything else it goes through its callbacks
    and tells each of its model. During that call it is given the same callbacks in
    another order, for all calls to come: `callback` stands before the first that uses
    its keys, and behind those that set the rate too, so that it takes up the rate that
    they have set. Otherwise, the order stays as it was.

    Args:
        callback: A callback whose `set_model` is called.
    """
    caller = _keras.calling_list()
    if caller is None or callback not in caller.callbacks:
        return
    callbacks, here = caller.callbacks, caller.callbacks.index(callback)
    uses = [isinstance(other, _BEHIND) or _monitors(other) for other in callbacks]
    place = uses.index(True) if any(uses[:here]) else here
    rest = [other for other in callbacks[place:] if other is not callback]
    setters = [o for o in rest if isinstance(o, _BEFORE) and not _monitors(o)]
    others = [other for other in rest if other not in setters]
    caller.callbacks = [*callbacks[:place], *setters, callback, *others]
    for other in filter(_monitors, callbacks):
        if getattr(other, "mode", None) == "auto":
            other.mode = "max"  # As Keras finds out about metrics.


def _monitors(other):
    return str(getattr(other, "monitor", "")).startswith(KEYS)


class Overruled:
    """Warns where another callback sets the rate over ours again and again."""

    def __init__(self):
        self._set, self._times = None, 0

    def set(self, rate: float | None):
        """Notes the rate that we have set for the next epoch; None where we did not."""
        self._set = rate

    def trained_at(self, rate: float):
        """Compares the rate of the epoch with what we had set."""
        if self._set is None:
            return
        # Once it has lasted for an epoch, others may do what they want.
        ours, self._set = self._set, None
        self._times += 1 if rate != ours else -math.inf
        if self._times == 2:
            warnings.warn(
                "MutualInformationLR: another callback has set the learning rate of "
                f"each epoch so far, this one to {rate:.4g}, after it had been set "
                f"to {ours:.4g}. If that is a warm-up, all is well; a "
                "LearningRateScheduler should then return the rate that it is given. "
                "Else leave one of the two out, or set the rates of layers, with "
                '`layers="all"`, around the rate that the other one sets.',
                stacklevel=2,
            )
