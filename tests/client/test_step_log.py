"""What a rank tells the servers of its steps."""

from dataclasses import replace

import pytest

from skfac.client.step_log import StepLog
from skfac.wire.codec import decode_snapshot_header, encode_snapshot
from skfac.wire.codec import parse_snapshot_manifest as parse
from skfac.wire.errors import InvalidRequestError
from skfac.wire.frames import parse_frame
from skfac.wire.report import MAX_REPORTED, NO_STEPS, StepReport
from tests.support.values import FakeClock, session_spec, snapshot, version


def test_each_server_learns_of_its_own_layers():
    log = StepLog()
    first, second = version(2, 0), version(4, 1)
    log.used(5, [first, second, None], [None, second, None])
    log.used(6, [first, second, None], [first, second, None])
    log.late([1, 2])

    assert log.report(0, [0, 1]) == StepReport((1, 4), late=1, stale=1, raw=1)
    assert log.report(1, [2]) == StepReport((), late=1, stale=0, raw=2)
    log.clear()
    assert log.report(0, [0, 1]) == NO_STEPS


def test_the_way_of_a_snapshot_is_timed_once():
    clock = FakeClock()
    log = StepLog(clock)
    log.captured(3, [0, 1, 0], in_flight=2)
    clock.now_s += 2.0
    log.arrived(1, [3])
    clock.now_s += 1.0
    log.arrived(0, [3])
    log.arrived(0, [3])  # sent again after a reconnect
    log.arrived(0, [9])

    assert log.report(0, [0, 2]).end_to_end_s == (3.0,)
    assert log.report(1, [1]).end_to_end_s == (2.0,)


def test_what_was_never_answered_is_forgotten():
    log = StepLog(FakeClock())
    for step in range(3):
        log.captured(step, [0], in_flight=2)
    log.arrived(0, [0, 1])

    assert log.report(0, [0]).end_to_end_s == (0.0,)


def test_only_the_latest_steps_are_kept():
    log = StepLog()
    for step in range(MAX_REPORTED + 5):
        log.used(step, [version(0)], [version(0)])

    assert log.report(0, [0]).staleness == tuple(range(5, MAX_REPORTED + 5))


def test_a_report_travels_with_its_snapshot():
    report = StepReport((0, 7), late=1, stale=2, raw=3, end_to_end_s=(0.5,))
    frames = encode_snapshot("id", replace(snapshot(session_spec()), report=report))

    manifest = parse_frame(next(frames)).manifest
    assert manifest is not None
    assert decode_snapshot_header(parse(manifest)).report == report


@pytest.mark.parametrize(
    "wrong",
    [
        {"staleness": (1,) * (MAX_REPORTED + 1)},
        {"end_to_end_s": (0.0,) * (MAX_REPORTED + 1)},
        {"end_to_end_s": (float("nan"),)},
        {"end_to_end_s": (-1.0,)},
        {"end_to_end_s": (float("inf"),)},
    ],
)
def test_a_report_that_cannot_be_is_refused(wrong):
    with pytest.raises(InvalidRequestError, match="report"):
        StepReport(**wrong)
