"""The state of a training on disk, so that a run that was killed can be resumed.

It rides in the file that the weights are saved to, whoever saves them: one file cannot
hold the weights of one moment and the state of another. Without weights it is a JSON
file. Buffers of PyTorch's modules that Keras does not save ride with it.
"""

import contextlib
import json
import math
import os
import tempfile
import warnings
import zipfile
import zlib

import keras
import numpy as np

from keras_milr import _keras, backend
from keras_milr.rates import steps_made

_NAME = "_keras_milr"  # of the attribute of the model, and of the group in its file
_FORMAT = "keras_milr.state"
_VERSION = 4
_LARGEST = 2**28  # bytes of a state, which is far beyond any training's.
# What it consists of, and the types that JSON makes of it.
_INTEGERS = (
    "epoch",
    "first_epoch",
    "divided",
    "since_reading",
    "iterations",
    "trained",
)
_KINDS = dict.fromkeys(_INTEGERS, (int,))
_KINDS |= dict.fromkeys(("settings", "controller", "rates"), (dict,))
_KINDS |= dict.fromkeys(("lr_range", "table", "rollback"), (dict, type(None)))
_KINDS |= {"history": (list,), "max_lr": (float, int, type(None))}


class State:
    """What a training was when it was last noted, and the state that it resumes.

    It is offered to whoever saves the weights of the model in `fit`, and takes up what
    comes with them when `BackupAndRestore` restores them.
    """

    def __init__(self):
        self._model = self._backup = None
        self._restorable = False
        # What is to be resumed, as of `read`: by the user, by a backup.
        self._loaded = self._restored = None
        self._noted = None  # The state without its marks, and a `Rollback` or None.
        self._optimizer = None  # Which it was noted of.
        self._rider = _Rider(self._content, self._on_loaded)

    def copy(self):
        """The same for another callback: what is to be resumed, or can be saved."""
        copied = State()
        names = ("_model", "_loaded", "_noted", "_optimizer")
        vars(copied).update({name: vars(self)[name] for name in names})
        return copied

    def __getstate__(self):
        # For another process. What rides with a model's weights is Keras' to save.
        left = ("_rider", "_optimizer")
        return {name: one for name, one in vars(self).items() if name not in left}

    def __setstate__(self, state):
        vars(self).update(state)
        self._optimizer = self._model and self._model.optimizer
        self._rider = _Rider(self._content, self._on_loaded)

    @property
    def resumes(self) -> bool:
        """Whether there is a state to go on from."""
        return self._loaded is not None or self._restored is not None

    def begin(self, callback):
        """To be called in `on_train_begin`, before a backup is restored.

        Raises:
            ValueError: for an order of callbacks in which backups lack the state.
        """
        self._model = callback.model
        self._noted = self._restored = None
        caller = _keras.calling_list()
        beside = [] if caller is None else caller.callbacks
        self._backup = _backup_behind(callback, beside)
        # Without a list of callbacks, in a loop of one's own, anybody may restore.
        self._restorable = self._backup is not None or caller is None
        if self._backup is not None:
            mend(self._backup)
        self._rider.attach(self._model)

    def note(self, content: dict, rollback):
        """Notes a moment between two readings, for whoever saves.

        Args:
            content: The state; what in it is a list must not change afterwards.
            rollback: A `Rollback`, or None.
        """
        kept = None if rollback is None else rollback.state()
        content = content | {"trained": steps_made(self._model)}
        self._noted = content, rollback, kept
        self._optimizer = self._model.optimizer

    def end(self):
        """To be called in `on_train_end`: leaves the model, frees the weights."""
        self._rider.detach(self._model)
        if self._noted is not None:
            content, _, kept = self._noted
            self._noted = content, None, kept and (kept[0], {})

    def save(self, path):
        """Writes what was noted to a JSON file; ValueError where nothing was."""
        if not os.fspath(path).endswith(".json"):
            raise ValueError(
                f"Argument `path` must end in '.json'. Received: path={path!r}"
            )
        content, _ = self._content(with_weights=False)
        if content is None:
            raise ValueError(
                "MutualInformationLR has no state to save before its first reading."
            )
        write(path, content)

    def load(self, path):
        """Reads the state to resume; ValueError where there is none."""
        found = read(path)
        if found is None:
            raise ValueError(
                "Argument `path` must be a file that was saved while a "
                "MutualInformationLR was part of `fit`, and after its first reading. "
                f"Received: path={path!r}, which has no state of one"
            )
        self._loaded = found

    def start(self):
        """To be called in the first `on_epoch_begin`: what is loaded later is not ours.

        Weights may be loaded at any time.
        """
        self._restorable = False

    def take(self, epoch: int, settings: dict, can_read_later: bool):
        """The state to go on from, of which the model has the weights.

        Args:
            epoch: The epoch that begins.
            settings: What must be the same, for readings to be comparable.
            can_read_later: Whether a reading may be taken after its epoch.

        Returns:
            The state; a dict of arrays, or None where they are not known; and whether
            the reading of the epoch before is missing. What Keras has not restored is
            restored now.

        Raises:
            ValueError: for a state of another training, model or epoch.
        """
        content, arrays = self._restored or self._loaded
        start = "The state that MutualInformationLR is to resume"
        if content["settings"] != settings:
            raise ValueError(
                f"{start} is of a training with other arguments. "
                f"Received: {content['settings']}, expected {settings}"
            )
        if content["iterations"] != steps_made(self._model):
            raise ValueError(
                f"{start} is of other weights: load the model, or build its optimizer "
                "before `load_weights`. Received: a state after "
                f"{content['iterations']} training steps for an optimizer that has "
                f"made {steps_made(self._model)}"
            )
        expected = content["epoch"]
        # Who saves may stand before us, and save before the reading.
        missing = can_read_later and content["iterations"] > content["trained"]
        missing = missing and epoch == expected + 1
        if epoch != expected and not missing:
            raise ValueError(
                f"{start} goes on with `initial_epoch={expected}`. If the file was "
                "saved at the end of that epoch, MutualInformationLR must stand before "
                f"the callback that saves it. Received: initial_epoch={epoch}"
            )
        for name, buffer in self._unsaved().items():
            if arrays is not None and name in arrays:
                buffer.assign(arrays[name])
        # Only now: who was refused above may call `fit` again, with what it needs.
        self._loaded = self._restored = None
        return content, arrays, missing

    def _content(self, with_weights=True):
        # Of a `fit` that was interrupted it stays with the model, to go on with, until
        # that is compiled anew.
        if self._noted is None or self._model.optimizer is not self._optimizer:
            return None, {}
        content, rollback, kept = self._noted
        arrays = {}
        if with_weights and rollback is not None:
            arrays = rollback.changed(kept[1])
        if with_weights:
            unsaved = self._unsaved().items()
            arrays |= {k: keras.ops.convert_to_numpy(v).copy() for k, v in unsaved}
        content = content | {"rollback": kept and kept[0]}
        return _marked(content | {"iterations": steps_made(self._model)}), arrays

    def _unsaved(self):
        """What Keras does not save with the weights, by name.

        Buffers of PyTorch's modules, and the states of random seeds.
        """
        buffers = [one for one in backend.buffers(self._model) if not one.saved]
        unsaved = {f"buffer_{buffer.name}": buffer for buffer in buffers}
        # Of dropout, say: the states of seeds, without which its masks begin anew.
        weights = {id(weight) for weight in self._model.weights}
        seeds = [v for v in self._model.variables if id(v) not in weights]
        return unsaved | {f"seed_{i}": seed for i, seed in enumerate(seeds)}

    def _on_loaded(self, found):
        if not self._restorable:
            return
        self._restored = found
        if found is None and self._backup is not None:
            warnings.warn(
                "MutualInformationLR: the backup has no state of it. The weights are "
                "restored, the rates start anew.",
                stacklevel=2,
            )


