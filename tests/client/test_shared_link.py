"""A connection's shared memory as its trainer has it."""

import os
from collections import Counter

import pytest
import torch

from skfac.client.shared_link import SharedLink, _versions_nbytes
from skfac.service.solver import Solver
from skfac.v1 import preconditioning_pb2 as pb
from skfac.wire import shared_memory
from skfac.wire.errors import InvalidRequestError
from skfac.wire.frames import parse_frame, payload_nbytes
from skfac.wire.outcome import Version
from skfac.wire.shared_memory import open_region
from skfac.wire.snapshot import TensorHeader, padded
from tests.support.values import MIXED, layer_spec, session_spec, snapshot, task_of

SPEC = session_spec(layer_spec(d_in=30, d_out=20), lag=2)
LIMIT = 10**6
TAKEN = payload_nbytes(snapshot(SPEC).header.tensors)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_memory, "FOLDER", tmp_path)
    yield tmp_path
    assert not list(tmp_path.iterdir())


@pytest.fixture
def counts():
    return Counter()


@pytest.fixture
def link(counts):
    link = SharedLink(SPEC, "session", LIMIT, counts)
    yield link
    link.close()


def offered(link: SharedLink, like=None) -> pb.SharedRegion:
    (frame,) = link.offer(like or snapshot(SPEC))
    region = parse_frame(frame).region
    assert region is not None
    return pb.SharedRegion.FromString(bytes(region))


def opened(link: SharedLink):
    """The server's end of it."""
    peer = open_region(offered(link), 4 * LIMIT)
    link.answer(accepted=True)
    return peer


def test_a_region_has_room_for_what_is_in_flight(link):
    offer = offered(link)

    assert offer.session_id == "session"
    assert offer.token == link.token
    assert offer.answers_in_header
    assert offer.up_nbytes == (SPEC.versions_in_flight + 1) * TAKEN
    assert not list(link.offer(snapshot(SPEC)))  # only once


def test_a_region_is_not_larger_than_the_server_takes(counts):
    link = SharedLink(SPEC, "session", 300, counts)
    offer = offered(link)
    assert (offer.up_nbytes, offer.down_nbytes) == (1200, 1200)
    link.close()


def test_nothing_is_offered_before_its_size_is_known(link):
    assert not list(link.offer(snapshot(SPEC, count=0)))
    assert offered(link).up_nbytes > 0


def test_memory_is_the_arenas_only_once_the_region_is_accepted(link):
    assert link.empty((4, 30), torch.float32) is None
    offered(link)
    sent = snapshot(SPEC)
    assert link.empty((4, 30), torch.float32) is None
    assert link.place(sent) is sent
    link.answer(accepted=True)
    rows = link.empty((4, 30), torch.float32)
    assert rows is not None
    assert link.locate(rows) == 0


def test_what_is_in_place_is_not_copied_and_the_rest_is_once(link, counts):
    opened(link)
    sent = snapshot(SPEC)
    (plain,) = sent.layers
    rows = link.empty(tuple(plain.activations.shape), torch.float32)
    assert rows is not None
    rows.copy_(plain.activations)
    object.__setattr__(plain, "activations", rows)

    placed = link.place(sent)

    assert placed.layers[0].activations is rows
    assert placed.layers[0].derivatives is not plain.derivatives
    assert all(link.locate(tensor) is not None for tensor in placed.tensors)
    assert counts["shared_sent_bytes"] == 4 * 4 * (30 + 20)
    for mine, theirs in zip(placed.tensors, sent.tensors, strict=True):
        assert torch.equal(mine, theirs)


def test_the_rows_of_a_snapshot_lie_side_by_side_and_come_back_together(link):
    opened(link)
    arena = link._arena
    shapes = [tuple(tensor.shape) for tensor in snapshot(SPEC).tensors]
    first = [link.empty(shape, torch.float32) for shape in shapes]
    link.end_snapshot()
    second = [link.empty(shape, torch.float32) for shape in shapes]

    assert [link.locate(rows) for rows in first] == [0, padded(first[0].nbytes)]
    assert link.locate(second[0]) == TAKEN
    link.end_snapshot()
    assert arena.free_bytes == (SPEC.versions_in_flight - 1) * TAKEN
    first.pop()
    assert arena.free_bytes == (SPEC.versions_in_flight - 1) * TAKEN
    first.clear()
    assert arena.free_bytes == SPEC.versions_in_flight * TAKEN


