"""Information, readouts and controllers, in plain Python and NumPy.

Written for reading, one table, unit or rate at a time; the package must equal it.
"""

import math

import numpy as np
from scipy.special import digamma, logsumexp
from sklearn.covariance import oas


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


def fano(predicted, labels, classes, weights=None):
    """Fano's bound; a prediction that is no class, -1 say, is none."""
    weights = np.ones(len(labels)) if weights is None else weights
    right = wrong = none = 0.0
    for said, label, weight in zip(predicted, labels, weights, strict=True):
        if not 0 <= said < classes:
            none += weight
        elif said == label:
            right += weight
        else:
            wrong += weight
    n = right + wrong + none
    e = wrong / max(right + wrong, 1e-30)
    unknown = entropy([right, wrong]) + e * math.log(classes - 1)
    unknown = none / n * math.log(classes) + (1 - none / n) * unknown
    h = entropy(np.bincount(labels, weights))
    return min(max(h - unknown, 0.0), h)


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


def null_level(table):
    rows, columns = table.sum(axis=1), table.sum(axis=0)
    freedom = max(sum(rows > 0) - 1, 0) * max(sum(columns > 0) - 1, 0)
    return min(freedom / (2 * table.sum()), entropy(rows), entropy(columns))


def attainable(table):
    """What would be known if every class were predicted as surely as the surest."""
    labels, most = table.sum(axis=0), 0.0
    for k in range(len(labels)):
        p = labels[k] / labels.sum()
        q = (table[k, k] + 1) / (table[k].sum() + 1)
        if 0 < p < q:
            wrong = max(1 - q, 1e-30)
            known = q * math.log(q / p) + wrong * math.log(wrong / (1 - p))
            most = max(most, known)
    return min(most, entropy(labels))


def fano_of_table(table):
    """Fano's bound of a table of (prediction or none, label), and its error."""
    classes, n = len(table) - 1, table.sum()
    cells = [(i, k) for i in range(classes + 1) for k in range(classes)]
    weights = [table[cell] for cell in cells]
    said, labels = (np.array(ids) for ids in zip(*cells, strict=True))
    value = fano(said, labels, classes, weights)
    # The delta method, sample by sample, of H(Y) and of the error rate.
    h = entropy(table.sum(axis=0))
    right, wrong = np.trace(table[:-1]), table[:-1].sum() - np.trace(table[:-1])
    e = wrong / (right + wrong) if right + wrong > 0 else 1.0
    inner = min(max(e, 1 / n), 1 - 1 / n)
    slope = math.log((1 - inner) * (classes - 1) / inner)
    variance = slope**2 * inner * (1 - inner)
    for said, label in cells:
        if table[said, label] > 0:
            surprise = -math.log(table[:, label].sum() / n) - h
            is_wrong = said not in (label, classes)
            each = surprise**2 - 2 * slope * is_wrong * surprise
            variance += table[said, label] / n * each
    return value, math.sqrt(max(variance, 0) / n)


def table_information(table, bound, bound_stderr):
    """What `readouts.from_counts` finds in one table, as a dict."""
    labels = table.sum(axis=0)
    h = entropy(labels)
    found = {
        "value": mutual_information(table, "miller_madow"),
        "raw": mutual_information(table),
        "entropy": h,
        "null": null_level(table),
        "stderr": standard_error(table),
        "bound": bound if math.isnan(bound) else min(max(bound, 0.0), h),
        "bound_stderr": bound_stderr,
        "attainable": attainable(table),
        "estimator": "counts",
    }
    if labels.sum() * (1 + 1e-6) < 5 * sum(labels > 0) ** 2:
        found |= {"value": found["bound"], "stderr": bound_stderr, "estimator": "bound"}
        if math.isnan(bound):
            value, stderr = fano_of_table(table)
            found |= {"value": value, "stderr": stderr, "estimator": "fano"}
    return found


def column_information(state, i, bins, scale):
    """What `readouts.Columns` finds in one unit of its state, as a dict."""
    state = {name: np.asarray(value, "float64") for name, value in state.items()}
    table = scale * state["counts"][i][[*range(bins), -1]][:, :bins]
    n, bound, error, cross_entropy = table.sum(), *(math.nan,) * 3
    if "surprise" in state and state["improper"][i] == 0:
        labels, sums = table.sum(axis=0), scale * state["surprise"][i]
        cross_entropy = sum(sums) / n
        bound, square = -cross_entropy, scale * state["surprise_squared"][i] / n
        for k in range(2):
            if labels[k] > 0:
                prior = -math.log(labels[k] / n)
                bound += prior * labels[k] / n
                square += (prior**2 * labels[k] - 2 * prior * sums[k]) / n
        error = math.sqrt(max(square - bound**2, 0) / n)
    found = table_information(table, bound, error)
    found["cross_entropy"] = cross_entropy
    found["repeated"] = scale * state["repeated"] / n
    found["variation"] = state["highest"][i] - state["lowest"][i]
    return found


