# `make run` and `make test` need nothing but Python, git and make: they set up
# their own virtual environment, once, and again when the metadata changes.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
OTHERS := $(VENV)/.backends

export TF_CPP_MIN_LOG_LEVEL ?= 2

.PHONY: run test test-backends lint format bench smoke clean

run: $(READY)
	$(BIN)/python examples/quickstart.py $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest -n auto $(ARGS)

# What depends on the backend, on the two others of Keras.
test-backends: $(OTHERS)
	KERAS_BACKEND=jax $(BIN)/python -m pytest -n auto $(ARGS)
	KERAS_BACKEND=torch $(BIN)/python -m pytest -n auto $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python benchmarks/overhead.py $(ARGS)

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

# An exact version of PyTorch: the newest may bring gigabytes of CUDA with it.
$(OTHERS): $(READY)
	$(BIN)/python -m pip install --quiet --editable '.[jax,torch]' torch==2.13.0
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-smoke build dist results *.egg-info
