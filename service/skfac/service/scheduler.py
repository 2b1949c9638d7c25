"""Decides what is solved next: fair between sessions, oldest first within one."""

from collections import deque
from dataclasses import dataclass, field

from skfac.service.assembler import Assembly
from skfac.wire.session import SessionSpec


@dataclass(frozen=True, eq=False)
class Task:
    """A complete assembly on its way to the solver.

    Attributes:
        session_id: Whose it is.
        spec: The session's specification.
        assembly: The rows.
        queued_s: When it became complete.
    """

    session_id: str
    spec: SessionSpec
    assembly: Assembly
    queued_s: float

    @property
    def cost(self) -> int:
        """Operations of both inversions, to within a small factor."""
        layer = self.spec.layers[self.assembly.layer]
        rows = sum(len(r.activations) for r in self.assembly.rows.values())
        return sum(
            rows * dim * min(rows, dim) + min(rows, dim) ** 3
            for dim in (layer.d_in, layer.d_out)
        )


@dataclass(eq=False)
class _Queue:
    tasks: deque[Task] = field(default_factory=deque)
    served: int = 0  # cost so far, raised so that an idle session earns no credit


class Scheduler:
    """Tasks of all sessions; each session gets the same share of the solver's time.

    A session's queue is bounded: once a version is past due, that is, once a task of
    the same layer is more than `lag` steps newer, it is superseded, unless the session
    waits for every version (then the trainer cannot run ahead). At exactly `lag` steps
    the trainer is waiting for it: superseding it then would let timing decide.
    """

    def __init__(self) -> None:
        self._queues: dict[str, _Queue] = {}
        self._served = 0  # of the queue that a task was taken from last

    def __len__(self) -> int:
        return sum(len(queue.tasks) for queue in self._queues.values())

    def queued(self, session_id: str) -> int:
        """Count the tasks of a session.

        Returns:
            How many wait.
        """
        return len(self._queues[session_id].tasks) if session_id in self._queues else 0

    def nbytes(self, session_id: str) -> int:
        """Measure the tasks of a session.

        Returns:
            Bytes of the rows that wait.
        """
        queue = self._queues.get(session_id)
        return sum(task.assembly.nbytes for task in queue.tasks) if queue else 0

    def add(self, task: Task) -> list[Task]:
        """Queue a task.

        Returns:
            The tasks that it supersedes, which are queued no longer.
        """
        queue = self._queues.setdefault(task.session_id, _Queue())
        if not queue.tasks:
            queue.served = max(queue.served, self._served)
        superseded = [old for old in queue.tasks if _supersedes(task, old)]
        for old in superseded:
            queue.tasks.remove(old)
        queue.tasks.append(task)
        return superseded

    def take(self) -> Task | None:
        """Choose the next task.

        Returns:
            The oldest task of the session that was served least, or None.
        """
        waiting = [queue for queue in self._queues.values() if queue.tasks]
        if not waiting:
            return None
        queue = min(waiting, key=lambda q: q.served)
        task = queue.tasks.popleft()
        self._served = queue.served
        queue.served += task.cost
        return task

    def drop_session(self, session_id: str) -> None:
        """Forget a session and its tasks."""
        self._queues.pop(session_id, None)


def _supersedes(new: Task, old: Task) -> bool:
    return (
        new.spec.on_late != "wait"
        and new.assembly.layer == old.assembly.layer
        and new.assembly.step > old.assembly.step + new.spec.lag
    )
