"""How a measurement is compiled on TensorFlow."""

import contextlib
import random
import sys
import warnings

import keras
import numpy as np
import tensorflow as tf
from tensorflow.python.eager import context


def argmax(x):
    # Keras' own goes to some length for 0 to be more than -0, which it is not.
    return tf.argmax(x, axis=-1, output_type=tf.int32)


def is_symbolic(x):
    # While a graph is built, not even an eager tensor can be turned into an array.
    return not tf.executing_eagerly() or tf.is_symbolic_tensor(x)


def is_in_reach(x):
    # A model that runs eagerly may have a `tf.function` inside.
    return not tf.is_symbolic_tensor(x) or x.graph is tf.compat.v1.get_default_graph()


def jit(function, fused=False, any_width=False):
    def run(*args):  # Default arguments would take .1 ms in each call.
        return function(*args)

    compiled = tf.function(run, jit_compile=fused or None, autograph=False)
    if not any_width:
        return compiled

    def called(x, *args):
        # A trace takes .3 s, and to find this one .1 ms; a call takes it too, then.
        general = tf.TensorSpec((*x.shape[:-1], None), x.dtype)
        compiled.get_concrete_function(general, *args)
        return compiled(x, *args)

    return called


def bincount(ids, size, weights=None):
    # Four times as fast as a segment sum in XLA, and ten times one outside of it; but
    # XLA would compile it anew for all data.
    if weights is None:
        weights = tf.zeros((0,), tf.int32)
    return tf.raw_ops.DenseBincount(
        input=ids, size=tf.cast(size, ids.dtype), weights=weights
    )


def in_turn(function, values):
    return tf.map_fn(function, values, parallel_iterations=1)  # Keras' own starts ten.


def compile_step(model, step):
    def forward(x, training=False):
        # Stateless, so that even a layer which draws random numbers or updates
        # statistics at inference leaves no trace.
        own = training and tf.executing_eagerly()
        random_state = own_random_state(0) if own else contextlib.nullcontext()
        with random_state, keras.StatelessScope():
            return model(x, training=training)

    def run(*args):
        return step(forward, *args)

    if model.run_eagerly:  # The user's code may not be traceable.
        return run
    return tf.function(run, jit_compile=model.jit_compile, autograph=False)


def build(model, x):
    # As the trace of Keras' own `fit` does it, for any number of rows, with the layers
    # that only training uses. There a layer may make a variable from an array, which it
    # may not in a stateless scope.
    if model.run_eagerly:
        return
    specs = keras.tree.map_structure(
        lambda a: tf.TensorSpec((None, *a.shape[1:]), tf.as_dtype(a.dtype)), x
    )
    forward = tf.function(lambda x: model(x, training=True), autograph=False)
    with contextlib.suppress(Exception):  # It may serve for one number of rows only.
        forward.get_concrete_function(specs)


def copies(model, variable):
    # Statistics of batch normalisation differ from replica to replica.
    return model.distribute_strategy.experimental_local_results(variable.value)


def on_several_workers(model):
    strategy = model.distribute_strategy
    replicas = strategy.num_replicas_in_sync
    # Of one replica, the default strategy does not say where it is.
    return replicas > 1 and replicas > len(strategy.extended.worker_devices)


def of_first_worker(model, values):
    if not on_several_workers(model):
        return values
    strategy = model.distribute_strategy
    # What the others have is replaced, not multiplied: it may not be finite.
    addends = strategy.experimental_distribute_values_from_function(
        lambda replica: tf.constant(
            values if replica.replica_id_in_sync_group == 0 else np.zeros_like(values)
        )
    )
    return strategy.reduce("SUM", addends, axis=None).numpy()


@contextlib.contextmanager
def own_random_state(seed):
    # `tf.random` draws the seeds of its operations from a generator in the eager
    # context. To rewind it would not do, since operations with the same seed share a
    # state of their own; another generator leaves both alone.
    eager = context.context()
    kept = vars(eager).get("_rng")
    module = sys.modules.get("tensorflow.python.ops.stateful_random_ops")
    generator = getattr(module, "global_generator", None)
    state = None if generator is None else generator.state.numpy().copy()
    if kept is not None:
        eager._rng = random.Random(seed)
    try:
        yield lambda: None
    finally:
        if kept is not None:
            eager._rng = kept
        if generator is not None:
            generator.state.assign(state)


def fresh(data):
    # A dataset that shuffles counts how often it has been iterated, and so does a plain
    # copy, with the same counter. In the copy's graph that counter is taken out.
    if not isinstance(data, tf.data.Dataset):
        return data
    try:
        graph = tf.compat.v1.GraphDef.FromString(
            tf.raw_ops.DatasetToGraphV2(
                input_dataset=tf.data.experimental.to_variant(data),
                external_state_policy=1,  # Ignored.
            ).numpy()
        )
        own = graph.node.add(name="own_seed_generator", op="DummySeedGenerator")
        cache = graph.node.add(name="own_cache", op="DummyMemoryCache")
        place = {"ShuffleDatasetV3": 4, "RandomDatasetV2": 2}
        place["ShuffleAndRepeatDatasetV2"] = 5
        drawn = set()  # Nodes that depend on the order of a shuffle.
        for node in graph.node:  # Each comes after its inputs.
            if node.op in place:
                node.input[place[node.op]] = own.name
            if node.op in place or drawn.intersection(node.input):
                drawn.add(node.name)
            if node.op == "CacheDatasetV2" and node.name in drawn:
                # What it keeps would be the order of the copy. Others are shared.
                node.input[2] = cache.name
        variant = tf.raw_ops.DatasetFromGraph(graph_def=graph.SerializeToString())
        return tf.data.experimental.from_variant(variant, data.element_spec)
    except tf.errors.OpError as error:
        warnings.warn(
            "The dataset cannot be copied. It is read as it is, and a shuffling that "
            f"is part of it goes on from there. Received: {error}",
            stacklevel=2,
        )
        return data
