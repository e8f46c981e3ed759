# Corral. `make help` lists what there is.
# Needs make and Python 3.11 or newer, with its venv module; PYTHON=python3.12 names another interpreter.

ifdef PYTHON
SAME := --same-python
else
PYTHON := python3
endif
SETUP := $(PYTHON) tools/setup.py $(SAME)
BIN := .venv/bin
PYTEST_ARGS ?=
BENCH_ARGS ?=
SCALE_ARGS ?=
SOAK_SECONDS ?= 1200
SOAK_ARGS ?=
FUZZ_ARGS ?=
LOCK := $(BIN)/python -m uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-emit-find-links --custom-compile-command "make lock"

.DEFAULT_GOAL := help
.PHONY: help run demo test bench chaos check format lock install setup setup-dev schema clean providers otel bench-scale soak fuzz
.PHONY: bench-recovery pythons

help:
	@echo "make run      set up, then start the gateway on this machine"
	@echo "make demo     a tour that needs no key: a gateway is killed in the middle of a run and goes on"
	@echo "make test     set up with the development dependencies, then run the whole suite"
	@echo "make fuzz     the property-based tests with other examples in each round, for ten minutes (FUZZ_ARGS='--minutes 60')"
	@echo "make bench    what it costs beside the bare libraries: one table (BENCH_ARGS=--quick takes a minute)"
	@echo "make chaos    break everything at random for five minutes and see that nothing is lost (CHAOS_SECONDS=, CHAOS_SEED=)"
	@echo "make bench-scale  the same queries of a large store and a small one (some minutes, 3 GB of disk)"
	@echo "make soak     does what a gateway takes under load level off? (SOAK_SECONDS=1200, SOAK_ARGS=--help)"
	@echo "make bench-recovery  how long a start takes to take up 1,000 runs that a killed gateway left"
	@echo "make check    format, lint, types, the order of the rooms, the published schema"
	@echo "make pythons  a small part of the suite with each other Python that pyproject.toml claims and this machine has"
	@echo "make format   put the sources into the house's format"
	@echo "make schema   write docs/reference anew from the code"
	@echo "make lock     resolve the dependencies anew into requirements/*.txt (UPGRADE=1 takes newer ones)"
	@echo "make providers  set up with the library that google:NAME needs; it stays through later set-ups"
	@echo "make otel     set up with what sends traces (OpenTelemetry); it stays through later set-ups"
	@echo "make install  set up and stop: $(BIN)/corral is then the program"
	@echo "make clean    remove .venv and the caches; the data directory is not touched"

run: setup
	@[ -t 2 ] || echo 'When it listens, in a second terminal: $(BIN)/corral run "list"'
	@exec $(BIN)/corral serve

demo: setup
	@exec $(BIN)/corral demo

test: setup-dev
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

fuzz: setup-dev
	@$(BIN)/python -m tests.fuzz $(FUZZ_ARGS)

bench: setup
	@$(BIN)/python -m bench $(BENCH_ARGS)

chaos: setup-dev
	@CHAOS_SECONDS=$(CHAOS_SECONDS) CHAOS_SEED=$(CHAOS_SEED) $(BIN)/python -m tests.chaos

bench-scale: setup
	@$(BIN)/python -m bench.scale $(SCALE_ARGS)

soak: setup
	@exec $(BIN)/python -m bench.soak --seconds $(SOAK_SECONDS) $(SOAK_ARGS)
bench-recovery: setup
	@$(BIN)/python -m bench.recovery $(BENCH_ARGS)

check: setup-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/reference.py --check

pythons: setup-dev
	@$(BIN)/python tools/pythons.py

format: setup-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

schema: setup
	$(BIN)/python tools/reference.py

lock: setup
	$(LOCK) $(if $(UPGRADE),--upgrade) requirements/bootstrap.in -o requirements/bootstrap.txt
	$(LOCK) $(if $(UPGRADE),--upgrade) pyproject.toml requirements/build.in -o requirements/runtime.txt
	$(LOCK) $(if $(UPGRADE),--upgrade) pyproject.toml requirements/build.in --extra providers \
		-c requirements/runtime.txt -o requirements/providers.txt
	$(LOCK) $(if $(UPGRADE),--upgrade) pyproject.toml requirements/build.in --extra otel \
		-c requirements/providers.txt -o requirements/otel.txt
	$(LOCK) $(if $(UPGRADE),--upgrade) pyproject.toml requirements/build.in --all-extras --group dev \
		-c requirements/providers.txt -c requirements/otel.txt -o requirements/dev.txt

providers:
	@$(SETUP) --providers

otel:
	@$(SETUP) --otel

install: setup
	@echo "set up: $(BIN)/corral is the program"

setup:
	@$(SETUP)

setup-dev:
	@$(SETUP) --dev

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis dist
