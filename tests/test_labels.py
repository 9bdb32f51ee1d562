"""Labels and outputs of every kind, through `fit`."""

import json
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from scipy.special import softmax
from sklearn.metrics import log_loss, mutual_info_score

import keras_milr
from keras_milr import readouts, sampling
from tests import reference

N = 500


def keep(reading):
    """A policy that changes nothing."""
    return reading.rate


@pytest.fixture
def small(digits):
    return digits[0][:N], digits[1][:N]


def make_model(units, activation=None, loss="mse", features=64, **compile_arguments):
    model = keras.Sequential(
        [keras.Input((features,)), keras.layers.Dense(units, activation=activation)]
    )
    model.compile(keras.optimizers.Adam(0.01), loss, **compile_arguments)
    return model


def fit(model, x, y, epochs=2, callback=None, weight=None, **arguments):
    """The callback after a training on all of the data, which are the probe too."""
    data = (x, y) if weight is None else (x, y, weight)
    arguments = {"policy": keep, "probe_data": data, "probe_size": 10_000} | arguments
    callback = callback or keras_milr.MutualInformationLR(**arguments)
    model.fit(x, y, sample_weight=weight, epochs=epochs, verbose=0, callbacks=callback)
    json.dumps(callback.history)
    return callback


def same(found, expected):
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-5), name


class TestSoftLabels:
    def soft(self, y, seed=0):
        """Mostly the class itself, the rest at random."""
        rest = np.random.default_rng(seed).dirichlet(np.ones(10), len(y))
        return (0.6 * np.eye(10)[y] + 0.4 * rest).astype("float32")

    @pytest.mark.supports("Labels", "soft and smoothed")
    @pytest.mark.parametrize(
        "loss",
        [
            "categorical_crossentropy",
            keras.losses.CategoricalCrossentropy(label_smoothing=0.1),
            keras.losses.KLDivergence(),
            keras.losses.categorical_focal_crossentropy,
        ],
    )
    def test_the_class_is_the_largest_entry(self, small, loss):
        x, y = small
        model = make_model(10, "softmax", loss)
        callback = fit(model, x, self.soft(y))
        p = model.predict(x, verbose=0)
        same(
            callback.history[-1],
            {
                "raw": mutual_info_score(y, p.argmax(axis=1)),
                "entropy": reference.entropy(np.bincount(y)),
                "cross_entropy": -np.log(p[np.arange(N), y]).mean(),
            },
        )
        assert callback.history[-1]["value"] > 0.3

    @pytest.mark.supports("Labels", "soft and smoothed")
    def test_smoothed_labels_can_be_known_completely(self):
        """An output that fits smoothed labels exactly reaches the ceiling."""
        y = np.arange(500) % 4
        labels = (0.8 * np.eye(4)[y] + 0.05).astype("float32")
        model = make_model(4, None, "categorical_crossentropy", features=4)
        model.set_weights([np.eye(4), np.zeros(4)])
        callback = fit(model, labels, labels, epochs=1)
        same(callback.history[0], {"value": np.log(4), "reference": np.log(4)})

    def test_rows_that_do_not_add_up(self, small):
        x, y = small
        labels = self.soft(y)
        labels[7] *= 2
        model = make_model(10, "softmax", "categorical_crossentropy")
        with pytest.raises(
            ValueError, match=r"(?s)add up to 1.*`targets='multi_label'"
        ):
            fit(model, x, labels)


