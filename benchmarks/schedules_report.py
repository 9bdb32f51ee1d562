"""Tables and figures of what `schedules.py` has found.

For each half of the workloads, those with labels that are no classes, those made last,
with noise, of few epochs or steps, and with other optimizers or networks: the score of
every way against the tuned cosine, in points, paired by seed (mean, standard error,
median and worst workload, and the worst training of all); its mean rank among the ways
that were given no tuning and were run on all; its cost, tuning included, as a share of
that of the cosine's grid; and how often it failed, which is to end more than 10 points
behind. Then points by workload. Whatever is missing from the file is left out, and
counted.

    python benchmarks/schedules_report.py benchmarks/results/schedules.jsonl
"""

import argparse
import collections
import json
from pathlib import Path

import matplotlib as mpl
import numpy as np
from schedules import (
    BY_HAND,
    CONTROLS,
    OPTIMIZERS,
    SCHEDULES,
    SPECTRAL,
    default_rate,
    grid,
)
from workloads import IN_FEW_WAYS, WORKLOADS

FAILED = 10.0  # points behind the tuned cosine
UNTUNED = (
    *("constant at default", "ReduceLROnPlateau", *OPTIMIZERS, SPECTRAL),
    *("auto", "auto, reference", "auto, relative", "auto, layers"),
    *("decay", "reference", "relative", "metric"),
)


class Results:
    """Results by workload, way, rate and seed."""

    def __init__(self, path):
        self.by_key = collections.defaultdict(dict)
        for line in path.read_text().splitlines():
            result = json.loads(line)
            key = result["workload"], result["way"], result["rate"]
            self.by_key[key][result["seed"]] = result

    def scores(self, name, way, rate=None):
        """Final scores by seed; {} where there are none."""
        found = self.by_key.get((name, way, rate), {})
        return {seed: result["scores"][-1] for seed, result in found.items()}

    def tuned(self, name, way):
        """(rate, scores by seed) of the best rate of the grid; None if incomplete."""
        rows = {rate: self.scores(name, way, rate) for rate in grid(name)}
        counts = {len(scores) for scores in rows.values()}
        if len(counts) > 1 or counts == {0}:
            return None
        best = max(rows, key=lambda rate: np.mean(list(rows[rate].values())))
        return best, rows[best]

    def of(self, name, way):
        """Scores by seed of any way, tuned where it is a schedule."""
        if way in SCHEDULES:
            found = self.tuned(name, way)
            return found[1] if found else {}
        if way == "constant at default":
            return self.scores(name, "constant", default_rate(name))
        return self.scores(name, way)

    def seconds(self, name, way):
        """Mean time of a training, all of the grid where the way was tuned."""
        keys = [(name, way, None)]
        if way == "constant at default":
            keys = [(name, "constant", default_rate(name))]
        if way in SCHEDULES:
            keys = [(name, way, rate) for rate in grid(name)]
        return sum(
            np.mean([r["seconds"][-1] for r in self.by_key[key].values()])
            for key in keys
        )

    def against(self, name, way, other="cosine"):
        """Differences of the scores in points, paired by seed."""
        mine, theirs = self.of(name, way), self.of(name, other)
        return np.array(
            [100 * (mine[seed] - theirs[seed]) for seed in mine if seed in theirs]
        )


