"""Which positions of a sample are kept."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from skfac.curvature.positions import Positions, draw_positions


@given(count=st.integers(0, 50), keep=st.integers(1, 60), seed=st.integers(0, 2**62))
def test_subsample_draws_without_replacement(count, keep, seed):
    picked = draw_positions("subsample", count, keep=keep, seed=seed).picked

    assert picked.dtype == torch.int64
    assert len(picked) == min(keep, count)
    assert (picked.diff() > 0).all()
    assert set(picked.tolist()) <= set(range(count))


@pytest.mark.parametrize("reduction", ["reduce", "authors", "expand"])
def test_other_reductions_keep_all(reduction):
    positions = draw_positions(reduction, 7, keep=0, seed=1)

    assert positions.reduction == reduction
    assert positions.picked is None
    assert positions.count == 7


def test_the_seed_decides_on_every_machine():
    first, second = (
        draw_positions("subsample", 20, keep=6, seed=2**50 + 3).picked for _ in range(2)
    )

    assert torch.equal(first, second)
    # Recorded: another release or machine must draw the same.
    recorded = draw_positions("subsample", 10, keep=4, seed=1).picked.tolist()
    assert recorded == [1, 3, 8, 9]


def test_every_bit_of_the_seed_counts():
    # torch's own generator ignores the upper half, where callers put a rank.
    draws = {
        tuple(draw_positions("subsample", 1000, keep=20, seed=1 << bit).picked.tolist())
        for bit in range(64)
    }

    assert len(draws) == 64


def test_nothing_else_random_is_touched():
    torch.manual_seed(5)
    expected = torch.rand(3)

    torch.manual_seed(5)
    draw_positions("subsample", 20, keep=6, seed=1)

    assert torch.equal(torch.rand(3), expected)


def test_every_position_is_as_likely():
    draws = [
        draw_positions("subsample", 10, keep=3, seed=seed).picked
        for seed in range(2000)
    ]

    counts = torch.cat(draws).bincount(minlength=10)

    # 600 expected, standard deviation 20.5.
    assert counts.min() > 500
    assert counts.max() < 700


def test_keeping_nothing_is_refused():
    with pytest.raises(ValueError, match="at least 1 position, got 0"):
        draw_positions("subsample", 5, keep=0, seed=1)


@pytest.mark.parametrize(
    ("reduction", "picked"), [("reduce", torch.tensor([1])), ("subsample", None)]
)
def test_picks_belong_to_subsample(reduction, picked):
    with pytest.raises(ValueError, match="no other"):
        Positions(reduction, picked)
