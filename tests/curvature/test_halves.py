"""Products by blocks, against the whole ones."""

import pytest
import torch

from skfac.curvature import halves
from skfac.curvature.halves import gram, lower_times

SIZES = [1, 64, 255, 256, 257, 320, 400]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_gram_matrix_is_the_whole_product_s(size, transposed):
    side = torch.randn(size, 70, dtype=torch.float64)
    if transposed:
        side = side.mT.contiguous().mT

    found = gram(side)

    torch.testing.assert_close(found, side @ side.mT, rtol=1e-13, atol=1e-12)
    assert torch.equal(found, found.mT)


@pytest.mark.parametrize("size", SIZES)
def test_a_triangle_s_product_is_the_whole_one_s(size):
    lower = torch.randn(size, size, dtype=torch.float64).tril()
    rows = torch.randn(size, 70, dtype=torch.float64)

    out = torch.full_like(rows, torch.nan)

    found = lower_times(lower, rows, out=out)

    assert found is out
    torch.testing.assert_close(found, lower @ rows, rtol=1e-13, atol=1e-12)


@pytest.mark.parametrize("size", [256, 300])
def test_only_the_lower_half_of_a_large_triangle_counts(size):
    lower = torch.randn(size, size, dtype=torch.float64).tril()
    rows = torch.randn(size, 70, dtype=torch.float64)
    spoilt = lower.clone()
    spoilt[:64, 64:] = torch.nan

    first, second = (
        lower_times(one, rows, out=torch.empty_like(rows)) for one in (spoilt, lower)
    )

    assert torch.equal(first, second)


@pytest.mark.parametrize(("groups", "size"), [(3, 260), (260, 3)])
def test_groups_are_multiplied_whole(groups, size):
    side = torch.randn(groups, size, 20, dtype=torch.float64)
    lower = torch.randn(groups, size, size, dtype=torch.float64).tril()

    torch.testing.assert_close(gram(side), side @ side.mT)
    found = lower_times(lower, side, out=torch.empty_like(side))
    torch.testing.assert_close(found, lower @ side)


def test_a_gpu_multiplies_at_once(monkeypatch):
    calls = []
    monkeypatch.setattr(halves, "faster_on", lambda device: True)
    monkeypatch.setattr(torch, "mm", lambda *args, **kwargs: calls.append(args))
    side = torch.randn(300, 20, dtype=torch.float64)
    lower = torch.randn(300, 300, dtype=torch.float64).tril()

    assert torch.equal(gram(side), side @ side.mT)
    found = lower_times(lower, side, out=torch.empty_like(side))
    assert torch.equal(found, lower @ side)
    assert not calls
