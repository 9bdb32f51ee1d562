"""Private names of Keras that we rely on, all of them.

Each is looked up when this file is imported, so that a Keras that has renamed one is
refused in a sentence, and not by an AttributeError in the middle of a training.
"""

import collections
import contextlib
import importlib
import inspect
import pathlib
import sys
import zipfile

import keras
import numpy as np

from keras_milr._version import __version__

TESTED = "3.10 to 3.15"  # By `make test-versions`.


def _missing(name) -> ImportError:
    return ImportError(
        f"keras_milr {__version__} relies on `{name}`, a private name of Keras, which "
        f"Keras {keras.__version__} does not have. It was tested with Keras {TESTED}: "
        "install one of these, or a newer keras_milr."
    )


def _from(module, name):
    """A private name out of a private module."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise _missing(f"{module}.{name}") from error


# Base of all that is saved with a model; public are layers, metrics, losses and so on.
_Saveable = _from("keras.src.saving.keras_saveable", "KerasSaveable")
_H5IOStore = _from("keras.src.saving.saving_lib", "H5IOStore")
_get_keras_mask = _from("keras.src.backend.common.masking", "get_keras_mask")
_STATE = "keras.src.backend.common.global_state"
_get_global = _from(_STATE, "get_global_attribute")
_set_global = _from(_STATE, "set_global_attribute")
_SEED_GENERATOR = "global_seed_generator"
_CompileLoss = _from("keras.src.trainers.compile_utils", "CompileLoss")
_CompileMetrics = _from("keras.src.trainers.compile_utils", "CompileMetrics")
if keras.backend.backend() == "tensorflow":
    _from("keras.src.backend.tensorflow.optimizer", "TFOptimizer")
if keras.backend.backend() == "torch":
    _torch = "keras.src.backend.torch.optimizers.torch_parallel_optimizer"
    _from(_torch, "TorchParallelOptimizer")

_METHODS = {
    keras.Model: ("_flatten_layers",),
    keras.optimizers.Optimizer: (
        *("_apply_weight_decay", "_use_weight_decay", "_get_current_learning_rate"),
        *("_backend_update_step", "_get_variable_index"),
    ),
    _Saveable: ("_obj_type",),
}
_ATTRIBUTES = {
    keras.Model: ("_compile_loss", "_compile_metrics"),
    _CompileLoss: ("_user_loss", "_user_loss_weights"),
    _CompileMetrics: ("_user_metrics", "_user_weighted_metrics"),
    keras.optimizers.Optimizer: (
        *("_trainable_variables", "_variables", "_model_variables_moving_average"),
        "_exclude_from_weight_decay",
    ),
    keras.callbacks.BackupAndRestore: (
        *("_weights_path", "_prev_weights_path", "_training_metadata_path"),
    ),
    keras.callbacks.EarlyStopping: ("_direction",),  # Of a metric, which it reads.
}


def _mentioned(cls) -> set:
    """The names in the code of a class, since to make one would start the backend."""
    methods = [value for one in cls.__mro__ for value in vars(one).values()]
    codes = [getattr(inspect.unwrap(m), "__code__", None) for m in methods]
    return {name for code in codes if code is not None for name in code.co_names}


def _check():
    for table, known in ((_METHODS, dir), (_ATTRIBUTES, _mentioned)):
        for cls, wanted in table.items():
            for name in set(wanted).difference(known(cls)):
                raise _missing(f"{cls.__module__}.{cls.__name__}.{name}")
    module = "keras.src.random.seed_generator"
    code = _from(module, "global_seed_generator").__code__
    constant = getattr(sys.modules[module], "GLOBAL_SEED_GENERATOR", None)
    if _SEED_GENERATOR not in (constant, *code.co_consts):
        raise _missing(f"{module}: {_SEED_GENERATOR!r}")


_check()


class Saveable(_Saveable):
    """Base of what is saved with a model, of which nothing is but what it says."""

    def _obj_type(self):
        return "Loss"  # The kind that has no parts.


class IncreasingMetric(keras.metrics.Metric):
    """Base of metrics of which more is better."""

    # Read by EarlyStopping, ModelCheckpoint and ReduceLROnPlateau.
    _direction = "up"


class WrapperOptimizer(keras.optimizers.Optimizer):
    """Base of an optimizer around another one, `inner_optimizer`."""

    @property
    def _model_variables_moving_average(self):
        # SwapEMAWeights takes the lack of it for a lack of averages.
        return self.inner_optimizer._model_variables_moving_average


def metrics(model) -> dict:
    """Every metric instance of the model, compiled or its own, by its key in the logs.

    Those that `compile` was given are not in `model.metrics`, and only in the first
    training step does Keras build the containers that know their keys; by then it is
    too late to say that one is missing.
    """
    found, times = {}, collections.Counter()

    def add(metric, prefix="", again=""):
        known = any(metric is one for one in found.values())
        single = isinstance(metric, keras.metrics.Metric)
        if known or not single or isinstance(metric, _CompileMetrics):
            return
        key = prefix + metric.name
        if key in times:
            key = prefix + again + metric.name
        found[f"{key}_{times[key]}" if key in times else key] = metric
        times[key] += 1

    for container in model.metrics:
        for name, again in (("metrics", ""), ("weighted_metrics", "weighted_")):
            given = getattr(container, f"_user_{name}", None)
            for prefix, part in _by_output(model, given):
                for metric in keras.tree.flatten(part):
                    add(metric, prefix, again)
    for metric in model.metrics:
        add(metric)
    return found


def _by_output(model, given):
    """Metrics as `compile` was given them, with what stands before their keys."""
    names = getattr(model, "output_names", None) or []
    single = isinstance(model, keras.Sequential) or len(names) == 1
    if isinstance(given, dict) and not single:
        pairs = given.items()
    elif isinstance(given, (list, tuple)) and 1 < len(names) == len(given):
        pairs = zip(names, given, strict=True)
    else:
        return [("", given)]
    return [(f"{name}_", part) for name, part in pairs]


def loss_weights(model):
    """The loss weights that the model is compiled with, or None.

    Public Keras gives them serialised only, together with losses that may not be.
    """
    return getattr(getattr(model, "_compile_loss", None), "_user_loss_weights", None)


def mask_of(output):
    """The mask that a layer has attached to its output, or None.

    Keras' own losses read it there, and public Keras has no name for it.
    """
    return _get_keras_mask(output)


def sublayers(layer) -> list:
    """The layers directly inside a layer; public Keras lists those of models only."""
    return layer._flatten_layers(include_self=False, recursive=False)


def all_layers(model) -> list:
    """Every layer inside a model, at any depth."""
    return model._flatten_layers(include_self=False)


def all_built(model) -> bool:
    """Whether every layer of a model is built."""
    return all(layer.built for layer in all_layers(model))


def states(model) -> list:
    """Variables that layers keep apart from their weights, as stateful RNNs do.

    Keras lists them nowhere.
    """
    kept = [getattr(layer, "states", None) for layer in all_layers(model)]
    kept = {id(v): v for v in keras.tree.flatten(kept) if isinstance(v, keras.Variable)}
    return list(kept.values())  # A wrapper names those of its layers again.


def saved_entry(path: str, name: str) -> dict:
    """The arrays that a part of a model, an attribute, has saved in a file.

    Public Keras reads them into a model only, which must have the same layers.
    """
    with contextlib.ExitStack() as stack:
        if path.endswith(".keras"):
            archive = stack.enter_context(zipfile.ZipFile(path))
            store = _H5IOStore("model.weights.h5", archive)
        else:
            store = _H5IOStore(pathlib.Path(path))
        stack.callback(store.close)
        entry = store.get(name)
        return {key: np.array(entry[key]) for key in list(entry.keys())}


def is_whole(path: str) -> bool:
    """Whether all that is in a file of weights can be read.

    Of one that was cut off while it was written, the beginning may say that it is
    whole; public Keras finds out in the middle of loading.
    """

    def load(name, item):
        if hasattr(item, "dtype"):  # It is no group.
            np.asarray(item)

    try:
        store = _H5IOStore(pathlib.Path(path))
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


def batches_behind(model) -> int:
    """How many batches are trained after the one that `on_train_batch_end` names.

    With `steps_per_execution` it is called for several; Keras 3.10 names the first.
    """
    old = keras.__version__.startswith("3.10.")
    return model.steps_per_execution - 1 if old else 0


def backup_paths(backup) -> tuple[str, str, str]:
    """Files of a `BackupAndRestore`: weights, previous weights, metadata."""
    return (
        backup._weights_path,
        backup._prev_weights_path,
        backup._training_metadata_path,
    )


def own_variables(optimizer) -> list:
    """The variables of an optimizer itself, not of one inside of it."""
    return optimizer._variables


def trained_variables(optimizer) -> list:
    """The variables that an optimizer was built for."""
    return optimizer._trainable_variables


def index_of(optimizer, variable) -> int:
    """Where among `trained_variables` a variable is, or what TensorFlow makes of it."""
    return optimizer._get_variable_index(variable)


def scale_learning_rate(optimizer, multiplier):
    """Makes an optimizer treat each variable as it would at a rate of its own.

    Public Keras has no place for a rate per variable. `update_step` is handed the rate,
    but weight decay reads it from `_get_current_learning_rate`, once for all
    variables, in `_apply_weight_decay`, before the first step of any. Here each decays
    right before its own step, and is fetched from memory once. PyTorch's fast versions
    update all variables at one rate in `_backend_update_step`; the one that they
    override is used instead. All are replaced on the instance.

    Args:
        optimizer: A `keras.optimizers.Optimizer`.
        multiplier: Function from a variable of the optimizer to a scalar tensor.
    """
    update_step = optimizer.update_step
    apply_weight_decay = _weight_decay_within_step(optimizer)
    current_rate = optimizer._get_current_learning_rate
    moves_at_zero = _moves_at_rate_zero(optimizer)
    current = None  # The variable that is being updated.

    def scaled_rate():
        rate = current_rate()
        return rate if current is None else rate * multiplier(current)

    def scaled_step(gradient, variable, learning_rate):
        nonlocal current
        # Not TensorFlow's variable, of which Muon does not know the path.
        current = trained_variables(optimizer)[index_of(optimizer, variable)]
        try:
            scale = multiplier(current)
            if optimizer._use_weight_decay(current):
                apply_weight_decay([current])
            if moves_at_zero:
                kept = [variable, *_divided_by_rate(optimizer, variable)]
                before = [keras.ops.copy(v) for v in kept]
                update_step(gradient, variable, learning_rate * scale)
                for v, value in zip(kept, before, strict=True):
                    after = keras.ops.convert_to_tensor(v)
                    optimizer.assign(v, keras.ops.where(scale == 0, value, after))
            else:
                update_step(gradient, variable, learning_rate * scale)
        finally:  # It may be interrupted.
            current = None

    optimizer.update_step = scaled_step
    optimizer._apply_weight_decay = lambda variables: None
    optimizer._get_current_learning_rate = scaled_rate
    for cls in type(optimizer).__mro__:
        if cls.__name__ == "TorchParallelOptimizer":
            optimizer._backend_update_step = super(cls, optimizer)._backend_update_step


def is_scaled(optimizer) -> bool:
    """Whether `scale_learning_rate` has been here, which it must be once only."""
    return "_get_current_learning_rate" in vars(optimizer)


def _weight_decay_within_step(optimizer):
    """Weight decay of variables that are being updated.

    TensorFlow's own hands them to the devices of a strategy, as has been done by then.
    """
    name = "_apply_weight_decay"
    cls = next(cls for cls in type(optimizer).__mro__ if name in vars(cls))
    of_tensorflow = cls.__name__ == "TFOptimizer"
    return getattr(super(cls, optimizer) if of_tensorflow else optimizer, name)


def stop(optimizer, variables):
    """Takes the velocity from variables whose rate has become 0: they shall stand."""
    if _is_own(optimizer, keras.optimizers.SGD) and optimizer.momentums:
        for variable in variables:
            velocity = optimizer.momentums[index_of(optimizer, variable)]
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


def _divided_by_rate(optimizer, variable):
    """The state of a variable that is not finite after a step at rate 0."""
    if not isinstance(optimizer, keras.optimizers.Ftrl):
        return []
    index = index_of(optimizer, variable)
    return [optimizer._accumulators[index], optimizer._linears[index]]


@contextlib.contextmanager
def set_aside(model, optimizer):
    """Lends a model another optimizer, for trainings that it shall not remember.

    A train function is compiled anew, and the compiled metrics stay out of it, so that
    neither traces nor metrics of the model are touched, not even built. Nor is the
    loss: `fit` looks into its data, and shuffles, to build one. The attributes
    are replaced past `__setattr__`, by which TensorFlow would keep track of the
    optimizer as a part of the model's checkpoints.

    A training step is given data as `fit` gives it: by `train_on_batch`, Keras has it
    unpack a weight of None, and one of the user's own may begin `x, y = data`.
    """
    loss = model._compile_loss
    if loss is not None and not loss.built:
        loss = type(loss)(
            loss._user_loss, loss._user_loss_weights, output_names=loss.output_names
        )
    step = model.train_step

    def train_step(*args):
        *state, data = args  # The state on JAX only.
        return step(*state, keras.utils.pack_x_y_sample_weight(*data))

    lent = {"optimizer": optimizer, "_compile_loss": loss, "train_step": train_step}
    lent |= {"train_function": None, "_compile_metrics": None}
    # JAX's trainer keeps a hold of the weights of the last step.
    names = (*lent, "_jax_state")
    kept = {name: vars(model)[name] for name in names if name in vars(model)}
    vars(model).update(lent)
    try:
        yield
    finally:
        for name in names:
            vars(model).pop(name, None)
        vars(model).update(kept)


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
    copy.build(trained_variables(optimizer))
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
    kept = _get_global(_SEED_GENERATOR)
    # With a name of its own, or the next automatic name would be another.
    own = keras.random.SeedGenerator(seed, name="own")
    start = keras.ops.convert_to_numpy(own.state).copy()
    _set_global(_SEED_GENERATOR, own)
    try:
        yield lambda: own.state.assign(start)
    finally:
        _set_global(_SEED_GENERATOR, kept)
