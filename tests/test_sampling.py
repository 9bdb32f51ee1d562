import tracemalloc

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_milr import sampling
from tests.test_probe import make_model


def test_a_draw_that_takes_long_says_so(digits, monkeypatch):
    monkeypatch.setattr(sampling, "_LONG", 0)
    x, y = digits
    batches = [(x[i : i + 100], y[i : i + 100]) for i in range(0, 1000, 100)]
    with pytest.warns(UserWarning, match=r"0 samples.*`dataset.take\(200\)`") as said:
        draw(iter(batches))
    assert sum("gone through" in str(one.message) for one in said) == 1


def draw(data, size=500, seed=0, **model_arguments):
    return sampling.draw_sample(data, make_model(**model_arguments), size, seed)


class TestSample:
    def test_each_class_has_its_share(self):
        rng = np.random.default_rng(0)
        y = rng.choice(3, 10_000, p=[0.9, 0.09, 0.01])
        x = np.arange(10_000, dtype="float32")[:, None]
        sample = draw((x, y), 1000, features=1, classes=3)
        shares = 1000 * np.bincount(y) / 10_000
        assert np.all(np.abs(np.bincount(sample.class_ids) - shares) <= 1)
        assert len(sample.class_ids) == 1000
        # The rows belong to their labels, and none came twice.
        rows = sample.x[:, 0].astype(int)
        np.testing.assert_array_equal(y[rows], sample.class_ids)
        assert len(set(rows)) == 1000

    def test_rare_classes_are_there(self):
        y = np.zeros(5000, int)
        y[:2], y[2] = 1, 2
        sample = draw((np.zeros((5000, 1)), y), 100, features=1, classes=3)
        np.testing.assert_array_equal(np.bincount(sample.class_ids), [98, 1, 1])

    def test_a_class_is_sampled_uniformly(self):
        """Each of 500 rows of a class comes up equally often in 400 draws of 100."""
        x = np.arange(1000, dtype="float32")[:, None]
        y = np.arange(1000) % 2
        model = make_model(1, 2)
        hits = np.zeros(1000)
        for seed in range(400):
            sample = sampling.draw_sample((x, y), model, 100, seed)
            hits[sample.x[:, 0].astype(int)] += 1
        # Binomial(400, 0.1): mean 40, standard deviation 6; chi-squared over rows.
        chi = np.sum((hits - 40) ** 2 / 36)
        assert abs(chi - 1000) < 5 * np.sqrt(2000)

    def test_the_seed_decides(self, digits):
        first, again, other = draw(digits), draw(digits), draw(digits, seed=1)
        np.testing.assert_array_equal(first.x, again.x)
        assert not np.array_equal(first.x, other.x)

    def test_small_data_are_taken_whole_and_in_order(self, digits):
        x, y = digits[0][:300], digits[1][:300]
        sample = draw((x, y))
        np.testing.assert_array_equal(sample.x, x)
        np.testing.assert_array_equal(sample.class_ids, y)

    @pytest.mark.parametrize("sort", [False, True])
    @pytest.mark.parametrize("batch", [7, 64, 1797])
    def test_batching_does_not_matter(self, digits, batch, sort):
        order = np.argsort(digits[1], kind="stable") if sort else slice(None)
        x, y = digits[0][order], digits[1][order]
        expected = draw((x, y), 60)
        dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(batch)
        sample = draw(dataset, 60)
        np.testing.assert_array_equal(sample.x, expected.x)
        np.testing.assert_array_equal(sample.class_ids, expected.class_ids)

    def test_kinds_of_data(self, digits):
        x, y = digits
        expected = draw((x, y))

        class Batches(keras.utils.PyDataset):
            def __len__(self):
                return 18

            def __getitem__(self, i):
                return x[100 * i : 100 * (i + 1)], y[100 * i : 100 * (i + 1)]

        for data in (
            [x, y],
            (keras.ops.convert_to_tensor(x), keras.ops.convert_to_tensor(y)),
            (x, np.eye(10)[y]),
            Batches(),
            ((x[i : i + 100], y[i : i + 100]) for i in range(0, len(x), 100)),
            tf.data.Dataset.from_tensor_slices((x, y)).batch(100).prefetch(1),
        ):
            sample = draw(data)
            np.testing.assert_array_equal(sample.x, expected.x)
            np.testing.assert_array_equal(sample.class_ids, expected.class_ids)

    def test_rows_keep_labels_weights_and_positions(self, digits):
        x, y = digits
        labels, weight = np.eye(10, dtype="float32")[y], np.arange(1.0, len(y) + 1)
        data = tf.data.Dataset.from_tensor_slices((x, labels, weight)).batch(100)
        rows = sampling.draw_rows(data, make_model(), 300, seed=0)
        assert np.all(np.diff(rows.positions) > 0)
        np.testing.assert_array_equal(rows.x, x[rows.positions])
        np.testing.assert_array_equal(rows.y, labels[rows.positions])
        np.testing.assert_array_equal(rows.sample_weight, weight[rows.positions])
        np.testing.assert_array_equal(rows.class_ids, y[rows.positions])
        assert rows.batch_sizes == [100] * 17 + [97]

    @pytest.mark.parametrize("loss", ["mse", "binary_crossentropy"])
    @pytest.mark.parametrize("batch", [7, 1797])
    def test_batching_does_not_matter_without_classes(self, digits, loss, batch):
        x = digits[0]
        labels = x[:, 20:21] + x[:, 30:31] if loss == "mse" else x[:, 20:24] > 0.5
        model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(1)])
        if loss != "mse":
            model.add(keras.layers.Dense(4, activation="sigmoid"))
        model.compile("sgd", loss)
        expected = sampling.draw_sample((x, labels), model, 60)
        assert len(expected.class_ids) == 60
        dataset = tf.data.Dataset.from_tensor_slices((x, labels)).batch(batch)
        sample = sampling.draw_sample(dataset, model, 60)
        np.testing.assert_array_equal(sample.x, expected.x)
        np.testing.assert_array_equal(sample.class_ids, expected.class_ids)

    @pytest.mark.parametrize("classes", [3, 20_000])
    def test_memory_stays_bounded(self, classes):
        longest = 0

        def batches():
            rng = np.random.default_rng(0)
            for _ in range(200):
                yield np.zeros((100, 1)), rng.integers(0, classes, 100)

        class Watched(sampling._Pool):
            def add(self, *args):
                nonlocal longest
                super().add(*args)
                longest = max(longest, len(self))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sampling, "_Pool", Watched)
            sample = draw(batches(), 50, features=1, classes=classes)
        assert len(sample.class_ids) == 50
        assert longest <= 2 * 50 + 16 * 3 + 100

    @pytest.mark.parametrize("order", ["shuffled", "sorted", "in parts"])
    @pytest.mark.parametrize("classes", [64, 200, 1000])
    def test_the_number_of_classes_takes_no_memory(self, classes, order):
        """And the sample is that of arrays, of which all rows are there at the end."""
        rng = np.random.default_rng(0)
        y = rng.choice(classes, 40_000, p=rng.dirichlet(np.full(classes, 5.0)))
        if order == "sorted":
            y = np.sort(y)
        elif order == "in parts":  # Of a few classes each, which come again.
            y = np.concatenate(
                [rng.choice(y, (20, 1))[rng.integers(0, 20, 500), 0] for _ in range(80)]
            )
        x, longest = np.arange(len(y), dtype="float32")[:, None], 0

        class Watched(sampling._Pool):
            def add(self, *args):
                nonlocal longest
                super().add(*args)
                longest = max(longest, len(self))

        model = make_model(1, classes)
        whole = sampling.draw_sample((x, y), model, 2048)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sampling, "_Pool", Watched)
            batches = ((x[i : i + 100], y[i : i + 100]) for i in range(0, len(y), 100))
            sample = sampling.draw_sample(batches, model, 2048)
        np.testing.assert_array_equal(sample.x, whole.x)
        assert longest <= 3 * 2048 + 100

    def test_memory_is_that_of_two_samples(self):
        def batches():
            rng = np.random.default_rng(0)
            for _ in range(400):
                yield rng.random((50, 1000), "float32"), rng.integers(0, 3, 50)

        model = make_model(features=1000, classes=3)
        tracemalloc.start()
        try:
            sample = sampling.draw_sample(batches(), model, 1000)
            assert tracemalloc.get_traced_memory()[1] < 2.6 * sample.x.nbytes
        finally:
            tracemalloc.stop()

    @pytest.mark.parametrize("loss", ["poisson", "mse", lambda y, p: y - p])
    def test_counts_that_begin_with_0_and_1(self, loss):
        """What labels are is said by all of them, and not by the first batch."""
        rng = np.random.default_rng(0)
        x, y = rng.normal(size=(3000, 4)).astype("float32"), rng.poisson(0.5, 3000)
        y[:100] = y[:100] > 0
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        model.compile("sgd", loss)
        for size in (300, 5000):
            (whole,) = sampling.draw_sample((x, y), model, size).labels
            data = tf.data.Dataset.from_tensor_slices((x, y)).batch(100)
            (found,) = sampling.draw_sample(data, model, size).labels
            assert found.target.kind == whole.target.kind == "continuous"
            counts = [np.bincount(one.class_ids[:, 0]) for one in (found, whole)]
            np.testing.assert_allclose(*counts, atol=2)
        binary = tf.data.Dataset.from_tensor_slices((x, y > 0)).batch(100)
        found = sampling.draw_sample(binary, model, 300)
        whole = sampling.draw_sample((x, y > 0), model, 300)
        assert found.labels[0].target.kind == "binary"
        np.testing.assert_array_equal(found.x, whole.x)
        share = np.mean(found.class_ids)
        assert share == pytest.approx(np.mean(y > 0), abs=1 / 300)

    def test_random_numbers_are_left_to_the_training(self, digits):
        """Of data that are augmented; but a model that is built draws its weights."""
        x, y = digits

        class Augmented(keras.utils.PyDataset):
            def __len__(self):
                return 10

            def __getitem__(self, i):
                rows = slice(100 * i, 100 * (i + 1))
                noise = np.random.normal(size=(100, 1)) + np.random.normal()  # noqa: NPY002
                return x[rows] + noise.astype("float32"), y[rows]

        drawn = []
        for read in (False, True):
            keras.utils.set_random_seed(0)
            model = keras.Sequential([keras.layers.Dense(10, activation="softmax")])
            model.compile("sgd", "sparse_categorical_crossentropy")
            if read:
                sample = sampling.draw_sample(Augmented(), model, 1000)
            drawn.append(np.random.normal())  # noqa: NPY002
        assert drawn[0] == drawn[1]
        # Each batch has noise of its own.
        noise = np.mean(sample.x - x[:1000], axis=1).reshape(10, 100)
        assert len(np.unique(np.round(noise.mean(axis=1), 5))) == 10


