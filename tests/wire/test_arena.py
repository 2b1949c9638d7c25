"""The arena: parts never overlap, and come back when their tensors are gone."""

import mmap
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from skfac.wire.arena import Arena

NBYTES = 4096
DTYPES = st.sampled_from([torch.float32, torch.float64])
SHAPES = st.lists(st.integers(0, 12), min_size=1, max_size=3).map(tuple)
TAKE = st.tuples(SHAPES, DTYPES)
FREE = st.integers(0, 20)  # which of those that live


def arena(nbytes: int = NBYTES) -> Arena:
    return Arena(memoryview(mmap.mmap(-1, nbytes)))


@given(actions=st.lists(TAKE | FREE, max_size=40))
def test_parts_never_overlap_and_all_come_back(actions):
    made = arena()
    live: list[tuple[torch.Tensor, float]] = []
    for number, action in enumerate(actions, 1):
        if isinstance(action, int):
            if live:
                live.pop(action % len(live))
            continue
        shape, dtype = action
        tensor = made.empty(shape, dtype)
        if tensor is None:
            nbytes = torch.Size(shape).numel() * dtype.itemsize
            assert nbytes == 0 or nbytes > 64 or made.free_bytes < 64
            continue
        assert (tuple(tensor.shape), tensor.dtype) == (shape, dtype)
        tensor.fill_(float(number))
        live.append((tensor, float(number)))
        taken = sum(-(-t.nbytes // 64) * 64 for t, _ in live)
        assert made.free_bytes == NBYTES - taken

    for tensor, value in live:  # nobody wrote to another's part
        assert bool((tensor == value).all())
        assert made.offset_of(tensor) is not None
    live.clear()
    tensor = None
    assert made.free_bytes == NBYTES
    assert made.empty((NBYTES // 4,), torch.float32) is not None  # in one piece


def test_the_first_part_that_fits_is_taken():
    made = arena()
    parts = [made.empty((16,), torch.float32) for _ in range(NBYTES // 64)]
    assert [made.offset_of(part) for part in parts] == list(range(0, NBYTES, 64))
    assert made.empty((1,), torch.float32) is None

    parts[5] = parts[7] = parts[8] = None
    assert made.offset_of(made.empty((32,), torch.float32)) == 7 * 64
    assert made.offset_of(made.empty((1,), torch.float64)) == 5 * 64


def test_only_what_can_be_sent_from_there_has_an_offset():
    made = arena()
    tensor = made.empty((8, 16), torch.float32)
    assert tensor is not None

    assert made.offset_of(tensor) == 0
    assert made.offset_of(tensor[2:]) == 128
    assert made.offset_of(tensor.view(4, 32)) == 0
    assert made.offset_of(tensor[:, :8]) is None  # strided
    assert made.offset_of(tensor.T) is None
    assert made.offset_of(tensor.view(-1)[1:]) is None  # not aligned
    assert made.offset_of(tensor[:0]) is None
    assert made.offset_of(torch.empty(8, 16)) is None
    assert made.offset_of(arena().empty((8, 16), torch.float32)) is None


def test_views_keep_their_part():
    made = arena()
    tensor = made.empty((16, 16), torch.float32)
    assert tensor is not None
    row = tensor[3]
    del tensor
    assert made.free_bytes == NBYTES - 1024
    del row
    assert made.free_bytes == NBYTES


def test_tensors_outlive_the_arena():
    made = arena()
    tensor = made.empty((16,), torch.float32)
    assert tensor is not None
    tensor.fill_(3.0)
    del made
    assert bool((tensor == 3.0).all())


def test_threads_get_parts_of_their_own():
    made = arena(1024 * 1024)
    wrong: list[float] = []

    def work(value: float) -> None:
        for _ in range(300):
            tensor = made.empty((97,), torch.float32)
            assert tensor is not None
            tensor.fill_(value)
            if not bool((tensor == value).all()):
                wrong.append(value)

    threads = [threading.Thread(target=work, args=[float(i)]) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert not wrong
    assert made.free_bytes == 1024 * 1024


@pytest.mark.parametrize("shape", [(2**40,), (2**31, 2**20)])
def test_there_is_no_room_for_the_impossible(shape):
    assert arena().empty(shape, torch.float64) is None


@given(takes=st.lists(TAKE, max_size=12), nbytes=st.integers(1, NBYTES))
def test_tensors_of_a_slab_never_overlap_and_come_back_together(takes, nbytes):
    made = arena()
    slab = made.slab(nbytes)
    taken = -(-nbytes // 64) * 64
    assert slab is not None
    live: list[tuple[torch.Tensor, float]] = []
    end = 0
    for number, (shape, dtype) in enumerate(takes, 1):
        tensor = slab.empty(shape, dtype)
        wanted = torch.Size(shape).numel() * dtype.itemsize
        assert (tensor is None) == (wanted == 0 or end + wanted > taken)
        if tensor is not None:
            assert (tuple(tensor.shape), tensor.dtype) == (shape, dtype)
            assert made.offset_of(tensor) == end
            live.append((tensor.fill_(float(number)), float(number)))
            end += -(-wanted // 64) * 64

    for tensor, value in live:
        assert bool((tensor == value).all())
    slab = tensor = None
    while live:
        assert made.free_bytes == NBYTES - taken
        live.pop()
    assert made.free_bytes == NBYTES


def test_a_slab_needs_its_room():
    made = arena()
    first = made.slab(NBYTES - 64)
    assert first is not None
    assert made.slab(65) is None
    assert made.slab(64) is not None
