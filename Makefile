# The two commands of the README, and what they need. Everything happens in .venv; nothing outside this folder is changed but
# Fabula's model cache.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# What an extra of pyproject.toml names. `pip install .[test]` would build Fabula again, from the start.
NEEDS = $(BIN)/python -c "import sys, tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies'][sys.argv[1]])"
SOURCES := pyproject.toml CMakeLists.txt README.md $(shell find native python -type f -not -name '*.pyc' -not -name '_cdef*.py' -not -name '*.so')

# The page's JavaScript is tested and checked with node. Without it, or with an older one, that is skipped.
NODE := $(shell node -e "process.exit(parseInt(process.versions.node) < 20 ? 1 : 0)" 2>/dev/null && command -v npm)
PAGE := python/fabula/web tests/web package.json tsconfig.json

# Processes that tests are spread over: one more than there are processors, as some tests wait; each needs up to 2 GB.
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 4 ? n + 1 : 4)))
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations=20

.PHONY: run test test-all test-page lint lint-page docs sanitize aarch64 cuda gpu emulated format format-page clean

# ARGS="--port 9000" and the like go to `fabula serve`.
run: $(VENV)/installed
	@$(BIN)/fabula serve $(ARGS)

test: $(VENV)/tested-with test-page
	@$(BIN)/fabula pull smollm2-135m-instruct || echo "SmolLM2 could not be fetched: the tests that need it will skip"
	$(PYTEST)

# With what is marked heavy: more examples of the same laws.
test-all: test
	$(PYTEST) -m heavy

lint: $(VENV)/linted-with lint-page
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files '*.c' '*.h' '*.cpp' '*.cu' '*.cuh')

format: $(VENV)/linted-with format-page
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.c' '*.h' '*.cpp' '*.cu' '*.cuh')

# The documentation as a site in build/site; a warning or a broken link fails.
docs: $(VENV)/documented-with
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "docs: build/site/index.html"

ifneq ($(NODE),)
test-page:
	node --test --test-reporter=spec tests/web/*.test.js

lint-page: node_modules/.package-lock.json
	node_modules/.bin/prettier --check $(PAGE)
	node_modules/.bin/tsc

format-page: node_modules/.package-lock.json
	node_modules/.bin/prettier --write $(PAGE)
else
test-page lint-page format-page:
	@echo "$@: SKIPPED, there is no node (20 or newer) with npm on this machine; CI has one"
endif

# Checkers of the page, at the versions that package-lock.json pins.
node_modules/.package-lock.json: package.json package-lock.json
	npm ci --no-audit --no-fund
	@touch $@

# The C tests, and the Python tests that drive the library hardest, on a build with AddressSanitizer and UBSan.
sanitize: $(VENV)/tested-with
	PYTHON=$(abspath $(BIN)/python) sh tests/native/sanitize.sh

# The C tests on AArch64, cross-compiled and run under qemu-user.
aarch64: $(VENV)/tested-with
	PYTHON=$(abspath $(BIN)/python) sh tests/native/aarch64.sh

# The library for NVIDIA GPUs: that it compiles, links and says what is missing where there is none.
cuda: $(VENV)/tested-with
	PYTHON=$(abspath $(BIN)/python) sh tests/native/cuda.sh

# Every test that needs a GPU, on one: operators under compute-sanitizer, then Python.
gpu: $(VENV)/tested-with
	PYTHON=$(abspath $(BIN)/python) sh tests/native/gpu.sh

# The same library on GPUs that are emulated, under the Python tests that need one.
emulated: $(VENV)/tested-with
	PYTHON=$(abspath $(BIN)/python) sh tests/native/emulated.sh

$(BIN)/python:
	@echo "making a virtual environment in $(VENV) and building Fabula there; this takes about a minute"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/installed: $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install --quiet .
	@touch $@

$(VENV)/tested-with: $(VENV)/installed
	$(BIN)/python -m pip install --quiet $$($(NEEDS) test)
	@touch $@

$(VENV)/linted-with: $(VENV)/tested-with
	$(BIN)/python -m pip install --quiet $$($(NEEDS) lint)
	@touch $@

$(VENV)/documented-with: $(VENV)/tested-with
	@$(BIN)/python -m pip install --quiet $$($(NEEDS) docs) || { echo "docs: what builds the site cannot be installed"; exit 1; }
	@touch $@

clean:
	rm -rf $(VENV) build dist node_modules
