"""Ask a server's health port whether it is well; the exit code is the answer.

    python -m skfac.service.probe 127.0.0.1:50052 ready

For container engines and scripts. It imports neither torch nor the engine, so that it
can run every few seconds.
"""

import sys
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

_TIMEOUT_S = 5.0


def probe(address: str, name: str) -> str:
    """Ask for the health of a name.

    Args:
        address: `host:port` of a plain-text port with `grpc.health.v1`.
        name: `live` (the process works), `ready` (it takes work) or a service's name.

    Returns:
        `SERVING`, `NOT_SERVING`, or why there was no such answer.
    """
    with grpc.insecure_channel(address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)  # its types know no methods
        request = health_pb2.HealthCheckRequest(service=name)
        try:
            answer = stub.Check(request, timeout=_TIMEOUT_S)
        except grpc.RpcError as error:
            return f"{error.code().name}: {error.details()}"
    known: str = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    return known


def main() -> None:
    """Print the health of a name; exit with 0 if it is SERVING, else with 1."""
    if len(sys.argv) != 3:
        sys.exit("Usage: python -m skfac.service.probe HOST:PORT NAME")
    answer = probe(*sys.argv[1:])
    sys.stdout.write(f"{answer}\n")
    sys.exit(answer != "SERVING")


if __name__ == "__main__":
    main()
