"""What a backend does that has nothing of its own for it; see `__init__.py`."""

import contextlib

import keras

_BLOCK = 2**12  # values that are added up one after the other


def class_sums(values, ids, size):
    return in_blocks(keras.ops.segment_sum, values, ids, size)


def in_blocks(add, values, ids, size):
    """`add(values, ids, size)`, block by block where there are many values.

    A float32 that has grown rounds what is added to it, always to the same side: sums
    of millions of values were off by percents. Each block has sums of its own, and
    these are added up.
    """
    # No block is shorter than `size`: all their sums are no more than the values.
    bits = max(_BLOCK, 2 * size).bit_length() - 1
    n = ids.shape[0]
    if n is not None and n <= 2**bits:
        return add(values, ids, size)
    ops = keras.ops
    n = ops.shape(ids)[0]
    block = ops.right_shift(ops.arange(n, dtype="int32"), bits)
    blocks = (n + 2**bits - 1) // 2**bits
    sums = add(values, block * size + ids, blocks * size)
    return ops.sum(ops.reshape(sums, (-1, size)), axis=0)


def in_turn(function, values):
    return keras.ops.map(function, values)


def to_numpy(arrays):
    return {k: keras.ops.convert_to_numpy(a) for k, a in arrays.items()}


def shards():
    return 1


def split(x):
    return keras.ops.convert_to_tensor(x)


def build(model, x):
    """Nothing, since Keras builds models in a stateless scope here too."""


def copies(model, variable):
    return [variable]


def on_several_workers(model):
    return False


def of_first_worker(model, values):
    return values


def buffers(model):
    return []


def inference(model):
    return contextlib.nullcontext()


def module_modes(model):
    return contextlib.nullcontext()


def normalisations(model):
    return []


def modes_by_call(modules, mode):
    return contextlib.nullcontext()
