PROTO := proto/skfac/v1/preconditioning.proto
.venv-proto/.ready: requirements/proto.lock
	python3 -m venv .venv-proto
	.venv-proto/bin/pip install --quiet -r requirements/proto.lock
	touch $@
proto: .venv-proto/.ready
	PATH=$(CURDIR)/.venv-proto/bin:$$PATH .venv-proto/bin/python -m grpc_tools.protoc -Iproto \
		--python_out=proto --mypy_out=proto --grpc_python_out=proto --mypy_grpc_out=proto $(PROTO)
