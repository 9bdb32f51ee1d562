"""Models of every make: output and layers are read, and the model trained by that.

Each trains twice, layer by layer and as a whole. What was read is computed anew from
`model.predict`.
"""

import keras
import numpy as np
import pytest
from sklearn.metrics import mutual_info_score

from keras_milr import LayerwiseOptimizer, MutualInformationLR
from keras_milr._keras import all_layers
from keras_milr.readouts import LinearReadout
from tests import reference
from tests.backends import NAME, OwnStep

K = keras.layers
MODELS = {}


def model(*rows, marks=()):
    """Registers a function of vectors of 64 pixels to a model and its inputs."""

    def add(make):
        MODELS[make.__name__] = pytest.param(
            make,
            id=make.__name__,
            marks=[*marks, *(pytest.mark.supports("Models", row) for row in rows)],
        )
        return make

    return add


def head(x):
    return K.Dense(10, activation="softmax", name="head")(x)


def images(x):
    return x.reshape(-1, 8, 8, 1)


def rows_of(x):
    return x.reshape(-1, 8, 8)


def halves(x):
    return x[:, :32], x[:, 32:]


@model("Sequential", "Dropout", "BatchNormalization")
def sequential(x):
    layers = [K.Conv2D(8, 3, name="conv"), K.BatchNormalization(momentum=0.9)]
    layers += [K.ReLU(), K.Flatten(), K.Dropout(0.2)]
    last = K.Dense(10, activation="softmax", name="head")
    return keras.Sequential([keras.Input((8, 8, 1)), *layers, last]), images(x)


@model("Sequential")
def not_built(x):
    layers = [K.Dense(16, "relu"), K.Dense(10, activation="softmax", name="head")]
    return keras.Sequential(layers), x


@model("functional")
def functional(x):
    inputs = keras.Input((64,))
    left, right = K.Dense(16, "relu")(inputs), K.Dense(16, "tanh")(inputs)
    hidden = K.LayerNormalization()(K.Add()([left, right]))
    return keras.Model(inputs, head(hidden)), x


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.hidden = K.Dense(16, activation="relu")
        self.drop = K.Dropout(0.2)
        self.head = K.Dense(10, activation="softmax", name="head")

    def call(self, x, training=None):
        return self.head(self.drop(self.hidden(x), training=training))


@model("subclassed")
def subclassed(x):
    return Subclassed(), x


class WithOwnStep(Subclassed, OwnStep):
    pass


@model("custom `train_step`")
def own_step(x):
    return WithOwnStep(), x


@model("nested")
def nested(x):
    inner = keras.Sequential([keras.Input((64,)), K.Dense(16, "relu")], name="inner")
    inputs = keras.Input((64,))
    middle = keras.Model(inputs, K.Dense(16, "relu")(inner(inputs)), name="middle")
    last = K.Dense(10, activation="softmax", name="head")
    return keras.Sequential([keras.Input((64,)), middle, last]), x


@model("shared layers")
def shared(x):
    inputs = keras.Input((64,))
    first, again = K.Dense(16, "relu"), K.Dense(16, "relu", name="again")
    hidden = again(again(first(inputs)))
    return keras.Model(inputs, head(hidden)), x


@model("several inputs: list")
def list_of_inputs(x):
    inputs = [keras.Input((32,)), keras.Input((32,))]
    hidden = K.Concatenate()([K.Dense(16, "relu")(part) for part in inputs])
    return keras.Model(inputs, head(hidden)), list(halves(x))


@model("several inputs: dict")
def dict_of_inputs(x):
    inputs = {name: keras.Input((32,), name=name) for name in ("top", "bottom")}
    hidden = K.Concatenate()([K.Dense(16, "relu")(part) for part in inputs.values()])
    given = dict(zip(("top", "bottom"), halves(x), strict=True))
    return keras.Model(inputs, head(hidden)), given


@model("recurrent")
def recurrent(x):
    hidden = [K.Masking(), K.Bidirectional(K.GRU(8, return_sequences=True)), K.LSTM(16)]
    last = K.Dense(10, activation="softmax", name="head")
    return keras.Sequential([keras.Input((8, 8)), *hidden, last]), rows_of(x)


