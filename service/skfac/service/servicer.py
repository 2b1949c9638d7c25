"""gRPC front end: translates messages to engine calls and back, nothing else."""

import importlib.metadata
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict

import grpc

from skfac.service.engine import Engine, SessionStatus
from skfac.service.intake import Intake
from skfac.service.metrics import Metrics
from skfac.service.regions import Regions
from skfac.v1 import preconditioning_pb2 as pb
from skfac.wire.channel import SERVICE
from skfac.wire.codec import decode_session, encode_outcomes
from skfac.wire.errors import LimitExceededError, ServiceError, status_of
from skfac.wire.outcome import Outcome
from skfac.wire.ring import Ring
from skfac.wire.state_codec import StateReceiver, encode_state

_LOOK_AROUND_S = 60.0  # a stream wakes by itself; this only bounds a lost wake-up


class PreconditioningServicer:
    """Delegates every RPC to an `Engine`; the .proto is the reference of each."""

    def __init__(
        self,
        engine: Engine,
        metrics: Metrics,
        regions: Regions,
        *,
        max_streams: int,
        pinned: bool,
    ) -> None:
        self._engine = engine
        self._metrics = metrics
        self._regions = regions
        self._pinned = pinned
        self._max_streams = max_streams
        self._free_streams = threading.Semaphore(max_streams)

    def OpenSession(
        self, request: pb.OpenSessionRequest, context: grpc.ServicerContext
    ) -> pb.OpenSessionResponse:
        with _status_on_error(context):
            spec = decode_session(request.spec)
            grant = self._engine.open_session(spec, request.rank)
        return pb.OpenSessionResponse(**asdict(grant))

    def PushSnapshots(
        self, messages: Iterator[bytes], context: grpc.ServicerContext
    ) -> Iterator[pb.PushSnapshotsResponse]:
        intake = Intake(self._engine, self._metrics, self._regions, pinned=self._pinned)
        with _status_on_error(context), self._stream(), closing(intake):
            for message in messages:
                yield from intake.receive(message)
            intake.finish()

    def StreamPreconditioners(
        self, request: pb.StreamPreconditionersRequest, context: grpc.ServicerContext
    ) -> Iterator[bytes]:
        with _status_on_error(context), self._stream():
            held = {version.layer: version.step for version in request.held}
            # One child for all frames: asking again would revive a closed job's series.
            sent_bytes = self._metrics.sent_bytes.labels(self._job(request.session_id))
            subscription = self._engine.subscribe(request.session_id, held)
            context.add_callback(subscription.close)
            try:
                while context.is_active():
                    outcomes = subscription.take(_LOOK_AROUND_S)
                    ring = self._regions.ring(request.session_id, request.token)
                    for frame, nbytes in _frames(outcomes, ring):
                        sent_bytes.inc(nbytes)
                        yield frame
            finally:
                subscription.close()

    def CloseSession(
        self,
        request: pb.CloseSessionRequest,
        context: grpc.ServicerContext,
    ) -> pb.CloseSessionResponse:
        with _status_on_error(context):
            self._engine.close_session(request.session_id, request.rank)
        return pb.CloseSessionResponse()

    def ExportState(
        self, request: pb.ExportStateRequest, context: grpc.ServicerContext
    ) -> Iterator[bytes]:
        with _status_on_error(context), self._stream():
            state = self._engine.export_state(request.session_id)
            yield from encode_state(request.session_id, state)

    def ImportState(
        self, messages: Iterator[bytes], context: grpc.ServicerContext
    ) -> pb.ImportStateResponse:
        with _status_on_error(context), self._stream():
            receiver = StateReceiver(self._engine.admit_state)
            for message in messages:
                receiver.receive(message)
            self._engine.import_state(*receiver.finish())
        return pb.ImportStateResponse()

    def GetStatus(
        self, request: pb.GetStatusRequest, context: grpc.ServicerContext
    ) -> pb.GetStatusResponse:
        with _status_on_error(context):
            status = self._engine.status(request.session_id)
        return pb.GetStatusResponse(
            version=importlib.metadata.version("skfac"),
            device=status.device,
            uptime_s=status.uptime_s,
            sessions=map(_session_message, status.sessions),
        )

    def handler(self) -> grpc.GenericRpcHandler:
        """Bind the methods; frames pass as bytes, all else as messages.

        Returns:
            The handler for a gRPC server.
        """
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "OpenSession": grpc.unary_unary_rpc_method_handler(
                    self.OpenSession,
                    pb.OpenSessionRequest.FromString,
                    pb.OpenSessionResponse.SerializeToString,
                ),
                "PushSnapshots": grpc.stream_stream_rpc_method_handler(
                    self.PushSnapshots,
                    response_serializer=pb.PushSnapshotsResponse.SerializeToString,
                ),
                "StreamPreconditioners": grpc.unary_stream_rpc_method_handler(
                    self.StreamPreconditioners,
                    pb.StreamPreconditionersRequest.FromString,
                ),
                "CloseSession": grpc.unary_unary_rpc_method_handler(
                    self.CloseSession,
                    pb.CloseSessionRequest.FromString,
                    pb.CloseSessionResponse.SerializeToString,
                ),
                "ExportState": grpc.unary_stream_rpc_method_handler(
                    self.ExportState, pb.ExportStateRequest.FromString
                ),
                "ImportState": grpc.stream_unary_rpc_method_handler(
                    self.ImportState,
                    response_serializer=pb.ImportStateResponse.SerializeToString,
                ),
                "GetStatus": grpc.unary_unary_rpc_method_handler(
                    self.GetStatus,
                    pb.GetStatusRequest.FromString,
                    pb.GetStatusResponse.SerializeToString,
                ),
            },
        )

    def _job(self, session_id: str) -> str:
        return self._engine.status(session_id).sessions[0].job

    @contextmanager
    def _stream(self) -> Iterator[None]:
        # Bulk streams leave the pool's last threads to control calls.
        if not self._free_streams.acquire(blocking=False):
            raise LimitExceededError(
                f"There are {self._max_streams} streams open; max_streams = "
                f"{self._max_streams}."
            )
        try:
            yield
        finally:
            self._free_streams.release()


def _frames(
    outcomes: Sequence[Outcome], ring: Ring | None
) -> Iterator[tuple[bytes, int]]:
    # With the bytes that each of them stands for, those in shared memory among them.
    written = 0 if ring is None else ring.written_bytes
    place = None if ring is None else ring.place
    for frame in encode_outcomes(outcomes, place) if outcomes else ():
        shared = 0 if ring is None else ring.written_bytes - written
        written += shared
        yield frame, len(frame) + shared


@contextmanager
def _status_on_error(context: grpc.ServicerContext) -> Iterator[None]:
    # Other exceptions are bugs: gRPC logs them and the client sees UNKNOWN.
    try:
        yield
    except ServiceError as error:
        context.abort(status_of(error), str(error))


def _session_message(status: SessionStatus) -> pb.SessionStatus:
    return pb.SessionStatus(
        **{
            **asdict(status),
            "layers": [pb.LayerStatus(**asdict(layer)) for layer in status.layers],
            "inversion": pb.LatencySummary(**asdict(status.inversion)),
        }
    )
