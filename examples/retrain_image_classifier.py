"""Retrains an image classifier for your own classes, with a learning rate per part.

In the manner of TF Hub's `make_image_classifier`: takes a network that was trained on
other images, puts a new head on it, trains both on a folder of images, each at a rate
that mutual information sets, and saves the result with a figure of the training.

    python examples/retrain_image_classifier.py --compare      # a minute, offline
    python examples/retrain_image_classifier.py --image_dir flowers \\
        --handle MobileNetV2 --weights imagenet --saved_model flowers.keras

`--handle` is one of

- a `.keras` file, whose last layer the new head replaces;
- a SavedModel folder, from `model.export` or TF Hub, that gives features: its weights
  are trained too, as of one layer (TensorFlow only);
- the name of a function in `keras.applications`, with `--weights`;
- a preset of KerasHub (`pip install keras-hub`): its name, or a local folder;
- nothing: a small CNN that is first trained here, on classes 0 to 4 of `--dataset`.

Without `--image_dir` the new classes are 5 to 9 of `--dataset`.
"""

import argparse
import tempfile
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import keras_milr

# The head, and whatever is not the head, as regular expressions for names of layers.
PARTS = {"backbone": "(?!new_head$).*", "head": "new_head"}


def count(text):
    """An argument that is a whole number, 1 or more."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more. Received: {text}")
    return int(text)


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def flag(name, **options):  # TF Hub's flags are spelled with underscores.
        spellings = dict.fromkeys((f"--{name}", f"--{name.replace('-', '_')}"))
        parser.add_argument(*spellings, **options)

    flag("handle", help="the pretrained network, see above")
    flag("weights", help="of keras.applications: a path, or imagenet; default: random")
    flag("rescale", type=float, default=255.0, help="divides the pixels of .keras and "
         "SavedModel handles; 255 (default) for those that take [0, 1]")  # fmt: skip
    flag("image-dir", type=Path, help="a folder with a subfolder of images per class")
    flag("image-size", type=count, help="default: what the handle takes, else 96")
    flag("dataset", choices=("fashion_mnist", "mnist", "digits"),
         help="default: fashion_mnist where it can be had, else digits")  # fmt: skip
    flag("samples", type=count, default=500, help="of --dataset, to train on (500)")
    flag("rates", choices=("one", "parts", "layers"), default="parts",
         help="one, backbone and head (default), or each layer")  # fmt: skip
    flag("freeze", action="store_true", help="train the head only, at one rate")
    flag("policy", choices=("relative", "reference", "decay"), default="relative")
    flag("learning-rate", type=rate, default=1e-3, help="number, or auto (0.001)")
    flag("epochs", type=count, default=15)
    flag("batch-size", type=count, default=32)
    flag("compare", action="store_true", help="also train at one constant rate")
    flag("seed", type=int, default=0)
    flag("saved-model", type=Path, help=".keras file, to be loaded where keras_milr is "
         "imported, or folder for a SavedModel, which needs no Keras")  # fmt: skip
    flag("output", type=Path, default=Path("results/retrain.png"), help="the figure")
    arguments = parser.parse_args()
    if arguments.image_dir and not arguments.image_dir.is_dir():
        parser.error(f"--image-dir must be a folder. Received: {arguments.image_dir}")
    if arguments.freeze:
        arguments.rates = "one"
    return arguments


def rate(text):
    return text if text == "auto" else float(text)


def load_handle(arguments):
    """Function from pixels to features, what of it can be trained, shape of images."""
    handle, path = arguments.handle, Path(arguments.handle)
    scale = keras.layers.Rescaling(1 / arguments.rescale)
    if path.suffix == ".keras":
        model = keras.models.load_model(path, compile=False)
        backbone = keras.Model(model.inputs, model.layers[-1].input)
        return lambda x: backbone(scale(x)), backbone, backbone.input_shape[1:]
    if (path / "saved_model.pb").is_file():
        signatures = tf.saved_model.load(path).signatures
        end = "serve" if "serve" in signatures else "serving_default"
        (spec,) = signatures[end].structured_input_signature[1].values()
        backbone = keras.layers.TFSMLayer(str(path), end)
        return lambda x: backbone(scale(x)), backbone, spec.shape[1:]
    function = getattr(keras.applications, handle, None)
    if callable(function):
        modules = (m for m in vars(keras.applications).values() if hasattr(m, handle))
        prepare = getattr(next(modules, None), "preprocess_input", lambda x: x)
        shape = (*2 * (arguments.image_size or 96,), 3)
        options = {"weights": arguments.weights, "input_shape": shape}
        backbone = function(include_top=False, **options)
        return lambda x: backbone(prepare(x)), backbone, shape
    try:
        import keras_hub
    except ImportError as error:
        raise SystemExit(
            f"--handle {handle} is no .keras file, SavedModel folder or function of "
            "keras.applications, so it must be a preset of KerasHub, which cannot be "
            f"imported. Try: pip install keras-hub. ({error})"
        ) from error
    backbone = keras_hub.models.Backbone.from_preset(handle)
    try:
        scale = keras_hub.layers.ImageConverter.from_preset(handle)
    except (FileNotFoundError, ValueError):
        print(f"The preset says nothing of pixels: divided by {arguments.rescale:g}.")
    return lambda x: backbone(scale(x)), backbone, backbone.input.shape[1:]


def build(arguments, shape, classes):
    """The handle under a new head; it takes pixels from 0 to 255."""
    keras.utils.set_random_seed(arguments.seed)
    features, backbone, _ = load_handle(arguments)
    backbone.trainable = not arguments.freeze
    inputs = keras.Input(shape)
    h = features(inputs)
    if isinstance(h, dict):  # A SavedModel may name its output.
        (h,) = h.values()
    if len(h.shape) == 4:
        h = keras.layers.GlobalAveragePooling2D()(h)
    elif len(h.shape) == 3:  # Tokens.
        h = keras.layers.GlobalAveragePooling1D()(h)
    head = keras.layers.Dense(classes, activation="softmax", name="new_head")
    return keras.Model(inputs, head(h))


def pretrain(images, labels, path):
    """Trains a small CNN and saves it: a handle that needs no download."""
    model = keras.Sequential([keras.Input((*images.shape[1:3], 1))])
    for filters in (16, 32, 64):
        model.add(keras.layers.Conv2D(filters, 3, padding="same", activation="relu"))
        model.add(keras.layers.MaxPooling2D(padding="same"))
    model.add(keras.layers.Flatten())
    model.add(keras.layers.Dense(64, activation="relu"))
    model.add(keras.layers.Dense(5, activation="softmax"))
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    epochs = 3 if len(images) > 10_000 else 20
    model.fit(images / 255, labels, batch_size=64, epochs=epochs, verbose=2)
    model.save(path)


def load_dataset(name):
    """Images of pixels from 0 to 255, and labels: of training and of test."""
    if name != "digits":
        try:
            data = getattr(keras.datasets, name or "fashion_mnist").load_data()
            return [(x[..., None].astype("float32"), y) for x, y in data]
        except Exception as error:  # What Keras raises when a download fails.
            print(f"{name or 'fashion_mnist'} cannot be had, so digits: {error}")
    images, labels = load_digits(return_X_y=True)
    images = (images * 255 / 16).reshape(-1, 8, 8, 1).astype("float32")
    x, test_x, y, test_y = train_test_split(images, labels, random_state=0)
    return [(x, y), (test_x, test_y)]


def load_images(arguments, shape, dataset):
    """Data sets to train on and to test, and the names of the classes."""
    size, seed = arguments.batch_size, arguments.seed
    if arguments.image_dir:
        train, test = keras.utils.image_dataset_from_directory(
            arguments.image_dir,
            image_size=shape[:2],
            color_mode="rgb" if shape[2] == 3 else "grayscale",
            batch_size=size,
            validation_split=0.2,
            subset="both",
            seed=seed,
            verbose=False,
        )
        return train, test, train.class_names
    (x, y), (test_x, test_y) = ((x[y >= 5], y[y >= 5] - 5) for x, y in dataset)
    rows = np.random.default_rng(seed).permutation(len(y))[: arguments.samples]

    def prepared(image, label):
        image = tf.image.resize(image, shape[:2])
        return (tf.image.grayscale_to_rgb(image) if shape[2] == 3 else image), label

    train = tf.data.Dataset.from_tensor_slices((x[rows], y[rows]))
    test = tf.data.Dataset.from_tensor_slices((test_x, test_y)).batch(size)
    train = train.shuffle(len(rows), seed=seed).batch(size)
    return train.map(prepared), test.map(prepared), ["5", "6", "7", "8", "9"]


def train_model(arguments, shape, dataset, callback=None):
    train, test, names = load_images(arguments, shape, dataset)  # The same batches.
    model = build(arguments, shape, len(names))
    number = arguments.learning_rate
    optimizer = keras.optimizers.Adam(1e-3 if number == "auto" else number)
    if callback is not None and callback.layers is not None:
        optimizer = keras_milr.LayerwiseOptimizer(optimizer)
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(
        train,
        validation_data=test,
        epochs=arguments.epochs,
        callbacks=[] if callback is None else [callback],
        shuffle=False,  # The data set does.
        verbose=2,
    )
    return model


def print_summary(models, test):
    """Accuracy on the held-out images, and what a difference is worth."""
    right = {name: [] for name in models}
    for x, y in test:  # All models in one pass, on the same images.
        for name, model in models.items():
            right[name] += list(model.predict_on_batch(x).argmax(axis=-1) == y.numpy())
    number = len(next(iter(right.values())))
    print(f"\n{f'{number} held-out images':<24} accuracy   standard error")
    for name, each in right.items():
        print(f"{name:<24} {np.mean(each):.4f}     {np.std(each) / number**0.5:.4f}")
    if len(right) > 1:
        gain = 100 * np.subtract(*(np.array(each, float) for each in right.values()))
        error = gain.std() / number**0.5  # Of the sample of images, not of the seed.
        print(f"difference: {gain.mean():+.2f} points ± {error:.2f}, from one seed")


def main():
    arguments = parse_arguments()
    dataset = None
    if arguments.handle is None or arguments.image_dir is None:
        dataset = load_dataset(arguments.dataset)
    with tempfile.TemporaryDirectory() as temporary:
        if arguments.handle is None:
            print("No --handle: pretraining a small CNN on classes 0 to 4")
            arguments.handle = f"{temporary}/pretrained.keras"
            keras.utils.set_random_seed(arguments.seed)
            x, y = dataset[0]
            pretrain(x[y < 5], y[y < 5], arguments.handle)
        height, _, channels = load_handle(arguments)[2]
        size = arguments.image_size or height or 96
        shape = (size, size, channels or 3)
        train, test, names = load_images(arguments, shape, dataset)
        print(f"Images of shape {shape}, {len(names)} classes: {', '.join(names)}")
        callback = keras_milr.MutualInformationLR(
            arguments.policy,
            probe_data=train,
            layers={"one": None, "parts": PARTS, "layers": "all"}[arguments.rates],
            learning_rate="auto" if arguments.learning_rate == "auto" else None,
        )
        name = f"MI, {arguments.policy}, {arguments.rates}"
        models = {name: train_model(arguments, shape, dataset, callback)}
        if arguments.compare:
            print("The same at a constant rate:")
            models["constant rate"] = train_model(arguments, shape, dataset)
    print_summary(models, test)
    if arguments.saved_model and arguments.saved_model.suffix == ".keras":
        models[name].save(arguments.saved_model)
    elif arguments.saved_model:
        models[name].export(arguments.saved_model, verbose=False)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    keras_milr.plot_history(callback).savefig(arguments.output, dpi=120)
    print(f"Figure: {arguments.output}")


if __name__ == "__main__":
    main()
