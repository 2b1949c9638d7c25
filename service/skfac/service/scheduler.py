"""Decides what is solved next: fair between sessions, oldest first within one."""

from collections import OrderedDict, deque
from dataclasses import dataclass, field, replace
from functools import cached_property

from skfac.curvature.history import LayerHistory
from skfac.service.assembler import Assembly
from skfac.service.config import GiB, MiB
from skfac.wire.session import SessionSpec


@dataclass(frozen=True, eq=False)
class Task:
    """A complete assembly on its way to the solver.

    Attributes:
        session_id: Whose it is.
        spec: The session's specification.
        assembly: The rows.
        queued_s: When it became complete.
        earlier: Superseded assemblies of the layer, oldest first: there is no version
            of them, but they are in the history.
        history: The updates before those; set when the solver takes the task.
    """

    session_id: str
    spec: SessionSpec
    assembly: Assembly
    queued_s: float
    earlier: tuple[Assembly, ...] = ()
    history: LayerHistory | None = None

    @property
    def layer_key(self) -> tuple[str, int]:
        """Whose history it is folded into."""
        return self.session_id, self.assembly.layer

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return self.assembly.nbytes + sum(old.nbytes for old in self.earlier)

    @cached_property
    def parts(self) -> int:
        """Rows of one rank and step that are in it."""
        return sum(len(part.rows) for part in (*self.earlier, self.assembly))

    @cached_property
    def cost(self) -> int:
        """Operations of both inversions with a full history, to within a small factor.

        A diagonal factor costs next to nothing.
        """
        layer = self.spec.layers[self.assembly.layer]
        dims = (layer.d_out,) if layer.diagonal else (layer.d_in, layer.d_out)
        return layer.groups * sum(map(self._cost_of, dims))

    def _cost_of(self, dim: int) -> int:
        settings = self.assembly.agreed
        rows = self.assembly.count + sum(old.count for old in self.earlier)
        if self.spec.history == "window":
            rows *= settings.window
        elif self.spec.history == "ema":
            rows += min(settings.rank or dim, dim)
        return rows * dim * min(rows, dim) + min(rows, dim) ** 3

    def after(self, earlier: tuple[Assembly, ...]) -> "Task":
        """Carry assemblies that were superseded, as far as the history needs them.

        Args:
            earlier: They, oldest first; older than all that the task carries.

        Returns:
            The task that carries them.
        """
        if self.spec.history == "snapshot":
            return self
        all_of_them = (*earlier, *self.earlier, self.assembly)
        folded = [assembly for assembly in all_of_them if assembly.count]
        if folded and self.spec.history == "window":
            folded = folded[-folded[-1].agreed.window :]
        needed = tuple(old for old in folded if old is not self.assembly)
        return replace(self, earlier=needed)


@dataclass(frozen=True)
class BatchLimits:
    """How much is solved together; a batch of one task may be over them.

    The first outcome of a batch is published with the last one: cost and tasks, each of
    which takes some time whatever its cost, bound what that holds it back.

    Attributes:
        cost: Most operations.
        nbytes: Most bytes of rows.
        tasks: Most tasks.
    """

    cost: int
    nbytes: int
    tasks: int


_LIMITS = {
    "cpu": BatchLimits(cost=50_000_000, nbytes=64 * MiB, tasks=32),
    "cuda": BatchLimits(cost=10_000_000_000, nbytes=GiB, tasks=256),
}


def batch_limits(device: str) -> BatchLimits:
    """Choose limits for a device: 10 ms of a CPU core, enough to keep a GPU busy.

    Args:
        device: `"cpu"`, `"cuda"` or `"cuda:N"`.

    Returns:
        The limits.
    """
    return _LIMITS[device.partition(":")[0]]


