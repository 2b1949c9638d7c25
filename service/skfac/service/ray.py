"""Ray front end: the engine in actors, and pools of them that have a name."""

import logging
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Self

try:
    import ray
except ImportError as error:
    text = "An engine in Ray's actors needs Ray: pip install '.[ray]' in a clone."
    raise ImportError(text) from error
from ray.actor import ActorHandle

from skfac.service.config import EngineConfig
from skfac.service.local_engine import LocalEngine
from skfac.service.metrics import Metrics
from skfac.service.polling import PolledSubscriptions
from skfac.service.ray_metrics import RayMetrics
from skfac.service.stages import RECEIVE
from skfac.v1 import preconditioning_pb2 as pb
from skfac.wire import direct
from skfac.wire.codec import (
    build_snapshot,
    decode_session,
    decode_snapshot_header,
    encode_outcomes,
    parse_snapshot_manifest,
)
from skfac.wire.errors import (
    ConfigurationError,
    InvalidRequestError,
    ServerUnavailableError,
)
from skfac.wire.messages import parse
from skfac.wire.objects import Bytes, frame_arrays, frames_of, tensors_of
from skfac.wire.pool import actor_names, actors_of
from skfac.wire.state_codec import StateReceiver, encode_state

logger = logging.getLogger(__name__)

_PUSHES, _STATES, _CONTROLS = 4, 2, 8  # threads of each kind of call
_FETCH_TIMEOUT_S = 60.0
_MIRROR_EVERY_S = 5.0
_GONE_TIMEOUT_S = 10.0
_START_TIMEOUT_S = 120.0


class EngineActor:
    """One engine in a Ray actor: translates calls, nothing else.

    Sessions, snapshots and outcomes are the messages and frames of the .proto; rows are
    arrays in the object store, read where they are. Errors of the engine are raised:
    callers find them as the `cause` of a `RayTaskError`. Each kind of call has threads
    of its own, so that bulk never holds up control.

    Args:
        settings: Of an `EngineConfig`.
        max_ranks: Ranks that can receive outcomes at once.
        takes_direct: Whether it was made for Ray Direct Transport.
    """

    def __init__(
        self, settings: Mapping[str, Any], max_ranks: int, *, takes_direct: bool
    ) -> None:
        config = EngineConfig.model_validate(settings)
        self._direct = takes_direct and direct.is_available()
        self._pinned = config.device.startswith("cuda")
        self._metrics = Metrics()
        self._engine = LocalEngine(config, self._metrics)
        self._subscriptions = PolledSubscriptions(
            self._engine, limit=max_ranks, idle_s=config.lease_s
        )
        threading.Thread(target=self._keep_house, daemon=True).start()

    def open_session(self, spec: bytes, rank: int) -> dict[str, Any]:
        """Open or join the session of a job.

        Args:
            spec: A serialized `SessionSpec`.
            rank: Of the caller.

        Returns:
            The fields of a `SessionGrant`, and as `direct` whether rows may come past
            the object store.
        """
        message = parse(pb.SessionSpec, memoryview(spec))
        grant = self._engine.open_session(decode_session(message), rank)
        return {**asdict(grant), "direct": self._direct}

    def close_session(self, session_id: str, rank: int) -> None:
        """Take one rank out; the last one closes the session."""
        self._engine.close_session(session_id, rank)

    @ray.method(concurrency_group="push")
    def submit(
        self, manifest: bytes, payload: list["ray.ObjectRef[list[Bytes]]"]
    ) -> bool:
        """Take a snapshot.

        Args:
            manifest: A serialized `SnapshotManifest`.
            payload: A reference to an array (or, past the store, a tensor) of bytes for
                each tensor. It is in a list so that Ray does not fetch it before the
                manifest is checked.

        Returns:
            False if all of its rows were here already.

        Raises:
            InvalidRequestError: If the payload is not what was declared.
            ServerUnavailableError: If the rows cannot be fetched.
        """
        message = parse_snapshot_manifest(memoryview(manifest))
        header = decode_snapshot_header(message)
        if not self._engine.admit(message.session_id, header):
            return False
        if len(payload) != 1:
            raise InvalidRequestError(f"A push has one payload, got {len(payload)}.")
        began_s = time.monotonic()
        try:
            arrays = direct.arrays_in(ray.get(payload[0], timeout=_FETCH_TIMEOUT_S))
        except ray.exceptions.RayError as error:
            text = f"The rows of step {header.step} could not be fetched: {error}"
            raise ServerUnavailableError(text) from None
        self._metrics.observe(RECEIVE, "", time.monotonic() - began_s)
        tensors = tensors_of(header.tensors, arrays)
        if self._pinned:
            tensors = [tensor.pin_memory() for tensor in tensors]
        snapshot = build_snapshot(header, tensors)
        return self._engine.submit(message.session_id, snapshot)

    def subscribe(self, session_id: str, held: dict[int, int]) -> str:
        """Ask for outcomes, beginning with those newer than `held`.

        Returns:
            The name of a subscription. It ends if nobody takes from it for as long as
            a lease lasts.
        """
        return self._subscriptions.open(session_id, held)

    @ray.method(concurrency_group="take")
    def take(self, subscription: str, timeout_s: float) -> list[Bytes]:
        """Wait for outcomes that were not taken yet.

        Returns:
            Their frames; none after `timeout_s` or `unsubscribe`.
        """
        job, since_s, outcomes = self._subscriptions.take(subscription, timeout_s)
        frames = list(encode_outcomes(outcomes)) if outcomes else []
        if frames:
            self._metrics.observe_sent(job, sum(map(len, frames)))
            self._metrics.observe_publish(job, time.monotonic() - since_s)
        return frame_arrays(frames)

    def unsubscribe(self, subscription: str) -> None:
        """End a subscription."""
        self._subscriptions.close(subscription)

    @ray.method(concurrency_group="state")
    def export_state(self, session_id: str) -> list[Bytes]:
        """Copy the histories of a session.

        Returns:
            Their frames.
        """
        state = self._engine.export_state(session_id)
        return frame_arrays(encode_state(session_id, state))

    @ray.method(concurrency_group="state")
    def import_state(self, frames: list[Bytes]) -> None:
        """Replace the histories of the session that the frames name."""
        receiver = StateReceiver(self._engine.admit_state)
        for frame in frames_of(frames):
            receiver.receive(frame)
        self._engine.import_state(*receiver.finish())

    def status(self, session_id: str = "") -> dict[str, Any]:
        """Describe one session, or all.

        Returns:
            The fields of an `EngineStatus`.
        """
        return asdict(self._engine.status(session_id))

    def drain(self, timeout_s: float) -> bool:
        """Refuse new work and wait until what was accepted is published.

        Returns:
            Whether everything was published in time.
        """
        return self._engine.drain(timeout_s)

    def _keep_house(self) -> None:
        mirror = RayMetrics(self._metrics.registry)
        while True:
            time.sleep(_MIRROR_EVERY_S)  # for as long as the process lives
            self._subscriptions.close_idle()
            try:
                mirror.update()
            except Exception:  # what nobody can scrape must not cost a session
                logger.exception("The metrics were not repeated.")


