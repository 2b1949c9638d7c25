# Every target sets up what it needs: `make demo` or `make test` works on a fresh clone.
PYTHON ?= python3
VENV := .venv
PROTO_VENV := .venv-proto
AUDIT_VENV := .venv-audit
RUN := $(VENV)/bin/python
PROTO := proto/skfac/v1/preconditioning.proto
PROTOC = PATH=$(CURDIR)/$(PROTO_VENV)/bin:$$PATH $(PROTO_VENV)/bin/python -m grpc_tools.protoc \
	-Iproto --python_out=$(1) --mypy_out=quiet:$(1) --grpc_python_out=$(1) \
	--mypy_grpc_out=quiet:$(1) $(PROTO)
PLOT ?= autoencoder.png
DEPLOY_TOOLS := .tools/deploy

.PHONY: help demo test test-floor gpu-check page-check page-image monitoring-check docs check format proto proto-check stubs-fresh sbom audit
.PHONY: bench scaling grid study test-long faults fuzz soak deploy-check image-check clean

# Tests start some two hundred processes: none should compile all modules anew.
test test-floor test-long: export PYTHONDONTWRITEBYTECODE =

help:  ## List the targets.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

demo: $(VENV)/.ready  ## Train an autoencoder with SGD, AdamW and SKFAC; writes autoencoder.png.
	$(RUN) examples/autoencoder.py --plot $(PLOT)

test: $(VENV)/.ready  ## Run all tests.
	$(RUN) -m pytest -n 2 --dist loadgroup

test-floor: .floor/.ready  ## Run the tests of the wire with the oldest gRPC and protobuf allowed.
	PYTHONPATH=.floor $(RUN) -m pytest -n 2 --dist loadgroup tests/wire tests/service/test_server.py \
	  tests/service/test_state_server.py tests/end_to_end/test_shared_memory.py \
	  --deselect tests/wire/test_allocator.py

gpu-check: $(VENV)/.ready  ## Run what needs a CUDA device: its tests, then its benchmarks.
	$(RUN) -m pytest -m gpu
	$(RUN) benchmarks/run_all.py --device cuda

page-check: $(VENV)/.page  ## Try the status page in headless Chromium.
	$(RUN) -m pytest -m browser tests/browser

page-image: $(VENV)/.page  ## Take the picture of the status page for the documentation.
	STATUS_IMAGE=docs/images/status.png $(RUN) -m pytest -m browser tests/browser -k documentation

monitoring-check: $(VENV)/.ready  ## Test rules and dashboard against a real Prometheus.
	deploy/tools/fetch_prometheus.sh .tools/prometheus
	$(RUN) -m pytest -m monitoring tests/monitoring

test-long: $(VENV)/.ready  ## Restart, replace and scale servers in every way, and take the network away.
	$(RUN) -m pytest -m "long or not long" tests/end_to_end/test_restarts.py \
	  tests/end_to_end/test_scaling.py tests/end_to_end/test_network.py \
	  tests/end_to_end/test_fsdp.py tests/service/test_shutdown.py tests/service/test_gone.py

docs: $(VENV)/.ready  ## Write docs/metrics.md and the dashboard from the code.
	$(RUN) deploy/tools/metrics_reference.py
	$(RUN) deploy/tools/dashboard.py

proto-check: $(PROTO_VENV)/.ready stubs-fresh  ## Lint the protocol with buf, and see that its generated code is fresh.
	$(PROTO_VENV)/bin/buf lint
	$(PROTO_VENV)/bin/buf format --diff --exit-code proto

check: $(VENV)/.ready proto-check sbom  ## Check format, lint, spelling, types and generated code.
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/ruff check
	$(VENV)/bin/codespell $$(git ls-files)
	$(VENV)/bin/mypy
	$(RUN) deploy/tools/audit.py

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

sbom: $(VENV)/.ready $(AUDIT_VENV)/.ready  ## List what is installed, in build/sbom.json (CycloneDX).
	@mkdir -p build
	$(AUDIT_VENV)/bin/cyclonedx-py environment $(RUN) --pyproject pyproject.toml --output-reproducible --of JSON -o build/sbom.json

