"""The rules of time, without a network: what is used when, and what is waited for."""

import threading
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from skfac.client.checkpoint import StoreState
from skfac.client.store import Store
from skfac.curvature.inverse import DenseInverse, LowRankInverse
from skfac.curvature.layer import LayerPreconditioner
from skfac.wire.errors import (
    LateVersionError,
    ServerUnavailableError,
    SessionMismatchError,
)
from skfac.wire.outcome import Loss, Outcome, Version
from skfac.wire.session import LayerSpec, SessionSpec
from tests.support.stores import versions_at

LAYERS = (
    LayerSpec("a", "linear", 3, 2, bias=True),
    LayerSpec("b", "linear", 2, 2, bias=False),
)


def store_of(*, lag=1, update_every=1, on_late="keep", up=True) -> Store:
    spec = SessionSpec(
        job="job",
        instance="1",
        world_size=1,
        layers=LAYERS,
        damping_split="pi",
        history="snapshot",
        update_every=update_every,
        lag=lag,
        on_late=on_late,
    )
    store = Store(spec)
    store.link(0).set_link(up=up)
    return store


def version(
    layer: int, step: int, *, value=0.0, damping=1.0, dims=None, updates=1
) -> Version:
    d_in, d_out = dims or (LAYERS[layer].d_in, LAYERS[layer].d_out)
    inverses = LayerPreconditioner(
        LowRankInverse(torch.full((1, d_in), value), damping),
        LowRankInverse(torch.zeros(1, d_out), damping),
    )
    return Version(layer, step, inverses, rows=1, ranks=1, updates=updates)


def both(step: int) -> list[Outcome]:
    return [version(0, step), version(1, step)]


def used(store: Store, step: int, wait_s=0.0) -> list[int | None]:
    return [v.step if v else None for v in versions_at(store, step, wait_s)]


def test_a_version_is_held_back_until_its_step():
    store = store_of(lag=3)
    store.expect(0)
    store.link(0).receive(both(0))

    assert [used(store, step) for step in range(5)] == [[None] * 2] * 3 + [[0, 0]] * 2


def test_a_late_version_is_used_as_soon_as_it_is_there():
    store = store_of(lag=1, update_every=5)
    store.expect(0)
    assert used(store, 1) == [None, None]
    store.link(0).receive([version(0, 0)])
    assert used(store, 2) == [0, None]
    store.link(0).receive([version(1, 0)])
    assert used(store, 3) == [0, 0]
    assert store.counts["late"] == 2
    assert store.counts["vain_waits"] == 1


def test_what_a_server_owes_is_not_held_though_another_has_newer_versions():
    store = store_of(lag=2, on_late="wait")
    other = store.link(1)
    store.expect(3, [0, 0])
    store.receive(0, [version(1, 3)])
    assert store.held(0) == {1: 3}
    store.expect(4, [1, 1])
    other.receive(both(4))

    assert store.held(0) == {0: 2, 1: 4}
    assert other.held() == {0: 4, 1: 4}


def test_a_server_that_owes_the_first_step_is_asked_for_all():
    store = store_of()
    store.expect(0)

    assert store.held(0) == {}


def test_only_the_newest_version_that_is_due_counts():
    store = store_of(lag=1, update_every=2)
    store.expect(0)
    assert used(store, 1) == [None, None]
    store.expect(2)
    store.link(0).receive(both(0))
    assert used(store, 2) == [0, 0]
    store.link(0).receive(both(2))
    assert used(store, 3) == [2, 2]
    store.link(0).receive(both(0))  # again, long after
    assert used(store, 4) == [2, 2]


def test_an_older_version_never_replaces_a_newer_one():
    store = store_of(lag=1)
    for step in (0, 1):
        store.expect(step)
    store.link(0).receive(both(1))
    assert used(store, 2) == [1, 1]
    store.link(0).receive(both(0))
    assert used(store, 3) == [1, 1]
    assert store.counts["unexpected"] == 2


def test_a_lost_version_keeps_the_previous_one():
    store = store_of(lag=1)
    store.expect(0)
    store.link(0).receive(both(0))
    assert used(store, 1) == [0, 0]
    store.expect(1)
    store.link(0).receive([version(0, 1), Loss(1, 1, "failed", "it failed")])
    assert used(store, 2) == [1, 0]
    assert store.counts == {"solved": 3, "failed": 1}


