import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_milr.readouts import features
from tests import reference


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def pooled(x, cells):
    return keras.ops.convert_to_numpy(features.pooled(x, cells))


def sketched(x, size, seed):
    return keras.ops.convert_to_numpy(features.sketched(x, size, seed))


class TestPooled:
    @pytest.mark.parametrize("size", [4, 8, 28, 5, 7, 9, 14, 33])
    def test_images_in_cells(self, size):
        x = normal(3, size, 2 * size + 1, 2)
        expected = reference.averaged(reference.averaged(x, 1, 4), 2, 4)
        found = pooled(x, 4)
        assert found.shape == (3, 4 * 4 * 2)
        np.testing.assert_allclose(found, expected.reshape(3, -1), atol=1e-6)

    def test_cells_that_divide_are_block_means(self):
        x = normal(5, 8, 12, 3)
        blocks = x.reshape(5, 4, 2, 4, 3, 3).mean(axis=(2, 4))
        np.testing.assert_allclose(pooled(x, 4), blocks.reshape(5, -1), atol=1e-6)

    def test_short_axes_stay(self):
        x = normal(5, 3, 2, 6)
        np.testing.assert_array_equal(pooled(x, 4), x.reshape(5, -1))

    def test_one_cell_is_the_mean(self):
        x = normal(5, 7, 6, 3)
        np.testing.assert_allclose(pooled(x, 1), x.mean(axis=(1, 2)), atol=1e-6)

    def test_sequences(self):
        x = normal(5, 10, 3)
        expected = reference.averaged(x, 1, 4).reshape(5, -1)
        np.testing.assert_allclose(pooled(x, 4), expected, atol=1e-6)

    def test_volumes(self):
        x = normal(2, 5, 6, 9, 2)
        expected = x
        for axis in (1, 2, 3):
            expected = reference.averaged(expected, axis, 4)
        np.testing.assert_allclose(pooled(x, 4), expected.reshape(2, -1), atol=1e-6)

    @pytest.mark.parametrize("shape", [(6,), (6, 1), (6, 5)])
    def test_vectors_stay(self, shape):
        x = normal(*shape)
        np.testing.assert_array_equal(pooled(x, 4), x.reshape(6, -1))

    @pytest.mark.backends("tensorflow", reason="others know all shapes")
    @pytest.mark.parametrize("size", [8, 10])  # Cells divide it, or do not.
    def test_unknown_axes_of_a_graph(self, size):
        x = [normal(5, length, size, 3) for length in (3, 11)]
        for swap in (False, True):
            shape = (None, size, None, 3) if swap else (None, None, size, 3)
            signature = [tf.TensorSpec(shape, tf.float32)]
            compiled = tf.function(lambda x: features.pooled(x, 4), signature)
            assert compiled.get_concrete_function().output_shapes == (None, 12)
            for one in x:
                expected = reference.averaged(one.mean(axis=1), 1, 4).reshape(5, -1)
                found = compiled(one.swapaxes(1, 2) if swap else one)
                np.testing.assert_allclose(found, expected, atol=1e-6)

    def test_lists_end_side_by_side(self):
        image, vector, single = normal(5, 8, 8, 2), normal(5, 3), normal(5)
        found = pooled([image, vector, single], 4)
        expected = reference.averaged(reference.averaged(image, 1, 4), 2, 4)
        expected = np.c_[expected.reshape(5, -1), vector, single]
        np.testing.assert_allclose(found, expected, atol=1e-6)

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "int32"])
    @pytest.mark.filterwarnings("ignore:Explicitly requested dtype float64")  # JAX
    def test_sums_are_float32(self, dtype):
        # Their sum, 1.6 million, is beyond float16, and bfloat16 cannot add 1 to 256.
        x = keras.ops.cast(np.full((2, 64, 64, 1), 400), dtype)
        found = pooled(x, 4)
        assert keras.backend.standardize_dtype(found.dtype) == "float32"
        np.testing.assert_array_equal(found, np.full((2, 16), 400.0, "float32"))

    def test_numbers_are_refused(self):
        with pytest.raises(ValueError, match=r"`activations` must be an array"):
            pooled(3.0, 4)


class TestSketched:
    @pytest.mark.parametrize("width", [1, 31, 32, 64])
    def test_up_to_twice_the_size_stays(self, width):
        x = normal(5, width)
        np.testing.assert_array_equal(sketched(x, 32, 0), x)

    @pytest.mark.parametrize("width", [65, 100, 640, 1001])
    def test_every_feature_enters_one_sum(self, width):
        matrix = sketched(np.eye(width, dtype="float32"), 32, 0)
        assert matrix.shape == (width, 32)
        assert set(np.unique(matrix)) == {-1, 0, 1}
        np.testing.assert_array_equal(np.abs(matrix).sum(axis=1), 1)
        assert np.abs(matrix).sum(axis=0).max() <= -(-width // 32)

    def test_is_linear_for_every_batch_alike(self):
        x = normal(7, 200)
        matrix = sketched(np.eye(200, dtype="float32"), 32, 0)
        np.testing.assert_allclose(sketched(x, 32, 0), x @ matrix, atol=1e-5)

    def test_keeps_inner_products_on_average(self):
        a, b = normal(2, 400)
        b = b + 0.5 * a
        products = []
        for seed in range(400):
            u, v = sketched(np.stack([a, b]), 64, seed)
            products.append(float(u @ v))
        spread = np.std(products)
        # The mean of 400 lies within four standard errors.
        assert np.mean(products) == pytest.approx(float(a @ b), abs=4 * spread / 20)
        assert spread < 0.5 * abs(a @ b)

    def test_seeds(self):
        x = normal(5, 200)
        first = sketched(x, 32, 0)
        np.testing.assert_array_equal(sketched(x, 32, 0), first)
        assert not np.allclose(sketched(x, 32, 1), first)
