import keras
import pytest

from keras_milr import names

PATHS = ["m/enc/dense", "m/enc/dense_1", "m/dec/dense", "m/head"]


class Owned:
    def __init__(self, path):
        self.path = path


def test_owners_in_the_order_of_their_variables():
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(3, name="a"),
            keras.layers.BatchNormalization(name="b"),
            keras.layers.Dense(2, use_bias=False, name="c"),
        ],
        name="m",
    )
    paths, owners = names.owner_paths(model.trainable_variables)
    assert names.short_names(paths) == ["a", "b", "c"]
    assert owners == [0, 0, 1, 1, 2]


def test_layers_of_one_path_are_told_apart():
    variables = [Owned(p) for p in ("d/kernel", "d/bias", "d/kernel", "d/bias", "w")]
    paths, owners = names.owner_paths(variables)
    assert paths == ["d", "d#2", "w"]
    assert owners == [0, 0, 1, 1, 2]


def test_a_bias_stays_with_its_kernel():
    """Where the first of two layers of one path has none."""
    variables = [Owned(p) for p in ("d/kernel", "d/kernel", "d/bias", "d/kernel")]
    paths, owners = names.owner_paths(variables)
    assert paths == ["d", "d#2", "d#3"]
    assert owners == [0, 1, 1, 2]


@pytest.mark.parametrize(
    ("paths", "shown"),
    [
        (PATHS, ["enc/dense", "dense_1", "dec/dense", "head"]),
        (["a/b", "x/a/b"], ["a/b", "x/a/b"]),  # The first is an end of the second.
        (["m/block", "m/block/dense"], ["block", "dense"]),
        (["alone"], ["alone"]),
        ([], []),
    ],
)
def test_short_names(paths, shown):
    assert names.short_names(paths) == shown


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("head", [3]),
        ("dense", [0, 2]),
        ("enc", [0, 1]),  # A block, and all below it.
        ("enc/dense", [0]),
        ("m", [0, 1, 2, 3]),
        ("m/enc/dense_1", [1]),
        ("dense.*", [0, 1, 2]),
        ("enc/.*", [0, 1]),
        ("enc|head", [0, 1, 3]),
        (r"dense_\d", [1]),
    ],
)
def test_what_a_pattern_means(pattern, found):
    values = names.resolve({pattern: 7}, PATHS, "multipliers")
    assert [i for i, value in enumerate(values) if value == 7] == found
    assert values.count(None) == len(PATHS) - len(found)


def test_names_with_special_characters():
    assert names.resolve({"conv+relu": 1}, ["m/conv+relu", "m/x"], "a") == [1, None]


@pytest.mark.parametrize("name", ["block(1", "*", "a[0", "\\"])
def test_a_name_need_not_be_a_regular_expression(name):
    assert names.resolve({name: 1}, [f"m/{name}", "m/x"], "a") == [1, None]


def test_the_shown_name_of_a_layer_goes_before_patterns():
    """So that what is shown can be handed back, for all layers at once."""
    paths = ["m/block", "m/block/dense", "m/head"]
    shown = dict(zip(names.short_names(paths), (1, 2, 3), strict=True))
    assert names.resolve(shown, paths, "multipliers") == [1, 2, 3]
    assert names.resolve({"block": 5}, paths, "multipliers") == [5, 5, None]
    assert names.resolve({".*": 0, "head": 1}, paths, "multipliers") == [0, 0, 1]


def test_patterns_that_agree():
    assert names.resolve({"enc": 2, ".*_1": 2}, PATHS, "a") == [2, 2, None, None]


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        (
            {"dens": 1},
            ValueError,
            "`multipliers` names no layer with 'dens'.*dec/dense",
        ),
        ({"Head": 1}, ValueError, "names no layer with 'Head'"),
        ({"": 1}, ValueError, "names no layer with ''"),
        (
            {"enc": 1, ".*_1": 2},
            ValueError,
            r"different values to the layer 'dense_1'.*\{'enc': 1, '\.\*_1': 2\}.*head",
        ),
        ({"(": 1}, ValueError, r"names or regular expressions. Received: '\('"),
        ({3: 1}, TypeError, "with strings. Received: 3 of type int"),
    ],
)
def test_bad_patterns(values, error, message):
    with pytest.raises(error, match=message):
        names.resolve(values, PATHS, "multipliers")
