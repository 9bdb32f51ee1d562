"""Private names of Keras that we rely on, all of them.

Tested with Keras 3.12.4 and 3.15.1.
"""

import contextlib
import pathlib
import sys
import zipfile

import keras
import numpy as np
from keras.src.backend.common import global_state
from keras.src.backend.common.masking import get_keras_mask
from keras.src.saving import saving_lib
from keras.src.saving.keras_saveable import KerasSaveable

# Base of all that is saved with a model; public are layers, metrics, losses and so on.
Saveable = KerasSaveable


def metrics(model) -> list:
    """Every metric instance of the model, compiled or its own.

    On TensorFlow the compiled metrics are built in the first training step, and
    `model.metrics` does not list them before; by then it is too late to say that one
    is missing. What `compile` was given stands in `_user_metrics` of the container.
    """
    found = []
    for metric in model.metrics:
        found.append(metric)
        for name in ("_user_metrics", "_user_weighted_metrics"):
            found.extend(keras.tree.flatten(getattr(metric, name, None)))
    return [m for m in found if isinstance(m, keras.metrics.Metric)]


def loss_weights(model):
    """The loss weights that the model is compiled with, or None.

    Public Keras gives them serialised only, together with losses that may not be.
    """
    return getattr(getattr(model, "_compile_loss", None), "_user_loss_weights", None)


def mask_of(output):
    """The mask that a layer has attached to its output, or None.

    Keras' own losses read it there, and public Keras has no name for it.
    """
    return get_keras_mask(output)


def sublayers(layer) -> list:
    """The layers directly inside a layer; public Keras lists those of models only."""
    return layer._flatten_layers(include_self=False, recursive=False)


def all_layers(model) -> list:
    """Every layer inside a model, at any depth."""
    return model._flatten_layers(include_self=False)


def saved_entry(path: str, name: str) -> dict:
    """The arrays that a part of a model, an attribute, has saved in a file.

    Public Keras reads them into a model only, which must have the same layers.
    """
    with contextlib.ExitStack() as stack:
        if path.endswith(".keras"):
            archive = stack.enter_context(zipfile.ZipFile(path))
            store = saving_lib.H5IOStore("model.weights.h5", archive)
        else:
            store = saving_lib.H5IOStore(pathlib.Path(path))
        stack.callback(store.close)
        entry = store.get(name)
        return {key: entry[key] for key in list(entry.keys())}


def is_whole(path: str) -> bool:
    """Whether all that is in a file of weights can be read.

    Of one that was cut off while it was written, the beginning may say that it is
    whole; public Keras finds out in the middle of loading.
    """

    def load(name, item):
        if hasattr(item, "dtype"):  # It is no group.
            np.asarray(item)

    try:
        store = saving_lib.H5IOStore(pathlib.Path(path))
        try:
            store.h5_file.visititems(load)
        finally:
            store.close()
    except (KeyError, OSError, RuntimeError):
        return False
    return True


def calling_list() -> keras.callbacks.CallbackList | None:
    """The `CallbackList` that is calling; None without one.

    Public Keras tells a callback nothing of the others, nor of their order. These are
    in its attribute `callbacks`.
    """
    frame = sys._getframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, keras.callbacks.CallbackList):
            return caller
        frame = frame.f_back
    return None


def callbacks_of_caller() -> list | None:
    """The callbacks of the `CallbackList` that is calling; None without one."""
    caller = calling_list()
    return None if caller is None else caller.callbacks


def backup_paths(backup) -> tuple[str, str, str]:
    """Files of a `BackupAndRestore`: weights, previous weights, metadata."""
    return (
        backup._weights_path,
        backup._prev_weights_path,
        backup._training_metadata_path,
    )


def scale_learning_rate(optimizer, multiplier):
    """Makes an optimizer treat each variable as it would at a rate of its own.

    Public Keras has no place for a rate per variable. `update_step` is handed the rate,
    but weight decay reads it from `_get_current_learning_rate`, once for all
    variables, in `_apply_weight_decay`. PyTorch's fast versions update all variables at
    one rate in `_backend_update_step`; the one that they override is used instead.
    All are replaced on the instance.

    Args:
        optimizer: A `keras.optimizers.Optimizer`.
        multiplier: Function from a variable of the optimizer to a scalar tensor.
    """
    update_step = optimizer.update_step
    apply_weight_decay = optimizer._apply_weight_decay
    current_rate = optimizer._get_current_learning_rate
    moves_at_zero = _moves_at_rate_zero(optimizer)
    current = None  # The variable that is being updated.

    def scaled_rate():
        rate = current_rate()
        return rate if current is None else rate * multiplier(current)

    def scaled_step(gradient, variable, learning_rate):
        nonlocal current
        current, scale = variable, multiplier(variable)
        if moves_at_zero:
            before = keras.ops.copy(variable)
            update_step(gradient, variable, learning_rate * scale)
            after = keras.ops.convert_to_tensor(variable)
            optimizer.assign(variable, keras.ops.where(scale == 0, before, after))
        else:
            update_step(gradient, variable, learning_rate * scale)
        current = None

    def scaled_weight_decay(variables):
        nonlocal current
        for current in filter(optimizer._use_weight_decay, variables):
            apply_weight_decay([current])
        current = None

    optimizer.update_step = scaled_step
    optimizer._apply_weight_decay = scaled_weight_decay
    optimizer._get_current_learning_rate = scaled_rate
    for cls in type(optimizer).__mro__:
        if cls.__name__ == "TorchParallelOptimizer":
            optimizer._backend_update_step = super(cls, optimizer)._backend_update_step


