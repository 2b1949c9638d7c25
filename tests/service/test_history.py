"""Versions follow from the sequence of a layer's updates, whatever the timing."""

from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest
import torch

from skfac.curvature.history import LayerHistory
from skfac.curvature.settings import CurvatureSettings
from skfac.service.scheduler import Task
from skfac.service.solver import ATTEMPTS, Solver
from skfac.wire.outcome import Loss, Outcome, Version
from skfac.wire.snapshot import LayerRows, Snapshot
from tests.support.tasks import solved
from tests.support.values import (
    MIXED,
    PATIENCE_S,
    Harness,
    assembly_of,
    assert_same_history,
    assert_same_preconditioner,
    folded,
    layer_spec,
    session_spec,
    snapshot,
)

HISTORIES = pytest.mark.parametrize("history", ["snapshot", "window", "ema"])
SETTINGS: dict[str, Any] = {"decay": 0.7, "window": 3, "rank_cap": 4, "energy": 0.999}


@pytest.fixture
def harness():
    with Harness() as harness:
        yield harness


# ------------------------------------------------------------------- the engine


@HISTORIES
def test_versions_are_those_of_the_folded_history(harness, history):
    spec = session_spec(*MIXED, history=history, on_late="wait")
    session_id = harness.open(spec)
    sent = [
        snapshot(spec, step, count=1 + step % 3, damping=0.1 + step, **SETTINGS)
        for step in range(6)
    ]

    for number, one in enumerate(sent, start=1):
        for version in harness.solve(session_id, one):
            assert isinstance(version, Version)
            expected, found = folded(spec, sent[:number], version.layer)
            assert_same_preconditioner(version.preconditioner, found)
            assert version.updates == expected.updates
            assert (version.rows, version.ranks) == (one.layers[0].count, 1)


@HISTORIES
def test_several_ranks_are_one_update(harness, history):
    spec = session_spec(*MIXED, history=history, world_size=2, on_late="wait")
    session_id, joined = harness.open(spec), []
    for step in range(3):
        both = [snapshot(spec, step, rank, count=2, **SETTINGS) for rank in (1, 0)]
        versions = harness.solve(session_id, *both)
        rows = zip(both[1].layers, both[0].layers, strict=True)
        stacked = tuple(
            LayerRows(
                zero.layer,
                torch.cat([zero.activations, one.activations], -2),
                torch.cat([zero.derivatives, one.derivatives], -2),
            )
            for zero, one in rows
        )
        joined.append(replace(both[1], layers=stacked))

    for version in versions:
        expected, found = folded(spec, joined, version.layer)
        assert isinstance(version, Version)
        assert_same_preconditioner(version.preconditioner, found)
        assert (version.updates, version.rows) == (expected.updates, 4)


@HISTORIES
@pytest.mark.parametrize("lag", [0, 1])
def test_what_is_superseded_is_still_folded(harness, gate, history, lag):
    entered, opened, _ = gate
    spec = session_spec(*MIXED, history=history, lag=lag)
    session_id = harness.open(spec)
    sent = [snapshot(spec, step, **SETTINGS) for step in range(7)]
    with closing(harness.engine.subscribe(session_id, {})) as subscription:
        harness.engine.submit(session_id, sent[0])
        assert entered.wait(PATIENCE_S)
        for one in sent[1:]:
            harness.engine.submit(session_id, one)
        # The solver has step 0 of all layers.
        superseded = harness.engine.status().sessions[0].superseded
        assert superseded == 3 * (5 - lag)
        opened.set()
        newest: list[Outcome] = []
        while len(newest) < 3:
            newest += [o for o in subscription.take(PATIENCE_S) if o.step == 6]

    for version in newest:
        expected, found = folded(spec, sent, version.layer)
        assert isinstance(version, Version)
        assert_same_preconditioner(version.preconditioner, found)
        assert version.updates == expected.updates


def test_rows_that_are_carried_count_in_the_quota(gate):
    entered, opened, _ = gate
    spec = session_spec(history="ema")
    nbytes = snapshot(spec).layers[0].nbytes
    with Harness(max_session_bytes=3 * nbytes) as harness:
        session_id = harness.open(spec)
        for step in range(3):  # the solver has the first, the last carries the second
            harness.engine.submit(session_id, snapshot(spec, step))
            assert entered.wait(PATIENCE_S)
        with pytest.raises(Exception, match=f"has {3 * nbytes} bytes of rows"):
            harness.engine.submit(session_id, snapshot(spec, 3))
        opened.set()


def test_a_session_that_is_opened_again_begins_anew(harness):
    spec = session_spec(history="ema")
    session_id = harness.open(spec)
    harness.solve(session_id, snapshot(spec, 0))
    (before,) = harness.solve(session_id, snapshot(spec, 1))

    harness.engine.close_session(session_id, 0)
    (after,) = harness.solve(harness.open(spec), snapshot(spec, 2))

    assert isinstance(before, Version)
    assert isinstance(after, Version)
    assert (before.updates, after.updates) == (2, 1)