class TestMultiLabel:
    def labels(self, y):
        """Even, large, prime; and one that is never true."""
        prime = np.isin(y, [2, 3, 5, 7])
        return np.stack([y % 2 == 0, y > 4, prime, y < 0], axis=1).astype("float32")

    @pytest.mark.supports("Labels", "multi-label")
    @pytest.mark.parametrize(("logits", "focal"), [(False, False), (True, True)])
    def test_each_label_is_a_question(self, small, logits, focal):
        x, y = small
        labels = self.labels(y)
        name = "BinaryFocalCrossentropy" if focal else "BinaryCrossentropy"
        loss = getattr(keras.losses, name)(from_logits=logits)
        model = make_model(4, None if logits else "sigmoid", loss)
        with pytest.warns(UserWarning, match=r"the same in all.*left out.*: 3$"):
            callback = fit(model, x, labels, epochs=3)
        p = model.predict(x, verbose=0).astype("float64")
        p = 1 / (1 + np.exp(-p)) if logits else p
        record = callback.history[-1]
        assert set(record["labels"]) == {"0", "1", "2"}
        parts = []
        for label in range(3):
            one, q = labels[:, label].astype(int), p[:, label]
            table = reference.contingency((q > 0.5).astype(int), one, 2, 2)
            part = {
                "raw": mutual_info_score(one, q > 0.5),
                "value": reference.mutual_information(table, "miller_madow"),
                "entropy": reference.entropy(np.bincount(one)),
                "stderr": reference.standard_error(table),
                "cross_entropy": log_loss(one, q),
                "variation": np.ptp(q),
            }
            part["bound"], part["bound_stderr"] = reference.h_minus_ce(
                np.stack([1 - q, q], axis=1), one
            )
            same(record["labels"][str(label)], part)
            parts.append(part)
        same(record, {k: np.mean([part[k] for part in parts]) for k in parts[0]})
        assert record["information"] == max(record["value"], record["bound"])
        assert record["reference"] == record["entropy"]
        assert record["value"] > 0.1

    @pytest.mark.parametrize("how", ["run_eagerly", "bfloat16"])
    def test_how_it_is_compiled(self, small, how):
        x, labels = small[0][:200], self.labels(small[1][:200])[:, :3]
        options = {} if how == "bfloat16" else {"run_eagerly": True}
        if how == "bfloat16":
            keras.config.set_dtype_policy("mixed_bfloat16")
        try:
            model = make_model(3, "sigmoid", "binary_crossentropy", **options)
        finally:
            keras.config.set_dtype_policy("float32")
        record = fit(model, x, labels, epochs=1).history[-1]
        said = np.asarray(model.predict(x, verbose=0), "float32") > 0.5
        raw = [mutual_info_score(labels[:, i], said[:, i]) for i in range(3)]
        assert record["raw"] == pytest.approx(np.mean(raw), abs=1e-5)

    def test_layers_are_read_for_each_label(self, small):
        x, y = small
        labels = self.labels(y)[:, :3]
        model = keras.Sequential(
            [
                keras.Input((64,)),
                keras.layers.Dense(16, "relu", name="hidden"),
                keras.layers.Dense(3, "sigmoid", name="out"),
            ]
        )
        optimizer = keras_milr.LayerwiseOptimizer(keras.optimizers.Adam(0.01))
        model.compile(optimizer, "binary_crossentropy")
        callback = fit(model, x, labels, layers="hidden")
        hidden = keras.Model(model.inputs[0], model.layers[0].output)(x)
        read = readouts.LinearReadout().measure
        expected = [read(hidden, labels[:, i].astype(int), 2).value for i in range(3)]
        assert callback.history[-1]["value"]["hidden"] == pytest.approx(
            np.mean(expected), abs=1e-4
        )
        assert set(callback.history[-1]["labels"]) == {"0", "1", "2"}

    def test_a_label_for_each_of_ten_softmax_outputs_is_one_question(self, small):
        """Binary cross-entropy on a softmax, as some train: one class for each row."""
        x, y = small
        model = make_model(10, "softmax", "binary_crossentropy")
        record = fit(model, x, np.eye(10)[y]).history[-1]
        predicted = model.predict(x, verbose=0).argmax(axis=1)
        same(record, {"raw": mutual_info_score(y, predicted)})
        sigmoids = make_model(10, "sigmoid", "binary_crossentropy")
        assert len(fit(sigmoids, x, np.eye(10)[y]).history[-1]["labels"]) == 10

    def test_more_than_64_are_not_listed(self, small):
        """In the history, which is saved with each checkpoint."""
        x, _ = small
        model = make_model(65, "sigmoid", "binary_crossentropy")
        labels = np.random.default_rng(0).integers(0, 2, (len(x), 65))
        assert "labels" not in fit(model, x, labels).history[-1]

    def test_bad_labels(self, small):
        x, y = small
        labels = self.labels(y)[:, :3]
        for bad, message in (
            (labels + 2, "must be 0 or 1.*the first 3"),
            (
                0.9 * labels,
                r"(?s)must be 0 or 1.*`targets='multi_label'`.*'continuous'",
            ),
            (labels * 0, "must have labels that vary"),
        ):
            model = make_model(3, "sigmoid", "binary_crossentropy")
            before = model.get_weights()
            with pytest.raises(ValueError, match=message):
                fit(model, x, bad)
            np.testing.assert_array_equal(before[0], model.get_weights()[0])
        smoothed = fit(model, x, 0.9 * labels + 0.05, targets="multi_label")
        exact = fit(model, x, labels, epochs=1, targets="multi_label")
        assert smoothed.history[-1]["raw"] == pytest.approx(
            exact.history[0]["raw"], abs=1e-6
        )