def stop(optimizer, variables):
    """Takes the velocity from variables whose rate has become 0: they shall stand."""
    if _is_own(optimizer, keras.optimizers.SGD) and optimizer.momentums:
        for variable in variables:
            velocity = optimizer.momentums[optimizer._get_variable_index(variable)]
            velocity.assign(keras.ops.zeros(velocity.shape, velocity.dtype))


def _is_own(optimizer, classes):
    """Whether it is Keras' own, of these classes: a subclass may do anything."""
    own = type(optimizer).__module__.startswith("keras.")
    return own and isinstance(optimizer, classes)


def _moves_at_rate_zero(optimizer):
    """Whether the optimizer may change a variable although its rate is 0.

    Velocities go on (that of SGD is 0 after `stop`, and stays so), Ftrl divides by the
    rate, ScheduleFreeAdamW averages, and of an optimizer that is not Keras' own
    nothing is known. To undo that costs a copy of the weights in every step, and all
    of an embedding's where a step touches a few rows, so the others are told apart.
    """
    if _is_own(optimizer, keras.optimizers.RMSprop):
        return optimizer.momentum != 0
    still = (
        *("Adadelta", "Adafactor", "Adagrad", "Adam", "Adamax"),
        *("Lamb", "Lion", "Muon", "Nadam", "SGD"),
    )
    classes = tuple(getattr(keras.optimizers, name) for name in still)
    return not _is_own(optimizer, classes)


@contextlib.contextmanager
def set_aside(model, optimizer):
    """Lends a model another optimizer, for trainings that it shall not remember.

    A train function is compiled anew, and the compiled metrics stay out of it, so that
    neither traces nor metrics of the model are touched, not even built. Nor is the
    loss: `fit` looks into its data, and shuffles, to build one. The attributes
    are replaced past `__setattr__`, by which TensorFlow would keep track of the
    optimizer as a part of the model's checkpoints.
    """
    loss = model._compile_loss
    if loss is not None and not loss.built:
        loss = type(loss)(
            loss._user_loss, loss._user_loss_weights, output_names=loss.output_names
        )
    lent = {"optimizer": optimizer, "_compile_loss": loss}
    lent |= {"train_function": None, "_compile_metrics": None}
    kept = {name: vars(model)[name] for name in lent}
    jax_state = {k: vars(model)[k] for k in ("_jax_state",) if k in vars(model)}
    vars(model).update(lent)
    try:
        yield
    finally:
        vars(model).update(kept)
        # The weights of the last step, which JAX's trainer keeps a hold of.
        vars(model).pop("_jax_state", None)
        vars(model).update(jax_state)


def copy_optimizer(optimizer, model):
    """An optimizer in the same state for the same variables, built.

    An optimizer that is not built yet stays so. What `exclude_from_weight_decay` was
    told is not in the configuration, and the variables that the optimizer was built
    for have no public name.
    """
    copy = _unbuilt_copy(optimizer)
    pair = (optimizer, copy)
    while all(pair):
        for name, value in vars(pair[0]).items():
            if name.startswith("_exclude_from_weight_decay"):
                vars(pair[1])[name] = value
        pair = [getattr(one, "inner_optimizer", None) for one in pair]
    if not optimizer.built:
        copy.build(model.trainable_variables)
        return copy
    copy.build(optimizer._trainable_variables)
    for new, old in zip(copy.variables, optimizer.variables, strict=True):
        new.assign(old)
    return copy


def _unbuilt_copy(optimizer):
    # What holds another optimizer has it serialised in its configuration, and for that
    # Keras imports TensorFlow wherever it is installed.
    inner = getattr(optimizer, "inner_optimizer", None)
    if type(optimizer) is keras.optimizers.LossScaleOptimizer:
        return type(optimizer)(
            _unbuilt_copy(inner),
            initial_scale=optimizer.initial_scale,
            dynamic_growth_steps=optimizer.dynamic_growth_steps,
            name=optimizer.name,
        )
    if hasattr(optimizer, "copy_around"):
        return optimizer.copy_around(_unbuilt_copy(inner))
    return type(optimizer).from_config(optimizer.get_config())


@contextlib.contextmanager
def own_seed_generator(seed):
    """Sets aside the global generator of `keras.random`, or the lack of one.

    Yields:
        A function that seeds the one that stands in.
    """
    name = "global_seed_generator"  # As Keras 3.12 and 3.15 call it.
    kept = global_state.get_global_attribute(name)
    # With a name of its own, or the next automatic name would be another.
    own = keras.random.SeedGenerator(seed, name="range_test")
    start = keras.ops.convert_to_numpy(own.state).copy()
    global_state.set_global_attribute(name, own)
    try:
        yield lambda: own.state.assign(start)
    finally:
        global_state.set_global_attribute(name, kept)
