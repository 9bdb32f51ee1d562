"""What the tests must know of Keras' backends."""

import keras

from keras_milr import backend

NAME = keras.backend.backend()
TORCH_COMPILE = "PyTorch hands `jit_compile` to a C++ compiler, for a minute"
DRAWN = "what happens depends on the weights that are drawn; seen with TensorFlow's"


def compiled(function):
    """`function` of tensors, by XLA; on PyTorch, in the way that a measurement runs."""
    if NAME == "tensorflow":
        import tensorflow as tf

        return tf.function(function, jit_compile=True)
    return backend.jit(function)


def gradients(model, x, y, training=False):
    """Outputs, loss, and the gradients of the trainable variables."""
    x, y = keras.ops.convert_to_tensor(x), keras.ops.convert_to_tensor(y)
    if NAME == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            outputs = model(x, training=training)
            loss = model.compute_loss(x, y, outputs)
        return outputs, loss, tape.gradient(loss, model.trainable_variables)
    if NAME == "torch":
        model.zero_grad()
        outputs = model(x, training=training)
        loss = model.compute_loss(x, y, outputs)
        loss.backward()
        found = [v.value.grad for v in model.trainable_variables]
        return outputs.detach(), loss.detach(), found
    import jax

    variables = model.trainable_variables

    def compute(values):
        mapping = list(zip(variables, values, strict=True))
        with keras.StatelessScope(state_mapping=mapping):
            outputs = model(x, training=training)
            return model.compute_loss(x, y, outputs), outputs

    function = jax.value_and_grad(compute, has_aux=True)
    (loss, outputs), found = function([v.value for v in variables])
    return outputs, loss, found


def update(optimizer, grads, variables):
    """A step of an optimizer, as the trainer takes it."""
    if NAME != "torch":
        optimizer.apply(grads, variables)
        return
    import torch

    with torch.no_grad():
        optimizer.apply(grads, variables)


class OwnStep(keras.Model):
    """Has a training step of its own; on JAX it is around that of Keras."""

    if NAME == "jax":

        def train_step(self, state, data):
            x, y = data
            logs, state = super().train_step(state, (x, y))
            return logs | {"own": keras.ops.zeros(())}, state

    else:

        def train_step(self, data):
            x, y = data
            outputs, loss, grads = gradients(self, x, y, training=True)
            update(self.optimizer, grads, self.trainable_variables)
            self.count(y, outputs)
            return self.compute_metrics(x, y, outputs) | {"loss": loss}

    def count(self, y, outputs):
        """For metrics of the model's own."""


def noise(x):
    """From the global generator of the backend, where it has one in a training step."""
    if NAME == "tensorflow":
        import tensorflow as tf

        return keras.random.normal(tf.shape(x)) + tf.random.normal(tf.shape(x))
    if NAME == "torch":
        import torch

        return keras.random.normal(x.shape) + torch.randn_like(x)
    return 0.0


def draw() -> list[float]:
    """What the global generators of the backend and of Keras give next."""
    own = []
    if NAME == "tensorflow":
        import tensorflow as tf

        own = [tf.random.normal(())]
    elif NAME == "torch":
        import torch

        own = [torch.randn(())]
    return [float(v) for v in (*own, keras.random.normal(()), keras.random.uniform(()))]
