"""Frames: a manifest, then tensors as raw bytes, split into bounded messages.

A frame is the protobuf message `{1: manifest, 2: checksum, 3: payload}` of the
.proto, written and read by hand: protobuf would copy the payload once more each way,
and gRPC hands over plain bytes. Every frame is made by one join and read as views.
Tensors that a manifest finds in shared memory are in no payload.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import xxhash
from torch import Tensor

from skfac.wire.errors import InvalidRequestError, LimitExceededError
from skfac.wire.memory import Pool
from skfac.wire.shared_memory import Area
from skfac.wire.snapshot import ALIGNMENT, TensorHeader, padded

PAYLOAD_BYTES = 2 * 1024 * 1024
"""Payload of a full frame. Measured: 1 to 4 MiB are one plateau of throughput."""

MAX_FRAME_BYTES = 4 * 1024 * 1024
"""The largest message either end accepts, which is also gRPC's default."""

_MANIFEST_TAG, _CHECKSUM_TAG, _PAYLOAD_TAG, _REGION_TAG = 0x0A, 0x11, 0x1A, 0x22
_VARINT, _FIXED64, _LENGTH_DELIMITED, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True, eq=False)
class Frame:
    """A received frame; its views share the message's memory.

    Attributes:
        manifest: Serialized manifest, or None in a frame that continues a payload.
        payload: The next bytes of the tensors.
        checksum: What the sender says of the payload; None if nothing.
        region: Serialized offer of shared memory, or None in all other frames.
    """

    manifest: memoryview | None
    payload: memoryview
    checksum: int | None
    region: memoryview | None = None

    def check(self) -> None:
        """Compare the payload with its checksum.

        Raises:
            InvalidRequestError: If they do not fit.
        """
        digest = xxhash.xxh3_64_intdigest(self.payload)
        if (len(self.payload) or self.checksum) and digest != self.checksum:
            raise InvalidRequestError(
                f"The checksum of a frame with {len(self.payload)} bytes of payload is "
                "wrong."
            )


def encode_frames(manifest: bytes, tensors: Iterable[Tensor]) -> Iterator[bytes]:
    """Split a manifest and its tensors into frames.

    Args:
        manifest: Serialized message for the first frame.
        tensors: CPU tensors in the order the manifest names them.

    Yields:
        One message after the other; at least one.
    """
    head: bytes | None = manifest
    for parts in _chunks(byte_views(tensors)):
        yield _join(head, parts)
        head = None
    if head is not None:
        yield _join(head, [])


def decode_frame(message: bytes) -> Frame:
    """Read one frame without copying its payload, and check it.

    Args:
        message: Any bytes from the network.

    Returns:
        Views into `message`.

    Raises:
        InvalidRequestError: If the message is malformed or its checksum is wrong.
    """
    frame = parse_frame(message)
    frame.check()
    return frame


def parse_frame(message: bytes) -> Frame:
    """Read one frame as `decode_frame` does, but leave the check to the caller.

    Args:
        message: Any bytes from the network.

    Returns:
        Views into `message`.

    Raises:
        InvalidRequestError: If the message is malformed.
    """
    view = memoryview(message)
    manifest, payload, checksum, region, position = None, view[:0], None, None, 0
    while position < len(view):
        tag, position = _read_varint(view, position)
        value, position = _read_value(view, position, tag & 7)
        if tag == _MANIFEST_TAG:
            manifest = value
        elif tag == _CHECKSUM_TAG:
            checksum = int.from_bytes(value, "little")
        elif tag == _PAYLOAD_TAG:
            payload = value
        elif tag == _REGION_TAG:
            region = value
    return Frame(manifest, payload, checksum, region)


