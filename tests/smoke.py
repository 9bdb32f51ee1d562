"""Imports the installed package, outside the checkout, and trains with it."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
from sklearn.datasets import load_digits

import keras_milr

if "site-packages" not in keras_milr.__file__:
    raise SystemExit(f"not the installed package: {keras_milr.__file__}")

keras.utils.set_random_seed(0)
x, y = load_digits(return_X_y=True)
x = x.astype("float32") / 16
model = keras.Sequential(
    [
        keras.Input((64,)),
        keras.layers.Dense(64, activation="relu"),
        keras.layers.Dense(10, activation="softmax"),
    ]
)
model.compile(
    "adam",
    "sparse_categorical_crossentropy",
    metrics=["accuracy", keras_milr.MutualInformation()],
)
callback = keras_milr.MutualInformationLR(probe_data=(x, y))
history = model.fit(x, y, epochs=10, verbose=0, callbacks=[callback]).history
if history["accuracy"][-1] < 0.9 or history["probe_mutual_information"][-1] < 1.9:
    raise SystemExit(f"trained badly: {history}")
print(
    f"keras_milr {keras_milr.__version__} is installed and trains: accuracy "
    f"{history['accuracy'][-1]:.3f}, {callback.history[-1]['value']:.3f} nats"
)
