"""What an object store holds: no copies, and nothing is believed."""

import weakref

import numpy as np
import pytest
import torch

from skfac.wire.codec import (
    decode_outcomes_manifest,
    decode_snapshot_header,
    encode_outcomes,
    parse_snapshot_manifest,
)
from skfac.wire.errors import InvalidRequestError
from skfac.wire.frames import decode_frame
from skfac.wire.objects import (
    arrays_of,
    frame_arrays,
    frames_of,
    snapshot_manifest,
    tensors_of,
)
from skfac.wire.snapshot import TensorHeader
from tests.support.values import MIXED, loss, same_bits, session_spec, snapshot, version

SENT = snapshot(session_spec(*MIXED), 3, rank_cap=7, window=5, decay=0.5)


def locked(arrays):
    """As the object store gives them: read-only."""
    for array in arrays:
        array.setflags(write=False)
    return arrays


def test_a_manifest_declares_the_snapshot():
    manifest = parse_snapshot_manifest(memoryview(snapshot_manifest("s", SENT)))

    assert manifest.session_id == "s"
    assert decode_snapshot_header(manifest) == SENT.header


def test_tensors_share_the_memory_of_read_only_arrays():
    arrays = locked(arrays_of([tensor.clone() for tensor in SENT.tensors]))
    tensors = tensors_of(SENT.header.tensors, arrays)

    assert all(map(same_bits, tensors, SENT.tensors))
    for tensor, array in zip(tensors, arrays, strict=True):
        assert tensor.data_ptr() == array.ctypes.data


def test_tensors_keep_the_memory_that_they_share():
    array = np.ones(1 << 20, np.uint8)
    alive = weakref.ref(array)
    (tensor,) = tensors_of([TensorHeader(torch.uint8, (1 << 20,))], [array])
    del array
    assert alive() is not None
    del tensor
    assert alive() is None


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0,)])
def test_tensors_may_be_empty(shape):
    (tensor,) = tensors_of(
        [TensorHeader(torch.float64, shape)], arrays_of([torch.empty(shape)])
    )
    assert (tensor.shape, tensor.dtype) == (shape, torch.float64)


def test_rows_that_are_not_contiguous_are_sent_all_the_same():
    rows = torch.arange(12.0).reshape(3, 4).T
    (tensor,) = tensors_of([TensorHeader.of(rows)], arrays_of([rows]))
    assert same_bits(tensor, rows)


HEADER = TensorHeader(torch.float32, (2, 3))
RIGHT = np.zeros(24, np.uint8)


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        (None, "list of 1 arrays, got a NoneType"),
        ([], "list of 1 arrays, got a list of 0"),
        ([RIGHT, RIGHT], "got a list of 2"),
        ([b"x" * 24], "24 bytes, got a bytes"),
        ([RIGHT[:20]], "24 bytes, got an array of uint8 and shape"),
        ([RIGHT.view(np.float32)], "got an array of float32"),
        ([RIGHT.reshape(2, 12)], r"shape \(2, 12\)"),
        ([np.zeros(48, np.uint8)[::2]], "24 bytes, got"),
        ([np.array([None] * 24)], "array of object"),
    ],
)
def test_a_payload_that_is_not_what_was_declared_is_refused(arrays, text):
    with pytest.raises(InvalidRequestError, match=text):
        tensors_of([HEADER], arrays)


def test_frames_pass_as_arrays():
    frames = list(encode_outcomes([version(), loss()]))
    received = list(frames_of(locked(frame_arrays(frames))))

    manifest = decode_frame(received[0]).manifest
    assert manifest is not None
    message, headers = decode_outcomes_manifest(manifest)
    assert (len(message.outcomes), len(headers)) == (2, 2)
    assert list(map(bytes, received)) == frames


@pytest.mark.parametrize("arrays", [None, [b"x"], [np.zeros(3)], RIGHT.reshape(4, 6)])
def test_other_frames_are_refused(arrays):
    with pytest.raises(InvalidRequestError, match="A frame is an array of bytes, got"):
        list(frames_of(arrays))
