"""What an engine counts and times, read as Prometheus reads it."""

from dataclasses import replace

import pytest
from prometheus_client import generate_latest

from skfac.service.metrics import CLOSED_KEPT, Metrics
from skfac.wire.errors import InvalidRequestError
from skfac.wire.report import StepReport
from tests.support.values import (
    PATIENCE_S,
    Harness,
    layer_spec,
    session_spec,
    snapshot,
)

PAIR = session_spec(layer_spec("a"), layer_spec("b"), world_size=2)
STAGES = ["assemble", "queue", "solve"]


@pytest.fixture
def harness():
    with Harness(assembly_timeout_s=8) as harness:
        yield harness


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def test_nothing_is_counted_before_work():
    metrics = Metrics()

    assert value(metrics, "skfac_sessions") == 0
    assert value(metrics, "skfac_queue_depth") == 0
    assert value(metrics, "skfac_receive_seconds_count") == 0
    assert value(metrics, "skfac_outcomes_total", session="job") is None


def test_what_waits_shows_while_the_solver_is_at_work(harness, gate):
    entered, _, _ = gate
    one = session_spec(lag=9)
    session_id = harness.open(one)
    harness.engine.submit(session_id, snapshot(one, 0))
    assert entered.wait(PATIENCE_S)
    assert value(harness.metrics, "skfac_queue_depth") == 0
    other = harness.open(session_spec(job="other"))
    harness.engine.submit(session_id, snapshot(one, 1))
    harness.engine.submit(other, snapshot(one, 1))
    assert value(harness.metrics, "skfac_queue_depth") == 2
    harness.engine.close_session(other, 0)
    assert value(harness.metrics, "skfac_queue_depth") == 1


def test_a_trainer_that_stalls_shows_between_its_snapshots(harness):
    session_id, name = harness.open(PAIR), "skfac_snapshot_interval_seconds"

    def intervals() -> tuple[float | None, float | None]:
        found = (
            value(harness.metrics, f"{name}_{part}", session="job")
            for part in ("count", "sum")
        )
        return next(found), next(found)

    harness.engine.submit(session_id, snapshot(PAIR, 1, 0))
    harness.clock.now_s += 2.0
    harness.engine.submit(session_id, snapshot(PAIR, 1, 1))
    assert intervals() == (None, None)  # each rank's first
    harness.clock.now_s += 5.0
    harness.engine.submit(session_id, snapshot(PAIR, 2, 0))
    harness.engine.submit(session_id, snapshot(PAIR, 2, 0))  # again: no news
    assert intervals() == (1, 7.0)
    harness.engine.submit(session_id, snapshot(PAIR, 2, 1))
    assert intervals() == (2, 12.0)


def test_two_engines_count_apart():
    first, second = Metrics(), Metrics()

    first.sessions.set(3)

    assert value(second, "skfac_sessions") == 0


def test_work_is_counted(harness):
    session_id, metrics = harness.open(PAIR), harness.metrics
    harness.engine.submit(session_id, snapshot(PAIR, 1, 0))
    harness.clock.now_s += 3.0
    harness.solve(session_id, snapshot(PAIR, 1, 1, count=2))

    assert value(metrics, "skfac_sessions") == 1
    assert value(metrics, "skfac_queue_depth") == 0
    received = 2 * (4 + 2) * (3 + 2) * 4
    assert value(metrics, "skfac_received_bytes_total", session="job") == received
    solved = {"session": "job", "outcome": "solved"}
    assert value(metrics, "skfac_outcomes_total", **solved) == 2
    assert value(metrics, "skfac_inversion_seconds_count", session="job") == 2
    assert value(metrics, "skfac_inversion_seconds_sum", session="job") == 0
    assert value(metrics, "skfac_retries_total", session="job") == 0
    for stage, seconds in zip(STAGES, (6.0, 0.0, 0.0), strict=True):
        labels = {"session": "job", "stage": stage}
        assert value(metrics, "skfac_stage_seconds_count", **labels) == 2
        assert value(metrics, "skfac_stage_seconds_sum", **labels) == seconds


