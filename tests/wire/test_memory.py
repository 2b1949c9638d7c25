"""Memory of what is received: used again, but never while a tensor has it."""

import gc

import pytest
import torch

from skfac.wire.memory import Pool, tensor_over

MiB = 1024 * 1024


def test_a_block_comes_back_with_the_last_tensor_over_it():
    freed: list[int] = []
    tensor = tensor_over(memoryview(bytearray(64)), lambda: freed.append(1))
    part = tensor[8:16].view(torch.float32)
    del tensor
    assert not freed
    part[0] = 1.5
    array = part.numpy()
    del part
    assert not freed
    assert array[0] == 1.5
    del array
    assert freed == [1]


def test_memory_is_used_again_once_its_tensors_are_gone():
    pool = Pool()
    first = pool.take(3 * MiB)
    where = first.data_ptr()
    second = pool.take(3 * MiB)
    assert second.data_ptr() != where
    assert (first.numel(), first.dtype) == (3 * MiB, torch.uint8)

    del first
    assert pool.free_bytes == 3 * MiB
    smaller = pool.take(2 * MiB)

    assert smaller.data_ptr() == where
    assert smaller.numel() == 2 * MiB


def test_a_block_is_not_wasted_on_much_less():
    pool = Pool()
    large = pool.take(8 * MiB)
    where = large.data_ptr()
    del large

    assert pool.take(3 * MiB).data_ptr() != where


def test_no_more_is_kept_than_was_in_use_at_once():
    pool = Pool()
    for size in range(2, 40):  # no block fits the next but one
        taken = [pool.take(size * MiB)]
        del taken
        assert pool.free_bytes <= size * MiB

    blocks = [pool.take(4 * MiB) for _ in range(10)]
    blocks.clear()
    gc.collect()
    assert pool.free_bytes == 40 * MiB


def test_small_memory_is_left_to_the_allocator():
    pool = Pool()
    del_me = pool.take(1000)
    assert del_me.numel() == 1000
    del del_me
    assert pool.free_bytes == 0


@pytest.mark.parametrize("nbytes", [2**50, 2**62, 2**70])
def test_more_than_there_is_is_an_error(nbytes):
    with pytest.raises((OSError, OverflowError, RuntimeError)):
        Pool().take(nbytes)
