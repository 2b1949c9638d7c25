"""Schedulers and solvers as tests use them: a task at a time."""

from collections.abc import Iterator

from skfac.service.scheduler import BatchLimits, Scheduler, Task
from skfac.service.solver import Solution, Solver

ANY = BatchLimits(cost=10**15, nbytes=10**15, tasks=10**6)
ONE = BatchLimits(cost=10**15, nbytes=10**15, tasks=1)


def one_by_one() -> Scheduler:
    """A scheduler of batches of one task."""
    return Scheduler(ONE)


def drained(scheduler: Scheduler) -> list[Task]:
    """All tasks in the order they are taken."""
    return [task for batch in batches(scheduler) for task in batch]


def batches(scheduler: Scheduler) -> Iterator[tuple[Task, ...]]:
    """All batches in the order they are taken."""
    while batch := scheduler.take():
        yield batch


def solved(task: Task, solver: Solver | None = None) -> Solution:
    """What becomes of a task alone."""
    (solution,) = (solver or Solver("cpu")).solve([task])
    return solution
