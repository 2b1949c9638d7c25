"""An engine in this process, and a server in another, for the same pushes."""

import os
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any, Protocol

import grpc

from benchmarks.speed.pinned import running_server
from skfac.service.config import EngineConfig
from skfac.service.local_engine import LocalEngine
from skfac.v1 import preconditioning_pb2 as pb
from skfac.v1 import preconditioning_pb2_grpc as rpc
from skfac.wire.channel import CLIENT_OPTIONS, SERVICE
from skfac.wire.codec import (
    encode_session,
    encode_snapshot,
)
from skfac.wire.outcome import Outcome
from skfac.wire.outcome_stream import outcomes_of
from skfac.wire.session import SessionSpec
from skfac.wire.snapshot import Snapshot

_CALL_S = 300.0
_CPU_CLOCK = 2  # as clock_getcpuclockid names the clock of a process on Linux


class Place(Protocol):
    """Where an engine runs.

    Attributes:
        pid: Its process.
    """

    pid: int

    def open(self, spec: SessionSpec, rank: int) -> str:
        """Open a session; returns its name."""

    def submit(self, name: str, snapshots: Sequence[Snapshot]) -> None:
        """Push snapshots, and return once they are accepted."""

    def outcomes(self, name: str) -> Generator[Outcome]:
        """Receive what the session publishes, without an end."""

    def history_bytes(self) -> int:
        """What it keeps of earlier updates."""

    def leave(self, name: str, rank: int) -> None:
        """Close a rank's session."""

    def cpu_s(self) -> float:
        """CPU time of its process."""
        return time.clock_gettime((~self.pid << 3) | _CPU_CLOCK)


class Here(Place):
    """An engine of this process."""

    def __init__(self, engine: LocalEngine) -> None:
        self.pid = os.getpid()
        self._engine = engine

    def open(self, spec: SessionSpec, rank: int) -> str:
        """Open a session; returns its name."""
        return self._engine.open_session(spec, rank).session_id

    def submit(self, name: str, snapshots: Sequence[Snapshot]) -> None:
        """Push snapshots, and return once they are accepted."""
        for snapshot in snapshots:
            self._engine.submit(name, snapshot)

    def outcomes(self, name: str) -> Generator[Outcome]:
        """Receive what the session publishes, without an end."""
        with closing(self._engine.subscribe(name, {})) as subscription:
            while True:
                yield from subscription.take(1.0)

    def history_bytes(self) -> int:
        """What it keeps of earlier updates."""
        return sum(one.history_bytes for one in self._engine.status().sessions)

    def leave(self, name: str, rank: int) -> None:
        """Close a rank's session."""
        self._engine.close_session(name, rank)


class OverGrpc(Place):
    """A server, through frames as a trainer on another host sends them."""

    def __init__(self, pid: int, channel: grpc.Channel) -> None:
        self.pid = pid
        self._channel = channel
        self._stub = rpc.PreconditioningServiceStub(channel)

    def open(self, spec: SessionSpec, rank: int) -> str:
        """Open a session; returns its name."""
        request = pb.OpenSessionRequest(spec=encode_session(spec), rank=rank)
        name: str = self._stub.OpenSession(request, timeout=_CALL_S).session_id
        return name

    def submit(self, name: str, snapshots: Sequence[Snapshot]) -> None:
        """Push snapshots, and return once they are accepted."""
        push: Any = self._channel.stream_stream(
            f"/{SERVICE}/PushSnapshots",
            response_deserializer=pb.PushSnapshotsResponse.FromString,
        )
        frames = (frame for one in snapshots for frame in encode_snapshot(name, one))
        for answer in push(frames, timeout=_CALL_S):
            assert not answer.HasField("refusal"), answer

    def outcomes(self, name: str) -> Generator[Outcome]:
        """Receive what the session publishes, without an end."""
        fetch: Any = self._channel.unary_stream(
            f"/{SERVICE}/StreamPreconditioners",
            pb.StreamPreconditionersRequest.SerializeToString,
        )
        call = fetch(pb.StreamPreconditionersRequest(session_id=name), timeout=_CALL_S)
        try:
            for outcomes in outcomes_of(call):
                yield from outcomes
        finally:
            call.cancel()

    def history_bytes(self) -> int:
        """What it keeps of earlier updates."""
        status = self._stub.GetStatus(pb.GetStatusRequest(), timeout=_CALL_S)
        return sum(one.history_bytes for one in status.sessions)

    def leave(self, name: str, rank: int) -> None:
        """Close a rank's session."""
        request = pb.CloseSessionRequest(session_id=name, rank=rank)
        self._stub.CloseSession(request, timeout=_CALL_S)


@contextmanager
def place(transport: str, max_sessions: int) -> Iterator[Place]:
    """Start an engine.

    Args:
        transport: `"embedded"`, or `"grpc"` for a server on the last core.
        max_sessions: That it takes.

    Yields:
        Where it runs.
    """
    if transport == "embedded":
        with closing(LocalEngine(EngineConfig(max_sessions=max_sessions))) as engine:
            yield Here(engine)
        return
    settings = ["--set", f"max_sessions={max_sessions}"]
    with (
        running_server(*settings) as (target, pid),
        grpc.insecure_channel(target, CLIENT_OPTIONS) as channel,
    ):
        yield OverGrpc(pid, channel)
