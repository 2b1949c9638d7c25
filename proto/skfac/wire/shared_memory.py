"""Memory that a trainer and a server on one host share for one connection.

The trainer makes a file and offers it by name. It is a sealed one without a name in
any folder, which the server opens in /proc and which nobody can cut; or, if the server
does not see the trainer's process, one in /dev/shm, which the server unlinks once it is
open. It has three parts, each at the beginning of a page:

    header   16 bytes that whoever offers the file must know; at byte 64 how far the
             trainer has read the down area, at byte 128 up to which step the server
             has read the up area; and each once more, inverted
    up       rows, written by the trainer wherever it likes
    down     versions, written by the server (see `down_queue`)

Neither end believes the other, and all offsets are checked. The server copies by
`preadv` and `pwritev`, so that a file that is cut short is an error and not a signal,
and what it has copied can change no more. Only the down area of a sealed file is
mapped: `pwritev` takes twice as long as writing to it.
"""

import errno
import fcntl
import hmac
import mmap
import os
import re
import secrets
import stat
import sys
import weakref
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from skfac.v1 import preconditioning_pb2 as pb
from skfac.wire.errors import InvalidRequestError
from skfac.wire.snapshot import ALIGNMENT, TensorHeader

FOLDER = Path("/dev/shm")  # noqa: S108  # files are made with O_EXCL and O_NOFOLLOW
"""Where regions with a name are made."""

PROCESSES = Path("/proc")
"""Where those without are found."""

TOKEN_BYTES = 16
"""Length of what is known only to the two ends of a region."""

MAX_SNAPSHOTS = 4
"""An area is at most so many times as large as a snapshot may be."""

_NAMED = re.compile(r"skfac-[0-9a-f]{32}")
_SEALED = re.compile(r"[1-9][0-9]{0,9}/fd/[0-9]{1,9}")
_LINK = "/memfd:skfac"  # what the latter are links to
_PAGE_BYTES = 4096
_CONSUMED_AT = 64
_ANSWERED_AT = 128  # in a line of the cache of its own: the other end writes it
_COUNTER_MASK = 2**64 - 1
_MOST_VIEWS = 1024  # that one call takes, which is Linux's IOV_MAX


@dataclass(frozen=True, eq=False)
class Area:
    """One direction of a region.

    Attributes:
        fd: The file.
        begin: Where the area begins in it.
        nbytes: Its length.
    """

    fd: int
    begin: int
    nbytes: int

    def check(self, headers: Iterable[TensorHeader]) -> None:
        """Check where tensors are said to be. They may overlap: all are copied.

        Raises:
            InvalidRequestError: If one is not within the area, or not aligned.
        """
        for header in headers:
            offset = header.shared_offset
            if offset is None:
                continue
            if offset % ALIGNMENT or offset + header.nbytes > self.nbytes:
                raise InvalidRequestError(
                    f"A tensor of {header.nbytes} bytes at offset {offset} is not in "
                    f"the {self.nbytes} bytes of shared memory, or not aligned to "
                    f"{ALIGNMENT}."
                )

    def read(self, offset: int, view: memoryview) -> None:
        """Fill a view with what is there.

        Raises:
            InvalidRequestError: If the file is shorter than it was, or cannot be read.
        """
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self.fd, [view[done:]], self.begin + offset + done)
            except OSError as error:
                raise InvalidRequestError(
                    f"The shared memory cannot be read: {error.strerror}."
                ) from None
            if count == 0:
                raise InvalidRequestError(
                    f"The shared memory was cut: it ends {len(view) - done} bytes "
                    "before a tensor does."
                )
            done += count

    def write(self, offset: int, views: Sequence[memoryview]) -> None:
        """Write views one after the other; the caller has checked that they fit.

        Raises:
            OSError: If the file cannot be written.
        """
        position = self.begin + offset
        rest = [view for view in views if len(view)]
        while rest:
            count = os.pwritev(self.fd, rest[:_MOST_VIEWS], position)
            position += count
            while rest and count >= len(rest[0]):
                count -= len(rest.pop(0))
            if count:
                rest[0] = rest[0][count:]


