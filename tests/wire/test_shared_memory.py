"""Regions: what is opened is what was offered, and nothing is left behind."""

import errno
import fcntl
import gc
import os
import secrets
import socket
import stat
from pathlib import Path

import pytest
import torch

from skfac.v1 import preconditioning_pb2 as pb
from skfac.wire import shared_memory
from skfac.wire.errors import InvalidRequestError
from skfac.wire.payload import PayloadBuffer
from skfac.wire.shared_memory import Area, MappedArea, OwnRegion, open_region
from skfac.wire.snapshot import TensorHeader
from tests.support.dense import normal
from tests.support.values import same_bits

UP, DOWN, LIMIT = 10_000, 5_000, 1_000_000
TOKEN = bytes(range(16))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_memory, "FOLDER", tmp_path)
    return tmp_path


@pytest.fixture
def own():
    region = OwnRegion(TOKEN, UP, DOWN, sealed=False)
    yield region
    region.discard()


@pytest.fixture(params=[False, True], ids=["named", "sealed"])
def either(request):
    region = OwnRegion(TOKEN, UP, DOWN, sealed=request.param)
    yield region
    region.discard()


@pytest.fixture
def sealed():
    region = OwnRegion(TOKEN, UP, DOWN, sealed=True)
    yield region
    region.discard()


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def changed(region: OwnRegion, **fields) -> pb.SharedRegion:
    offer = pb.SharedRegion()
    offer.CopyFrom(region.offer)
    for name, value in fields.items():
        setattr(offer, name, value)
    return offer


def test_both_ends_see_the_same_bytes(either):
    either.up_map[100:108] = b"up going"
    peer = open_region(either.offer, LIMIT)
    found = bytearray(8)
    peer.up.read(100, memoryview(found))
    assert found == b"up going"

    peer.down.write(64, [memoryview(b"down"), memoryview(b""), memoryview(b"wards")])
    found = bytearray(9)
    either.down.read(64, memoryview(found))
    assert found == b"downwards"

    either.up_map[:] = b"\xff" * UP
    peer.down.write(0, [memoryview(b"\xee" * DOWN)])
    peer.up.read(0, memoryview(whole := bytearray(UP)))
    assert whole == b"\xff" * UP  # the areas do not overlap
    assert peer.consumed.read() == 0
    peer.close()


def test_only_its_owner_may_open_it_and_its_pages_are_there(own, folder):
    (path,) = folder.iterdir()
    found = path.stat()

    assert stat.S_IMODE(found.st_mode) == 0o600
    assert found.st_blocks * 512 >= found.st_size
    assert not os.get_inheritable(own.up.fd)


def test_the_name_is_gone_once_it_is_opened(own, folder):
    open_region(own.offer, LIMIT).close()
    assert not list(folder.iterdir())
    with pytest.raises(FileNotFoundError):
        open_region(own.offer, LIMIT)


def test_the_name_is_gone_once_it_is_discarded(own, folder):
    own.discard()
    own.discard()
    assert not list(folder.iterdir())
    own.up_map[0] = 1  # what is mapped stays


def test_the_name_is_gone_once_the_region_is_collected(folder):
    region = OwnRegion(TOKEN, UP, DOWN, sealed=False)
    assert list(folder.iterdir())
    del region
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    "fields",
    [
        {"token": bytes(16)},
        {"token": b""},
        {"token": TOKEN + b"\0"},
        {"up_nbytes": UP - 4096},
        {"down_nbytes": DOWN + 4096},
        {"up_nbytes": 2**64 - 1},
        {"down_nbytes": LIMIT + 1},
        {"name": ""},
        {"name": "skfac-"},
        {"name": "../" + "skfac-" + "0" * 32},
        {"name": "skfac-" + "0" * 31 + "/"},
        {"name": "skfac-" + "0" * 32},
        {"name": "skfac-" + "0" * 32 + "\n"},
        {"name": "skfac-" + "A" * 32},
    ],
    ids=str,
)
def test_an_offer_that_does_not_fit_is_refused(own, folder, fields):
    with pytest.raises(OSError):  # noqa: PT011  # of any kind
        open_region(changed(own, **fields), LIMIT)

    assert len(list(folder.iterdir())) == 1  # it is not the server's to remove
    open_region(own.offer, LIMIT).close()


