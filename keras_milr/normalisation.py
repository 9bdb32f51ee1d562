"""Batch normalisation by the statistics of what is read, as in training."""

import contextlib
import warnings

import keras

from keras_milr import _keras, backend
from keras_milr.layers import replaced_call


class BatchStatistics:
    """Lets a model in inference mode normalise each batch by its own statistics.

    The averages that are kept for inference lag behind the weights by some hundred
    batches: read with them, a network that learns seems to know little.

    It does so in the layers that follow the batches in training, and not in those that
    are frozen or called with `training=False`. Which layers follow is found out with
    the first batch that is read, by a pass in training mode that leaves no trace.

    Args:
        model: A built `keras.Model`.
    """

    def __init__(self, model):
        kind = keras.layers.BatchNormalization
        found = [one for one in _keras.all_layers(model) if isinstance(one, kind)]
        self._layers = [layer for layer in found if layer.trainable]
        self._modules = backend.normalisations(model)
        self._following = None

    def __bool__(self):
        """Whether there are such layers; before the first pass, if there may be."""
        if self._following is None:
            return bool(self._layers or self._modules)
        return bool(self._following)

    @contextlib.contextmanager
    def used(self, forward, x):
        """Context in which the model normalises a batch by its own statistics.

        Args:
            forward: The model, see `backend.compile_step`. The first time it is called
                in training mode too, to find out which layers follow the batches.
            x: The batch.
        """
        if self._following is None:
            self._following = self._find(forward, x)
        with self._each_call(lambda layer, training: id(layer) in self._following):
            yield

    def _find(self, forward, x):
        following = set()

        def note(layer, training):
            if training:
                following.add(id(layer))
            return training

        try:
            with self._each_call(note):
                forward(x, training=True)
        except Exception as error:  # Of the user's `call`, which may want labels too.
            warnings.warn(
                "The model cannot be called with `training=True` on inputs alone, so "
                "readings go by the averages of batch normalisation, which lag behind "
                "the weights. "
                f"Received: {type(error).__name__}: {error}",
                stacklevel=2,
            )
            return set()
        return following

    @contextlib.contextmanager
    def _each_call(self, mode):
        """Layers are called with `training=mode(layer, training)`."""

        def replaced(layer, call):
            def called(*args, **kwargs):
                if "training" in kwargs:  # A class of one's own may do without.
                    kwargs["training"] = mode(layer, kwargs["training"])
                return call(*args, **kwargs)

            return called

        with contextlib.ExitStack() as stack:
            for layer in self._layers:
                stack.enter_context(replaced_call(layer, replaced))
            stack.enter_context(backend.modes_by_call(self._modules, mode))
            yield
