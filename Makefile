# make demo        a virtual environment with the project in it, then: madtp demo
# make test        the same with the test tools, then all tests, against the installed package
# make test-transformers   after make test: the tests that touch transformers, with other releases of it (RELEASES); they stay
#                  in the environment until the next make test
# make lint        after make test: format, lint rules, names and calls
# make bench       the benchmarks (pytest benchmarks/ --benchmark-only)
# make reproduce   the experiments of docs/results.md, from nothing; hours, goes on where it stopped
# make clean       removes the environment and what builds left
#
# VENV=folder of the environment, PYTHON=interpreter to make it from, TORCH=version, ARGS=passed on
# JOBS=runs at a time of make reproduce, a thread each; ARGS=--dry-run says what it would do

VENV = .venv
PYTHON = python3
TESTED_TORCH = torch==2.13.0
TORCH = $(TESTED_TORCH)
CPU_WHEELS = https://download.pytorch.org/whl/cpu
ARGS =
JOBS = 2
# The newest transformers, without constraints.txt, as `pip install .` finds it (but for the one of constraints.txt, which all
# tests have run with); and the oldest that pyproject.toml allows.
OLDEST := $(shell sed -n 's/^ *"transformers>=\(.*\)",$$/\1/p' pyproject.toml)
RELEASES = transformers transformers==$(OLDEST).*
TRANSFORMERS_TESTS = tests/patch tests/weights/test_huggingface.py \
	$(addprefix tests/models/test_,clip.py encoders.py processing.py sampling.py tasks.py varlen.py)
# Of these files, what a release of transformers can change.
TRANSFORMERS_NAMES = not triton and not numbers_of_a_weight \
	and not (test_processing.py and not (transformers or tokenizer)) \
	and not (test_clip.py and not (transformers or hugging or end_of)) \
	and not (test_tasks.py and not (words or sampling or beams or captions))

PIP = "$(VENV)/bin/python" -m pip --disable-pip-version-check

# torch comes first and from where CPU builds are, so that nothing later pulls the CUDA build and gigabytes of
# libraries with it. --no-deps: only torch itself may come from there.
ENVIRONMENT = \
	if [ "$$(cat "$(VENV)/.torch" 2>/dev/null)" != "$(TORCH)" ]; then \
		echo "== environment: $(VENV), $(TORCH)" && \
		"$(PYTHON)" -m venv "$(VENV)" && \
		$(PIP) install --no-deps --retries 2 --extra-index-url $(CPU_WHEELS) "$(TORCH)" && \
		$(PIP) install "$(TORCH)" && \
		echo "$(TORCH)" > "$(VENV)/.torch"; \
	fi

# Versions that were tested with one release of torch need not go with another, which pip would then replace without a word.
PINNED = $(if $(filter $(TESTED_TORCH),$(TORCH)),-c constraints.txt)

# Installs $$what unless nothing changed since $$stamp was made; a deleted file shows in its folder.
INSTALL = \
	if [ ! -f "$$stamp" ] || [ -n "$$(find pyproject.toml constraints.txt setup.py csrc madtp_kernels python \
			-name __pycache__ -prune -o -newer "$$stamp" -print)" ]; then \
		echo "== installing $$what: compiling the C++ kernels takes a minute or two" && \
		touch "$$stamp.started" && \
		$(PIP) install $(PINNED) "$(TORCH)" "$$what" && \
		mv "$$stamp.started" "$$stamp"; \
	fi

.PHONY: demo test test-transformers lint bench reproduce clean

# PYTHONPATH and the checkout stay out of the way: it is the installed package that runs.
demo:
	@unset PYTHONPATH; $(ENVIRONMENT)
	@unset PYTHONPATH; what=. stamp="$(VENV)/.installed"; $(INSTALL)
	@unset PYTHONPATH; "$(VENV)/bin/madtp" demo $(ARGS)

test:
	@unset PYTHONPATH; $(ENVIRONMENT)
	@unset PYTHONPATH; what='.[test]' stamp="$(VENV)/.installed-test"; $(INSTALL)
	@unset PYTHONPATH; "$(VENV)/bin/pytest" $(ARGS)

test-transformers:
	@unset PYTHONPATH; rm -f "$(VENV)/.installed-test"; for release in $(RELEASES); do \
		echo "== $$release" && \
		$(PIP) install --quiet --upgrade "$$release" || exit; \
		if $(PIP) freeze | grep -Fxq "$$(grep '^transformers==' constraints.txt)"; then \
			echo "the one that all tests have run with"; \
			continue; \
		fi; \
		"$(VENV)/bin/pytest" -k "$(TRANSFORMERS_NAMES)" $(TRANSFORMERS_TESTS) $(ARGS) || exit; \
	done

lint:
	@unset PYTHONPATH; $(PIP) install --quiet -c constraints.txt mypy ruff
	@unset PYTHONPATH; "$(VENV)/bin/ruff" format --check . && "$(VENV)/bin/ruff" check . && "$(VENV)/bin/mypy"

bench:
	@unset PYTHONPATH; $(ENVIRONMENT)
	@unset PYTHONPATH; what='.[test]' stamp="$(VENV)/.installed-test"; $(INSTALL)
	@unset PYTHONPATH; "$(VENV)/bin/pytest" benchmarks --benchmark-only $(ARGS)

reproduce:
	@unset PYTHONPATH; $(ENVIRONMENT)
	@unset PYTHONPATH; what='.[plot]' stamp="$(VENV)/.installed-plot"; $(INSTALL)
	@unset PYTHONPATH; "$(VENV)/bin/python" experiments/shapes/reproduce.py --jobs $(JOBS) $(ARGS)

clean:
	rm -rf "$(VENV)" build madtp.egg-info