class TestContinuousTargets:
    def target(self, x, columns=1, seed=0):
        rng = np.random.default_rng(seed)
        y = x @ rng.normal(size=(64, columns)) + rng.normal(size=(len(x), columns))
        return y.astype("float32")

    def expected(self, y, predicted):
        bins = reference.number_of_bins(len(y))
        edges = reference.quantile_edges(y, bins)
        of = [[reference.bin_of(v, edges) for v in values] for values in (y, predicted)]
        return mutual_info_score(*of), bins

    @pytest.mark.supports("Labels", "continuous targets")
    @pytest.mark.parametrize(
        "loss", ["mae", keras.losses.Huber(), keras.losses.log_cosh]
    )
    def test_quantile_bins(self, small, loss):
        x, _ = small
        y = self.target(x)[:, 0]
        model = make_model(1, loss=loss)
        callback = fit(model, x, y, epochs=12)
        record = callback.history[-1]
        raw, bins = self.expected(y, model.predict(x, verbose=0)[:, 0])
        same(record, {"raw": raw, "entropy": np.log(bins)})
        assert record["bins"] == bins == 10
        assert record["estimator"] == "counts"
        assert np.isnan(record["bound"])
        assert record["information"] == record["value"] > 0.2

    def test_several_columns(self, small):
        x, _ = small
        y = self.target(x, 3)
        y[:, 1] = 5.0
        model = make_model(3)
        with pytest.warns(UserWarning, match="left out.*: 1$"):
            callback = fit(model, x, y, epochs=10)
        record, predicted = callback.history[-1], model.predict(x, verbose=0)
        raw = {c: self.expected(y[:, c], predicted[:, c])[0] for c in (0, 2)}
        for column, value in raw.items():
            same(record["columns"][str(column)], {"raw": value})
        same(record, {"raw": np.mean(list(raw.values()))})
        assert record["bins"] == [10, 10]

    def test_the_draw_gives_each_bin_its_share(self, digits):
        x = digits[0]
        y = self.target(x)
        callback = fit(make_model(1), x, y, epochs=1, probe_size=320)
        sample = callback._sample
        assert len(sample.class_ids) == 320
        edges = np.quantile(y, np.arange(1, 8) / 8)
        rows = [np.flatnonzero((x == one).all(axis=1))[0] for one in sample.x]
        np.testing.assert_array_equal(
            sample.class_ids[:, 0],
            [
                reference.bin_of(v, reference.quantile_edges(y[rows, 0], 8))
                for v in y[rows, 0]
            ],
        )
        # At random the spread would be sqrt(320 · 1/8 · 7/8) ≈ 6; here it is that of
        # the 640 rows it is drawn from, whose quantiles are not those of all.
        counts = np.bincount(np.searchsorted(edges, y[rows, 0]), minlength=8)
        assert np.abs(counts - 40).max() <= 14

    def test_ties_and_few_values(self, small):
        x, y = small
        counts = (y >= 5) * (y - 4)  # Half zeros, then 1 to 5.
        model = make_model(1, loss="poisson", activation="exponential")
        record = fit(model, x, counts, epochs=1).history[0]
        edges = reference.quantile_edges(counts, 10)
        assert record["bins"] == len(edges) + 1 < 10
        bins = [reference.bin_of(v, edges) for v in counts]
        same(record, {"entropy": reference.entropy(np.bincount(bins))})

    def test_zeros_and_ones_under_squared_error_are_classes(self, small):
        x, y = small
        record = fit(make_model(1, "sigmoid"), x, y > 4).history[-1]
        assert not np.isnan(record["bound"])
        with pytest.raises(ValueError, match="`targets='continuous'`"):
            fit(make_model(1), x, y > 4)
        record = fit(make_model(1), x, y > 4, targets="continuous").history[-1]
        assert record["bins"] == 2

    def test_loses_what_it_knew(self, small):
        """Regression is rolled back when its output is the same for all samples."""
        x, _ = small
        y = self.target(x)
        model = make_model(1)

        def destroy(epoch, logs):
            if epoch == 2:
                model.layers[0].kernel.assign(keras.ops.zeros((64, 1)))

        callback = keras_milr.MutualInformationLR(keep, (x, y))
        destroyer = keras.callbacks.LambdaCallback(on_epoch_end=destroy)
        with pytest.warns(UserWarning, match="does not depend on the input any more"):
            model.fit(x, y, epochs=4, verbose=0, callbacks=[destroyer, callback])
        assert [r["rollbacks"] for r in callback.history] == [0, 0, 0, 0, 1]
        assert np.any(model.layers[0].kernel)

    def test_a_loss_that_is_not_finite(self, small):
        x, _ = small
        y = self.target(x)
        model = make_model(1)
        callback = keras_milr.MutualInformationLR(keep, (x, y), learning_rate=1e25)
        with pytest.warns(UserWarning, match="the loss or the weights are not finite"):
            model.fit(x, y, epochs=2, verbose=0, callbacks=[callback])
        assert np.all(np.isfinite(model.get_weights()[0]))

    def test_a_rate_is_found(self, digits):
        x = digits[0]
        y = self.target(x)
        model = make_model(1)
        callback = keras_milr.MutualInformationLR(
            probe_data=(x, y), learning_rate="auto"
        )
        model.fit(x, y, epochs=1, verbose=0, callbacks=[callback])
        assert callback.lr_range.best_lr > 1e-4
        assert np.all(np.isnan(callback.lr_range.loss))

    def test_bad_targets(self, small):
        x, _ = small
        y = self.target(x)
        nan = y.copy()
        nan[3] = np.nan
        for bad, message in (
            (nan, "targets must be finite. Received 1 NaN"),
            (y * 0 + 3, "must have labels that vary"),
            (np.tile(y, 2), "labels of shape"),
        ):
            with pytest.raises(ValueError, match=message):
                fit(make_model(1), x, bad)


