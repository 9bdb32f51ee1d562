"""Data of every kind that `fit` takes: to train on, and as the probe."""

import keras
import numpy as np
import pytest
import scipy.sparse
import tensorflow as tf
from sklearn.metrics import mutual_info_score

from keras_milr import LayerwiseOptimizer, MutualInformationLR, lr_range_test

BATCH = 50


def shows(*rows):
    return pytest.mark.supports("Data", *rows)


@pytest.fixture(scope="module")
def data(digits):
    """Twelve batches, of which the probe has all."""
    return digits[0][:600], digits[1][:600].astype("int64")


def make_model(data, inputs, layerwise=False):
    """A model whose inputs have a name, or are a list or dict of two."""
    keras.utils.set_random_seed(0)
    if inputs == "one":
        given = hidden = keras.Input((64,))
    else:
        given = {name: keras.Input((32,), name=name) for name in ("top", "bottom")}
        given = given if inputs == "dict" else list(given.values())
        hidden = keras.layers.Concatenate()(keras.tree.flatten(given))
    hidden = keras.layers.Dense(16, activation="relu")(hidden)
    out = keras.layers.Dense(10, activation="softmax", name="head")(hidden)
    model = keras.Model(given, out)
    optimizer = keras.optimizers.SGD(0.1)
    if layerwise:
        optimizer = LayerwiseOptimizer(optimizer)
    model.compile(optimizer, "sparse_categorical_crossentropy")
    return model


