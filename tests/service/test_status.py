"""What an engine tells of itself, on a clock that the test holds."""

import threading
from dataclasses import replace

import pytest
import torch

from skfac.service.stages import LATEST, StageTimes
from skfac.wire.errors import (
    InvalidRequestError,
    LimitExceededError,
    SessionMismatchError,
)
from tests.support.values import Harness, layer_spec, session_spec, snapshot

PAIR = session_spec(layer_spec("a"), layer_spec("b"))
TWO_RANKS = replace(PAIR, world_size=2)


@pytest.fixture
def harness():
    with Harness(assembly_timeout_s=8, max_sessions=2) as harness:
        yield harness


def stages_of(harness: Harness) -> dict[str, tuple[int, float]]:
    stages = harness.engine.status().stages
    return {one.stage: (one.count, one.total_s) for one in stages}


def test_an_engine_without_work_is_idle(harness):
    harness.clock.now_s += 7.0
    status = harness.engine.status()

    assert (status.device, status.uptime_s) == ("cpu", 7.0)
    assert (status.sessions, status.stages, status.errors) == ((), (), ())
    assert (status.load.queue_depth, status.load.queue_s) == (0, 0.0)
    assert status.load.busy_share == 0.0
    assert 0 < status.load.memory_bytes < status.load.memory_total_bytes


def test_stages_are_timed_over_all_sessions(harness):
    for job in ("one", "other"):
        spec = replace(TWO_RANKS, job=job)
        session_id = harness.open(spec)
        harness.engine.submit(session_id, snapshot(spec, 1, 0))
        harness.clock.now_s += 3.0
        harness.solve(session_id, snapshot(spec, 1, 1))

    assert stages_of(harness) == {
        "assemble": (4, 12.0),
        "queue": (4, 0.0),
        "solve": (4, 0.0),
    }


def test_what_waits_is_told_with_how_long(harness, monkeypatch):
    solving, go_on = threading.Event(), threading.Event()
    solve = harness.engine._solver.solve

    def slow(batch):
        solving.set()
        assert go_on.wait(30.0)
        return solve(batch)

    monkeypatch.setattr(harness.engine._solver, "solve", slow)
    session_id = harness.open(PAIR)
    harness.engine.submit(session_id, snapshot(PAIR, 1))
    assert solving.wait(30.0)
    harness.clock.now_s += 2.0
    harness.engine.submit(session_id, snapshot(PAIR, 2))
    harness.clock.now_s += 5.0

    load = harness.engine.status().load
    go_on.set()
    assert (load.queue_depth, load.queue_s) == (2, 5.0)
    assert load.busy_share == pytest.approx(1 - 2.718281828459045 ** (-7.0 / 10.0))


def test_layers_tell_how_far_behind_they_are(harness):
    session_id = harness.open(PAIR)
    assert [one.behind_steps for one in harness.engine.status().sessions[0].layers] == [
        None,
        None,
    ]
    harness.solve(session_id, snapshot(PAIR, 3))
    only_a = replace(snapshot(PAIR, 8), layers=snapshot(PAIR, 8).layers[:1])
    harness.solve(session_id, only_a)

    a, b = harness.engine.status().sessions[0].layers
    assert (a.newest_step, a.behind_steps) == (8, 0)
    assert (b.newest_step, b.behind_steps) == (3, 5)


def test_a_refused_snapshot_is_remembered(harness):
    session_id = harness.open(PAIR)
    rows = snapshot(PAIR, 1).layers[1]
    derivatives = torch.full_like(rows.derivatives, float("nan"))
    bad = replace(snapshot(PAIR, 1), layers=(replace(rows, derivatives=derivatives),))
    for _ in range(2):
        with pytest.raises(InvalidRequestError):
            harness.engine.submit(session_id, bad)
    harness.clock.now_s += 4.0

    (error,) = harness.engine.status().errors
    assert (error.job, error.layer) == ("job", "b")
    assert (error.kind, error.count, error.age_s) == ("INVALID_ARGUMENT", 2, 4.0)
    assert "NaN or infinite" in error.message


def test_a_refused_session_is_remembered_without_a_series(harness):
    harness.open(PAIR)
    with pytest.raises(SessionMismatchError):
        harness.open(replace(PAIR, lag=PAIR.lag + 1))
    harness.open(replace(PAIR, job="other"))
    with pytest.raises(LimitExceededError):
        harness.open(replace(PAIR, job="third"))

    errors = harness.engine.status().errors
    assert [(one.job, one.kind) for one in errors] == [
        ("third", "RESOURCE_EXHAUSTED"),
        ("job", "FAILED_PRECONDITION"),
    ]
    for job in ("third", "job"):
        labels = {"session": job, "status": "RESOURCE_EXHAUSTED"}
        found = harness.metrics.registry.get_sample_value("skfac_refused_total", labels)
        assert not found


def test_a_failed_layer_is_remembered(harness):
    session_id = harness.open(PAIR)
    harness.solve(session_id, snapshot(PAIR, 1, count=0))

    errors = harness.engine.status().errors
    assert {(one.layer, one.kind) for one in errors} == {("a", "empty"), ("b", "empty")}
    assert "No rank had rows of layer" in errors[0].message


def test_a_session_asked_for_has_its_own_errors_only(harness):
    for job in ("one", "other"):
        spec = replace(PAIR, job=job)
        harness.solve(harness.open(spec), snapshot(spec, 1, count=0))
    one = harness.open(replace(PAIR, job="one"))

    status = harness.engine.status(one)
    assert {error.job for error in status.errors} == {"one"}
    assert [session.job for session in status.sessions] == ["one"]
    assert {error.job for error in harness.engine.status().errors} == {"one", "other"}


def test_the_engine_is_not_held_up_while_layers_are_described(harness, monkeypatch):
    session_id = harness.open(PAIR)
    describing, go_on = threading.Event(), threading.Event()
    session = harness.engine._sessions.find(session_id)
    describe = session.layers_status

    def slow(*arguments):
        describing.set()
        assert go_on.wait(30.0)
        return describe(*arguments)

    monkeypatch.setattr(session, "layers_status", slow)
    asking = threading.Thread(target=harness.engine.status)
    asking.start()
    assert describing.wait(30.0)
    harness.solve(session_id, snapshot(PAIR, 1))  # would never end
    go_on.set()
    asking.join()


def test_quantiles_are_of_the_latest_and_totals_of_all():
    times = StageTimes()
    for _ in range(10):
        times.add("solve", 100.0)
    for number in range(LATEST):
        times.add("solve", float(number))

    (solve,) = times.status()
    assert (solve.stage, solve.count) == ("solve", LATEST + 10)
    assert solve.total_s == 1000.0 + sum(range(LATEST))
    assert solve.latest.count == LATEST
    assert (solve.latest.p50_s, solve.latest.p99_s) == (256.0, 506.0)
