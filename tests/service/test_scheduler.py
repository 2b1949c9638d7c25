"""Fair between sessions, oldest first within one, nothing that is past due."""

from collections import Counter
from dataclasses import replace
from itertools import zip_longest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skfac.service.scheduler import BatchLimits, Scheduler, Task, batch_limits
from skfac.wire.session import SessionSpec
from tests.support.tasks import ANY, batches, drained, one_by_one
from tests.support.values import (
    keys,
    layer_spec,
    session_spec,
    task_of,
)

WAIT = session_spec(layer_spec("a"), layer_spec("b"), on_late="wait")
COSTS = st.tuples(st.integers(1, 5), st.integers(1, 40), st.integers(1, 40))


def scheduler_of(*tasks: Task) -> Scheduler:
    scheduler = one_by_one()
    for task in tasks:
        assert scheduler.add(task) == []
    return scheduler


def waiting_spec(job: str, d_in: int, d_out: int) -> SessionSpec:
    return session_spec(layer_spec("fc", d_in, d_out), job=job, on_late="wait")


def test_nothing_waits():
    scheduler = one_by_one()

    assert scheduler.take() == ()
    assert len(scheduler) == scheduler.queued("job") == scheduler.nbytes("job") == 0
    scheduler.drop_session("job")


def test_the_oldest_of_a_session_comes_first():
    tasks = [task_of(WAIT, step, layer) for step in (5, 3, 4) for layer in (1, 0)]

    assert drained(scheduler_of(*tasks)) == tasks


@pytest.mark.parametrize(
    ("count", "dims", "cost"),
    [
        (4, (3, 2), (4 * 3 * 3 + 3**3) + (4 * 2 * 2 + 2**3)),
        (2, (3, 5), (2 * 3 * 2 + 2**3) + (2 * 5 * 2 + 2**3)),
        (0, (3, 2), 0),
    ],
)
def test_cost_is_that_of_the_smaller_side(count, dims, cost):
    assert task_of(session_spec(layer_spec("fc", *dims)), count=count).cost == cost


def test_counts_and_bytes_are_those_of_the_session():
    other = session_spec(job="other")
    scheduler = scheduler_of(
        task_of(WAIT, 0), task_of(WAIT, 1, count=2), task_of(other)
    )

    assert len(scheduler) == 3
    assert scheduler.queued("job") == 2
    assert scheduler.nbytes("job") == (4 + 2) * (3 + 2) * 4
    assert scheduler.queued("other") == 1


@pytest.mark.parametrize("on_late", ["keep", "raise"])
@pytest.mark.parametrize(
    ("lag", "newer", "superseded"),
    [
        (0, 0, False),
        (0, 1, True),
        (1, 1, False),
        (1, 2, True),
        (3, 3, False),
        (3, 4, True),
        (3, 9, True),
    ],
)
def test_a_version_past_due_is_superseded(lag, newer, superseded, on_late):
    spec = session_spec(lag=lag, on_late=on_late)
    old, new = task_of(spec, 10), task_of(spec, 10 + newer)
    scheduler = scheduler_of(old)

    assert scheduler.add(new) == ([old] if superseded else [])
    assert drained(scheduler) == ([new] if superseded else [old, new])


def test_all_that_are_past_due_are_superseded_at_once():
    spec = session_spec(lag=2)
    first, second, third = (task_of(spec, step) for step in (0, 1, 9))
    scheduler = scheduler_of(first, second)

    assert scheduler.add(third) == [first, second]
    assert scheduler.queued("job") == 1


def test_an_older_version_supersedes_nothing():
    new, old = task_of(session_spec(), 9), task_of(session_spec(), 1)

    assert drained(scheduler_of(new, old)) == [new, old]


def test_a_session_that_waits_for_every_version_keeps_all():
    tasks = [task_of(WAIT, step) for step in range(20)]

    assert drained(scheduler_of(*tasks)) == tasks