def test_a_loss_is_said_once_until_a_version_comes(caplog):
    store = store_of()
    for step, reason in enumerate(("empty", "empty", "failed", "failed", "empty")):
        store.expect(step)
        store.link(0).receive([version(0, step), Loss(1, step, reason, "no rows")])
    store.expect(5)
    store.link(0).receive(both(5))
    store.expect(6)
    store.link(0).receive([version(0, 6), Loss(1, 6, "empty", "no rows")])

    said = [r.message.split(":")[0] for r in caplog.records if r.levelname == "WARNING"]
    assert said == [
        "The version of step 0 is lost (empty)",
        "The version of step 2 is lost (failed)",
        "The version of step 3 is lost (failed)",
        "The version of step 6 is lost (empty)",
    ]


def test_duplicates_and_what_nobody_expects_change_nothing():
    store = store_of()
    store.expect(0)
    assert store.link(0).receive([version(0, 0)]) == []
    first = store.link(0).receive([version(1, 0)])
    store.link(0).receive(
        [version(1, 0, value=0.5), version(0, 9), version(7, 0, dims=(1, 1))]
    )

    assert first == [0]
    assert store.counts["unexpected"] == 3
    in_use = versions_at(store, 1, 0.0)
    assert in_use[1] is not None
    assert not in_use[1].preconditioner.activations.tensor.any()


@pytest.mark.parametrize(
    "bad",
    [
        {"value": float("nan")},
        {"value": float("inf")},
        {"damping": 0.0},
        {"damping": float("nan")},
        {"dims": (4, 2)},
        {"dims": (3, 1)},
    ],
)
def test_an_unusable_inverse_is_lost_and_counted(bad):
    store = store_of()
    store.expect(0)
    store.link(0).receive([version(0, 0, **bad), version(1, 0)])

    assert used(store, 1) == [None, 0]
    assert store.counts["corrupt"] == 1
    assert store.counts["failed"] == 1


def test_it_waits_for_a_version_that_is_due():
    store = store_of()
    store.expect(0)
    answer = threading.Timer(0.05, lambda: store.link(0).receive(both(0)))
    answer.start()

    assert used(store, 1, wait_s=30.0) == [0, 0]
    assert store.counts["waits"] == 1
    assert 0 < store.waited_s < 30
    answer.join()


def test_an_inverse_that_is_no_matrix_is_lost():
    store = store_of()
    store.expect(0)
    good = version(0, 0)
    vector = LowRankInverse.__new__(LowRankInverse)
    object.__setattr__(vector, "basis", torch.zeros(3))
    object.__setattr__(vector, "damping", 1.0)
    inverses = LayerPreconditioner.__new__(LayerPreconditioner)
    object.__setattr__(inverses, "activations", vector)
    object.__setattr__(inverses, "derivatives", good.preconditioner.derivatives)
    store.link(0).receive([Version(0, 0, inverses, rows=1, ranks=1, updates=1)])

    assert used(store, 1) == [None, None]
    assert store.counts["corrupt"] == 1


def test_a_dense_inverse_that_is_not_square_is_lost():
    store = store_of()
    store.expect(0)
    good = version(0, 0).preconditioner.derivatives
    oblong = LayerPreconditioner.__new__(LayerPreconditioner)
    dense = DenseInverse.__new__(DenseInverse)
    for name, value in (("matrix", torch.ones(3, 4)), ("damping", 1.0)):
        object.__setattr__(dense, name, value)
    for name, value in (("activations", dense), ("derivatives", good)):
        object.__setattr__(oblong, name, value)
    store.link(0).receive([Version(0, 0, oblong, rows=1, ranks=1, updates=1)])

    assert used(store, 1) == [None, None]


def test_a_bug_in_a_transport_is_a_failure_that_is_said(caplog):
    store = store_of(on_late="wait")
    store.expect(0)
    with store.link(0).guard():
        raise ZeroDivisionError("a bug")

    assert not store.links[0]
    assert "no more versions will come" in caplog.text
    with pytest.raises(ServerUnavailableError, match="ZeroDivisionError: a bug"):
        versions_at(store, 1, 1e6)


@pytest.mark.parametrize("reason", ["down", "lost", "fails while waiting"])
def test_it_does_not_wait_for_what_will_not_come(reason):
    store = store_of(up=reason != "down")
    store.expect(0)
    if reason == "lost":
        store.link(0).lose(0, "refused", "NaN rows")
    breaks = threading.Timer(0.05, lambda: store.link(0).set_link(up=False))
    breaks.start()

    assert used(store, 1, wait_s=1e6) == [None, None]
    breaks.join()