@dataclass(eq=False)
class _Queue:
    # Of thousands of layers, under the engine's lock: nothing here looks at all tasks.
    tasks: OrderedDict[int, Task] = field(default_factory=OrderedDict)  # by number
    of_layer: dict[int, deque[int]] = field(default_factory=dict)
    served: int = 0  # cost so far, raised so that an idle session earns no credit
    nbytes: int = 0  # of the tasks
    parts: int = 0  # assemblies that are in them
    _last: int = 0

    @property
    def oldest(self) -> Task:
        return next(iter(self.tasks.values()))

    def append(self, task: Task) -> None:
        self._last += 1
        self.of_layer.setdefault(task.assembly.layer, deque()).append(self._last)
        self._put(self._last, task)

    def popleft(self) -> Task:
        number, task = next(iter(self.tasks.items()))
        self._drop(number)
        return task

    def supersede(self, new: Task) -> list[Task]:
        numbers = self.of_layer.get(new.assembly.layer, ())
        superseded = [n for n in numbers if _supersedes(new, self.tasks[n])]
        self.append(new)
        gone = {number: self.tasks[number] for number in superseded}
        carried: tuple[Assembly, ...] = ()
        for number in list(self.of_layer[new.assembly.layer]):
            task = self.tasks[number]
            if number in gone:
                carried = (*carried, *task.earlier, task.assembly)
                self._drop(number)
            elif carried:
                self._count(task, -1)
                self._put(number, task.after(carried))
                carried = ()
        return list(gone.values())

    def _put(self, number: int, task: Task) -> None:
        self.tasks[number] = task
        self._count(task, 1)

    def _drop(self, number: int) -> None:
        task = self.tasks.pop(number)
        self._count(task, -1)
        numbers = self.of_layer[task.assembly.layer]
        numbers.remove(number)
        if not numbers:
            del self.of_layer[task.assembly.layer]

    def _count(self, task: Task, sign: int) -> None:
        self.nbytes += sign * task.nbytes
        self.parts += sign * task.parts


class Scheduler:
    """Tasks of all sessions; each session gets the same share of the solver's time.

    A session's queue is bounded: once a version is past due, that is, once a task of
    the same layer is more than `lag` steps newer, it is superseded, unless the session
    waits for every version (then the trainer cannot run ahead). At exactly `lag` steps
    the trainer is waiting for it: superseding it then would let timing decide.
    """

    def __init__(self, limits: BatchLimits) -> None:
        self._limits = limits
        self._queues: dict[str, _Queue] = {}
        self._served = 0  # of the queue that a task was taken from last
        self._taken: tuple[Task, ...] = ()

    def __len__(self) -> int:
        return sum(len(queue.tasks) for queue in self._queues.values())

    @property
    def oldest_s(self) -> float | None:
        """When the task that waits the longest became complete; None if none waits."""
        heads = (q.oldest.queued_s for q in self._queues.values() if q.tasks)
        return min(heads, default=None)

    def queued(self, session_id: str) -> int:
        """Count the tasks of a session.

        Returns:
            How many wait.
        """
        return len(self._queues[session_id].tasks) if session_id in self._queues else 0

    def nbytes(self, session_id: str) -> int:
        """Measure the tasks of a session that are not solved yet.

        Returns:
            Bytes of the rows that wait, or were taken last.
        """
        queue = self._queues.get(session_id)
        taken = sum(t.nbytes for t in self._taken if t.session_id == session_id)
        return taken + (queue.nbytes if queue else 0)

    def parts(self, session_id: str) -> int:
        """Count the rows that wait, whatever their size.

        Returns:
            Rows of one layer, rank and step.
        """
        return self._queues[session_id].parts if session_id in self._queues else 0

    def add(self, task: Task) -> list[Task]:
        """Queue a task.

        What is superseded is carried by the next task of its layer, so that the rows of
        a layer are folded in the order they were queued, whatever the timing.

        Returns:
            The tasks that it supersedes, which are queued no longer.
        """
        queue = self._queues.setdefault(task.session_id, _Queue())
        if not queue.tasks:
            queue.served = max(queue.served, self._served)
        return queue.supersede(task)

    def take(self) -> tuple[Task, ...]:
        """Choose what is solved next, and forget what was taken before.

        Tasks come as if they were chosen one by one: each time the oldest of the
        session that was served least. The batch ends before a task that would take it
        over its limits, or of a layer that it has: a layer's updates are folded one
        after the other.

        Returns:
            At least one task, if any waits.
        """
        batch: list[Task] = []
        while (queue := self._least_served()) is not None:
            task = queue.oldest
            if batch and not self._fits(task, batch):
                break
            queue.popleft()
            self._served = queue.served
            queue.served += task.cost
            batch.append(task)
        self._taken = tuple(batch)
        return self._taken

    def drop_session(self, session_id: str) -> None:
        """Forget a session and its tasks."""
        self._queues.pop(session_id, None)

    def _fits(self, task: Task, batch: list[Task]) -> bool:
        whole = [*batch, task]
        return (
            len(whole) <= self._limits.tasks
            and sum(one.cost for one in whole) <= self._limits.cost
            and sum(one.nbytes for one in whole) <= self._limits.nbytes
            and all(task.layer_key != one.layer_key for one in batch)
        )

    def _least_served(self) -> _Queue | None:
        waiting = (queue for queue in self._queues.values() if queue.tasks)
        return min(waiting, key=lambda queue: queue.served, default=None)


def _supersedes(new: Task, old: Task) -> bool:
    return (
        new.spec.on_late != "wait"
        and new.assembly.layer == old.assembly.layer
        and new.assembly.step > old.assembly.step + new.spec.lag
    )
