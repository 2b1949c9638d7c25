"""Snapshots and outcomes over gRPC, resumed by itself whenever the server is back."""

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import grpc
import torch
from torch import Tensor

from skfac.client.capture import PendingSnapshot
from skfac.client.connection import keep_connected
from skfac.client.file_watch import FileWatch
from skfac.client.link import Link
from skfac.client.outbox import Outbox
from skfac.client.shared_link import SharedLink
from skfac.v1 import preconditioning_pb2 as pb
from skfac.v1 import preconditioning_pb2_grpc as rpc
from skfac.wire.allocator import keep_large_blocks
from skfac.wire.channel import SERVICE, SESSION_KEY
from skfac.wire.codec import (
    encode_session,
    encode_snapshot,
)
from skfac.wire.credentials import Credentials, open_channel
from skfac.wire.errors import (
    AuthenticationError,
    ConfigurationError,
    LimitExceededError,
    PermissionDeniedError,
    ServerUnavailableError,
    ServiceError,
    error_of,
)
from skfac.wire.handshake import why_unavailable
from skfac.wire.outcome_stream import outcomes_of
from skfac.wire.session import SessionSpec
from skfac.wire.state import SessionState
from skfac.wire.state_codec import StateReceiver, encode_state

logger = logging.getLogger(__name__)

_COUNTS = (
    *("connects", "disconnects", "renewals", "denials", "sent_bytes", "received_bytes"),
    *("shared_sent_bytes", "shared_received_bytes"),
)
_CALL_TIMEOUT_S = 10.0
_STREAM_TIMEOUT_S = 3600.0  # then it is opened anew; nothing waits without an end
_GOODBYE_TIMEOUT_S = 1.0
_LAST_OUTCOMES_S = 60.0  # that a server that stops gets, if it stays connected

_T = TypeVar("_T")


