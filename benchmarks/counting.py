"""How to add up by class: what the counting of a reading is made of.

The same sums in several ways, compiled, on the device that Keras trains on: by
`backend.class_sums`, which is what readings use; a segment sum; a comparison with every
class, reduced; and a matrix product with one-hot rows. Three problems, of few and of
many sums:

- `vector`: weights of n samples by their class;
- `table`: weights of n samples by (predicted class, label);
- `units`: how many of n samples fall in each (bin, label) of each unit. Here readings
  use `backend.bincount`, which fetches the result.

Calls are queued and waited for together, as in a training; seconds are those of one
call. Sums that differ fail the benchmark. Prints the time of each way, the bytes that
have to be read over that time, and the ratios of what readings use; writes JSON.

    python benchmarks/counting.py
    KERAS_BACKEND=jax python benchmarks/counting.py
"""

import argparse
import time
from pathlib import Path

import keras
import numpy as np
import report

from keras_milr import backend

BINS = 18
# n, classes; a batch of a probe, a probe, a large batch of a metric, and more.
SHAPES = {
    "vector": [(256, 10), (2_048, 1_000), (100_000, 10), (1_000_000, 1_000)],
    "table": [(256, 10), (2_048, 100), (100_000, 10), (1_000_000, 10)],
    "units": [(2_048, 512, 10), (10_000, 512, 10), (100_000, 64, 10)],
}
SHAPES["table"] += [(1_000_000, 100), (1_000_000, 1_000)]
QUICK = {"vector": [(256, 10)], "table": [(256, 10)], "units": [(2_048, 64, 10)]}
LARGEST = 2**29  # numbers that a way may have to write; beyond, it is left out


def segment_sum(values, ids, size):
    return keras.ops.segment_sum(values, ids, num_segments=size)


def compared(values, ids, size):
    ops = keras.ops
    classes = ops.arange(size, dtype="int32")
    same = ids[:, None] == classes[None, :]
    return ops.sum(ops.where(same, values[:, None], 0.0), axis=0)


def product(values, ids, size):
    return keras.ops.matmul(values[None, :], keras.ops.one_hot(ids, size))[0]


def table_product(values, a, b, size):
    ops = keras.ops
    rows = ops.one_hot(a, size) * values[:, None]
    return ops.reshape(ops.matmul(ops.transpose(rows), ops.one_hot(b, size)), (-1,))


def vector_case(n, classes, rng):
    """Ways to call, what they add up to, and the numbers that each must write."""
    ids = rng.integers(0, classes, n).astype("int32")
    values = rng.integers(1, 3, n).astype("float32")
    tensors = [keras.ops.convert_to_tensor(a) for a in (values, ids)]
    ways = {
        "class_sums": (backend.class_sums, n),
        "segment sum": (segment_sum, n),
        "comparison": (compared, n * classes),
        "product": (product, n * classes),
    }
    expected = np.bincount(ids, values, classes)
    return queued(ways, (*tensors, classes)), expected, 8 * n


def table_case(n, classes, rng):
    a, b = rng.integers(0, classes, (2, n)).astype("int32")
    values = rng.integers(1, 3, n).astype("float32")
    tensors = [keras.ops.convert_to_tensor(x) for x in (values, a, b)]

    def by_cell(add):
        def way(values, a, b, size):
            return add(values, a * size + b, size * size)

        return way

    ways = {
        "class_sums": (by_cell(backend.class_sums), n),
        "segment sum": (by_cell(segment_sum), n),
        "comparison": (by_cell(compared), n * classes**2),
        "product": (table_product, 2 * n * classes),
    }
    expected = np.bincount(a * classes + b, values, classes**2)
    return queued(ways, (*tensors, classes)), expected, 12 * n