@model("attention")
def attention(x):
    """Rows as tokens; those without ink are masked."""
    inputs = keras.Input((8, 8))
    hidden = K.Dense(16)(K.Masking()(inputs))
    causal = K.MultiHeadAttention(2, 8, name="causal")
    hidden = K.Add()([hidden, causal(hidden, hidden, use_causal_mask=True)])
    hidden = K.LayerNormalization()(hidden)
    mask = K.Lambda(
        lambda x: keras.ops.any(x != 0, axis=-1)[:, None, :], output_shape=(1, 8)
    )(inputs)
    given = K.MultiHeadAttention(2, 8, name="given")
    hidden = given(hidden, hidden, attention_mask=mask)
    return keras.Model(inputs, head(K.GlobalAveragePooling1D()(hidden))), rows_of(x)


@model("preprocessing layers")
def preprocessing(x):
    normalization = K.Normalization()
    normalization.adapt(x)
    layers = [K.Rescaling(1 / 16), normalization, K.Dense(16, "relu")]
    last = K.Dense(10, activation="softmax", name="head")
    return keras.Sequential([keras.Input((64,)), *layers, last]), 16 * x


@model("frozen parts")
def frozen(x):
    body = keras.Sequential(
        [keras.Input((64,)), K.Dense(32, "relu"), K.BatchNormalization()], name="body"
    )
    body.trainable = False
    inputs = keras.Input((64,))
    hidden = K.Dense(16, "relu", name="hidden")(body(inputs))
    return keras.Model(inputs, head(hidden)), x


@model("keras.applications", "BatchNormalization", marks=[pytest.mark.slow])
def applications(x):
    made = keras.applications.MobileNet(
        input_shape=(32, 32, 1),
        weights=None,
        alpha=0.25,
        include_top=False,
        pooling="avg",
    )
    for layer in made.layers:
        if isinstance(layer, K.BatchNormalization):
            layer.momentum = (
                0.3  # Of a few batches, the averages are to be of some use.
            )
    larger = np.kron(images(x), np.ones((4, 4, 1), "float32"))
    return keras.Model(made.inputs, head(made.outputs[0])), larger


@model("KerasHub backbone", "attention")
def keras_hub(x):
    hub = pytest.importorskip("keras_hub")
    bert = hub.models.BertBackbone(
        vocabulary_size=17,
        num_layers=1,
        num_heads=2,
        hidden_dim=16,
        intermediate_dim=32,
        max_sequence_length=16,
    )
    tokens = (16 * images(x)[:, 2:6, 2:6]).astype("int32").reshape(-1, 16)
    given = {"token_ids": tokens, "segment_ids": np.zeros_like(tokens)}
    given["padding_mask"] = np.ones_like(tokens)
    hidden = keras.ops.reshape(bert.output["sequence_output"], (-1, 16 * 16))
    return keras.Model(bert.inputs, head(hidden)), given


SLOW = (recurrent, applications, keras_hub)  # to compile by XLA


def weights_of(layer):
    return [keras.ops.convert_to_numpy(v).copy() for v in layer.trainable_variables]