def test_refusals_are_counted_by_status(harness):
    session_id = harness.open(PAIR)
    bad = replace(snapshot(PAIR), rank=2)

    for _ in range(2):
        with pytest.raises(InvalidRequestError):
            harness.engine.submit(session_id, bad)

    labels = {"session": "job", "status": "INVALID_ARGUMENT"}
    assert value(harness.metrics, "skfac_refused_total", **labels) == 2
    assert value(harness.metrics, "skfac_received_bytes_total", session="job") == 0


def test_losses_are_counted_by_reason(harness):
    session_id = harness.open(PAIR)
    subscription = harness.engine.subscribe(session_id, {})
    for rank in range(2):
        harness.engine.submit(session_id, snapshot(PAIR, 1, rank, count=0))
    harness.take(subscription, 2)

    labels = {"session": "job", "outcome": "empty"}
    assert value(harness.metrics, "skfac_outcomes_total", **labels) == 2
    assert (
        value(harness.metrics, "skfac_inversion_seconds_count", session="job") is None
    )
    assert value(harness.metrics, "skfac_retries_total", session="job") == 0


def test_retries_are_counted(harness):
    spec = session_spec()
    rows = snapshot(spec, count=1).layers[0]
    large = replace(
        rows, activations=rows.activations * 1e5, derivatives=rows.derivatives * 1e5
    )
    sent = replace(snapshot(spec, damping=1e2), layers=(large,))

    harness.solve(harness.open(spec), sent)

    retries = value(harness.metrics, "skfac_retries_total", session="job")
    assert retries is not None
    assert retries > 0


@pytest.mark.parametrize("how", ["closed", "lease"])
def test_the_series_of_a_closed_session_stay_for_a_while(harness, how):
    session_id = harness.open(PAIR)
    bad = replace(snapshot(PAIR), rank=2)
    with pytest.raises(InvalidRequestError):
        harness.engine.submit(session_id, bad)
    harness.solve(session_id, snapshot(PAIR, 1, 0), snapshot(PAIR, 1, 1))
    harness.metrics.sent_bytes.labels("job").inc()

    if how == "closed":
        harness.engine.close_session(session_id, 0)
    else:
        harness.advance(60.0)

    assert value(harness.metrics, "skfac_sessions") == 0
    for number in range(CLOSED_KEPT):
        if number < CLOSED_KEPT - 1:  # advancing the clock closes a session as well
            assert b'session="job"' in generate_latest(harness.metrics.registry)
        other = harness.open(session_spec(job=f"other {number}"))
        harness.engine.close_session(other, 0)
    assert b'session="job"' not in generate_latest(harness.metrics.registry)


@pytest.mark.parametrize("replaced", [True, False])
def test_the_series_of_a_job_that_comes_back_go_on(harness, replaced):
    for run in ("run 1", "run 2"):
        session_id = harness.open(session_spec(instance=run))
        harness.solve(session_id, snapshot(session_spec()))
        if not replaced:
            harness.engine.close_session(session_id, 0)

    labels = {"session": "job", "outcome": "solved"}
    assert value(harness.metrics, "skfac_outcomes_total", **labels) == 2
    if replaced:
        for number in range(CLOSED_KEPT + 1):
            harness.metrics.close_session(f"other {number}")
        assert value(harness.metrics, "skfac_outcomes_total", **labels) == 2


@pytest.mark.parametrize("how", ["closed", "lease", "replaced"])
def test_a_closed_session_has_no_history(harness, how):
    spec = session_spec(history="ema")
    session_id, labels = harness.open(spec), {"session": "job"}
    assert value(harness.metrics, "skfac_history_bytes", **labels) == 0
    harness.solve(session_id, snapshot(spec))
    nbytes = value(harness.metrics, "skfac_history_bytes", **labels)

    if how == "closed":
        harness.engine.close_session(session_id, 0)
    elif how == "lease":
        harness.advance(60.0)
    else:
        harness.open(replace(spec, instance="run 2"))

    assert nbytes == (3 * 3 + 2 * 2) * 8 + 2 * 1024
    assert value(harness.metrics, "skfac_history_bytes", **labels) == 0