class GrpcTransport:
    """A `Transport` to one server.

    One thread keeps the connection: it opens the session, reads the answers to pushed
    snapshots, and starts over when a stream breaks. A second one receives outcomes.
    What has no outcome is sent again on each new connection; the server knows rows
    that it has already. Tensors go through shared memory where the server can open it,
    and otherwise in frames; each connection finds out anew.
    """

    def __init__(
        self,
        target: str,
        spec: SessionSpec,
        rank: int,
        link: Link,
        credentials: Credentials | None = None,
    ) -> None:
        open_channel(target, credentials).close()  # what is wrong is said at once
        self._target = target
        self._credentials = credentials
        self._spec = spec
        self._rank = rank
        self._link = link
        self._outbox = Outbox(spec.versions_in_flight)
        self._closed = threading.Event()
        self._calls: list[Any] = []
        self._connection: tuple[grpc.Channel, str] | None = None  # and the session
        self._shared: SharedLink | None = None  # of the connection
        self._counts: Counter[str] = Counter(dict.fromkeys(_COUNTS, 0))
        self._thread = threading.Thread(
            target=self._run, name="skfac-link", daemon=True
        )
        self._thread.start()

    def push(self, snapshot: PendingSnapshot) -> None:
        """Take a snapshot and return at once."""
        shared = self._shared
        if shared is not None:
            shared.end_snapshot()
        for step in self._outbox.put(snapshot):
            self._link.lose(step, "superseded", "The sender did not keep up.")

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Make memory for rows, where they can be sent from without a copy.

        Returns:
            A tensor of any content.
        """
        shared = self._shared
        found = None if shared is None else shared.empty(tuple(shape), dtype)
        return torch.empty(tuple(shape), dtype=dtype) if found is None else found

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
            `connects`, `disconnects`; `renewals` of the connection because files of
            the credentials changed, and `denials` of credentials; `sent_bytes` and
            `received_bytes` of frames, and `shared_sent_bytes` and
            `shared_received_bytes` of tensors that were in shared memory instead.
        """
        return dict(self._counts)

    def close(self) -> None:
        """Leave the session and end all threads; idempotent."""
        self._closed.set()
        self._outbox.close()
        self._cancel()
        self._thread.join()

    def _cancel(self) -> None:
        for call in list(self._calls):
            call.cancel()

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
        keep_large_blocks()
        keep_connected(self._connect_and_serve, self._target, self._link, self._closed)

    def _connect_and_serve(self) -> None:
        # Raises only if no connection came about, so that each outage starts with the
        # shortest pause. A channel of its own each time: an old one backs off longer,
        # and has the old files.
        files = FileWatch(self._credentials)
        with self._channel() as channel:
            grant = self._granted(channel)
            session_id = grant.session_id
            self._counts["connects"] += 1
            self._connection = channel, session_id
            self._link.set_link(up=True)
            logger.info("Connected to %s.", self._target)
            shared = SharedLink(
                self._spec, session_id, grant.max_snapshot_bytes, self._counts
            )
            self._shared = shared
            with files.watching(self._cancel):
                error = self._serve(channel, session_id, shared)
            self._connection = self._shared = None
            shared.close()
            if files.changed and not self._closed.is_set():
                # The link stays up: the next connection is a moment away.
                self._counts["renewals"] += 1
                logger.info("The credentials have changed; connecting anew.")
                return
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

    def _channel(self) -> grpc.Channel:
        try:
            return open_channel(self._target, self._credentials)
        except ConfigurationError as error:  # they were good before
            self._link.set_link(up=False)
            raise ServerUnavailableError(str(error)) from None

    def _granted(self, channel: grpc.Channel) -> pb.OpenSessionResponse:
        try:
            return self._open(channel)
        except ServiceError as error:
            self._link.set_link(up=False)
            denied = isinstance(error, AuthenticationError | PermissionDeniedError)
            self._counts["denials"] += denied
            over = denied or isinstance(error, LimitExceededError)
            if over and self._counts["connects"]:
                # It took this trainer before: it may do so again.
                raise ServerUnavailableError(str(error)) from None
            raise

    def _open(self, channel: grpc.Channel) -> pb.OpenSessionResponse:
        request = pb.OpenSessionRequest(
            spec=encode_session(self._spec), rank=self._rank
        )
        try:
            stub = rpc.PreconditioningServiceStub(channel)
            answer = stub.OpenSession(request, timeout=_CALL_TIMEOUT_S)
        except grpc.RpcError as error:
            refusal = _translated(error)
            if isinstance(refusal, ServerUnavailableError):
                why = why_unavailable(self._target, self._credentials)
                raise ServerUnavailableError(why or str(refusal)) from None
            raise refusal from None
        return answer

    def _say_goodbye(self, channel: grpc.Channel, session_id: str) -> None:
        request = pb.CloseSessionRequest(session_id=session_id, rank=self._rank)
        try:
            stub = rpc.PreconditioningServiceStub(channel)
            stub.CloseSession(request, timeout=_GOODBYE_TIMEOUT_S)
        except grpc.RpcError as error:
            logger.debug("The session was not closed: %s", error)

    def _serve(self, channel: grpc.Channel, session_id: str, shared: SharedLink) -> str:
        """Run both streams until one of them breaks.

        Returns:
            What broke it.
        """
        stop = threading.Event()
        errors: list[str] = []
        acks, outcomes = self._start_streams(channel, session_id, shared, stop)
        self._calls = [acks, outcomes]
        if self._closed.is_set():
            acks.cancel()

        def receive() -> None:
            try:
                _run_stream(lambda: self._receive(outcomes, shared), errors)
            finally:
                acks.cancel()

        receiver = threading.Thread(target=receive, name="skfac-receive", daemon=True)
        receiver.start()
        _run_stream(lambda: self._read_acks(acks, shared), errors)
        stop.set()
        self._outbox.wake()
        if acks.code() is grpc.StatusCode.UNAVAILABLE:
            # A server that stops takes no more, but sends what it has accepted.
            self._link.set_link(up=False)
            receiver.join(_LAST_OUTCOMES_S)
        outcomes.cancel()
        receiver.join()
        self._calls = []
        return errors[0] if errors else "The server ended the stream."

    # ---------------------------------------------------------------- the streams

    def _start_streams(
        self,
        channel: grpc.Channel,
        session_id: str,
        shared: SharedLink,
        stop: threading.Event,
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
        frames = self._frames(session_id, shared, stop)
        named = ((SESSION_KEY, session_id),)
        return (
            push(frames, timeout=_STREAM_TIMEOUT_S, metadata=named),
            fetch(self._subscription(session_id, shared), timeout=_STREAM_TIMEOUT_S),
        )

    def _frames(
        self, session_id: str, shared: SharedLink, stop: threading.Event
    ) -> Iterator[bytes]:
        step = -1
        while (snapshot := self._outbox.next_after(step, stop)) is not None:
            step = snapshot.step
            placed = shared.place(snapshot)
            for frame in encode_snapshot(session_id, placed, shared.locate):
                self._counts["sent_bytes"] += len(frame)
                yield frame
            yield from shared.offer(snapshot)

    def _read_acks(
        self, acks: Iterator[pb.PushSnapshotsResponse], shared: SharedLink
    ) -> None:
        for ack in acks:
            if ack.HasField("region_accepted"):
                shared.answer(accepted=ack.region_accepted)
                continue
            shared.settle(ack.step)
            if ack.HasField("refusal"):
                self._outbox.discard(ack.step)
                self._link.lose(ack.step, "refused", ack.refusal.message)

    def _subscription(
        self, session_id: str, shared: SharedLink
    ) -> pb.StreamPreconditionersRequest:
        held = (
            pb.HeldVersion(layer=layer, step=step)
            for layer, step in self._link.held().items()
        )
        return pb.StreamPreconditionersRequest(
            session_id=session_id,
            rank=self._rank,
            held=held,
            token=shared.token,
        )

    def _receive(self, frames: Iterator[bytes], shared: SharedLink) -> None:
        for outcomes in outcomes_of(map(self._counted, frames), shared.receive):
            for step in self._link.receive(outcomes):
                self._outbox.discard(step)

    def _counted(self, frame: bytes) -> bytes:
        self._counts["received_bytes"] += len(frame)
        return frame


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
