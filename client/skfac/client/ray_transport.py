"""Snapshots and outcomes over Ray, resumed by itself whenever the actor is back."""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import wait
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from skfac.client.capture import PendingSnapshot
from skfac.client.connection import keep_connected
from skfac.client.handles import ActorTarget
from skfac.client.link import Link
from skfac.client.outbox import Outbox
from skfac.wire import direct
from skfac.wire.codec import (
    encode_session,
)
from skfac.wire.errors import (
    ConfigurationError,
    InvalidRequestError,
    LimitExceededError,
    ServerUnavailableError,
    ServiceError,
    SessionMismatchError,
)
from skfac.wire.objects import arrays_of, frame_arrays, frames_of, snapshot_manifest
from skfac.wire.outcome_stream import outcomes_of
from skfac.wire.pool import actor_of_job, actors_of, pool_of
from skfac.wire.session import SessionSpec
from skfac.wire.state import SessionState
from skfac.wire.state_codec import StateReceiver, encode_state

try:
    import ray
    from ray.exceptions import ObjectStoreFullError, OutOfDiskError
except ImportError as error:
    text = "Targets of Ray need Ray: pip install '.[ray]' in a clone."
    raise ConfigurationError(text) from error

logger = logging.getLogger(__name__)

_COUNTS = "connects", "disconnects", "sent_bytes", "received_bytes", "direct_sent_bytes"
_CALL_TIMEOUT_S = 10.0
_PUSH_TIMEOUT_S = 90.0  # rows may have to come from another machine
_POLL_S = 10.0  # of one call that waits for outcomes
_GOODBYE_TIMEOUT_S = 1.0
_LOOK_AROUND_S = 0.1  # for whether to stop; answers wake a thread by themselves
_Actor = Any  # a handle, or a method of one: Ray makes them up
_Answer = Any

# Of one snapshot only: the link goes on. Other errors end it.
_REFUSALS = (InvalidRequestError, SessionMismatchError, LimitExceededError)