@dataclass(frozen=True, eq=False)
class EnginePool:
    """Actors that are found under one name, until `stop`.

    Attributes:
        name: Its name.
        namespace: Ray's namespace that the actors are in.
        actors: Their handles.
    """

    name: str
    namespace: str
    actors: tuple["ActorHandle[EngineActor]", ...]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def target(self) -> str:
        """What a trainer passes as `target`, for a session on one of the actors."""
        return f"ray://{self.namespace}/{self.name}"

    @property
    def targets(self) -> list[str]:
        """What it passes for its layers to be spread over all of them."""
        return [f"{self.target}/{index}" for index in range(len(self.actors))]

    def status(self, timeout_s: float = 10.0) -> list[dict[str, Any]]:
        """Ask each actor what it holds.

        Returns:
            The fields of each `EngineStatus`.

        Raises:
            ServerUnavailableError: If an actor is gone, or gives no answer in time.
        """
        with _unavailable_on_error("An actor of the pool does not answer"):
            calls = [actor.status.remote() for actor in self.actors]
            answers: list[dict[str, Any]] = ray.get(calls, timeout=timeout_s)
            return answers

    def stop(self, grace_s: float = 5.0) -> None:
        """Solve what was accepted, then end the actors for good; idempotent.

        Raises:
            ConfigurationError: If Ray is not connected.
        """
        _check_connected()  # else Ray would start a cluster to look for them
        calls: list[Any] = [actor.drain.remote(grace_s) for actor in self.actors]
        ray.wait(calls, num_returns=len(calls), timeout=grace_s + 1)
        for actor in self.actors:
            ray.kill(actor)
        end_s = time.monotonic() + _GONE_TIMEOUT_S
        while _named(self.name, self.namespace) and time.monotonic() < end_s:
            time.sleep(0.02)  # the names are free a moment later


