"""What a readout found."""

from typing import NamedTuple

import numpy as np

_ESTIMATORS = ("counts", "bound", "fano", "mixed")


class Information(NamedTuple):
    """What a readout found, in nats.

    Numbers; of `UnitHistogram(reduce=None)`, arrays with an entry for each unit.

    Attributes:
        value: Information of the reading about the class, corrected for bias,
            between 0 and `entropy`.
        raw: The plug-in estimate from the counts, without any correction.
        entropy: H(Y), the entropy of the labels: the most there is to know.
        null: What `raw` would be on average if reading and class were independent.
        stderr: Standard error of `value` over samples drawn independently; see
            `information.standard_error` for where it holds.
        bound: H(Y) − CE, a second lower bound of the accessible information, from
            the cross-entropy of predicted probabilities; at least 0. NaN where the
            outputs are not probabilities.
        bound_stderr: Standard error of `bound`.
        cross_entropy: CE of the labels, which has no upper bound. NaN where the
            outputs are not probabilities.
        variation: Largest difference between samples in any output, of logits in their
            probabilities; at 0 the outputs do not depend on the input. NaN where it was
            not measured.
        repeated: Share of the samples whose outputs are those of the sample before, of
            the same batch, within 1e-6, and not all zeros and ones: of these a network
            is sure. NaN where it was not measured.
        attainable: What would be known if every class were predicted as surely as the
            surest, at most `entropy`: most of what is to be learned where labels are
            noisy. An estimate from above, see `readouts.attainable`. NaN where it was
            not made.
        estimator: What `value` is: `"counts"`, `"bound"` or `"fano"`; of a mean of
            different ones `"mixed"`.
    """

    value: float
    raw: float
    entropy: float
    null: float
    stderr: float
    bound: float = float("nan")
    bound_stderr: float = float("nan")
    cross_entropy: float = float("nan")
    variation: float = float("nan")
    repeated: float = float("nan")
    attainable: float = float("nan")
    estimator: str = "counts"

    @property
    def accessible(self) -> float:
        """The larger of the two lower bounds, `value` and `bound`."""
        return np.fmax(self.value, self.bound)

    @property
    def noise(self) -> float:
        """Standard error of a change of `accessible`, between readings of one sample.

        Readings of the same samples share most of their error. What is left of the
        error of one reading is about 0.15 for the bound and 0.5 for counts; measured
        between epochs by `benchmarks/paired_noise.py`.
        """
        by_bound = (self.bound > self.value) | (self.estimator == "bound")
        # [()]: a number where there is no axis.
        return np.where(by_bound, 0.15 * self.bound_stderr, 0.5 * self.stderr)[()]


def to_array(infos) -> np.ndarray:
    """What was found as an array of numbers, with a row for each of `infos`."""
    return np.array([[*info[:-1], _ESTIMATORS.index(info.estimator)] for info in infos])


def from_array(rows) -> list[Information]:
    """The inverse of `to_array`."""
    return [
        Information(*map(float, row[:-1]), _ESTIMATORS[int(row[-1])]) for row in rows
    ]


def separate(info) -> list[Information]:
    """One of numbers for each entry of an `Information` of arrays, shape `(m,)`."""
    arrays = np.broadcast_arrays(*info)
    return [
        Information(*row) for row in zip(*(a.tolist() for a in arrays), strict=True)
    ]


def mean(infos, shares=None) -> Information:
    """The mean of several readings, number by number.

    Its standard errors are means too: readings of the same samples may err together.

    Args:
        infos: List of `Information`.
        shares: Their weights in the mean, not all 0. Defaults to equal ones.
    """
    if shares is not None:
        counted = [pair for pair in zip(infos, shares, strict=True) if pair[1] > 0]
        infos, shares = zip(*counted, strict=True)  # 0 × NaN is no 0.
    if len(infos) == 1:
        return infos[0]
    numbers = Information._fields[:-1]
    table = np.array([[getattr(info, name) for name in numbers] for info in infos])
    estimators = {info.estimator for info in infos}
    return Information(
        *map(float, np.average(table, axis=0, weights=shares)),
        estimator=estimators.pop() if len(estimators) == 1 else "mixed",
    )