class _Rider(_keras.Saveable):
    """What is saved and loaded with a model's weights, while it is attached to it.

    It has no variables, and the model does not track it: weights, configuration and
    files without it stay what they are.

    Args:
        content: Function without arguments: the state, or None, and a dict of arrays.
        on_loaded: Function of what was loaded with the weights, as of `read`.
    """

    def __init__(self, content, on_loaded):
        self._content = content
        self._on_loaded = on_loaded

    def attach(self, model):
        # Past `__setattr__`, by which Keras and its backends keep track of parts.
        vars(model)[_NAME] = self

    def detach(self, model):
        if vars(model).get(_NAME) is self:
            del vars(model)[_NAME]

    def save_own_variables(self, store):
        content, arrays = self._content()
        if content is None:
            return
        store["state"] = np.frombuffer(_encode(content).encode(), "uint8")
        for name, value in arrays.items():
            store[name] = value

    def load_own_variables(self, store):
        entry = {name: np.array(store[name]) for name in list(store.keys())}
        self._on_loaded(_decoded(entry, "the weights"))


def read(path):
    """The state in a file: a model's, its weights' or a JSON one.

    Returns:
        The state and a dict of arrays, which is None for a JSON file; None where a
        model's file has none.

    Raises:
        ValueError: for a file of another kind, and for one that is damaged.
        OSError: for one that cannot be read.
    """
    path = os.fspath(path)
    if path.endswith(".json"):
        with open(path, "rb") as file:
            return _checked(_parsed(file.read(_LARGEST + 1), path), path), None
    if not path.endswith((".keras", ".weights.h5")):
        raise ValueError(
            "Argument `path` must end in '.keras', '.weights.h5' or '.json'. "
            f"Received: path={path!r}"
        )
    try:
        entry = _keras.saved_entry(path, _NAME)
    except (KeyError, RuntimeError, zipfile.BadZipFile) as error:  # Cut off, say.
        raise _no_state(path, error) from error
    return _decoded(entry, path)


