"""What a session remembers: how much it may, and which states it goes on from."""

import math
from dataclasses import replace

import pytest
import torch

from skfac.curvature.factor import Moment
from skfac.wire.errors import (
    InvalidRequestError,
    LimitExceededError,
    ServerUnavailableError,
    SessionMismatchError,
)
from skfac.wire.outcome import Version
from skfac.wire.session import SessionSpec
from skfac.wire.state import LayerState, SessionState
from tests.support.values import (
    Harness,
    assert_same_history,
    assert_same_preconditioner,
    folded,
    layer_spec,
    session_spec,
    snapshot,
)

LAYERS = (
    layer_spec("linear", 9, 5),
    layer_spec("grouped", 6, 4, kind="conv2d", groups=3),
    layer_spec("embedding", 11, 7, kind="embedding", bias=False, diagonal=True),
)
EMA = session_spec(*LAYERS, history="ema", on_late="wait")
WINDOW = replace(EMA, history="window")
BOTH = pytest.mark.parametrize("spec", [EMA, WINDOW], ids=["ema", "window"])
SETTINGS = {"decay": 0.7, "window": 3, "rank_cap": 4}


def sent_to(spec: SessionSpec, steps: range):
    return [snapshot(spec, step, **SETTINGS) for step in steps]


def state_after(spec: SessionSpec, steps: int) -> SessionState:
    """What a session's layers remember of that many steps."""
    sent = sent_to(spec, range(steps))
    layers = range(len(spec.layers))
    return SessionState(
        tuple(LayerState(i, steps - 1, folded(spec, sent, i)[0]) for i in layers)
    )


@pytest.fixture
def harness():
    with Harness() as harness:
        yield harness


# ------------------------------------------------------------------- export, import


@BOTH
def test_what_is_exported_is_what_was_folded(harness, spec):
    session_id = harness.open(spec)
    assert harness.engine.export_state(session_id).layers == ()
    harness.solve(session_id, *sent_to(spec, range(4)))

    state = harness.engine.export_state(session_id)

    for actual, expected in zip(state.layers, state_after(spec, 4).layers, strict=True):
        assert (actual.layer, actual.step) == (expected.layer, 3)
        assert_same_history(actual.history, expected.history)


@BOTH
def test_a_session_goes_on_from_what_was_exported(harness, spec):
    session_id = harness.open(spec)
    harness.solve(session_id, *sent_to(spec, range(4)))
    state = harness.engine.export_state(session_id)
    uninterrupted = harness.solve(session_id, *sent_to(spec, range(4, 6)))

    with Harness() as second:
        resumed = second.open(spec)
        second.engine.import_state(resumed, state)
        second.engine.import_state(resumed, state)  # as after a lost answer
        after = second.solve(resumed, *sent_to(spec, range(4, 6)))

    for actual, expected in zip(after, uninterrupted, strict=True):
        assert isinstance(actual, Version)
        assert isinstance(expected, Version)
        assert actual.updates == expected.updates == (6 if spec is EMA else 3)
        assert_same_preconditioner(actual.preconditioner, expected.preconditioner)


def test_a_snapshot_history_is_not_kept(harness):
    spec = replace(EMA, history="snapshot")
    session_id = harness.open(spec)
    harness.solve(session_id, snapshot(spec))

    assert harness.engine.export_state(session_id).layers == ()
    assert harness.engine.status().sessions[0].history_bytes == 0


def test_layers_without_rows_have_no_history(harness):
    session_id = harness.open(EMA)
    empty = snapshot(EMA, 1, layers=[0, 1, 2], count=0)
    harness.solve(session_id, snapshot(EMA, 0, layers=[1], **SETTINGS), empty)

    (state,) = harness.engine.export_state(session_id).layers

    assert (state.layer, state.step, state.history.updates) == (1, 0, 1)


def test_an_import_replaces_what_was_imported_before(harness):
    session_id = harness.open(EMA)
    harness.engine.import_state(session_id, state_after(EMA, 5))
    short = SessionState(state_after(EMA, 2).layers[1:])
    harness.engine.import_state(session_id, short)

    layers = harness.engine.export_state(session_id).layers

    assert [(state.layer, state.step) for state in layers] == [(1, 1), (2, 1)]
    nbytes = sum(state.history.nbytes for state in short.layers)
    assert harness.engine.status().sessions[0].history_bytes == nbytes
    harness.engine.import_state(session_id, SessionState(()))
    assert harness.engine.status().sessions[0].history_bytes == 0


