"""Tasks that are solved together: what a batch holds, and that nobody notices it."""

from contextlib import closing
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from skfac.curvature import stacks
from skfac.curvature.inverse import DenseInverse, DiagonalInverse, LowRankInverse
from skfac.curvature.invert import invert_factors
from skfac.curvature.settings import History
from skfac.service.scheduler import Task
from skfac.service.solver import ATTEMPTS, Solution, Solver
from skfac.service.warm_up import warm_up_tasks
from skfac.wire.outcome import Loss, Version
from skfac.wire.session import SessionSpec
from skfac.wire.snapshot import LayerRows, Snapshot
from skfac.wire.state import LayerState, SessionState
from tests.support.tasks import solved
from tests.support.values import (
    MIXED,
    PATIENCE_S,
    Harness,
    assembly_of,
    assert_same_history,
    assert_same_preconditioner,
    keys,
    layer_spec,
    session_spec,
    snapshot,
    task_of,
)

LAYERS = (*MIXED, layer_spec("dense", 33, 33), layer_spec("odd", 77, 5))
SETTINGS: dict[str, Any] = {"window": 2, "rank_cap": 5}


# ------------------------------------------------------------------- the solver


def mixed_batch() -> list[Task]:
    """All shapes and histories, in three sessions, with and without a past."""
    batch = []
    for history in ("snapshot", "window", "ema"):
        spec = session_spec(*LAYERS, job=history, history=history)
        for layer in range(len(LAYERS)):
            task = task_of(spec, 5, layer, count=1 + 3 * layer, **SETTINGS)
            if layer % 2 and history != "snapshot":
                before = solved(task_of(spec, 1, layer, count=9, **SETTINGS)).history
                earlier = (assembly_of([snapshot(spec, 3, **SETTINGS)], layer),)
                task = replace(task, history=before, earlier=earlier)
            batch.append(task)
    return batch


def steep_task(job: str) -> Task:
    """A task that no damping helps."""
    spec = session_spec(layer_spec("fc"), job=job)
    rows = LayerRows(0, torch.full((1, 3), 1e6), torch.full((1, 2), 1e6))
    sent = snapshot(spec, 5, damping=1e-6)
    return Task(job, spec, assembly_of([replace(sent, layers=(rows,))]), 0.0)


def assert_same_solution(actual: Solution, expected: Solution) -> None:
    assert actual.retries == expected.retries
    if expected.history is None:
        assert actual.history is None
    else:
        assert actual.history is not None
        assert_same_history(actual.history, expected.history)
    if isinstance(expected.outcome, Loss):
        assert actual.outcome == expected.outcome
        return
    assert isinstance(actual.outcome, Version)
    assert keys([actual.outcome]) == keys([expected.outcome])
    mine, theirs = actual.outcome.preconditioner, expected.outcome.preconditioner
    assert_same_preconditioner(mine, theirs)


@pytest.mark.parametrize("order", [1, -1])
def test_the_bits_do_not_depend_on_the_batch(order):
    batch = [*mixed_batch(), steep_task("steep"), task_of(session_spec(), count=0)]

    solutions = Solver("cpu").solve(batch[::order])

    assert {type(s.outcome) for s in solutions} == {Version, Loss}
    for task, solution in zip(batch[::order], solutions, strict=True):
        assert_same_solution(solution, solved(task))


@pytest.fixture
def parts(monkeypatch):
    """How many factors were inverted together, each time."""
    found: list[int] = []

    def invert(factors):
        found.append(len(factors))
        return invert_factors(factors)

    monkeypatch.setattr("skfac.curvature.layer.invert_factors", invert)
    return found


@pytest.mark.parametrize(("tasks", "expected"), [(1, 5 * [2]), (2.99, [4, 4, 2])])
def test_parts_of_a_batch_are_small_in_float64(monkeypatch, parts, tasks, expected):
    batch = [task_of(session_spec(*LAYERS), layer=0, count=8) for _ in range(5)]
    rows = batch[0].assembly.rows[0]
    size = rows.activations.double().nbytes + rows.derivatives.double().nbytes
    monkeypatch.setattr("skfac.service.solver._PART", tasks * size)

    Solver("cpu").solve(batch)

    assert parts == expected