def write(path, content):
    """Writes a JSON file that is there as a whole or not at all."""
    path = os.path.abspath(path)
    handle, temporary = tempfile.mkstemp(dir=os.path.dirname(path), prefix=".state-")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(_encode(content))
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise


def _backup_behind(callback, callbacks):
    """The `BackupAndRestore` among the callbacks, or None.

    Args:
        callback: Ours.
        callbacks: All of them, in their order.

    Raises:
        ValueError: where it stands before ours, or where there are several of ours,
            of which its file has room for one.
    """
    kinds = (keras.callbacks.BackupAndRestore, type(callback))
    found = [one for one in callbacks if isinstance(one, kinds)]
    backups = [one for one in found if not isinstance(one, type(callback))]
    if not backups:
        return None
    if found != [callback, *backups]:
        raise ValueError(
            "One MutualInformationLR must stand before `BackupAndRestore` in "
            "`callbacks`: a backup is made without the reading of those behind it. "
            f"Received: {[type(one).__name__ for one in found]}"
        )
    return backups[0]


def mend(backup):
    """Makes a backup whole that a kill has left between two of its files.

    Keras writes the weights and then, in another file, the epoch. The state in the
    weights tells what that must be. A first backup that was cut off is taken away, and
    so is what is left of one that was being deleted: with it Keras could not start.
    """
    weights, previous, metadata = _keras.backup_paths(backup)
    exists = os.path.exists(weights)
    if exists and not _keras.is_whole(weights):
        if os.path.exists(previous):
            # Keras takes it where it cannot open the file; some that are cut it can.
            os.truncate(weights, 0)
        elif not os.path.exists(metadata):
            _take_away(weights)
        return
    found = read(weights) if exists else None
    if found is not None:
        epoch = {"epoch": found[0]["epoch"], "batch": 0}
        if _epoch_in(metadata) != epoch["epoch"]:
            write(metadata, epoch)
    elif not exists and os.path.exists(metadata):
        _take_away(metadata)


def _take_away(path):
    os.remove(path)
    warnings.warn(
        "MutualInformationLR: a run was killed while its first backup was written, or "
        f"the last one deleted. What was left of it, {path!r}, is of no use and was "
        "taken away; the training starts anew.",
        stacklevel=2,
    )


def _epoch_in(metadata):
    try:
        with open(metadata, encoding="utf-8") as file:
            return json.load(file)["epoch"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # Cut off, or not there yet.


def _marked(content):
    content = {"format": _FORMAT, "version": _VERSION} | content
    return content | {"checksum": zlib.crc32(_encode(content).encode())}


def _encode(state):
    return json.dumps(state, default=lambda value: value.tolist())


def _decoded(entry, path):
    if not entry:
        return None
    entry = dict(entry)
    try:
        text = bytes(np.asarray(entry.pop("state"), "uint8"))
    except (KeyError, TypeError, ValueError) as error:
        raise _no_state(path, error) from error
    return _checked(_parsed(text, path), path), entry


def _parsed(text: bytes, path):
    if len(text) > _LARGEST:
        raise _no_state(path, f"more than {_LARGEST} bytes")
    try:
        return json.loads(text)
    except (RecursionError, ValueError) as error:  # Of JSON or of UTF-8 too.
        raise _no_state(path, error) from error


def _checked(state, path):
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise _no_state(path, f"no {_FORMAT!r}")
    if state.get("version") != _VERSION:
        raise _no_state(path, f"version {state.get('version')}, not {_VERSION}")
    content = {name: value for name, value in state.items() if name != "checksum"}
    if _marked(content) != state:
        raise _no_state(path, "another content than was written")
    for name, kinds in _KINDS.items():
        value = state.get(name)
        kind = type(value)
        if kind not in kinds or (kind in (int, float) and not 0 <= value < math.inf):
            raise _no_state(path, f"{name!r}: {str(value)[:100]}")
    return state


@contextlib.contextmanager
def resuming():
    """Refuses a state that has the right checksum, but was not written by us."""
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        start = "The state that MutualInformationLR is to resume"
        if str(error).startswith(start):
            raise
        raise ValueError(
            f"{start} is damaged, or of another program. "
            f"Received: {type(error).__name__}: {error}"
        ) from error


def _no_state(path, received):
    return ValueError(
        f"The state of MutualInformationLR in {path!r} cannot be read: it is damaged, "
        f"or of another program or version. Received: {received}"
    )
