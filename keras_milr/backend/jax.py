"""How a measurement is compiled on JAX."""

import functools

import jax
import keras

from keras_milr.backend import plain


def argmax(x):
    return jax.numpy.argmax(x, axis=-1).astype("int32")


def is_symbolic(x):
    return isinstance(x, jax.core.Tracer)


def is_in_reach(x):
    # A loop is a trace inside of the trace. What comes out of it otherwise than as its
    # result is only noticed when all is traced, and no public name tells of it.
    here = jax.numpy.zeros(())
    return not is_symbolic(x) or x._trace is getattr(here, "_trace", None)


def jit(function, fused=False, any_width=False):
    @functools.cache
    def compiled(constants):
        return jax.jit(function, static_argnums=constants)

    def run(*args):
        python = (bool, int, float, str)
        constants = [i for i, arg in enumerate(args) if isinstance(arg, python)]
        # By default a GPU rounds the factors of a matrix product to 10 bits.
        with jax.default_matmul_precision("float32"):
            return compiled(tuple(constants))(*args)

    return run


def class_sums(values, ids, size):
    in_blocks = functools.partial(plain.in_blocks, jax.ops.segment_sum)
    return _sums(in_blocks, values, ids, size)


def _sums(add, values, ids, size):
    # A GPU adds to one sum at a time, in any order. To compare with each class always
    # gives the same; on an H200 it was up to 20 times as fast with few classes and many
    # values, and up to this limit about as fast elsewhere.
    if jax.default_backend() == "gpu" and ids.shape[0] * size <= 2**28:
        same = ids[:, None] == jax.numpy.arange(size)
        return jax.numpy.sum(jax.numpy.where(same, values[:, None], 0), axis=0)
    return add(values, ids, size)


def to_numpy(arrays):
    return jax.device_get(arrays)  # One by one, each is waited for.


def bincount(ids, size, weights=None):
    # Three times as fast as `jax.numpy.bincount` on a CPU, and exact for whole counts.
    ones = jax.numpy.ones_like(ids) if weights is None else weights
    # A probe has too few rows for blocks to matter.
    return _sums(jax.ops.segment_sum, ones, ids, size)


def compile_step(model, step):
    def run(values, *args):
        # Weights and all other state are arguments. A variable that is merely read in
        # a trace would be a constant: the reading would be of old weights for ever.
        state = list(zip(model.variables, values, strict=True))

        def forward(x, training=False):
            with keras.StatelessScope(state_mapping=state):
                return model(x, training=training)

        return step(forward, *args)

    if model.jit_compile and not model.run_eagerly:  # As the model trains.
        run = jax.jit(run)

    def measured(*args):
        return run([variable.value for variable in model.variables], *args)

    return measured


def shards():
    distribution = keras.distribution.distribution()
    if distribution is None:
        return 1
    mesh = distribution.device_mesh
    return mesh.shape[mesh.axis_names.index(distribution.batch_dim_name)]


def split(x):
    distribution = keras.distribution.distribution()
    if distribution is None:
        return keras.ops.convert_to_tensor(x)
    layout = distribution.get_data_layout(x.shape)
    return keras.distribution.distribute_tensor(x, layout)