def test_a_solver_that_raises_leaves_the_history(harness, monkeypatch):
    spec = session_spec(history="ema")
    session_id, solve = harness.open(spec), Solver.solve
    sent = [snapshot(spec, step) for step in range(3)]

    def broken(self, batch):
        if batch[0].assembly.step == 1:
            raise ZeroDivisionError("a bug")
        return solve(self, batch)

    monkeypatch.setattr(Solver, "solve", broken)
    outcomes = [harness.solve(session_id, one)[0] for one in sent]

    assert [type(outcome) for outcome in outcomes] == [Version, Loss, Version]
    assert isinstance(outcomes[2], Version)
    _, found = folded(spec, [sent[0], sent[2]])
    assert_same_preconditioner(outcomes[2].preconditioner, found)


# ------------------------------------------------------------------- the solver


def solve_all(spec, sent: list[Snapshot]):
    """One task after the other; returns the last solution."""
    solver, history, solution = Solver("cpu"), None, None
    for one in sent:
        task = Task("job", spec, assembly_of([one]), 0.0, history=history)
        solution = solved(task, solver)
        history = solution.history
    assert solution is not None
    return solution


@HISTORIES
def test_the_solution_holds_the_history(history):
    spec = session_spec(history=history)
    sent = [snapshot(spec, step, **SETTINGS) for step in range(5)]

    solution = solve_all(spec, sent)

    expected, found = folded(spec, sent)
    if history == "snapshot":
        assert solution.history is None
    else:
        assert_same_history(solution.history, expected)
    assert_same_preconditioner(solution.outcome.preconditioner, found)


def test_what_cannot_be_averaged_stays_in_the_history(monkeypatch):
    spec = session_spec(layer_spec(d_in=4, d_out=3), history="ema")
    sent = snapshot(spec, 0)

    def fails(self, settings):
        raise torch.linalg.LinAlgError("No eigenvalues.")

    with monkeypatch.context() as patched:
        patched.setattr(LayerHistory, "mean", fails)
        solution = solved(Task("job", spec, assembly_of([sent]), 0.0))

    assert isinstance(solution.outcome, Loss)
    assert "No eigenvalues" in solution.outcome.message
    assert_same_history(solution.history, folded_only(spec, [sent]))


def test_what_cannot_be_inverted_stays_in_the_history(monkeypatch):
    spec = session_spec(layer_spec(d_in=4, d_out=3), history="ema")
    sent = [snapshot(spec, step, damping=1e-7) for step in range(2)]
    rows = sent[0].layers[0]
    large = LayerRows(0, 1e5 * rows.activations, 1e5 * rows.derivatives)
    sent[0] = replace(sent[0], layers=(large,))
    folds, fold = [], LayerHistory.with_update

    def counted(self, *arguments):
        folds.append(self.updates)
        return fold(self, *arguments)

    monkeypatch.setattr(LayerHistory, "with_update", counted)
    first = solved(Task("job", spec, assembly_of(sent[:1]), 0.0))

    assert isinstance(first.outcome, Loss)
    assert first.outcome.reason == "failed"
    assert (first.retries, folds) == (ATTEMPTS - 1, [0])  # folded once only
    assert first.history is not None
    assert_same_history(first.history, folded_only(spec, sent[:1]))
    second = Task("job", spec, assembly_of(sent[1:]), 0.0, history=first.history)
    assert_same_history(solved(second).history, folded_only(spec, sent))


def folded_only(spec, sent: list[Snapshot]) -> LayerHistory:
    history = LayerHistory.empty(spec.history)
    for one in sent:
        (rows,) = one.layers
        history = history.fold(rows.activations, rows.derivatives, one.settings)
    return history


@pytest.mark.parametrize("carried", [False, True])
def test_what_cannot_be_folded_leaves_the_history_as_it_was(carried, caplog):
    spec = session_spec(history="ema")
    good, bad, newest = (snapshot(spec, step) for step in range(3))
    huge = torch.full((4, 3), 1e200, dtype=torch.float64)
    rows = LayerRows(0, huge, torch.ones(4, 2, dtype=torch.float64))
    bad = replace(bad, layers=(rows,))
    history = folded_only(spec, [good])

    if carried:
        earlier = (assembly_of([bad]),)
        task = Task("job", spec, assembly_of([newest]), 0.0, earlier, history)
        solution = solved(task)
        assert_same_history(solution.history, folded_only(spec, [good, newest]))
        assert "step 1 of layer 'fc' is not in its history" in caplog.text
    else:
        task = Task("job", spec, assembly_of([bad]), 0.0, history=history)
        solution = solved(task)
        assert solution.history is history
        assert isinstance(solution.outcome, Loss)
        assert "'fc' at step 1 was not inverted" in solution.outcome.message


def test_no_rows_are_no_update():
    spec = session_spec(history="ema")
    full, empty = snapshot(spec, 0), snapshot(spec, 1, count=0)
    history = folded_only(spec, [full])

    alone = solved(Task("job", spec, assembly_of([empty]), 0.0))
    after = Task("job", spec, assembly_of([empty]), 0.0, history=history)
    carrying = replace(after, earlier=(assembly_of([snapshot(spec, 2)]),))

    assert alone.history is None or not alone.history.updates
    assert solved(after).history is history
    solution = solved(carrying)
    assert isinstance(solution.outcome, Loss)
    assert solution.outcome.reason == "empty"
    expected = folded_only(spec, [full, snapshot(spec, 2)])
    assert_same_history(solution.history, expected)


def test_settings_without_numbers_of_their_own_have_defaults():
    assert snapshot(session_spec()).settings == CurvatureSettings(damping=0.5)
