"""Private names of Keras: what happens where one is missing."""

import ast
import importlib.util
import pathlib
import re
import subprocess
import sys

import keras
import pytest
from keras.src.backend.common import global_state, masking
from keras.src.random import seed_generator
from keras.src.saving import saving_lib
from keras.src.trainers import compile_utils

import keras_milr
from keras_milr import _keras


def look_up():
    """As when the package is imported, but into a module that nobody else has."""
    spec = importlib.util.spec_from_file_location("again", _keras.__file__)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def raises(name):
    version = re.escape(keras.__version__)
    return pytest.raises(
        ImportError, match=f"`{name}`.*Keras {version} does not.*Keras {_keras.TESTED}"
    )


def test_nothing_is_missing_here():
    look_up()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (global_state, "get_global_attribute"),
        (global_state, "set_global_attribute"),
        (masking, "get_keras_mask"),
        (saving_lib, "H5IOStore"),
        (compile_utils, "CompileLoss"),
        (seed_generator, "global_seed_generator"),
    ],
)
def test_a_function_or_class_that_is_missing(module, name, monkeypatch):
    monkeypatch.delattr(module, name)
    with raises(f"{module.__name__}.{name}"):
        look_up()


def test_a_module_that_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "keras.src.saving.keras_saveable", None)
    with raises("keras.src.saving.keras_saveable.KerasSaveable"):
        look_up()


METHODS = [(cls, name) for cls, names in _keras._METHODS.items() for name in names]
ATTRIBUTES = [
    (cls, name) for cls, names in _keras._ATTRIBUTES.items() for name in names
]


@pytest.mark.parametrize(("cls", "name"), METHODS)
def test_a_method_that_is_missing(cls, name, monkeypatch):
    for one in cls.__mro__:
        if name in vars(one):
            monkeypatch.delattr(one, name)
    with raises(f"{cls.__module__}.{cls.__name__}.{name}"):
        look_up()


@pytest.mark.parametrize(("cls", "name"), ATTRIBUTES)
def test_an_attribute_that_has_another_name(cls, name, monkeypatch):
    """In all of the code of the class, as by a release that renames it."""
    for one in cls.__mro__:
        for function in map(unwrapped, vars(one).values()):
            code = getattr(function, "__code__", None)
            if code is not None and name in code.co_names:
                others = tuple(n if n != name else "renamed" for n in code.co_names)
                monkeypatch.setattr(function, "__code__", code.replace(co_names=others))
    with raises(f"{cls.__module__}.{cls.__name__}.{name}"):
        look_up()


def unwrapped(value):
    while hasattr(value, "__wrapped__"):
        value = value.__wrapped__
    return value


def test_the_seed_generator_that_has_another_name(monkeypatch):
    if hasattr(seed_generator, "GLOBAL_SEED_GENERATOR"):
        monkeypatch.setattr(seed_generator, "GLOBAL_SEED_GENERATOR", "other")
    else:
        function = seed_generator.global_seed_generator
        code = function.__code__
        consts = tuple(
            "x" if c == _keras._SEED_GENERATOR else c for c in code.co_consts
        )
        monkeypatch.setattr(function, "__code__", code.replace(co_consts=consts))
    with raises("keras.src.random.seed_generator: 'global_seed_generator'"):
        look_up()


@pytest.mark.slow
def test_the_package_is_not_imported_without_it():
    script = (
        "import keras\n"
        "for cls in keras.optimizers.Optimizer.__mro__:\n"
        "    if '_get_current_learning_rate' in vars(cls):\n"
        "        delattr(cls, '_get_current_learning_rate')\n"
        "import keras_milr"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    last = run.stderr.strip().splitlines()[-1]
    assert run.returncode == 1
    assert last.startswith(f"ImportError: keras_milr {keras_milr.__version__} relies")
    assert "Optimizer._get_current_learning_rate`" in last
    assert f"Keras {keras.__version__} does not have" in last


def test_no_other_file_has_private_names_of_keras():
    """Private attributes are of the file that reads them, or of a NamedTuple."""
    package = pathlib.Path(keras_milr.__file__).parent
    found = {}
    for file in package.rglob("*.py"):
        text = file.read_text()
        read, own = set(), {"_replace", "_asdict", "_fields"}
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Attribute):
                (own if isinstance(node.ctx, ast.Store) else read).add(node.attr)
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                own.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                own.add(node.id)
        foreign = {name for name in read - own if re.match("_[a-z]", name)}
        if foreign or "keras.src" in text:
            found[file.relative_to(package).as_posix()] = foreign
    assert found.pop("_keras.py") > {"_flatten_layers", "_variables", "_weights_path"}
    assert found == {"backend/jax.py": {"_trace"}}  # Of JAX.
