"""Fair between sessions, oldest first within one, nothing that is past due."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skfac.service.scheduler import Scheduler, Task
from skfac.wire.session import SessionSpec
from tests.support.tasks import drained, one_by_one
from tests.support.values import layer_spec, session_spec, task_of

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
