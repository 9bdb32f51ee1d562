r"""No rate to choose: MutualInformationLR against schedules whose rate was tuned.

Trains every workload of `workloads.py` in every way, from the same initial weights on
the same batches, and appends each result to a file as soon as it exists; a second
start goes on from there. Two trainings run side by side, each on one core.

Ways that need a rate are run from each rate of a grid, half a decade apart: `constant`,
`step` (a tenth after half of the epochs, again after three quarters), `cosine` and
`one-cycle` (linear up in three tenths, cosine down), the last three in every batch.
Their best rate is chosen by the mean score over the seeds **on the test data**, which
flatters them. Ways without tuning: Keras' optimizers at their default rates, constant
(`Adam`, `RMSprop`, `Lamb`, `ScheduleFreeAdamW`) or with `ReduceLROnPlateau`, and ours
(workloads with noise, of few epochs or steps, other optimizers and networks are run in
a few of these ways only):

- `auto`: `MutualInformationLR(learning_rate="auto")`, the default policy, `decay`; with
  the other policies (`auto, reference`); and with a rate for each layer
  (`auto, layers`);
- `AdaS-like`: rates of layers by the spectra of their weights, see `adas.py`, of SGD
  with momentum;
- `decay`, `reference`, `relative`: from the optimizer's default rate;
- `metric`: as `decay`, but of the metric on the training data, without a probe;
- `MI at 0.01`: the default policy from a rate given by hand, 1e-4 … 1.

Controls, from the rate and bounds that the range test finds, with the policy of `auto`:
driven by accuracy, by 1 − CE/H(Y) and by the information about shuffled labels, where
labels are classes; and `auto, constant` and `auto, cosine`, in which nothing is
measured after the range test.

    python benchmarks/schedules.py --uci path/to/uci   # some two hours
    python benchmarks/schedules.py --quick             # a few minutes
    python benchmarks/schedules_report.py results/schedules.jsonl
"""

import argparse
import concurrent.futures
import datetime
import json
import math
import multiprocessing
import os
import platform
import time
import warnings
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from adas import SpectralRates
from workloads import IN_FEW_WAYS, UCI, WORKLOADS

import keras_milr
from keras_milr.information import mutual_information

GRID = {
    "sgd": (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0),
    "Adam": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1),
}
WIDE_GRID = (*GRID["Adam"], 0.3, 1.0, 3.0, 10.0)  # Of any other optimizer.
BY_HAND = (1e-4, 1e-3, 1e-2, 0.1, 0.2, 0.5, 1.0)


def _constant(progress):
    return 1.0


def _step(progress):
    return 0.1 ** ((progress >= 0.5) + (progress >= 0.75))


def _cosine(progress):
    return 0.5 * (1 + math.cos(math.pi * progress))


def _one_cycle(progress):
    if progress < 0.3:
        return 0.04 + 0.96 * progress / 0.3
    return _cosine((progress - 0.3) / 0.7)


SCHEDULES = {
    "constant": _constant,
    "step": _step,
    "cosine": _cosine,
    "one-cycle": _one_cycle,
}
# Keras' own at their defaults.
OPTIMIZERS = ("Adam", "RMSprop", "Lamb", "ScheduleFreeAdamW")
POLICIES = ("relative", "reference", "decay")
CONTROLS = ("accuracy", "1 − CE/H", "shuffled labels")
SPECTRAL = "AdaS-like"


class Schedule(keras.callbacks.Callback):
    """A learning rate for each batch: `rate` times a function of the progress."""

    def __init__(self, rate, shape, steps):
        super().__init__()
        self.rate, self.shape, self.steps = rate, shape, steps
        self.step = 0

    def on_train_batch_begin(self, batch, logs=None):
        rate = self.rate * self.shape(self.step / self.steps)
        self.model.optimizer.learning_rate = rate
        self.step += 1


class Score(keras.callbacks.Callback):
    """The score on the test data after each epoch, and the time without it."""

    def __init__(self, case):
        super().__init__()
        self.case = case
        self.scores, self.seconds, self.rates = [], [], []
        self.since = time.perf_counter()
        self.taken = 0.0

    def on_epoch_end(self, epoch, logs=None):
        self.taken += time.perf_counter() - self.since
        self.seconds.append(self.taken)
        self.scores.append(self.case.score())
        self.rates.append((logs or {}).get("learning_rate"))
        self.since = time.perf_counter()