def test_the_rows_of_inverses_are_counted(harness):
    spec = session_spec(layer_spec(d_in=9, d_out=3))
    session_id = harness.open(spec)

    harness.solve(session_id, snapshot(spec, 0, count=5))
    harness.solve(session_id, snapshot(spec, 1, count=2))

    for side, method, count, rows in (
        ("activations", "low_rank", 2, 5 + 2),
        ("derivatives", "dense", 1, 3),
        ("derivatives", "low_rank", 1, 2),
    ):
        labels = {"session": "job", "side": side, "method": method}
        assert value(harness.metrics, "skfac_inverse_rank_sum", **labels) == rows
        assert value(harness.metrics, "skfac_inverse_rank_count", **labels) == count


def test_other_sessions_keep_their_series(harness):
    one, other = harness.open(session_spec()), harness.open(session_spec(job="other"))
    for session_id in (one, other):
        harness.solve(session_id, snapshot(session_spec()))

    harness.engine.close_session(one, 0)

    labels = {"session": "other", "outcome": "solved"}
    assert value(harness.metrics, "skfac_outcomes_total", **labels) == 1


def test_what_a_rank_says_of_its_steps_is_counted_once(harness):
    spec = session_spec()
    session_id, metrics = harness.open(spec), harness.metrics
    report = StepReport((0, 3, 4), late=2, stale=1, raw=5, end_to_end_s=(0.5, 0.25))
    sent = replace(snapshot(spec, 7), report=report)
    harness.solve(session_id, sent)

    assert not harness.engine.submit(session_id, sent)

    job = {"session": "job"}
    assert value(metrics, "skfac_staleness_steps_count", **job) == 3
    assert value(metrics, "skfac_staleness_steps_sum", **job) == 7
    assert value(metrics, "skfac_end_to_end_seconds_sum", **job) == 0.75
    assert value(metrics, "skfac_late_total", **job) == 2
    assert value(metrics, "skfac_stale_total", **job) == 1
    assert value(metrics, "skfac_raw_gradients_total", **job) == 5


def test_rows_ranks_and_conditions_are_counted(harness):
    session_id, metrics = harness.open(PAIR), harness.metrics
    sent = [snapshot(PAIR, 1, rank) for rank in range(2)]
    harness.solve(session_id, *sent)

    job = {"session": "job"}
    assert value(metrics, "skfac_version_rows_sum", **job) == 2 * 8
    assert value(metrics, "skfac_version_ranks_sum", **job) == 2 * 2
    for side in ("activations", "derivatives"):
        labels = {**job, "side": side}
        count = value(metrics, "skfac_condition_count", **labels)
        total = value(metrics, "skfac_condition_sum", **labels)
        assert count == 2
        assert total is not None
        assert 2 * 1 < total < 1e4


def test_series_are_bounded_when_sessions_come_and_go():
    metrics, most = Metrics(), 0
    for number in range(1000):
        job = f"job {number}"
        metrics.open_session(job)
        metrics.observe("solve", job, 0.1)
        metrics.observe_report(job, StepReport((1,), 1, 1, 1, (0.1,)))
        metrics.close_session(job)
        metrics.observe_sent(f"job {number // 2}", 1)  # a stream that ends late
        metrics.observe_publish(f"job {number // 2}", 1.0)
        if number in (499, 999):
            names = generate_latest(metrics.registry).decode()
            most, before = names.count('session="'), most

    assert most == before
    assert 'session="job 934"' not in names
    assert 'session="job 936"' in names


@pytest.mark.parametrize("on", [False, True])
def test_exemplars_are_off_by_default(on):
    from prometheus_client.openmetrics.exposition import generate_latest as openmetrics

    with Harness() as harness:
        harness.metrics._exemplars = harness.metrics._exemplars or on
        spec = session_spec(layer_spec("x" * 1000))
        harness.solve(harness.open(spec), snapshot(spec, 7))
        text = openmetrics(harness.metrics.registry).decode()

    assert ('step="7"' in text) is on
