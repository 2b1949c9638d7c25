"""The engine, by a clock that only the tests move."""

import threading
from dataclasses import replace

import pytest

from skfac.service.engine import LatencySummary
from skfac.service.solver import Solver
from skfac.wire.errors import (
    InvalidRequestError,
    LimitExceededError,
    ServerUnavailableError,
    SessionMismatchError,
    SessionNotFoundError,
)
from skfac.wire.outcome import Version
from tests.support.values import (
    PATIENCE_S,
    Harness,
    keys,
    layer_spec,
    session_spec,
    snapshot,
)

SPEC = session_spec(layer_spec("a"), layer_spec("b", 4, 3))
PAIR = replace(SPEC, world_size=2)


@pytest.fixture
def config():
    return {"lease_s": 60, "assembly_timeout_s": 10}


@pytest.fixture
def harness(config):
    with Harness(**config) as harness:
        yield harness


# ------------------------------------------------------------------- sessions


def test_opening_is_idempotent(harness):
    first = harness.engine.open_session(PAIR, 0)

    assert harness.engine.open_session(PAIR, 0) == first
    assert harness.engine.open_session(PAIR, 1) == first
    assert (first.lease_s, first.max_snapshot_bytes) == (60, 4 * 1024**3)
    assert harness.engine.status().sessions[0].open_ranks == 2


def test_a_rank_that_differs_is_told_the_difference(harness):
    harness.open(PAIR)
    other = replace(PAIR, layers=(PAIR.layers[0], layer_spec("c")))

    with pytest.raises(
        SessionMismatchError, match=r"Rank 1 of job 'job' .* layer 1 is"
    ):
        harness.open(other, 1)
    assert harness.open(PAIR, 1)


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_outside_the_world_is_refused(harness, rank):
    with pytest.raises(InvalidRequestError, match=f"Rank {rank} is outside the world"):
        harness.open(PAIR, rank)
    assert harness.jobs() == []


def test_another_instance_replaces_the_session_for_good(harness):
    old = harness.open(SPEC)
    subscription = harness.engine.subscribe(old, {})

    new = harness.open(replace(SPEC, instance="run 2", lag=3))

    assert new != old
    with pytest.raises(SessionNotFoundError, match="The job was started again"):
        subscription.take(PATIENCE_S)
    with pytest.raises(SessionNotFoundError):
        harness.engine.submit(old, snapshot(SPEC))
    with pytest.raises(SessionMismatchError, match="this run of it is over"):
        harness.open(SPEC)
    harness.engine.close_session(old, 0)
    assert len(harness.solve(new, snapshot(SPEC))) == 2


def test_the_last_rank_closes_the_session(harness):
    session_id = harness.open(PAIR, 0)
    harness.open(PAIR, 1)
    subscription = harness.engine.subscribe(session_id, {})

    harness.engine.close_session(session_id, 0)
    harness.engine.close_session(session_id, 0)
    assert harness.jobs() == ["job"]
    harness.engine.close_session(session_id, 1)
    harness.engine.close_session(session_id, 1)

    assert harness.jobs() == []
    with pytest.raises(SessionNotFoundError, match="All ranks have left"):
        subscription.take(PATIENCE_S)
    assert harness.open(SPEC) != session_id


@pytest.mark.parametrize("config", [{"max_sessions": 1, "max_layers": 2}])
def test_limits_on_sessions_and_layers(harness):
    three = session_spec(*map(layer_spec, "abc"), job="third")
    with pytest.raises(LimitExceededError, match="declares 3 layers; max_layers = 2"):
        harness.open(three)
    session_id = harness.open(SPEC)

    with pytest.raises(LimitExceededError, match="are 1 sessions; max_sessions = 1"):
        harness.open(session_spec(job="second"))
    harness.open(replace(SPEC, instance="run 2"))
    harness.engine.close_session(session_id, 0)
    assert harness.jobs() == ["job"]


@pytest.mark.parametrize("call", ["status", "admit", "submit", "subscribe"])
def test_unknown_sessions_are_refused(harness, call):
    sent = snapshot(SPEC)
    arguments = {"admit": [sent.header], "submit": [sent], "subscribe": [{}]}

    with pytest.raises(SessionNotFoundError, match="closed or its lease ran out"):
        getattr(harness.engine, call)("nobody", *arguments.get(call, []))


# ------------------------------------------------------------------- time


