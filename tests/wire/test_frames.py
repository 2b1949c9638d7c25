"""Frames: every tensor arrives bit by bit, or its frames are refused."""

from itertools import pairwise

import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from skfac.v1 import preconditioning_pb2 as pb
from skfac.wire import frames
from skfac.wire.channel import MAX_FRAME_BYTES
from skfac.wire.errors import InvalidRequestError, LimitExceededError
from skfac.wire.frames import (
    Frame,
    decode_frame,
    encode_frames,
    payload_nbytes,
)
from skfac.wire.payload import PayloadBuffer
from skfac.wire.snapshot import TensorHeader
from tests.support.dense import normal
from tests.support.values import same_bits

MANIFEST = pb.SnapshotManifest(session_id="id", step=7).SerializeToString()
DTYPES = st.sampled_from([torch.float32, torch.float64])
SHAPES = st.lists(st.integers(0, 5), max_size=3)
HEADERS = st.lists(st.builds(TensorHeader, DTYPES, SHAPES.map(tuple)), max_size=5)
UNKNOWN = {
    "varint": b"\x78\xff\xff\x03",
    "fixed64": b"\x81\x01" + b"\x1a" * 8,
    "length-delimited": b"\x7a\x03\x1a\x01\x00",
    "empty": b"\x7a\x00",
    "fixed32": b"\x7d\x0a\x01\x00\x00",
    "a known number in another wire type": b"\x18\x05",
}


def random_bits(header: TensorHeader) -> Tensor:
    """Any bits: NaNs, infinities and subnormal numbers among them."""
    data = torch.randint(0, 256, (header.nbytes,), dtype=torch.uint8)
    return data.view(header.dtype).reshape(header.shape)


def frames_of(tensors: list[Tensor], payload_bytes: int) -> list[bytes]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frames, "PAYLOAD_BYTES", payload_bytes)
        return list(encode_frames(MANIFEST, tensors))


def buffer_for(*tensors: Tensor) -> PayloadBuffer:
    return PayloadBuffer([TensorHeader.of(tensor) for tensor in tensors])


def one_frame() -> bytes:
    (frame,) = encode_frames(MANIFEST, [normal(2, 3)])
    return frame


def manifest_of(frame: Frame) -> bytes | None:
    return None if frame.manifest is None else bytes(frame.manifest)


def fields(payload: bytes) -> list[bytes]:
    """The three fields of a frame as protobuf writes each of them."""
    checksum = xxhash.xxh3_64_intdigest(payload)
    manifest = pb.SnapshotManifest.FromString(MANIFEST)
    messages = (
        pb.PushSnapshotsRequest(manifest=manifest),
        pb.PushSnapshotsRequest(checksum=checksum),
        pb.PushSnapshotsRequest(payload=payload),
    )
    return [message.SerializeToString() for message in messages]


@given(headers=HEADERS, payload_bytes=st.integers(1, 200))
def test_tensors_arrive_bit_by_bit(headers, payload_bytes):
    tensors = [random_bits(header) for header in headers]
    buffer = PayloadBuffer(headers)

    decoded = [decode_frame(frame) for frame in frames_of(tensors, payload_bytes)]
    for frame in decoded:
        buffer.write(frame.payload)

    assert buffer.complete
    assert all(map(same_bits, buffer.tensors(), tensors))
    assert len(buffer.tensors()) == len(tensors)
    assert manifest_of(decoded[0]) == MANIFEST
    assert all(frame.manifest is None for frame in decoded[1:])


@given(headers=HEADERS, payload_bytes=st.integers(1, 200))
def test_all_frames_but_the_last_are_full(headers, payload_bytes):
    messages = frames_of([random_bits(header) for header in headers], payload_bytes)
    sizes = [len(decode_frame(message).payload) for message in messages]

    assert sum(sizes) == payload_nbytes(headers)
    assert sizes[:-1] == [payload_bytes] * (len(sizes) - 1)
    assert sizes[-1] > 0 or sizes == [0]