class TestDetection:
    @pytest.mark.supports("Labels", "kind of labels given by `targets`")
    def test_an_unknown_loss_and_labels_of_two_kinds(self, small):
        x, y = small
        labels = np.random.default_rng(0).dirichlet(np.ones(10), N)

        def loss(y_true, y_pred):
            return keras.ops.mean(keras.ops.square(y_true - y_pred), axis=-1)

        model = make_model(10, "softmax", loss)
        message = r"(?s)Pass `targets='soft'` or `targets='continuous'`"
        with pytest.raises(ValueError, match=message):
            fit(model, x, labels)
        assert "bins" in fit(model, x, labels, targets="continuous").history[0]
        assert "bins" not in fit(model, x, labels, targets="soft").history[0]
        # Labels of one kind only need no help.
        assert fit(model, x, np.eye(10)[y]).history[0]["reference"] > 2

    @pytest.mark.parametrize(
        ("kind", "units", "labels", "message"),
        [
            ("sparse", 1, "ids", "'sparse' needs one class id for each row of two"),
            ("binary", 10, "ids", "'binary' needs a single unit"),
            ("soft", 10, "ids", "'soft' needs labels of the shape of the outputs"),
            ("continuous", 10, "ids", "'continuous' needs a number for each output"),
            ("one_hot", 10, "soft", "must be one-hot.*row 0"),
            ("sparse", 10, "numbers", "whole numbers"),
            ("soft", 10, "many", "add up to 1"),
        ],
    )
    def test_a_kind_that_does_not_fit(self, small, kind, units, labels, message):
        x, y = small
        labels = {
            "ids": y,
            "numbers": y + 0.5,
            "soft": 0.9 * np.eye(10)[y] + 0.01,
            "many": np.ones((N, 10)),
        }[labels]
        model = make_model(units)
        before = model.get_weights()
        with pytest.raises(ValueError, match=f"(?s){message}"):
            fit(model, x, labels, targets=kind)
        np.testing.assert_array_equal(before[0], model.get_weights()[0])

    def test_the_argument(self, small):
        for bad in ("classes", None, 3, {"a": "classes"}):
            with pytest.raises(ValueError, match="`targets` must be 'auto' or one of"):
                keras_milr.MutualInformationLR(probe_data=small, targets=bad)
        with pytest.raises(ValueError, match="`targets` needs `probe_data`"):
            keras_milr.MutualInformationLR(targets="soft")
        callback = keras_milr.MutualInformationLR(probe_data=small, targets="soft")
        again = keras_milr.MutualInformationLR.from_config(
            callback.get_config(), probe_data=small
        )
        assert again.targets == callback.targets == "soft"

    def test_hinge(self, small):
        """Margins: labels of −1 and 1, and a threshold of 0."""
        x, y = small
        labels = np.where(y > 4, 1.0, -1.0)
        model = make_model(1, loss="hinge")
        record = fit(model, x, labels, epochs=3).history[-1]
        predicted = model.predict(x, verbose=0)[:, 0] > 0
        same(record, {"raw": mutual_info_score(y > 4, predicted)})

    def test_smoothed_yes_or_no(self, small):
        x, y = small
        labels = 0.9 * (y > 4) + 0.05
        model = make_model(1, "sigmoid", "binary_crossentropy")
        with pytest.raises(ValueError, match="`targets='binary'` if all above 1/2"):
            fit(model, x, labels)
        record = fit(model, x, labels, targets="binary").history[-1]
        predicted = model.predict(x, verbose=0)[:, 0] > 0.5
        same(record, {"raw": mutual_info_score(y > 4, predicted)})

    def test_a_custom_step_without_a_loss(self, small):
        x, y = small

        class Model(keras.Model):
            def __init__(self):
                super().__init__()
                self.out = keras.layers.Dense(10, "softmax")

            def call(self, x):
                return self.out(x)

            def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
                loss = keras.losses.sparse_categorical_crossentropy(y, y_pred)
                return keras.ops.mean(loss)

        model = Model()
        model.compile("adam")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            record = fit(model, x, y).history[-1]
        same(
            record, {"raw": mutual_info_score(y, model.predict(x, verbose=0).argmax(1))}
        )