def test_only_the_same_layer_of_the_same_session_is_superseded():
    spec = session_spec(layer_spec("a"), layer_spec("b"))
    scheduler = scheduler_of(
        task_of(spec, 0, 0), task_of(spec, 0, 1), task_of(spec, 0, owner="other")
    )

    superseded = scheduler.add(task_of(spec, 9, 0))

    assert [(old.session_id, old.assembly.layer) for old in superseded] == [("job", 0)]


@given(first=COSTS, second=COSTS)
def test_two_sessions_get_half_of_the_cost_each(first, second):
    scheduler, served = one_by_one(), {"first": 0, "second": 0}
    largest = 0
    for job, (count, d_in, d_out) in (("first", first), ("second", second)):
        for step in range(30):
            task = task_of(waiting_spec(job, d_in, d_out), step, count=count)
            largest = max(largest, task.cost)
            scheduler.add(task)

    while scheduler.queued("first") and scheduler.queued("second"):
        (taken,) = scheduler.take()
        served[taken.session_id] += taken.cost
        assert abs(served["first"] - served["second"]) <= largest


def test_a_session_that_was_idle_earns_no_credit():
    busy = [task_of(WAIT, step) for step in range(30)]
    scheduler = scheduler_of(*busy)
    for _ in range(20):
        scheduler.take()
    for step in range(10):
        scheduler.add(task_of(WAIT, step, owner="idle"))

    owners = [task.session_id for task in drained(scheduler)]

    assert [owners[i : i + 2].count("idle") for i in range(0, 20, 2)] == [1] * 10


def test_a_session_earns_no_credit_while_nothing_is_queued():
    scheduler = one_by_one()
    for step in range(20):  # each is solved before the next is there
        scheduler.add(task_of(WAIT, step, owner="diligent"))
        scheduler.take()
    for step in range(10):
        scheduler.add(task_of(WAIT, step, owner="idle"))
        scheduler.add(task_of(WAIT, 20 + step, owner="diligent"))

    owners = [task.session_id for task in drained(scheduler)]

    assert [owners[i : i + 2].count("idle") for i in range(0, 20, 2)] == [1] * 10


def test_the_session_that_was_served_most_gets_no_debt_from_others():
    scheduler = scheduler_of(task_of(WAIT, 0, owner="a"), task_of(WAIT, 0, owner="b"))
    for step in range(1, 10):
        scheduler.take()
        scheduler.take()
        scheduler.add(task_of(WAIT, step, owner="a"))
        scheduler.add(task_of(WAIT, step, owner="b"))

    assert {task.session_id for task in drained(scheduler)} == {"a", "b"}


def test_a_dropped_session_leaves_nothing():
    other = task_of(WAIT, owner="other")
    scheduler = scheduler_of(task_of(WAIT, 0), task_of(WAIT, 1), other)

    scheduler.drop_session("job")

    assert scheduler.queued("job") == scheduler.nbytes("job") == 0
    assert len(scheduler._queues) == 1
    assert drained(scheduler) == [other]


# ------------------------------------------------------------------- batches


def queued(limits: BatchLimits, tasks: list[Task]) -> Scheduler:
    scheduler = Scheduler(limits)
    for task in tasks:
        scheduler.add(task)
    return scheduler


def sizes(scheduler: Scheduler) -> list[int]:
    return [len(batch) for batch in batches(scheduler)]


def waiting(job: str, *layers: tuple[int, int], step: int = 0) -> list[Task]:
    declared = [layer_spec(str(i), *dims) for i, dims in enumerate(layers)]
    spec = session_spec(*declared, job=job, on_late="wait")
    return [task_of(spec, step, layer) for layer in range(len(layers))]


def test_a_batch_has_no_layer_twice():
    steps = [
        task for step in range(3) for task in waiting("job", *[(3, 2)] * 4, step=step)
    ]

    taken = list(batches(queued(ANY, steps)))

    assert [keys([t.assembly for t in batch]) for batch in taken] == [
        [(layer, step) for layer in range(4)] for step in range(3)
    ]


def test_the_same_layer_of_two_sessions_is_not_the_same():
    tasks = waiting("a", (3, 2)) + waiting("b", (3, 2))

    assert sizes(queued(ANY, tasks)) == [2]


