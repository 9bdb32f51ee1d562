"""An optimizer with a learning rate for each layer."""

import warnings

import keras
import numpy as np

from keras_milr import _keras, names
from keras_milr._arguments import LARGEST, check_number


@keras.saving.register_keras_serializable(package="keras_milr")
class LayerwiseOptimizer(_keras.WrapperOptimizer):
    """Gives each layer a learning rate of its own, around any Keras optimizer.

    The rate of a layer is the optimizer's learning rate, the base, times the layer's
    multiplier. What a layer's variables receive is exactly what the inner optimizer
    would do at that rate: momentum, weight decay, clipping, moving averages,
    accumulation and constraints included. (Scaling the gradients instead is right for
    plain SGD only: Adam divides the scale out again.)

    `learning_rate` reads and sets the base, so schedules, warm-up,
    `LearningRateScheduler` and `ReduceLROnPlateau` go on working and compose with the
    multipliers. These are a variable: to change them retraces nothing, and they are
    saved with the model.

    Layers are those that own trainable weights when the optimizer is built; frozen
    ones are left alone. See `keras_milr.names` for how they are named: by the
    shortest unique end of their path, a regular expression, or the name of a block.

    Example:

    ```python
    optimizer = keras_milr.LayerwiseOptimizer(
        keras.optimizers.AdamW(1e-3), multipliers={"embedding": 0, "head": 10}
    )
    model.compile(optimizer, "sparse_categorical_crossentropy")
    model.fit(x, y, epochs=5)
    optimizer.summary()
    ```

    Args:
        inner_optimizer: A `keras.optimizers.Optimizer` instance, or the name of one.
            The wrapper takes it over: it cannot serve on its own any more. Not a
            `LossScaleOptimizer`, which goes around the wrapper.
        multipliers: Dict from layer to multiplier, a finite number, at least 0; a key
            is a name or a regular expression. Layers that are not named have 1.
            A functional model inside of the model, as those of `keras.applications`,
            has no name in the paths of its variables: name its layers, or with `".*"`
            all layers but those that are named too, as `{".*": 0.1, "head": 1}`.
            With 0 a layer's weights stay as they are, weight decay included; only a
            constraint still applies.
            Defaults to `None`: 1 for all.
        layer_decay: Float in (0, 1], the ratio between the multipliers of a layer and
            of the next one above it; the last has 1. Multiplied with `multipliers`.
            Defaults to `None`: no such ladder.
        layer_order: The rungs of that ladder, from input to output: list of names or
            regular expressions, which together must name every layer; those of one
            entry share a rung. Defaults to `None`: each layer is a rung, in the
            order of the model's `trainable_variables`.
        name: String, the name of the optimizer. Defaults to `None`: automatic.

    Raises:
        TypeError: for arguments of a wrong type.
        ValueError: for numbers out of range, and, when the optimizer is built before
            the first step, for a key that names no layer, or for keys that disagree
            about one. The message lists the layers.
    """

    def __init__(
        self,
        inner_optimizer,
        multipliers=None,
        layer_decay=None,
        layer_order=None,
        name=None,
    ):
        inner_optimizer = _checked_inner(inner_optimizer)
        if multipliers is not None:
            _check_multipliers(multipliers)
        if layer_decay is not None:
            check_number("layer_decay", layer_decay, above=0, at_most=1)
        if layer_order is not None:
            if isinstance(layer_order, str) or not isinstance(
                layer_order, (list, tuple)
            ):
                raise TypeError(
                    "Argument `layer_order` must be a list of names or regular "
                    f"expressions. Received: layer_order={layer_order!r}"
                )
            if layer_decay is None:
                raise ValueError(
                    "Argument `layer_order` orders the rungs of `layer_decay`. "
                    f"Received: layer_order={layer_order!r} without `layer_decay`"
                )
        # A rate and a step counter of the wrapper's own would mean nothing; like
        # Keras' LossScaleOptimizer it has them, and shows those of the inner one.
        super().__init__(learning_rate=0.0, name=name)
        # The inner optimizer keeps the moving averages; see SwapEMAWeights.
        self.inner_optimizer = inner_optimizer
        self._given = (multipliers, layer_decay, layer_order)
        self._saved = None  # Layers and multipliers of a saved optimizer, by position.
        _keras.scale_learning_rate(inner_optimizer, self._multiplier_at)

    # ------------------------------------------------------------- layer-wise rates

    @property
    def multipliers(self) -> dict[str, float]:
        """The multiplier of each layer, by name; ValueError before it is built."""
        self._check_built()
        values = keras.ops.convert_to_numpy(self._multipliers.value)
        return dict(zip(self._names, map(float, values), strict=True))

    def set_multipliers(self, multipliers: dict[str, float]):
        """Changes multipliers; those of layers that are not named stay.

        Args:
            multipliers: Dict from name or regular expression to a finite number, at
                least 0.

        Raises:
            ValueError: for an optimizer that is not built yet, a key that names no
                layer, keys that disagree, or values out of range.
        """
        self._check_built()
        _check_multipliers(multipliers)
        old = self.multipliers.values()
        new = names.resolve(multipliers, self._paths, "multipliers")
        values = [o if n is None else n for o, n in zip(old, new, strict=True)]
        self._multipliers.assign(np.array(values, "float32"))
        _keras.stop(
            self.inner_optimizer,
            [
                variable
                for variable, owner in zip(
                    _keras.trained_variables(self), self._owners, strict=True
                )
                if values[owner] == 0
            ],
        )

    def layer_of(self, variable) -> str:
        """Name of the layer that a trainable variable belongs to."""
        self._check_built()
        return self._names[self._owners[_keras.index_of(self, variable)]]

    def summary(self, print_fn=print):
        """Prints a table: layer, number of parameters, multiplier, learning rate.

        Args:
            print_fn: Function that takes each line. Defaults to `print`.
        """
        rate = float(keras.ops.convert_to_numpy(self.learning_rate))
        sizes = [0] * len(self.multipliers)
        for variable, owner in zip(
            _keras.trained_variables(self), self._owners, strict=True
        ):
            sizes[owner] += int(np.prod(variable.shape))
        width = max(len("layer"), *map(len, self._names))
        print_fn(
            f"{'layer':<{width}} {'parameters':>12} {'multiplier':>12} {'rate':>12}"
        )
        for (name, value), size in zip(self.multipliers.items(), sizes, strict=True):
            print_fn(
                f"{name:<{width}} {size:>12,} {value:>12.4g} {rate * value:>12.4g}"
            )

    def _multiplier_at(self, variable):
        return self._multipliers[self._owners[_keras.index_of(self, variable)]]

    def _check_built(self):
        if not self.built:
            raise ValueError(
                "The layers are known once the optimizer is built: in the first step "
                "of `fit`, or by `optimizer.build(model.trainable_variables)`."
            )

    def _start_multipliers(self, variables, may_miss=False):
        """Layers and multipliers by the arguments: paths, owners, values.

        Args:
            variables: Those that the optimizer trains.
            may_miss: Whether the arguments may name layers that are not among them.
        """
        paths, owners = names.owner_paths(variables)
        multipliers, decay, order = self._given
        values = np.ones(len(paths))
        if decay is not None:
            rungs = list(range(len(paths)))
            if order is not None:
                by_pattern = {pattern: rung for rung, pattern in enumerate(order)}
                rungs = names.resolve(by_pattern, paths, "layer_order", may_miss)
                shown = names.short_names(paths)
                missing = [n for n, r in zip(shown, rungs, strict=True) if r is None]
                if missing:
                    raise ValueError(
                        "Argument `layer_order` must name every layer with trainable "
                        f"weights. Received: {order}, without {', '.join(missing)}"
                    )
            values *= decay ** (max(rungs) - np.array(rungs))
        if multipliers:
            given = names.resolve(multipliers, paths, "multipliers", may_miss)
            values *= [1.0 if value is None else float(value) for value in given]
        return paths, owners, values

    def _restored_multipliers(self, variables):
        """The same as they were saved. Paths change on reload, positions do not."""
        shapes = [list(variable.shape) for variable in variables]
        if shapes != self._saved["shapes"]:
            warnings.warn(
                "LayerwiseOptimizer: its configuration was made for other variables "
                f"({len(self._saved['shapes'])} instead of {len(shapes)}, or of other "
                "shapes), so the multipliers are those of its arguments.",
                stacklevel=4,
            )
            return self._start_multipliers(variables, may_miss=True)
        return (self._saved[key] for key in ("paths", "owners", "values"))

    # -------------------------------------------------------- as Keras' optimizers

    def build(self, variables):
        """Creates the variables, and resolves the names of layers; see `Raises`."""
        if self.built:
            return
        start = self._restored_multipliers if self._saved else self._start_multipliers
        self._paths, self._owners, values = start(variables)
        self._names = names.short_names(self._paths)
        self._multipliers = self.add_variable(
            shape=(len(values),),
            initializer=lambda shape, dtype: keras.ops.convert_to_tensor(values, dtype),
            aggregation="only_first_replica",
            name="multipliers",
        )
        self.inner_optimizer.build(variables)
        super().build(variables)

    def apply(self, grads, trainable_variables=None):
        if not self.built and trainable_variables is not None:
            self.build(list(trainable_variables))
        if self.built and trainable_variables is None:
            trainable_variables = _keras.trained_variables(self)
        self.inner_optimizer.apply(grads, trainable_variables)

    def apply_gradients(self, grads_and_vars):
        super().apply_gradients(grads_and_vars)
        return self.iterations

    @property
    def variables(self):
        return _keras.own_variables(self) + self.inner_optimizer.variables

    def set_weights(self, weights):
        self._check_built()
        for variable, value in zip(self.variables, weights, strict=True):
            variable.assign(value)

    # The inner optimizer's variables are saved with it, as of an object of its own.

    def save_own_variables(self, store):
        for i, variable in enumerate(_keras.own_variables(self)):
            store[str(i)] = keras.ops.convert_to_numpy(variable.value)

    def load_own_variables(self, store):
        variables = _keras.own_variables(self)
        shapes = [tuple(variable.shape) for variable in variables]
        saved = [np.shape(store[str(i)]) for i in range(len(store.keys()))]
        if saved != shapes:  # Of other layers, or some are frozen.
            warnings.warn(
                f"Skipping variable loading for optimizer '{self.name}', because it "
                f"has variables of shapes {shapes} whereas the saved optimizer has "
                f"{saved}.",
                stacklevel=2,
            )
            return
        for i, variable in enumerate(variables):
            variable.assign(store[str(i)])

    @property
    def learning_rate(self):
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate):
        self.inner_optimizer.learning_rate = learning_rate

    @property
    def iterations(self):
        return self.inner_optimizer.iterations

    @property
    def loss_scale_factor(self):
        return self.inner_optimizer.loss_scale_factor

    @loss_scale_factor.setter
    def loss_scale_factor(self, loss_scale_factor):
        if hasattr(self, "inner_optimizer"):  # The base class sets it before there is.
            self.inner_optimizer.loss_scale_factor = loss_scale_factor

    def exclude_from_weight_decay(self, var_list=None, var_names=None):
        self.inner_optimizer.exclude_from_weight_decay(var_list, var_names)

    def finalize_variable_values(self, var_list):
        self.inner_optimizer.finalize_variable_values(var_list)

    def get_config(self):
        multipliers, layer_decay, layer_order = self._given
        return {
            "name": self.name,
            "inner_optimizer": keras.saving.serialize_keras_object(
                self.inner_optimizer
            ),
            "multipliers": multipliers,
            "layer_decay": layer_decay,
            "layer_order": layer_order,
            "saved": self._layers(),
        }

    def copy_around(self, inner_optimizer):
        """The same around another optimizer, with the layers and multipliers of now."""
        copy = type(self)(inner_optimizer, *self._given, name=self.name)
        copy._saved = self._layers()
        return copy

    def _layers(self):
        if not self.built:
            return self._saved
        return {
            "paths": list(self._paths),
            "owners": list(self._owners),
            "values": list(self.multipliers.values()),
            "shapes": [list(v.shape) for v in _keras.trained_variables(self)],
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        config = dict(config)
        saved = config.pop("saved", None)
        config["inner_optimizer"] = keras.saving.deserialize_keras_object(
            config["inner_optimizer"], custom_objects=custom_objects
        )
        optimizer = cls(**config)
        optimizer._saved = saved
        return optimizer


def _checked_inner(inner_optimizer):
    given = inner_optimizer
    try:
        inner_optimizer = keras.optimizers.get(given)
        known = inner_optimizer is not None
    except (AttributeError, KeyError, TypeError, ValueError):
        known = False
    if not known:
        raise ValueError(
            "Argument `inner_optimizer` must be a keras.optimizers.Optimizer, or the "
            f"name of one. Could not interpret optimizer identifier: {given!r}"
        )
    if isinstance(inner_optimizer, keras.optimizers.LossScaleOptimizer):
        raise ValueError(
            "Argument `inner_optimizer` must not be a LossScaleOptimizer. Put it "
            "around the wrapper: LossScaleOptimizer(LayerwiseOptimizer(...)), which "
            "`compile` does by itself under mixed_float16."
        )
    multi = getattr(keras.optimizers, "MultiOptimizer", ())
    if isinstance(inner_optimizer, (LayerwiseOptimizer, multi)):
        raise ValueError(
            "Argument `inner_optimizer` must be an optimizer with one learning rate. "
            f"Received: {type(inner_optimizer).__name__}"
        )
    taken = _keras.is_scaled(inner_optimizer)  # Its steps go by the other's layers.
    if taken or inner_optimizer.built:
        why = "is inside of another LayerwiseOptimizer" if taken else "has been used"
        raise ValueError(
            "Argument `inner_optimizer` must be a new optimizer. Received: "
            f"{type(inner_optimizer).__name__} that {why} already"
        )
    return inner_optimizer


def _check_multipliers(multipliers):
    if not isinstance(multipliers, dict):
        raise TypeError(
            "Argument `multipliers` must be a dict from layer to multiplier. "
            f"Received: multipliers={multipliers!r}"
        )
    for layer, value in multipliers.items():
        check_number(f"multipliers[{layer!r}]", value, at_least=0, at_most=LARGEST)