def units_case(n, units, classes, rng):
    bins = rng.integers(0, BINS, (n, units)).astype("int32")
    labels = rng.integers(0, classes, n).astype("int32")
    cells = (np.arange(units) * BINS + bins) * classes + labels[:, None]
    size = units * BINS * classes
    cells = keras.ops.convert_to_tensor(cells.reshape(-1).astype("int32"))
    ones = keras.ops.ones(n * units, "float32")

    def units_product(bins, labels):
        ops = keras.ops
        hot = ops.reshape(ops.one_hot(bins, BINS), (n, units * BINS))
        return ops.matmul(ops.transpose(hot), ops.one_hot(labels, classes))

    given = [keras.ops.convert_to_tensor(x) for x in (bins, labels)]
    ways = queued(
        {
            "class_sums": (backend.class_sums, n * units),
            "segment sum": (segment_sum, n * units),
        },
        (ones, cells, size),
    )
    ways |= queued({"product": (units_product, n * units * BINS)}, given)
    ways["bincount"] = lambda: backend.bincount(cells, size)
    expected = np.bincount(keras.ops.convert_to_numpy(cells), minlength=size)
    return ways, expected, 4 * n * units


CASES = {"vector": vector_case, "table": table_case, "units": units_case}


def queued(ways, arguments):
    """Calls of the compiled ways, of those that fit into memory."""
    calls = {}
    for name, (way, numbers) in ways.items():
        if numbers <= LARGEST:
            compiled = backend.jit(way)
            calls[name] = lambda compiled=compiled: compiled(*arguments)
    return calls


def seconds_of(call, repeats):
    started = time.perf_counter()
    for _ in range(repeats):
        result = call()
    keras.ops.convert_to_numpy(keras.ops.sum(result))  # Waits for all of them.
    return (time.perf_counter() - started) / repeats


def measure(kind, shape, rounds, rng):
    calls, expected, must_read = CASES[kind](*shape, rng)
    for name, call in calls.items():
        found = keras.ops.convert_to_numpy(call()).reshape(-1)
        if not np.array_equal(found, expected):
            raise AssertionError(f"{kind} {shape}: {name} adds up to something else")
    repeats = {}
    for name, call in calls.items():
        seconds_of(call, 1)  # Compiles what waits, too.
        # About 50 ms in a turn, at most 100 calls.
        repeats[name] = int(np.clip(0.05 / seconds_of(call, 2), 1, 100))
    seconds = {name: [] for name in calls}
    for _ in range(rounds):
        for name in rng.permutation(list(calls)).tolist():
            seconds[name].append(seconds_of(calls[name], repeats[name]))
    return {
        "kind": kind,
        "shape": list(shape),
        "seconds": seconds,
        "bytes_to_read": must_read,
    }


def ratios_of(cases):
    """Time of ours over that of each other: lower quartile, median, upper quartile."""
    found = {}
    for case in cases:
        ours = "bincount" if case["kind"] == "units" else "class_sums"
        for name, seconds in case["seconds"].items():
            if name != ours:
                each = np.array(case["seconds"][ours]) / np.array(seconds)
                key = f"{report.title(case)}, {ours} / {name}"
                found[key] = report.quartiles(each)
    return found


def print_seconds(cases):
    print(f"\n{'microseconds of a call':<36}{'GB/s of what must be read':>28}")
    for case in cases:
        print(report.title(case))
        for name, seconds in case["seconds"].items():
            median = float(np.median(seconds))
            rate = case["bytes_to_read"] / median / 1e9
            print(f"  {name:<20} {1e6 * median:>12.1f} {rate:>27.1f}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="few shapes")
    parser.add_argument("--output", type=Path, default=Path("results/counting.json"))
    arguments = parser.parse_args()

    shapes = QUICK if arguments.quick else SHAPES
    cases = report.measured(shapes, measure, arguments)
    ratios = ratios_of(cases)
    print_seconds(cases)
    report.print_ratios("time of what readings use over another way", ratios)
    report.write(arguments.output, arguments, ratios, cases=cases)


if __name__ == "__main__":
    main()