@pytest.mark.parametrize("limit", ["cost", "nbytes", "tasks"])
@pytest.mark.parametrize(
    ("times", "expected"), [(2, [2, 2, 1]), (3, [3, 2]), (1, [1] * 5)]
)
def test_limits_bound_a_batch(limit, times, expected):
    tasks = waiting("job", *[(3, 2)] * 5)
    most = times * (1 if limit == "tasks" else getattr(tasks[0], limit))

    assert sizes(queued(replace(ANY, **{limit: most}), tasks)) == expected
    # One less and the last task of a batch is over it.
    fewer = [max(one - 1, 1) for one in expected[:1]]
    assert sizes(queued(replace(ANY, **{limit: most - 1}), tasks))[:1] == fewer


def test_a_task_over_the_limits_comes_alone():
    small, large, last = waiting("job", (3, 2), (300, 200), (3, 2))

    limits = replace(ANY, cost=small.cost + last.cost)

    assert sizes(queued(limits, [small, large, last])) == [1, 1, 1]
    assert sizes(queued(limits, [small, last])) == [2]


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:1"])
def test_every_device_has_limits(device):
    limits = batch_limits(device)

    assert min(limits.cost, limits.nbytes, limits.tasks) > 1
    assert (limits == batch_limits("cpu")) == (device == "cpu")


def test_what_was_taken_counts_until_it_is_solved():
    tasks = waiting("job", (3, 2), (3, 2), (3, 2)) + waiting("other", (3, 2))
    scheduler = queued(replace(ANY, tasks=2), tasks)
    nbytes = scheduler.nbytes("job")

    taken = scheduler.take()

    assert {task.session_id for task in taken} == {"job", "other"}
    assert (scheduler.nbytes("job"), scheduler.queued("job")) == (nbytes, 2)
    assert (scheduler.nbytes("other"), scheduler.queued("other")) == (nbytes // 3, 0)
    scheduler.take()
    assert (scheduler.nbytes("job"), scheduler.nbytes("other")) == (2 * nbytes // 3, 0)
    assert scheduler.take() == ()
    assert scheduler.nbytes("job") == 0


def test_bytes_follow_what_is_superseded():
    spec = session_spec(layer_spec("a"), layer_spec("b"))
    scheduler = queued(ANY, [task_of(spec, 0, 0), task_of(spec, 0, 1, count=2)])

    scheduler.add(task_of(spec, 9, 0, count=7))

    assert scheduler.nbytes("job") == (2 + 7) * (3 + 2) * 4


SESSIONS = st.lists(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(1, 4), st.integers(1, 30)),  # a task
        max_size=8,
    ),
    min_size=1,
    max_size=4,
)
LIMITS = st.builds(
    BatchLimits,
    cost=st.integers(1, 5000),
    nbytes=st.integers(1, 3000),
    tasks=st.integers(1, 6),
)


@given(sessions=SESSIONS, limits=LIMITS)
def test_batches_are_what_would_come_one_by_one(sessions, limits):
    tasks = []
    for owner, declared in enumerate(sessions):
        dims = {layer: d for layer, _, d in declared}  # a layer has one shape
        layers = [layer_spec(str(i), dims.get(i, 1), 2) for i in range(3)]
        spec = session_spec(*layers, job=str(owner), on_late="wait")
        tasks += [
            task_of(spec, step, layer, count=count)
            for step, (layer, count, _) in enumerate(declared)
        ]
    expected = drained(queued(replace(ANY, tasks=1), tasks))

    taken = list(batches(queued(limits, tasks)))

    assert [task for batch in taken for task in batch] == expected
    for batch, later in zip_longest(taken, taken[1:], fillvalue=()):
        assert max(Counter(task.layer_key for task in batch).values()) == 1
        assert len(batch) == 1 or fits(batch, limits)
        more = (*batch, *later[:1])
        layers = {task.layer_key for task in more}
        assert not later or len(layers) < len(more) or not fits(more, limits)


def fits(batch: tuple[Task, ...], limits: BatchLimits) -> bool:
    return (
        sum(task.cost for task in batch) <= limits.cost
        and sum(task.nbytes for task in batch) <= limits.nbytes
        and len(batch) <= limits.tasks
    )
