# The commands of a contributor. Each target first updates the environment if it is out of date.

# The system's uv if it runs (a pyenv shim may not) and is recent enough, else our own in .uv/.
UV := $(shell uv pip compile --help 2>/dev/null | grep -q -e --group && echo uv || echo .uv/bin/uv)
OWN_UV := $(filter .uv/bin/uv,$(UV))
STAMP := .venv/.stamp

export UV_PYTHON_DOWNLOADS := never
export UV_SYSTEM_CERTS := 1
# Write bytecode even if the environment forbids it: a process that compiles JAX's source anew starts
# 7 s later, and the tests start hundreds.
export PYTHONDONTWRITEBYTECODE :=

# Prints the path of a Python that is new enough, or fails with one sentence.
FIND_PYTHON = \
	for python in python3.12 python3.13 python3.14 python3 \
	    "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python3; do \
	  "$$python" -c 'import sys, ensurepip; sys.version_info < (3, 12) and sys.exit(1); print(sys.executable)' \
	    2>/dev/null && exit 0; \
	done; \
	echo 'make: no Python 3.12 or newer with the venv module was found; install one, for example' \
	  'with "pyenv install 3.12" or your system packages python3.12 and python3.12-venv.' >&2; \
	exit 1

.DEFAULT_GOAL := help
.PHONY: env lock uv-lock quickstart test lint format prove wheel clean help

env: $(STAMP)  ## make or update .venv from requirements.lock; EXTRAS=eval,cuda adds extras for good
	$(if $(EXTRAS),@$(CHECK_EXTRAS) && $(call INSTALL,$(EXTRAS)) && echo '$(EXTRAS)' >>.venv/.extras)

# uv would only warn.
CHECK_EXTRAS = .venv/bin/python -c 'import sys, tomllib; \
	known = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]; \
	bad = [name for name in "$(EXTRAS)".split(",") if name not in known]; \
	bad and sys.exit(f"make: there is no extra {bad[0]!r}; the extras are {", ".join(known)}.")'

# Installs this package with extras, in the versions of requirements.lock where that has them.
INSTALL = $(UV) pip install --quiet --python .venv/bin/python --constraint requirements.lock \
	  --no-build-isolation-package grok-jax --editable ".[$(1)]"

$(STAMP): requirements.lock pyproject.toml .python-version | $(OWN_UV)
	@test -x .venv/bin/python || \
	  { python=$$($(FIND_PYTHON)) && rm -rf .venv && $(UV) venv --quiet --python "$$python" .venv; }
	$(UV) pip sync --quiet --python .venv/bin/python --require-hashes requirements.lock
	$(UV) pip install --quiet --python .venv/bin/python --no-deps --no-build-isolation --editable .
	@test ! -s .venv/.extras || $(call INSTALL,$$(paste -sd, .venv/.extras))
	@touch $@

.uv/bin/uv: requirements-uv.lock
	@python=$$($(FIND_PYTHON)) && "$$python" -m venv .uv
	.uv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes \
	  --requirement requirements-uv.lock
	@touch $@

lock: | $(OWN_UV)  ## resolve pyproject.toml again into requirements.lock (all platforms, with hashes)
	$(UV) pip compile --quiet --upgrade --universal --generate-hashes --no-emit-index-url \
	  --python-version 3.12 --custom-compile-command "make lock" \
	  pyproject.toml --group dev --output-file requirements.lock

uv-lock: | $(OWN_UV)  ## pin the newest uv in requirements-uv.lock (all platforms, with hashes)
	echo uv | $(UV) pip compile --quiet --upgrade --universal --generate-hashes \
	  --no-emit-index-url --no-annotate --python-version 3.12 --custom-compile-command "make uv-lock" \
	  --output-file requirements-uv.lock -

quickstart: env  ## train, resume and sample a tiny model on this machine's CPU
	.venv/bin/grok quickstart

lint: env  ## check format, style and types
	.venv/bin/ruff format --check
	.venv/bin/ruff check
	.venv/bin/mypy

test: lint  ## lint, then run the tests on eight simulated devices
	.venv/bin/pytest

prove: env  ## run the full-size proofs: compile for TPUs and load real sizes, without a TPU
	.venv/bin/pytest -m prove -n 0 -s

wheel: | $(OWN_UV)  ## build dist/grok_jax-VERSION-py3-none-any.whl, to install elsewhere
	$(UV) build --quiet --wheel

format: env  ## format the code and apply safe fixes
	.venv/bin/ruff format
	.venv/bin/ruff check --fix

clean:  ## remove the environment, caches and builds
	rm -rf .venv .uv .mypy_cache .pytest_cache .ruff_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/  make \1|\2/p' Makefile | \
	  while IFS='|' read -r target text; do printf '%-18s%s\n' "$$target" "$$text"; done
