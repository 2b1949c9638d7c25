"""Assemblies complete with the last rank, or when their time is over."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from skfac.curvature.settings import CurvatureSettings
from skfac.service.assembler import Assembler, Assembly
from skfac.wire.errors import SessionMismatchError
from skfac.wire.session import SessionSpec
from skfac.wire.snapshot import Snapshot
from tests.support.values import keys, layer_spec, session_spec, snapshot

PAIR = session_spec(layer_spec("a"), layer_spec("b"), world_size=2)
TIMEOUT_S = 8.0


def assembler_of(spec: SessionSpec) -> Assembler:
    return Assembler(spec, timeout_s=TIMEOUT_S)


def push(assembler: Assembler, sent: Snapshot, now_s: float = 0.0) -> list[Assembly]:
    """As the engine does: what is not wanted is not added."""
    return assembler.add(sent, now_s) if assembler.wants(sent.header) else []


def memory(assembler: Assembler) -> int:
    """Entries in the assembler's books; nothing but these grows."""
    return (
        len(assembler._open)
        + len(assembler._left)
        + sum(len(steps) for of in assembler._seen.values() for steps in of.values())
    )


@st.composite
def arrivals(draw):
    """Steps of some ranks, interleaved, each rank's layers split over snapshots."""
    world, layers, steps = (draw(st.integers(1, high)) for high in (4, 3, 4))
    spec = session_spec(
        *(layer_spec(f"fc{i}") for i in range(layers)),
        world_size=world,
        lag=draw(st.integers(0, 4)),
    )
    queues = []
    for rank in range(world):
        queue = []
        for step in range(steps):
            indices = draw(st.permutations(range(layers)))
            cut = draw(st.integers(0, layers))
            parts = [part for part in (indices[:cut], indices[cut:]) if part]
            queue += [snapshot(spec, 10 * step, rank, layers=part) for part in parts]
        queues.append(queue)
    order = [rank for rank, queue in enumerate(queues) for _ in queue]
    return spec, [queues[rank].pop(0) for rank in draw(st.permutations(order))]


@given(case=arrivals(), resend=st.booleans())
def test_every_version_completes_once_with_exactly_the_rows_sent(case, resend):
    spec, sent = case
    expected = {}
    assembler, complete = assembler_of(spec), []

    for one in sent:
        for rows in one.layers:
            expected.setdefault((rows.layer, one.step), {})[one.rank] = rows
        done = push(assembler, one)
        complete += done
        full = [
            key for key, by_rank in expected.items() if len(by_rank) == spec.world_size
        ]
        assert sorted(keys(complete)) == sorted(full)
        assert not resend or push(assembler, one) == []

    assert len(set(keys(complete))) == len(complete)
    for assembly in complete:
        assert assembly.rows == expected[assembly.layer, assembly.step]
        assert set(assembly.settings.values()) == {CurvatureSettings(damping=0.5)}
    assert assembler.nbytes == 0
    assert assembler.deadline_s is None


def test_each_layer_is_complete_by_itself():
    assembler = assembler_of(PAIR)

    assert push(assembler, snapshot(PAIR, 3, 0)) == []
    assert keys(push(assembler, snapshot(PAIR, 3, 1, layers=[1]))) == [(1, 3)]
    assert keys(push(assembler, snapshot(PAIR, 3, 1, layers=[0]))) == [(0, 3)]


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_the_settings_of_the_lowest_rank_count(order):
    assembler = assembler_of(PAIR)
    sent = [snapshot(PAIR, rank=rank, damping=1.0 + rank) for rank in order]
    push(assembler, sent[0])

    (first, _) = push(assembler, sent[1])

    assert first.agreed == CurvatureSettings(damping=1.0)


def test_without_rank_0_the_settings_of_rank_1_count():
    assembler = assembler_of(PAIR)
    push(assembler, snapshot(PAIR, rank=1, damping=2.0, decay=0.5))

    (first, _) = assembler.expired(math.inf)

    assert first.agreed == CurvatureSettings(damping=2.0, decay=0.5)