def start_pool(
    num_actors: int = 1,
    *,
    name: str = "skfac",
    namespace: str = "skfac",
    num_gpus: float = 0,
    max_ranks: int = 64,
    takes_direct: bool = False,
    settings: Mapping[str, Any] | None = None,
    **options: Any,  # noqa: ANN401  # Ray's, of any kind
) -> EnginePool:
    """Start engines in actors of the cluster that this process is connected to.

    Args:
        num_actors: How many; a session is on one of them.
        name: Of the pool.
        namespace: Ray's namespace that the actors are in.
        num_gpus: Of each actor. The device is `"cuda"` if there are any.
        max_ranks: Ranks that can receive outcomes from one actor at once.
        takes_direct: Whether large rows come past the object store, by Ray Direct
            Transport, if trainer and actor have NIXL. Pays between hosts only.
        settings: Of an `EngineConfig`.
        options: What Ray takes for an actor besides, such as `num_cpus` (1 by default),
            `scheduling_strategy` (`"SPREAD"`, or a placement group's), `resources`,
            `lifetime` (`"detached"`) and `max_restarts` (-1: no limit).

    Returns:
        The pool, once all of its actors answer.

    Raises:
        ConfigurationError: If Ray is not connected, there is such a pool already, or a
            value is wrong.
        ServerUnavailableError: If an actor does not start.
        pydantic.ValidationError: If a setting is unknown or out of range.
    """
    _check(num_actors, name, namespace)
    engine = {"device": "cuda" if num_gpus else "cpu", **(settings or {})}
    # What devices there are is for the actor to say.
    EngineConfig.model_validate({**engine, "device": "cpu"})
    kept = {"lifetime": "detached", "max_restarts": -1}
    chosen = {"num_cpus": 1, "num_gpus": num_gpus, **kept, **options}
    groups = {"push": _PUSHES, "state": _STATES, "take": max_ranks}
    remote: Any = ray.remote  # its types know no concurrency groups
    way = {"enable_tensor_transport": True} if takes_direct else {}
    made = remote(max_concurrency=_CONTROLS, concurrency_groups=groups, **way)(
        EngineActor
    )
    actors: list[Any] = []
    try:
        for own in actor_names(name, num_actors):
            named = made.options(name=own, namespace=namespace, **chosen)
            actors.append(named.remote(engine, max_ranks, takes_direct=takes_direct))
        pool = EnginePool(name, namespace, tuple(actors))
        pool.status(_START_TIMEOUT_S)
    except BaseException:
        for actor in actors:
            ray.kill(actor)
        raise
    return pool


def join_cluster(address: str = "auto") -> None:
    """Connect this process to a running cluster, unless it is in one already.

    Raises:
        ConnectionError: If there is none at `address`.
    """
    if not ray.is_initialized():
        ray.init(address, log_to_driver=False, logging_level=logging.WARNING)


def get_pool(name: str = "skfac", namespace: str = "skfac") -> EnginePool:
    """Find a pool that was started before, perhaps by another process.

    Returns:
        The pool, with those of its actors that are not gone for good.

    Raises:
        ConfigurationError: If Ray is not connected.
        ServerUnavailableError: If there is none.
    """
    _check_connected()
    names = _named(name, namespace)
    if not names:
        raise ServerUnavailableError(
            f"There is no pool {name!r} in Ray's namespace {namespace!r}."
        )
    with _unavailable_on_error("The pool went away"):
        actors = tuple(ray.get_actor(own, namespace) for own in names)
    return EnginePool(name, namespace, actors)


def _check(num_actors: int, name: str, namespace: str) -> None:
    _check_connected()
    if num_actors < 1:
        raise ConfigurationError(f"num_actors must be at least 1, got {num_actors}.")
    for word in (name, namespace):
        if not word or "/" in word:
            raise ConfigurationError(
                f"Names of pools and namespaces are not empty and have no '/', got "
                f"{word!r}."
            )
    if _named(name, namespace):
        raise ConfigurationError(
            f"There is a pool {name!r} in namespace {namespace!r} already: stop it, "
            "use it, or choose another name."
        )


def _check_connected() -> None:
    if not ray.is_initialized():
        raise ConfigurationError("Ray is not connected: call ray.init() first.")


def _named(name: str, namespace: str) -> list[str]:
    everywhere = ray.util.list_named_actors(all_namespaces=True)
    here = {actor["name"] for actor in everywhere if actor["namespace"] == namespace}
    return [own for own in actors_of(name, here) if own in here]


@contextmanager
def _unavailable_on_error(what: str) -> Iterator[None]:
    try:
        yield
    except (ray.exceptions.RayError, ValueError) as error:
        raise ServerUnavailableError(f"{what}: {error}") from None
