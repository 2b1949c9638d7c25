"""How large histories may become, and which rows fit their layers."""

from dataclasses import replace

import pytest
import torch

from skfac.service.session import first_bad_rows
from skfac.wire.errors import (
    InvalidRequestError,
    LimitExceededError,
    SessionMismatchError,
)
from skfac.wire.outcome import Version
from skfac.wire.session import SessionSpec
from skfac.wire.state import LayerState, SessionState
from tests.support.values import MIXED, Harness, folded, session_spec, snapshot

EMA = session_spec(*MIXED, history="ema", on_late="wait")
WINDOW = replace(EMA, history="window")
BOTH = pytest.mark.parametrize("spec", [EMA, WINDOW], ids=["ema", "window"])


@pytest.fixture
def harness():
    with Harness() as harness:
        yield harness


def full_bytes(spec: SessionSpec, *, rows: int, rank: int | None, window: int) -> int:
    """What float64 histories take once they are full, written out."""
    total = 0
    for layer in spec.layers:
        for dim, diagonal in ((layer.d_in, layer.diagonal), (layer.d_out, False)):
            ema = spec.history == "ema"
            kept = min(rank or dim if ema else rows, dim)
            updates = window if spec.history == "window" else 1
            kept = 1 if diagonal else kept
            total += updates * (8 * layer.groups * kept * dim + 1024)
    return total


@BOTH
@pytest.mark.parametrize(("count", "rank"), [(2, 3), (6, None), (40, 5)])
def test_histories_grow_to_what_was_checked_and_no_further(spec, count, rank):
    limit = full_bytes(spec, rows=count, rank=rank, window=3)
    settings = {"count": count, "rank_cap": rank, "window": 3, "damping": 1.0}
    with Harness(max_history_bytes=limit) as harness:
        session_id = harness.open(spec)
        for step in range(12):
            harness.solve(session_id, snapshot(spec, step, **settings))
        taken = harness.engine.status().sessions[0].history_bytes
    with Harness(max_history_bytes=limit - 1) as harness:
        session_id = harness.open(spec)
        with pytest.raises(
            LimitExceededError,
            match=f"take up to {limit} bytes, over max_history_bytes = {limit - 1}",
        ):
            harness.engine.submit(session_id, snapshot(spec, 0, **settings))

    assert taken == limit


@pytest.mark.parametrize(
    ("spec", "way_out", "smaller"),
    [
        (EMA, "a smaller `rank`", {"rank_cap": 1}),
        (WINDOW, "a smaller `window`", {"window": 1}),
    ],
)
def test_the_way_out_of_the_limit_is_one(spec, way_out, smaller):
    with Harness(max_history_bytes=8000) as harness:
        session_id = harness.open(spec)
        with pytest.raises(LimitExceededError, match=way_out):
            harness.engine.admit(session_id, snapshot(spec, 0).header)

        assert harness.solve(session_id, snapshot(spec, 0, **smaller))
        assert harness.engine.status().sessions[0].refused == 1


def test_the_rows_of_all_ranks_count():
    spec = replace(WINDOW, world_size=3)
    limit = full_bytes(spec, rows=3, rank=None, window=2)
    with Harness(max_history_bytes=limit) as harness:
        session_id = harness.open(spec)
        sent = [snapshot(spec, 0, rank, count=1, window=2) for rank in range(3)]
        assert harness.solve(session_id, *sent)
        with pytest.raises(LimitExceededError):
            harness.engine.admit(
                session_id, snapshot(spec, 1, count=2, window=2).header
            )


def test_ranks_times_layers_are_bounded():
    with Harness(max_rank_layers=6) as harness:
        harness.open(replace(EMA, world_size=2))
        with pytest.raises(
            LimitExceededError,
            match=r"Job 'more' declares 3 layers on 3 ranks; max_rank_layers = 6\.",
        ):
            harness.open(replace(EMA, job="more", world_size=3))
        assert harness.jobs() == ["job"]