@pytest.mark.parametrize("changes", [{}, {"groups": 3}, {"diagonal": True}])
def test_rows_are_in_the_order_of_the_ranks(changes):
    spec = session_spec(layer_spec(**changes), world_size=3)
    assembler = assembler_of(spec)
    sent = [snapshot(spec, 1, rank, count=rank) for rank in range(3)]
    for rank in (2, 0, 1):
        complete = push(assembler, sent[rank])

    activations, derivatives = complete[0].sides

    rows = [one.layers[0] for one in sent]
    assert all(map(torch.equal, activations, (r.activations for r in rows)))
    assert all(map(torch.equal, derivatives, (r.derivatives for r in rows)))
    assert complete[0].count == sum(d.shape[-2] for d in derivatives) == 3
    assert complete[0].nbytes == sum(t.nbytes for t in activations + derivatives)


def test_rows_that_are_here_are_not_wanted_again():
    assembler = assembler_of(PAIR)
    first, half = snapshot(PAIR, rank=0), snapshot(PAIR, rank=1, layers=[0])
    push(assembler, first)
    push(assembler, half)

    assert not assembler.wants(first.header)
    assert not assembler.wants(half.header)
    assert assembler.wants(snapshot(PAIR, rank=1).header)
    assert assembler.add(first, 0.0) == []
    assert keys(assembler.add(snapshot(PAIR, rank=1), 0.0)) == [(1, 0)]


def test_rows_that_came_first_count():
    assembler = assembler_of(PAIR)
    first = snapshot(PAIR, rank=0)
    push(assembler, first)

    assembler.add(snapshot(PAIR, rank=0, count=9), 0.0)
    (assembly, _) = push(assembler, snapshot(PAIR, rank=1))

    assert assembly.rows[0] is first.layers[0]


@pytest.mark.parametrize("lag", [0, 3])
def test_as_many_steps_can_be_sent_again_as_are_in_flight(lag):
    spec = session_spec(lag=lag)
    assembler = assembler_of(spec)
    sent = [snapshot(spec, step) for step in range(10)]
    for one in sent:
        push(assembler, one)
    recent = spec.versions_in_flight + 1

    assert not any(assembler.wants(one.header) for one in sent[-recent:])
    with pytest.raises(SessionMismatchError):
        assembler.wants(sent[-recent - 1].header)


def test_steps_that_go_backwards_are_refused_by_name_and_number():
    assembler = assembler_of(PAIR)
    push(assembler, snapshot(PAIR, 7, 1, layers=[1]))

    with pytest.raises(
        SessionMismatchError,
        match="Rank 1 pushed step 6 of layer 'b' after step 7; steps must not go back",
    ):
        assembler.wants(snapshot(PAIR, 6, 1).header)
    assert assembler.wants(snapshot(PAIR, 6, 1, layers=[0]).header)
    assert assembler.wants(snapshot(PAIR, 6, 0).header)
    assert assembler.wants(snapshot(PAIR, 8, 1).header)


def test_a_rank_too_late_is_not_waited_for():
    assembler = assembler_of(PAIR)
    push(assembler, snapshot(PAIR, 2, 1, layers=[1]), now_s=1.0)
    push(assembler, snapshot(PAIR, 2, 1, layers=[0]), now_s=2.0)
    push(assembler, snapshot(PAIR, 3, 1), now_s=2.0)

    assert assembler.expired(1.0 + TIMEOUT_S - 0.5) == []
    (only,) = assembler.expired(1.0 + TIMEOUT_S)
    rest = assembler.expired(2.0 + TIMEOUT_S)

    assert (only.layer, only.step, list(only.rows)) == (1, 2, [1])
    assert keys(rest) == [(0, 2), (0, 3), (1, 3)]
    assert assembler.expired(math.inf) == []


