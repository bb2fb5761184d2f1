# Two commands do everything on a fresh machine: `make demo` and `make test`.

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Its name and version, without the condition under which a plain install takes it.
MOSHI_MLX := $(shell sed -n 's/^\(moshi_mlx==[^;]*\);.*/\1/p' requirements/moshi_mlx.txt)
# The first of these that is 3.11, 3.12 or 3.13: rustymimi 0.4.1 has no wheel for another.
PYTHON ?= $(shell for p in python3.12 python3.11 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null && echo $$p && break; done)
ARGS ?=

.PHONY: install demo up test soak bench lint system clean

install: $(BIN)/pipeline

$(BIN)/pipeline: pyproject.toml requirements/run.txt requirements/moshi_mlx.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 is needed, and not found: install one, or name it: make PYTHON=..."; exit 1; }
	@echo "Installing into $(VENV) (a minute or two, 300 MB)"
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || sh tests/system-packages python3-venv
	@$(PYTHON) -m venv $(VENV) || { echo "the venv module is missing: apt-get install python3-venv"; exit 1; }
	@# moshi_mlx comes after the rest and without its dependencies: it pins an old mlx (docs/dependencies.md). Without
	@# what is there of an earlier install pip has no conflict to report.
	@$(PIP) uninstall -qq --yes moshi_mlx moshi-pipeline
	@$(PIP) install --quiet --upgrade -r requirements/run.txt
	@$(PIP) install --quiet --no-deps $(MOSHI_MLX)
	@$(PIP) install --quiet --no-deps -e .
	@touch $@

$(VENV)/dev: $(BIN)/pipeline requirements/dev.txt requirements/bench.txt
	@echo "Installing what the tests need"
	@$(PIP) install --quiet -r requirements/dev.txt -r requirements/bench.txt
	@touch $@

demo: install
	@sh tests/system-packages g++
	@mkdir -p demo
	@test -f demo/model/config.json || $(BIN)/pipeline models synth demo/model --quality q4 --size tiny
	@echo "A recording of 16 s goes through capture, a tiny Moshi with random weights, and playback, in real time"
	@echo "(the first time, mlx compiles for this processor: up to a minute before it begins):"
	@$(BIN)/pipeline up --name demo --model demo/model --input file:pipeline/assets/speech.flac --output file:demo/answer.wav
	@echo
	@echo "The answer is in demo/answer.wav. Random weights talk noise: this shows that everything runs, not how Moshi speaks."
	@echo "The real model on a Mac (5.2 GB to download, then speak into the microphone):"
	@echo
	@echo "    $(BIN)/pipeline models pull kyutai/moshiko-mlx-q4 && $(BIN)/pipeline up"

up: install
	@$(BIN)/pipeline up $(ARGS)

# A C++ compiler for mlx on the CPU and a sound server, where Debian's packages can be installed.
system:
	@sh tests/system-packages

# Two at a time: most of them wait for what happens in real time.
test: $(VENV)/dev system
	@$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

# Hours: what the tests show in short (docs/reliability.md).
soak: $(VENV)/dev system
	@$(BIN)/python -m bench.soak $(ARGS)

# What the README claims, against the peers, which come into an environment of their own: .bench/ (docs/benchmarks.md).
bench: $(VENV)/dev system
	@$(BIN)/python -m bench.suite $(ARGS)

lint: $(VENV)/dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/mypy examples

clean:
	rm -rf $(VENV) .bench demo build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
