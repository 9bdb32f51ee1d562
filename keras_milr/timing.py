"""Where a training is, and when it is to be read."""

import math
import threading

import numpy as np

from keras_milr import _keras

_LEAST_READINGS = 6  # of a training, for a policy that anneals
_LEAST_PART = 20  # batches from one reading within an epoch to the next
_GLIDE_STEPS = 10  # To set a rate takes as long as to train a small network.
_STATE = ("first_epoch", "divided", "since_reading", "skipped", "apart")


class Timing:
    """Counts the batches of a training, and says before or after which it is read.

    Args:
        model: A compiled `keras.Model`.
        params: Those of a callback: `epochs` and `steps`, where they are known.
        update_freq: `"epoch"`, or a number of batches.

    Attributes:
        epoch: Number of the present epoch, from 0.
        batch: How many batches of it were trained at the last reading within it; after
            its end, all of them.
        first_epoch: Number of the epoch in which the training has begun.
        divided: Into how many parts readings divide each epoch; 1 where they come at
            its end only.
        since_reading: How many batches were trained since a reading, where
            `update_freq` is a number of batches.
        skipped: How many readings were due since the last one, but had nothing to read.
        apart: How many readings are expected to come due until the next one that has
            something to read, which is among them: as many as it took the last time.
        steps: Number of batches in an epoch, where that is known beforehand, else None.
        length: The same, or the number that the last epoch had.
    """

    def __init__(self, model, params, update_freq):
        params = params or {}  # In a loop of one's own there are none.
        self._epochs, self.steps = params.get("epochs"), params.get("steps")
        self._update_freq = update_freq
        self._per_epoch = update_freq == "epoch"
        self._batches_behind = _keras.batches_behind(model)
        self._batches_at_once = model.steps_per_execution
        self.length = self.steps
        self.since_reading = 0
        self._glided = None

    def start(self, epoch: int, anneals: bool):
        """Begins a training.

        Args:
            epoch: Its first epoch.
            anneals: Whether readings shall divide epochs where there are few.
        """
        self.first_epoch, self.divided, self.since_reading = epoch, 1, 0
        self.skipped, self.apart = 0, 1
        known = None not in (self._epochs, self.steps) and self._epochs > epoch
        if anneals and self._per_epoch and known:
            wanted = -(-_LEAST_READINGS // (self._epochs - epoch))
            hooks = -(-self.steps // self._batches_at_once)
            self.divided = max(1, min(wanted, self.steps // _LEAST_PART, hooks))

    def state(self, within=False) -> dict:
        """What a resumed training must know.

        Args:
            within: Whether it goes on from the beginning of this epoch. Defaults to
                `False`: from its end.
        """
        state = {name: getattr(self, name) for name in _STATE}
        if within:
            state["since_reading"] = self._since_reading_before
        return state

    def resume(self, state: dict):
        """Goes on from a `state()`, which may be forged."""
        for name in _STATE:
            setattr(self, name, state[name])
        if self.divided == 0 or self.skipped < 0 or self.apart < 1:
            raise ValueError("no numbers of readings and parts of an epoch")

    @property
    def readings(self) -> int | None:
        """How many readings are planned after the first; None where it is not known."""
        if self._epochs is None or (self.steps is None and not self._per_epoch):
            return None
        epochs = self._epochs - self.first_epoch
        if self._per_epoch:
            return epochs * self.divided
        at_once = self._batches_at_once
        if self._update_freq >= at_once:
            return epochs * self.steps // self._update_freq
        # One at each hook, unless the last one of an epoch comes too soon.
        hooks = np.append(np.arange(at_once, self.steps, at_once), self.steps)
        trained = (np.arange(epochs)[:, None] * self.steps + hooks).ravel()
        return int(np.count_nonzero(np.diff(trained // self._update_freq, prepend=0)))

    def begin_epoch(self, epoch: int):
        self.epoch, self.batch, self._batch_by_thread = epoch, 0, {}
        self._since_reading_before = self.since_reading

    def divide(self, early: int):
        """Divides the present epoch, once it has begun.

        Args:
            early: How many readings are wanted within it, where it is not divided
                anyway.
        """
        self._part, self._parts = 0, self.divided
        if self.divided == 1 and self._per_epoch:
            self._parts = min(early + 1, (self.length or 0) // _LEAST_PART) or 1

    def is_due_before(self, batch: int) -> bool:
        """Whether a reading within the epoch is due before this batch is trained."""
        if not self._per_epoch or self.length is None:
            return False
        part = self._parts * min(batch, self.length - 1) // self.length
        if part <= self._part:
            return False
        self._part, self.batch = part, batch
        return True

    @property
    def passed(self) -> float | None:
        """Share of the epoch that has passed, at an early reading within the first one.

        None where all epochs are divided: readings within them are counted as others.
        """
        return None if self.divided > 1 else self.batch / self.length

    def way(self, batch: int, readings: int) -> float | None:
        """How much of the way to the next reading is behind, before a batch is trained.

        The way is gone in a few steps of equal length.

        Args:
            batch: That batch.
            readings: How many readings there were.

        Returns:
            A share, from 0 to 1, that belongs to the middle of the present step. None
            where that step was answered before, or where the way is of unknown length.
        """
        length = self.length  # From one reading that is due to the next, in batches.
        if not self._per_epoch:
            length = max(self._update_freq, self._batches_at_once)
        if length is None:
            return None
        trained = min(batch if self._per_epoch else self.since_reading, length - 1)
        # An epoch that is divided is gone through so many times as fast.
        done = self.divided * trained % length + self.skipped * length
        whole = self.apart * length
        done = min(done, whole - 1)
        steps = min(_GLIDE_STEPS, -(-whole // (self.divided * self._batches_at_once)))
        step = readings, steps * done // whole
        if step == self._glided:
            return None
        self._glided = step
        return (step[1] + 0.5) / steps

    def skip(self):
        """Notes a reading that was due, but had nothing to read."""
        self.skipped += 1

    def take(self) -> int:
        """Notes that a due reading is taken.

        Returns:
            How many have come due since the last one that was taken, with this one.
        """
        apart, self.skipped = self.skipped + 1, 0
        self.apart = apart
        if apart > 1 and self._per_epoch and self._epochs is not None:
            self.apart = max(1, min(apart, self._epochs - self.epoch - 1))
        return apart

    def is_due_after(self, batch: int) -> bool:
        """Notes that a batch was trained; whether a reading is due after it."""
        # With `steps_per_execution`, `batch` is the last of several, and may lie beyond
        # the end of the epoch.
        trained = min(batch + 1 + self._batches_behind, self.steps or math.inf)
        if self._per_epoch:
            # In several threads at once; each has its batches in their order.
            self._batch_by_thread[threading.get_ident()] = trained
            return False
        self.since_reading += trained - self.batch
        self.batch = trained
        if self.since_reading < self._update_freq:
            return False
        # With `steps_per_execution` it may be more than that.
        self.since_reading %= self._update_freq
        return True

    def end_epoch(self):
        self.batch = max(self._batch_by_thread.values(), default=self.batch)
        self.length = self.steps or self.batch or None