class RayTransport:
    """A `Transport` to one actor of a pool.

    One thread keeps the link: it opens the session, asks for outcomes again and again,
    and starts over when the actor is lost. A second one puts each snapshot into the
    object store, as one object, and sends the reference. What has no outcome is sent
    again on each new link; the engine knows rows that it has already.

    Raises:
        ConfigurationError: If this process is in no cluster of Ray and finds none.
    """

    def __init__(self, target: str, spec: SessionSpec, rank: int, link: Link) -> None:
        _join_cluster()
        self._target = target
        self._spec = spec
        self._rank = rank
        self._link = link
        self._outbox = Outbox(spec.versions_in_flight)
        self._closed = threading.Event()
        self._session: tuple[_Actor, str] | None = None  # the actor and the session
        self._counts: Counter[str] = Counter(dict.fromkeys(_COUNTS, 0))
        self._direct, self._may_be_direct = False, True
        self._thread = threading.Thread(
            target=keep_connected,
            args=(self._connect_and_serve, target, link, self._closed),
            name="skfac-link",
            daemon=True,
        )
        self._thread.start()

    def push(self, snapshot: PendingSnapshot) -> None:
        """Take a snapshot and return at once."""
        for step in self._outbox.put(snapshot):
            self._link.lose(step, "superseded", "The sender did not keep up.")

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Make memory for rows; the object store gets a copy of them.

        Returns:
            A CPU tensor of any content.
        """
        return torch.empty(tuple(shape), dtype=dtype)

    def export_state(self, timeout_s: float) -> SessionState | None:
        """Copy what the engine keeps of earlier updates.

        Returns:
            The histories, or None if no actor gave them in time.
        """
        try:
            actor, session_id = self._connected()
            frames = self._call(actor.export_state, session_id, timeout_s=timeout_s)
            receiver = StateReceiver(admit=lambda *_: None)
            for frame in frames_of(frames):
                receiver.receive(frame)
            return receiver.finish()[1]
        except ServiceError as error:
            logger.warning("The histories were not exported: %s", error)
            return None

    def import_state(self, state: SessionState, timeout_s: float) -> bool:
        """Let the engine go on from exported histories.

        Returns:
            Whether it does.
        """
        try:
            actor, session_id = self._connected()
            frames = frame_arrays(encode_state(session_id, state))
            self._call(actor.import_state, frames, timeout_s=timeout_s)
        except ServiceError as error:
            logger.warning("The histories were not imported: %s", error)
            return False
        return True

    def counts(self) -> Mapping[str, int]:
        """Count what went over it.

        Returns:
            `connects`, `disconnects`, `sent_bytes` and `received_bytes`, and of those
            sent `direct_sent_bytes`, past the object store.
        """
        return dict(self._counts)

    def close(self) -> None:
        """Leave the session and end all threads; idempotent."""
        self._closed.set()
        self._outbox.close()
        self._thread.join()

    # ---------------------------------------------------------------- the link

    def _connect_and_serve(self) -> None:
        # Raises only if no link came about, so that each outage starts with the
        # shortest pause.
        actor = _find(self._target, self._spec.job)
        session_id = self._open(actor)
        held = self._link.held()
        subscription = self._call(actor.subscribe, session_id, held)
        self._counts["connects"] += 1
        self._session = actor, session_id
        self._link.set_link(up=True)
        logger.info("Connected to %s.", self._target)
        error = self._serve(actor, session_id, subscription)
        self._session = None
        self._link.set_link(up=False)
        if self._closed.is_set():
            self._say_goodbye(actor, session_id, subscription)
            return
        self._counts["disconnects"] += 1
        logger.warning(
            "Lost %s: %s Training goes on with on_late=%r; trying to reconnect.",
            self._target,
            error,
            self._spec.on_late,
        )

    def _open(self, actor: _Actor) -> str:
        spec = encode_session(self._spec).SerializeToString()
        try:
            grant = self._call(actor.open_session, spec, self._rank)
        except LimitExceededError as refusal:
            if self._counts["connects"]:
                # It had room for this trainer before: it may have again.
                raise ServerUnavailableError(str(refusal)) from None
            raise
        # An actor of an older release does not say.
        asked = self._may_be_direct and bool(grant.get("direct"))
        self._direct = asked and direct.is_available()
        return str(grant["session_id"])

    def _serve(self, actor: _Actor, session_id: str, subscription: str) -> str:
        """Send and receive until one of both fails.

        Returns:
            What failed first.
        """
        stop = threading.Event()
        errors: list[str] = []

        def run(
            body: Callable[[_Actor, str, threading.Event], None], argument: str
        ) -> None:
            try:
                body(actor, argument, stop)
            except ServiceError as error:
                errors.append(str(error))
            except Exception as error:  # a bug here or there must not end the link
                logger.exception("The link failed.")
                errors.append(f"{type(error).__name__}: {error}")
            stop.set()
            self._outbox.wake()

        sender = threading.Thread(
            target=run, args=(self._send, session_id), name="skfac-send", daemon=True
        )
        sender.start()
        run(self._receive, subscription)
        sender.join()
        return errors[0] if errors else "It was closed."

    def _send(self, actor: _Actor, session_id: str, stop: threading.Event) -> None:
        step = -1
        while (snapshot := self._outbox.next_after(step, stop)) is not None:
            step = snapshot.step
            manifest = snapshot_manifest(session_id, snapshot)
            try:
                with _service_errors():
                    rows = self._put(snapshot.tensors)
                # In a list: the actor fetches it once it has looked at the manifest.
                timeout_s = _PUSH_TIMEOUT_S
                self._call(
                    actor.submit, manifest, [rows], timeout_s=timeout_s, stop=stop
                )
                del rows  # the memory is free with the last reference
            except _REFUSALS as error:
                self._outbox.discard(step)
                self._link.lose(step, "refused", str(error))
            except Exception:
                self._go_through_the_store()  # whatever it was that failed
                raise

    def _put(self, tensors: Sequence[Tensor]) -> "ray.ObjectRef[Any]":
        nbytes = sum(tensor.nbytes for tensor in tensors)
        self._counts["sent_bytes"] += nbytes
        if self._direct and direct.is_worth_it(tensors):
            self._counts["direct_sent_bytes"] += nbytes
            return direct.put(tensors)
        return ray.put(arrays_of(tensors))

    def _go_through_the_store(self) -> None:
        if self._direct:
            self._direct = self._may_be_direct = False
            logger.warning("Rows go through Ray's object store from now on.")

    def _receive(self, actor: _Actor, subscription: str, stop: threading.Event) -> None:
        while not stop.is_set():
            timeout_s = _POLL_S + _CALL_TIMEOUT_S
            arrays = self._call(
                actor.take, subscription, _POLL_S, timeout_s=timeout_s, stop=stop
            )
            frames = list(frames_of(arrays))
            self._counts["received_bytes"] += sum(map(len, frames))
            # Copied: the store may go before the versions that are in use.
            for outcomes in outcomes_of(frames):
                for step in self._link.receive(outcomes):
                    self._outbox.discard(step)

    def _say_goodbye(self, actor: _Actor, session_id: str, subscription: str) -> None:
        try:
            with _service_errors():
                actor.unsubscribe.remote(subscription)
                left = actor.close_session.remote(session_id, self._rank).future()
                left.result(_GOODBYE_TIMEOUT_S)
        except (ServiceError, TimeoutError) as error:
            logger.debug("The session was not closed: %s", error)

    # ---------------------------------------------------------------- calls

    def _connected(self) -> tuple[_Actor, str]:
        session = self._session
        if session is None:
            raise ServerUnavailableError("No server is connected.")
        return session

    def _call(
        self,
        method: _Actor,
        *arguments: object,
        timeout_s: float = _CALL_TIMEOUT_S,
        stop: threading.Event | None = None,
    ) -> _Answer:
        end_s = time.monotonic() + timeout_s
        with _service_errors():
            # Not ray.wait: it would start a cluster if this one is shut down meanwhile.
            answer = method.remote(*arguments).future()
            while not wait([answer], _LOOK_AROUND_S).done:
                _check_cluster()
                if self._closed.is_set() or (stop is not None and stop.is_set()):
                    raise ServerUnavailableError("The transport is stopping.")
                if time.monotonic() > end_s:
                    raise ServerUnavailableError(f"No answer within {timeout_s:g} s.")
            return answer.result()


def _join_cluster() -> None:
    if ray.is_initialized():
        return
    try:
        ray.init("auto", log_to_driver=False)
    except ConnectionError as error:
        raise ConfigurationError(
            "There is no cluster of Ray to connect to: call ray.init() before, or "
            f"start one with `ray start --head`. ({error})"
        ) from None


def _find(target: str, job: str) -> _Actor:
    if isinstance(target, ActorTarget):
        return target.handle
    namespace, pool, index = pool_of(target)
    try:
        with _service_errors():
            everywhere = ray.util.list_named_actors(all_namespaces=True)
            here = [a["name"] for a in everywhere if a["namespace"] == namespace]
            names = actors_of(pool, here)
            if index is None and names:
                index = actor_of_job(job, len(names))
            if index is None or index >= len(names):
                raise ServerUnavailableError(f"There is no {target}.")
            return ray.get_actor(names[index], namespace)
    except ValueError as error:  # the actor is gone for good, and its name with it
        raise ServerUnavailableError(str(error)) from None


def _check_cluster() -> None:
    if not ray.is_initialized():
        raise ServerUnavailableError("Ray was shut down.")


@contextmanager
def _service_errors() -> Iterator[None]:
    _check_cluster()
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ServiceError):
            raise error.cause from None
        text = f"The engine failed: {error.cause}"
        raise ServerUnavailableError(text) from None
    except (ObjectStoreFullError, OutOfDiskError) as error:
        text = f"The object store has no room: {_first_line(error)}"
        raise LimitExceededError(text) from None
    except ray.exceptions.RayError as error:
        raise ServerUnavailableError(_first_line(error)) from None


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
