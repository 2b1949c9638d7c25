"""A server that stops publishes what it has accepted before its streams end."""

import threading

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from skfac.service.solver import Solver
from skfac.wire.outcome import Outcome, Version
from tests.support.raw_client import TIMEOUT_S, RawClient, snapshot_of, spec_of
from tests.support.servers import serving


@pytest.fixture
def allowed(monkeypatch):
    """Nothing is solved until this is set."""
    solve, allowed = Solver.solve, threading.Event()

    def delayed(self, batch):
        allowed.wait(TIMEOUT_S)
        return solve(self, batch)

    monkeypatch.setattr(Solver, "solve", delayed)
    yield allowed
    allowed.set()


def health_of(client, name):
    stub = health_pb2_grpc.HealthStub(client.channel)
    request = health_pb2.HealthCheckRequest(service=name)
    return stub.Check(request, timeout=TIMEOUT_S).status


def test_what_was_accepted_is_published(allowed):
    received: list[Outcome] = []
    with serving(grace_s=TIMEOUT_S) as server:
        with RawClient(server.address, spec_of("job")) as client:
            (answer,) = client.push(*client.frames(snapshot_of(client.spec, 3)))
            subscriber = threading.Thread(
                target=lambda: received.extend(client.outcomes(2))
            )
            subscriber.start()
            session = server._engine._sessions.of_job("job")
            while not session.subscriptions:
                pass  # the stream is about to open
            closer = threading.Thread(target=server.close)
            closer.start()
            while health_of(client, "ready") == health_pb2.HealthCheckResponse.SERVING:
                pass
            assert health_of(client, "live") == health_pb2.HealthCheckResponse.SERVING
            with pytest.raises(grpc.RpcError) as caught:
                RawClient(server.address, spec_of("late"))
            allowed.set()
            subscriber.join(TIMEOUT_S)
        closer.join(TIMEOUT_S)

    assert not answer.HasField("refusal")
    assert [(o.layer, o.step) for o in received] == [(0, 3), (1, 3)]
    assert all(isinstance(outcome, Version) for outcome in received)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