def test_a_session_without_calls_is_dropped_with_its_lease(harness):
    session_id = harness.open(SPEC)

    harness.advance(59.0)
    assert harness.jobs() == ["job"]
    harness.advance(1.0)

    assert harness.jobs() == []
    with pytest.raises(SessionNotFoundError):
        harness.engine.subscribe(session_id, {})


def test_calls_renew_the_lease(harness):
    session_id = harness.open(PAIR)
    calls = (
        lambda: harness.engine.submit(session_id, snapshot(PAIR)),
        lambda: harness.engine.admit(session_id, snapshot(PAIR).header),
        lambda: harness.open(PAIR, 1),
        lambda: harness.engine.subscribe(session_id, {}).close(),
    )

    for call in calls:
        harness.advance(59.0)
        call()
    harness.advance(59.0)
    assert harness.jobs() == ["job"]


def test_a_subscription_holds_the_lease(harness):
    subscription = harness.engine.subscribe(harness.open(SPEC), {})

    harness.advance(1000.0)
    assert harness.jobs() == ["job"]
    subscription.close()
    subscription.close()
    harness.advance(59.0)
    assert harness.jobs() == ["job"]
    harness.advance(1.0)

    assert harness.jobs() == subscription.take(PATIENCE_S) == []


def test_the_thread_learns_of_a_new_lease(harness, monkeypatch):
    waiting = harness.engine._changed
    woken = threading.Event()
    harness.advance(0.0)
    notify = waiting.notify_all

    def notify_all():
        woken.set()
        notify()

    monkeypatch.setattr(waiting, "notify_all", notify_all)

    harness.open(SPEC)

    assert woken.is_set()


def test_two_ranks_assemble(harness):
    session_id = harness.open(PAIR)
    harness.open(PAIR, 1)
    assert harness.engine.submit(session_id, snapshot(PAIR, 3, 1))
    assert not harness.engine.submit(session_id, snapshot(PAIR, 3, 1))

    outcomes = harness.solve(session_id, snapshot(PAIR, 3, 0))

    assert keys(outcomes) == [(0, 3), (1, 3)]
    assert [(v.rows, v.ranks) for v in outcomes if isinstance(v, Version)] == [
        (8, 2)
    ] * 2


def test_a_missing_rank_is_given_up(harness):
    session_id = harness.open(PAIR)
    subscription = harness.engine.subscribe(session_id, {})
    harness.engine.submit(session_id, snapshot(PAIR, 3, 1))

    harness.advance(9.0)
    assert subscription.take(0.0) == []
    harness.advance(1.0)

    outcomes = harness.take(subscription, 2)
    assert keys(outcomes) == [(0, 3), (1, 3)]
    assert [(v.rows, v.ranks) for v in outcomes if isinstance(v, Version)] == [
        (4, 1)
    ] * 2
    assert harness.engine.submit(session_id, snapshot(PAIR, 3, 0))
    harness.advance(10.0)
    assert subscription.take(0.0) == []


# ------------------------------------------------------------------- outcomes


def test_a_subscription_begins_with_what_is_newer_than_held(harness):
    spec = replace(SPEC, lag=5)
    session_id = harness.open(spec)
    harness.solve(session_id, *(snapshot(spec, step) for step in range(3)))

    subscription = harness.engine.subscribe(session_id, {0: 1, 1: 2})

    assert keys(harness.take(subscription, 1)) == [(0, 2)]
    assert subscription.take(0.0) == []
    harness.solve(session_id, snapshot(spec, 3))
    assert keys(harness.take(subscription, 2)) == [(0, 3), (1, 3)]


def test_every_subscription_gets_everything(harness):
    session_id = harness.open(SPEC)
    both = [harness.engine.subscribe(session_id, {}) for _ in range(2)]
    harness.solve(session_id, snapshot(SPEC))

    first, second = (harness.take(subscription, 2) for subscription in both)
    assert first == second


def test_a_solver_that_raises_costs_one_version_only(harness, monkeypatch):
    solve = Solver.solve

    def broken(self, batch):
        if any(task.assembly.layer == 0 for task in batch):
            raise RuntimeError("a bug")
        return solve(self, batch)

    monkeypatch.setattr(Solver, "solve", broken)
    session_id = harness.open(SPEC)

    failed, solved = harness.solve(session_id, snapshot(SPEC))

    assert (failed.layer, failed.step, failed.reason) == (0, 0, "failed")
    assert failed.message == "RuntimeError: a bug"
    assert isinstance(solved, Version)
    (session,) = harness.engine.status(session_id).sessions
    assert (session.solved, session.failed) == (1, 1)
    assert [layer.newest_step for layer in session.layers] == [None, 0]


