"""All NaN and infinities are found, and no inverse has any."""

import math

import pytest
import torch

from skfac.curvature.factor import moment_of
from skfac.curvature.finite import all_finite
from skfac.curvature.invert import invert_moment


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


@pytest.mark.parametrize("shape", [(3, 5), (9, 4)])
@pytest.mark.parametrize("diagonal", [True, False])
def test_an_inverse_that_would_overflow_is_none(diagonal, shape):
    moment = moment_of(torch.zeros(shape), count=3, diagonal=diagonal)
    smallest = 1 / torch.finfo(torch.float32).max

    found = invert_moment(moment, damping=1.01 * smallest, dtype=torch.float32)
    assert found.tensor.isfinite().all()
    with pytest.raises(torch.linalg.LinAlgError, match=r"needs at least 2\.94e-39"):
        invert_moment(moment, damping=0.99 * smallest, dtype=torch.float32)
