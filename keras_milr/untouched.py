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
def untouched(model):
    """Lends a model for trainings that it will not remember, whatever happens in them.

    The model trains with a copy of its optimizer and a train function of its own, both
    put away afterwards; an optimizer that was not built is still not. The compiled
    metrics are left out of it. Weights, statistics, the states of random seeds and of
    recurrent layers, buffers and modes of PyTorch's modules, and the metrics that the
    model itself owns are set back.

    What is kept elsewhere is not known: a second optimizer in a custom `train_step`,
    say, or what a layer writes into Python attributes.

    Args:
        model: A compiled, built `keras.Model`.

    Yields:
        A function that sets the model and the optimizer back to the start.
    """
    variables = _kept(model.trainable_variables)
    variables += _kept(_on_each_replica(model, model.non_trainable_variables))
    variables += _kept(backend.buffers(model)) + _kept(_keras.states(model))
    optimizer = _copy_optimizer(model)
    slots = _kept(optimizer.variables)

    def restart():
        assign(variables + slots)

    with _keras.set_aside(model, optimizer), backend.module_modes(model):
        metrics = _kept(_on_each_replica(model, model.metrics_variables))
        try:
            yield restart
        finally:
            model.reset_metrics()  # Those that were built only now.
            assign(variables + metrics)


def _kept(variables):
    # Not the memory that the variables are trained in: a view would follow them.
    return [(v, keras.ops.convert_to_numpy(v).copy()) for v in variables]


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