def averaged(x, axis, cells):
    """An axis in cells of equal size: each pixel is cut in `cells`, then shared out."""
    pieces = np.moveaxis(np.repeat(x, cells, axis), axis, -1)
    means = pieces.reshape(*pieces.shape[:-1], cells, x.shape[axis]).mean(axis=-1)
    return np.moveaxis(means, -1, axis)


def halves(labels):
    """The first, third, ... sample of each class in one half, the others in another."""
    seen, half = {}, []
    for label in labels:
        seen[label] = seen.get(label, 0) + 1
        half.append((seen[label] - 1) % 2)
    return np.array(half)


def discriminant(x, labels, classes, rows):
    """Linear discriminant analysis on `rows`: log p(x | class) of all, up to a row."""
    n = len(x[rows])
    center, scale = x[rows].mean(axis=0), x[rows].std(axis=0)
    z = (x - center) / np.where(scale > 1e-6, scale, np.inf)
    means = np.zeros((classes, x.shape[1]))  # of a class without rows: that of all
    residuals = z[rows].copy()
    for k in np.unique(labels[rows]):
        means[k] = z[rows][labels[rows] == k].mean(axis=0)
        residuals[labels[rows] == k] -= means[k]
    covariance = residuals.T @ residuals / n
    share = oas(residuals, assume_centered=True)[1]
    mean_variance = np.eye(x.shape[1]) * np.diag(covariance).mean()
    shrunk = (1 - share) * covariance + (share + 0.01) * mean_variance
    inverse = np.linalg.inv(shrunk)
    log_p = np.zeros((len(x), classes))
    for k in range(classes):
        d = z - means[k]
        log_p[:, k] = -0.5 * np.sum(d @ inverse * d, axis=1)
    return log_p


def linear_readout(x, labels, classes):
    """Probabilities that a discriminant gives to the half it was not fitted to."""
    half, rows = halves(labels), np.arange(len(labels))
    evidence, prior = np.zeros((2, len(labels), classes))
    for test in (0, 1):
        fit = half != test
        counts = np.maximum(np.bincount(labels[fit], minlength=classes), 0.5)
        log_p = discriminant(x.astype("float64"), labels, classes, fit)
        evidence[~fit] = log_p[~fit]
        prior[~fit] = np.log(counts / fit.sum())
    prior[:, np.bincount(labels, minlength=classes) == 0] = -np.inf
    best = None
    for temperature in (1, 0.7, 0.5, 0.35, 0.25, 0.15, 0.08, 0):
        log_p = temperature * evidence + prior
        log_p = log_p - logsumexp(log_p, axis=1, keepdims=True)
        log_p = np.maximum(log_p, math.log(1e-7))
        if best is None or log_p[rows, labels].sum() > best[rows, labels].sum():
            best = log_p
    return np.exp(best) / np.exp(best).sum(axis=1, keepdims=True)


def cnn(images, kernel, bias, hidden, shift, out):
    """Activations of three layers: 3 × 3 convolution and dense, with tanh; softmax."""
    size = images.shape[1] - 2
    patches = np.stack(
        [images[:, i : i + size, j : j + size] for i in range(3) for j in range(3)], -1
    )
    first = np.tanh(patches @ kernel.reshape(9, -1) + bias)
    second = np.tanh(first.reshape(len(images), -1) @ hidden + shift)
    logits = second @ out
    return first, second, np.exp(logits - logsumexp(logits, axis=1, keepdims=True))