def test_what_is_past_due_is_superseded(harness, gate):
    entered, opened, _ = gate
    session_id = harness.open(session_spec())
    subscription = harness.engine.subscribe(session_id, {})
    harness.engine.submit(session_id, snapshot(session_spec(), 0))
    assert entered.wait(PATIENCE_S)
    for step in (1, 2):
        harness.engine.submit(session_id, snapshot(session_spec(), step))

    (lost,) = harness.take(subscription, 1)
    assert (lost.step, lost.reason) == (1, "superseded")
    assert harness.engine.status().sessions[0].queued == 1
    opened.set()
    assert keys(harness.take(subscription, 2)) == [(0, 0), (0, 2)]
    assert harness.engine.status().sessions[0].superseded == 1


def test_a_session_closed_while_it_is_solved_publishes_nothing(harness, gate):
    entered, opened, _ = gate
    session_id = harness.open(SPEC)
    harness.engine.submit(session_id, snapshot(SPEC))
    assert entered.wait(PATIENCE_S)
    harness.engine.close_session(session_id, 0)
    assert len(harness.engine._scheduler) == 0
    again = harness.open(SPEC)
    subscription = harness.engine.subscribe(again, {})

    opened.set()
    harness.advance(0.0)

    assert subscription.take(0.0) == []


# ------------------------------------------------------------------- the end


def test_draining_publishes_all_that_was_queued(harness, gate):
    entered, opened, _ = gate
    spec = replace(SPEC, on_late="wait")
    session_id = harness.open(spec)
    subscription = harness.engine.subscribe(session_id, {})
    for step in range(5):
        harness.engine.submit(session_id, snapshot(spec, step))
    assert entered.wait(PATIENCE_S)

    assert not harness.engine.drain(0.0)
    with pytest.raises(ServerUnavailableError, match="The server is stopping"):
        harness.engine.submit(session_id, snapshot(spec, 5))
    with pytest.raises(ServerUnavailableError, match="The server is stopping"):
        harness.open(spec)
    opened.set()
    assert harness.engine.drain(PATIENCE_S)
    assert keys(subscription.take(0.0)) == [(0, 3), (1, 3), (0, 4), (1, 4)]


def test_draining_publishes_what_waits_for_other_ranks(harness):
    session_id = harness.open(PAIR)
    subscription = harness.engine.subscribe(session_id, {})
    harness.engine.submit(session_id, snapshot(PAIR))

    assert harness.engine.drain(1.0)
    assert [outcome.ranks for outcome in subscription.take(0.0)] == [1, 1]


def test_closing_ends_subscriptions_and_the_thread(harness):
    subscription = harness.engine.subscribe(harness.open(SPEC), {})
    ended = []

    def take():
        with pytest.raises(ServerUnavailableError, match="The server is stopping"):
            subscription.take(PATIENCE_S)
        ended.append(True)

    thread = threading.Thread(target=take)
    thread.start()
    harness.engine.close()
    harness.engine.close()
    thread.join(PATIENCE_S)

    assert ended
    assert harness.jobs() == []
    assert not harness.engine._thread.is_alive()
    with pytest.raises(ServerUnavailableError):
        harness.open(SPEC)


def test_what_was_published_is_taken_before_the_end(harness):
    session_id = harness.open(SPEC)
    subscription = harness.engine.subscribe(session_id, {})
    harness.solve(session_id, snapshot(SPEC))

    harness.engine.close()

    assert len(subscription.take(0.0)) == 2
    with pytest.raises(ServerUnavailableError, match="The server is stopping"):
        subscription.take(0.0)


def test_status_counts(harness):
    session_id = harness.open(PAIR)
    harness.clock.now_s += 7.0
    harness.engine.submit(session_id, snapshot(PAIR, 2, 0, count=0))
    harness.solve(session_id, snapshot(PAIR, 2, 1, count=6))

    status = harness.engine.status(session_id)

    (session,) = status.sessions
    assert (status.device, status.uptime_s) == ("cpu", 7.0)
    assert (session.job, session.world_size, session.open_ranks) == ("job", 2, 1)
    assert (session.age_s, session.queued) == (7.0, 0)
    assert (session.solved, session.superseded, session.failed) == (2, 0, 0)
    assert session.inversion == LatencySummary(2, 0.0, 0.0)
    layers = [(layer.name, layer.newest_step, layer.rows) for layer in session.layers]
    assert layers == [("a", 2, 6), ("b", 2, 6)]