@pytest.mark.parametrize("kind", ["symlink", "fifo", "folder", "short", "empty"])
def test_only_a_file_of_the_right_size_is_opened(own, folder, kind):
    name = "skfac-" + secrets.token_hex(16)
    path = folder / name
    if kind == "symlink":
        path.symlink_to(folder / own.offer.name)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_bytes(TOKEN if kind == "short" else b"")

    with pytest.raises(OSError):  # noqa: PT011
        open_region(changed(own, name=name), LIMIT)

    assert os.path.lexists(path)


def test_refused_offers_leave_no_file_open(either):
    before = open_files()
    for _ in range(5):
        with pytest.raises(OSError, match="token is another"):
            open_region(changed(either, token=bytes(16)), LIMIT)
    assert open_files() == before


def test_a_full_folder_is_an_error_and_leaves_nothing(folder, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    before = open_files()
    with pytest.raises(OSError, match="No space"):
        OwnRegion(TOKEN, UP, DOWN, sealed=False)
    assert not list(folder.iterdir())
    assert open_files() == before


def test_half_of_the_folder_is_left_to_others(folder):
    found = os.statvfs(folder)
    too_much = found.f_bavail * found.f_frsize // 2 + 1
    with pytest.raises(OSError, match="bytes are free"):
        OwnRegion(TOKEN, too_much, DOWN, sealed=False)
    assert not list(folder.iterdir())


def test_a_host_without_the_folder_has_no_regions(folder, monkeypatch):
    monkeypatch.setattr(shared_memory, "FOLDER", folder / "missing")
    with pytest.raises(FileNotFoundError):
        OwnRegion(TOKEN, UP, DOWN, sealed=False)


def test_a_file_that_was_cut_is_an_error(own):
    peer = open_region(own.offer, LIMIT)
    os.truncate(own.up.fd, 4096 + 50)
    peer.up.read(0, memoryview(bytearray(50)))

    with pytest.raises(InvalidRequestError, match="ends 14 bytes before"):
        peer.up.read(0, memoryview(bytearray(64)))
    with pytest.raises(InvalidRequestError, match="ends 10 bytes before"):
        peer.up.read(1000, memoryview(bytearray(10)))
    os.truncate(own.up.fd, 0)
    assert peer.consumed.read() is None
    peer.close()
    with pytest.raises(InvalidRequestError, match="cannot be read"):
        Area(-1, 0, 100).read(0, memoryview(bytearray(1)))


@pytest.mark.parametrize(("name", "at"), [("consumed", 64), ("answered", 128)])
def test_a_torn_counter_tells_nothing(either, name, at):
    peer = open_region(either.offer, LIMIT)
    own, its = getattr(either, name), getattr(peer, name)
    assert own.read() == its.read() == 0
    for value in (0, 1, 2**63, 2**64 - 1):
        own.write(value)
        assert its.read() == value
    os.pwrite(either.up.fd, b"\x07", at)
    assert its.read() is None
    assert {either.consumed.read(), either.answered.read()} - {None} == {0}
    peer.close()


@pytest.mark.parametrize(
    ("offset", "count"),
    [(0, 25), (64, 1), (128, 0), (32, 1), (1, 0), (2**64 - 64, 16), (0, 2**61)],
)
def test_offsets_are_checked(offset, count):
    area = Area(-1, 0, 96)
    header = TensorHeader(torch.float32, (count,), offset)
    fits = offset % 64 == 0 and offset + 4 * count <= 96
    if fits:
        area.check([header])
        return
    with pytest.raises(InvalidRequestError, match="is not in the 96 bytes"):
        area.check([TensorHeader(torch.float32, (10**9,)), header])


def test_many_views_are_written_in_order(either):
    views = [memoryview(bytes([i % 251])) for i in range(3000)]
    either.down.write(64, views)
    either.down.read(64, memoryview(found := bytearray(3000)))
    assert found == bytes(i % 251 for i in range(3000))


def test_a_partial_write_goes_on(own, monkeypatch):
    real = os.pwritev
    monkeypatch.setattr(
        os, "pwritev", lambda fd, views, at: real(fd, [views[0][:3]], at)
    )
    own.down.write(0, [memoryview(b"abcdefg"), memoryview(b"hi")])
    own.down.read(0, memoryview(found := bytearray(9)))
    assert found == b"abcdefghi"


def test_a_buffer_mixes_payload_and_shared_memory(either):
    tensors = [normal(4, 4, seed=i).float() for i in range(5)]
    offsets = [None, 128, 192, None, 1024]
    for tensor, offset in zip(tensors, offsets, strict=True):
        if offset is not None:
            either.up_map[offset : offset + 64] = tensor.numpy().tobytes()
    headers = [TensorHeader(torch.float32, (4, 4), offset) for offset in offsets]
    buffer = PayloadBuffer(headers)
    assert buffer.missing_bytes == 128

    buffer.write(memoryview(tensors[0].numpy()).cast("B"))
    assert buffer.read_shared(either.up) == 3 * 64
    assert not buffer.complete
    buffer.write(memoryview(tensors[3].numpy()).cast("B"))

    assert buffer.complete
    assert all(map(same_bits, buffer.tensors(), tensors))


def test_neighbours_are_read_in_one_go(own, monkeypatch):
    reads: list[tuple[int, int]] = []
    monkeypatch.setattr(
        Area, "read", lambda area, offset, view: reads.append((offset, len(view)))
    )
    offsets = [64, 128, 320, 384, 0]
    headers = [TensorHeader(torch.float32, (10,), offset) for offset in offsets]
    PayloadBuffer(headers).read_shared(own.up)

    assert reads == [(64, 64 + 40), (320, 64 + 40), (0, 40)]


def test_a_buffer_is_not_complete_before_shared_memory_is_read():
    buffer = PayloadBuffer([TensorHeader(torch.float32, (4,), 0)])
    assert buffer.missing_bytes == 0
    assert not buffer.complete


def test_a_sealed_file_has_no_name_and_cannot_be_cut(sealed, folder):
    assert not list(folder.iterdir())
    for size in (0, 100, 10**6):
        with pytest.raises(PermissionError):
            os.truncate(sealed.up.fd, size)
    before = len(list(folder.iterdir()))
    peer = open_region(sealed.offer, LIMIT)
    assert isinstance(peer.down, MappedArea)
    assert not isinstance(peer.up, MappedArea)  # its contents could change
    peer.close()
    assert len(list(folder.iterdir())) == before


def test_what_is_not_sealed_is_not_mapped(own):
    peer = open_region(own.offer, LIMIT)
    assert not isinstance(peer.down, MappedArea)
    peer.close()


@pytest.mark.parametrize(
    "kind", ["pipe", "socket", "file", "unsealed", "other", "gone"]
)
def test_only_a_sealed_region_is_opened_in_proc(sealed, kind, tmp_path):
    nbytes = os.fstat(sealed.up.fd).st_size
    if kind == "pipe":
        fd, other = os.pipe()
        os.close(other)
    elif kind == "socket":
        fd = socket.socket().detach()
    elif kind == "file":
        fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
        os.truncate(fd, nbytes)
        os.pwrite(fd, TOKEN, 0)
    elif kind == "gone":
        fd = os.open("/dev/null", os.O_RDWR)
    else:
        name = "skfac" if kind == "unsealed" else "theirs"
        fd = os.memfd_create(name, os.MFD_ALLOW_SEALING)
        os.truncate(fd, nbytes)
        os.pwrite(fd, TOKEN, 0)
        if kind == "other":
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, shared_memory._seals())
    if kind == "gone":
        os.close(fd)
    before = open_files()

    with pytest.raises(OSError):  # noqa: PT011
        open_region(changed(sealed, name=f"{os.getpid()}/fd/{fd}"), LIMIT)

    assert open_files() == before
    if kind != "gone":
        os.close(fd)


