"""What a session remembers: how much it may, and which states it goes on from."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from skfac.curvature.factor import Moment
from skfac.service.histories import Histories
from skfac.wire.errors import (
    InvalidRequestError,
    ServerUnavailableError,
    SessionMismatchError,
)
from skfac.wire.outcome import Version
from skfac.wire.session import SessionSpec
from skfac.wire.state import LayerState, SessionState
from tests.support.values import (
    MIXED,
    Harness,
    assert_same_history,
    assert_same_preconditioner,
    folded,
    session_spec,
    snapshot,
)

EMA = session_spec(*MIXED, history="ema", on_late="wait")
WINDOW = replace(EMA, history="window")
BOTH = pytest.mark.parametrize("spec", [EMA, WINDOW], ids=["ema", "window"])
SETTINGS: dict[str, Any] = {"decay": 0.7, "window": 3, "rank_cap": 4}


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
        updates = 3 if spec is WINDOW else 1 + actual.step
        assert actual.updates == expected.updates == updates
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


def test_an_older_step_that_comes_late_does_not_turn_the_step_back():
    histories, sent = Histories(EMA, max_bytes=1), sent_to(EMA, range(2))
    histories.store(0, 9, folded(EMA, sent[:1])[0])
    histories.store(0, 4, folded(EMA, sent)[0])

    (state,) = histories.state().layers

    assert (state.step, state.history.updates) == (9, 2)
    assert histories.nbytes == state.history.nbytes


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
        "has 2 moments a side; 'ema' has at most 1",
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
    "no rows": (
        with_moment(0, "activations", tensor=ROWS[:0].clone()),
        r"of shape \(0, 9\) in the form 'rows'; d is 9",
    ),
    "below 0": (
        with_moment(2, "activations", tensor=torch.eye(11)[:1] - 0.5),
        "layer index 2 has negative entries in a diagonal; nothing was imported",
    ),
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


def test_a_window_has_no_more_updates_than_may_be_asked_for(harness, monkeypatch):
    monkeypatch.setattr("skfac.service.histories.MAX_WINDOW", 2)

    harness.engine.import_state(harness.open(WINDOW), state_after(WINDOW, 2))
    other = replace(WINDOW, job="other")
    with pytest.raises(InvalidRequestError, match="3 moments a side; 'window' has at"):
        harness.engine.import_state(harness.open(other), state_after(WINDOW, 3))


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
