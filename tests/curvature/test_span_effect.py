"""The span effect: a fresh gradient leaves the span of the rows, and is blown up.

What is outside the span of few rows is divided by the damping alone. The batch that
built the factors is inside and never shows it; the next batch does.
"""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from skfac.client import PreconditionerConfig
from skfac.curvature.damping import DampingSplit
from skfac.curvature.history import LayerHistory
from skfac.curvature.layer import LayerPreconditioner
from skfac.curvature.settings import CurvatureSettings, History
from skfac.curvature.trust import kl_scale
from tests.support.dense import normal

SIZE = 512
COUNT = 32
UPDATES = 12
KL_CLIP = PreconditionerConfig().at("kl_clip", 0)


@dataclass(frozen=True, eq=False)
class Batch:
    """The rows of one batch of a 512 × 512 layer."""

    activations: Tensor
    derivatives: Tensor

    @property
    def gradient(self) -> Tensor:
        return self.derivatives.T @ self.activations / COUNT


def batch(seed: int) -> Batch:
    """Activations and derivatives of mean-square 1, their spectra falling as 1/i."""
    spectrum = torch.arange(1, SIZE + 1, dtype=torch.float64) ** -0.5
    spectrum *= (SIZE / spectrum.square().sum()).sqrt()
    rows = [normal(COUNT, SIZE, seed=2 * seed + side) * spectrum for side in (0, 1)]
    return Batch(*rows)


def preconditioner(
    history: History,
    split: DampingSplit,
    *,
    rank: int | None = None,
    scale: float = 1.0,
) -> LayerPreconditioner:
    """Built from batches 1 to `UPDATES`, of which a snapshot keeps the last.

    Activations are multiplied by `scale` and derivatives divided by it.
    """
    settings = CurvatureSettings(damping=0.03, decay=0.95, rank=rank)
    kept = LayerHistory.empty(history)
    for seed in range(1, UPDATES + 1):
        rows = batch(seed)
        kept = kept.fold(scale * rows.activations, rows.derivatives / scale, settings)
    return kept.precondition(settings, split, damping=settings.damping)


def growth(layer: LayerPreconditioner, of: Batch) -> float:
    """`‖P‖ / ‖∇W‖` of one batch's gradient."""
    return float(layer.apply(of.gradient).norm() / of.gradient.norm())


OWN, FRESH = batch(UPDATES), batch(UPDATES + 1)


def test_a_fresh_batch_is_blown_up_by_a_snapshot_and_its_own_is_not():
    snapshot = preconditioner("snapshot", "equal")

    assert growth(snapshot, OWN) < 0.1
    # Nearly 1/λ = 33: most of it is outside the span on both sides.
    assert growth(snapshot, FRESH) > 100 * growth(snapshot, OWN)
    assert 5 < growth(snapshot, FRESH) < 1 / 0.03


@pytest.mark.parametrize("history", ["window", "ema"])
@pytest.mark.parametrize("split", ["equal", "pi"])
def test_more_updates_and_their_trace_bound_the_blow_up(history, split):
    snapshot = growth(preconditioner("snapshot", split), FRESH)
    whole = growth(preconditioner(history, split), FRESH)
    cut = growth(preconditioner(history, split, rank=64), FRESH)

    assert whole < snapshot / 3
    # 64 directions of 384 hold less, but what they lack is damping.
    assert cut < snapshot / 6


@pytest.mark.parametrize("scale", [0.01, 100.0])
def test_pi_alone_does_not_depend_on_how_the_sides_are_scaled(scale):
    # The gradient is the product of both sides, and does not see the scale.
    expected = growth(preconditioner("ema", "pi"), FRESH)

    by_trace = growth(preconditioner("ema", "pi", scale=scale), FRESH)
    equal = growth(preconditioner("ema", "equal", scale=scale), FRESH)

    assert by_trace == pytest.approx(expected)
    assert equal > 1.5 * expected


@pytest.mark.parametrize("history", ["snapshot", "window", "ema"])
@pytest.mark.parametrize("split", ["equal", "pi"])
@pytest.mark.parametrize("lr", [1e-3, 0.1, 10.0])
@pytest.mark.parametrize("of", [OWN, FRESH], ids=["own", "fresh"])
def test_the_trust_region_bounds_every_step(history, split, lr, of):
    layer = preconditioner(history, split, rank=64)
    decrease = (layer.apply(of.gradient) * of.gradient).sum()

    scale = kl_scale(lr**2 * decrease, kl_clip=KL_CLIP)

    assert decrease > 0
    assert lr**2 * scale**2 * decrease <= KL_CLIP * (1 + 1e-12)
