"""Trainings that leave no trace: the model is lent out, and comes back as it was."""

import contextlib
import random

import keras
import numpy as np

from keras_milr import _keras, backend


@contextlib.contextmanager
def own_random_state(seed: int):
    """Gives the code inside random numbers of its own.

    The global generators of Python, NumPy, Keras and its backend are seeded, and
    afterwards go on as if nothing had been drawn.

    Yields:
        A function that seeds them again, but for those of TensorFlow.
    """
    kept = random.getstate(), np.random.get_state()  # noqa: NPY002
    own = _keras.own_seed_generator(seed), backend.own_random_state(seed)
    with own[0] as reseed, own[1] as reseed_backend:

        def again():
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            reseed()
            reseed_backend()

        try:
            again()
            yield again
        finally:
            random.setstate(kept[0])
            np.random.set_state(kept[1])  # noqa: NPY002


@contextlib.contextmanager
def untouched(model, settle: int | None = None):
    """Lends a model for trainings that it will not remember, whatever happens in them.

    The model trains with a copy of its optimizer and a train function of its own, both
    put away afterwards; an optimizer that was not built is still not. The compiled
    metrics are left out of it. Weights, statistics, the states of random seeds, buffers
    and modes of PyTorch's modules, and the metrics that the model itself owns are set
    back.

    What is kept elsewhere is not known: a second optimizer in a custom `train_step`,
    say, or what a layer writes into Python attributes.

    Args:
        model: A compiled, built `keras.Model`.
        settle: Number of training steps after which batch normalisation shall use the
            statistics of these steps. With the usual momentum of 0.99 they come in
            so slowly that after a few steps the model cannot be measured in inference
            mode. Training itself does not depend on it. Defaults to `None`: as it is.

    Yields:
        A function that sets the model and the optimizer back to the start.
    """
    variables = _kept(model.trainable_variables)
    variables += _kept(_on_each_replica(model, model.non_trainable_variables))
    variables += _kept(backend.buffers(model))
    optimizer = _copy_optimizer(model)
    slots = _kept(optimizer.variables)
    momentum = [(layer, layer.momentum) for layer in _normalisations(model)]

    def restart():
        assign(variables + slots)

    with _keras.set_aside(model, optimizer), backend.module_modes(model):
        metrics = _kept(_on_each_replica(model, model.metrics_variables))
        try:
            if settle is not None:
                _settle(momentum, settle)
            yield restart
        finally:
            for layer, value in momentum:
                layer.momentum = value
            model.reset_metrics()  # Those that were built only now.
            assign(variables + metrics)


def _kept(variables):
    # Not the memory that the variables are trained in: a view would follow them.
    return [(v, keras.ops.convert_to_numpy(v).copy()) for v in variables]


def _settle(momentum, steps):
    kept = 0.01 ** (1 / steps)  # A hundredth of the old is left at the end.
    for layer, value in momentum:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = min(value, kept)
        elif value is not None:  # PyTorch's, which is the share of the new.
            layer.momentum = max(value, 1 - kept)


def _on_each_replica(model, variables):
    return [copy for v in variables for copy in backend.copies(model, v)]


def assign(pairs):
    """Sets variables to values, all of them: an interrupt has to wait.

    Half of one state and half of another is none that a model was ever in.

    Args:
        pairs: List of (variable, value).
    """
    interrupt = None
    while True:
        try:
            for variable, value in pairs:
                variable.assign(value)
            break
        except KeyboardInterrupt as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt


def has_statistics(model) -> bool:
    """Whether the model has batch normalisation that follows the training."""
    # PyTorch's does, whether its weights are trained or not.
    return any(getattr(one, "trainable", True) for one in _normalisations(model))


def _normalisations(model):
    kind = keras.layers.BatchNormalization
    found = [layer for layer in _keras.all_layers(model) if isinstance(layer, kind)]
    return [*found, *backend.normalisations(model)]


def _copy_optimizer(model):
    # The variables of a model that trains on several devices are on all of them.
    strategy = getattr(model, "distribute_strategy", None)
    with contextlib.nullcontext() if strategy is None else strategy.scope():
        try:
            return _keras.copy_optimizer(model.optimizer, model)
        except (NotImplementedError, TypeError, ValueError) as error:
            raise ValueError(
                "The model's optimizer must be one that can be copied: its class needs "
                "`get_config` and `from_config`, and registration with "
                "`keras.saving.register_keras_serializable` where another optimizer "
                f"holds it. Received: {type(model.optimizer).__name__}. {error}"
            ) from error
