"""A client that can do what ours never does: send anything, in any order."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Any

import grpc

from skfac.v1 import preconditioning_pb2 as pb
from skfac.v1 import preconditioning_pb2_grpc as rpc
from skfac.wire.channel import SERVICE
from skfac.wire.codec import (
    encode_session,
    encode_snapshot,
)
from skfac.wire.credentials import Credentials, open_channel
from skfac.wire.outcome import Outcome, Version
from skfac.wire.outcome_stream import outcomes_of
from skfac.wire.session import SessionSpec
from skfac.wire.snapshot import Snapshot
from skfac.wire.state import SessionState
from skfac.wire.state_codec import StateReceiver, encode_state
from tests.support.values import layer_spec, session_spec, snapshot

TIMEOUT_S = 30.0
DAMPING = 0.1


def spec_of(job: str, *dims: tuple[int, int], **changes: Any) -> SessionSpec:
    """A session of linear layers fc0, fc1, ... with the given (d_in, d_out)."""
    layers = (
        layer_spec(f"fc{index}", d_in, d_out)
        for index, (d_in, d_out) in enumerate(dims or ((6, 3), (3, 2)))
    )
    return session_spec(*layers, job=job, **{"lag": 1, "on_late": "wait", **changes})


def snapshot_of(
    spec: SessionSpec, step: int, *, rank: int = 0, **settings: Any
) -> Snapshot:
    """Random rows of all layers of a session."""
    return snapshot(spec, step, rank, **{"damping": DAMPING, **settings})


class RawClient:
    """One rank's session, its pushes and the outcomes, all by hand."""

    def __init__(
        self,
        address: str,
        spec: SessionSpec,
        rank: int = 0,
        credentials: Credentials | None = None,
    ) -> None:
        self.spec, self.rank = spec, rank
        self.channel = open_channel(address, credentials)
        self.stub = rpc.PreconditioningServiceStub(self.channel)
        request = pb.OpenSessionRequest(spec=encode_session(spec), rank=rank)
        self.grant = self.stub.OpenSession(request, timeout=TIMEOUT_S)

    def __enter__(self) -> "RawClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()

    def frames(self, snapshot: Snapshot) -> list[bytes]:
        """The frames of a snapshot of this session."""
        return list(encode_snapshot(self.grant.session_id, snapshot))

    def push(self, *frames: bytes) -> list[pb.PushSnapshotsResponse]:
        """Send frames on a stream of their own; returns the answers."""
        call: grpc.StreamStreamMultiCallable[bytes, pb.PushSnapshotsResponse]
        call = self.channel.stream_stream(
            f"/{SERVICE}/PushSnapshots",
            response_deserializer=pb.PushSnapshotsResponse.FromString,
        )
        return list(call(iter(frames), timeout=TIMEOUT_S))

    def outcomes(
        self, count: int, held: Mapping[int, int] | None = None
    ) -> list[Outcome]:
        """Receive that many outcomes."""
        stream = self.subscribe(held)
        received = list(islice(decoded(stream), count))
        stream.cancel()
        return received

    def subscribe(self, held: Mapping[int, int] | None = None) -> Any:
        """Open a stream of frames of outcomes; `decoded` reads it."""
        request = pb.StreamPreconditionersRequest(
            session_id=self.grant.session_id,
            held=[
                pb.HeldVersion(layer=layer, step=step)
                for layer, step in (held or {}).items()
            ],
        )
        call: grpc.UnaryStreamMultiCallable[pb.StreamPreconditionersRequest, bytes]
        call = self.channel.unary_stream(
            f"/{SERVICE}/StreamPreconditioners",
            pb.StreamPreconditionersRequest.SerializeToString,
        )
        return call(request, timeout=TIMEOUT_S)

    def export_state(self) -> SessionState:
        """The session's histories, with every frame of them checked."""
        call: grpc.UnaryStreamMultiCallable[pb.ExportStateRequest, bytes]
        call = self.channel.unary_stream(
            f"/{SERVICE}/ExportState", pb.ExportStateRequest.SerializeToString
        )
        request = pb.ExportStateRequest(session_id=self.grant.session_id)
        receiver = StateReceiver(admit=lambda *_: None)
        for frame in call(request, timeout=TIMEOUT_S):
            receiver.receive(frame)
        session_id, state = receiver.finish()
        assert session_id == self.grant.session_id
        return state

    def import_state(self, state: SessionState) -> None:
        """Send histories for this session."""
        self.import_frames(*encode_state(self.grant.session_id, state))

    def import_frames(self, *frames: bytes) -> None:
        """Send any frames as histories."""
        call: grpc.StreamUnaryMultiCallable[bytes, pb.ImportStateResponse]
        call = self.channel.stream_unary(
            f"/{SERVICE}/ImportState",
            response_deserializer=pb.ImportStateResponse.FromString,
        )
        call(iter(frames), timeout=TIMEOUT_S)

    def versions_of(self, step: int, **settings: Any) -> list[Version]:
        """Push a good snapshot; return the versions, of the layers that have one."""
        sent = snapshot_of(self.spec, step, **settings)
        (answer,) = self.push(*self.frames(sent))
        assert not answer.HasField("refusal"), answer
        layers = range(len(self.spec.layers))
        held = dict.fromkeys(layers, step - 1) if step else {}
        outcomes = self.outcomes(len(layers), held)
        return [outcome for outcome in outcomes if isinstance(outcome, Version)]


def decoded(frames: Iterable[bytes]) -> Iterator[Outcome]:
    """Read outcomes from a stream of frames."""
    return chain.from_iterable(outcomes_of(frames))
