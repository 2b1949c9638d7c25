"""One pass finds all NaN and infinities, and nothing else."""

import math

import pytest
import torch

from skfac.curvature.finite import all_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 17, 63])
def test_one_bad_number_is_found(dtype, bad, place):
    numbers = torch.ones(64, dtype=dtype)
    assert all_finite(numbers.reshape(8, 8))

    numbers[place] = bad

    assert not all_finite(numbers.reshape(8, 8))


def test_infinities_do_not_cancel():
    assert not all_finite(torch.tensor([math.inf, -math.inf]))


def test_large_numbers_whose_sum_overflows_are_finite():
    assert all_finite(torch.full((9,), 3e38))
    assert not all_finite(torch.tensor([3e38, 3e38, math.nan]))


def test_nothing_is_finite():
    assert all_finite(torch.empty(0, 3))