def test_nothing_is_imported_after_the_first_complete_step(harness):
    spec = replace(EMA, world_size=2)
    session_id, state = harness.open(spec), state_after(EMA, 2)
    harness.engine.submit(session_id, snapshot(spec, 5, 1))
    harness.engine.import_state(session_id, state)  # rank 1 was early

    harness.solve(session_id, snapshot(spec, 5, 0))

    with pytest.raises(SessionMismatchError, match="'job' has complete snapshots alr"):
        harness.engine.import_state(session_id, state)
    with pytest.raises(SessionMismatchError, match="imported before the first"):
        harness.engine.admit_state(session_id, state.layers[0].header, 0)
    (exported, *_) = harness.engine.export_state(session_id).layers
    assert (exported.step, exported.history.updates) == (5, 3)


def test_rows_that_are_in_an_imported_history_are_refused(harness):
    session_id = harness.open(EMA)
    layers = state_after(EMA, 4).layers
    harness.engine.import_state(session_id, SessionState(layers[1:]))

    with pytest.raises(
        SessionMismatchError,
        match="Rank 0 pushed step 3 of layer 'grouped', whose imported history ends at "
        "step 3; steps must not go backwards",
    ):
        harness.engine.submit(session_id, snapshot(EMA, 3))
    assert harness.solve(session_id, snapshot(EMA, 3, layers=[0]))
    assert harness.solve(session_id, snapshot(EMA, 4))


def test_a_draining_engine_exports_and_does_not_import(harness):
    session_id = harness.open(EMA)
    harness.solve(session_id, snapshot(EMA))
    other = harness.open(replace(EMA, job="other"))
    harness.engine.drain(0.0)

    assert len(harness.engine.export_state(session_id).layers) == 3
    with pytest.raises(ServerUnavailableError):
        harness.engine.import_state(other, state_after(EMA, 1))


def test_export_and_import_keep_the_lease(harness):
    session_id, state = harness.open(EMA), state_after(EMA, 1)
    calls = (
        lambda: harness.engine.export_state(session_id),
        lambda: harness.engine.import_state(session_id, state),
        lambda: harness.engine.admit_state(session_id, state.layers[0].header, 0),
    )
    for call in calls:
        harness.advance(59.0)
        call()
    harness.advance(59.0)

    assert harness.jobs() == ["job"]


# ------------------------------------------------------------------- refusals


def with_layer(index: int, **changes):
    """A state of two updates with one layer's history changed."""
    layers = list(state_after(EMA, 2).layers)
    history = replace(layers[index].history, **changes)
    layers[index] = replace(layers[index], history=history)
    return SessionState(tuple(layers))


def with_moment(index: int, side: str, **changes):
    (moment,) = getattr(state_after(EMA, 2).layers[index].history, side)
    return with_layer(index, **{side: (replace(moment, **changes),)})


ROWS = torch.ones(2, 9, dtype=torch.float64)
GROUPS = torch.ones(3, 2, 6, dtype=torch.float64)
TWO = 2 * (Moment("rows", ROWS, 1.0),)
WRONG = {
    "window": (state_after(WINDOW, 2), "'linear' is of 'window'; the session keeps"),
    "diagonal": (with_layer(0, diagonal=True), "diagonal = True; the layer False"),
    "not diagonal": (with_layer(2, diagonal=False), "diagonal = False; the layer T"),
    "dtype": (with_layer(0, dtype=torch.float16), r"of dtype torch.float16; float32"),
    "no moments": (
        with_layer(0, activations=(), derivatives=()),
        "has 0 moments of activations and 0 of derivatives for 2 updates",
    ),
    "one side": (with_layer(0, derivatives=()), "1 moments of activations and 0 of"),
    "updates": (with_layer(0, updates=0), "1 of derivatives for 0 updates"),
    "two moments": (
        with_layer(0, activations=TWO, derivatives=TWO),
        "has 2 moments a side; an ema has one",
    ),
    "form": (with_moment(0, "activations", form="diagonal"), "in the form 'diagonal'"),
    "diagonal G": (with_moment(2, "derivatives", form="diagonal"), "derivatives in th"),
    "rows, diagonal": (with_moment(2, "activations", form="rows"), "in the form 'rows"),
    "width": (
        with_moment(0, "activations", tensor=ROWS[:, 1:].clone()),
        r"'linear' has activations of shape \(2, 8\) in the form 'rows'; d is 9",
    ),
    "d_out": (with_moment(0, "derivatives", tensor=ROWS), "derivatives of shape"),
    "dense": (with_moment(0, "activations", form="dense", tensor=ROWS), "form 'dense'"),
    "two diagonals": (
        with_moment(2, "activations", tensor=torch.ones(2, 11)),
        r"of shape \(2, 11\) in the form 'diagonal'",
    ),
    "groups": (with_moment(1, "activations", tensor=GROUPS[:2]), r"shape \(2, 2, 6\)"),
    "no groups": (with_moment(1, "activations", tensor=GROUPS[0]), r"shape \(2, 6\)"),
    "too many": (
        with_moment(0, "activations", tensor=ROWS[None]),
        r"of shape \(1, 2, 9\)",
    ),
    "half": (
        with_moment(0, "activations", tensor=ROWS.half()),
        "of dtype torch.float16",
    ),
    "weight 0": (with_moment(0, "activations", weight=0.0), "of weight 0.0; it must"),
    "weight inf": (with_moment(0, "derivatives", weight=math.inf), "of weight inf"),
    "weight nan": (with_moment(0, "derivatives", weight=math.nan), "of weight nan"),
    "dropped": (with_moment(0, "activations", dropped=-1.0), "dropped trace of -1.0"),
    "dropped inf": (with_moment(0, "derivatives", dropped=math.inf), "trace of inf"),
    "nan": (
        with_moment(1, "activations", tensor=GROUPS * math.nan),
        "layer index 1 has NaN or infinite entries; nothing was imported",
    ),
    "twice": (
        SessionState(2 * state_after(EMA, 2).layers[:1]),
        "the history of a layer twice",
    ),
    "layer": (
        SessionState((replace(state_after(EMA, 2).layers[0], layer=3),)),
        "Layer index 3 is outside the session's 3",
    ),
    "negative": (
        SessionState((replace(state_after(EMA, 2).layers[0], layer=-1),)),
        "Layer index -1 is outside",
    ),
}


