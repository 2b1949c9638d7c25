"""Memory of what is received, in blocks."""

import weakref
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from skfac.wire import payload
from skfac.wire.errors import InvalidRequestError
from skfac.wire.frames import byte_views, payload_nbytes
from skfac.wire.payload import BLOCK_BYTES, PayloadBuffer
from skfac.wire.snapshot import TensorHeader
from tests.support.values import same_bits

SIZES = st.lists(st.integers(0, 40), max_size=6)


def headers_of(*sizes: int) -> list[TensorHeader]:
    return [TensorHeader(torch.float32, (size,)) for size in sizes]


def filled(*sizes: int) -> PayloadBuffer:
    buffer = PayloadBuffer(headers_of(*sizes))
    buffer.write(memoryview(bytes(payload_nbytes(headers_of(*sizes)))))
    return buffer


@given(sizes=SIZES, block_bytes=st.integers(1, 300), piece=st.integers(1, 700))
def test_bytes_find_their_tensor_whatever_the_blocks(sizes, block_bytes, piece):
    tensors = [torch.randn(size) for size in sizes]
    data = b"".join(byte_views(tensors))

    with mock.patch.object(payload, "BLOCK_BYTES", block_bytes):
        buffer = PayloadBuffer(headers_of(*sizes))
    for first in range(0, len(data), piece):
        assert not buffer.complete
        assert buffer.missing_bytes == len(data) - first
        buffer.write(memoryview(data[first : first + piece]))

    assert buffer.complete
    assert all(map(same_bits, buffer.tensors(), tensors))


def test_memory_of_a_layer_is_free_before_that_of_the_others():
    many = BLOCK_BYTES // 4
    tensors = filled(many, many, many).tensors()
    blocks = [weakref.ref(tensor.untyped_storage()) for tensor in tensors]

    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 3
    assert tensors[0].untyped_storage().nbytes() == BLOCK_BYTES
    del tensors[1]
    assert [block() is None for block in blocks] == [False, True, False]


def test_small_tensors_share_a_block():
    tensors = filled(100, 100, BLOCK_BYTES // 4, 100).tensors()

    assert [t.untyped_storage().data_ptr() for t in tensors[:3]] == (
        [tensors[0].data_ptr()] * 3
    )
    assert tensors[3].untyped_storage().data_ptr() == tensors[3].data_ptr()


@pytest.mark.parametrize("written", [0, 64, 128])
def test_more_than_declared_is_refused(written):
    buffer = PayloadBuffer(headers_of(16, 16))
    buffer.write(memoryview(bytes(written)))

    with pytest.raises(InvalidRequestError, match="as 128 bytes has at least 129"):
        buffer.write(memoryview(bytes(129 - written)))
    assert buffer.missing_bytes == 128 - written