class Driven:
    """A control: a policy that is shown another signal instead of the information.

    It counts in the same nats: a share of H(Y). The signal is taken from predictions
    for the samples that the probe draws its own from. All else is as without: when it
    is shown a reading, and that a raise that has cost information is undone; but it is
    not told what is attainable, which is counted of predictions.
    """

    def __init__(self, policy, case, signal, seed):
        self.policy, self.case = keras_milr.policies.get(policy), case
        for name in ("early_readings", "undoes_raises", "glides", "anneals"):
            setattr(self, name, getattr(self.policy, name))
        rng = np.random.default_rng(seed)
        chosen = rng.permutation(len(case.x))[:2048]
        self.x, self.y = case.x[chosen], case.y[chosen]
        self.shuffled = rng.permutation(self.y)
        self.signal = signal
        self.previous = self.latest = self.best = None

    def __call__(self, reading):
        p = self.case.model.predict_on_batch(self.x)
        nats = float(reading.reference[0])
        n, classes = p.shape
        guess = p.argmax(1)
        right = float(np.mean(guess == self.y))
        binomial = 0.5 * math.sqrt(max(right * (1 - right), 1 / n) / n)
        if self.signal == "accuracy":
            # Of a guess that knows nothing: 0, as for the information.
            least = float(np.bincount(self.y).max() / n)
            value = nats * max(0.0, (right - least) / (1 - least))
            noise = nats * binomial / (1 - least)
        elif self.signal == "1 − CE/H":
            losses = -np.log(np.maximum(p[np.arange(n), self.y], 1e-7))
            value = max(0.0, nats - float(losses.mean()))
            noise = 0.15 * float(losses.std()) / math.sqrt(n)
        else:
            table = np.zeros((classes, classes))
            np.add.at(table, (guess, self.shuffled), 1)
            value = float(mutual_information(table, "miller_madow"))
            noise = 0.0
        value, noise = np.array([value]), np.array([noise])
        if self.previous is None:
            self.previous = self.latest = self.best = value
        within_first = 0 < reading.step < 1
        self.best = np.maximum(self.best, value)
        rate = self.policy(
            reading._replace(
                information=value,
                previous=self.latest if within_first else self.previous,
                best=self.best,
                noise=noise,
                bound=np.maximum(value, 0.0),
                attainable=None,
            )
        )
        if reading.step > 0:
            self.latest = value
            self.previous = self.previous if within_first else value
        return rate


class Case:
    """A workload with one optimizer: compiled once, trained again and again."""

    def __init__(self, name, optimizer, uci, layerwise=False, metrics=()):
        self.workload = WORKLOADS[name]
        (self.x, self.y), (self.test_x, self.test_y) = self.workload.load(uci)
        keras.utils.set_random_seed(0)
        self.model = self.workload.network(self.x, self.test_y)
        if layerwise:
            optimizer = keras_milr.LayerwiseOptimizer(optimizer)
        self.model.compile(optimizer, self.workload.task.loss, metrics=list(metrics))
        self.model.optimizer.build(self.model.trainable_variables)
        self.optimizer = optimizer.get_config()
        self.batches = -(-len(self.x) // self.workload.batch_size)

    def start(self, seed):
        """Initial weights of a seed, and an optimizer that has done nothing yet."""
        keras.utils.set_random_seed(seed)
        fresh = keras.models.clone_model(self.model)
        # Some keep a copy of the weights from the start.
        optimizer = type(self.model.optimizer).from_config(self.optimizer)
        optimizer.build(fresh.trainable_variables)
        values = [
            *fresh.variables,
            *optimizer.variables,
        ]  # States of dropout among them.
        variables = [*self.model.variables, *self.model.optimizer.variables]
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)
        keras.utils.set_random_seed(seed)

    def score(self):
        outputs = self.model.predict(self.test_x, batch_size=1000, verbose=0)
        return self.workload.task.score(self.test_y, outputs)

    def fit(self, seed, callbacks, rate=None):
        """Trains from the start; everything that is reported of it."""
        self.start(seed)
        if rate is not None:
            self.model.optimizer.learning_rate = rate
        score = Score(self)
        with warnings.catch_warnings(record=True):  # Roll backs, which are reported.
            warnings.simplefilter("always")
            self.model.fit(
                self.x,
                self.y,
                batch_size=self.workload.batch_size,
                epochs=self.workload.epochs,
                callbacks=[*callbacks, score],
                verbose=0,
            )
        return {
            "scores": [round(value, 5) for value in score.scores],
            "seconds": [round(value, 3) for value in score.seconds],
            "rates": [rate and float(f"{rate:.4g}") for rate in score.rates],
        }

    def find(self, seed):
        self.start(seed)
        return keras_milr.lr_range_test(
            self.model,
            self.x,
            self.y,
            batch_size=self.workload.batch_size,
            seed=seed,
            verbose=0,
        )

    def steps(self):
        return self.workload.epochs * self.batches