def test_rows_that_were_not_expected_have_parts_of_their_own(link):
    opened(link)
    whole = link.empty((TAKEN // 4,), torch.float32)
    more = link.empty((5,), torch.float32)

    assert [link.locate(whole), link.locate(more)] == [0, TAKEN]


def test_memory_is_used_again_only_after_the_answer(link):
    opened(link)
    arena = link._arena
    before = arena.free_bytes
    step = 0
    while link.locate(link.place(snapshot(SPEC, step)).tensors[0]) is not None:
        step += 1  # nothing but the link knows what was placed
    assert step == SPEC.versions_in_flight + 1
    assert arena.free_bytes == 0

    link.settle(1)
    assert arena.free_bytes == TAKEN
    assert link.locate(link.place(snapshot(SPEC, 9)).tensors[0]) is not None
    for number in range(10):
        link.settle(number)
    link.settle(3)
    assert arena.free_bytes == before


def fill(link: SharedLink) -> None:
    """Place snapshots, from step 0 on, until there is no room for another."""
    for step in range(SPEC.versions_in_flight + 1):
        assert link.locate(link.place(snapshot(SPEC, step)).tensors[0]) is not None


def test_answers_in_the_header_are_read_when_room_is_short(link):
    peer = opened(link)
    fill(link)
    assert link.empty((4, 30), torch.float32) is None

    peer.answered.write(2)

    assert link.empty((4, 30), torch.float32) is not None
    assert link._arena.free_bytes == 2 * TAKEN  # steps 0 and 1
    peer.close()


def test_answers_in_the_header_are_read_with_the_outcomes(link):
    peer = opened(link)
    fill(link)
    peer.answered.write(1)

    link.receive([], 0)

    assert link._arena.free_bytes == TAKEN
    peer.close()


def test_a_torn_answer_frees_nothing(link):
    peer = opened(link)
    fill(link)
    peer.answered.write(2)
    os.pwrite(peer.up.fd, b"\x07", 128)

    assert link.empty((4, 30), torch.float32) is None
    assert link._arena.free_bytes == 0
    peer.close()


def test_a_server_that_sees_no_process_may_see_the_folder(link, folder):
    first = offered(link)
    assert not list(folder.iterdir())
    assert not list(link.offer(snapshot(SPEC)))  # one at a time
    link.answer(accepted=False)

    second = offered(link)
    assert [path.name for path in folder.iterdir()] == [second.name]
    assert first.name != second.name
    link.answer(accepted=True)
    assert not list(folder.iterdir())
    assert link.empty((4,), torch.float32) is not None


def test_a_region_that_is_declined_twice_is_given_up(link, folder):
    for _ in range(2):
        offered(link)
        link.answer(accepted=False)
    assert not list(folder.iterdir())
    assert not list(link.offer(snapshot(SPEC)))
    assert link.empty((4,), torch.float32) is None
    link.answer(accepted=True)  # a server that changes its mind
    assert link.empty((4,), torch.float32) is None


def test_nothing_is_handed_out_after_the_end_and_tensors_stay(link, folder):
    opened(link)
    rows = link.empty((4, 30), torch.float32)
    assert rows is not None
    rows.fill_(2.0)
    link.close()
    link.close()

    assert bool((rows == 2.0).all())
    assert link.empty((4, 30), torch.float32) is None
    assert link.locate(rows) is None  # it goes inline on the next connection


def test_an_offer_that_comes_too_late_leaves_nothing(link, folder, monkeypatch):
    real = shared_memory.OwnRegion

    def slow(*arguments, sealed):
        region = real(*arguments, sealed=sealed)
        link.close()
        return region

    monkeypatch.setattr("skfac.client.shared_link.OwnRegion", slow)
    assert not list(link.offer(snapshot(SPEC)))
    assert not list(folder.iterdir())


def test_what_was_received_is_told_and_counted(link, counts):
    peer = opened(link)
    sent = torch.arange(16.0)
    peer.down.write(64, [memoryview(sent.numpy()).cast("B")])

    buffer = link.receive([TensorHeader(torch.float32, (16,), 64)], 128)

    assert torch.equal(buffer.tensors()[0], sent)
    assert peer.consumed.read() == 128
    assert counts["shared_received_bytes"] == 64
    peer.close()


def test_a_server_that_is_wrong_is_not_believed(link):
    header = TensorHeader(torch.float32, (16,), 0)
    with pytest.raises(InvalidRequestError, match="0 bytes of shared memory"):
        link.receive([header], 64)
    peer = opened(link)
    outside = TensorHeader(torch.float32, (16,), 10**9)
    with pytest.raises(InvalidRequestError, match="is not in"):
        link.receive([outside], 64)
    assert peer.consumed.read() == 0
    peer.close()


@pytest.mark.parametrize("history", ["snapshot", "window", "ema"])
@pytest.mark.parametrize("cap", [None, 3])
@pytest.mark.parametrize("count", [2, 40])
def test_the_estimate_holds_any_version(history, cap, count):
    spec = session_spec(*MIXED, history=history)
    like = snapshot(spec, count=count, rank_cap=cap)
    found = 0
    for layer in range(len(MIXED)):
        task = task_of(spec, layer=layer, count=count, rank_cap=cap)
        (solution,) = Solver("cpu").solve([task])
        outcome = solution.outcome
        assert isinstance(outcome, Version)
        found += sum(padded(t.nbytes) for t in outcome.preconditioner.tensors)

    assert found <= _versions_nbytes(spec, like)
