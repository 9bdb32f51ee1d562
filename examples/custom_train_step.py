"""Trains a model with a `train_step` of its own, with rates from mutual information.

A `keras.Model` that overrides `train_step` sees what `fit` hides: this one reports the
norm of the gradients as a metric, on TensorFlow (GradientTape), JAX or PyTorch. The
callback needs nothing for that: it reads the model's outputs and sets the rate of
`model.optimizer`, which the step applies. The script trains the same network with its
own step and with that of Keras, from the same weights on the same batches, and prints
whether rates and weights agree; then a third time at a constant rate.

    python examples/custom_train_step.py
    KERAS_BACKEND=jax python examples/custom_train_step.py
"""

import argparse
from pathlib import Path

import keras
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import keras_milr


class OwnStep(keras.Model):
    """A model whose training step is written out, and reports its gradients' norm."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.norm = keras.metrics.Mean(name="gradient_norm")  # Reset by each epoch.

    def train_step(self, *args):
        backend = keras.backend.backend()
        return getattr(self, f"_{backend}_step")(*args)

    def _tensorflow_step(self, data):
        import tensorflow as tf

        x, y, weight = keras.utils.unpack_x_y_sample_weight(data)
        with tf.GradientTape() as tape:
            outputs = self(x, training=True)
            loss = self.compute_loss(x, y, outputs, weight, training=True)
            scaled = self.optimizer.scale_loss(loss)  # For mixed precision.
        gradients = tape.gradient(scaled, self.trainable_weights)
        # Clipping, penalties and the like belong here.
        self.optimizer.apply_gradients(
            zip(gradients, self.trainable_weights, strict=True)
        )
        self.norm.update_state(norm_of(gradients))
        return self._logs(x, y, outputs, weight, loss)

    def _torch_step(self, data):
        import torch

        x, y, weight = keras.utils.unpack_x_y_sample_weight(data)
        self.zero_grad()
        outputs = self(x, training=True)
        loss = self.compute_loss(x, y, outputs, weight, training=True)
        self.optimizer.scale_loss(loss).backward()
        gradients = [variable.value.grad for variable in self.trainable_weights]
        with torch.no_grad():
            self.optimizer.apply(gradients, self.trainable_weights)
        self.norm.update_state(norm_of(gradients))
        return self._logs(x, y, outputs, weight, loss)

    def _logs(self, x, y, outputs, weight, loss):
        """As Keras' own step ends: the mean loss, and the metrics of `compile`."""
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss, sample_weight=keras.ops.shape(x)[0])
        return self.compute_metrics(x, y, outputs, weight)

    def _jax_step(self, state, data):
        """Without side effects: all that changes comes in and goes out."""
        import jax

        trainable, other, optimizer, metrics = state
        x, y, weight = keras.utils.unpack_x_y_sample_weight(data)

        def loss_of(trainable, other):
            outputs, other = self.stateless_call(trainable, other, x, training=True)
            loss, _ = self.stateless_compute_loss(
                trainable, other, metrics, x, y, outputs, weight, training=True
            )
            return loss, (outputs, other)

        (loss, (outputs, other)), gradients = jax.value_and_grad(loss_of, has_aux=True)(
            trainable, other
        )
        trainable, optimizer = self.optimizer.stateless_apply(
            optimizer, gradients, trainable
        )
        mapping = zip(self.metrics_variables, metrics, strict=True)
        with keras.StatelessScope(state_mapping=mapping) as scope:
            self.norm.update_state(norm_of(gradients))
            logs = self._logs(x, y, outputs, weight, loss)
        metrics = [
            value if (new := scope.get_current_value(variable)) is None else new
            for variable, value in zip(self.metrics_variables, metrics, strict=True)
        ]
        return logs, (trainable, other, optimizer, metrics)


def norm_of(gradients):
    squares = [keras.ops.sum(keras.ops.square(gradient)) for gradient in gradients]
    return keras.ops.sqrt(sum(squares))


