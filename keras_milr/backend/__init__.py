"""The few lines that differ between Keras' backends.

A backend module has four functions:

- `is_symbolic(x)`: whether the tensor `x` is inside a trace, without a value yet.
- `is_in_reach(x)`: whether the tensor `x` can be used here, and not only in the loop
  that it was made in.
- `jit(function)`: the pure function, compiled; its Python arguments are constants.
- `compile_step(model, step)`: `step(forward, *args)`, compiled as the model is, where
  `forward(x)` is the model in inference mode with all its state left alone. It
  is traced once for each set of shapes and types.

TensorFlow is the only one so far. Under another, what needs a compiled
measurement says so, and TensorFlow is not imported.
"""

import keras

if keras.backend.backend() == "tensorflow":
    from keras_milr.backend.tensorflow import (
        compile_step,
        is_in_reach,
        is_symbolic,
        jit,
    )
else:

    def is_symbolic(x):
        return False

    def is_in_reach(x):
        return True

    def jit(function):
        return function

    def compile_step(model, step):
        raise NotImplementedError(
            "Measuring a model needs the TensorFlow backend of Keras. "
            f"Received: keras.backend.backend()={keras.backend.backend()!r}"
        )


__all__ = ["compile_step", "is_in_reach", "is_symbolic", "jit"]
