"""`kl_scale` shortens a step to the trust region and never lengthens it."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from skfac.curvature.trust import inner, kl_scale


@pytest.mark.parametrize(
    ("model_decrease", "kl_clip", "scale"),
    [
        (4e-3, 1e-3, 0.5),
        (0.9, 0.1, 1 / 3),
        (1e-3, 1e-3, 1.0),
        (2.5e-4, 1e-3, 1.0),
        (0.0, 1e-3, 1.0),
        (-4e-3, 1e-3, 0.5),
        (-2.5e-4, 1e-3, 1.0),
        (math.inf, 1e-3, 0.0),
        (math.nan, 1e-3, math.nan),
    ],
)
def test_scale_by_value(model_decrease, kl_clip, scale):
    decrease = torch.tensor(model_decrease, dtype=torch.float64)

    actual = kl_scale(decrease, kl_clip=kl_clip)

    assert actual.shape == ()
    assert float(actual) == pytest.approx(scale, rel=1e-12, nan_ok=True)


@given(
    model_decrease=st.floats(-1e30, 1e30),
    kl_clip=st.floats(1e-8, 1e3),
)
def test_scaled_decrease_stays_in_the_region(model_decrease, kl_clip):
    decrease = torch.tensor(model_decrease, dtype=torch.float64)

    scale = float(kl_scale(decrease, kl_clip=kl_clip))

    assert 0 < scale <= 1
    assert scale**2 * abs(model_decrease) <= kl_clip * (1 + 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scale_keeps_the_dtype(dtype):
    assert kl_scale(torch.tensor(2.0, dtype=dtype), kl_clip=1.0).dtype is dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_of_narrow_numbers_are_wide(dtype):
    numbers = torch.full((3, 1000), 300.0, dtype=dtype)

    found = inner(numbers, numbers)

    assert float(found) == pytest.approx(3000 * float(numbers[0, 0]) ** 2, rel=1e-5)