@pytest.mark.parametrize(("state", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_state_that_does_not_fit_is_refused(harness, state, message):
    session_id = harness.open(EMA)

    with pytest.raises(InvalidRequestError, match=message):
        harness.engine.import_state(session_id, state)

    assert harness.engine.export_state(session_id).layers == ()
    harness.engine.import_state(session_id, state_after(EMA, 2))


def test_a_session_without_histories_takes_none(harness):
    spec = replace(EMA, history="snapshot")
    state = state_after(EMA, 1)

    with pytest.raises(InvalidRequestError, match="the session keeps 'snapshot'"):
        harness.engine.import_state(harness.open(spec), state)
    snapshots = tuple(
        replace(layer, history=replace(layer.history, history="snapshot"))
        for layer in state.layers
    )
    with pytest.raises(InvalidRequestError, match="the session keeps 'snapshot'"):
        harness.engine.import_state(harness.open(spec), SessionState(snapshots))


def test_moments_of_float32_and_dense_ones_are_taken(harness):
    dense = torch.eye(9, dtype=torch.float32)
    state = with_moment(0, "activations", form="dense", tensor=dense)
    session_id = harness.open(EMA)

    harness.engine.import_state(session_id, state)

    (taken, *_) = harness.engine.export_state(session_id).layers
    assert_same_history(taken.history, state.layers[0].history)


# ------------------------------------------------------------------- limits


def full_bytes(spec: SessionSpec, *, rows: int, rank: int | None, window: int) -> int:
    """What float64 histories take once they are full, written out."""
    total = 0
    for layer in spec.layers:
        for dim, diagonal in ((layer.d_in, layer.diagonal), (layer.d_out, False)):
            ema = spec.history == "ema"
            kept = min(rank or dim if ema else rows, dim)
            updates = window if spec.history == "window" else 1
            kept = 1 if diagonal else kept
            total += 8 * updates * layer.groups * kept * dim
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
    with Harness(max_history_bytes=4000) as harness:
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


def test_layers_that_are_not_in_a_snapshot_count():
    one = full_bytes(replace(EMA, layers=LAYERS[:1]), rows=4, rank=2, window=1)
    rest = full_bytes(replace(EMA, layers=LAYERS[1:]), rows=4, rank=2, window=1)
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
    state = state_after(EMA, 2)
    nbytes = sum(layer.history.nbytes for layer in state.layers)
    with Harness(max_history_bytes=nbytes - 1) as harness:
        session_id = harness.open(EMA)
        with pytest.raises(LimitExceededError, match=f"take up to {nbytes} bytes"):
            harness.engine.import_state(session_id, state)
        harness.engine.import_state(session_id, SessionState(state.layers[1:]))
    with Harness(max_history_bytes=nbytes) as harness:
        harness.engine.import_state(harness.open(EMA), state)


# ------------------------------------------------------------------- shapes of rows


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
    spec = session_spec(LAYERS[2], history="snapshot", on_late="wait")
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
