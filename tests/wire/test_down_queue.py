"""The down area: written where it was read, whatever the reader says."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from skfac.wire import shared_memory
from skfac.wire.down_queue import DownQueue, Placement
from skfac.wire.payload import PayloadBuffer
from skfac.wire.shared_memory import OwnRegion, open_region
from skfac.wire.snapshot import TensorHeader
from tests.support.values import same_bits

CAPACITY = 1024


@pytest.fixture(scope="module", autouse=True)
def _folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_memory, "FOLDER", tmp_path_factory.mktemp("shm"))
        yield


class Ends:
    """The queue of a region, and its reader."""

    def __init__(self, capacity: int = CAPACITY, *, sealed: bool = False) -> None:
        self.own = OwnRegion(bytes(16), 4096, capacity, sealed=sealed)
        self.peer = open_region(self.own.offer, 10**6)
        self.queue = DownQueue(self.peer)

    def __enter__(self) -> "Ends":
        return self

    def __exit__(self, *_: object) -> None:
        self.queue.close()
        self.own.discard()

    def read(self, placed: Placement, like: list[torch.Tensor]) -> list[torch.Tensor]:
        headers = [
            TensorHeader(t.dtype, tuple(t.shape), offset)
            for t, offset in zip(like, placed.offsets, strict=True)
        ]
        buffer = PayloadBuffer(headers)
        buffer.read_shared(self.own.down)
        return buffer.tensors()


def tensors(*counts: int, value: float = 1.0) -> list[torch.Tensor]:
    return [torch.full((count,), value + i) for i, count in enumerate(counts)]


@pytest.fixture(params=[False, True], ids=["named", "sealed"])
def ends(request):
    with Ends(sealed=request.param) as ends:
        yield ends


def test_there_is_room_until_the_capacity_and_again_once_it_is_read(ends):
    half = tensors(64, 60)  # 512 bytes with their padding
    first, second = ends.queue.place(half), ends.queue.place(half)
    assert first is not None
    assert second is not None
    assert (first.offsets, first.end) == ([0, 256], 512)
    assert (second.offsets, second.end) == ([512, 768], 1024)
    assert ends.queue.place(tensors(1)) is None

    ends.own.consumed.write(first.end)
    third = ends.queue.place(half)
    assert third is not None
    assert (third.offsets, third.end) == ([0, 256], 1536)
    assert ends.queue.place(tensors(1)) is None
    assert ends.queue.written_bytes == 3 * 4 * 124


def test_nothing_is_split_at_the_end(ends):
    first = ends.queue.place(tensors(192))  # 768
    assert first is not None
    assert ends.queue.place(tensors(128)) is None  # 256 are left, and 512 wanted
    ends.own.consumed.write(first.end)
    second = ends.queue.place(tensors(128))
    assert second is not None
    assert second.offsets == [0]


def test_what_was_read_is_written_first(ends):
    first, second = ends.queue.place(tensors(64)), ends.queue.place(tensors(64))
    assert first is not None
    assert second is not None
    ends.own.consumed.write(first.end)
    third = ends.queue.place(tensors(64))
    assert third is not None
    assert (third.offsets, third.end) == ([0], 768)  # and not after the second


def test_what_does_not_fit_before_unread_versions_comes_after_them(ends):
    first, second = ends.queue.place(tensors(64)), ends.queue.place(tensors(64))
    assert first is not None
    assert second is not None
    ends.own.consumed.write(first.end)
    third, last = ends.queue.place(tensors(128)), ends.queue.place(tensors(64))
    assert third is not None
    assert last is not None
    assert (third.offsets, last.offsets) == ([512], [0])
    assert ends.queue.place(tensors(1)) is None


def test_an_empty_queue_takes_what_fits_wherever_it_stands(ends):
    first = ends.queue.place(tensors(160))  # 640, so that 384 are left
    assert first is not None
    ends.own.consumed.write(first.end)
    second = ends.queue.place(tensors(256))
    assert second is not None
    assert second.offsets == [0]
    assert ends.queue.place(tensors(1)) is None
    ends.own.consumed.write(second.end)
    assert ends.queue.place(tensors(256)) is not None


@pytest.mark.parametrize("lie", [1, 511, 1025, 2**63, 2**64 - 1])
def test_a_lying_reader_gets_no_room_it_does_not_have(ends, lie):
    first, second = ends.queue.place(tensors(128)), ends.queue.place(tensors(128))
    assert first is not None
    assert second is not None
    ends.own.consumed.write(lie)
    assert ends.queue.place(tensors(128)) is None

    ends.own.consumed.write(first.end)
    assert ends.queue.place(tensors(128)) is not None
    ends.own.consumed.write(0)  # not backwards
    assert ends.queue.place(tensors(1)) is None


def test_what_is_too_large_or_empty_is_not_placed(ends):
    assert ends.queue.place(tensors(257)) is None
    assert ends.queue.place([]) is None
    assert ends.queue.place(tensors(0, 0)) is None
    placed = ends.queue.place(tensors(0, 3, 0))
    assert placed is not None
    assert placed.offsets == [None, 0, None]


@pytest.mark.parametrize("capacity", [0, 63, 100])
def test_a_queue_of_odd_size_keeps_the_alignment(capacity):
    with Ends(capacity) as ends:
        for _ in range(3):
            placed = ends.queue.place(tensors(16))
            assert (placed is None) == (capacity < 64)
            if placed is not None:
                assert placed.offsets == [0]
                ends.own.consumed.write(placed.end)


def test_nothing_is_written_after_the_end(ends):
    ends.queue.close()
    ends.queue.close()
    assert ends.queue.place(tensors(1)) is None


def test_a_file_that_cannot_be_written_is_given_up(monkeypatch):
    def broken(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with Ends() as ends:
        with monkeypatch.context() as patch:
            patch.setattr(shared_memory.os, "pwritev", broken)
            assert ends.queue.place(tensors(1)) is None
        assert ends.queue.place(tensors(1)) is None


@pytest.mark.parametrize("sealed", [False, True])
@given(
    steps=st.lists(st.lists(st.integers(0, 90), max_size=4) | st.none(), max_size=40)
)
def test_what_was_not_read_is_never_overwritten(sealed, steps):
    with Ends(sealed=sealed) as ends:
        unread: list[tuple[Placement, list[torch.Tensor]]] = []
        for number, counts in enumerate(steps):
            if counts is None:
                if unread:
                    placed, sent = unread.pop(0)
                    ends.own.consumed.write(placed.end)
                continue
            sent = tensors(*counts, value=10.0 * number)
            placed = ends.queue.place(sent)
            if placed is not None:
                unread.append((placed, sent))
            elif sum(counts) and not unread:
                assert sum(-(-4 * c // 64) * 64 for c in counts) > CAPACITY
            for placed, sent in unread:
                assert all(map(same_bits, ends.read(placed, sent), sent))