class PayloadBuffer:
    """Memory for the tensors that a manifest declared, filled frame by frame.

    Args:
        headers: The tensors; what is said of shared memory is checked on reading.
        pinned: Whether a GPU is to copy from it.
        pool: Where else the memory comes from.

    Raises:
        LimitExceededError: If there is not enough memory.
    """

    def __init__(
        self,
        headers: Sequence[TensorHeader],
        *,
        pinned: bool = False,
        pool: Pool | None = None,
    ) -> None:
        self._headers = headers
        self._begins, nbytes = _arrange(headers)
        try:
            if pinned or pool is None:
                self._buffer = torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned)
            else:
                self._buffer = pool.take(nbytes)
        except (RuntimeError, TypeError, OSError, OverflowError) as error:
            # Short memory, or a number over 64 bits.
            raise LimitExceededError(f"No memory for {nbytes} bytes: {error}") from None
        self._view = self._buffer.numpy().data
        self._shared = [i for i, h in enumerate(headers) if h.shared_offset is not None]
        self._expected = nbytes - sum(headers[i].padded_nbytes for i in self._shared)
        self._filled = 0

    @property
    def complete(self) -> bool:
        """Whether every declared byte is there."""
        return self._filled == self._expected and not self._shared

    @property
    def missing_bytes(self) -> int:
        """Declared bytes of the payload that are not there yet."""
        return self._expected - self._filled

    def write(self, payload: memoryview) -> None:
        """Append the payload of a frame.

        Raises:
            InvalidRequestError: If it is longer than what is missing.
        """
        if len(payload) > self.missing_bytes:
            raise InvalidRequestError(
                f"A payload declared as {self._expected} bytes has at least "
                f"{self._filled + len(payload)}."
            )
        self._view[self._filled : self._filled + len(payload)] = payload
        self._filled += len(payload)

    def read_shared(self, area: Area) -> int:
        """Copy the tensors that are in shared memory, those side by side in one go.

        Returns:
            The bytes of these tensors.

        Raises:
            InvalidRequestError: If one is not where it is said to be.
        """
        area.check(self._headers)
        runs: list[tuple[int, int, int]] = []  # offset, begin and end in the buffer
        for index in self._shared:
            header, begin = self._headers[index], self._begins[index]
            assert header.shared_offset is not None
            end = begin + header.nbytes
            if runs and header.shared_offset - runs[-1][0] == begin - runs[-1][1]:
                runs[-1] = *runs[-1][:2], end
            else:
                runs.append((header.shared_offset, begin, end))
        for offset, begin, end in runs:
            area.read(offset, self._view[begin:end])
        nbytes = sum(self._headers[index].nbytes for index in self._shared)
        self._shared = []
        return nbytes

    def tensors(self) -> list[Tensor]:
        """View the buffer as the declared tensors.

        Returns:
            Tensors that share the buffer's memory, which nothing else will write to.
        """
        assert self.complete, "A payload is read before all of it is there."
        typed = {h.dtype: self._buffer.view(h.dtype) for h in self._headers}
        return [
            typed[header.dtype]
            .narrow(0, begin // header.dtype.itemsize, header.numel)
            .view(header.shape)
            for header, begin in zip(self._headers, self._begins, strict=True)
        ]


def payload_nbytes(headers: Iterable[TensorHeader]) -> int:
    """Size of a payload.

    Returns:
        Bytes of all tensors and of the padding after each.
    """
    return sum(header.padded_nbytes for header in headers)


def byte_views(tensors: Iterable[Tensor]) -> Iterator[memoryview]:
    """View tensors as the bytes of a payload, with padding after each.

    Yields:
        Views, all of which hold their tensor.
    """
    padding = memoryview(bytes(ALIGNMENT))
    for tensor in tensors:
        if not tensor.numel():
            continue
        view = tensor.detach().contiguous().numpy().data.cast("B")
        yield view
        if len(view) % ALIGNMENT:
            yield padding[: padded(len(view)) - len(view)]


def _arrange(headers: Sequence[TensorHeader]) -> tuple[list[int], int]:
    # Those of the payload first, as they come; then those that are in shared memory.
    begins, position = [0] * len(headers), 0
    sizes = [header.padded_nbytes for header in headers]
    shared = [index for index, h in enumerate(headers) if h.shared_offset is not None]
    inline = [index for index, h in enumerate(headers) if h.shared_offset is None]
    for index in (*inline, *shared):
        begins[index] = position
        position += sizes[index]
    return begins, position


def _chunks(views: Iterable[memoryview]) -> Iterator[list[memoryview]]:
    parts: list[memoryview] = []
    room = PAYLOAD_BYTES
    for view in views:
        rest = view
        while len(rest):
            parts.append(rest[:room])
            rest, room = rest[room:], room - len(parts[-1])
            if room == 0:
                yield parts
                parts, room = [], PAYLOAD_BYTES
    if parts:
        yield parts


def _join(manifest: bytes | None, parts: list[memoryview]) -> bytes:
    pieces: list[bytes | memoryview] = []
    if manifest is not None:
        pieces += [bytes([_MANIFEST_TAG]), _varint(len(manifest)), manifest]
    if parts:
        digest = xxhash.xxh3_64()
        for part in parts:
            digest.update(part)
        checksum = digest.intdigest().to_bytes(8, "little")
        length = _varint(sum(map(len, parts)))
        pieces += [bytes([_CHECKSUM_TAG]), checksum, bytes([_PAYLOAD_TAG]), length]
        pieces += parts
    return b"".join(pieces)


def encode_region(offer: bytes) -> bytes:
    """Write the offer of a region as a frame.

    Args:
        offer: The serialized message.

    Returns:
        The frame.
    """
    return b"".join([bytes([_REGION_TAG]), _varint(len(offer)), offer])


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _read_varint(view: memoryview, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 64, 7):
        if position >= len(view):
            break
        byte = view[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise InvalidRequestError("A frame is cut or malformed: a varint has no end.")


def _read_value(view: memoryview, position: int, kind: int) -> tuple[memoryview, int]:
    if kind == _VARINT:
        end = _read_varint(view, position)[1]
    elif kind == _LENGTH_DELIMITED:
        length, position = _read_varint(view, position)
        end = position + length
    elif kind in {_FIXED64, _FIXED32}:
        end = position + (8 if kind == _FIXED64 else 4)
    else:
        raise InvalidRequestError(f"A frame has a field of unknown wire type {kind}.")
    if end > len(view):
        raise InvalidRequestError(
            f"A frame is cut: a field ends at byte {end} of {len(view)}."
        )
    return view[position:end], end
