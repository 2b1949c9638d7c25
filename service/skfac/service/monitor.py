"""What an engine shows of itself: metrics, logs, and its status."""

import importlib.metadata
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from skfac.service.engine import EngineStatus, LoadStatus, SessionStatus
from skfac.service.load import BusyShare, memory_bytes
from skfac.service.metrics import Metrics
from skfac.service.recent_errors import RecentErrors
from skfac.service.scheduler import Scheduler, Task
from skfac.service.session import Session
from skfac.service.solver import Solution
from skfac.wire.errors import ServiceError, status_of
from skfac.wire.outcome import Outcome, Version

logger = logging.getLogger(__name__)


class Monitor:
    """Counts, times and remembers for people; changes nothing that is computed.

    The engine's lock guards all of it but `status`, which takes it for moments only.
    """

    def __init__(
        self, device: str, metrics: Metrics, clock: Callable[[], float]
    ) -> None:
        self._device = device
        self._metrics = metrics
        self._clock = clock
        self._started_s = clock()
        self._busy = BusyShare(self._started_s)
        self._errors = RecentErrors()

    def sessions_changed(self, count: int) -> None:
        """Say how many sessions are open."""
        self._metrics.sessions.set(count)

    def queued(self, count: int) -> None:
        """Say how many (layer, step)s wait for the solver."""
        self._metrics.queue_depth.set(count)

    def remembers(self, session: Session) -> None:
        """Say what the histories of a session take now."""
        nbytes = session.histories.nbytes
        self._metrics.history_bytes.labels(session.spec.job).set(nbytes)

    def took(self, batch: Sequence[Task], waiting: int) -> None:
        """Say that a batch, if it is not empty, goes to the solver."""
        self.queued(waiting)
        if batch:
            self._metrics.batch_size.observe(len(batch))
            self._busy.set(self._clock(), busy=True)

    def solved(self) -> None:
        """Say that the solver is back."""
        self._busy.set(self._clock(), busy=False)

    def published(
        self, session: Session, task: Task, solution: Solution, began_s: float
    ) -> None:
        """Time a (layer, step) and say what went wrong with it, if anything did."""
        job, now_s = session.spec.job, self._clock()
        outcome = solution.outcome
        self._metrics.observe_solution(task, solution, began_s, now_s)
        if isinstance(outcome, Version):
            session.latencies_s.append(now_s - task.queued_s)
            session.failing.discard(outcome.layer)
            return
        name = session.spec.layers[outcome.layer].name
        self._errors.add(now_s, job, name, outcome.reason, outcome.message)
        if outcome.layer not in session.failing:
            session.failing.add(outcome.layer)  # said once, not every step
            logger.warning("Job %r: %s", job, outcome.message)

    def recorded(self, session: Session, outcome: Outcome) -> None:
        """Count an outcome."""
        name = "solved" if isinstance(outcome, Version) else outcome.reason
        session.outcomes[name] += 1
        self._metrics.outcomes.labels(session.spec.job, name).inc()

    def refused(self, session: Session, error: ServiceError) -> None:
        """Count a snapshot that was refused."""
        job, status = session.spec.job, status_of(error).name
        session.refused += 1
        self._metrics.refused.labels(job, status).inc()
        self._errors.add(self._clock(), job, error.layer, status, str(error))
        logger.info("Job %r: refused: %s", job, error)

    @contextmanager
    def remembering(self, job: str) -> Iterator[None]:
        """Remember a refusal of anything but a snapshot.

        Raises:
            ServiceError: It.
        """
        try:
            yield
        except ServiceError as error:
            status = status_of(error).name
            self._errors.add(self._clock(), job, error.layer, status, str(error))
            raise

    def status(
        self,
        sessions: Sequence[Session],
        scheduler: Scheduler,
        lock: threading.Condition,
    ) -> EngineStatus:
        """Describe the engine.

        The lock is held for one session at a time, and not while its layers are
        described: however many there are, the engine waits for microseconds.

        Args:
            sessions: To describe.
            scheduler: The engine's.
            lock: The engine's; not held.

        Returns:
            What `skfac status` and the status page show.
        """
        described = tuple(self._session(one, scheduler, lock) for one in sessions)
        memory = memory_bytes(self._device)
        with lock:
            now_s = self._clock()
            oldest_s = scheduler.oldest_s
            waited_s = 0.0 if oldest_s is None else now_s - oldest_s
            share = self._busy.at(now_s)
            load = LoadStatus(len(scheduler), waited_s, share, *memory)
            errors = self._errors.status(now_s)
        return EngineStatus(
            version=importlib.metadata.version("skfac"),
            device=self._device,
            uptime_s=now_s - self._started_s,
            sessions=described,
            load=load,
            stages=self._metrics.stages.status(),
            errors=errors,
        )

    def _session(
        self, session: Session, scheduler: Scheduler, lock: threading.Condition
    ) -> SessionStatus:
        with lock:
            queued = scheduler.queued(session.session_id)
            status = session.status(self._clock(), queued)
            newest = session.publisher.newest_versions()
            newest_step = session.newest_step
        return replace(status, layers=session.layers_status(newest, newest_step))