audit: $(VENV)/.ready $(AUDIT_VENV)/.ready  ## Look for known vulnerabilities in all that is locked; needs the network.
	$(RUN) deploy/tools/audit.py --strict

bench: $(VENV)/.ready  ## Measure the speed of steps, solver, transport and engine.
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps -r requirements/benchmarks.lock
	$(RUN) benchmarks/run_all.py

scaling: $(VENV)/.ready  ## Measure how the service scales; write the figures of docs/scaling.md.
	$(RUN) benchmarks/scaling.py

grid: $(VENV)/.ready  ## Re-run the recorded search of the autoencoder's settings.
	$(RUN) benchmarks/autoencoder_grid.py

study: $(VENV)/.ready  ## Go on with the convergence study, then write its tables and plots.
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps -r requirements/benchmarks.lock
	$(RUN) benchmarks/convergence.py run --jobs 2
	$(RUN) benchmarks/convergence.py report

faults: $(VENV)/.ready  ## Train under seeded faults: ten runs, a line of JSON at the end.
	@OMP_NUM_THREADS=1 $(RUN) -m tests.faults $(ARGS)

fuzz: $(VENV)/.ready  ## Fuzz the decoders with atheris, then a server with 100,000 frames and 1,000 streams.
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps -r requirements/fuzz.lock
	$(RUN) tests/fuzz/guided.py
	$(RUN) tests/fuzz/run.py

soak: $(VENV)/.ready  ## Let sessions come and go for MINUTES (30); the server must not grow.
	$(RUN) tests/soak/run.py --minutes $(or $(MINUTES),30) --plot soak.png

deploy-check: $(VENV)/.ready $(DEPLOY_TOOLS)/.ready  ## Check the Dockerfile, the chart and the manifests for KubeRay.
	$(DEPLOY_TOOLS)/bin/hadolint Dockerfile
	DEPLOY_TOOLS=$(CURDIR)/$(DEPLOY_TOOLS) $(RUN) -m pytest tests/deploy

image-check:  ## Build the image, and use it as Kubernetes would; needs root and Debian, takes minutes.
	deploy/image/check.sh

clean:  ## Remove the virtual environments and caches.
	rm -rf $(VENV) $(PROTO_VENV) $(AUDIT_VENV) build .floor .mypy_cache .pytest_cache .ruff_cache .hypothesis

# NIXL, for Ray Direct Transport, is for Linux only.
$(VENV)/.ready: requirements/dev.lock requirements/oracle.lock requirements/nixl.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "skfac needs Python 3.11 or newer; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements/dev.lock
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps -r requirements/oracle.lock
	@test "$$(uname -s)" != Linux || $(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps -r requirements/nixl.lock
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

$(VENV)/.page: requirements/page.lock $(VENV)/.ready
	@command -v chromium chromedriver >/dev/null || { test "$$(id -u)" = 0 \
	  && deploy/tools/apt_install.sh chromium chromium-driver; } \
	  || { echo "Install Debian's packages chromium and chromium-driver first."; exit 1; }
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps -r requirements/page.lock
	@touch $@

.floor/.ready: requirements/floor.lock $(VENV)/.ready
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --upgrade --target .floor -r requirements/floor.lock
	@touch $@

$(AUDIT_VENV)/.ready: requirements/audit.lock
	$(PYTHON) -m venv $(AUDIT_VENV)
	$(AUDIT_VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements/audit.lock
	@touch $@

$(DEPLOY_TOOLS)/.ready: requirements/deploy.lock deploy/schemas/package-lock.json deploy/tools/fetch_deploy.py $(VENV)/.ready
	$(RUN) deploy/tools/fetch_deploy.py $(DEPLOY_TOOLS)
	@touch $@

$(PROTO_VENV)/.ready: requirements/proto.lock
	$(PYTHON) -m venv $(PROTO_VENV)
	$(PROTO_VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements/proto.lock
	@touch $@