class Cases:
    """The cases of one process, the latest few kept."""

    def __init__(self):
        self.kept = {}

    def get(self, name, kind, uci):
        key = name, kind
        if key not in self.kept:
            if len(self.kept) > 7:
                self.kept.clear()
                keras.backend.clear_session()
            layerwise = kind in ("layers", SPECTRAL)
            metrics = [keras_milr.MutualInformation()] if kind == "metric" else []
            optimizer = _optimizer(name, kind)
            self.kept[key] = Case(name, optimizer, uci, layerwise, metrics)
        return self.kept[key]


def _optimizer(name, kind="plain"):
    if kind in OPTIMIZERS:
        return getattr(keras.optimizers, kind)()
    own = WORKLOADS[name].optimizer
    if own == "sgd" or kind == SPECTRAL:
        return keras.optimizers.SGD(momentum=0.9)
    return getattr(keras.optimizers, own)()


def grid(name):
    """The rates that a schedule is tuned by on a workload."""
    return GRID.get(WORKLOADS[name].optimizer, WIDE_GRID)


def default_rate(name):
    """That of Keras for the optimizer of a workload."""
    return round(float(keras.ops.convert_to_numpy(_optimizer(name).learning_rate)), 6)


def ways(name):
    """All ways to train a workload: (way, rate or None)."""
    half = WORKLOADS[name].half
    if half in IN_FEW_WAYS:
        metric = [] if half.startswith("other") else ["metric"]
        return [
            *(("cosine", rate) for rate in grid(name)),
            ("constant", default_rate(name)),
            *((way, None) for way in ("ReduceLROnPlateau", "auto", "decay", *metric)),
        ]
    # Controls and the metric are for classes.
    controls, metric = (CONTROLS, ["metric"]) if half != "other labels" else ([], [])
    return [
        *((way, rate) for way in SCHEDULES for rate in grid(name)),
        *((way, None) for way in OPTIMIZERS if hasattr(keras.optimizers, way)),
        *(("ReduceLROnPlateau", None), (SPECTRAL, None)),
        *(("auto", None), ("auto, layers", None)),
        *((f"auto, {policy}", None) for policy in POLICIES if policy != "decay"),
        *((f"auto by {signal}", None) for signal in controls),
        *(("auto, constant", None), ("auto, cosine", None)),
        *((way, None) for way in (*POLICIES, *metric)),
        *((f"MI at {rate:g}", None) for rate in BY_HAND),
    ]


