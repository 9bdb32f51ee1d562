"""Checks of constructor arguments, with errors as Keras writes them."""

import contextlib
import math
import numbers

import keras
import numpy as np

LARGEST_SEED = 2**32 - 1  # of Keras
LARGEST = float(np.finfo("float32").max)  # of what becomes a float32: a rate, say


def check_number(
    name, value, above=None, at_least=None, below=None, at_most=None, or_else=None
):
    """Refuses what is not a finite real number within the limits.

    Args:
        name: Name of the argument.
        value: What was received.
        above: Lower limit that is outside itself; `None` for none, as of all limits.
        at_least: Lower limit.
        below: Upper limit that is outside itself.
        at_most: Upper limit.
        or_else: Names what else would serve, for the message.

    Raises:
        TypeError: for what is not a number.
        ValueError: for a number outside the limits, NaN or infinite.
    """
    limits = {"above": above, "at least": at_least, "below": below, "at most": at_most}
    limits = [f"{word} {limit}" for word, limit in limits.items() if limit is not None]
    expected = ", ".join(["a finite number", *limits])
    if or_else is not None:
        expected += f", or {or_else}"
    fraction = isinstance(value, numbers.Rational) and not isinstance(
        value, numbers.Integral
    )
    # Neither arrays nor files know fractions.
    if isinstance(value, bool) or fraction or not isinstance(value, numbers.Real):
        raise TypeError(_message(name, expected, value))
    try:
        value = float(value)
    except OverflowError:
        value = math.inf
    inside = (
        math.isfinite(value)
        and (above is None or value > above)
        and (at_least is None or value >= at_least)
        and (below is None or value < below)
        and (at_most is None or value <= at_most)
    )
    if not inside:
        raise ValueError(_message(name, expected, value))


def check_integer(name, value, at_least, at_most=None, or_else=None):
    """Refuses what is not an integer within limits; `or_else` names what else serves.

    Raises:
        TypeError: for what is neither a number nor text.
        ValueError: for text, fractions, and integers outside of the limits.
    """
    expected = f"an integer, at least {at_least}"
    if at_most is not None:
        expected += f", at most {at_most}"
    if or_else is not None:
        expected += f", or {or_else}"
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, str)):
        raise TypeError(_message(name, expected, value))
    inside = isinstance(value, numbers.Integral) and value >= at_least
    if not inside or (at_most is not None and value > at_most):
        raise ValueError(_message(name, expected, value))


def check_bool(name, value):
    """Refuses what is not True or False, with a TypeError."""
    if not isinstance(value, bool):
        raise TypeError(_message(name, "True or False", value))


def check_verbose(value):
    """Refuses what is no level of messages, with a TypeError."""
    if not isinstance(value, (int, np.integer)):
        raise TypeError(_message("verbose", "0 or 1", value))


def as_array(name, value):
    """An array or tensor of real numbers, as it is; anything else as an array.

    Raises:
        ValueError: for what has no real numbers in it.
    """
    if not keras.ops.is_tensor(value):
        try:
            value = np.asarray(value)
        except ValueError:  # A ragged list.
            value = np.asarray(None)
    try:
        dtype = keras.backend.standardize_dtype(value.dtype)
    except ValueError:
        dtype = str(value.dtype)
    if not dtype.startswith(("bool", "int", "uint", "float", "bfloat")):
        raise ValueError(
            f"Argument `{name}` must be an array of real numbers. "
            f"Received: {name} of dtype {dtype}"
        )
    return value


@contextlib.contextmanager
def naming(name):
    """Errors that name no argument name the one that the values came by."""
    try:
        yield
    except ValueError as error:
        if str(error).startswith("Argument"):
            raise
        raise ValueError(f"Argument `{name}`: {error}") from error


def _message(name, expected, value):
    return (
        f"Argument `{name}` must be {expected}. "
        f"Received: {name}={value!r} of type {type(value).__name__}"
    )
