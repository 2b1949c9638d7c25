"""Snapshots and outcomes over gRPC, resumed by itself whenever the server is back."""

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import grpc
import tenacity
import torch
from torch import Tensor

from skfac.client.capture import PendingSnapshot
from skfac.client.link import Link
from skfac.client.outbox import Outbox
from skfac.v1 import preconditioning_pb2 as pb
from skfac.v1 import preconditioning_pb2_grpc as rpc
from skfac.wire.channel import CLIENT_OPTIONS, SERVICE
from skfac.wire.codec import (
    build_outcomes,
    decode_outcomes_manifest,
    encode_session,
    encode_snapshot,
)
from skfac.wire.errors import (
    InvalidRequestError,
    LimitExceededError,
    ServerUnavailableError,
    ServiceError,
    SessionNotFoundError,
    error_of,
)
from skfac.wire.frames import PayloadBuffer, decode_frame
from skfac.wire.session import SessionSpec
from skfac.wire.state import SessionState
from skfac.wire.state_codec import StateReceiver, encode_state

logger = logging.getLogger(__name__)

_CALL_TIMEOUT_S = 10.0
_STREAM_TIMEOUT_S = 3600.0  # then it is opened anew; nothing waits without an end
_GOODBYE_TIMEOUT_S = 1.0
_PAUSE_S = 0.1  # between two connections, should a server drop each at once
_BACKOFF = tenacity.wait_random_exponential(multiplier=0.2, max=5.0)
_TRANSIENT = (ServerUnavailableError, SessionNotFoundError)

_T = TypeVar("_T")


