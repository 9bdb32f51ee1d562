"""The few lines that differ between Keras' backends.

A module for each backend has these functions, up to `compile_step` each of its own and
those after it where there is something special to the backend; else `plain` has them:

- `argmax(x)`: int32 index of the first of the largest numbers in each row of `x`.
- `is_symbolic(x)`: whether the tensor `x` is inside a trace, without a value yet. On
  PyTorch, which does not trace, whether it is inside a measurement.
- `is_in_reach(x)`: whether the tensor `x` can be used here, and not only in the loop
  that it was made in.
- `jit(function, fused=False, any_width=False)`: the pure function, compiled; its Python
  arguments are constants. `fused` asks for one kernel, where the backend has another
  compiler for that; it pays for element-wise work on many numbers, and compiles anew
  for each shape. With `any_width` the last axis of the first argument, a tensor, may
  be of any size, without a trace for each where the backend can do that.
- `class_sums(values, ids, size)`: tensor of the sums of float32 `values` by their int32
  ids in `[0, size)`, of millions too; may be in a trace, where `size` is a Python
  number.
- `to_numpy(arrays)`: a dict of arrays or tensors as NumPy, fetched all at once.
- `bincount(ids, size, weights=None)`: tensor of how often each id in `[0, size)`
  occurs, or of the sums of its weights; in a trace of `jit`, but not of a fused one.
- `in_turn(function, values)`: tensor of what the function gives for each of the values,
  one after the other, so that memory holds what one of them needs; may be in a trace.
- `compile_step(model, step)`: `step(forward, *args)`, compiled as the model is, where
  `forward(x, training=False)` is the model with all its state left alone. It is traced
  once for each set of shapes and types, and reads the weights that the model has when
  it is called.
- `build(model, x)`: builds a model that has no weights yet for inputs like `x`, where
  it could not be built by a call that leaves no trace.
- `shards()`: into how many parts the rows of a batch are split, one for each device of
  a distribution of Keras; 1 without one.
- `split(x)`: the array `x` as a tensor, with its rows on these devices.
- `copies(model, variable)`: where the value of the model's variable is, as a list of
  what can be read and assigned to: one for each replica of a model that has several.
- `on_several_workers(model)`: whether the model trains in several processes at once.
- `of_first_worker(model, values)`: the array `values` as the first of these processes
  has it, in all of them. All must call it, since they wait for each other.

What modules of PyTorch inside a model keep beside Keras, which is nothing elsewhere:

- `buffers(model)`: their buffers, as what has a `name` and `assign`, is an array to
  NumPy, and says by `saved` whether Keras saves it with the weights.
- `inference(model)`: context in which they are in inference mode, and after which
  buffers and modes are as before.
- `module_modes(model)`: context after which each module is in training mode, or not, as
  before.
- `normalisations(model)`: the modules that normalise batches and follow the training in
  their statistics.
- `modes_by_call(modules, mode)`: context in which `mode(module, training)` decides at
  each call of a module whether it is in training mode.

Datasets and global random numbers are not those of the backend only: a model on JAX may
be trained from a `DataLoader` of PyTorch or a `tf.data.Dataset`. The modules of
TensorFlow and PyTorch have these two as well, and here stand for every library that is
in use:

- `own_random_state(seed)`: context in which the global generators of random numbers
  are others, seeded; afterwards they are as they were. It yields a function that
  seeds them again, where they can be.
- `fresh(data)`: a dataset whose iteration leaves no trace in `data`, such as the place
  in the sequence of its shuffles; what is no dataset of these is returned.

And of these libraries too:

- `ignored_distribution()`: name of what was to distribute this training over devices
  and is of another backend, so that Keras silently trains on one; None without.

A library is not imported where it is neither the backend nor in use already.
"""

import contextlib
import importlib
import sys

import keras

from keras_milr.backend import plain

_MODULES = ("jax", "tensorflow", "torch")

if keras.backend.backend() not in _MODULES:
    raise ImportError(
        f"keras_milr works on the backends {_MODULES} of Keras. "
        f"Received: keras.backend.backend()={keras.backend.backend()!r}"
    )

_backend = importlib.import_module(f"{__name__}.{keras.backend.backend()}")
argmax = _backend.argmax
bincount = _backend.bincount
compile_step = _backend.compile_step
is_in_reach = _backend.is_in_reach
is_symbolic = _backend.is_symbolic
jit = _backend.jit


def _special(name):
    return getattr(_backend, name, getattr(plain, name))


buffers = _special("buffers")
build = _special("build")
class_sums = _special("class_sums")
copies = _special("copies")
in_turn = _special("in_turn")
inference = _special("inference")
module_modes = _special("module_modes")
modes_by_call = _special("modes_by_call")
normalisations = _special("normalisations")
of_first_worker = _special("of_first_worker")
on_several_workers = _special("on_several_workers")
shards = _special("shards")
split = _special("split")
to_numpy = _special("to_numpy")


@contextlib.contextmanager
def own_random_state(seed):
    with contextlib.ExitStack() as stack:
        contexts = [module.own_random_state(seed) for module in _libraries()]
        again = [stack.enter_context(context) for context in contexts]
        yield lambda: [seed_again() for seed_again in again]


def fresh(data):
    for module in _libraries():
        data = module.fresh(data)
    return data


def ignored_distribution():
    here = keras.backend.backend()
    if here != "jax" and keras.distribution.distribution() is not None:
        return "keras.distribution"
    tf = sys.modules.get("tensorflow")
    if here != "tensorflow" and tf is not None and tf.distribute.has_strategy():
        return "tf.distribute"
    return None


def _libraries():
    return [
        importlib.import_module(f"{__name__}.{name}")
        for name in ("tensorflow", "torch")
        if name in sys.modules
    ]


__all__ = [
    "argmax",
    "bincount",
    "buffers",
    "build",
    "class_sums",
    "compile_step",
    "copies",
    "fresh",
    "ignored_distribution",
    "in_turn",
    "inference",
    "is_in_reach",
    "is_symbolic",
    "jit",
    "modes_by_call",
    "module_modes",
    "normalisations",
    "of_first_worker",
    "on_several_workers",
    "own_random_state",
    "shards",
    "split",
    "to_numpy",
]
