"""Which layers can be read, and what is recorded of them."""

import re

import keras
import numpy as np
import pytest

from keras_milr import LayerwiseOptimizer, backend, layers

K = keras.layers


def sequential(*of, shape=(8,), name="m"):
    return keras.Sequential([keras.Input(shape), *of], name=name)


def plain():
    return sequential(
        K.Dense(4, name="a"), K.ReLU(name="relu"), K.Dense(4, name="b"), K.Dense(2)
    )


def names_of(model, chosen="all"):
    return [group.name for group in layers.choose(model, chosen)]


def read_of(model, chosen="all"):
    """The names of the layers that are read, for each group."""
    return {g.name: [x.name for x in g.layers] for g in layers.choose(model, chosen)}


class Block(K.Layer):
    """Weights of its own, and a layer inside."""

    def __init__(self, units, **arguments):
        super().__init__(**arguments)
        self.inner = K.Dense(units, name="inner")

    def build(self, shape):
        self.inner.build(shape)
        self.scale = self.add_weight(shape=(1,), initializer="ones", name="scale")

    def call(self, x):
        return self.inner(x) * self.scale


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__(name="sub")
        self.blocks = [Block(8, name="first"), Block(8, name="second")]
        self.head = K.Dense(3, name="head")
        self.unused = K.Dense(3, name="unused")

    def build(self, shape):
        for layer in (*self.blocks, self.head, self.unused):
            layer.build(shape)

    def call(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def subclassed():
    model = Subclassed()
    model.build((None, 8))
    return model


def nested():
    encoder = sequential(K.Dense(4, name="a"), K.Dense(4, name="b"), name="encoder")
    return sequential(encoder, K.Dense(2, name="head"))


def functional(*of, shape=(8,), name=None):
    """A functional model, whose layers are built before it is put into another."""
    inputs = x = keras.Input(shape)
    for layer in of:
        x = layer(x)
    return keras.Model(inputs, x, name=name)


class TestChooseAll:
    def test_sequential(self):
        model = plain()
        groups = layers.choose(model, "all")
        assert [g.name for g in groups[:2]] == ["a", "b"]
        assert [g.layers for g in groups] == [
            [model.layers[0]],
            [model.layers[2]],
            [model.layers[3]],
        ]
        for group in groups:
            assert group.variables == group.layers[0].trainable_variables

    def test_functional(self):
        x = keras.Input((8,))
        left, right = K.Dense(4, name="left")(x), K.Dense(4, name="right")(x)
        outputs = K.Dense(2, name="top")(K.Add()([left, right]))
        assert names_of(keras.Model(x, outputs)) == ["left", "right", "top"]

    def test_nested_models_down_to_their_leaves(self):
        assert names_of(nested()) == ["a", "b", "head"]

    def test_names_that_occur_twice_are_told_apart(self):
        first, second = (
            sequential(K.Dense(8, name="dense"), name=n) for n in ("one", "two")
        )
        assert names_of(sequential(first, second)) == ["one/dense", "two/dense"]

    def test_layers_inside_and_weights_of_their_own(self):
        """A block's own weights are a group; its output is the block's."""
        groups = {g.name: g for g in layers.choose(subclassed(), "all")}
        assert list(groups)[:2] == ["first/inner", "first"]
        assert [v.name for v in groups["first"].variables] == ["scale"]
        assert len(groups["first/inner"].variables) == 2

    def test_weights_of_the_model_itself(self):
        class Raw(keras.Model):
            def __init__(self):
                super().__init__(name="raw")
                self.hidden = K.Dense(4, name="hidden")
                self.hidden.build((None, 8))
                self.w = self.add_weight(shape=(4, 3), name="w")

            def call(self, x):
                return keras.ops.matmul(self.hidden(x), self.w)

        model = Raw()
        groups = layers.choose(model, "all")
        assert [g.layers[0] for g in groups] == [model.hidden, model]

    def test_a_shared_layer_is_there_once(self):
        shared = K.Dense(8, name="shared")
        assert names_of(sequential(shared, K.ReLU(), shared)) == ["shared"]

    def test_a_layer_shared_by_two_models_is_there_once(self):
        shared = K.Dense(8, name="shared")
        one, two = sequential(shared, name="one"), sequential(shared, name="two")
        assert len(names_of(sequential(one, two))) == 1

    @pytest.mark.parametrize(
        ("layer", "shape", "name"),
        [
            (K.LSTM(3, name="x"), (5, 4), "lstm_cell"),
            (K.RNN([K.GRUCell(3, name="p"), K.GRUCell(3, name="q")]), (5, 4), None),
            (K.Bidirectional(K.LSTM(3), name="x"), (5, 4), "x"),
            (K.TimeDistributed(K.Dense(3, name="y"), name="x"), (5, 4), "y"),
            (K.ConvLSTM1D(2, 2, name="x"), (3, 5, 4), "conv_lstm_cell"),
        ],
    )
    def test_layers_that_loop_are_read_as_one(self, layer, shape, name):
        model = sequential(layer, K.Flatten(), K.Dense(2, name="head"), shape=shape)
        group, head = layers.choose(model, "all")
        assert group.layers == [layer]
        assert len(group.variables) == len(layer.trainable_variables)
        assert head.name == "head"
        if name is not None:
            assert group.name == name

    def test_two_loops_of_one_name_are_told_apart(self):
        class Twice(keras.Model):
            def __init__(self):
                super().__init__()
                self.pair = [K.Bidirectional(K.GRU(2), name="x") for _ in range(2)]

            def call(self, x):
                return self.pair[0](x) + self.pair[1](x)

        model = Twice()
        model(np.zeros((2, 5, 4)))
        assert len(set(names_of(model))) == 2

    def test_attention_by_its_projections(self):
        x = keras.Input((5, 4))
        y = K.MultiHeadAttention(2, 3, name="attention")(x, x)
        model = keras.Model(x, K.Dense(2, name="head")(K.Flatten()(y)))
        expected = ["query", "key", "value", "attention_output", "head"]
        assert names_of(model) == expected
        assert names_of(model, "attention") == expected[:-1]

    def test_batch_normalization_and_embedding(self):
        model = sequential(
            K.Embedding(9, 4, name="e"), K.BatchNormalization(name="n"), shape=(5,)
        )
        assert names_of(model) == ["e", "n"]

    @pytest.mark.backends("tensorflow", reason="others have no SavedModel layer")
    def test_a_saved_model_is_one_layer_of_its_name(self, tmp_path):
        """The paths of its weights have nothing in common, nor the layer's name."""
        plain().export(tmp_path / "saved", verbose=False)
        layer = K.TFSMLayer(str(tmp_path / "saved"), name="backbone")
        inputs = keras.Input((8,))
        model = keras.Model(inputs, K.Dense(2, name="head")(layer(inputs)))
        assert len({v.path for v in layer.trainable_variables}) == 6
        assert names_of(model) == ["backbone", "head"]
        assert names_of(model, "backbone") == ["backbone"]
        assert layers.choose(model, "backbone")[0].variables == layer.trainable_weights

    def test_frozen_layers_are_left_out(self):
        model = nested()
        model.layers[0].trainable = False
        assert names_of(model) == ["head"]

    def test_a_tied_variable_belongs_to_the_first_layer(self):
        class Tied(K.Layer):
            def __init__(self, kernel, **arguments):
                super().__init__(**arguments)
                self.kernel = kernel

            def build(self, shape):
                self.bias = self.add_weight(shape=(8,), name="bias")

            def call(self, x):
                return keras.ops.matmul(x, self.kernel) + self.bias

        first = K.Dense(8, name="first")
        first.build((None, 8))
        model = sequential(first, Tied(first.kernel, name="tied"))
        groups = layers.choose(model, "all")
        assert [g.name for g in groups] == ["first", "tied"]
        assert [v.name for v in groups[1].variables] == ["bias"]

    def test_every_variable_is_in_one_group(self):
        for model in (plain(), nested(), subclassed()):
            found = [v for g in layers.choose(model, "all") for v in g.variables]
            expected = {id(v) for v in model.trainable_variables}
            assert len(found) == len(expected)
            assert {id(v) for v in found} == expected

    def test_nothing_to_train(self):
        assert layers.choose(sequential(K.ReLU()), "all") == []


class TestChooseSome:
    @pytest.mark.parametrize(
        ("chosen", "expected"),
        [
            ("a", ["a"]),
            ("encoder", ["a", "b"]),
            ("encoder/b", ["b"]),
            ("a|head", ["a", "head"]),
            (["head", "a"], ["a", "head"]),  # In the order of the model.
            (("a", "a"), ["a"]),
            (["encoder", "a"], ["a", "b"]),
        ],
    )
    def test_names_and_patterns(self, chosen, expected):
        assert names_of(nested(), chosen) == expected

    def test_groups(self):
        model = nested()
        groups = layers.choose(model, {"top": "head", "body": ["a", "b"]})
        assert [g.name for g in groups] == ["top", "body"]
        assert groups[1].layers == model.layers[0].layers
        assert groups[1].variables == model.layers[0].trainable_variables

    def test_groups_need_not_have_all_layers(self):
        assert read_of(nested(), {"x": "b"}) == {"x": ["b"]}

    def test_a_name_goes_before_a_pattern(self):
        found = read_of(nested(), {"top": "head", "rest": ".*"})
        assert found == {"top": ["head"], "rest": ["a", "b"]}

    @pytest.mark.parametrize(
        "chosen",
        [
            *(3, None, [], {}, (), b"a", {"a"}, [3], [["a"]], ["a", None]),
            *({1: "a"}, {"g": []}, {"g": 3}, {"g": ["a", 3]}, {None: "a"}),
        ],
    )
    def test_wrong_types(self, chosen):
        message = "Argument `layers` must be 'all', a name or regular expression"
        received = re.escape(f"Received: layers={chosen!r}")
        with pytest.raises(TypeError, match=f"{message}.*{received}"):
            layers.choose(nested(), chosen)

    @pytest.mark.parametrize(
        ("chosen", "message"),
        [
            ("c", "`layers` names no layer with 'c'.*are: a, b, head"),
            (["a", "c"], "`layers` names no layer with 'c'.*are: a, b, head"),
            ({"x": "a", "y": "all"}, "names no layer with 'all'.*are: a, b, head"),
            ("(", r"names or regular expressions. Received: '\('"),
            (
                {"x": "a", "y": ["b", "a"]},
                "in one group only. Received: 'a' in 'x' and 'y'",
            ),
            (
                {"x": "encoder", "y": "(a|head)"},
                r"to the layer 'a'. Received: \{'encoder': 'x', '\(a\|head\)': 'y'\}",
            ),
            (
                {"x": ["a", "b"], "y": "encoder"},
                "must have a layer in each group. Received: 'y'",
            ),
        ],
    )
    def test_wrong_values(self, chosen, message):
        with pytest.raises(ValueError, match=message):
            layers.choose(nested(), chosen)

    def test_layers_without_trainable_weights(self):
        message = "with trainable weights. Received: 'relu', which has none"
        for chosen in ("relu", ["a", "relu"], {"x": "relu"}):
            with pytest.raises(ValueError, match=message):
                layers.choose(plain(), chosen)
        model = nested()
        model.layers[0].trainable = False
        for name in ("a", "encoder"):
            with pytest.raises(ValueError, match=f"Received: '{name}', which has none"):
                layers.choose(model, name)


class TestNamesOfFunctionalModels:
    """They are not in the paths of the variables."""

    @pytest.mark.parametrize("outer", [functional, sequential])
    @pytest.mark.parametrize(
        ("chosen", "expected"),
        [
            ("backbone", ["a", "b", "c"]),
            ("inner", ["a", "b"]),
            ("backbone/inner", ["a", "b"]),
            ("backbone/inner/b", ["b"]),
            ("inner/.*|head", ["a", "b", "head"]),
            ("back.*", ["a", "b", "c"]),
            (["backbone", "head"], ["a", "b", "c", "head"]),
        ],
    )
    def test_nested_twice(self, outer, chosen, expected):
        inner = functional(K.Dense(8, name="a"), K.Dense(8, name="b"), name="inner")
        backbone = functional(inner, K.ReLU(), K.Dense(8, name="c"), name="backbone")
        model = outer(backbone, K.Dense(2, name="head"))
        assert names_of(model, chosen) == expected
        assert names_of(model) == ["a", "b", "c", "head"]  # As the optimizer's.

    def test_a_backbone_of_keras_in_groups(self):
        backbone = keras.applications.MobileNetV2(
            input_shape=(32, 32, 3), include_top=False, weights=None, pooling="avg"
        )
        model = sequential(backbone, K.Dense(2, name="head"), shape=(32, 32, 3))
        rest, stem, head = layers.choose(
            model, {"rest": backbone.name, "stem": "Conv1", "head": "head"}
        )
        assert [rest.name, stem.name, head.name] == ["rest", "stem", "head"]
        assert len(rest.variables) == len(backbone.trainable_variables) - 1
        assert stem.layers == [backbone.get_layer("Conv1")]
        assert head.layers == [model.layers[-1]]
        optimizer = LayerwiseOptimizer("sgd", {".*": 0.1, "head": 1})
        optimizer.build(model.trainable_variables)
        *slow, fast = optimizer.multipliers.values()
        np.testing.assert_allclose(slow, 0.1, rtol=1e-6)
        assert fast == 1
        chosen = names_of(model, [backbone.name, "head"])
        assert chosen == list(optimizer.multipliers)

    def test_of_a_layer_inside_too(self):
        """As where the paths have both: just the layer's where others are named."""
        inside = functional(K.Dense(8, name="x"), K.Dense(8, name="y"), name="x")
        model = functional(inside, K.Dense(2, name="head"))
        assert names_of(model, "x") == ["x", "y"]
        assert read_of(model, {"p": "x", "q": "y"}) == {"p": ["x"], "q": ["y"]}

    def test_of_two_with_layers_of_the_same_name(self):
        one, two = (functional(K.Dense(8, name="d"), name=n) for n in ("one", "two"))
        model = functional(one, two)
        assert names_of(model) == ["d", "d#2"]
        assert names_of(model, "d") == ["d"]
        assert names_of(model, "two") == names_of(model, "two/d") == ["d#2"]
        assert read_of(model, {"x": "one", "y": "two"}) == {"x": ["d"], "y": ["d"]}

    def test_used_twice_and_a_shared_layer(self):
        shared = K.Dense(8, name="shared")
        one = functional(shared, K.Dense(8, name="a"), name="one")
        two = functional(shared, K.Dense(8, name="b"), name="two")
        model = functional(one, two, one)
        assert names_of(model, "one") == ["shared", "a"]
        assert names_of(model, "two") == ["shared", "b"]

    def test_around_layers_that_were_built_before(self):
        class Around(K.Layer):
            def __init__(self, net, **arguments):
                super().__init__(**arguments)
                self.net = net

            def call(self, x):
                return self.net(x)

        net = functional(K.Dense(8, name="a"), K.Dense(8, name="b"))
        model = functional(Around(net, name="block"), K.Dense(2, name="head"))
        assert names_of(model, "block") == ["a", "b"]

    def test_frozen(self):
        model = functional(
            functional(K.Dense(8), name="backbone"), K.Dense(2, name="head")
        )
        model.get_layer("backbone").trainable = False
        with pytest.raises(ValueError, match="Received: 'backbone', which has none"):
            layers.choose(model, ["backbone", "head"])


def record(model, x, chosen="all", call=None):
    groups = layers.choose(model, chosen)
    with layers.recorded(groups) as outputs:
        (model if call is None else call)(x)
        return [list(map(keras.ops.convert_to_numpy, t)) for t in outputs(len(x))]


def assert_equal(found, expected, atol=0.0):
    found, expected = map(keras.ops.convert_to_numpy, (found, expected))
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


def assert_untouched(model):
    for layer in [model, *model._flatten_layers()]:
        assert "call" not in layer.__dict__


class TestRecorded:
    @pytest.mark.parametrize("compiled", [False, True])
    def test_equals_the_outputs_of_a_functional_model(self, compiled):
        """Images, sequences and vectors."""
        model = sequential(
            K.Conv2D(3, 3, name="conv"),
            K.BatchNormalization(name="norm"),
            K.Reshape((6, 18)),
            K.GRU(4, return_sequences=True, name="gru"),
            K.Flatten(),
            K.Dense(2, name="dense"),
            shape=(8, 8, 1),
        )
        x = np.random.default_rng(0).normal(size=(7, 8, 8, 1)).astype("float32")
        if compiled:
            groups = layers.choose(model, "all")

            @backend.jit
            def run(x):
                with layers.recorded(groups) as outputs:
                    model(x)
                    return outputs(7)

            found = run(keras.ops.convert_to_tensor(x))
        else:
            found = record(model, x)
        shapes = [tuple(of_one[0].shape) for of_one in found]
        assert shapes == [(7, 6, 6, 3), (7, 6, 6, 3), (7, 6, 4), (7, 2)]
        for name, of_one in zip(("conv", "norm", "gru", "dense"), found, strict=True):
            output = model.get_layer(name).output
            expected = keras.Model(model.inputs[0], output)(x)
            (tensor,) = of_one
            assert_equal(tensor, expected, atol=1e-6)
        assert_untouched(model)

    def test_nested_and_subclassed_models(self):
        model, x = subclassed(), np.ones((3, 8), "float32")
        chosen = {"first": "first", "inner": "second/inner", "head": "head"}
        first, inner, head = record(model, x, chosen)
        expected = model.blocks[0](x)  # The last that is called, of the group.
        assert_equal(first[0], expected)
        assert_equal(inner[0], model.blocks[1].inner(expected))
        assert_equal(head[0], model(x))
        model = nested()
        a, _, head = record(model, x)
        assert_equal(a[0], model.layers[0].layers[0](x))
        assert_equal(head[0], model(x))

    def test_all_calls_of_a_shared_layer(self):
        shared = K.Dense(8, name="shared")
        x = np.random.default_rng(0).normal(size=(3, 8)).astype("float32")
        (found,) = record(sequential(shared, K.ReLU(), shared), x)
        once = shared(x)
        assert_equal(found[0], once, atol=1e-6)
        assert_equal(found[1], shared(keras.ops.relu(once)), atol=1e-6)

    def test_the_last_called_of_a_group_and_all_its_calls(self):
        one, two = K.Dense(8, name="one"), K.Dense(8, name="two")
        x = np.ones((3, 8), "float32")
        model = sequential(two, one, two, K.ReLU())
        (found,) = record(model, x, {"g": ["one", "two"]})
        assert len(found) == 2
        assert_equal(found[0], two(x), atol=1e-6)
        assert_equal(found[1], two(one(two(x))), atol=1e-6)

    def test_what_is_no_activation_is_left_out(self):
        """Of several outputs those that hold numbers for each sample are read."""

        class Several(K.Layer):
            def build(self, shape):
                self.w = self.add_weight(shape=(1,), initializer="ones")

            def call(self, x):
                return {
                    "x": x * self.w,
                    "none": None,
                    "ids": keras.ops.argmax(x, axis=-1),
                    "loss": keras.ops.sum(x),
                    "table": keras.ops.ones((20, 2)),
                    "norm": keras.ops.norm(x, axis=-1),
                }

        layer = Several(name="several")

        class Model(keras.Model):
            def __init__(self):
                super().__init__()
                self.several = layer

            def call(self, x):
                return self.several(x)["x"]

        model, x = Model(), np.ones((3, 8), "float32")
        model(x)
        (found,) = record(model, x)
        assert sorted(t.shape for t in found) == [(3,), (3, 8)]

    def test_states_of_a_recurrent_layer_are_read_with_it(self):
        x = keras.Input((5, 4))
        y, state = K.GRU(3, return_sequences=True, return_state=True)(x)
        model = keras.Model(x, K.Concatenate()([K.Flatten()(y), state]))
        (found,) = record(model, np.ones((2, 5, 4), "float32"))
        assert [t.shape for t in found] == [(2, 5, 3), (2, 3)]

    @pytest.mark.parametrize("layer", [K.LSTM(3), K.Bidirectional(K.GRU(3))])
    def test_recurrent_layers_in_a_graph(self, layer):
        model = sequential(K.Masking(), layer, shape=(5, 4))
        groups, x = layers.choose(model, "all"), keras.ops.ones((2, 5, 4))

        @backend.jit
        def run(x):
            with layers.recorded(groups) as outputs:
                return model(x), outputs(2)

        expected, ((found,),) = run(x)
        assert_equal(found, expected)

    def test_calls_come_back_after_an_exception(self):
        model, x = subclassed(), np.ones((3, 8), "float32")

        def fail(x):
            model(x)
            assert "call" in model.head.__dict__
            raise RuntimeError("stop")

        with pytest.raises(RuntimeError, match="stop"):
            record(model, x, call=fail)
        assert_untouched(model)

    def test_a_call_of_the_instance_itself_comes_back(self):
        model, x = plain(), np.ones((3, 8), "float32")
        layer = model.layers[0]
        original = layer.call

        def twice(inputs):
            return 2 * original(inputs)

        layer.call = twice
        expected = 2 * original(keras.ops.convert_to_tensor(x))
        for chosen in ("a", "all"):
            found = record(model, x, chosen)
            assert_equal(found[0][0], expected)
            assert layer.__dict__["call"] is twice

    def test_a_layer_that_is_not_called(self):
        x = np.ones((3, 8), "float32")
        message = "not called by the model. Received: 'unused' in `layers`"
        with pytest.raises(ValueError, match=message):
            record(subclassed(), x)
        assert len(record(subclassed(), x, {"g": ["head", "unused"]})) == 1

    def test_a_layer_without_a_number_for_each_sample(self):
        """Positions, as a transformer adds them: the same for all samples."""

        class Positions(keras.Model):
            def __init__(self):
                super().__init__()
                self.tokens = K.Embedding(9, 4, name="tokens")
                self.positions = K.Embedding(5, 4, name="positions")

            def call(self, x):
                return self.tokens(x) + self.positions(keras.ops.arange(5))

        model, x = Positions(), np.zeros((3, 5), "int32")
        model(x)
        message = (
            "The layer 'positions' cannot be read: it puts out no numbers for each "
            "sample.*Received: 'positions' in `layers`"
        )
        with pytest.raises(ValueError, match=message):
            record(model, x)
        ((tokens,),) = record(model, x, "tokens")
        assert tokens.shape == (3, 5, 4)

    def test_a_layer_that_puts_out_integers(self):
        class Buckets(K.Layer):
            def build(self, shape):
                self.edge = self.add_weight(shape=(1,))

            def call(self, x):
                return keras.ops.cast(x > self.edge, "int32")

        model = sequential(Buckets(name="buckets"))
        with pytest.raises(ValueError, match="'buckets' cannot be read"):
            record(model, np.ones((3, 8), "float32"))

    @pytest.mark.backends("tensorflow", "jax", reason="PyTorch's loops are Python's")
    def test_a_layer_in_a_loop_of_a_graph(self):
        class Loop(K.Layer):
            def __init__(self):
                super().__init__(name="loop")
                self.step = K.Dense(8, name="step")
                self.scale = self.add_weight(shape=(1,), name="scale")

            def build(self, shape):
                self.step.build(shape)

            def call(self, x):
                count = keras.ops.convert_to_tensor(0)
                return keras.ops.while_loop(
                    lambda i, x: i < 3, lambda i, x: (i + 1, self.step(x)), (count, x)
                )[1]

        model = sequential(Loop())

        def run(chosen):
            groups = layers.choose(model, chosen)

            @backend.jit
            def run(x):
                with layers.recorded(groups) as outputs:
                    return model(x), outputs(3)

            return run(keras.ops.ones((3, 8)))

        message = (
            "'step' cannot be read: .* inside a loop.*Received: 'step' in `layers`"
        )
        with pytest.raises(ValueError, match=message):
            run("step")
        assert_untouched(model)
        expected, ((found,),) = run({"loop": "loop"})  # With the layer around it.
        assert_equal(found, expected)

    @pytest.mark.backends("tensorflow", "jax", reason="PyTorch does not trace")
    def test_a_function_inside_a_model_that_runs_eagerly(self):
        class Traced(keras.Model):
            def __init__(self):
                super().__init__()
                self.inner = K.Dense(3, name="inner")
                self.run = backend.jit(self.inner)

            def call(self, x):
                return self.run(x)

        model = Traced()
        model.inner.build((None, 8))
        with pytest.raises(ValueError, match="'inner' cannot be read"):
            record(model, np.ones((3, 8), "float32"))
