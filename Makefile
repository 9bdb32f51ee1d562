# `make run` and `make test` need nothing but Python, git and make: they set up
# their own virtual environment, once, and again when the metadata changes.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
BESIDE := $(VENV)/.integrations
OTHERS := $(VENV)/.backends

QUICK  := --output results/quick
SHOWN  := --support=results/support

export TF_CPP_MIN_LOG_LEVEL ?= 2

.PHONY: run test test-slow test-backends test-versions support lint format bench bench-quick
.PHONY: smoke clean

run: $(READY)
	$(BIN)/python examples/quickstart.py $(ARGS)

test: $(BESIDE)
	$(BIN)/python -m pytest -n auto -m "not slow" $(SHOWN)/tensorflow.json $(ARGS)

# The rest of the tests: examples and benchmarks as a user runs them, kills, several
# processes, hundreds of absurd inputs, statistics of thousands of draws.
test-slow: $(BESIDE)
	$(BIN)/python -m pytest -n auto -m slow $(SHOWN)/tensorflow-slow.json $(ARGS)

# What depends on the backend, on the two others of Keras.
test-backends: $(OTHERS)
	KERAS_BACKEND=jax $(BIN)/python -m pytest -n auto $(SHOWN)/jax.json $(ARGS)
	KERAS_BACKEND=torch $(BIN)/python -m pytest -n auto $(SHOWN)/torch.json $(ARGS)

# docs/support.md, of what passed in all of these; ARGS=--check compares.
support: $(READY)
	$(BIN)/python -m tests.support results/support/*.json $(ARGS)

# On every supported Python with the newest of the rest, and once on the oldest of all,
# in environments of their own. What is not to be had is named, and is a failure.
test-versions:
	$(PYTHON) -m tests.versions $(if $(PYTHONS),--pythons $(PYTHONS)) $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The benchmarks of speed, of which the README says how its figures were run: more than
# an hour, and nothing else should run beside it.
bench: $(READY)
	$(BIN)/python benchmarks/estimators.py
	$(BIN)/python benchmarks/counting.py
	$(BIN)/python benchmarks/optimizer_step.py
	$(BIN)/python benchmarks/overhead.py

# Every benchmark in a small setting, into results/quick: what `compare.py` compares.
bench-quick: $(READY)
	rm -rf results/quick
	$(BIN)/python benchmarks/estimators.py --quick --rounds 7 $(QUICK)/estimators.json
	$(BIN)/python benchmarks/counting.py --quick $(QUICK)/counting.json
	$(BIN)/python benchmarks/optimizer_step.py --builds 2 --rounds 15 $(QUICK)/optimizer_step.json
	$(BIN)/python benchmarks/overhead.py --quick $(QUICK)/overhead.json
	$(BIN)/python benchmarks/schedules.py --workloads digits --seeds 0 1 \
		--ways Adam decay auto $(QUICK)/schedules.jsonl
	$(BIN)/python benchmarks/layerwise.py --tasks noise --optimizers adam --seeds 1 \
		--epochs 2 --pretrain-epochs 1 $(QUICK)/layerwise.jsonl

# The wheel, installed where the checkout cannot be imported.
smoke: $(READY)
	rm -rf build dist $(VENV)-smoke
	$(BIN)/python -m build --wheel --outdir dist .
	$(PYTHON) -m venv $(VENV)-smoke
	$(VENV)-smoke/bin/python -m pip install --quiet dist/*.whl
	cp tests/smoke.py $(VENV)-smoke/smoke.py
	cd $(VENV)-smoke && bin/python -I smoke.py

$(READY): setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

# What is used beside Keras in some tests.
$(BESIDE): $(READY)
	$(BIN)/python -m pip install --quiet --editable '.[integrations]'
	touch $@

# An exact version of PyTorch: the newest may bring gigabytes of CUDA with it.
$(OTHERS): $(BESIDE)
	$(BIN)/python -m pip install --quiet --editable '.[jax,torch]' torch==2.13.0
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-smoke .venvs build dist results *.egg-info
