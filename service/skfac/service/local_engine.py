"""The engine: assembles, schedules, solves and publishes on one thread of its own."""

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from skfac.service.assembler import Assembly
from skfac.service.config import EngineConfig
from skfac.service.engine import EngineStatus, SessionGrant, Shown, every_job
from skfac.service.histories import check_finite
from skfac.service.load import memory_bytes
from skfac.service.metrics import Metrics
from skfac.service.monitor import Monitor
from skfac.service.scheduler import Scheduler, Task, batch_limits
from skfac.service.session import Session, first_bad_rows, refusal_of
from skfac.service.sessions import Sessions
from skfac.service.solver import Solution, Solver
from skfac.service.subscription import LocalSubscription
from skfac.wire.errors import ServerUnavailableError, ServiceError, SessionNotFoundError
from skfac.wire.outcome import Loss, Outcome
from skfac.wire.session import SessionSpec
from skfac.wire.snapshot import Snapshot, SnapshotHeader
from skfac.wire.state import LayerStateHeader, SessionState

logger = logging.getLogger(__name__)


class LocalEngine:
    """An `Engine` in this process; see the protocol for what its methods promise.

    One lock guards all bookkeeping, which takes microseconds; everything that takes
    longer (checking rows, inverting, encoding) happens outside of it.
    """

    def __init__(
        self,
        config: EngineConfig | None = None,
        metrics: Metrics | None = None,
        clock: Callable[[], float] = time.monotonic,
        saved: Callable[[SessionSpec], SessionState] = lambda _: SessionState(()),
    ) -> None:
        self._config = config or EngineConfig()
        self._metrics = metrics or Metrics()
        self._monitor = Monitor(self._config.device, self._metrics, clock)
        self._clock = clock
        self._changed = threading.Condition()
        self._solver = solver = Solver(self._config.device)
        solver.warm()
        self._sessions = Sessions(self._config, lambda spec: solver.load(saved(spec)))
        self._scheduler = Scheduler(batch_limits(self._config.device))
        self._solving = self._draining = self._closed = False
        self._metrics.sessions_limit.set(self._config.max_sessions)
        self._metrics.measure(
            queue_oldest_s=self._queue_oldest_s,
            device_memory=lambda: memory_bytes(self._config.device),
        )
        self._thread = threading.Thread(
            target=self._run, name="skfac-engine", daemon=True
        )
        self._thread.start()

    def open_session(self, spec: SessionSpec, rank: int) -> SessionGrant:
        """Open or join the session of a job; idempotent.

        Returns:
            The session's name and limits.

        Raises:
            ServiceError: As `Engine.open_session` lists them.
        """
        with self._changed:
            self._check_open()
            with self._monitor.remembering(spec.job):
                self._sessions.check(spec, rank)
            session = self._sessions.of_job(spec.job)
            if session is not None and session.spec.instance != spec.instance:
                self._sessions.replace(session)
                self._forget(session)
                session = None
            if session is None:
                session = self._sessions.open(spec, self._clock())
                self._metrics.open_session(spec.job)
                self._monitor.remembers(session)
                self._monitor.sessions_changed(len(self._sessions))
            session.open_ranks.add(rank)
            session.last_seen_s = self._clock()
            self._changed.notify_all()  # the thread must learn of the new lease
        return SessionGrant(
            session.session_id, self._config.lease_s, self._config.max_snapshot_bytes
        )

    def admit(self, session_id: str, header: SnapshotHeader) -> bool:
        """Check a snapshot before its payload is received.

        Returns:
            False if all of its rows are here already.

        Raises:
            ServiceError: As `Engine.admit` lists them.
        """
        with self._changed:
            return self._wants(self._touch(session_id, header), header)

    def submit(self, session_id: str, snapshot: Snapshot) -> bool:
        """Take the rows of a snapshot; they must not change afterwards.

        Returns:
            False if all of its rows were here already.

        Raises:
            ServiceError: As `Engine.submit` lists them.
        """
        if not self.admit(session_id, snapshot.header):
            return False
        bad_rows = first_bad_rows(snapshot)
        with self._changed:
            session = self._touch(session_id, snapshot.header)
            if bad_rows is not None:
                refusal = refusal_of(session.spec, snapshot.step, bad_rows)
                self._monitor.refused(session, refusal)
                self._lose_of_all(session, snapshot, str(refusal))
                raise refusal
            if not self._wants(session, snapshot.header):  # others came meanwhile
                return False
            nbytes = sum(tensor.nbytes for tensor in snapshot.tensors)
            self._metrics.received_bytes.labels(session.spec.job).inc(nbytes)
            session.newest_step = max(session.newest_step, snapshot.step)
            self._metrics.observe_report(session.spec.job, snapshot.report)
            interval_s = session.since_latest(snapshot.rank, self._clock())
            self._metrics.observe_interval(session.spec.job, interval_s)
            for assembly in session.assembler.add(snapshot, self._clock()):
                self._enqueue(session, assembly)
            self._changed.notify_all()
        return True

    def subscribe(self, session_id: str, held: Mapping[int, int]) -> LocalSubscription:
        """Receive outcomes, beginning with those newer than `held`.

        Returns:
            The subscription; close it.

        Raises:
            ServiceError: As `Engine.subscribe` lists them.
        """
        with self._changed:
            # Also while draining: what was accepted is still to be received.
            session = self._sessions.find(session_id)
            return LocalSubscription(session, held, self._changed, self._clock)

    def close_session(self, session_id: str, rank: int) -> None:
        """Take one rank out; the last one closes the session. Idempotent."""
        with self._changed:
            try:
                session = self._sessions.find(session_id)
            except SessionNotFoundError:
                return
            session.open_ranks.discard(rank)
            if not session.open_ranks:
                self._close_session(session, "All ranks have left.")

    def export_state(self, session_id: str) -> SessionState:
        """Copy the histories of a session: what was folded when it is called.

        Returns:
            They, on the host; empty with `history="snapshot"`.

        Raises:
            ServiceError: As `Engine.export_state` lists them.
        """
        with self._changed:
            # Also while draining: a checkpoint of what was accepted.
            session = self._sessions.find(session_id)
            session.last_seen_s = self._clock()
            state = session.histories.state()
        return self._solver.unload(state)

    def admit_state(
        self, session_id: str, header: LayerStateHeader, taken_bytes: int
    ) -> None:
        """Check a layer's history before its payload is received.

        Raises:
            ServiceError: As `Engine.admit_state` lists them.
        """
        with self._changed:
            session = self._touch(session_id)
            with self._monitor.remembering(session.spec.job):
                session.histories.check_state(header, taken_bytes)

    def import_state(self, session_id: str, state: SessionState) -> None:
        """Replace the histories of a session; its tensors must not change afterwards.

        Raises:
            ServiceError: As `Engine.import_state` lists them.
        """
        taken_bytes = 0
        for layer in state.layers:
            header = layer.header
            self.admit_state(session_id, header, taken_bytes)
            taken_bytes += header.nbytes
        check_finite(state)
        loaded = self._solver.load(state)
        with self._changed:
            session = self._touch(session_id)
            session.histories.replace(loaded)
            self._monitor.remembers(session)
        logger.info(
            "Job %r: imported %d histories.", session.spec.job, len(loaded.layers)
        )

    def status(self, session_id: str = "", shown: Shown = every_job) -> EngineStatus:
        """Describe one session, or all, of the jobs that are shown.

        Returns:
            What the engine holds.

        Raises:
            SessionNotFoundError: If a session is named and unknown.
        """
        with self._changed:
            named = [self._sessions.find(session_id)] if session_id else self._sessions
            sessions = [one for one in named if shown(one.spec.job)]
        whole = self._monitor.status(sessions, self._scheduler, self._changed)
        jobs = {one.spec.job for one in sessions}
        return whole.only(jobs.__contains__ if session_id else shown)

    def drain(self, timeout_s: float) -> bool:
        """Refuse new work and wait until what was accepted is published.

        Rows that others wait for are taken for half of the time.

        Returns:
            Whether everything was published in time.
        """
        ends_s = self._clock() + timeout_s
        with self._changed:
            self._draining = True
            self._changed.wait_for(self._sessions.nothing_waits, timeout_s / 2)
            for session in self._sessions:
                for assembly in session.assembler.expired(math.inf):
                    self._enqueue(session, assembly)
            self._changed.notify_all()
            return self._changed.wait_for(
                lambda: not self._solving and not len(self._scheduler),
                ends_s - self._clock(),
            )

    @property
    def open_sessions(self) -> list[Session]:
        """The sessions there are."""
        with self._changed:
            return list(self._sessions)

    def close(self) -> None:
        """Stop all work and end all subscriptions; idempotent."""
        with self._changed:
            self._draining = self._closed = True
            for session in self._sessions:
                why = ServerUnavailableError("The server is stopping.")
                self._sessions.close(session, why)
                self._forget(session)
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while self._solve_next():
            pass

    def _solve_next(self) -> bool:
        # One turn; nothing of it stays alive while the next batch is waited for.
        batch = self._next_batch()
        if not batch:
            return False
        began_s = self._clock()
        solutions = self._solve(batch)
        with self._changed:
            self._solving = False
            self._monitor.solved()
            for task, solution in zip(batch, solutions, strict=True):
                self._publish(task, solution, began_s)
            self._changed.notify_all()
        return True

    def _wants(self, session: Session, header: SnapshotHeader) -> bool:
        try:
            session.check(header)
            if not session.assembler.wants(header):
                return False
            queued_bytes = self._scheduler.nbytes(session.session_id)
            parts = self._scheduler.parts(session.session_id)
            session.check_quota(header, queued_bytes, parts)
        except ServiceError as error:
            self._monitor.refused(session, error)
            raise
        return True

    def _next_batch(self) -> list[Task]:
        with self._changed:
            while not self._closed:
                self._look_at_deadlines()
                batch = self._scheduler.take()
                self._monitor.took(batch, len(self._scheduler))
                if batch:
                    self._solving = True
                    return [self._with_history(task) for task in batch]
                self._changed.wait(self._until_deadline_s())
        return []

    def _with_history(self, task: Task) -> Task:
        histories = self._sessions.find(task.session_id).histories
        return replace(task, history=histories.of(task.assembly.layer))

    def _solve(self, batch: Sequence[Task]) -> list[Solution]:
        try:
            return self._solver.solve(batch)
        except Exception as error:
            logger.debug("The solver failed.", exc_info=True)
            text = f"{type(error).__name__}: {error}"
        if len(batch) > 1:  # a bug must not cost the other tasks
            return [solution for task in batch for solution in self._solve([task])]
        layer, step = batch[0].assembly.layer, batch[0].assembly.step
        return [Solution(Loss(layer, step, "failed", text))]

    def _look_at_deadlines(self) -> None:
        now_s = self._clock()
        for session in self._sessions:
            for assembly in session.assembler.expired(now_s):
                self._enqueue(session, assembly)
            lease_ends_s = session.lease_ends_s()
            if lease_ends_s is not None and lease_ends_s <= now_s:
                lease = f"Its lease of {self._config.lease_s:g} s ran out."
                self._close_session(session, lease)

    def _until_deadline_s(self) -> float | None:
        nearest = self._sessions.next_end_s()
        return None if nearest is None else max(nearest - self._clock(), 0.0)

    def _publish(self, task: Task, solution: Solution, began_s: float) -> None:
        session = self._sessions.get(task.session_id)
        if session is None:
            return  # closed while the solver was at it
        if solution.history is not None:
            layer, step = task.assembly.layer, task.assembly.step
            session.histories.store(layer, step, solution.history)
            self._monitor.remembers(session)
        self._monitor.published(session, task, solution, began_s)
        self._record(session, solution.outcome)

    def _enqueue(self, session: Session, assembly: Assembly) -> None:
        session.histories.begun = True
        task = Task(session.session_id, session.spec, assembly, self._clock())
        for old in self._scheduler.add(task):
            layer, step = old.assembly.layer, old.assembly.step
            text = f"Step {assembly.step} came before step {step} was solved."
            self._record(session, Loss(layer, step, "superseded", text))
        self._monitor.queued(len(self._scheduler))

    def _record(self, session: Session, outcome: Outcome) -> None:
        self._monitor.recorded(session, outcome)
        session.publisher.publish(outcome, self._clock())

    def _lose_of_all(self, session: Session, rows: Snapshot, why: str) -> None:
        # The other ranks would wait for a version of rows that never come.
        if session.spec.world_size > 1:
            for layer in session.assembler.drop(rows):
                self._record(session, Loss(layer, rows.step, "refused", why))
            self._changed.notify_all()

    def _queue_oldest_s(self) -> float:
        with self._changed:
            oldest_s = self._scheduler.oldest_s
            return 0.0 if oldest_s is None else self._clock() - oldest_s

    def _close_session(self, session: Session, why: str) -> None:
        self._sessions.close(session, SessionNotFoundError(why))
        self._forget(session)

    def _forget(self, session: Session) -> None:
        self._scheduler.drop_session(session.session_id)
        self._monitor.queued(len(self._scheduler))
        self._metrics.close_session(session.spec.job)
        self._monitor.sessions_changed(len(self._sessions))
        self._changed.notify_all()

    def _check_open(self) -> None:
        if self._draining:
            raise ServerUnavailableError("The server is stopping.")

    def _touch(self, session_id: str, rows: SnapshotHeader | None = None) -> Session:
        found = self._sessions.get(session_id)
        if rows is None or found is None or not found.assembler.completes(rows):
            self._check_open()
        session = self._sessions.find(session_id)
        session.last_seen_s = self._clock()
        return session
