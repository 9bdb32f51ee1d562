"""The information mathematics and the controllers, in plain Python and NumPy.

Written for reading, one table or one rate at a time; the package must equal it.
"""

import math

import numpy as np
from scipy.special import digamma


def contingency(a, b, num_a, num_b, sample_weight=None):
    table = np.zeros((num_a, num_b))
    for i in range(len(a)):
        table[a[i], b[i]] += 1 if sample_weight is None else sample_weight[i]
    return table


def _harmonic_g(n):
    """G(n) of Grassberger (2003), by its definition with a sum."""
    if n == 0:
        return 0.0
    return digamma(n) + 0.5 * (-1) ** n * (digamma((n + 1) / 2) - digamma(n / 2))


def entropy(counts, correction=None):
    n = sum(counts)
    if n == 0:
        return 0.0
    if correction == "grassberger":
        return math.log(n) - sum(c * _harmonic_g(int(c)) for c in counts) / n
    plain = -sum(c / n * math.log(c / n) for c in counts if c > 0)
    if correction == "miller_madow":
        return plain + (sum(c > 0 for c in counts) - 1) / (2 * n)
    return plain


def mutual_information(table, correction=None):
    rows, columns = table.sum(axis=1), table.sum(axis=0)
    nats = (
        entropy(rows, correction)
        + entropy(columns, correction)
        - entropy(table.ravel(), correction)
    )
    return min(max(nats, 0.0), entropy(rows), entropy(columns))


def standard_error(table):
    n = table.sum()
    p = table / n
    terms = []
    for i, j in zip(*np.nonzero(p), strict=True):
        terms.append((p[i, j], math.log(p[i, j] / (p[i].sum() * p[:, j].sum()))))
    mean = sum(w * t for w, t in terms)
    return math.sqrt(sum(w * (t - mean) ** 2 for w, t in terms) / n)


def h_minus_ce(probabilities, labels):
    """H(Y) − CE, and its standard error."""
    p = probabilities[np.arange(len(labels)), labels]
    prior = (np.bincount(labels) / len(labels))[labels]
    nats = np.log(np.clip(p, 1e-7, 1 - 1e-7)) - np.log(prior)
    return max(nats.mean(), 0.0), nats.std() / math.sqrt(len(labels))


def relative_change(r, expected=0.05, floor=0.1, max_factor=1.5):
    change = r["information"] - r["previous"]
    if abs(change) <= r["noise"]:
        change = 0.0
    d = change / max(r["previous"], floor * r["reference"], r["noise"])
    factor = (1 + d) / (1 + expected)
    return r["rate"] * min(max(factor, 1 / max_factor), max_factor)


def reference_level(
    r, share=0.1, cut=0.5, hold=0.02, floor=0.01, grow_steps=8, grow_below=0.8
):
    negligible = max(hold * r["reference"], r["noise"])
    if r["reference"] - r["information"] < negligible:
        return r["rate"]
    change = r["information"] - r["previous"]
    if abs(change) <= r["noise"]:
        change = 0.0
    gain = change / max(r["reference"] - r["previous"], negligible)
    if (
        r["step"] <= grow_steps
        and r["rollbacks"] == 0
        and r["rate"] >= r["peak_rate"]
        and change >= 0
        and r["information"] < grow_below * r["reference"]
    ):
        if r["information"] < 0.5 * r["reference"]:
            return 3 * r["rate"]
        if gain > share:
            return 2 * r["rate"]
    kept = r["rate"] * min(max(gain / share, cut), 1.0)
    return max(kept, min(floor * r["peak_rate"], r["rate"]))