@pytest.mark.parametrize("make", MODELS.values())
def test_a_model(digits, make):
    n, size = (240, 40) if make is applications else (600, 60)
    x, y = digits[0][:n], digits[1][:n]
    made, x = make(x)
    made.compile(
        LayerwiseOptimizer(keras.optimizers.Adam(3e-3)),
        "sparse_categorical_crossentropy",
        jit_compile=False if NAME == "tensorflow" and make in SLOW else "auto",
    )
    # A small sketch, for many wide layers; the head is narrow, and read without.
    layers = MutualInformationLR(
        lambda r: r.rate * np.linspace(0.9, 1.1, len(r.rate)),
        (x, y),
        layers="all",
        readout=LinearReadout(sketch=32),
    )
    options = {"epochs": 2, "batch_size": size, "verbose": 0}
    history = made.fit(x, y, callbacks=[layers], **options).history
    names = list(layers.history[-1]["rate"])
    assert names[-1] == "head"
    check(layers.history[-1]["output"], history, made, x, y)
    if not normalises_batches(made):
        p = reference.linear_readout(made.predict(x, verbose=0), y, 10)
        found = {key: layers.history[-1][key]["head"] for key in ("bound", "raw")}
        # Outputs that hardly differ yet are read in the last digits of float32.
        bound = max(reference.h_minus_ce(p, y)[0], 0)
        assert found["bound"] == pytest.approx(bound, abs=0.03)
        raw = mutual_info_score(y, p.argmax(axis=1))
        assert found["raw"] == pytest.approx(raw, abs=0.03)
    rates = [history[f"learning_rate/{name}"] for name in (names[0], "head")]
    np.testing.assert_allclose(rates, [[3e-3, 2.7e-3], [3e-3, 3.3e-3]], rtol=1e-5)
    multipliers = list(made.optimizer.multipliers.values())
    assert min(multipliers) == pytest.approx(0.9**2)
    assert max(multipliers) == pytest.approx(1.1**2)
    for record in layers.history:
        for key in ("value", "information", "entropy"):
            assert np.all(np.isfinite(list(record[key].values())))

    before = weights_of(made)
    whole = MutualInformationLR(lambda r: r.rate / 2, (x, y))
    history = made.fit(x, y, callbacks=[whole], **options).history
    np.testing.assert_allclose(history["learning_rate"], [3e-3, 1.5e-3], rtol=1e-5)
    check(whole.history[-1], history, made, x, y)
    for old, new in zip(before, weights_of(made), strict=True):
        assert np.any(old != new)
    assert whole.history[-1]["raw"] > 0.3 or make is applications


@pytest.mark.refuses(
    *("Models", "preprocessing layers"),
    error="ValueError: strings as inputs; to look them up in the data works",
)
@pytest.mark.backends("jax", "torch", reason="TensorFlow has strings")
@pytest.mark.parametrize("kind", ["arrays", "dataset"])
def test_strings_into_a_model(digits, kind):
    """Refused before anything is trained; looked up in the data, they serve."""
    import tensorflow as tf

    words = np.array(["good day", "so bad", "good good", "bad day"] * 20)
    y = np.array([1, 0, 1, 0] * 20)
    vectorize = K.TextVectorization(output_sequence_length=4)
    vectorize.adapt(words)
    hidden = [K.Embedding(10, 8), K.GlobalAveragePooling1D()]
    made = keras.Sequential([*hidden, K.Dense(1, activation="sigmoid")])
    made.compile(keras.optimizers.Adam(0.1), "binary_crossentropy")
    given = tf.data.Dataset.from_tensor_slices((words, y)).batch(20)
    ids = given.map(lambda x, y: (vectorize(x), y))
    refused = MutualInformationLR(probe_data=(words, y) if kind == "arrays" else given)
    with pytest.raises(ValueError, match=r"`probe_data` must be numbers: .*such as"):
        made.fit(ids, epochs=1, verbose=0, shuffle=False, callbacks=[refused])
    callback = MutualInformationLR(probe_data=ids)
    made.fit(ids, epochs=5, verbose=0, shuffle=False, callbacks=[callback])
    assert callback.history[-1]["raw"] == pytest.approx(np.log(2))


def check(record, logs, made, x, y):
    """Against scikit-learn and plain NumPy, on what the model predicts now."""
    p = made.predict(x, verbose=0)
    bound = reference.h_minus_ce(p, y)[0]
    raw = mutual_info_score(y, p.argmax(axis=1))
    counted = reference.mutual_information(
        reference.contingency(p.argmax(axis=1), y, 10, 10), "miller_madow"
    )
    if len(y) < 500:  # Too few to count 10 classes.
        counted = max(bound, 0.0)
    assert logs["probe_mutual_information"][-1] == pytest.approx(counted, abs=1e-3)
    shown = max(bound, counted)
    assert logs["probe_information"][-1] == pytest.approx(shown, abs=1e-3)
    if normalises_batches(made):  # Else readings are of the same.
        assert record["bound"] != pytest.approx(bound, abs=1e-5)
    else:
        assert record["raw"] == pytest.approx(raw, abs=1e-4)
        assert record["bound"] == pytest.approx(bound, abs=1e-3)
    assert all(np.isfinite(v) for v in record.values() if isinstance(v, float))


def normalises_batches(made):
    """Whether readings go by the batches, unlike `predict`."""
    return any(
        isinstance(layer, K.BatchNormalization) and layer.trainable
        for layer in all_layers(made)
    )
