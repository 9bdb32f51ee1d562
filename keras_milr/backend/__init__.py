"""The few lines that differ between Keras' backends.

A backend module has these functions:

- `is_symbolic(x)`: whether the tensor `x` is inside a trace, without a value yet.
- `is_in_reach(x)`: whether the tensor `x` can be used here, and not only in the loop
  that it was made in.
- `jit(function, fused=False)`: the pure function, compiled; its Python arguments are
  constants. `fused` asks for one kernel, where the backend has another compiler for
  that; it pays for element-wise work on many numbers, and compiles anew for each shape.
- `bincount(ids, size, weights=None)`: NumPy array of how often each id in `[0, size)`
  occurs, or of the sums of its weights; not in a trace.
- `compile_step(model, step)`: `step(forward, *args)`, compiled as the model is, where
  `forward(x)` is the model in inference mode with all its state left alone. It
  is traced once for each set of shapes and types.
- `own_random_state(seed)`: context in which the backend's global generators of random
  numbers are others, seeded; afterwards they are as they were.
- `fresh(data)`: a dataset whose iteration leaves no trace in `data`, such as the place
  in the sequence of its shuffles; what is no dataset of the backend is returned.

TensorFlow is the only one so far. Under another, what needs a compiled
measurement says so, and TensorFlow is not imported.
"""

import contextlib

import keras
import numpy as np

if keras.backend.backend() == "tensorflow":
    from keras_milr.backend.tensorflow import (
        bincount,
        compile_step,
        fresh,
        is_in_reach,
        is_symbolic,
        jit,
        own_random_state,
    )
else:

    def is_symbolic(x):
        return False

    def is_in_reach(x):
        return True

    def jit(function, fused=False):
        return function

    def bincount(ids, size, weights=None):
        return np.bincount(keras.ops.convert_to_numpy(ids), weights, size)

    def own_random_state(seed):
        return contextlib.nullcontext()

    def fresh(data):
        return data

    def compile_step(model, step):
        raise NotImplementedError(
            "Measuring a model needs the TensorFlow backend of Keras. "
            f"Received: keras.backend.backend()={keras.backend.backend()!r}"
        )


__all__ = [
    "bincount",
    "compile_step",
    "fresh",
    "is_in_reach",
    "is_symbolic",
    "jit",
    "own_random_state",
]
