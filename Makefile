# Everything that is installed goes into .venv. `make help` lists the targets.

PYTHON ?= python3
CONFIG ?= configs/baseline/shapes_mask_rcnn_R_18_FPN.yaml
# Processes that run the tests.
JOBS ?= 2
# pip 26 refuses the source distribution that Detectron2 is made from.
PIP := pip==25.0

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.setup-done
CSRC := $(shell find projects/layers/csrc -type f 2>/dev/null)

# How the extension is built (see setup.py). A switch that is given and differs from the last time builds it again.
SWITCHES := $(strip $(foreach name,NO_EXT FORCE_CUDA DEBUG TORCH_CUDA_ARCH_LIST,$(if $($(name)),$(name)=$($(name)))))
ifneq ($(SWITCHES),)
ifneq ($(SWITCHES),$(shell cat $(STAMP) 2>/dev/null))
.PHONY: $(STAMP)
endif
export NO_EXT FORCE_CUDA DEBUG TORCH_CUDA_ARCH_LIST
endif
WITHOUT_EXTENSION := $(filter-out 0,$(NO_EXT))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup test test-slow lint bench demo clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo 'PYTHON=... chooses the interpreter (3.10 to 3.13), CONFIG=... the config of the demo.'

setup: $(STAMP)  ## install everything into .venv (quick where nothing changed)
	@[ '$(origin PYTHON)' = file ] || [ "$$("$(PYTHON)" --version 2>&1)" = "$$($(PY) --version)" ] || { \
		$(call fail,.venv was made with $$($(PY) --version) and not with '$(PYTHON)'. Remove .venv to make it anew.); }

test: $(STAMP)  ## run the tests
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "not slow" -n $(JOBS) --dist worksteal

test-slow: $(STAMP)  ## run the slow tests: trainings, installations, compilations
	$(PY) -m pytest -m slow

lint: $(STAMP)  ## check the style
	$(PY) -m ruff check .

bench: $(STAMP)  ## run the benchmarks, one after another
	@for script in tools/benchmark_*.py; do echo "== $$script"; $(PY) "$$script" || exit 1; done

demo: $(STAMP)  ## train a small model on generated images and show what it has learned
	$(PY) tools/prepare_shapes.py
	$(PY) tools/run_demo.py --config-file $(CONFIG)

clean:  ## remove what was built (not .venv, datasets/ or output/)
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis projects/layers/_C*.so $(STAMP)
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

define fail
{ echo; echo "error: $(1)"; echo; } >&2; exit 2
endef

$(PY):
	@command -v "$(PYTHON)" >/dev/null || { $(call fail,There is no interpreter '$(PYTHON)'. Install Python 3.10 to 3.13 or name one: make setup PYTHON=python3.12); }
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || { \
		$(call fail,'$(PYTHON)' is $$("$(PYTHON)" --version 2>&1); Python 3.10 to 3.13 are supported. Name one: make setup PYTHON=python3.12); }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
		$(call fail,'$(PYTHON)' cannot make virtual environments. On Debian and Ubuntu install the package python3-venv.); }
	"$(PYTHON)" -m venv $(VENV)

$(STAMP): requirements.txt setup.py pyproject.toml tools/install_detectron2.py $(CSRC) | $(PY)
	@$(if $(WITHOUT_EXTENSION),,command -v $(CXX) >/dev/null || { \
		$(call fail,There is no C++ compiler '$(CXX)'. Install g++ or go without the extension (the operators are slower): make setup NO_EXT=1); })
	$(PY) -m pip install --quiet '$(PIP)'
	$(PY) -m pip install --quiet -r requirements.txt
	$(PY) tools/install_detectron2.py
	rm -f projects/layers/_C*.so
	@$(if $(WITHOUT_EXTENSION),,echo 'Compiling the operators: a minute or two, more on a busy machine (make setup NO_EXT=1 goes without).')
	$(PY) -m pip install --quiet --no-build-isolation --no-deps --editable .
	@$(PY) -m pip check || echo 'note: harmless where a Detectron2 of your own asks for packages that only its tools need.'
	@echo '$(SWITCHES)' > $@