class TestPositions:
    def tokens(self, n=300, length=7, seed=0):
        """Words 1 to 12 and their kind, known from the word but for noise; padded."""
        rng = np.random.default_rng(seed)
        x = rng.integers(1, 13, (n, length))
        y = np.where(rng.random((n, length)) < 0.8, x % 3, rng.integers(0, 3, x.shape))
        lengths = rng.integers(1, length + 1, n)
        padding = np.arange(length) >= lengths[:, None]
        return np.where(padding, 0, x), y.astype("int32"), ~padding

    def tagger(self, mask=True, loss="sparse_categorical_crossentropy", **options):
        inputs = keras.Input((None,), dtype="int32")
        hidden = keras.layers.Embedding(13, 8, mask_zero=mask, name="words")(inputs)
        hidden = keras.layers.Dense(8, "relu", name="hidden")(hidden)
        outputs = keras.layers.Dense(3, activation="softmax", name="tags")(hidden)
        model = keras.Model(inputs, outputs)
        model.compile(keras.optimizers.Adam(0.03), loss, **options)
        return model

    def check(self, record, p, y, counted, weight=None):
        weight = np.ones(y.shape) if weight is None else weight
        of_sample = (weight * counted).reshape(len(y), -1).sum(axis=1)
        samples = of_sample.sum() ** 2 / (of_sample**2).sum()
        rows = counted.reshape(-1)
        table = reference.contingency(
            p.argmax(axis=-1).reshape(-1)[rows],
            y.reshape(-1)[rows],
            *(p.shape[-1], p.shape[-1]),
            weight.reshape(-1)[rows],
        )
        log_p = np.log(np.take_along_axis(p, y[..., None], axis=-1)[..., 0])
        cross_entropy = -(log_p * weight)[counted].sum() / of_sample.sum()
        table *= samples / table.sum()
        same(
            record,
            {
                "raw": reference.mutual_information(table),
                "value": reference.mutual_information(table, "miller_madow"),
                "entropy": reference.entropy(table.sum(axis=0)),
                "stderr": reference.standard_error(table),
                "cross_entropy": cross_entropy,
            },
        )

    @pytest.mark.supports("Labels", "tokens, with masks")
    def test_the_mask_of_the_output(self):
        x, y, counted = self.tokens()
        model = self.tagger()
        record = fit(model, x, y, epochs=3).history[-1]
        self.check(record, model.predict(x, verbose=0), y, counted)
        assert record["value"] > 0.2
        unmasked = self.tagger(mask=False)
        unmasked.set_weights(model.get_weights())
        record = fit(unmasked, x, y, epochs=1).history[-1]
        everywhere = np.ones(y.shape, bool)
        self.check(record, unmasked.predict(x, verbose=0), y, everywhere)

    @pytest.mark.supports("Labels", "sample weights")
    @pytest.mark.parametrize(
        "shape",
        [
            pytest.param(
                "samples",
                marks=pytest.mark.backends(
                    *("tensorflow", "jax"), reason="Keras masks weights in place there"
                ),
            ),
            "positions",
        ],
    )
    def test_sample_weights(self, shape):
        x, y, counted = self.tokens()
        # Keras' losses take (n, 1), not (n,), for all positions of a sample.
        size = (len(x), 1) if shape == "samples" else x.shape
        weight = np.random.default_rng(1).uniform(0.5, 2.0, size).astype("float32")
        if shape == "positions":
            weight[:, 0] = 0.0
        each = np.broadcast_to(weight, x.shape)
        model = self.tagger()
        record = fit(model, x, y, weight=weight).history[-1]
        seen = counted & (each > 0)
        self.check(record, model.predict(x, verbose=0), y, seen, each)
        if shape == "samples":
            still = {"epochs": 1, "learning_rate": 1e-12, "min_lr": 0.0}
            data = x, y, weight[:, 0]
            again = fit(model, x, y, probe_data=data, **still).history[0]
            same(again, {"raw": record["raw"], "stderr": record["stderr"]})

    @pytest.mark.parametrize("kind", ["one_hot", "column", "soft"])
    def test_labels(self, kind):
        x, y, counted = self.tokens()
        labels = np.eye(3)[y] if kind == "one_hot" else y[..., None]
        labels = 0.7 * np.eye(3)[y] + 0.1 if kind == "soft" else labels
        loss = ("sparse_" if kind == "column" else "") + "categorical_crossentropy"
        model = self.tagger(loss=loss)
        record = fit(model, x, labels).history[-1]
        self.check(record, model.predict(x, verbose=0), y, counted)

    def test_labels_that_the_loss_ignores(self):
        x, y, counted = self.tokens()
        loss = keras.losses.SparseCategoricalCrossentropy(ignore_class=-1)
        model = self.tagger(mask=False, loss=loss)
        record = fit(model, x, np.where(counted, y, -1)).history[-1]
        self.check(record, model.predict(x, verbose=0), y, counted)

    def test_noise_is_that_of_samples(self):
        """Copies of a position say nothing new."""
        rng = np.random.default_rng(0)
        x = rng.integers(0, 13, (300, 1))
        y = np.where(rng.random(x.shape) < 0.7, x % 3, 0)
        model = self.tagger(mask=False)
        fit(model, x, y, epochs=5)
        still = {"epochs": 1, "learning_rate": 1e-12, "min_lr": 0.0}
        once = fit(model, x, y, **still).history[0]
        x, y = np.repeat(x, 9, axis=1), np.repeat(y, 9, axis=1)
        many = fit(model, x, y, **still).history[0]
        fields = ("value", "raw", "null", "stderr", "bound", "bound_stderr", "noise")
        assert once["value"] > 0.1
        same(many, {field: once[field] for field in fields})

    @pytest.mark.supports("Labels", "pixels")
    def test_pixels(self, small):
        images = small[0].reshape(-1, 8, 8, 1)[:100]
        y = np.digitize(images[..., 0], [0.2, 0.7]).astype("int32")
        model = keras.Sequential(
            [
                keras.Input((8, 8, 1)),
                keras.layers.Conv2D(3, 3, padding="same"),
            ]
        )
        # Of probabilities, Keras' sparse loss has no gradient for images on PyTorch.
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile("adam", loss)
        record = fit(model, images, y).history[-1]
        p = softmax(model.predict(images, verbose=0).astype("float64"), axis=-1)
        self.check(record, p, y, np.ones(y.shape, bool))
        assert record["estimator"] == "counts"

    def test_yes_or_no_for_each_pixel(self, small):
        images = small[0].reshape(-1, 8, 8, 1)[:100]
        model = keras.Sequential(
            [keras.Input((8, 8, 1)), keras.layers.Conv2D(1, 1, activation="sigmoid")]
        )
        model.compile(keras.optimizers.Adam(0.1), "binary_crossentropy")
        record = fit(model, images, images > 0.5, epochs=5).history[-1]
        p = model.predict(images, verbose=0) > 0.5
        same(record, {"raw": mutual_info_score((images > 0.5).ravel(), p.ravel())})
        # Grey values are neither yes nor no.
        with pytest.raises(ValueError, match="`targets='continuous'`"):
            fit(model, images, images)
        record = fit(model, images, images, targets="continuous").history[-1]
        edges = reference.quantile_edges(images.ravel(), reference.number_of_bins(100))
        assert record["bins"] == len(edges) + 1

    def test_a_series_of_numbers(self):
        rng = np.random.default_rng(0)
        x = rng.normal(size=(300, 5, 2)).astype("float32")
        y = x[..., :1] - x[..., 1:]
        model = keras.Sequential([keras.Input((5, 2)), keras.layers.Dense(1)])
        model.compile(keras.optimizers.Adam(0.05), "mse")
        record = fit(model, x, y, epochs=10).history[-1]
        edges = reference.quantile_edges(y.ravel(), reference.number_of_bins(300))
        known, said = (
            [reference.bin_of(v, edges) for v in values.ravel()]
            for values in (y, model.predict(x, verbose=0))
        )
        same(record, {"raw": mutual_info_score(known, said)})

    def test_layers_are_read_at_positions(self):
        x, y, counted = self.tokens()
        optimizer = keras_milr.LayerwiseOptimizer(keras.optimizers.Adam(0.03))
        model = self.tagger()
        model.compile(optimizer, "sparse_categorical_crossentropy")
        record = fit(model, x, y, epochs=3, layers="all").history[-1]
        # Every word has its own kind, so whoever sees the word knows what can be known:
        # one position each reads what all of them do, within the errors.
        table = reference.contingency(x[counted], y[counted], 13, 3)
        known = reference.mutual_information(table)
        for name in ("words", "hidden"):
            error = record["stderr"][name]
            assert record["value"][name] == pytest.approx(known, abs=0.1 + 2 * error)
            assert record["entropy"][name] == pytest.approx(np.log(3), abs=0.1)

    def test_layers_without_the_positions(self, small):
        images = small[0].reshape(-1, 8, 8, 1)[:100]
        model = keras.Sequential(
            [
                keras.Input((8, 8, 1)),
                keras.layers.Conv2D(3, 3, strides=2, padding="same", name="half"),
                keras.layers.Conv2DTranspose(3, 3, strides=2, padding="same"),
            ]
        )
        optimizer = keras_milr.LayerwiseOptimizer("adam")
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(optimizer, loss)
        y = (images[..., 0] > 0.5).astype("int32")
        with pytest.raises(ValueError, match=r"same positions, \(8, 8\).*'half'"):
            fit(model, images, y, layers="all")

    def test_bad_shapes(self):
        x, y, _ = self.tokens()
        for labels, weight, message in (
            (y[:, :-1], None, r"\(n, 7\) or \(n, 7, 1\).*\(300, 6\)"),
            (y + 1, None, r"whole numbers in \[0, 3\)"),
            (y, np.ones((300, 3)), r"shape \(n,\) or \(n, 7\). Received: \(300, 3\)"),
            (y * 0, None, "at least two classes"),
        ):
            model = self.tagger()
            with pytest.raises(ValueError, match=message):
                fit(model, x, labels, weight=weight)