def test_rows_after_the_timeout_are_taken_and_ignored():
    assembler = assembler_of(PAIR)
    late = snapshot(PAIR, 2, rank=0)
    push(assembler, snapshot(PAIR, 2, rank=1))
    assembler.expired(TIMEOUT_S)

    assert assembler.wants(late.header)
    assert push(assembler, late) == []
    assert not assembler.wants(late.header)
    assert assembler.nbytes == 0
    assert assembler.expired(math.inf) == []


def test_an_older_version_that_still_waits_is_completed():
    assembler = assembler_of(PAIR)
    for rank, step in [(0, 1), (0, 2)]:
        push(assembler, snapshot(PAIR, step, rank))

    assert keys(push(assembler, snapshot(PAIR, 1, 1))) == [(0, 1), (1, 1)]
    assert keys(push(assembler, snapshot(PAIR, 2, 1))) == [(0, 2), (1, 2)]


def test_a_version_older_than_one_that_left_late_is_not_begun():
    assembler = assembler_of(PAIR)
    push(assembler, snapshot(PAIR, 1, rank=0), now_s=0.0)
    push(assembler, snapshot(PAIR, 2, rank=0), now_s=0.0)
    assembler.expired(TIMEOUT_S)

    assert push(assembler, snapshot(PAIR, 1, rank=1)) == []
    assert assembler.deadline_s is None


def test_bytes_and_the_deadline_are_those_of_what_waits():
    assembler = assembler_of(PAIR)
    assert (assembler.nbytes, assembler.deadline_s) == (0, None)

    push(assembler, snapshot(PAIR, 2, 0, layers=[0]), now_s=5.0)
    assert assembler.nbytes == 4 * (3 + 2) * 4
    push(assembler, snapshot(PAIR, 2, 0, layers=[1], count=1), now_s=6.0)
    assert assembler.nbytes == (4 + 1) * (3 + 2) * 4
    assert assembler.deadline_s == 5.0 + TIMEOUT_S

    push(assembler, snapshot(PAIR, 2, 1, layers=[0]), now_s=7.0)
    assert assembler.nbytes == 1 * (3 + 2) * 4
    assert assembler.deadline_s == 6.0 + TIMEOUT_S


@given(started_s=st.floats(0, 1e7), timeout_s=st.floats(1e-3, 1e4))
def test_nothing_waits_once_its_deadline_is_reached(started_s, timeout_s):
    assembler = Assembler(PAIR, timeout_s=timeout_s)
    push(assembler, snapshot(PAIR), now_s=started_s)

    assert assembler.deadline_s is not None
    assert len(assembler.expired(assembler.deadline_s)) == 2


@pytest.mark.parametrize("present", [1, 2])
def test_memory_is_bounded_after_many_steps(present):
    assembler = assembler_of(PAIR)
    sizes = []

    for step in range(50):
        for rank in range(present):
            push(assembler, snapshot(PAIR, step, rank), now_s=step)
        assembler.expired(step)
        sizes.append(memory(assembler))

    assert max(sizes[10:]) == sizes[10]


def test_an_older_version_may_time_out_after_a_newer_one():
    trio = session_spec(world_size=3)
    assembler = assembler_of(trio)
    push(assembler, snapshot(trio, 2, 0), now_s=0.0)
    push(assembler, snapshot(trio, 1, 1), now_s=5.0)

    assert keys(assembler.expired(TIMEOUT_S)) == [(0, 2)]
    push(assembler, snapshot(trio, 1, 2), now_s=9.0)
    (older,) = assembler.expired(5.0 + TIMEOUT_S)

    assert (older.step, sorted(older.rows)) == (1, [1, 2])
    push(assembler, snapshot(trio, 2, 1), now_s=14.0)
    assert assembler.deadline_s is None, "Step 2 is begun a second time."


def test_steps_between_those_that_came_are_refused():
    assembler = assembler_of(PAIR)
    for step in (5, 7):
        push(assembler, snapshot(PAIR, step))

    with pytest.raises(SessionMismatchError, match="step 6 of layer 'a' after step 7"):
        assembler.wants(snapshot(PAIR, 6).header)
