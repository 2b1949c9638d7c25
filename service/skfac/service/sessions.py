"""The open sessions of an engine: who joins, who is replaced, whose lease ran out."""

import logging
import secrets
from collections import deque
from collections.abc import Callable, Iterator

from skfac.service.config import EngineConfig
from skfac.service.histories import check_finite
from skfac.service.session import Session
from skfac.wire.errors import (
    LimitExceededError,
    ServiceError,
    SessionMismatchError,
    SessionNotFoundError,
)
from skfac.wire.messages import check_layers
from skfac.wire.session import SessionSpec
from skfac.wire.state import SessionState

logger = logging.getLogger(__name__)

NO_SESSION = "There is no such session; it was closed or its lease ran out."
"""What callers are told of sessions that are not there, and of those of others."""

_REPLACED_REMEMBERED = 1024


class Sessions:
    """Sessions by their id; at most one for each job. The engine's lock guards it."""

    def __init__(
        self,
        config: EngineConfig,
        saved: Callable[[SessionSpec], SessionState] = lambda _: SessionState(()),
    ) -> None:
        self._config = config
        self._saved = saved
        self._by_id: dict[str, Session] = {}
        # Else two runs with one name would go on replacing each other.
        self._replaced: deque[tuple[str, str]] = deque(maxlen=_REPLACED_REMEMBERED)

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Session]:
        return iter(list(self._by_id.values()))

    def next_end_s(self) -> float | None:
        """Find when a lease or an assembly ends next.

        Returns:
            The time; None if nothing ends by itself.
        """
        ends = [session.lease_ends_s() for session in self]
        ends += [session.assembler.deadline_s for session in self]
        return min((end for end in ends if end is not None), default=None)

    def nothing_waits(self) -> bool:
        """Tell whether no rows wait for those of other ranks.

        Returns:
            Whether it is so.
        """
        return all(session.assembler.deadline_s is None for session in self)

    def find(self, session_id: str) -> Session:
        """Look a session up.

        Returns:
            The open session.

        Raises:
            SessionNotFoundError: If there is none with this id.
        """
        session = self.get(session_id)
        if session is None:
            raise SessionNotFoundError(NO_SESSION)
        return session

    def get(self, session_id: str) -> Session | None:
        """Look a session up that may have been closed.

        Returns:
            The open session, or None.
        """
        return self._by_id.get(session_id)

    def of_job(self, job: str) -> Session | None:
        """Look a job's session up.

        Returns:
            Its open session, or None.
        """
        return next((s for s in self._by_id.values() if s.spec.job == job), None)

    def check(self, spec: SessionSpec, rank: int) -> None:
        """Check that a rank may open or join the session of its job.

        Raises:
            InvalidRequestError: If `rank` is outside the world.
            SessionMismatchError: If the job's session has another specification, or a
                newer run of the job has replaced this one.
            LimitExceededError: If there are too many sessions, ranks or layers.
        """
        spec.check_rank(rank)
        if (spec.job, spec.instance) in self._replaced:
            raise SessionMismatchError(
                f"Job {spec.job!r} was started again; this run of it is over. Give "
                "runs that are meant to go on side by side different job names."
            )
        whose, count = f"Job {spec.job!r} declares", len(spec.layers)
        check_layers(whose, count, self._config.max_layers)
        if spec.world_size * count > self._config.max_rank_layers:
            raise LimitExceededError(
                f"{whose} {count} layers on {spec.world_size} ranks; max_rank_layers = "
                f"{self._config.max_rank_layers}."
            )
        session = self.of_job(spec.job)
        if session is None and len(self._by_id) >= self._config.max_sessions:
            raise LimitExceededError(
                f"There are {len(self._by_id)} sessions; max_sessions = "
                f"{self._config.max_sessions}."
            )
        if session is not None and session.spec.instance == spec.instance:
            difference = session.spec.first_difference(spec)
            if difference is not None:
                raise SessionMismatchError(
                    f"Rank {rank} of job {spec.job!r} differs from its session: "
                    f"{difference}."
                )

    def open(self, spec: SessionSpec, now_s: float) -> Session:
        """Open the session of a job that has none.

        Returns:
            The new session.
        """
        session = Session(secrets.token_hex(16), spec, self._config, now_s)
        self._restore(session)  # before anybody can find it: it may fail
        self._by_id[session.session_id] = session
        logger.info("Job %r opened: %d layers.", spec.job, len(spec.layers))
        return session

    def _restore(self, session: Session) -> None:
        state, taken_bytes = self._saved(session.spec), 0
        try:
            for layer in state.layers:
                session.histories.check_state(layer.header, taken_bytes)
                taken_bytes += layer.header.nbytes
            check_finite(state)
            session.histories.replace(state)
        except ServiceError as error:
            job = session.spec.job
            logger.warning("Job %r: its saved histories are dropped: %s", job, error)

    def replace(self, session: Session) -> None:
        """Close a session because its job was started again."""
        self._replaced.append((session.spec.job, session.spec.instance))
        self.close(session, SessionNotFoundError("The job was started again."))

    def close(self, session: Session, why: ServiceError) -> None:
        """Close a session and tell its subscribers why."""
        del self._by_id[session.session_id]
        session.end = why
        logger.info("Job %r closed: %s", session.spec.job, why)