class TestSeveralOutputs:
    def model(self, kind="dict", **compile_arguments):
        inputs = keras.Input((64,))
        digit = keras.layers.Dense(10, activation="softmax", name="digit")(inputs)
        size = keras.layers.Dense(1, name="size")(inputs)
        hidden = keras.layers.Identity(name="hidden")(digit)
        outputs = {"digit": digit, "size": size, "hidden": hidden}
        outputs = list(outputs.values()) if kind == "list" else outputs
        model = keras.Model(inputs, outputs)
        losses = {"digit": "sparse_categorical_crossentropy", "size": "mse"}
        arguments = {"loss": losses} | compile_arguments
        model.compile(keras.optimizers.Adam(0.01), **arguments)
        return model

    def labels(self, x, y):
        return {"digit": y, "size": x.sum(axis=1) + y}

    def test_one_layer_that_makes_two_outputs(self, small):
        x, y = small
        first, second = keras.Input((64,)), keras.Input((64,))
        head = keras.layers.Dense(10, activation="softmax", name="head")
        model = keras.Model([first, second], [head(first), head(second)])
        model.compile("sgd", "sparse_categorical_crossentropy")
        data = ([x, x[::-1]], [y, y[::-1]])
        both = sampling.draw_sample(data, model, 500)
        assert [one.name for one in both.labels] == ["head", "head_1"]
        np.testing.assert_array_equal(both.labels[1].class_ids, y[::-1])
        (other,) = sampling.draw_sample(data, model, 500, output="head_1").labels
        assert other.index == 1

    def test_what_has_no_loss_may_be_anything(self, small):
        """Labels come by themselves then, as `fit` takes them."""

        class WithNorm(keras.Model):
            def __init__(self):
                super().__init__()
                self.head = keras.layers.Dense(10, activation="softmax")

            def call(self, x):
                return {"norm": keras.ops.mean(x**2), "p": self.head(x)}

        model = WithNorm()
        model.compile("sgd", {"p": "sparse_categorical_crossentropy"})
        for labels in (small[1], {"p": small[1]}):
            (found,) = sampling.draw_sample((small[0], labels), model, 500).labels
            assert (found.name, found.index) == ("p", 1)

    def test_yes_or_no_of_which_some_are_missing(self, small):
        x, y = small
        labels = np.stack([y % 2, y > 4, np.where(y % 3, y > 2, -1)], 1)
        model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(3)])
        model.compile("sgd", lambda y, p: keras.ops.abs(y - p))
        with pytest.raises(ValueError, match="Missing labels cannot be read"):
            sampling.draw_sample((x, labels), model, 500)
        read = sampling.draw_sample((x, labels), model, 500, kind="continuous")
        assert read.labels[0].target.kind == "continuous"

    @pytest.mark.supports("Labels", "several outputs, weighted mean")
    @pytest.mark.parametrize("kind", ["dict", "list"])
    def test_weighted_mean(self, small, kind):
        x, y = small
        labels = self.labels(x, y)
        loss_weights = {"digit": 3.0, "size": 1.0}
        losses = {"digit": "sparse_categorical_crossentropy", "size": "mse"}
        if kind == "list":
            losses = [*losses.values(), None]
            loss_weights = [3.0, 1.0, 0.0]
            labels = [*labels.values(), np.zeros((N, 10))]
        model = self.model(kind, loss=losses, loss_weights=loss_weights)
        record = fit(model, x, labels).history[-1]
        assert set(record["outputs"]) == {"digit", "size"}
        p = model.predict(x, verbose=0)
        p = p["digit"] if kind == "dict" else p[0]
        same(
            record["outputs"]["digit"],
            {"raw": mutual_info_score(y, p.argmax(axis=1))},
        )
        assert record["outputs"]["size"]["bins"] == 10
        for field in ("value", "entropy"):
            digit, size = (record["outputs"][n][field] for n in ("digit", "size"))
            same(record, {field: (3 * digit + size) / 4})

    def test_layers_are_read_for_all_outputs(self, small):
        x, y = small
        inputs = keras.Input((64,))
        hidden = keras.layers.Dense(8, "relu", name="hidden")(inputs)
        digit = keras.layers.Dense(10, activation="softmax", name="digit")(hidden)
        even = keras.layers.Dense(1, activation="sigmoid", name="even")(hidden)
        model = keras.Model(inputs, [digit, even])
        model.compile(
            keras_milr.LayerwiseOptimizer("adam"),
            ["sparse_categorical_crossentropy", "binary_crossentropy"],
            loss_weights=[1.0, 3.0],
        )
        record = fit(model, x, [y, y % 2], layers="hidden").history[-1]
        activations = keras.Model(inputs, hidden)(x)
        read = readouts.LinearReadout().measure
        expected = (read(activations, y, 10).value, read(activations, y % 2, 2).value)
        assert record["value"]["hidden"] == pytest.approx(
            np.average(expected, weights=[1, 3]), abs=1e-4
        )
        assert record["output"]["entropy"] == pytest.approx(
            (reference.entropy(np.bincount(y)) + 3 * np.log(2)) / 4, abs=0.01
        )

    def test_an_output_of_weight_0_does_not_count(self, small):
        x, y = small
        model = self.model(loss_weights={"digit": 2.0, "size": 0.0})
        record = fit(model, x, self.labels(x, y)).history[-1]
        same(record, {"bound": record["outputs"]["digit"]["bound"]})
        assert np.isnan(record["outputs"]["size"]["bound"])

    @pytest.mark.supports("Labels", "one output by name")
    def test_one_by_name(self, small):
        x, y = small
        model = self.model()
        record = fit(model, x, self.labels(x, y), output="size").history[-1]
        assert record["bins"] == 10
        assert "outputs" not in record
        record = fit(model, x, self.labels(x, y), output="digit").history[-1]
        p = model.predict(x, verbose=0)["digit"]
        same(record, {"raw": mutual_info_score(y, p.argmax(axis=1))})

    def test_a_kind_for_each(self, small):
        x, y = small
        callback = fit(
            self.model(), x, self.labels(x, y), targets={"size": "continuous"}
        )
        kinds = {one.name: one.target.kind for one in callback._sample.labels}
        assert kinds == {"digit": "sparse", "size": "continuous"}

    def test_what_cannot_be_read_is_left_out(self, small):
        x, y = small
        labels = self.labels(x, y) | {"size": np.zeros(N)}
        with pytest.warns(UserWarning, match="Output 'size' is not read"):
            record = fit(self.model(), x, labels).history[-1]
        assert record["entropy"] == pytest.approx(reference.entropy(np.bincount(y)))

    def test_a_dataset_and_a_found_rate(self, digits):
        x, y = digits
        data = tf.data.Dataset.from_tensor_slices((x, self.labels(x, y))).batch(20)
        model = self.model()
        callback = keras_milr.MutualInformationLR(probe_data=data, learning_rate="auto")
        model.fit(data, epochs=1, verbose=0, callbacks=[callback], shuffle=False)
        assert callback.lr_range.best_lr > 0

    def test_bad_arguments(self, small):
        x, y = small
        labels = self.labels(x, y)
        for arguments, error, message in (
            ({"output": "colour"}, ValueError, r"`output` must be the name.*'digit'"),
            ({"output": 3}, TypeError, "`output` must be the name"),
            ({"targets": {"colour": "soft"}}, ValueError, "kinds.*for each output"),
            ({"targets": {"size": "sparse"}}, ValueError, "'sparse' needs one class"),
        ):
            model = self.model()
            before = model.get_weights()
            with pytest.raises(error, match=message):
                fit(model, x, labels, **arguments)
            np.testing.assert_array_equal(before[0], model.get_weights()[0])
        for data in ((x, y), (x, [y, y, y, y]), (x, {"digit": y, "colour": y})):
            with pytest.raises(ValueError, match="`probe_data` must have an entry for"):
                fit(self.model(), x, labels, probe_data=data)
        with pytest.raises(ValueError, match=r"loss weights.*must not all be 0"):
            fit(self.model(loss_weights={"digit": 0.0, "size": 0.0}), x, labels)
        with pytest.raises(ValueError, match="`output` needs `probe_data`"):
            keras_milr.MutualInformationLR(output="size")