@dataclass(frozen=True, eq=False)
class MappedArea(Area):
    """An area of a file that nobody can cut.

    Attributes:
        memory: All of it.
    """

    memory: "np.ndarray[Any, np.dtype[np.uint8]]"

    def read(self, offset: int, view: memoryview) -> None:
        """Fill a view with what is there."""
        source = self.memory[offset : offset + len(view)]
        np.copyto(np.frombuffer(view, np.uint8), source)  # releases the GIL

    def write(self, offset: int, views: Sequence[memoryview]) -> None:
        """Write views one after the other; the caller has checked that they fit."""
        for view in views:
            target = self.memory[offset : offset + len(view)]
            np.copyto(target, np.frombuffer(view, np.uint8))
            offset += len(view)


class Counter:
    """A number in the header of a region, which one end writes and the other reads.

    Args:
        fd: The file.
        at: Where it begins.
    """

    def __init__(self, fd: int, at: int) -> None:
        self._fd = fd
        self._at = at

    def read(self) -> int | None:
        """Read what the other end says.

        Returns:
            A number to be checked; None if none can be read, or it is just written.
        """
        try:
            both = os.pread(self._fd, 16, self._at)
        except OSError:
            return None
        value = int.from_bytes(both[:8], "little")
        inverted = int.from_bytes(both[8:], "little")
        return value if value == inverted ^ _COUNTER_MASK else None

    def write(self, value: int) -> None:
        """Tell the other end a number.

        Raises:
            OSError: If the file cannot be written.
        """
        inverted = value ^ _COUNTER_MASK
        both = value.to_bytes(8, "little") + inverted.to_bytes(8, "little")
        os.pwrite(self._fd, both, self._at)


class Region:
    """The file, its two areas and the counters in its header.

    Attributes:
        up: Where the trainer writes.
        down: Where the server writes.
        consumed: Up to which position the trainer has read the down area.
        answered: One more than the step of the last snapshot that the server has read.
    """

    def __init__(self, fd: int, up_nbytes: int, down_nbytes: int) -> None:
        self._fd = fd
        self.up = Area(fd, _PAGE_BYTES, up_nbytes)
        self.down = Area(fd, _PAGE_BYTES + _whole_pages(up_nbytes), down_nbytes)
        self.consumed = Counter(fd, _CONSUMED_AT)
        self.answered = Counter(fd, _ANSWERED_AT)
        self.close = weakref.finalize(self, os.close, fd)
        """Close the file; what is mapped of it stays. Idempotent."""

    def map_down(self) -> None:
        """Read and write the down area through a mapping: only if it cannot be cut.

        Raises:
            OSError: If it cannot be mapped.
        """
        area = self.down
        if area.nbytes:
            mapped = mmap.mmap(self._fd, area.nbytes, offset=area.begin)
            memory = np.frombuffer(mapped, np.uint8)
            self.down = MappedArea(area.fd, area.begin, area.nbytes, memory)


class OwnRegion(Region):
    """A region as its trainer has it.

    Args:
        token: What the server will find in it.
        up_nbytes: Of the up area.
        down_nbytes: Of the down area.
        sealed: Whether it has no name and cannot be cut.

    Attributes:
        offer: What the server needs to know; the session is left to be filled in.
        up_map: The up area, mapped.

    Raises:
        OSError: If there is no room for it, or no shared memory at all.
    """

    def __init__(
        self, token: bytes, up_nbytes: int, down_nbytes: int, *, sealed: bool
    ) -> None:
        if sys.byteorder != "little" or sys.platform != "linux":
            raise OSError(errno.ENOTSUP, "This platform's memory is not shared")
        nbytes = region_nbytes(up_nbytes, down_nbytes)
        _check_room(nbytes, sealed=sealed)
        fd, name = _sealable() if sealed else _named()
        super().__init__(fd, up_nbytes, down_nbytes)
        path = None if sealed else FOLDER / name
        self.unlink = weakref.finalize(self, _unlink, path, os.getpid())
        """Remove the name, also when the process ends by itself; idempotent."""
        self.offer = pb.SharedRegion(
            token=token,
            name=name,
            up_nbytes=up_nbytes,
            down_nbytes=down_nbytes,
            answers_in_header=True,
        )
        try:
            # Else the first write to a page that there is no room for is a SIGBUS.
            os.posix_fallocate(fd, 0, nbytes)
            os.pwrite(fd, token, 0)
            self.consumed.write(0)
            self.answered.write(0)
            if sealed:
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _seals())
                self.map_down()
            mapped = mmap.mmap(fd, _PAGE_BYTES + up_nbytes)
        except BaseException:
            self.discard()
            raise
        self.up_map = memoryview(mapped)[_PAGE_BYTES:]

    def discard(self) -> None:
        """Remove and close it; idempotent."""
        self.unlink()
        self.close()


