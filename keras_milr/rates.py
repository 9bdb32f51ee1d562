"""What a policy's rates are set to: one learning rate, or one for each group of layers.

Both kinds go through `model.optimizer` every time. On JAX the trainer has its state
within an epoch: there a callback must have asked for `self.model` before.
"""

import contextlib

import keras
import numpy as np

from keras_milr.layers import choose
from keras_milr.optimizers import LayerwiseOptimizer


class NetworkRate:
    """The learning rate of a model's optimizer, as an array of one.

    Args:
        model: A compiled `keras.Model`.

    Raises:
        ValueError: for an optimizer whose rate cannot be set.
    """

    names = None

    def __init__(self, model):
        self._model = model
        set_base(model, base_rate(model))

    def get(self) -> np.ndarray:
        return np.array([base_rate(self._model)])

    def set(self, rates: np.ndarray):
        self._model.optimizer.learning_rate = float(rates[0])

    # Nobody else sets a part of the rate: see `LayerRates.own`.
    own, set_own = get, set

    def keeping_base(self, base: float):
        """Nothing: the rate is set after a roll back in any case."""
        return contextlib.nullcontext()

    def ceiling(self, start: np.ndarray) -> float:
        """Upper bound where none is given: a thousand times the rate at the start.

        That is far above it, since a start may be far too low. What a rate that is too
        high does is rolled back.
        """
        return 1000.0 * start.max()

    def state(self) -> dict:
        """What is not in the optimizer's variables, as a dict for JSON."""
        return {}

    def resume(self, state: dict):
        """Goes on from a state."""


class LayerRates:
    """The learning rates of groups of layers: base × multiplier.

    The base stays what it is, for others to set. Layers of a group keep the ratios of
    their multipliers; the rate of the group is the highest of theirs.

    Args:
        model: A compiled, built `keras.Model`.
        layers: See `keras_milr.layers.choose`.

    Raises:
        ValueError: for an optimizer that is not layer-wise, for what `choose` refuses,
            and for a group that a multiplier of 0 has frozen, unless `layers` is
            `"all"`, which leaves it out.
    """

    def __init__(self, model, layers):
        self._model = model
        optimizer = self._optimizer()
        if not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        self.groups, self._shares, self._highest = [], [], 0.0
        self._kept = None  # A base that stands in for the optimizer's.
        multipliers = optimizer.multipliers
        for group in choose(model, layers):
            try:
                members = [optimizer.layer_of(variable) for variable in group.variables]
            except KeyError as error:
                raise ValueError(
                    "Argument `layers` must name layers that the optimizer trains: "
                    "compile again after a change of `trainable`. "
                    f"Received: {group.name!r}, which it does not know"
                ) from error
            start = {name: multipliers[name] for name in members}
            highest = max(start.values())
            if highest > 0:
                self.groups.append(group)
                self._highest = max(self._highest, highest)
                self._shares.append({k: v / highest for k, v in start.items()})
            elif layers != "all":
                raise ValueError(
                    "Argument `layers` must name layers that train. Received: "
                    f"{group.name!r}, which has a multiplier of 0"
                )
        if not self.groups:
            raise ValueError(
                "Argument `layers` found nothing to train. "
                f"Received: layers={layers!r} for model {model.name!r}"
            )
        self.names = [group.name for group in self.groups]

    def get(self) -> np.ndarray:
        return self._base() * self.own()

    def set(self, rates: np.ndarray):
        base = self._base()
        if base > 0:  # Else a warm-up begins there: any multiplier will do.
            self.set_own(rates / base)

    def own(self) -> np.ndarray:
        """The part of the rates that nobody else sets: the multipliers, not the base.

        One for each group, the highest of its layers.
        """
        multipliers = self._optimizer().multipliers
        highest = [max(multipliers[k] for k in shares) for shares in self._shares]
        return np.array(highest)

    def set_own(self, values: np.ndarray):
        optimizer = self._optimizer()
        # All of them: a name alone may also mean what is below a layer.
        multipliers = optimizer.multipliers
        for value, shares in zip(values, self._shares, strict=True):
            for name, share in shares.items():
                multipliers[name] = float(value * share)
        optimizer.set_multipliers(multipliers)

    @contextlib.contextmanager
    def keeping_base(self, base: float):
        """Context that sets the optimizer's rate, which others set, to what it was.

        A roll back has set it to that of the weights that are restored. A schedule goes
        by its own steps, and so does a function: these have gone back too, to the
        beginning of a warm-up say. Inside of the context rates are multiples of the
        base that failed, and not of one that is next to nothing, whose multipliers
        would be far too high.
        """
        try:
            self._model.optimizer.learning_rate = base
        except (TypeError, AttributeError):
            self._kept = base
        try:
            yield
        finally:
            self._kept = None

    def _base(self):
        return base_rate(self._model) if self._kept is None else self._kept

    def ceiling(self, start: np.ndarray) -> float:
        """Upper bound where none is given: ten times the highest rate at the start.

        That is the highest multiplier at the start times the optimizer's rate of now,
        which others may warm up.
        """
        return 10.0 * self._base() * self._highest

    def state(self) -> dict:
        # Names may change when a model is saved and loaded, their order does not.
        shares = [list(shares.values()) for shares in self._shares]
        return {"shares": shares, "highest": self._highest}

    def resume(self, state: dict):
        self._highest = state["highest"]
        self._shares = [
            dict(zip(shares, values, strict=True))
            for shares, values in zip(self._shares, state["shares"], strict=True)
        ]

    def _optimizer(self):
        optimizer = _without_scale(self._model.optimizer)
        if not isinstance(optimizer, LayerwiseOptimizer):
            raise ValueError(
                "Argument `layers` needs an optimizer with a rate for each layer. "
                "Compile with it as `model.compile(keras_milr.LayerwiseOptimizer("
                f"keras.optimizers.{type(optimizer).__name__}(...)), ...)`. "
                f"Received: {type(optimizer).__name__}"
            )
        return optimizer


