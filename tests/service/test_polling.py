"""Subscriptions that are polled end when nobody polls, and sessions with them."""

import threading

import pytest

from skfac.service.polling import PolledSubscriptions
from skfac.wire.errors import LimitExceededError, SessionNotFoundError
from skfac.wire.outcome import Outcome
from tests.support.values import PATIENCE_S, Harness, keys, session_spec, snapshot

IDLE_S = 10.0
SPEC = session_spec()


@pytest.fixture
def harness():
    with Harness(lease_s=IDLE_S) as harness:
        yield harness


def polled_of(harness, limit=2) -> PolledSubscriptions:
    return PolledSubscriptions(
        harness.engine, limit=limit, idle_s=IDLE_S, clock=harness.clock
    )


def test_outcomes_come_once_with_the_name_of_the_job(harness):
    polled, session_id = polled_of(harness), harness.open(SPEC)
    name = polled.open(session_id, {})
    opened_s = harness.clock()
    harness.clock.now_s += 2.0
    harness.engine.submit(session_id, snapshot(SPEC, 4))

    job, published_s, outcomes = polled.take(name, PATIENCE_S)

    assert (job, keys(outcomes)) == (SPEC.job, [(0, 4)])
    assert published_s == opened_s + 2.0
    assert polled.take(name, 0.0)[2] == []


def test_what_is_held_is_not_sent(harness):
    polled, session_id = polled_of(harness), harness.open(SPEC)
    harness.solve(session_id, snapshot(SPEC, 4))

    assert polled.take(polled.open(session_id, {0: 4}), 0.0)[2] == []
    assert keys(polled.take(polled.open(session_id, {0: 3}), 0.0)[2]) == [(0, 4)]


def test_one_that_nobody_takes_from_lets_its_session_go(harness):
    polled, session_id = polled_of(harness), harness.open(SPEC)
    name = polled.open(session_id, {})

    harness.advance(IDLE_S - 1)
    polled.take(name, 0.0)
    harness.advance(IDLE_S - 1)
    polled.close_idle()
    polled.take(name, 0.0)
    harness.advance(IDLE_S + 1)
    assert SPEC.job in harness.jobs()
    polled.close_idle()
    with pytest.raises(SessionNotFoundError, match="nobody took from it for 10 s"):
        polled.take(name, 0.0)
    harness.advance(IDLE_S + 1)

    assert SPEC.job not in harness.jobs()


def test_one_that_is_taken_from_is_not_idle(harness):
    polled, session_id = polled_of(harness), harness.open(SPEC)
    name = polled.open(session_id, {})
    taken: list[tuple[str, float, list[Outcome]]] = []
    taker = threading.Thread(target=lambda: taken.append(polled.take(name, PATIENCE_S)))
    taker.start()
    while not polled._polled[name].taking:
        pass
    harness.clock.now_s += 2 * IDLE_S
    polled.close_idle()
    polled.close(name)
    taker.join()

    ((job, _, outcomes),) = taken
    assert (job, outcomes) == (SPEC.job, [])


def test_there_is_a_limit(harness):
    polled, session_id = polled_of(harness, limit=1), harness.open(SPEC)
    name = polled.open(session_id, {})
    with pytest.raises(LimitExceededError, match="max_ranks = 1"):
        polled.open(session_id, {})
    polled.close(name)
    polled.close(name)
    polled.open(session_id, {})


def test_the_end_of_a_session_ends_its_subscription(harness):
    polled, session_id = polled_of(harness), harness.open(SPEC)
    name = polled.open(session_id, {})
    harness.engine.close_session(session_id, 0)

    with pytest.raises(SessionNotFoundError, match="All ranks have left"):
        polled.take(name, PATIENCE_S)
    with pytest.raises(SessionNotFoundError, match="no such subscription"):
        polled.take(name, PATIENCE_S)
    with pytest.raises(SessionNotFoundError):
        polled.open(session_id, {})