def test_a_past_counts_as_a_part_of_its_task(monkeypatch, parts):
    spec = session_spec(history="window")
    before = solved(task_of(spec, 1, count=64)).history
    task = task_of(spec, 5, count=1)
    monkeypatch.setattr("skfac.service.solver._PART", before.nbytes)
    parts.clear()

    Solver("cpu").solve([replace(task, history=before)] * 2)
    Solver("cpu").solve([task] * 2)

    assert parts == [2, 2, 4]


def test_stacks_are_of_the_whole_batch(monkeypatch, parts):
    monkeypatch.setattr(stacks, "faster_on", lambda device: True)
    monkeypatch.setattr("skfac.service.solver._PART", 0)

    Solver("cpu").solve([task_of(session_spec()) for _ in range(3)])

    assert parts == [6]


@pytest.mark.parametrize("history", ["window", "ema"])
@pytest.mark.parametrize("rank", [None, 1])
def test_a_history_keeps_nothing_that_its_bytes_lack(history, rank):
    spec = session_spec(history=history)
    kept = solved(task_of(spec, count=2, rank_cap=rank)).history

    for moment in (*kept.activations, *kept.derivatives):
        tensors = [one for one in vars(moment).values() if isinstance(one, Tensor)]
        assert len(tensors) == 1


def test_one_that_fails_costs_no_other(monkeypatch):
    monkeypatch.setattr(stacks, "faster_on", lambda device: True)  # one part
    batch = [*mixed_batch(), task_of(session_spec(), count=0)]
    batch.insert(2, steep_task("steep"))

    solutions = Solver("cpu").solve(batch)

    assert [i for i, s in enumerate(solutions) if isinstance(s.outcome, Loss)] == [
        2,
        len(batch) - 1,
    ]
    assert [s.retries for s in solutions] == [
        ATTEMPTS - 1 if i == 2 else 0 for i in range(len(batch))
    ]
    for task, solution in zip(batch, solutions, strict=True):
        assert_close(solution, solved(task))


def assert_close(actual: Solution, expected: Solution) -> None:
    assert type(actual.outcome) is type(expected.outcome)
    if isinstance(expected.outcome, Version):
        pairs = zip(matrices(actual), matrices(expected), strict=True)
        for mine, theirs in pairs:
            assert mine.device.type == "cpu"
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def matrices(solution: Solution) -> list[torch.Tensor]:
    """Both inverses: the sign of an eigenvector, which is in a basis, is anybody's."""
    assert isinstance(solution.outcome, Version)
    both = solution.outcome.preconditioner
    sides = (both.activations, both.derivatives)
    return [
        side.with_tensor(side.tensor.double()).left(
            torch.eye(side.dim).double().expand(*side.tensor.shape[:-2], -1, -1)
        )
        for side in sides
    ]


def with_history_on(solver: Solver, task: Task) -> Task:
    """A task whose history is where the solver keeps it."""
    if task.history is None:
        return task
    state = SessionState((LayerState(0, 0, task.history),))
    return replace(task, history=solver.load(state).layers[0].history)


@pytest.mark.gpu
def test_a_gpu_solves_the_same_batch():
    batch = [*mixed_batch(), steep_task("steep"), task_of(session_spec(), count=0)]
    solver = Solver("cuda")

    on_gpu = solver.solve([with_history_on(solver, task) for task in batch])
    on_cpu = Solver("cpu").solve(batch)

    for actual, expected in zip(on_gpu, on_cpu, strict=True):
        assert actual.retries == expected.retries
        assert_close(actual, expected)


def test_the_rows_of_a_snapshot_are_not_kept():
    (solution,) = Solver("cpu").solve([task_of(session_spec())])

    assert solution.history is None


# ------------------------------------------------------------------- the engine


def pushed(layers: int, job: str) -> tuple[SessionSpec, Snapshot]:
    spec = session_spec(*(layer_spec(str(i)) for i in range(layers)), job=job)
    return spec, snapshot(spec)


