"""The few lines that differ between Keras' backends.

A backend module has these functions:

- `is_symbolic(x)`: whether the tensor `x` is inside a trace, without a value yet.
- `is_in_reach(x)`: whether the tensor `x` can be used here, and not only in the loop
  that it was made in.
- `jit(function)`: the pure function, compiled; its Python arguments are constants.
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

if keras.backend.backend() == "tensorflow":
    from keras_milr.backend.tensorflow import (
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

    def jit(function):
        return function

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
    "compile_step",
    "fresh",
    "is_in_reach",
    "is_symbolic",
    "jit",
    "own_random_state",
]