@pytest.mark.parametrize("same", [True, False])
def test_what_comes_while_numbers_are_looked_at_counts(monkeypatch, same):
    spec = session_spec(world_size=2)  # whose rows wait for the other rank
    first, second = snapshot(spec, 0), snapshot(spec, 0 if same else 1)
    others = [second]
    with Harness(max_session_bytes=sum(t.nbytes for t in first.tensors)) as harness:
        session_id = harness.open(spec)

        def look(sent):
            if others:
                assert harness.engine.submit(session_id, others.pop())
            return first_bad_rows(sent)

        monkeypatch.setattr("skfac.service.local_engine.first_bad_rows", look)
        if same:
            assert not harness.engine.submit(session_id, first)
        else:
            with pytest.raises(SessionMismatchError, match="must not go backwards"):
                harness.engine.submit(session_id, first)
            others = [replace(first, rank=1)]
            with pytest.raises(LimitExceededError, match="over max_session_bytes"):
                harness.engine.submit(session_id, snapshot(spec, 2))


def test_layers_that_are_not_in_a_snapshot_count():
    one = full_bytes(replace(EMA, layers=MIXED[:1]), rows=4, rank=2, window=1)
    rest = full_bytes(replace(EMA, layers=MIXED[1:]), rows=4, rank=2, window=1)
    with Harness(max_history_bytes=one + rest - 1) as harness:
        session_id = harness.open(EMA)
        harness.solve(session_id, snapshot(EMA, 0, layers=[0], rank_cap=2))
        other = snapshot(EMA, 1, layers=[1, 2], rank_cap=2)
        with pytest.raises(LimitExceededError, match="take up to"):
            harness.engine.admit(session_id, other.header)


def test_without_histories_there_is_no_limit():
    spec = replace(EMA, history="snapshot")
    with Harness(max_history_bytes=1) as harness:
        assert harness.solve(harness.open(spec), snapshot(spec))


def test_a_state_over_the_limit_is_refused():
    sent = [snapshot(EMA, step) for step in range(2)]
    state = SessionState(
        tuple(LayerState(i, 1, folded(EMA, sent, i)[0]) for i in range(3))
    )
    nbytes = sum(layer.history.nbytes for layer in state.layers)
    with Harness(max_history_bytes=nbytes - 1) as harness:
        session_id = harness.open(EMA)
        with pytest.raises(LimitExceededError, match=f"take up to {nbytes} bytes"):
            harness.engine.import_state(session_id, state)
        harness.engine.import_state(session_id, SessionState(state.layers[1:]))
    with Harness(max_history_bytes=nbytes) as harness:
        harness.engine.import_state(harness.open(EMA), state)


@pytest.mark.parametrize(
    ("layer", "side", "shape", "expected"),
    [
        (1, "activations", (4, 6), r"expected \(3, rows, 6\)"),
        (1, "derivatives", (2, 4, 4), r"expected \(3, rows, 4\)"),
        (1, "derivatives", (3, 4, 5), r"expected \(3, rows, 4\)"),
        (1, "derivatives", (3, 5, 4), "4 rows of activations and 5 of derivatives"),
        (0, "activations", (1, 4, 9), r"expected \(rows, 9\)"),
        (2, "derivatives", (1, 4, 7), r"expected \(rows, 7\)"),
        (2, "activations", (4, 12), r"expected \(rows, 11\)"),
        (2, "activations", (11,), r"have shape \(11,\); expected \(rows, 11\)"),
    ],
)
def test_rows_of_wrong_shapes_are_refused(harness, layer, side, shape, expected):
    sent = snapshot(EMA, 0)
    rows = list(sent.layers)
    rows[layer] = replace(rows[layer], **{side: torch.ones(shape)})

    with pytest.raises(InvalidRequestError, match=expected):
        harness.engine.admit(
            harness.open(EMA), replace(sent, layers=tuple(rows)).header
        )


def test_an_embedding_may_have_any_number_of_activation_rows(harness):
    spec = session_spec(MIXED[2], history="snapshot", on_late="wait")
    session_id, sent = harness.open(spec), snapshot(spec)
    for step, count in enumerate((0, 1, 9)):
        rows = replace(sent.layers[0], activations=torch.ones(count, 11))
        one = replace(sent, step=step, layers=(rows,))
        (version,) = harness.solve(session_id, one)

        assert isinstance(version, Version)
        assert version.rows == 4
        inverse = version.preconditioner.activations
        diagonal = torch.full((1, 11), 1 / (count / 4 + inverse.damping))
        torch.testing.assert_close(inverse.tensor, diagonal)