@given(headers=HEADERS)
def test_every_tensor_starts_at_the_next_multiple_of_64_bytes(headers):
    buffer = PayloadBuffer(headers)
    buffer.write(memoryview(bytes(payload_nbytes(headers))))
    positions = [t.data_ptr() for t in buffer.tensors() if t.numel()]
    sizes = [header.nbytes for header in headers if header.nbytes]

    assert all(position % 64 == 0 for position in positions)
    for i, (before, after) in enumerate(pairwise(positions)):
        assert 0 <= after - before - sizes[i] < 64
    assert payload_nbytes(headers) == sum(-(-size // 64) * 64 for size in sizes)


def test_frames_stay_within_what_both_ends_accept():
    manifest, tensor = bytes(100_000), torch.zeros(5 * 1024 * 1024 // 4 + 1)

    messages = list(encode_frames(manifest, [tensor]))

    assert len(messages) == 3
    assert max(map(len, messages)) <= MAX_FRAME_BYTES
    assert max(len(decode_frame(m).payload) for m in messages) == frames.PAYLOAD_BYTES


@pytest.mark.parametrize("length", [0, 1, 127, 128, 16_383, 16_384, 2_097_152])
def test_lengths_around_the_borders_of_a_varint(length):
    (message,) = encode_frames(bytes(length), [torch.zeros(16)])

    frame = decode_frame(message)

    assert manifest_of(frame) == bytes(length)
    assert bytes(frame.payload) == bytes(64)


@pytest.mark.parametrize(
    "tensor",
    [
        normal(6, 4).T,
        normal(9, 8)[::2, 1::3],
        normal(1, 5).expand(4, 5),
        normal(3, 3).requires_grad_(),
        torch.tensor(1.5),
    ],
    ids=["transposed", "strided", "expanded", "requires grad", "scalar"],
)
def test_any_layout_is_sent_row_major(tensor):
    buffer = buffer_for(tensor)

    for frame in frames_of([tensor], 7):
        buffer.write(decode_frame(frame).payload)

    assert same_bits(buffer.tensors()[0], tensor.detach())


@given(headers=HEADERS, payload_bytes=st.integers(1, 200))
def test_protobuf_reads_the_frames(headers, payload_bytes):
    messages = frames_of([random_bits(header) for header in headers], payload_bytes)

    for i, message in enumerate(messages):
        request = pb.PushSnapshotsRequest.FromString(message)
        frame = decode_frame(message)
        assert request.payload == bytes(frame.payload)
        assert request.HasField("manifest") == (i == 0)
        assert request.manifest.SerializeToString() == (MANIFEST if i == 0 else b"")
        if request.payload:
            assert request.checksum == xxhash.xxh3_64_intdigest(request.payload)


@given(payload=st.binary(max_size=300), order=st.permutations(range(3)))
def test_what_protobuf_wrote_is_read_in_any_order(payload, order):
    pieces = fields(payload)

    frame = decode_frame(b"".join(pieces[i] for i in order))

    assert manifest_of(frame) == MANIFEST
    assert bytes(frame.payload) == payload


@pytest.mark.parametrize("unknown", UNKNOWN.values(), ids=UNKNOWN.keys())
def test_unknown_fields_are_skipped(unknown):
    message = b"".join(unknown + field for field in fields(b"payload")) + unknown

    frame = decode_frame(message)

    assert manifest_of(frame) == MANIFEST
    assert bytes(frame.payload) == b"payload"
    assert pb.PushSnapshotsRequest.FromString(message).payload == b"payload"


@pytest.mark.parametrize("kind", [3, 4, 6, 7])
def test_fields_of_unknown_wire_types_are_refused(kind):
    with pytest.raises(InvalidRequestError, match=f"unknown wire type {kind}"):
        decode_frame(one_frame() + bytes([15 << 3 | kind, 0]))


def test_a_frame_without_anything_is_empty():
    frame = decode_frame(b"")

    assert frame.manifest is None
    assert bytes(frame.payload) == b""


@pytest.mark.parametrize("length", [1, 7])
def test_a_payload_without_a_checksum_is_refused(length):
    manifest, _, payload = fields(bytes(length))

    with pytest.raises(InvalidRequestError, match=f"frame with {length} bytes"):
        decode_frame(manifest + payload)


def assert_payload_is_whole_or_missing(broken: bytes, whole: bytes) -> None:
    # A missing payload is noticed later: the buffer stays incomplete.
    try:
        frame = decode_frame(broken)
    except InvalidRequestError:
        return
    assert bytes(frame.payload) in {bytes(decode_frame(whole).payload), b""}


def test_no_truncated_payload_passes():
    whole = one_frame()
    borders = {0, 2 + len(MANIFEST), 2 + len(MANIFEST) + 9}

    for end in range(len(whole)):
        assert_payload_is_whole_or_missing(whole[:end], whole)
        if end not in borders:
            with pytest.raises(InvalidRequestError, match="A frame is cut"):
                decode_frame(whole[:end])


def test_no_flipped_bit_of_the_payload_passes():
    whole = one_frame()

    for position in range(8 * len(whole)):
        broken = bytearray(whole)
        broken[position // 8] ^= 1 << position % 8
        assert_payload_is_whole_or_missing(bytes(broken), whole)
        if position // 8 >= len(whole) - 64:
            with pytest.raises(InvalidRequestError, match="checksum of a frame with"):
                decode_frame(bytes(broken))


def test_a_checksum_whose_payload_is_missing_is_refused():
    manifest, checksum, _ = fields(b"payload")

    with pytest.raises(InvalidRequestError, match="checksum"):
        decode_frame(manifest + checksum)


@given(message=st.binary(max_size=60))
def test_arbitrary_bytes_are_read_or_refused(message):
    try:
        frame = decode_frame(message)
    except InvalidRequestError:
        return
    assert len(frame.payload) + len(frame.manifest or b"") <= len(message)


@given(pieces=st.lists(st.one_of(st.sampled_from(fields(b"x")), st.binary(max_size=9))))
def test_fields_among_arbitrary_bytes_are_read_or_refused(pieces):
    try:
        frame = decode_frame(b"".join(pieces))
    except InvalidRequestError:
        return
    assert len(frame.payload) + len(frame.manifest or b"") <= sum(map(len, pieces))


@pytest.mark.parametrize(
    "message", [b"\xff" * 9, b"\xff" * 12, b"\x1a" + b"\xff" * 9 + b"\x01", b"\x0a\x7f"]
)
def test_varints_and_lengths_beyond_the_frame_are_refused(message):
    with pytest.raises(InvalidRequestError, match="A frame is cut"):
        decode_frame(message)


def test_too_much_payload_is_refused_and_leaves_the_buffer_as_it_was():
    buffer = buffer_for(torch.zeros(20))
    buffer.write(memoryview(bytes(100)))

    with pytest.raises(
        InvalidRequestError, match="declared as 128 bytes has at least 129"
    ):
        buffer.write(memoryview(bytes(29)))

    assert buffer.missing_bytes == 28
    assert not buffer.complete
    buffer.write(memoryview(bytes(28)))
    assert buffer.complete
    with pytest.raises(InvalidRequestError, match="has at least 129"):
        buffer.write(memoryview(bytes(1)))


def test_a_buffer_is_not_read_before_it_is_complete():
    with pytest.raises(AssertionError, match="before all of it is there"):
        buffer_for(torch.zeros(1)).tensors()


@pytest.mark.parametrize("extent", [2**50, 2**62])
def test_more_than_the_memory_is_over_a_limit(extent):
    with pytest.raises(LimitExceededError, match="No memory for"):
        PayloadBuffer([TensorHeader(torch.float32, (extent,))])