def test_what_waits_is_solved_and_published_together(gate):
    entered, opened, taken = gate
    with Harness() as harness:
        (first, a), (second, b) = pushed(3, "a"), pushed(2, "b")
        one, other = harness.open(first), harness.open(second)
        harness.engine.submit(one, a)
        assert entered.wait(PATIENCE_S)
        harness.engine.submit(one, replace(a, step=1))
        harness.engine.submit(other, b)
        subscription = harness.engine.subscribe(one, {})
        opened.set()
        assert keys(subscription.take(PATIENCE_S)) == [(0, 0), (1, 0), (2, 0)]
        assert keys(subscription.take(PATIENCE_S)) == [(0, 1), (1, 1), (2, 1)]
        assert [len(batch) for batch in taken] == [3, 5]
        for name, expected in (("count", 2), ("sum", 8)):
            metric = f"skfac_batch_size_{name}"
            assert harness.metrics.registry.get_sample_value(metric) == expected


def test_a_session_that_is_closed_takes_only_its_own_part_of_a_batch(gate):
    entered, opened, taken = gate
    with Harness() as harness:
        (first, a), (second, b) = pushed(2, "a"), pushed(2, "b")
        one, other = harness.open(first), harness.open(second)
        with harness.engine._changed:  # both are there before the thread looks
            harness.engine.submit(one, a)
            harness.engine.submit(other, b)
        assert entered.wait(PATIENCE_S)
        assert len(taken[0]) == 4
        harness.engine.close_session(one, 0)
        again = harness.open(first)
        with (
            closing(harness.engine.subscribe(other, {})) as kept,
            closing(harness.engine.subscribe(again, {})) as fresh,
        ):
            opened.set()
            assert len(harness.take(kept, 2)) == 2
            assert fresh.take(0.0) == []
        assert harness.engine.status(again).sessions[0].solved == 0


def test_rows_in_work_count_in_the_quota(gate):
    entered, opened, _ = gate
    spec, sent = pushed(2, "a")
    nbytes = sum(tensor.nbytes for tensor in sent.tensors)
    with Harness(max_session_bytes=2 * nbytes - 1) as harness:
        session_id = harness.open(spec)
        harness.engine.submit(session_id, sent)
        assert entered.wait(PATIENCE_S)
        with pytest.raises(Exception, match=f"has {nbytes} bytes of rows"):
            harness.engine.submit(session_id, replace(sent, step=1))
        opened.set()


def test_a_bug_costs_one_task_of_a_batch(monkeypatch):
    solve = Solver.solve

    def broken(self, batch):
        if any(task.assembly.layer == 1 for task in batch):
            raise ZeroDivisionError("a bug")
        return solve(self, batch)

    monkeypatch.setattr(Solver, "solve", broken)
    spec, sent = pushed(4, "a")
    with Harness() as harness:
        outcomes = harness.solve(harness.open(spec), sent)

    assert [type(outcome) for outcome in outcomes] == [Version, Loss, Version, Version]


def test_a_batch_that_is_done_holds_no_rows():
    spec, sent = pushed(2, "a")
    with Harness() as harness:
        session_id = harness.open(spec)
        harness.solve(session_id, sent)
        harness.advance(0.0)  # the thread has looked for more

        assert harness.engine._scheduler.nbytes(session_id) == 0
        assert harness.engine._scheduler._taken == ()


# ------------------------------------------------------------------ the warm-up


def test_the_warm_up_is_of_all_kinds_and_can_be_solved():
    tasks = warm_up_tasks()

    solutions = Solver("cpu").solve(tasks)

    found = set()
    for task, solution in zip(tasks, solutions, strict=True):
        assert isinstance(solution.outcome, Version), solution.outcome
        inverses = solution.outcome.preconditioner
        sides = inverses.activations, inverses.derivatives
        found |= {(task.spec.history, type(side), side.tensor.ndim) for side in sides}
    for history in get_args(History):
        forms = {(form, ndim) for h, form, ndim in found if h == history}
        assert (LowRankInverse, 2) in forms
        assert (LowRankInverse, 3) in forms
        assert (DenseInverse, 2) in forms
        assert (DiagonalInverse, 2) in forms


def test_a_gpu_is_warmed_before_it_is_used(monkeypatch):
    solver = Solver("cpu")
    solved = []
    monkeypatch.setattr(Solver, "solve", lambda self, tasks: solved.append(len(tasks)))

    solver.warm()
    assert solved == []  # nothing to load

    solver._device = torch.device("cuda")
    solver.warm()
    assert solved == [len(warm_up_tasks())]