@contextlib.contextmanager
def keeping_multipliers(model):
    """Context after which the multipliers of a model's layers are as before it."""
    optimizer = _without_scale(model.optimizer)
    known = isinstance(optimizer, LayerwiseOptimizer)
    multipliers = optimizer.multipliers if known else None
    yield
    if known:  # It also takes the velocity from layers that shall stand.
        optimizer.set_multipliers(multipliers)


def _without_scale(optimizer):
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return optimizer.inner_optimizer
    return optimizer


def steps_made(model) -> int:
    """How many steps the model's optimizer has made."""
    return int(keras.ops.convert_to_numpy(model.optimizer.iterations))


def base_rate(model) -> float:
    """The learning rate of the model's optimizer; of a schedule, the present one."""
    try:
        return float(keras.ops.convert_to_numpy(model.optimizer.learning_rate))
    except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
        raise ValueError(_no_rate(model)) from error


def set_base(model, rate: float):
    """Sets the learning rate of the model's optimizer; ValueError where it cannot."""
    try:
        model.optimizer.learning_rate = rate
    except TypeError as error:
        raise ValueError(
            "MutualInformationLR sets the learning rate, and cannot where the "
            "optimizer has a LearningRateSchedule. Compile with a number instead, as "
            "`keras.optimizers.Adam(learning_rate=1e-3)`, or leave the callback out. "
            f"Received: {type(model.optimizer).__name__} with a schedule"
        ) from error
    except (AttributeError, NotImplementedError, ValueError) as error:
        raise ValueError(_no_rate(model)) from error


def _no_rate(model):
    optimizer = getattr(model, "optimizer", None)
    received = type(optimizer).__name__
    if optimizer is None:
        received = f"model {model.name!r}, which is not compiled"
    return (
        "MutualInformationLR needs an optimizer with one learning rate that can be "
        f"set, a number and no function. Received: {received}"
    )