def bin_ids(unit, bins, edges=None):
    """Bins of equal mass, then one for zeros and one for what is not finite."""
    edged = np.sort(unit[np.isfinite(unit) & (unit != 0)])
    if edges is None:
        edges = [edged[len(edged) * i // bins] for i in range(1, bins) if len(edged)]
    ids = np.digitize(unit, edges)
    ids[unit == 0] = bins
    ids[~np.isfinite(unit)] = bins + 1
    return ids


def relative_change(r, expected=0.05, floor=0.1, max_factor=1.5):
    change = r["information"] - r["previous"]
    if abs(change) <= r["noise"]:
        change = 0.0
    d = change / max(r["previous"], floor * r["reference"], r["noise"])
    factor = (1 + d) / (1 + expected)
    return r["rate"] * min(max(factor, 1 / max_factor), max_factor)


def there(r):
    """What there is to know."""
    unknown = r["attainable"] is None or math.isnan(r["attainable"])
    return r["reference"] if unknown else min(r["reference"], r["attainable"])


def since_raise(r, negligible):
    """Share of what was missing at the last raise that was gained since."""
    before = r["previous"] if r["at_raise"] is None else r["at_raise"]
    change = r["information"] - before
    return (
        0.0
        if abs(change) <= r["noise"]
        else change / max(r["reference"] - before, negligible)
    )


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
    early = r["information"] < 0.5 * r["reference"]
    probabilities = r["bound"] is not None and not math.isnan(r["bound"])
    known = min(r["information"], r["bound"]) if probabilities else r["information"]
    part = 0.25 if probabilities else 0.1
    sure = probabilities or change > 10 * r["noise"]
    soon = known < part * r["reference"] or r["information"] < 0.5 * there(r)
    little = known < part * there(r) and not r["searched"]
    untrained = r["step"] <= 1 and r["previous"] < 0.5 * r["reference"]
    untrained = untrained or known <= negligible
    begins = 0 < r["step"] < 1
    if (
        r["step"] <= grow_steps
        and r["rollbacks"] == r["restarts"]
        and r["rate"] >= r["peak_rate"]
        and (little or untrained or gain >= 0)
        and (soon or not begins or r["rate"] > r["start_rate"])
        and r["information"] < grow_below * r["reference"]
    ):
        fell = r["information"] < r["best"] - r["noise"]
        enough = min(gain, since_raise(r, negligible)) > (
            max(share, 0.2) if begins else share
        )
        if enough and sure and not fell:
            return 2 * r["rate"]
        if early:
            return 3 * r["rate"] if little else r["rate"]
    if begins:
        return r["rate"]
    kept = r["rate"] * min(max(gain / share, cut), 1.0)
    return max(kept, min(floor * r["peak_rate"], r["rate"]))


def threshold_decay(
    r,
    threshold=0.05,
    tail=0.4,
    sharpness=2.0,
    cut=0.5,
    hold=0.02,
    floor=0.001,
    grow_steps=8,
    grow_below=0.8,
):
    negligible = max(hold * r["reference"], r["noise"])
    missing = r["reference"] - r["information"]
    change = r["information"] - r["previous"]
    if abs(change) <= r["noise"]:
        change = 0.0
    gain = change / max(r["reference"] - r["previous"], negligible)
    early = r["information"] < 0.5 * r["reference"]
    probabilities = r["bound"] is not None and not math.isnan(r["bound"])
    known = min(r["information"], r["bound"]) if probabilities else r["information"]
    part = 0.25 if probabilities else 0.1
    sure = probabilities or change > 10 * r["noise"]
    soon = known < part * r["reference"] or r["information"] < 0.5 * there(r)
    little = known < part * there(r) and not r["searched"]
    untrained = r["step"] <= 1 and r["previous"] < 0.5 * r["reference"]
    untrained = untrained or known <= negligible
    planned = r["steps"] is not None
    left = max(r["steps"] - r["step"], 0) if planned else None
    begins = 0 < r["step"] < 1
    late = planned and not begins and (left < tail * r["steps"] or left <= 1)
    if (
        not late
        and r["step"] <= grow_steps
        and r["rollbacks"] == r["restarts"]
        and r["rate"] >= r["peak_rate"]
        and (little or untrained or gain >= 0)
        and (soon or not begins or r["rate"] > r["start_rate"])
        and r["information"] < grow_below * r["reference"]
    ):
        fell = r["information"] < r["best"] - r["noise"]
        enough = min(gain, since_raise(r, negligible)) > (
            max(threshold, 0.2) if begins else threshold
        )
        if enough and sure and not fell:
            return 2 * r["rate"]
        if early:
            return 3 * r["rate"] if little else r["rate"]
    if begins:
        return r["rate"]
    learning = gain >= threshold or missing < negligible
    if not late and r["rate"] >= r["peak_rate"] and learning:
        return r["rate"]
    if not planned:
        if missing < negligible:
            return r["rate"]
        factor = min(max(gain / threshold, cut), 1.0)
    elif left == 0:
        factor = 1.0
    else:
        power = 1 + sharpness * max(missing, 0.0) / r["reference"]
        factor = (max(left - 1, 0) / left) ** power
    return max(r["rate"] * factor, min(floor * r["peak_rate"], r["rate"]))


def within_ratio(rates, r, max_ratio=30.0):
    """No rate, in units of its start, further than `max_ratio` below another."""
    highest = max(
        rate / start for rate, start in zip(rates, r["start_rate"], strict=True)
    )
    rows = zip(rates, r["start_rate"], strict=True)
    return [max(rate, start * highest / max_ratio) for rate, start in rows]


def quantile_edges(values, bins):
    """Edges of bins of equal numbers, half-way to the next lower value that occurs."""
    ordered, edges = sorted(map(float, values)), set()
    for i in range(1, bins):
        edge = ordered[len(ordered) * i // bins]
        below = [value for value in ordered if value < edge]
        if below:
            edges.add((max(below) + edge) / 2)
    if not edges:
        first, second = sorted(set(ordered))[:2]
        edges = {(first + second) / 2}
    return sorted(edges)


def bin_of(value, edges):
    return sum(value > edge for edge in edges)


def number_of_bins(samples):
    bins = 2
    while bins < 16 and samples >= 5 * (bins + 1) ** 2:
        bins += 1
    return bins