def table(results, half):
    """Rows of (way, dict of figures), of workloads that have a tuned cosine."""
    names = [
        name
        for name, workload in WORKLOADS.items()
        if workload.half == half and results.tuned(name, "cosine")
    ]
    ranks = _ranks(results, names)
    rows = []
    hand = [f"MI at {rate:g}" for rate in BY_HAND]
    controls = [f"auto by {signal}" for signal in CONTROLS]
    other = ["auto, cosine", "auto, constant"]
    for way in (*SCHEDULES, *UNTUNED, *controls, *other, *hand):
        points = {name: results.against(name, way) for name in names}
        points = {name: d for name, d in points.items() if len(d) > 0}
        if not points:
            continue
        means = {name: d.mean() for name, d in points.items()}
        errors = {
            name: d.std(ddof=1) / np.sqrt(len(d)) if len(d) > 1 else np.nan
            for name, d in points.items()
        }
        worst = min(means, key=means.get)
        cost = [
            results.seconds(name, way) / results.seconds(name, "cosine")
            for name in points
        ]
        rows.append(
            {
                "way": way,
                "mean": float(np.mean(list(means.values()))),
                "error": float(np.sqrt(np.nansum(np.square([*errors.values()]))))
                / len(means),
                "median": float(np.median(list(means.values()))),
                "worst": float(means[worst]),
                "worst workload": worst,
                "worst training": float(min(d.min() for d in points.values())),
                "within a point": sum(m >= -1 for m in means.values()),
                "failures": int(sum((d < -FAILED).sum() for d in points.values())),
                "rank": ranks.get(way),
                "cost": float(np.mean(cost)),
                "workloads": len(points),
                "seeds": min(map(len, points.values())),
                "points": {name: (m, errors[name]) for name, m in means.items()},
            }
        )
    return names, rows


def _ranks(results, names):
    """Mean rank of the untuned ways that were run on all of the workloads."""
    scores = {way: [results.of(name, way) for name in names] for way in UNTUNED}
    scores = {way: found for way, found in scores.items() if all(found)}
    means = np.array(
        [[np.mean(list(one.values())) for one in found] for found in scores.values()]
    )
    ranks = {}
    for way, mine in zip(scores, means, strict=True):
        # The mean rank of equals.
        better, equal = np.sum(means > mine, axis=0), np.sum(means == mine, axis=0)
        ranks[way] = float(np.mean(better + (equal + 1) / 2))
    return ranks


def show(half, names, rows):
    print(f"\n## {half}: {', '.join(names)}\n")
    print(
        "| way | points to tuned cosine | median | worst | one training | within 1 "
        "| failures | rank | cost |\n" + 9 * "| --- " + "|"
    )
    for row in rows:
        rank = "" if row["rank"] is None else f"{row['rank']:.1f}"
        print(
            f"| {row['way']} | {row['mean']:+.2f} ({row['error']:.2f}) "
            f"| {row['median']:+.2f} | {row['worst']:+.2f} {row['worst workload']} "
            f"| {row['worst training']:+.2f} "
            f"| {row['within a point']}/{row['workloads']} | {row['failures']} "
            f"| {rank} | {row['cost']:.2f} |"
        )
    few = [f"{r['way']} ({r['seeds']} seeds, {r['workloads']})" for r in rows]
    short = [
        text
        for text, r in zip(few, rows, strict=True)
        if r["workloads"] < len(names) or r["seeds"] < 5
    ]
    if short:
        print(f"\nIncomplete, of {len(names)} workloads: {'; '.join(short)}")


def show_points(results, names, rows):
    print("\n| way | " + " | ".join(names) + " |")
    print("| --- |" + " --- |" * len(names))
    best = [results.tuned(name, "cosine") for name in names]
    best = [f"{np.mean([*s.values()]):.4f} at {rate:g}" for rate, s in best]
    print("| the tuned cosine itself | " + " | ".join(best) + " |")
    for row in rows:
        cells = [
            "{:+.2f} ({:.2f})".format(*row["points"][name])
            if name in row["points"]
            else ""
            for name in names
        ]
        print(f"| {row['way']} | " + " | ".join(cells) + " |")


def epochs_to_target(results, name, way):
    """Epochs until the score reaches the workload's target; inf where it never does."""
    rate = None
    if way in SCHEDULES:
        found = results.tuned(name, way)
        if found is None:
            return []
        rate = found[0]
    if way == "constant at default":
        way, rate = "constant", default_rate(name)
    taken = []
    for result in results.by_key.get((name, way, rate), {}).values():
        reached = np.array(result["scores"]) >= WORKLOADS[name].target
        first = np.argmax(reached) + 1 + result.get("range epochs", 0.0)
        taken.append(float(first) if reached.any() else np.inf)
    return taken