class Batches(keras.utils.PyDataset):
    """Counts how often each batch is asked for."""

    def __init__(self, data, **arguments):
        super().__init__(**arguments)
        self.data, self.asked = data, [0] * (len(data[1]) // BATCH)

    def __len__(self):
        return len(self.asked)

    def __getitem__(self, i):
        self.asked[i] += 1
        return tuple(a[BATCH * i : BATCH * (i + 1)] for a in self.data)


def sparse(data):
    return scipy.sparse.csr_array(data[0]), data[1]


def dataset(data):
    return tf.data.Dataset.from_tensor_slices(data).batch(BATCH).cache().prefetch(2)


def generator(data, passes=1):
    for i in range(passes * len(data[1]) // BATCH):
        i = i % (len(data[1]) // BATCH)
        yield tuple(a[BATCH * i : BATCH * (i + 1)] for a in data)


def loader(data):
    torch = pytest.importorskip("torch")
    tensors = [torch.from_numpy(np.ascontiguousarray(a)) for a in data]
    return torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(*tensors), batch_size=BATCH
    )


def halves(data, kind):
    parts = {"top": data[0][:, :32], "bottom": data[0][:, 32:]}
    return (parts if kind == "dict" else list(parts.values())), data[1]


# Inputs of the model, what it trains on, what is measured, and how often both go round.
KINDS = [
    pytest.param("one", lambda d: d, lambda d: d, id="arrays", marks=shows("arrays")),
    pytest.param(
        "list",
        lambda d: halves(d, "list"),
        lambda d: list(halves(d, "list")),
        id="lists",
        marks=shows("lists of arrays"),
    ),
    pytest.param(
        "dict",
        lambda d: halves(d, "dict"),
        lambda d: halves(d, "dict"),
        id="dicts",
        marks=shows("dicts of arrays"),
    ),
    pytest.param(
        *("one", sparse, sparse),
        id="sparse",
        marks=shows("inputs as sparse arrays of SciPy"),
    ),
    pytest.param(
        *("one", dataset, dataset),
        id="tf.data",
        marks=shows("tf.data: batched, cached, prefetched"),
    ),
    pytest.param(
        *("one", lambda d: dataset(d).repeat(), dataset),
        id="infinite",
        marks=shows("tf.data: infinite, `steps_per_epoch`"),
    ),
    pytest.param(*("one", Batches, Batches), id="PyDataset", marks=shows("PyDataset")),
    pytest.param(
        "one",
        lambda d: Batches(d, workers=2, max_queue_size=4),
        lambda d: Batches(d, workers=2),
        id="PyDataset_workers",
        marks=shows("PyDataset"),
    ),
    pytest.param(
        *("one", lambda d: generator(d, 2), generator),
        id="generator",
        marks=shows("generators, drawn from once"),
    ),
    pytest.param(*("one", loader, loader), id="DataLoader", marks=shows("DataLoader")),
]
STEPS = {"infinite": 12, "generator": 12}


def arguments(given, name):
    """Of `fit`, for the training data."""
    if isinstance(given, tuple):
        return {"x": given[0], "y": given[1], "batch_size": BATCH}
    steps = {"steps_per_epoch": STEPS[name]} if name in STEPS else {}
    return {"x": given} | steps


def assert_same_training(model, data, inputs, train, name):
    """As with multipliers that are set by hand."""
    plain = make_model(data, inputs, layerwise=True)
    by_hand = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: plain.optimizer.set_multipliers({"head": 0.5})
    )
    plain.fit(
        **arguments(train(data), name),
        epochs=2,
        verbose=0,
        shuffle=False,
        callbacks=[by_hand],
    )
    for a, b in zip(model.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("inputs", "train", "measure"), KINDS)
def test_data(data, inputs, train, measure, request):
    """Reading and rates are those of the arrays, whatever both come in."""
    name = request.node.callspec.id
    probe = measure(data)
    model = make_model(data, inputs, layerwise=True)
    layers = MutualInformationLR(
        lambda r: r.rate * np.array([1.0, 0.5]), probe, layers="all"
    )
    history = model.fit(
        **arguments(train(data), name),
        epochs=2,
        verbose=0,
        shuffle=False,
        callbacks=[layers],
    ).history
    np.testing.assert_allclose(history["learning_rate/head"], [0.1, 0.05], rtol=1e-5)
    x = data[0] if inputs == "one" else halves(data, inputs)[0]
    predicted = model.predict(x, verbose=0).argmax(axis=1)
    read = mutual_info_score(data[1], predicted)
    assert layers.history[-1]["output"]["raw"] == pytest.approx(read, abs=1e-4)
    assert read > 0.3

    if name != "PyDataset_workers":  # Keras' own training differs from run to run.
        assert_same_training(model, data, inputs, train, name)
    if isinstance(probe, Batches):
        assert probe.asked == [1] * 12

    # And of the network as a whole, from the sample that has been drawn.
    whole = MutualInformationLR(lambda r: r.rate / 2, measure(data))
    for _ in range(2):
        rates = model.fit(
            *(x, data[1]), batch_size=BATCH, verbose=0, callbacks=[whole]
        ).history["learning_rate"]
    assert rates == pytest.approx([0.05], rel=1e-5)
    predicted = model.predict(x, verbose=0).argmax(axis=1)
    assert whole.history[-1]["raw"] == pytest.approx(
        mutual_info_score(data[1], predicted), abs=1e-4
    )


@pytest.mark.refuses(
    "Data",
    "tf.data: infinite, `steps_per_epoch`",
    error="ValueError: an infinite dataset as a probe; as training data it works",
)
def test_a_probe_without_end_is_refused(data):
    """At once: nothing is drawn, and nothing trained."""
    model = make_model(data, "one")
    before = model.get_weights()

    class Endless(keras.utils.PyDataset):
        @property
        def num_batches(self):
            return None

        def __getitem__(self, i):
            raise AssertionError("drawn from")

    for probe in (dataset(data).repeat(), Endless()):
        callback = MutualInformationLR(probe_data=probe)
        with pytest.raises(ValueError, match="`probe_data` must be finite"):
            model.fit(*data, verbose=0, callbacks=[callback])
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", [scipy.sparse.csr_array, scipy.sparse.coo_array])
def test_a_range_test_on_sparse_inputs(digits, kind):
    """As on dense ones: by itself, where they come in two parts, and in `fit`."""
    x, y = digits[0], digits[1].astype("int64")
    assert len(y) > 1024
    tables, rates = [], []
    for given in (x, kind(x)):
        model = make_model((x, y), "one")
        tables.append(lr_range_test(model, given, y, verbose=0))
        callback = MutualInformationLR(probe_data=(given, y), learning_rate="auto")
        logs = model.fit(x, y, verbose=0, callbacks=[callback]).history
        rates.append((callback.lr_range.best_lr, logs["learning_rate"]))
    assert tables[0].found
    for dense, sparse in zip(*tables, strict=True):
        np.testing.assert_array_equal(dense, sparse)
    assert rates[0] == rates[1]


def test_a_generator_is_too_short_for_a_range_test(data):
    """It would have to be drawn from twice, whatever `fit` trains on."""
    model = make_model(data, "one")
    before = model.get_weights()
    callback = MutualInformationLR(probe_data=generator(data), learning_rate="auto")
    message = "could not be found by 'auto'.*`probe_data`.*for the range test and after"
    with pytest.raises(ValueError, match=message):
        model.fit(*data, verbose=0, callbacks=[callback])
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_batches_of_different_lengths():
    """They train, each padded to a length of its own, and are no probe."""
    rng = np.random.default_rng(0)

    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 3

        def __getitem__(self, i):
            return rng.integers(0, 20, (16, 5 + i)), np.arange(16) % 2

    layers = [keras.layers.Embedding(20, 8), keras.layers.GlobalAveragePooling1D()]
    model = keras.Sequential([*layers, keras.layers.Dense(2, activation="softmax")])
    model.compile("sgd", "sparse_categorical_crossentropy")
    model.fit(Batches(), verbose=0)
    message = r"`probe_data` must have the same shapes.* pad them to one length"
    with pytest.raises(ValueError, match=message):
        model.fit(
            Batches(),
            verbose=0,
            callbacks=[MutualInformationLR(probe_data=Batches())],
        )
