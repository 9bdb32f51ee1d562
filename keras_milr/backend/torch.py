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

_measuring = contextvars.ContextVar("keras_milr_measuring", default=False)


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


def jit(function, fused=False):
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


def bincount(ids, size, weights=None):
    weights = None if weights is None else torch.as_tensor(weights, device=ids.device)
    return torch.bincount(ids, weights, size).cpu().numpy()


def compile_step(model, step):
    def forward(x):
        with _evaluating(model), keras.StatelessScope():
            return model(x, training=False)

    return jit(functools.partial(step, forward))


@contextlib.contextmanager
def _evaluating(model):
    """Modules of PyTorch inside the model go by their own flag, not by `training`."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


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
