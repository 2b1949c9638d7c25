"""Lets calls in that prove who they are, and shows each caller its own jobs only."""

import functools
import threading
from collections.abc import Callable, Mapping
from typing import Any

import grpc

from skfac.service.access import Access, Caller
from skfac.service.engine import (
    EngineCalls,
    EngineStatus,
    SessionGrant,
    Shown,
    Subscription,
    every_job,
)
from skfac.service.metrics import Metrics
from skfac.service.sessions import NO_SESSION
from skfac.wire.errors import AuthenticationError, SessionNotFoundError, status_of
from skfac.wire.session import SessionSpec
from skfac.wire.snapshot import Snapshot, SnapshotHeader
from skfac.wire.state import LayerStateHeader, SessionState

_OPEN = "/grpc.health.v1.Health/Check"  # probes have no token, and it tells no secret

_KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


class Guard(grpc.ServerInterceptor):
    """Keeps calls without good credentials from every handler, reflection's included.

    A call that goes on while its caller's access changes is cancelled; a client that
    still has access calls again.
    """

    def __init__(self, access: Access) -> None:
        self._access = access
        self._lock = threading.Lock()
        self._calls: dict[grpc.ServicerContext, Caller] = {}

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Any],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:  # noqa: ANN401  # gRPC's handlers have no public type
        """Put the check before a handler.

        Returns:
            The handler, which begins with the check.
        """
        handler = continuation(handler_call_details)
        if handler is None or handler_call_details.method == _OPEN:
            return handler
        behaviours = {kind: getattr(handler, kind) for kind in _KINDS}
        guarded = {
            kind: self._guarded(behaviour)
            for kind, behaviour in behaviours.items()
            if behaviour is not None
        }
        return handler._replace(**guarded)

    def refresh(self) -> None:
        """Look at the list of who may call, and end the calls of who may no longer."""
        self._access.refresh(self._cancel)

    def _cancel(self, has_changed: Callable[[Caller], bool]) -> None:
        with self._lock:
            calls = list(self._calls.items())
        for context, caller in calls:
            if has_changed(caller):
                context.cancel()

    def _guarded(self, behaviour: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(behaviour)  # gRPC looks at attributes of health's Watch
        def guarded(*arguments: Any) -> Any:  # noqa: ANN401
            self._admit(arguments[1])
            return behaviour(*arguments)

        return guarded

    def _admit(self, context: grpc.ServicerContext) -> None:
        caller = Caller.of(context)
        with self._lock:  # before the check: no change of access is missed
            self._calls[context] = caller
        if not context.add_callback(lambda: self._forget(context)):
            self._forget(context)
        try:
            self._access.check(caller)
        except AuthenticationError as error:
            context.abort(status_of(error), str(error))

    def _forget(self, context: grpc.ServicerContext) -> None:
        with self._lock:
            self._calls.pop(context, None)


class CallersEngine:
    """The engine as one caller may use it: sessions of other jobs do not exist.

    See the protocol `EngineCalls` for what its methods promise.
    """

    def __init__(
        self, engine: EngineCalls, access: Access, metrics: Metrics, caller: Caller
    ) -> None:
        self._engine = engine
        self._access = access
        self._metrics = metrics
        self._caller = caller
        self._jobs: dict[str, str] = {}  # of the sessions that this call has named

    def open_session(self, spec: SessionSpec, rank: int) -> SessionGrant:
        """Open or join the session of a job that is the caller's."""
        self._access.check_job(self._caller, spec.job)
        return self._engine.open_session(spec, rank)

    def admit(self, session_id: str, header: SnapshotHeader) -> bool:
        """Check a snapshot before its payload is received."""
        self._check(session_id)
        return self._engine.admit(session_id, header)

    def submit(self, session_id: str, snapshot: Snapshot) -> bool:
        """Take the rows of a snapshot."""
        self._check(session_id)
        return self._engine.submit(session_id, snapshot)

    def subscribe(self, session_id: str, held: Mapping[int, int]) -> Subscription:
        """Receive outcomes."""
        self._check(session_id)
        return self._engine.subscribe(session_id, held)

    def close_session(self, session_id: str, rank: int) -> None:
        """Take one rank out."""
        try:
            self._check(session_id)
        except SessionNotFoundError:
            return
        self._engine.close_session(session_id, rank)

    def export_state(self, session_id: str) -> SessionState:
        """Copy the histories of a session."""
        self._check(session_id)
        return self._engine.export_state(session_id)

    def admit_state(
        self, session_id: str, header: LayerStateHeader, taken_bytes: int
    ) -> None:
        """Check a layer's history before its payload is received."""
        self._check(session_id)
        self._engine.admit_state(session_id, header, taken_bytes)

    def import_state(self, session_id: str, state: SessionState) -> None:
        """Replace the histories of a session."""
        self._check(session_id)
        self._engine.import_state(session_id, state)

    def status(self, session_id: str = "", shown: Shown = every_job) -> EngineStatus:
        """Describe one session of the caller, or all of them."""
        if session_id:
            self._check(session_id)
        return self._engine.status(
            session_id, lambda job: shown(job) and self._access.may(self._caller, job)
        )

    def _check(self, session_id: str) -> None:
        self._access.check(self._caller)
        job = self._jobs.get(session_id)
        if not session_id:
            raise SessionNotFoundError(NO_SESSION)
        if job is None:
            (session,) = self._engine.status(session_id).sessions
            job = self._jobs[session_id] = session.job
        if not self._access.may(self._caller, job):
            self._metrics.denied.labels("other_session").inc()
            raise SessionNotFoundError(NO_SESSION)
