"""Ends calls whose peer keeps a thread of the server waiting.

A synchronous gRPC server gives each call a thread and waits for its messages, and for
room to send its answers, without an end. Here one more thread looks at all calls and
cancels those that waited too long. That is true of all services of the server, so that
this is an interceptor; unary requests are read as streams of one, as gRPC would wait
for these too before any code of ours is called.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import grpc
from prometheus_client import Counter

logger = logging.getLogger(__name__)

Direction = Literal["message", "room"]


def never() -> bool:
    """Tell that a peer may not take its time.

    Returns:
        False.
    """
    return False


class _OverdueError(Exception):
    """Ends a handler whose call was cancelled, so that it takes no short stream."""


class _Call:
    def __init__(
        self, context: grpc.ServicerContext, clock: Callable[[], float]
    ) -> None:
        self.context = context
        self.may_wait = never
        self.waits_for: Direction | None = None
        self.since_s = 0.0
        self.overdue = False
        self._clock = clock

    @contextmanager
    def waiting(self, direction: Direction) -> Iterator[None]:
        self.since_s, self.waits_for = self._clock(), direction
        try:
            yield
        finally:
            self.waits_for = None


class Messages(Iterator[Any]):
    """The messages of a call, each of which must come in time."""

    def __init__(self, messages: Iterator[Any], call: _Call) -> None:
        self._messages = messages
        self._call = call

    def __next__(self) -> Any:  # noqa: ANN401  # whatever the method takes
        with self._call.waiting("message"):
            try:
                return next(self._messages)
            except StopIteration:
                if self._call.overdue:
                    raise _OverdueError from None
                raise

    def may_wait_while(self, condition: Callable[[], bool]) -> None:
        """Let the peer take its time before a message while a condition holds.

        Args:
            condition: Asked from another thread once a message is overdue.
        """
        self._call.may_wait = condition


class Deadlines(grpc.ServerInterceptor):
    """Gives every message of every call a deadline, in both directions.

    Args:
        idle_s: How long a peer may let the server wait for one message.
        ended: Counts the calls that were ended, by what they waited for.
        clock: Seconds that never jump.
    """

    def __init__(
        self, idle_s: float, ended: Counter, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._idle_s = idle_s
        self._ended = ended
        self._clock = clock
        self._lock = threading.Lock()
        self._calls: set[_Call] = set()
        self._closed = threading.Event()
        self._thread = threading.Thread(
            target=self._run, name="skfac-deadlines", daemon=True
        )
        self._thread.start()

    def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], "grpc.RpcMethodHandler[Any, Any] | None"
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Any, Any] | None":
        """Wrap the handler of a method.

        Returns:
            One that waits with a deadline; None if there is no such method.
        """
        handler = continuation(handler_call_details)
        if handler is None:
            return None
        name = handler_call_details.method
        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(
                self._streaming(handler, name),
                handler.request_deserializer,
                handler.response_serializer,
            )
        return grpc.stream_unary_rpc_method_handler(
            self._single(handler, name),
            handler.request_deserializer,
            handler.response_serializer,
        )

    def end_overdue(self) -> None:
        """Cancel the calls that have waited too long by now."""
        with self._lock:
            calls = list(self._calls)
        for call in calls:
            waits_for, waited_s = call.waits_for, self._clock() - call.since_s
            if waits_for is None or call.overdue or waited_s < self._idle_s:
                continue
            if waits_for == "message" and call.may_wait():
                call.since_s = self._clock()  # asked again after as long
                continue
            call.overdue = True
            self._ended.labels(waits_for).inc()
            logger.warning(
                "A call of %s is ended: the server waited for %s for %.1f s; idle_s = "
                "%g.",
                call.context.peer(),
                "a message" if waits_for == "message" else "room to send",
                waited_s,
                self._idle_s,
            )
            call.context.cancel()

    def close(self) -> None:
        """Watch no more; idempotent."""
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closed.wait(min(self._idle_s / 4, 1.0)):
            self.end_overdue()

    def _streaming(
        self, handler: "grpc.RpcMethodHandler[Any, Any]", name: str
    ) -> Callable[..., Iterator[Any]]:
        behavior: Any = handler.stream_stream or handler.unary_stream

        def respond(
            messages: Iterator[Any], context: grpc.ServicerContext
        ) -> Iterator[Any]:
            with self._watched(context) as call:
                request = self._request(handler, name, messages, call)
                for response in behavior(request, context):
                    with call.waiting("room"):
                        yield response

        return respond

    def _single(
        self, handler: "grpc.RpcMethodHandler[Any, Any]", name: str
    ) -> Callable[..., Any]:
        behavior: Any = handler.stream_unary or handler.unary_unary

        def respond(messages: Iterator[Any], context: grpc.ServicerContext) -> object:
            with self._watched(context) as call:
                request = self._request(handler, name, messages, call)
                return behavior(request, context)

        return respond

    @contextmanager
    def _watched(self, context: grpc.ServicerContext) -> Iterator[_Call]:
        call = _Call(context, self._clock)
        with self._lock:
            self._calls.add(call)
        try:
            yield call
        except _OverdueError:
            context.abort(
                grpc.StatusCode.DEADLINE_EXCEEDED,
                f"No message came for idle_s = {self._idle_s:g} s.",
            )
        finally:
            with self._lock:
                self._calls.discard(call)

    def _request(
        self,
        handler: "grpc.RpcMethodHandler[Any, Any]",
        name: str,
        messages: Iterator[Any],
        call: _Call,
    ) -> object:
        timed = Messages(messages, call)
        if handler.request_streaming:
            return timed
        for request in timed:
            return request
        return call.context.abort(
            grpc.StatusCode.UNIMPLEMENTED, f"{name} takes exactly one message."
        )