@pytest.mark.parametrize(
    "name",
    [
        "0/fd/1",
        "self/fd/3",
        "1/fd/",
        "1/mem",
        "1/fd/0/",
        "1/fd/../mem",
        "-1/fd/3",
        "1/fd/1\n",
    ],
)
def test_nothing_else_in_proc_has_a_name(sealed, name):
    with pytest.raises(OSError, match="wrong form"):
        open_region(changed(sealed, name=name), LIMIT)


def test_half_of_the_memory_is_left_to_others(monkeypatch, tmp_path):
    (tmp_path / "meminfo").write_text("MemFree: 9 kB\nMemAvailable:  38 kB\n")
    monkeypatch.setattr(shared_memory, "PROCESSES", tmp_path)
    OwnRegion(TOKEN, 8192, 4096, sealed=True).discard()
    with pytest.raises(OSError, match="38912 bytes are free"):
        OwnRegion(TOKEN, 8193, 4096, sealed=True)


def test_a_region_ends_with_its_last_user():
    gc.collect()
    before = open_files()
    region = OwnRegion(TOKEN, UP, DOWN, sealed=True)
    peer = open_region(region.offer, LIMIT)
    region.discard()
    peer.close()
    with pytest.raises(OSError):  # noqa: PT011
        open_region(region.offer, LIMIT)
    del region, peer
    gc.collect()
    assert open_files() == before