def run(cases, name, way, rate, seed, uci):
    """One training; what is reported of it."""
    kind = "layers" if way == "auto, layers" else "plain"
    kind = way if way in (*OPTIMIZERS, SPECTRAL, "metric") else kind
    case = cases.get(name, kind, uci)
    default = default_rate(name)
    data, steps = (case.x, case.y), case.steps()

    def ours(policy=None, **arguments):
        policy = {} if policy is None else {"policy": policy}
        return keras_milr.MutualInformationLR(
            probe_data=data, seed=seed, **policy, **arguments
        )

    def ended(callback, result):
        history = callback.history
        result["rollbacks"] = history[-1]["rollbacks"] if history else 0
        return result

    if way in SCHEDULES:
        return case.fit(seed, [Schedule(rate, SCHEDULES[way], steps)])
    if way in OPTIMIZERS:
        return case.fit(seed, [])
    if way == SPECTRAL:
        return case.fit(seed, [SpectralRates()])
    if way == "ReduceLROnPlateau":
        plateau = keras.callbacks.ReduceLROnPlateau("loss", factor=0.3, patience=2)
        return case.fit(seed, [plateau], default)
    if way == "metric":
        callback = keras_milr.MutualInformationLR()
        return ended(callback, case.fit(seed, [callback], default))
    if way in POLICIES:
        callback = ours(way)
        return ended(callback, case.fit(seed, [callback], default))
    if way.startswith("MI at "):
        callback = ours()
        return ended(callback, case.fit(seed, [callback], float(way[6:])))
    if way in ("auto, constant", "auto, cosine"):
        began = time.perf_counter()
        found = case.find(seed)
        before = time.perf_counter() - began
        shape = SCHEDULES[way[6:]]
        result = case.fit(seed, [Schedule(found.best_lr, shape, steps)])
        result["seconds"] = [round(before + s, 3) for s in result["seconds"]]
        return result | {"found": found.best_lr}
    if way.startswith("auto by "):
        policy = Driven(ours().policy, case, way[8:], seed)
        callback = ours(policy, learning_rate="auto")
    elif way == "auto, layers":
        callback = ours(layers="all", learning_rate="auto")
    else:
        policy = way[6:] or None
        callback = ours(policy, learning_rate="auto")
    result = ended(callback, case.fit(seed, [callback], default))
    found = callback.lr_range
    return result | {
        "found": found.best_lr,
        "range epochs": found.steps / case.batches,
    }


# ------------------------------------------------------------------- running


def _start_worker():
    """Keeps a training to one core, so that two run side by side."""
    global _CASES
    tf.config.threading.set_intra_op_parallelism_threads(1)
    _CASES = Cases()


def _run_task(task, uci):
    name, way, rate, seed = task
    result = {"workload": name, "way": way, "rate": rate, "seed": seed}
    return result | run(_CASES, name, way, rate, seed, uci)


def _tasks(arguments):
    """What there is to do, in an order that keeps compiled models in use."""
    for name in arguments.workloads:
        try:
            WORKLOADS[name].load(arguments.uci)
        except Exception as error:  # No file, no download.
            print(f"Skipped, no data: {name} ({type(error).__name__}: {error})")
            continue
        for way, rate in ways(name):
            if arguments.ways and way not in arguments.ways:
                continue
            for seed in arguments.seeds:
                yield name, way, rate, seed


def _read(path):
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def _key(result):
    return tuple(result[name] for name in ("workload", "way", "rate", "seed"))


def execute(arguments):
    """Runs what the file of results does not have yet, and appends it."""
    done = {_key(result) for result in _read(arguments.output)}
    tasks = [task for task in _tasks(arguments) if task not in done]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
    }
    bar = keras.utils.Progbar(len(tasks), unit_name="training")
    with (
        arguments.output.open("a") as file,
        concurrent.futures.ProcessPoolExecutor(
            arguments.processes,
            multiprocessing.get_context("spawn"),
            _start_worker,
        ) as pool,
    ):
        futures = [pool.submit(_run_task, task, arguments.uci) for task in tasks]
        try:
            for future in concurrent.futures.as_completed(futures):
                result = future.result() | {"about": about}
                file.write(json.dumps(result, ensure_ascii=False) + "\n")
                file.flush()
                bar.add(1)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--workloads", nargs="+", default=list(WORKLOADS), choices=WORKLOADS
    )
    parser.add_argument("--ways", nargs="+", help="all where none is named")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--uci", default=UCI, help="folder of UCI sets")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("results/schedules.jsonl"))
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one seed of two workloads, in the ways that matter most",
    )
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.workloads = ["digits", "fashion, CNN"]
        arguments.seeds = [0]
        arguments.ways = ["cosine", "Adam", "auto", "decay", "auto by accuracy"]
    execute(arguments)


if __name__ == "__main__":
    main()
