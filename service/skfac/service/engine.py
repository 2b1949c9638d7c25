"""The seam between fronts and computation: what every engine can do."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol, Self

from skfac.wire.outcome import Outcome
from skfac.wire.session import SessionSpec
from skfac.wire.snapshot import Snapshot, SnapshotHeader
from skfac.wire.state import LayerStateHeader, SessionState


@dataclass(frozen=True)
class SessionGrant:
    """What a rank gets when it opens a session.

    Attributes:
        session_id: Names the session in all other calls.
        lease_s: How long the session lives without a call or an open subscription.
        max_snapshot_bytes: Largest payload of one snapshot.
    """

    session_id: str
    lease_s: float
    max_snapshot_bytes: int


@dataclass(frozen=True)
class LatencySummary:
    """Quantiles of the latest latencies, in seconds."""

    count: int
    p50_s: float
    p99_s: float


@dataclass(frozen=True)
class LayerStatus:
    """A layer and the newest version that was solved of it, if any.

    Attributes:
        name: As declared.
        newest_step: The version.
        rows: Of that version.
        behind_steps: From that version to the newest step that rows of the session
            have come of.
    """

    name: str
    newest_step: int | None
    rows: int
    behind_steps: int | None


@dataclass(frozen=True)
class SessionStatus:
    """One session as `skfac status` shows it."""

    job: str
    world_size: int
    open_ranks: int
    age_s: float
    layers: tuple[LayerStatus, ...]
    solved: int
    superseded: int
    failed: int
    refused: int
    queued: int
    inversion: LatencySummary
    history_bytes: int


@dataclass(frozen=True)
class StageStatus:
    """One part of the way of (layer, step)s, over all sessions.

    Attributes:
        stage: Its name, one of `skfac.service.stages.STAGES`.
        count: How many were timed since the engine was started.
        total_s: What they took, added up.
        latest: The latest of them.
    """

    stage: str
    count: int
    total_s: float
    latest: LatencySummary


@dataclass(frozen=True)
class LoadStatus:
    """How busy an engine is.

    Attributes:
        queue_depth: (Layer, step)s that wait for the solver.
        queue_s: How long the oldest of them has waited.
        busy_share: Of the solver's time, mostly of the last 10 s; 0 to 1.
        memory_bytes: In use on the device, or by the process if that is the CPU.
        memory_total_bytes: That there are.
    """

    queue_depth: int
    queue_s: float
    busy_share: float
    memory_bytes: int
    memory_total_bytes: int


@dataclass(frozen=True)
class RecentError:
    """Failures or refusals of one kind, told once.

    Attributes:
        job: Whose.
        layer: Of which layer; empty where no single one is at fault.
        kind: `"failed"`, `"empty"`, or the name of a refusal's status.
        message: That of the latest, cut where it is long.
        count: How many there were.
        age_s: Since the latest.
    """

    job: str
    layer: str
    kind: str
    message: str
    count: int
    age_s: float


@dataclass(frozen=True)
class EngineStatus:
    """What an engine holds, as `GetStatus` and the status page tell it."""

    version: str
    device: str
    uptime_s: float
    sessions: tuple[SessionStatus, ...]
    load: LoadStatus
    stages: tuple[StageStatus, ...]
    errors: tuple[RecentError, ...]

    def only(self, shown: "Shown") -> Self:
        """Leave out sessions and errors; load and stages stay the whole engine's.

        Args:
            shown: Whether what is of a job stays.

        Returns:
            What is left.
        """
        sessions = tuple(one for one in self.sessions if shown(one.job))
        errors = tuple(one for one in self.errors if shown(one.job))
        return replace(self, sessions=sessions, errors=errors)


Shown = Callable[[str], bool]
"""Whether what is of a job is shown."""


def every_job(job: str) -> bool:
    """Show all.

    Returns:
        True.
    """
    return True


class Subscription(Protocol):
    """The outcomes of one session as one rank receives them.

    Attributes:
        published_s: When the oldest outcome of the latest `take` was published or, if
            that is later, the subscription opened; by the engine's clock.
    """

    published_s: float

    def take(self, timeout_s: float) -> list[Outcome]:
        """Wait for outcomes that were not taken yet.

        Returns:
            They in the order they were published; empty after `timeout_s` or `close`.

        Raises:
            SessionNotFoundError: If the session is closed.
            ServerUnavailableError: If the engine is closed.
        """

    def close(self) -> None:
        """Stop receiving; idempotent."""


class EngineCalls(Protocol):
    """What callers can do with an engine.

    All methods may be called from any thread, and none waits for a computation.
    """

    def open_session(self, spec: SessionSpec, rank: int) -> SessionGrant:
        """Open or join the session of a job; idempotent.

        Raises:
            InvalidRequestError: If `rank` is outside the world.
            SessionMismatchError: If the job's session has another specification.
            LimitExceededError: If there are too many sessions or layers.
            ServerUnavailableError: If the engine is closing.
        """

    def admit(self, session_id: str, header: SnapshotHeader) -> bool:
        """Check a snapshot before its payload is received.

        Returns:
            False if all of its rows are here already: the payload is not needed.

        Raises:
            SessionNotFoundError: If the session is unknown.
            InvalidRequestError: If a shape, dtype or the window is wrong.
            SessionMismatchError: If its step is older than the rank's newest, or not
                newer than an imported history.
            LimitExceededError: If it is over a limit.
            ServerUnavailableError: If the engine is closing.
        """

    def submit(self, session_id: str, snapshot: Snapshot) -> bool:
        """Take the rows of a snapshot; they must not change afterwards.

        Returns:
            False if all of its rows were here already.

        Raises:
            SessionNotFoundError: If the session is unknown.
            InvalidRequestError: If it would not be admitted, or has NaN or infinite
                rows.
            SessionMismatchError: If its step is older than the rank's newest.
            LimitExceededError: If it is over a limit.
            ServerUnavailableError: If the engine is closing.
        """

    def subscribe(self, session_id: str, held: Mapping[int, int]) -> Subscription:
        """Receive outcomes, beginning with those newer than `held`.

        Args:
            session_id: The session.
            held: Newest step held, by layer index.

        Raises:
            SessionNotFoundError: If the session is unknown.
        """

    def close_session(self, session_id: str, rank: int) -> None:
        """Take one rank out; the last one closes the session. Idempotent."""

    def export_state(self, session_id: str) -> SessionState:
        """Copy the histories of a session: what was folded when it is called.

        Raises:
            SessionNotFoundError: If the session is unknown.
        """

    def admit_state(
        self, session_id: str, header: LayerStateHeader, taken_bytes: int
    ) -> None:
        """Check a layer's history before its payload is received.

        Args:
            session_id: The session.
            header: What the history declares.
            taken_bytes: Bytes of the histories that came with it and before it.

        Raises:
            SessionNotFoundError: If the session is unknown.
            InvalidRequestError: If the layer, a form, dtype, shape or number is wrong.
            SessionMismatchError: If a (layer, step) of the session is complete.
            LimitExceededError: If it is over a limit.
            ServerUnavailableError: If the engine is closing.
        """

    def import_state(self, session_id: str, state: SessionState) -> None:
        """Replace the histories of a session; its tensors must not change afterwards.

        Until the first (layer, step) of the session is complete this can be done again.
        After it rows of a layer must be of a later step than its history.

        Raises:
            SessionNotFoundError: If the session is unknown.
            InvalidRequestError: If it would not be admitted, has NaN or infinite
                numbers, or a layer twice.
            SessionMismatchError: If a (layer, step) of the session is complete.
            LimitExceededError: If it is over a limit.
            ServerUnavailableError: If the engine is closing.
        """

    def status(self, session_id: str = "", shown: Shown = every_job) -> EngineStatus:
        """Describe one session, or all, of the jobs that are shown.

        Raises:
            SessionNotFoundError: If a session is named and unknown.
        """


class Engine(EngineCalls, Protocol):
    """Takes snapshots, inverts their factors and publishes versions in its own time."""

    def drain(self, timeout_s: float) -> bool:
        """Refuse new work and wait until what was accepted is published.

        Returns:
            Whether everything was published in time.
        """

    def close(self) -> None:
        """Stop all work and end all subscriptions; idempotent."""
