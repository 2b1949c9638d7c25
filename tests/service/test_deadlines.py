"""A real server ends calls that keep it waiting, and no others."""

import queue
import re
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry, Counter

from skfac.client import Preconditioner
from skfac.service.deadlines import Deadlines
from skfac.v1 import preconditioning_pb2 as pb
from skfac.wire.channel import SERVICE, SESSION_KEY
from tests.support.models import backward, sgd, small_cnn
from tests.support.raw_client import TIMEOUT_S, RawClient, snapshot_of, spec_of
from tests.support.servers import serving
from tests.support.values import FakeClock

IDLE_S = 0.3


@pytest.fixture
def server():
    with serving(idle_s=IDLE_S, max_streams=4) as server:
        yield server


@pytest.fixture
def client(server):
    with RawClient(server.address, spec_of("honest")) as client:
        yield client


class Stream:
    """A call whose messages are sent by hand."""

    def __init__(self, channel: grpc.Channel, method: str, metadata: Any = ()) -> None:
        self._messages: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        call: Any = channel.stream_stream(f"/{SERVICE}/{method}")
        messages = iter(self._messages.get, None)
        self.call = call(messages, timeout=TIMEOUT_S, metadata=metadata)

    def send(self, message: bytes) -> None:
        self._messages.put(message)

    def end(self) -> None:
        self._messages.put(None)

    def ended_with(self) -> grpc.StatusCode:
        with suppress(grpc.RpcError):
            list(self.call)
        self.end()
        return self.call.code()


def ended(server: Any) -> float:
    registry = server.metrics.registry
    labels = {"waited_for": "message"}
    return registry.get_sample_value("skfac_idle_calls_total", labels) or 0.0


@pytest.mark.parametrize(
    "method",
    [
        "PushSnapshots",
        "ImportState",
        "OpenSession",
        "GetStatus",
        "CloseSession",
        "ExportState",
        "StreamPreconditioners",
    ],
)
def test_a_silent_call_is_ended(server, client, method):
    status = Stream(client.channel, method).ended_with()

    assert status in {
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
    }
    assert ended(server) == 1
    assert len(client.versions_of(1)) == 2


def test_half_a_snapshot_is_ended_also_of_an_open_session(server, client):
    named = ((SESSION_KEY, client.grant.session_id),)
    stream = Stream(client.channel, "PushSnapshots", named)
    whole = pb.PushSnapshotsRequest.FromString(
        client.frames(snapshot_of(client.spec, 1))[0]
    )
    stream.send(pb.PushSnapshotsRequest(manifest=whole.manifest).SerializeToString())

    assert stream.ended_with() is not grpc.StatusCode.OK
    assert ended(server) == 1


@pytest.mark.parametrize("named", [True, False])
def test_rows_may_come_late_if_the_session_is_known(server, client, named):
    metadata = ((SESSION_KEY, client.grant.session_id),) if named else ()
    stream = Stream(client.channel, "PushSnapshots", metadata)
    if not named:
        for frame in client.frames(snapshot_of(client.spec, 1)):
            stream.send(frame)
        next(stream.call)
    silent = Stream(client.channel, "PushSnapshots")
    silent.ended_with()  # which began later and had as long
    for frame in client.frames(snapshot_of(client.spec, 2)):
        stream.send(frame)

    answer = pb.PushSnapshotsResponse.FromString(next(stream.call))
    assert (answer.step, answer.HasField("refusal")) == (2, False)
    stream.end()


@pytest.mark.parametrize("session_id", ["", "0" * 32])
def test_naming_no_open_session_buys_no_time(client, session_id):
    named = ((SESSION_KEY, session_id),)
    stream = Stream(client.channel, "PushSnapshots", named)
    assert stream.ended_with() is not grpc.StatusCode.OK


def test_silent_streams_give_their_places_back(client):
    streams = [Stream(client.channel, "PushSnapshots") for _ in range(4)]
    for stream in streams:
        stream.ended_with()

    # A caller knows that its call ended before the server's thread has left it.
    end_s = time.monotonic() + TIMEOUT_S
    while time.monotonic() < end_s:
        try:
            versions = client.versions_of(1)
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise
            time.sleep(0.02)
        else:
            assert len(versions) == 2
            return
    pytest.fail("no stream was given back")


def test_a_trainer_that_pauses_stays_connected(server):
    # Both its streams are silent for longer than idle_s, again and again.
    model = small_cnn()
    with Preconditioner(
        model, sgd(model), target=server.address, update_every=1, lag=0, on_late="wait"
    ) as preconditioner:
        for step in range(4):
            backward(model, step)
            preconditioner.step()
            with grpc.insecure_channel(server.address) as channel:
                Stream(channel, "PushSnapshots").ended_with()  # as long as the pause
        report = preconditioner.report()
    assert report["transport"]["connects"] == 1
    assert report["versions"] == {"waits": 4, "solved": 4 * len(report["layers"])}
    assert report["raw_gradients"] == 0
    assert ended(server) == 4  # those that were to be


def test_health_is_checked_and_not_watched(client):
    stub = health_pb2_grpc.HealthStub(client.channel)
    request = health_pb2.HealthCheckRequest(service="ready")

    assert stub.Check(request, timeout=TIMEOUT_S).status == 1
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Watch(request, timeout=TIMEOUT_S))
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_what_is_decompressed_counts():
    with (
        serving() as server,
        RawClient(server.address, spec_of("honest")) as client,
    ):
        call: Any = client.channel.stream_stream(f"/{SERVICE}/PushSnapshots")
        bomb = iter([bytes(50_000_000)])
        answers = call(bomb, timeout=TIMEOUT_S, compression=grpc.Compression.Gzip)
        with pytest.raises(grpc.RpcError) as caught:
            list(answers)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_failed_calls_are_counted(server, client):
    with pytest.raises(grpc.RpcError):
        client.stub.GetStatus(pb.GetStatusRequest(session_id="guess"), timeout=9.0)
    value = server.metrics.registry.get_sample_value
    labels = {"call": "GetStatus", "status": "NOT_FOUND"}
    assert value("skfac_call_errors_total", labels) == 1


def test_no_code_of_ours_reads_the_wall_clock():
    # A jump of it can then end nothing; gRPC and the standard library look themselves.
    # Certificates are another matter: they end by it.
    root = Path(__file__).parents[2]
    files = [
        f
        for part in ("service", "client", "proto")
        for f in root.glob(f"{part}/**/*.py")
        if f.name != "pem.py"
    ]
    assert len(files) > 50
    reads = re.compile(r"time\.time\(|datetime\.now|import time as|from time import")
    assert [f for f in files if reads.search(f.read_text())] == []


class FakeContext:
    cancelled = 0

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    def cancel(self) -> None:
        self.cancelled += 1


def test_a_peer_that_takes_nothing_is_cancelled_once():
    clock, context = FakeClock(), FakeContext()
    counter = Counter("idle", "Idle.", ("waited_for",), registry=CollectorRegistry())
    deadlines = Deadlines(10.0, counter, clock)
    with deadlines._watched(context) as call, call.waiting("room"):
        clock.now_s += 9.9
        deadlines.end_overdue()
        assert context.cancelled == 0
        clock.now_s += 0.1
        deadlines.end_overdue()
        deadlines.end_overdue()
        assert context.cancelled == 1
    deadlines.close()
    assert counter.labels("room")._value.get() == 1


def test_a_connection_without_a_handshake_is_no_call(server, client):
    host, _, port = server.address.rpartition(":")
    with socket.create_connection((host, int(port))):
        assert len(client.versions_of(1)) == 2
