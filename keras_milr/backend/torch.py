"""How a measurement runs on PyTorch: eagerly, without gradients.

`torch.compile` is left to the user's training.
"""

import contextlib
import contextvars
import copy
import functools
import warnings

import keras
import numpy as np
import torch

from keras_milr import _keras
from keras_milr.backend import plain

# Read off an H200: so many comparisons take little longer than the call itself, and
# with so many values to a sum another way is faster.
_COMPARED, _CROWDED = 2**22, 10_000
_measuring = contextvars.ContextVar("keras_milr_measuring", default=False)


def argmax(x):
    return torch.argmax(x, dim=-1).to(torch.int32)


def is_symbolic(x):
    # In a measurement a tensor stays where it is, although it has a value: to fetch
    # every batch of counts would have the device waited for.
    return _measuring.get() or x.device.type == "meta" or torch.compiler.is_compiling()


def is_in_reach(x):
    try:
        x + 0
    except RuntimeError:  # It has left the `torch.vmap` that it was made in.
        return False
    return True


def jit(function, fused=False, any_width=False):
    @functools.wraps(function)
    def run(*args):
        args = keras.tree.map_structure(_tensor, args)
        token = _measuring.set(True)
        try:
            # Not `inference_mode`: what a layer keeps of it could not be trained with.
            with torch.no_grad():
                return function(*args)
        finally:
            _measuring.reset(token)

    return run


def _tensor(x):
    return keras.ops.convert_to_tensor(x) if isinstance(x, np.ndarray) else x


def class_sums(values, ids, size):
    in_blocks = functools.partial(plain.in_blocks, _segment_sum)
    return _sums(in_blocks, values, ids, size)


def _sums(add, values, ids, size):
    n = ids.shape[0]
    if ids.is_cuda and n * size <= _COMPARED:
        # A GPU adds in any order; so the last digits are always the same.
        same = ids[:, None] == torch.arange(size, device=ids.device)
        return torch.where(same, values[:, None], 0).sum(dim=0)
    crowded = ids.is_cuda and n > _CROWDED * size
    if crowded and not torch.are_deterministic_algorithms_enabled():
        # It adds to one sum at a time, but to the sums of many blocks at once.
        return torch.bincount(ids, values, size)
    return add(values, ids, size)


def _segment_sum(values, ids, size):
    # Keras' own does the same in a dozen steps.
    empty = torch.zeros(size, dtype=values.dtype, device=ids.device)
    return torch.index_add(empty, 0, ids, values)


def bincount(ids, size, weights=None):
    weights = torch.ones_like(ids) if weights is None else weights
    # A probe has too few rows for blocks to matter.
    return _sums(_segment_sum, weights, ids, size)


def compile_step(model, step):
    def forward(x, training=False):
        random_state = own_random_state(0) if training else contextlib.nullcontext()
        with random_state, inference(model), keras.StatelessScope():
            return model(x, training=training)

    return jit(functools.partial(step, forward))


@contextlib.contextmanager
def inference(model):
    # A module goes by its own flag, not by `training`, and may write into its buffers
    # in inference mode too.
    kept = [(buffer, buffer.tensor.clone()) for buffer in buffers(model)]
    with module_modes(model):
        for module in _modules(model):
            module.training = False
        try:
            yield
        finally:
            for buffer, value in kept:
                buffer.assign(value)


@contextlib.contextmanager
def module_modes(model):
    modes = [(module, module.training) for module in _modules(model)]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _modules(model):
    # Where Keras keeps layers in a list, PyTorch does not know of them.
    layers = [model, *_keras.all_layers(model)]
    return [module for layer in layers for module in layer.modules()]


class Buffer:
    """A buffer of a module, with what we use of a variable of Keras.

    Args:
        module: The module that holds it, somewhere inside.
        path: Its name there: the tensor itself may be replaced.
        layer: Number of the layer.
        saved: Whether Keras saves it with the weights.
    """

    def __init__(self, module, path, layer, saved):
        self._module = module
        self._path = path
        self.name = f"{layer}.{path}"
        self.saved = saved

    @property
    def tensor(self):
        return self._module.get_buffer(self._path)

    def assign(self, value):
        with torch.no_grad():
            # In place, since others may hold it too.
            self.tensor.resize_(value.shape).copy_(keras.ops.convert_to_tensor(value))

    def __array__(self, dtype=None, copy=None):
        value = keras.ops.convert_to_numpy(self.tensor)  # A copy.
        return value if dtype is None else value.astype(dtype)


def buffers(model):
    found = []
    for i, layer in enumerate([model, *_keras.all_layers(model)]):
        wrapped = isinstance(layer, keras.layers.TorchModuleWrapper)
        module = layer.module if wrapped else layer
        saved = module.state_dict() if wrapped else ()
        # Of a layer only its own: what is inside of it is listed by itself.
        for path, tensor in module.named_buffers(recurse=wrapped):
            # Keras finds out shapes by calls without values, of which some may be left.
            if not tensor.is_meta:
                found.append(Buffer(module, path, i, path in saved))
    return found


def normalisations(model):
    kinds = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d)
    return [
        module
        for module in dict.fromkeys(_modules(model))
        if isinstance(module, (*kinds, torch.nn.SyncBatchNorm))
        and module.track_running_stats
    ]


@contextlib.contextmanager
def modes_by_call(modules, mode):
    def set_mode(module, _):
        module.training = mode(module, module.training)

    hooks = [module.register_forward_pre_hook(set_mode) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def own_random_state(seed):
    devices = range(torch.cuda.device_count()) or None  # Not named, several warn.
    with torch.random.fork_rng(devices):

        def again():
            torch.manual_seed(seed % 2**63)

        again()
        yield again


def fresh(data):
    # A generator of its own, which a loader shares with its samplers, goes on with
    # every iteration. The copy's generator does so for itself.
    if not isinstance(data, torch.utils.data.DataLoader):
        return data
    parts = {name: vars(data)[name] for name in ("sampler", "batch_sampler")}
    parts["generator"] = data.generator
    try:
        parts = copy.deepcopy(parts, {id(data.dataset): data.dataset})
    except Exception as error:
        warnings.warn(
            "The sampler of the DataLoader cannot be copied. It is read as it is, and "
            f"its random numbers go on from there. Received: {error!r}",
            stacklevel=2,
        )
        return data
    result = copy.copy(data)
    vars(result).update(parts, _iterator=None)  # It forbids to set them otherwise.
    return result
