PYTHON ?= python3
PY := .venv/bin/python
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder # on two cores
STAMP := .venv/.setup-done
DEV_STAMP := .venv/.setup-dev-done

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev quickstart lint test test-slow screenshots bench faults corpus clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## install what running needs into .venv (PYTHON=python3.12 picks the interpreter)

setup-dev: $(DEV_STAMP) ## install what tests and benchmarks need, too

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' || \
		{ echo "Python 3.10 to 3.13 is needed, '$(PYTHON)' is not: make setup PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "'$(PYTHON)' cannot create virtual environments: apt-get install python3-venv" >&2; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install -c constraints.txt -e .
	@# opencv-python needs libGL, which servers lack; opencv-python-headless does not, and fills the same folder.
	$(PY) -c 'import cv2' 2>/dev/null || \
		$(PY) -m pip install --force-reinstall --no-deps -c constraints.txt opencv-python-headless
	$(PY) -c 'import cv2'
	$(PY) tools/ensure_mongod.py
	$(PY) tools/ensure_ffmpeg.py
	@touch $@

$(DEV_STAMP): $(STAMP)
	$(PY) -m pip install -c constraints.txt -e '.[dev]'
	$(PY) -c 'import cv2' 2>/dev/null || \
		$(PY) -m pip install --force-reinstall --no-deps -c constraints.txt opencv-python-headless
	$(PY) tools/ensure_chromium.py
	@touch $@

quickstart: setup ## segment images and open them in the App (IMAGES=folder MODEL=zoo-name)
	$(PY) -m fiftyone_mobilesamv2.cli quickstart $(if $(IMAGES),--images "$(IMAGES)") $(if $(MODEL),--model "$(MODEL)")

lint: setup-dev ## check format, lint, types and layers
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	.venv/bin/lint-imports

test: lint ## run the tests
	$(PYTEST)

test-slow: setup-dev ## run the tests that take more memory or time
	$(PYTEST) -m slow

screenshots: setup-dev ## take the README's screenshots of the App anew
	MOBILESAMV2_SCREENSHOTS=.screenshots $(PY) -m pytest -m app tests/app
	for picture in assets/app/*.png; do cp ".screenshots/$${picture##*/}" "$$picture"; done

bench: setup-dev ## measure speed and memory anew, for docs/speed.md (12 to 15 minutes on 2 cores)
	$(PY) benchmarks/bench.py

faults: setup-dev ## kill runs, stop the database, fill the disk: what is lost? (about 10 minutes)
	$(PY) benchmarks/faults.py

corpus: setup-dev ## give files and labels with wrong values to everything that reads them (about 5 minutes)
	$(PY) benchmarks/corpus

clean: ## remove the environment, build outputs and caches
	rm -rf .venv .screenshots build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
