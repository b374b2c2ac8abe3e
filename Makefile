# Parley. `make help` lists the commands. Needed: Python 3, git, make; the rest is set up here.
SHELL := /bin/sh
export UV_PYTHON_DOWNLOADS := never
export UV_COMPILE_BYTECODE := 1
export UV_LINK_MODE := copy
# Compiled files make every start half as long.
unexport PYTHONDONTWRITEBYTECODE

UV := .tools/uv/bin/uv
RUN := .venv/bin

.DEFAULT_GOAL := help

##@ Use

.PHONY: help
help: ## List the commands
	@awk 'BEGIN {FS = ":.*##"} /^##@/ {printf "\n%s\n", substr($$0, 5)} \
	  /^[a-z-]+:.*##/ {printf "  make %-10s %s\n", $$1, $$2}' Makefile

.PHONY: serve
serve: .venv/.run ## Start the whole system on port 3000 (PARLEY_PORT)
	@exec $(RUN)/parley serve

.PHONY: test
test: .venv/.dev ## Run every test that this machine can run; names what it left out
	@$(RUN)/pytest

##@ Develop

.PHONY: install
install: .venv/.dev ## Set up the development environment

.PHONY: check
check: .venv/.dev ## Lint, types, import contracts, migrations, generated files
	$(RUN)/ruff check
	$(RUN)/ruff format --check
	$(RUN)/mypy
	$(RUN)/lint-imports
	@scratch=$$(mktemp -d) && PARLEY_ENV=testing PARLEY_DATA_DIR=$$scratch $(RUN)/parley db check && rm -rf $$scratch
	$(RUN)/parley openapi | diff -u docs/openapi.json - || { echo "run: make generate"; exit 1; }
	$(RUN)/parley asyncapi | diff -u docs/asyncapi.json - || { echo "run: make generate"; exit 1; }

.PHONY: format
format: .venv/.dev ## Format and sort
	$(RUN)/ruff check --fix
	$(RUN)/ruff format

.PHONY: generate
generate: .venv/.dev ## Write the generated files anew
	$(RUN)/parley openapi --output docs/openapi.json
	$(RUN)/parley asyncapi --output docs/asyncapi.json

.PHONY: bench
bench: .venv/.dev ## Measure, side by side with a bare server (benchmarks/)
	$(RUN)/python -m benchmarks

.PHONY: faults
faults: .venv/.dev ## Kill processes for half an hour and judge every reply (FAULTS="--seed 7 --minutes 5")
	$(RUN)/python -m tests.faults $(FAULTS)

.PHONY: ci
ci: ## Everything: set up from nothing, check, all tests; fails where `make test` would leave out
	sh .ci/install-tools
	$(MAKE) check
	PARLEY_CI=1 $(RUN)/pytest --cov --cov-report= --cov-fail-under=80

.PHONY: clean
clean: ## Remove what was set up here; data in .parley/ stays
	rm -rf .venv .tools .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# -- set-up --------------------------------------------------------------------------------------------------------

$(UV):
	@echo "Setting up uv in .tools/"
	@sh .ci/install-uv

# Two marks: to serve, the development tools are not needed.
.venv/.run: pyproject.toml uv.lock | $(UV)
	@if [ ! -e .venv/.dev ]; then sh .ci/sync --no-dev; else sh .ci/sync; fi
	@touch $@

.venv/.dev: pyproject.toml uv.lock | $(UV)
	@sh .ci/sync
	@touch $@ .venv/.run
