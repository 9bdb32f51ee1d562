"""What a backend does that has nothing of its own for it; see `__init__.py`."""

import contextlib

import keras


def class_sums(values, ids, size):
    return keras.ops.segment_sum(values, ids, num_segments=size)


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
