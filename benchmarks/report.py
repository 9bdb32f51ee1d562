"""What all benchmarks of speed share: how they measure, print and write."""

import concurrent.futures
import datetime
import importlib.metadata
import json
import multiprocessing
import os
import platform
from pathlib import Path

import keras
import numpy as np


def quartiles(values) -> list[float]:
    """Lower quartile, median and upper quartile."""
    return [float(v) for v in np.quantile(values, [0.25, 0.5, 0.75])]


def print_ratios(title, ratios):
    """Prints a table of `{name: [lower quartile, median, upper quartile]}`."""
    width = max(map(len, (title, *ratios)))
    print(f"\n{title:<{width}} {'ratio':>8} {'quartiles':>17}")
    for name, (low, middle, high) in ratios.items():
        print(f"{name:<{width}} {middle:>8.3f} {low:>8.3f} … {high:.3f}")


def write(path, arguments, ratios, **data):
    """Writes JSON that `compare.py` reads: `ratios` of times, the lower the better."""
    path.parent.mkdir(parents=True, exist_ok=True)
    libraries = (keras.backend.backend(), "keras")
    content = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "versions": {name: importlib.metadata.version(name) for name in libraries},
        "arguments": {
            k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items()
        },
        "ratios": ratios,
        **data,
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"\nJSON: {path}")


def measured(shapes, measure, arguments, processes=0) -> list:
    """What `measure(kind, shape, rounds, rng)` found for each shape of each kind.

    With `processes`, the rounds are of so many processes for each shape, one after the
    other: where the memory of a process lies makes up to half of a time. Seconds are
    those of all rounds, and the rest is of the last process.
    """
    todo = [(kind, shape) for kind in shapes for shape in shapes[kind]]
    bar, found = keras.utils.Progbar(len(todo), unit_name="shape"), []
    for kind, shape in todo:
        task = measure, kind, shape, arguments.rounds, arguments.seed
        parts = [_fresh(task) for _ in range(processes)] or [_measured(task)]
        seconds = {name: [] for name in parts[0]["seconds"]}
        for part in parts:
            for name, values in part["seconds"].items():
                seconds[name] += values
        found.append({**parts[-1], "seconds": seconds})
        bar.add(1)
    return found


def _measured(task):
    measure, kind, shape, rounds, seed = task
    return measure(kind, shape, rounds, np.random.default_rng(seed))


def _fresh(task):
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context) as process:
        return process.submit(_measured, task).result()


def title(case) -> str:
    """Kind and shape of what `measured` returns."""
    return f"{case['kind']} " + " × ".join(f"{size:,}" for size in case["shape"])


def memory(field="VmRSS") -> int | None:
    """Bytes that this process holds, or held at most (`VmHWM`); None but on Linux."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(1024 * int(v.split()[1]) for v in lines if v.startswith(field))


def peak_memory(function) -> int | None:
    """Bytes that a call needs beyond what is held before; None but on Linux."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Forgets the former peak.
    except OSError:
        return None
    before = memory()
    function()
    return max(memory("VmHWM") - before, 0)
