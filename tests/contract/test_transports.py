"""Every transport does the same: results, refusals, and all that losing it means."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from skfac.client.capture import PendingSnapshot
from skfac.client.store import Store
from skfac.client.transport import Transport, connect
from skfac.wire.errors import (
    LimitExceededError,
    ServiceError,
    SessionMismatchError,
)
from skfac.wire.outcome import Loss, Outcome, Version
from skfac.wire.session import SessionSpec
from skfac.wire.snapshot import LayerRows, Snapshot
from skfac.wire.staging import HostCopy
from tests.support.servers import LONG_S
from tests.support.values import (
    MIXED,
    assert_same_history,
    assert_same_preconditioner,
    folded,
    layer_spec,
    session_spec,
    snapshot,
)

SETTINGS: dict[str, Any] = {"decay": 0.7, "window": 3, "rank_cap": 3, "damping": 0.1}


@pytest.fixture
def spec(request) -> SessionSpec:
    """A session of layers of every shape, of a job that no other test has."""
    job = request.node.name[:100]
    return session_spec(*MIXED, job=job, history="ema", lag=1, on_late="wait")


class Trainer:
    """One rank that pushes what it is told to."""

    def __init__(self, target: str, spec: SessionSpec, rank: int = 0) -> None:
        self.spec, self.store = spec, Store(spec)
        self.transport: Transport = connect(target, spec, rank, self.store.link(0))

    def push(self, *sent: Snapshot) -> None:
        for one in sent:
            copies = {
                rows.layer: HostCopy([rows.activations, rows.derivatives], None)
                for rows in one.layers
            }
            pending = PendingSnapshot(one.rank, one.step, one.settings, copies)
            self.store.expect(one.step)
            self.transport.push(pending)

    def outcomes(self, step: int) -> list[Outcome]:
        """Wait for the outcome of each layer."""
        found = self.store._expected[step]
        with self.store._changed:
            assert self.store._changed.wait_for(lambda: None not in found, LONG_S)
        return [outcome for outcome in found if outcome is not None]

    def wait_for_link(self, *, up: bool) -> None:
        with self.store._changed:
            changed = self.store._changed
            assert changed.wait_for(lambda: self.store.links == [up], LONG_S)


@contextmanager
def trainer_of(target: str, spec: SessionSpec, rank: int = 0) -> Iterator[Trainer]:
    trainer = Trainer(target, spec, rank)
    try:
        assert trainer.store.await_links(LONG_S)
        yield trainer
    finally:
        trainer.transport.close()


def check_versions(
    spec: SessionSpec, outcomes: list[Outcome], sent: list[Snapshot]
) -> None:
    for layer, outcome in enumerate(outcomes):
        assert isinstance(outcome, Version), outcome
        assert (outcome.layer, outcome.step) == (layer, sent[-1].step)
        assert_same_preconditioner(outcome.preconditioner, folded(spec, sent, layer)[1])


def test_versions_are_those_of_the_formulas(target, spec, request):
    sent = [snapshot(spec, step, **SETTINGS) for step in (0, 1, 5)]
    with trainer_of(target, spec) as trainer:
        for number, one in enumerate(sent):
            trainer.push(one)
            outcomes = trainer.outcomes(one.step)
            check_versions(spec, outcomes, sent[: number + 1])
            assert [o.updates for o in outcomes] == [number + 1] * len(MIXED)
        counts = trainer.transport.counts()
        ways = ("shared_sent_bytes", "shared_received_bytes")
        shared = [name for name in ways if counts.get(name)]
        way = request.node.callspec.params["target"]
        assert len(shared) == (2 if way in {"tcp", "unix"} else 0)


def test_histories_move_to_another_session(target, spec):
    sent = [snapshot(spec, step, **SETTINGS) for step in range(3)]
    with trainer_of(target, spec) as trainer:
        for one in sent[:2]:
            trainer.push(one)
            trainer.outcomes(one.step)
        state = trainer.transport.export_state(LONG_S)
    assert state is not None
    for layer in state.layers:
        expected = folded(spec, sent[:2], layer.layer)[0]
        assert_same_history(layer.history, expected)

    with trainer_of(target, replace(spec, instance="again")) as trainer:
        assert trainer.transport.import_state(state, LONG_S)
        trainer.push(sent[2])
        check_versions(spec, trainer.outcomes(2), sent)


def test_a_history_of_another_kind_is_refused(target, spec, caplog):
    with trainer_of(target, spec) as trainer:
        trainer.push(snapshot(spec, 0, **SETTINGS))
        trainer.outcomes(0)
        state = trainer.transport.export_state(LONG_S)
    assert state is not None

    other = replace(spec, instance="again", history="window")
    with trainer_of(target, other) as trainer:
        assert not trainer.transport.import_state(state, LONG_S)

    assert (
        "The histories were not imported: The history of layer 'linear' is of 'ema'; "
        "the session keeps 'window'." in caplog.text
    )


def with_rows(one: Snapshot, layer: int, **tensors: Any) -> Snapshot:
    rows = [replace(r, **tensors) if r.layer == layer else r for r in one.layers]
    return replace(one, layers=tuple(rows))


def test_a_snapshot_is_refused_with_the_reason_and_the_next_is_taken(target, spec):
    good = snapshot(spec, 3, **SETTINGS)
    nan = torch.full_like(good.layers[0].activations, torch.nan)
    narrow = torch.zeros(4, 3)
    with trainer_of(target, spec) as trainer:
        for step, wrong, text in (
            (0, {"activations": nan}, "layer 'linear' at step 0 have NaN or infinite"),
            (1, {"activations": narrow}, r"have shape (4, 3); expected (rows, 9)."),
            (2, {"derivatives": narrow}, r"have shape (4, 3); expected (rows, 5)."),
        ):
            trainer.push(with_rows(replace(good, step=step), 0, **wrong))
            for outcome in trainer.outcomes(step):
                assert isinstance(outcome, Loss)
                assert outcome.reason == "refused"
                assert text in outcome.message
        trainer.push(good)
        check_versions(spec, trainer.outcomes(3), [good])


def test_a_snapshot_may_be_empty(target, spec):
    rows = (
        LayerRows(i, *(torch.zeros(*spec.layers[i].block_shape, 0, d) for d in dims))
        for i, dims in enumerate((la.d_in, la.d_out) for la in spec.layers)
    )
    empty = replace(snapshot(spec, 0, **SETTINGS), layers=tuple(rows))
    with trainer_of(target, spec) as trainer:
        trainer.push(empty)
        reasons = [o.reason for o in trainer.outcomes(0) if isinstance(o, Loss)]

    assert reasons == ["empty"] * len(MIXED)


def test_closing_is_idempotent_and_ends_all_threads(target, spec):
    before = set(threading.enumerate())
    with trainer_of(target, spec) as trainer:
        trainer.push(snapshot(spec, 0, **SETTINGS))
    trainer.transport.close()
    mine = [t for t in set(threading.enumerate()) - before if "skfac" in t.name]

    assert not mine
    assert trainer.store.links == [False]
    assert trainer.transport.export_state(0.1) is None


# ------------------------------------------------------------------- servers only


def refusal_of(target: str, spec: SessionSpec, rank: int = 0) -> ServiceError:
    store = Store(spec)
    transport = connect(target, spec, rank, store.link(0))
    try:
        with pytest.raises(ServiceError) as caught:
            store.await_links(LONG_S)
        return caught.value
    finally:
        transport.close()


def test_a_session_over_a_limit_is_refused(place, spec):
    layers = tuple(layer_spec(f"fc{index}") for index in range(7))
    error = refusal_of(place.target, replace(spec, layers=layers))

    assert type(error) is LimitExceededError
    assert str(error).endswith("declares 7 layers; max_layers = 6.")


def test_a_rank_that_differs_is_refused(place, spec):
    two = replace(spec, world_size=2)
    with trainer_of(place.target, two):
        error = refusal_of(place.target, replace(two, lag=2), rank=1)

    assert type(error) is SessionMismatchError
    assert str(error).endswith("differs from its session: lag is 2 instead of 1.")


def test_a_snapshot_over_a_limit_is_refused(place, spec):
    large = snapshot(spec, 0, count=2000, **SETTINGS)
    with trainer_of(place.target, spec) as trainer:
        trainer.push(large)
        (outcome, *_) = trainer.outcomes(0)

    assert isinstance(outcome, Loss)
    assert "over max_snapshot_bytes = 100000" in outcome.message


def test_two_ranks_share_a_session(place, spec):
    two = replace(spec, world_size=2, history="snapshot")
    sent = [snapshot(two, 0, rank, **SETTINGS) for rank in (0, 1)]
    with (
        trainer_of(place.target, two, 0) as first,
        trainer_of(place.target, two, 1) as second,
    ):
        first.push(sent[0])
        second.push(sent[1])
        pairs = zip(first.outcomes(0), second.outcomes(0), strict=True)
        for mine, theirs in pairs:
            assert isinstance(mine, Version)
            assert isinstance(theirs, Version)
            assert (mine.ranks, mine.rows) == (2, 8)
            assert_same_preconditioner(mine.preconditioner, theirs.preconditioner)


def test_what_a_lost_server_owes_is_sent_again(place, spec):
    spec = replace(spec, history="snapshot", lag=2)
    with trainer_of(place.target, spec) as trainer:
        trainer.push(snapshot(spec, 0, **SETTINGS))
        solved = trainer.outcomes(0)
        check_versions(spec, solved, [snapshot(spec, 0, **SETTINGS)])
        place.crash()
        trainer.wait_for_link(up=False)
        began_s = time.monotonic()
        late = [snapshot(spec, step, **SETTINGS) for step in (1, 2)]
        trainer.push(*late)
        assert trainer.transport.export_state(0.1) is None
        assert time.monotonic() - began_s < 1  # nobody waits for what is not there
        # Its layers have moved meanwhile: another server has solved a newer step.
        other = trainer.store.link(1)
        trainer.store.expect(3, [1] * len(spec.layers))
        assert other.receive([replace(outcome, step=3) for outcome in solved]) == [3]
        place.restart()
        for one in late:
            check_versions(spec, trainer.outcomes(one.step), [one])
        counts = trainer.transport.counts()

    assert (counts["connects"], counts["disconnects"]) == (2, 1)