def test_a_silent_server_is_waited_for_once(monkeypatch):
    store = store_of()
    waits_s: list[float] = []

    def in_vain(predicate, timeout_s):
        if not predicate():
            waits_s.append(timeout_s)
        return predicate()

    monkeypatch.setattr(store._changed, "wait_for", in_vain)
    for step in range(4):
        store.expect(step)
        assert used(store, step, wait_s=7.0) == [None, None]
    assert waits_s == [7.0]
    store.link(0).receive(both(3))  # it speaks again
    store.expect(4)
    store.expect(5)
    assert used(store, 4, wait_s=7.0) == [3, 3]
    assert used(store, 5, wait_s=7.0) == [3, 3]
    assert waits_s == [7.0, 7.0]


def test_raise_raises_and_wait_waits():
    raising = store_of(on_late="raise")
    raising.expect(0)
    with pytest.raises(LateVersionError, match="2 of 2 layers have no version"):
        versions_at(raising, 1, 0.01)

    waiting = store_of(on_late="wait", up=False)
    waiting.expect(0)
    answer = threading.Timer(0.05, lambda: waiting.link(0).receive(both(0)))
    answer.start()
    assert used(waiting, 1) == [0, 0]
    answer.join()

    waiting.expect(1)
    waiting.link(0).fail(SessionMismatchError("not you"))
    with pytest.raises(SessionMismatchError, match="not you"):
        versions_at(waiting, 2, 0.0)


def test_a_failure_leaves_keep_alone():
    store = store_of(up=False)
    store.link(0).fail(SessionMismatchError("not you"))
    store.expect(0)
    assert used(store, 1, wait_s=1e6) == [None, None]
    with pytest.raises(SessionMismatchError):
        store.await_links(0.0)


def test_what_a_checkpoint_still_expected_is_not_waited_for():
    store = store_of(on_late="wait")
    store.restore(StoreState([version(0, 3), None], {4: [None, version(1, 4)]}))

    assert used(store, 5) == [3, 4]
    assert store.counts["superseded"] == 1


def test_a_server_that_forgot_its_history_is_told_of(caplog):
    store = store_of()
    for step, updates in enumerate((1, 2, 2, 1, 2)):
        store.expect(step)
        store.link(0).receive([version(0, step, updates=updates), version(1, step)])

    assert store.counts["history_losses"] == 1
    assert "history of layer 'a' has 1 updates and had 2" in caplog.text


def test_what_another_rank_cannot_get_is_not_waited_for():
    store = store_of()
    store.expect(0, hoped=False)
    assert used(store, 1, wait_s=600.0) == [None, None]  # not after ten minutes
    store.link(0).receive(both(0))

    assert used(store, 2) == [0, 0]
    assert not store._doubted


def test_a_loss_that_is_told_twice_is_one(caplog):
    store = store_of()
    store.expect(0)
    store.link(0).lose(0, "refused", "The rows have NaN.")
    store.link(0).receive([Loss(layer, 0, "refused", "NaN.") for layer in (0, 1)])

    assert store.counts["refused"] == 2
    assert store.counts["unexpected"] == 0


def test_more_damping_than_was_asked_for_is_said_once_a_layer(caplog):
    store = store_of()
    for step in range(3):
        store.expect(step)
        more = replace(version(0, step), damping_factor=10.0)
        store.link(0).receive([more, version(1, step)])

    assert store.counts["overdamped"] == 3
    (text,) = (r.message for r in caplog.records if "damping" in r.message)
    assert "Layer 'a' has 10 times the damping that was asked for, at step 0" in text


def test_memory_is_bounded():
    store = store_of(lag=3)
    for step in range(100):
        store.expect(step)
        versions_at(store, step, 0.0)
        assert len(store._expected) <= 4


@given(
    lag=st.integers(0, 4),
    update_every=st.integers(1, 4),
    delays=st.lists(st.one_of(st.none(), st.integers(0, 6)), min_size=24, max_size=24),
)
def test_any_schedule_of_arrivals_follows_the_rule(lag, update_every, delays):
    store = store_of(lag=lag, update_every=update_every)
    arrivals: dict[int, list[int]] = {}
    arrived: set[int] = set()
    in_use: int | None = None
    for step in range(24):
        if step % update_every == 0:
            store.expect(step)
            if delays[step] is not None:
                arrivals.setdefault(step + delays[step], []).append(step)
        for capture in arrivals.get(step, []):
            store.link(0).receive(both(capture))
            arrived.add(capture)
        due = [c for c in range(0, step + 1, update_every) if c + lag <= step]
        if due and due[-1] in arrived:
            in_use = due[-1]

        assert used(store, step) == [in_use] * 2
