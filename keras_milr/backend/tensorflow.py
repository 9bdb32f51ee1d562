"""How a measurement is compiled on TensorFlow."""

import keras
import tensorflow as tf


def is_symbolic(x):
    # While a graph is built, not even an eager tensor can be turned into an array.
    return not tf.executing_eagerly() or tf.is_symbolic_tensor(x)


def is_in_reach(x):
    # A model that runs eagerly may have a `tf.function` inside.
    return not tf.is_symbolic_tensor(x) or x.graph is tf.compat.v1.get_default_graph()


def jit(function):
    return tf.function(function)


def compile_step(model, step):
    def forward(x):
        # Stateless, so that even a layer which draws random numbers or updates
        # statistics at inference leaves no trace.
        with keras.StatelessScope():
            return model(x, training=False)

    def run(*args):
        return step(forward, *args)

    if model.run_eagerly:  # The user's code may not be traceable.
        return run
    return tf.function(run, jit_compile=model.jit_compile)