class GrpcTransport:
    """A `Transport` to one server.

    One thread keeps the connection: it opens the session, reads the answers to pushed
    snapshots, and starts over when a stream breaks. A second one receives outcomes.
    What has no outcome is sent again on each new connection; the server knows rows
    that it has already.
    """

    def __init__(self, target: str, spec: SessionSpec, rank: int, link: Link) -> None:
        self._target = target
        self._spec = spec
        self._rank = rank
        self._link = link
        self._outbox = Outbox(spec.versions_in_flight + 1)
        self._closed = threading.Event()
        self._calls: list[Any] = []
        self._connection: tuple[grpc.Channel, str] | None = None  # and the session
        self._counts: Counter[str] = Counter()
        self._thread = threading.Thread(
            target=self._run, name="skfac-link", daemon=True
        )
        self._thread.start()

    def push(self, snapshot: PendingSnapshot) -> None:
        """Take a snapshot and return at once."""
        for step in self._outbox.put(snapshot):
            self._link.lose(step, "superseded", "The sender did not keep up.")

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Make memory for rows.

        Returns:
            A tensor on the CPU, of any content.
        """
        return torch.empty(tuple(shape), dtype=dtype)

    def export_state(self, timeout_s: float) -> SessionState | None:
        """Copy what the server keeps of earlier updates.

        Returns:
            The histories, or None if no server gave them in time.
        """

        def export(channel: grpc.Channel, session_id: str) -> SessionState:
            call: grpc.UnaryStreamMultiCallable[pb.ExportStateRequest, bytes]
            call = channel.unary_stream(
                f"/{SERVICE}/ExportState", pb.ExportStateRequest.SerializeToString
            )
            receiver = StateReceiver(admit=lambda *_: None)
            request = pb.ExportStateRequest(session_id=session_id)
            for frame in call(request, timeout=timeout_s):
                receiver.receive(frame)
            return receiver.finish()[1]

        return self._call("exported", export)

    def import_state(self, state: SessionState, timeout_s: float) -> bool:
        """Let the server go on from exported histories.

        Returns:
            Whether it does.
        """

        def send(channel: grpc.Channel, session_id: str) -> bool:
            call: grpc.StreamUnaryMultiCallable[bytes, bytes]
            call = channel.stream_unary(f"/{SERVICE}/ImportState")
            call(encode_state(session_id, state), timeout=timeout_s)
            return True

        return self._call("imported", send) or False

    def counts(self) -> Mapping[str, int]:
        """Count what went over it.

        Returns:
            `connects`, `disconnects`, `sent_bytes` and `received_bytes`.
        """
        return dict(self._counts)

    def close(self) -> None:
        """Leave the session and end all threads; idempotent."""
        self._closed.set()
        self._outbox.close()
        for call in list(self._calls):
            call.cancel()
        self._thread.join()

    def _call(self, done: str, call: Callable[[grpc.Channel, str], _T]) -> _T | None:
        connection = self._connection
        try:
            if connection is None:
                raise ServerUnavailableError("No server is connected.")
            return call(*connection)
        except grpc.RpcError as error:
            why: Exception = _translated(error)
        except (ServiceError, ValueError) as error:
            why = error  # gRPC raises the latter if the channel was just closed
        logger.warning("The histories were not %s: %s", done, why)
        return None

    # ---------------------------------------------------------------- the link

    def _run(self) -> None:
        connect = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_TRANSIENT),
            wait=_BACKOFF,
            sleep=tenacity.sleep_using_event(self._closed),
            stop=tenacity.stop_when_event_set(self._closed),
            before_sleep=self._log_first_failure,
            reraise=True,
        )
        with self._link.guard():
            while not self._closed.is_set():
                try:
                    connect(self._connect_and_serve)
                except _TRANSIENT:
                    continue  # only when closed
                except ServiceError as error:
                    logger.error("%s refuses this trainer: %s", self._target, error)
                    self._link.fail(error)
                    return
                self._closed.wait(_PAUSE_S)

    def _log_first_failure(self, state: tenacity.RetryCallState) -> None:
        if state.attempt_number == 1 and state.outcome is not None:
            error = state.outcome.exception()
            logger.warning("No server at %s yet: %s", self._target, error)

    def _connect_and_serve(self) -> None:
        # Raises only if no connection came about, so that each outage starts with the
        # shortest pause. A channel of its own each time: an old one backs off longer.
        with grpc.insecure_channel(self._target, CLIENT_OPTIONS) as channel:
            session_id = self._open(channel)
            self._counts["connects"] += 1
            self._connection = channel, session_id
            self._link.set_link(up=True)
            logger.info("Connected to %s.", self._target)
            error = self._serve(channel, session_id)
            self._connection = None
            self._link.set_link(up=False)
            if self._closed.is_set():
                self._say_goodbye(channel, session_id)
                return
            self._counts["disconnects"] += 1
            logger.warning(
                "Lost %s: %s Training goes on with on_late=%r; trying to reconnect.",
                self._target,
                error,
                self._spec.on_late,
            )

    def _open(self, channel: grpc.Channel) -> str:
        request = pb.OpenSessionRequest(
            spec=encode_session(self._spec), rank=self._rank
        )
        try:
            stub = rpc.PreconditioningServiceStub(channel)
            answer = stub.OpenSession(request, timeout=_CALL_TIMEOUT_S)
        except grpc.RpcError as error:
            refusal = _translated(error)
            if isinstance(refusal, LimitExceededError) and self._counts["connects"]:
                # It had room for this trainer before: it may have again.
                raise ServerUnavailableError(str(refusal)) from None
            raise refusal from None
        return answer.session_id

    def _say_goodbye(self, channel: grpc.Channel, session_id: str) -> None:
        request = pb.CloseSessionRequest(session_id=session_id, rank=self._rank)
        try:
            stub = rpc.PreconditioningServiceStub(channel)
            stub.CloseSession(request, timeout=_GOODBYE_TIMEOUT_S)
        except grpc.RpcError as error:
            logger.debug("The session was not closed: %s", error)

    def _serve(self, channel: grpc.Channel, session_id: str) -> str:
        """Run both streams until one of them breaks.

        Returns:
            What broke it.
        """
        stop = threading.Event()
        errors: list[str] = []
        acks, outcomes = self._start_streams(channel, session_id, stop)
        self._calls = [acks, outcomes]
        if self._closed.is_set():
            acks.cancel()

        def receive() -> None:
            try:
                _run_stream(lambda: self._receive(outcomes), errors)
            finally:
                acks.cancel()

        receiver = threading.Thread(target=receive, name="skfac-receive", daemon=True)
        receiver.start()
        _run_stream(lambda: self._read_acks(acks), errors)
        outcomes.cancel()
        stop.set()
        self._outbox.wake()
        receiver.join()
        self._calls = []
        return errors[0] if errors else "The server ended the stream."

    # ---------------------------------------------------------------- the streams

    def _start_streams(
        self, channel: grpc.Channel, session_id: str, stop: threading.Event
    ) -> tuple[Any, Any]:
        # By path, not by stub: frames pass as plain bytes.
        push: grpc.StreamStreamMultiCallable[bytes, pb.PushSnapshotsResponse]
        push = channel.stream_stream(
            f"/{SERVICE}/PushSnapshots",
            response_deserializer=pb.PushSnapshotsResponse.FromString,
        )
        fetch: grpc.UnaryStreamMultiCallable[pb.StreamPreconditionersRequest, bytes]
        fetch = channel.unary_stream(
            f"/{SERVICE}/StreamPreconditioners",
            pb.StreamPreconditionersRequest.SerializeToString,
        )
        return (
            push(self._frames(session_id, stop), timeout=_STREAM_TIMEOUT_S),
            fetch(self._subscription(session_id), timeout=_STREAM_TIMEOUT_S),
        )

    def _frames(self, session_id: str, stop: threading.Event) -> Iterator[bytes]:
        step = -1
        while (snapshot := self._outbox.next_after(step, stop)) is not None:
            step = snapshot.step
            for frame in encode_snapshot(session_id, snapshot):
                self._counts["sent_bytes"] += len(frame)
                yield frame

    def _read_acks(self, acks: Iterator[pb.PushSnapshotsResponse]) -> None:
        for ack in acks:
            if ack.HasField("refusal"):
                self._outbox.discard(ack.step)
                self._link.lose(ack.step, "refused", ack.refusal.message)

    def _subscription(self, session_id: str) -> pb.StreamPreconditionersRequest:
        held = (
            pb.HeldVersion(layer=layer, step=step)
            for layer, step in self._link.newest().items()
        )
        return pb.StreamPreconditionersRequest(
            session_id=session_id, rank=self._rank, held=held
        )

    def _receive(self, frames: Iterator[bytes]) -> None:
        message, buffer = None, None
        for data in frames:
            self._counts["received_bytes"] += len(data)
            frame = decode_frame(data)
            if frame.manifest is not None:
                message, headers = decode_outcomes_manifest(frame.manifest)
                buffer = PayloadBuffer(headers)
            if message is None or buffer is None:
                raise InvalidRequestError("A payload came without a manifest.")
            buffer.write(frame.payload)
            if buffer.complete:
                outcomes = build_outcomes(message, buffer.tensors())
                for step in self._link.receive(outcomes):
                    self._outbox.discard(step)
                message, buffer = None, None


def _run_stream(body: Callable[[], None], errors: list[str]) -> None:
    # The first error is the cause; that the other stream was cancelled is not.
    try:
        body()
    except grpc.RpcError as error:
        if not errors:
            errors.append(str(_translated(error)))
    except ServiceError as error:
        errors.append(str(error))
    except Exception as error:  # a bug here or there must not end the link
        logger.exception("A stream failed.")
        errors.append(f"{type(error).__name__}: {error}")


def _translated(error: grpc.RpcError) -> ServiceError:
    return error_of(error.code(), error.details() or "")
