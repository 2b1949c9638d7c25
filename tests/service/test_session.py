"""What a session refuses, and that it goes on as if it had not come."""

import math
from dataclasses import replace

import pytest
import torch

from skfac.curvature.settings import CurvatureSettings
from skfac.wire.errors import (
    InvalidRequestError,
    LimitExceededError,
    SessionMismatchError,
)
from skfac.wire.snapshot import LayerRows, Snapshot
from tests.support.values import (
    Harness,
    keys,
    layer_rows,
    layer_spec,
    session_spec,
    snapshot,
)

SPEC = session_spec(layer_spec("a"), layer_spec("b", 4, 3))
SETTINGS = CurvatureSettings(damping=0.5)
PAIR = replace(SPEC, world_size=2, job="pair")
ROWS_BYTES = 4 * (3 + 2 + 4 + 3) * 4  # of a snapshot of SPEC


@pytest.fixture
def opened():
    """An engine, and its session of `SPEC`."""
    with Harness() as harness:
        yield harness, harness.open(SPEC)


def rows_with(value: float, side: str) -> LayerRows:
    rows = layer_rows(SPEC, 1)
    getattr(rows, side)[2, 1] = value
    return rows


GOOD, SHORT = layer_rows(SPEC, 1), layer_rows(SPEC, 1, count=3)
REFUSALS = {
    "NaN": (rows_with(math.nan, "derivatives"), "derivatives of layer 'b' at step 1"),
    "inf": (rows_with(-math.inf, "activations"), "activations of layer 'b' at step 1"),
    "width": (replace(layer_rows(SPEC), layer=1), r"'b' have shape \(4, 3\); .*, 4\)"),
    "dims": (replace(GOOD, derivatives=torch.ones(4)), r"derivatives .* shape \(4,\)"),
    "count": (replace(GOOD, derivatives=SHORT.derivatives), "4 rows .* and 3 of deriv"),
    "dtype": (
        replace(GOOD, activations=GOOD.activations.double()),
        "float64 and deriv",
    ),
    "index": (replace(GOOD, layer=2), "Layer index 2 is outside the session's 2"),
    "twice": (layer_rows(SPEC), "rows of a layer twice"),
}


@pytest.mark.parametrize(("bad", "message"), REFUSALS.values(), ids=REFUSALS.keys())
def test_bad_rows_are_refused_and_nothing_of_them_is_kept(opened, bad, message):
    harness, session_id = opened
    sent = Snapshot(0, 1, SETTINGS, (layer_rows(SPEC), bad))

    with pytest.raises(InvalidRequestError, match=message):
        harness.engine.submit(session_id, sent)

    assert harness.engine.status().sessions[0].refused == 1
    assert keys(harness.solve(session_id, snapshot(SPEC, 1))) == [(0, 1), (1, 1)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"settings": CurvatureSettings(damping=1.0, window=10_001)},
            "window of step 1 is 10001; at most 10000",
        ),
        ({"rank": 2}, "Rank 2 is outside the world of 2"),
        ({"rank": -1}, "Rank -1 is outside"),
    ],
)
def test_bad_declarations_are_refused(opened, change, message):
    harness, session_id = opened[0], opened[0].open(PAIR)

    for call in (harness.engine.submit, lambda i, s: harness.engine.admit(i, s.header)):
        with pytest.raises(InvalidRequestError, match=message):
            call(session_id, replace(snapshot(PAIR, 1), **change))

    both = snapshot(PAIR, 1, 0), snapshot(PAIR, 1, 1)
    assert harness.engine.submit(session_id, both[0])
    assert harness.solve(session_id, both[1])
    assert harness.engine.status(session_id).sessions[0].refused == 2


def test_negative_layers_are_refused(opened):
    harness, session_id = opened
    sent = Snapshot(0, 1, SETTINGS, (replace(GOOD, layer=-1),))

    with pytest.raises(InvalidRequestError, match="Layer index -1"):
        harness.engine.admit(session_id, sent.header)


@pytest.mark.parametrize("dtype", [torch.float16, torch.int32])
def test_dtypes_that_cannot_be_sent_back_are_refused(opened, dtype):
    sent = Snapshot(0, 1, SETTINGS, (layer_rows(SPEC, dtype=dtype),))

    with pytest.raises(InvalidRequestError, match="dtype"):
        opened[0].engine.admit(opened[1], sent.header)


def test_steps_must_not_go_backwards(opened):
    harness, session_id = opened
    harness.solve(session_id, snapshot(SPEC, 5))

    with pytest.raises(SessionMismatchError, match="Rank 0 pushed step 4 of layer 'a'"):
        harness.engine.submit(session_id, snapshot(SPEC, 4))
    assert keys(harness.solve(session_id, snapshot(SPEC, 6))) == [(0, 6), (1, 6)]


def test_snapshots_over_the_limit_are_refused():
    padded = 64 + 64 + 64 + 64
    with Harness(max_snapshot_bytes=padded) as harness:
        session_id = harness.open(SPEC)

        with pytest.raises(
            LimitExceededError, match=f"over max_snapshot_bytes = {padded}"
        ):
            harness.engine.submit(session_id, snapshot(SPEC, count=5))
        assert harness.solve(session_id, snapshot(SPEC, count=4))


def test_rows_that_wait_are_bounded_by_session():
    with Harness(max_session_bytes=2 * ROWS_BYTES) as harness:
        session_id = harness.open(PAIR)
        for step in (0, 1):
            assert harness.engine.submit(session_id, snapshot(PAIR, step))

        with pytest.raises(
            LimitExceededError, match=f"has {2 * ROWS_BYTES} bytes of rows"
        ):
            harness.engine.submit(session_id, snapshot(PAIR, 2))
        harness.advance(10.0)
        assert harness.engine.submit(session_id, snapshot(PAIR, 2))


def test_duplicates_are_acknowledged_at_the_limit():
    with Harness(max_session_bytes=ROWS_BYTES) as harness:
        session_id = harness.open(PAIR)
        assert harness.engine.submit(session_id, snapshot(PAIR))

        assert not harness.engine.submit(session_id, snapshot(PAIR))