class TestThousandsOfClasses:
    @pytest.mark.supports("Labels", "thousands of classes")
    @pytest.mark.parametrize("classes", [5000, 20_000])
    def test_no_table(self, classes):
        rng = np.random.default_rng(0)
        y = rng.integers(0, classes, 2500).astype("int32")
        codes = rng.normal(size=(classes, 16)).astype("float32")
        x = codes[y] + 0.5 * rng.normal(size=(2500, 16)).astype("float32")
        model = make_model(classes, "softmax", "sparse_categorical_crossentropy", 16)
        model.set_weights([codes.T, np.zeros(classes)])
        callback = keras_milr.MutualInformationLR(keep, probe_data=(x, y))
        model.fit(x, y, epochs=1, batch_size=250, verbose=0, callbacks=[callback])
        state = readouts.Predictions().init(classes)
        assert sum(value.nbytes for value in state.values()) < 1e6
        sample = callback._sample
        assert len(sample.class_ids) == 2048
        p = model.predict(sample.x, verbose=0)
        record = callback.history[-1]
        # Shares are those in all data: a sample does not have all classes.
        known = p[np.arange(2048), sample.class_ids]
        log_p = np.log(np.clip(known, 1e-7, 1 - 1e-7))
        share = np.log((np.bincount(y) / len(y))[sample.class_ids])
        gain = log_p - share
        bound, error = max(gain.mean(), 0), gain.std() / np.sqrt(2048)
        same(record, {"bound": bound, "value": bound, "bound_stderr": error})
        same(record, {"entropy": -share.mean(), "cross_entropy": -log_p.mean()})
        assert record["estimator"] == "bound"
        assert record["bound"] > 1
        assert np.isnan(record["raw"])

    def test_fano_equals_that_of_a_table(self):
        rng = np.random.default_rng(0)
        y = rng.integers(0, 1500, 3000)
        logits = rng.normal(size=(3000, 1500)) + 6.0 * np.eye(1500)[y]
        logits[:10] = np.nan
        found = readouts.Predictions().measure(logits, y, 1500)
        said = np.where(np.isnan(logits[:, 0]), 1500, logits.argmax(axis=1))
        table = reference.contingency(said, y, 1501, 1500)
        expected = readouts.from_counts(table)
        assert found.estimator == expected.estimator == "fano"
        assert found.value == pytest.approx(expected.value, abs=1e-5)
        assert found.stderr == pytest.approx(expected.stderr, abs=1e-5)
        assert found.value > 1
