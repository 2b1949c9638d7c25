"""What is superseded is carried, so that timing does not change a history."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skfac.curvature.history import LayerHistory
from skfac.service.solver import Solver
from tests.support.tasks import drained, one_by_one, solved
from tests.support.values import (
    assert_same_history,
    keys,
    layer_spec,
    session_spec,
    task_of,
)

UPDATES = st.lists(
    st.fixed_dictionaries(
        {
            "gap": st.integers(-3, 5),  # an older (layer, step) may come later
            "count": st.integers(0, 3),
            "window": st.integers(1, 4),
            "decay": st.sampled_from([0.0, 0.5, 0.9]),
            "taken": st.sampled_from([0, 0, 0, 1]),  # by the solver before it
        }
    ),
    min_size=1,
    max_size=10,
)


@given(
    updates=UPDATES,
    history=st.sampled_from(["window", "ema"]),
    lag=st.integers(0, 3),
)
def test_timing_does_not_change_a_history(updates, history, lag):
    spec = session_spec(layer_spec(d_in=5), history=history, lag=lag)
    scheduler, solver = one_by_one(), Solver("cpu")
    step, before, expected = 5, LayerHistory.empty(history), LayerHistory.empty(history)
    steps: dict[int, LayerHistory] = {}

    def take() -> bool:
        nonlocal before
        batch = scheduler.take()
        if not batch:
            return False
        (task,) = batch
        solution = solved(replace(task, history=before), solver)
        assert solution.history is not None
        before = solution.history
        assert_same_history(before, steps[id(task.assembly)])
        return True

    for update in updates:
        for _ in range(update["taken"]):
            take()
        step += update["gap"]
        settings = {name: update[name] for name in ("count", "window", "decay")}
        task = task_of(spec, step, **settings)
        rows = task.assembly.rows[0]
        if rows.count:
            expected = expected.fold(
                rows.activations, rows.derivatives, task.assembly.agreed
            )
        steps[id(task.assembly)] = expected
        scheduler.add(task)
    while take():
        pass
    assert_same_history(before, expected)


@pytest.mark.parametrize(
    ("history", "window", "carried"),
    [
        ("snapshot", 9, []),
        ("ema", 1, [0, 1, 2]),
        ("window", 1, []),
        ("window", 3, [1, 2]),
        ("window", 4, [0, 1, 2]),
        ("window", 9, [0, 1, 2]),
    ],
)
def test_as_much_is_carried_as_the_history_needs(history, window, carried):
    spec = session_spec(history=history)
    scheduler = one_by_one()
    for step in range(4):
        scheduler.add(task_of(spec, step, window=window))

    nbytes = scheduler.nbytes("job")
    (task,) = scheduler.take()

    assert [old.step for old in task.earlier] == carried
    assert len(scheduler) == 0
    assert nbytes == task.nbytes == (1 + len(carried)) * 4 * (3 + 2) * 4


@pytest.mark.parametrize("steps", [(0, 1, 2, 9), (2, 1, 0, 9), (0, 3, 1, 9)])
def test_the_order_is_that_of_the_queue(steps):
    spec = session_spec(history="ema", lag=2)
    scheduler = one_by_one()
    for step in steps:
        scheduler.add(task_of(spec, step))

    (task,) = scheduler.take()

    assert [old.step for old in task.earlier] == list(steps[:-1])


def test_the_next_of_the_layer_carries():
    spec = session_spec(layer_spec("a"), layer_spec("b"), history="ema", lag=1)
    scheduler = one_by_one()
    for step, layer in ((0, 0), (1, 0), (0, 1), (2, 0), (3, 0)):
        scheduler.add(task_of(spec, step, layer))

    tasks = drained(scheduler)

    found = [(keys([t.assembly]), [old.step for old in t.earlier]) for t in tasks]
    assert found == [([(1, 0)], []), ([(0, 2)], [0, 1]), ([(0, 3)], [])]


def test_an_assembly_that_is_superseded_late_keeps_its_place():
    spec = session_spec(history="ema", lag=2)
    scheduler = one_by_one()
    for step in (9, 1, 10, 12):
        scheduler.add(task_of(spec, step))

    task, newest = drained(scheduler)

    assert (task.assembly.step, newest.assembly.step) == (10, 12)
    assert [old.step for old in task.earlier] == [9, 1]


def test_the_window_of_what_is_folded_counts():
    spec = session_spec(history="window")
    scheduler = one_by_one()
    for step, count, window in ((0, 2, 9), (1, 2, 2), (2, 2, 2), (3, 0, 1)):
        scheduler.add(task_of(spec, step, count=count, window=window))

    (task,) = scheduler.take()

    assert [old.step for old in task.earlier] == [1, 2]


def test_what_has_no_rows_is_not_carried():
    spec = session_spec(history="ema")
    scheduler = one_by_one()
    for step, count in enumerate((2, 0, 3, 1)):
        scheduler.add(task_of(spec, step, count=count))

    (task,) = scheduler.take()

    assert keys(task.earlier) == [(0, 0), (0, 2)]


@pytest.mark.parametrize(
    ("changes", "settings", "cost"),
    [
        ({}, {}, [(2, 8), (2, 3)]),
        ({"history": "window"}, {"window": 3}, [(6, 8), (6, 3)]),
        ({"history": "ema"}, {"rank_cap": 4}, [(2 + 4, 8), (2 + 3, 3)]),
        ({"history": "ema"}, {"rank_cap": None}, [(2 + 8, 8), (2 + 3, 3)]),
    ],
)
def test_cost_is_that_of_a_full_history(changes, settings, cost):
    spec = session_spec(layer_spec(d_in=8, d_out=3), **changes)
    grouped = session_spec(layer_spec(d_in=8, d_out=3, groups=5), **changes)
    diagonal = session_spec(layer_spec(d_in=8, d_out=3, diagonal=True), **changes)
    sides = [n * d * min(n, d) + min(n, d) ** 3 for n, d in cost]

    assert task_of(spec, count=2, **settings).cost == sum(sides)
    assert task_of(grouped, count=2, **settings).cost == 5 * sum(sides)
    assert task_of(diagonal, count=2, **settings).cost == sides[1]


def test_cost_counts_what_is_carried():
    spec = session_spec(layer_spec(d_in=90, d_out=90), history="ema")
    scheduler = one_by_one()
    for step in range(3):
        scheduler.add(task_of(spec, step, count=2, rank_cap=4))

    (task,) = scheduler.take()

    assert task.cost == 2 * (10 * 90 * 10 + 10**3)
