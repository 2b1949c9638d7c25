"""Frames: a manifest, then tensors as raw bytes, split into bounded messages.

A frame is the protobuf message `{1: manifest, 2: checksum, 3: payload}` of the
.proto, written and read by hand: protobuf would copy the payload once more each way,
and gRPC hands over plain bytes. Every frame is made by one join and read as views.
Tensors that a manifest finds in shared memory are in no payload.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import xxhash
from torch import Tensor

from skfac.wire.errors import InvalidRequestError
from skfac.wire.snapshot import ALIGNMENT, TensorHeader, padded

PAYLOAD_BYTES = 2 * 1024 * 1024
"""Payload of a full frame. Measured: 1 to 4 MiB are one plateau of throughput."""

MAX_FRAME_FIELDS = 64
"""More than any version of the protocol has; each costs the reader time."""

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
    for _ in range(MAX_FRAME_FIELDS):
        if position == len(view):
            return Frame(manifest, payload, checksum, region)
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
    raise InvalidRequestError(f"A frame has {MAX_FRAME_FIELDS} fields or more.")


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
        whole = tensor.detach() if tensor.requires_grad else tensor
        view = whole.contiguous().numpy().data.cast("B")
        yield view
        if len(view) % ALIGNMENT:
            yield padding[: padded(len(view)) - len(view)]


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