def draw(results, folder):
    """Performance profile, and scores by starting rate."""
    plt = mpl.pyplot
    folder.mkdir(parents=True, exist_ok=True)
    ways = ("cosine", "one-cycle", "constant at default", "ReduceLROnPlateau")
    ways += ("Adam", "ScheduleFreeAdamW", "auto", "decay")
    names = [
        name
        for name, workload in WORKLOADS.items()
        if workload.half not in IN_FEW_WAYS and results.tuned(name, "cosine")
    ]
    taken = {
        way: {name: epochs_to_target(results, name, way) for name in names}
        for way in ways
    }
    taken = {way: rows for way, rows in taken.items() if any(rows.values())}
    best = {
        name: min(np.median(rows[name]) for rows in taken.values() if rows[name])
        for name in names
    }
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    axis = axes[0]
    limits = np.linspace(1, 6, 200)
    for way, rows in taken.items():
        ratios = [
            t / best[name]
            for name in names
            for t in rows[name]
            if np.isfinite(best[name])
        ]
        share = [np.mean(np.array(ratios) <= limit) for limit in limits]
        style = {"linewidth": 2.5} if way in ("auto", "decay") else {}
        label = f"{way}, tuned" if way in SCHEDULES else way
        axis.plot(limits, share, label=label, **style)
    axis.set_xlabel("epochs to the target, range test included, over the fastest way's")
    axis.set_ylabel("share of trainings")
    axis.set_ylim(0, 1.02)
    axis.legend(fontsize=8)
    axis.set_title("Performance profile", fontsize=10)

    axis = axes[1]
    for label, way in (
        ("constant", "constant"),
        ("cosine", "cosine"),
        ("MI, default policy", None),
    ):
        lines = []
        for name in names:
            tuned = np.mean(list(results.of(name, "cosine").values()))
            line = []
            for rate in BY_HAND:
                if way is None:
                    scores = results.scores(name, f"MI at {rate:g}")
                else:
                    scores = results.scores(name, way, rate)
                found = np.mean(list(scores.values())) if scores else np.nan
                line.append(100 * (found - tuned))
            lines.append(line)
        lines = np.array(lines)
        if np.isnan(lines).all():
            continue
        with np.errstate(all="ignore"):
            middle = np.nanmedian(lines, axis=0)
            low, high = np.nanquantile(lines, [0.1, 0.9], axis=0)
        known = ~np.isnan(middle)  # Not all are in the grids.
        at = np.array(BY_HAND)[known]
        axis.plot(at, middle[known], "o-", label=label)
        axis.fill_between(at, low[known], high[known], alpha=0.15)
    axis.set_xscale("log")
    axis.set_ylim(-40, 4)
    axis.axhline(0, color="grey", linewidth=0.8)
    axis.set_xlabel("starting rate")
    axis.set_ylabel("points to the tuned cosine")
    axis.set_title("Median and 10–90 % of the workloads", fontsize=10)
    axis.legend(fontsize=8, loc="lower center")
    figure.savefig(folder / "schedules.png", dpi=130)
    print(f"\nFigure: {folder / 'schedules.png'}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("results", type=Path, help="file that schedules.py wrote")
    parser.add_argument("--figures", type=Path, help="folder to draw figures into")
    arguments = parser.parse_args()
    results = Results(arguments.results)
    for half in dict.fromkeys(workload.half for workload in WORKLOADS.values()):
        names, rows = table(results, half)
        if names:
            show(half, names, rows)
            show_points(results, names, rows)
    if arguments.figures:
        draw(results, arguments.figures)


if __name__ == "__main__":
    main()