def count(text):
    """An argument that is a whole number, 1 or more."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more. Received: {text}")
    return int(text)


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--policy", choices=("relative", "reference", "decay"), default="decay")
    add("--learning-rate", type=rate, default=1e-3, help="number, or auto (0.001)")
    add("--epochs", type=count, default=20)
    add("--seed", type=int, default=0)
    add("--output", type=Path, default=Path("results/step.png"), help="the figure")
    return parser.parse_args()


def rate(text):
    return text if text == "auto" else float(text)


def train(model_class, data, arguments, informed=True):
    """A trained model, what `fit` logged, and the test accuracy."""
    (x, y), test = data
    keras.utils.set_random_seed(arguments.seed)
    inputs = keras.Input(x.shape[1:])
    h = keras.layers.Dense(64, activation="relu")(inputs)
    h = keras.layers.Dropout(0.2)(h)
    model = model_class(inputs, keras.layers.Dense(10, activation="softmax")(h))
    auto = arguments.learning_rate == "auto"
    model.compile(
        keras.optimizers.Adam(1e-3 if auto else arguments.learning_rate),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    callbacks = []
    if informed:
        callback = keras_milr.MutualInformationLR(
            arguments.policy, (x, y), learning_rate="auto" if auto else None
        )
        callbacks.append(callback)
    history = model.fit(x, y, epochs=arguments.epochs, callbacks=callbacks, verbose=0)
    accuracy = model.evaluate(*test, verbose=0, return_dict=True)["accuracy"]
    return model, history.history, accuracy


def write_figure(logs, path):
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.5), layout="constrained")
    epochs = np.arange(1, len(logs["loss"]) + 1)
    keys = {
        "probe_information": "information (nats)",
        "learning_rate": "learning rate",
        "gradient_norm": "norm of the gradients",
    }
    for one, (key, label) in zip(axes, keys.items(), strict=True):
        one.plot(epochs, logs[key], ".-")
        one.set(xlabel="epoch", ylabel=label)
        one.grid(alpha=0.3)
    axes[1].set_yscale("log")
    figure.suptitle("A train_step of its own, with rates from mutual information")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"Figure: {path}")


def main():
    arguments = parse_arguments()
    images, labels = load_digits(return_X_y=True)
    x, test_x, y, test_y = train_test_split(
        (images / 16).astype("float32"), labels, stratify=labels, random_state=0
    )
    data = (x, y), (test_x, test_y)
    print(f"Keras on {keras.backend.backend()}, {len(x)} digits, three trainings")
    ways = {
        "own step, MI": (OwnStep, True),
        "Keras' step, MI": (keras.Model, True),
        "own step, constant": (OwnStep, False),
    }
    found = {}
    print(f"\n{'':<20} {'test accuracy':>13} {'last rate':>10} {'gradient norm':>14}")
    for name, (model_class, informed) in ways.items():
        found[name] = model, logs, accuracy = train(
            model_class, data, arguments, informed
        )
        # Of the callback: the optimizer's is back at the highest.
        constant = float(keras.ops.convert_to_numpy(model.optimizer.learning_rate))
        last = logs.get("learning_rate", [constant])[-1]
        norm = f"{logs['gradient_norm'][-1]:.4f}" if "gradient_norm" in logs else ""
        print(f"{name:<20} {accuracy:>13.4f} {last:>10.2e} {norm:>14}")
    (own, own_logs, _), (usual, usual_logs, _) = list(found.values())[:2]
    weights = zip(own.get_weights(), usual.get_weights(), strict=True)
    difference = max(float(np.abs(a - b).max()) for a, b in weights)
    same = own_logs["learning_rate"] == usual_logs["learning_rate"]
    print(
        f"With MI, own step against Keras': the same rates {same}, largest difference "
        f"of a weight {difference:.2g}"
    )
    write_figure(own_logs, arguments.output)


if __name__ == "__main__":
    main()
