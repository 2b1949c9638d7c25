"""gRPC front end: translates messages to engine calls and back, nothing else."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict

import grpc

from skfac.service.config import ServiceConfig
from skfac.service.deadlines import Messages
from skfac.service.engine import EngineCalls
from skfac.service.intake import Intake
from skfac.service.metrics import Metrics
from skfac.service.receiving import Receiving
from skfac.service.regions import Regions
from skfac.v1 import preconditioning_pb2 as pb
from skfac.wire.channel import SERVICE, SESSION_KEY
from skfac.wire.codec import decode_session, encode_outcomes
from skfac.wire.down_queue import DownQueue
from skfac.wire.errors import LimitExceededError, ServiceError, status_of
from skfac.wire.messages import check_layers
from skfac.wire.outcome import Outcome
from skfac.wire.state import LayerStateHeader
from skfac.wire.state_codec import Admit, StateReceiver, encode_state

_LOOK_AROUND_S = 60.0  # a stream wakes by itself; this only bounds a lost wake-up


class PreconditioningServicer:
    """Delegates every RPC to an engine; the .proto is the reference of each.

    Args:
        engine_of: Gives a call the engine as its caller may use it.
        metrics: Count what is sent.
        regions: Shared memory of the connections.
        config: Its limits, and the device that decides how rows are received.
    """

    def __init__(
        self,
        engine_of: Callable[[grpc.ServicerContext], EngineCalls],
        metrics: Metrics,
        regions: Regions,
        *,
        config: ServiceConfig,
    ) -> None:
        self._engine_of = engine_of
        self._metrics = metrics
        self._regions = regions
        self._pinned = config.device.startswith("cuda")
        self._max_layers = config.max_layers
        self._max_streams = config.max_streams
        self._free_streams = threading.Semaphore(config.max_streams)
        self._rows = Receiving("max_session_bytes", config.max_session_bytes)
        self._histories = Receiving("max_history_bytes", config.max_history_bytes)
        metrics.expect_calls(
            "OpenSession", "PushSnapshots", "StreamPreconditioners", "ImportState"
        )

    def OpenSession(
        self, request: pb.OpenSessionRequest, context: grpc.ServicerContext
    ) -> pb.OpenSessionResponse:
        with self._status_on_error("OpenSession", context):
            declared = request.spec
            whose, count = f"Job {declared.job!r} declares", len(declared.layers)
            check_layers(whose, count, self._max_layers)
            spec = decode_session(declared)
            grant = self._engine_of(context).open_session(spec, request.rank)
        return pb.OpenSessionResponse(**asdict(grant))

    def PushSnapshots(
        self, messages: Messages, context: grpc.ServicerContext
    ) -> Iterator[pb.PushSnapshotsResponse]:
        intake = Intake(
            self._engine_of(context),
            self._metrics,
            self._regions,
            session_id=_named_session(context),
            receiving=self._rows,
            max_layers=self._max_layers,
            pinned=self._pinned,
        )
        messages.may_wait_while(intake.may_wait)
        with (
            self._status_on_error("PushSnapshots", context),
            self._stream(),
            closing(intake),
        ):
            for message in messages:
                yield from intake.receive(message)
            intake.finish()

    def StreamPreconditioners(
        self, request: pb.StreamPreconditionersRequest, context: grpc.ServicerContext
    ) -> Iterator[bytes]:
        with self._status_on_error("StreamPreconditioners", context), self._stream():
            check_layers("The client holds", len(request.held), self._max_layers)
            held = {version.layer: version.step for version in request.held}
            engine = self._engine_of(context)
            subscription = engine.subscribe(request.session_id, held)
            context.add_callback(subscription.close)
            try:
                job = engine.status(request.session_id).sessions[0].job
                while context.is_active():
                    outcomes = subscription.take(_LOOK_AROUND_S)
                    queue = self._regions.queue(request.session_id, request.token)
                    for frame, nbytes in _frames(outcomes, queue):
                        self._metrics.observe_sent(job, nbytes)
                        yield frame
                    if outcomes:
                        passed_s = time.monotonic() - subscription.published_s
                        self._metrics.observe_publish(job, passed_s)
            finally:
                subscription.close()

    def CloseSession(
        self,
        request: pb.CloseSessionRequest,
        context: grpc.ServicerContext,
    ) -> pb.CloseSessionResponse:
        with self._status_on_error("CloseSession", context):
            self._engine_of(context).close_session(request.session_id, request.rank)
        return pb.CloseSessionResponse()

    def ExportState(
        self, request: pb.ExportStateRequest, context: grpc.ServicerContext
    ) -> Iterator[bytes]:
        with self._status_on_error("ExportState", context), self._stream():
            state = self._engine_of(context).export_state(request.session_id)
            yield from encode_state(request.session_id, state)

    def ImportState(
        self, messages: Messages, context: grpc.ServicerContext
    ) -> pb.ImportStateResponse:
        with (
            self._status_on_error("ImportState", context),
            self._stream(),
            ExitStack() as shares,
        ):
            engine = self._engine_of(context)
            receiver = StateReceiver(
                self._admit_state(engine, shares), self._max_layers
            )
            for message in messages:
                receiver.receive(message)
            engine.import_state(*receiver.finish())
        return pb.ImportStateResponse()

    def GetStatus(
        self, request: pb.GetStatusRequest, context: grpc.ServicerContext
    ) -> pb.GetStatusResponse:
        with self._status_on_error("GetStatus", context):
            status = self._engine_of(context).status(request.session_id)
        return pb.GetStatusResponse(**asdict(status))

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

    def _admit_state(self, engine: EngineCalls, shares: ExitStack) -> Admit:
        def admit(session_id: str, header: LayerStateHeader, taken_bytes: int) -> None:
            engine.admit_state(session_id, header, taken_bytes)
            share = self._histories.begin(session_id, header.nbytes)
            shares.enter_context(closing(share))

        return admit

    @contextmanager
    def _status_on_error(
        self, call: str, context: grpc.ServicerContext
    ) -> Iterator[None]:
        # Other exceptions are bugs: gRPC logs them and the client sees UNKNOWN.
        try:
            yield
        except ServiceError as error:
            status = status_of(error)
            self._metrics.call_errors.labels(call, status.name).inc()
            context.abort(status, str(error))
        except grpc.RpcError:  # the client has gone
            raise
        except Exception:
            self._metrics.call_errors.labels(call, "UNKNOWN").inc()
            raise

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
    outcomes: Sequence[Outcome], queue: DownQueue | None
) -> Iterator[tuple[bytes, int]]:
    # With the bytes that each of them stands for, those in shared memory among them.
    written = 0 if queue is None else queue.written_bytes
    place = None if queue is None else queue.place
    for frame in encode_outcomes(outcomes, place) if outcomes else ():
        shared = 0 if queue is None else queue.written_bytes - written
        written += shared
        yield frame, len(frame) + shared


def _named_session(context: grpc.ServicerContext) -> str:
    metadata = dict(context.invocation_metadata())
    return str(metadata.get(SESSION_KEY, ""))
