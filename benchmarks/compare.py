"""Compares two runs of the benchmarks: what became slower, or less accurate?

Takes two files that a benchmark wrote, or two folders of such files with the same
names. A ratio of times counts as worse where its lower quartile is above the upper
quartile of before, by more than `--tolerance` of it; a test error of `schedules.py`
in the same way by its mean over seeds, two standard errors to both sides (5 points
where there is one seed). Prints what became worse and what became better, and ends
with status 1 where something became worse. Only runs on the same kind of machine
compare.

    python benchmarks/compare.py before/ after/
    python benchmarks/compare.py before/overhead.json after/overhead.json
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np


def read(path):
    """`{name: (low, middle, high)}` of one file, where lower is better."""
    if path.suffix == ".json":
        ratios = json.loads(path.read_text()).get("ratios", {})
        return {name: tuple(values) for name, values in ratios.items()}
    scores = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        name = f"{row['workload']}, {row['way']}, rate {row['rate']}: error"
        scores.setdefault(name, []).append(1 - row["scores"][-1])
    found = {}
    for name, errors in scores.items():
        spread = 2 * np.std(errors, ddof=1) / len(errors) ** 0.5 if errors[1:] else 0.05
        mean = float(np.mean(errors))
        found[name] = (mean - spread, mean, mean + spread)
    return found


def compare(before, after, tolerance):
    """Names that became worse, better, and that only one of both has."""
    worse, better = [], []
    for name in before.keys() & after.keys():
        old, new = before[name], after[name]
        if new[0] > old[2] + tolerance * abs(old[2]):
            worse.append(name)
        elif new[2] < old[0] - tolerance * abs(old[0]):
            better.append(name)
    return sorted(worse), sorted(better), sorted(before.keys() ^ after.keys())


def pairs(before, after):
    if before.is_file() and after.is_file():
        return [(before, after)]
    if not (before.is_dir() and after.is_dir()):
        raise SystemExit(f"Two files or two folders are needed: {before}, {after}")
    names = [
        p.name for p in sorted(before.glob("*.json*")) if (after / p.name).exists()
    ]
    if not names:
        raise SystemExit(f"No file is in both folders: {before}, {after}")
    return [(before / name, after / name) for name in names]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--tolerance", type=float, default=0.05)
    arguments = parser.parse_args()

    failed = False
    for old_path, new_path in pairs(arguments.before, arguments.after):
        before, after = read(old_path), read(new_path)
        worse, better, alone = compare(before, after, arguments.tolerance)
        print(f"{new_path.name}: {len(before.keys() & after.keys())} figures compared")
        for title, names in (("worse", worse), ("better", better)):
            for name in names:
                old, new = before[name], after[name]
                print(
                    f"  {title}: {name}  {old[1]:.3f} ({old[0]:.3f} … {old[2]:.3f}) → "
                    f"{new[1]:.3f} ({new[0]:.3f} … {new[2]:.3f})"
                )
        if alone:
            print(f"  in one of both only: {len(alone)}, such as {alone[0]}")
        failed = failed or bool(worse)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