class TestBadData:
    x, y = np.zeros((20, 1), "float32"), np.arange(20) % 2

    def raises(self, data, message, size=10):
        with pytest.raises(ValueError, match=f"(?s){message}"):
            draw(data, size, features=1, classes=2)

    def test_lengths(self):
        self.raises((self.x, self.y[:-1]), r"same length.*\(20, 1\).*\(19,\)")
        self.raises((self.x, self.y, np.ones(19)), "same length")

    def test_empty(self):
        self.raises((self.x[:0], self.y[:0]), "`probe_data` is empty")
        self.raises(iter(()), "`probe_data` is empty")

    def test_labels_beyond_the_outputs(self):
        self.raises((self.x, self.y + 1), r"whole numbers in \[0, 2\)")
        self.raises((self.x, self.y - 1), r"whole numbers in \[0, 2\).*-1")

    def test_a_single_class(self):
        self.raises((self.x, np.ones(20)), "at least two classes.*class 1 only")

    def test_inputs_that_are_not_finite(self):
        for bad in (np.nan, np.inf):
            x = self.x.copy()
            x[3] = bad
            self.raises((x, self.y), r"must be finite.*1 NaN or infinite")

    def test_too_small_for_the_classes(self):
        self.raises((self.x, self.y), "at least 2 for each class.*probe_size=3", 3)

    def test_ragged(self):
        batches = [(np.zeros((4, n)), np.arange(4) % 2) for n in (1, 2)]
        self.raises(iter(batches), "must have the same shapes.*pad them")
        self.raises(batches, "must hold arrays")

    def test_unbatched_dataset(self):
        dataset = tf.data.Dataset.from_tensor_slices((self.x, self.y))
        self.raises(dataset, "must come in batches")

    def test_labels_that_do_not_count_may_be_anything(self):
        """Rows of zeros, for which Keras' cross-entropy is 0."""
        labels = np.eye(2)[self.y]
        labels[::5] = 0
        weight = labels.sum(axis=1, keepdims=True)
        model = make_model(self.x.shape[1], 2)
        model.compile("sgd", "categorical_crossentropy")
        sample = sampling.draw_sample((self.x, labels, weight), model, 20)
        counted = sample.labels[0].sample_weight > 0
        np.testing.assert_array_equal(counted, weight[:, 0] > 0)
        with pytest.raises(ValueError, match="must be one-hot"):
            sampling.draw_sample((self.x, labels), model, 20)

    def test_weights(self):
        self.raises((self.x, self.y, -np.ones(20)), "weights.*finite and not negative")
        self.raises((self.x, self.y, np.ones((20, 2))), r"weights.*shape \(n,\)")
        self.raises((self.x, self.y, np.full(20, "w")), "weights.*finite")
        self.raises((self.x, self.y, np.zeros(20)), "above 0 in at least two classes")
        self.raises((self.x, self.y, self.y), "above 0 in at least two classes")
