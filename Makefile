# Every target sets up what it needs: `make demo` or `make test` works on a fresh clone.
PYTHON ?= python3
VENV := .venv
PROTO_VENV := .venv-proto
RUN := $(VENV)/bin/python
PROTO := proto/skfac/v1/preconditioning.proto
PROTOC = PATH=$(CURDIR)/$(PROTO_VENV)/bin:$$PATH $(PROTO_VENV)/bin/python -m grpc_tools.protoc \
	-Iproto --python_out=$(1) --mypy_out=quiet:$(1) --grpc_python_out=$(1) \
	--mypy_grpc_out=quiet:$(1) $(PROTO)
PLOT ?= autoencoder.png

.PHONY: help demo test test-floor check format proto stubs-fresh bench grid study clean

help:  ## List the targets.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

demo: $(VENV)/.ready  ## Train an autoencoder with SGD, AdamW and SKFAC; writes autoencoder.png.
	$(RUN) examples/autoencoder.py --plot $(PLOT)

test: $(VENV)/.ready  ## Run all tests.
	$(RUN) -m pytest

test-floor: .floor/.ready  ## Run the tests of the wire with the oldest gRPC and protobuf allowed.
	PYTHONPATH=.floor $(RUN) -m pytest tests/wire tests/service/test_server.py \
	  tests/service/test_state_server.py tests/end_to_end/test_bits.py \
	  tests/end_to_end/test_shared_memory.py

check: $(VENV)/.ready stubs-fresh  ## Check format, lint, spelling, types and generated code.
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/ruff check
	$(VENV)/bin/codespell $$(git ls-files)
	$(VENV)/bin/mypy

format: $(VENV)/.ready  ## Format the code and fix what can be fixed.
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

proto: $(PROTO_VENV)/.ready  ## Generate the protocol's code.
	$(call PROTOC,proto)

stubs-fresh: $(PROTO_VENV)/.ready
	@fresh=$$(mktemp -d) && $(call PROTOC,$$fresh) \
	&& for stub in $$fresh/skfac/v1/*; do \
		diff -q $$stub proto/skfac/v1/$$(basename $$stub) \
		|| { echo "Generated code is stale: run 'make proto'."; exit 1; }; \
	done && rm -r $$fresh

bench: $(VENV)/.ready  ## Measure the speed of steps, solver, transport and engine.
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps -r requirements/benchmarks.lock
	$(RUN) benchmarks/run_all.py

grid: $(VENV)/.ready  ## Re-run the recorded search of the autoencoder's settings.
	$(RUN) benchmarks/autoencoder_grid.py

study: $(VENV)/.ready  ## Go on with the convergence study, then write its tables and plots.
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps -r requirements/benchmarks.lock
	$(RUN) benchmarks/convergence.py run --jobs 2
	$(RUN) benchmarks/convergence.py report

clean:  ## Remove the virtual environments and caches.
	rm -rf $(VENV) $(PROTO_VENV) .floor .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/.ready: requirements/dev.lock requirements/oracle.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "skfac needs Python 3.11 or newer; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements/dev.lock
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps -r requirements/oracle.lock
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

.floor/.ready: requirements/floor.lock $(VENV)/.ready
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --upgrade --target .floor -r requirements/floor.lock
	@touch $@

$(PROTO_VENV)/.ready: requirements/proto.lock
	$(PYTHON) -m venv $(PROTO_VENV)
	$(PROTO_VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements/proto.lock
	@touch $@