def open_region(offer: pb.SharedRegion, max_area_bytes: int) -> Region:
    """Open the region that a trainer offers, and unlink it.

    Returns:
        The region.

    Raises:
        OSError: If it is not here, may not be opened, or is not what it is said to be.
    """
    if max(offer.up_nbytes, offer.down_nbytes) > max_area_bytes:
        raise OSError(errno.EFBIG, f"An area is over {max_area_bytes} bytes")
    named = _NAMED.fullmatch(offer.name) is not None
    if len(offer.token) != TOKEN_BYTES or not (named or _SEALED.fullmatch(offer.name)):
        raise OSError(errno.EINVAL, "The name or the token has the wrong form")
    fd = _open_named(offer.name) if named else _open_sealed(offer.name)
    region = Region(fd, offer.up_nbytes, offer.down_nbytes)
    try:
        _check_file(fd, offer)
        if named:
            (FOLDER / offer.name).unlink(missing_ok=True)
        elif fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _seals() == _seals():
            region.map_down()
        else:
            raise OSError(errno.EPERM, "The file without a name is not sealed")
    except BaseException:
        region.close()
        raise
    return region


def region_nbytes(up_nbytes: int, down_nbytes: int) -> int:
    """Size of the file of a region.

    Returns:
        Bytes.
    """
    return _PAGE_BYTES + _whole_pages(up_nbytes) + _whole_pages(down_nbytes)


def _whole_pages(nbytes: int) -> int:
    return -(-nbytes // _PAGE_BYTES) * _PAGE_BYTES


def _named() -> tuple[int, str]:
    name = f"skfac-{secrets.token_hex(16)}"
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(FOLDER / name, flags, 0o600), name


def _sealable() -> tuple[int, str]:
    fd = os.memfd_create("skfac", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    return fd, f"{os.getpid()}/fd/{fd}"


def _open_named(name: str) -> int:
    # Without O_NONBLOCK a FIFO would be waited for.
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    return os.open(FOLDER / name, flags)


def _open_sealed(name: str) -> int:
    path = PROCESSES / name
    # Looked at before it is opened: opening a device may do something.
    if not str(path.readlink()).startswith(_LINK):
        raise OSError(errno.EINVAL, "It is no region")
    return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)


def _check_file(fd: int, offer: pb.SharedRegion) -> None:
    found = os.fstat(fd)
    nbytes = region_nbytes(offer.up_nbytes, offer.down_nbytes)
    if not stat.S_ISREG(found.st_mode) or found.st_size != nbytes:
        raise OSError(errno.EINVAL, f"It is no file of {nbytes} bytes")
    if not hmac.compare_digest(os.pread(fd, TOKEN_BYTES, 0), offer.token):
        raise OSError(errno.EACCES, "The token is another")


def _seals() -> int:
    # Looked up late: not all platforms have them.
    return fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def _check_room(nbytes: int, *, sealed: bool) -> None:
    # The other half is left to others: this is an optimization and no need.
    if sealed:
        free = _available_bytes()
    else:
        found = os.statvfs(FOLDER)
        free = found.f_bavail * found.f_frsize
    if nbytes > free // 2:
        raise OSError(errno.ENOSPC, f"{free} bytes are free")


def _available_bytes() -> int:
    lines = (PROCESSES / "meminfo").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("MemAvailable:"))
    available = 1024 * int(line.split()[1])
    with suppress(OSError, ValueError):  # "max", or no group with a limit
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        available = min(available, limit - used)
    return available


def _unlink(path: Path | None, owner: int) -> None:
    if path is not None and os.getpid() == owner:  # not of a forked child
        with suppress(OSError):
            path.unlink()
