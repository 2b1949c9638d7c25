"""What a history stands for, from all rows of all its updates at once.

Blocks of grouped layers are made one by one and put on the diagonal of one matrix.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from skfac.curvature.factor import Moment
from skfac.curvature.history import LayerHistory
from skfac.curvature.layer import LayerPreconditioner
from skfac.curvature.settings import CurvatureSettings, History
from tests.support.dense import factor, normal, relative_error

EXACT = 1e-10
DAMPING = 0.05


def whole_factor(rows: Tensor) -> Tensor:
    """The factor of `[n, d]` or `[groups, n, d]` rows, as one square matrix."""
    if rows.ndim == 2:
        return factor(rows)
    return torch.block_diag(*(factor(group) for group in rows))


def diagonal_factor(rows: Tensor, count: int) -> Tensor:
    """`diag(Σ x²) / count`, from any number of rows."""
    sums = torch.stack([row**2 for row in rows]).sum(0)
    return torch.diag(sums) / count


def update_weights(decays: Sequence[float]) -> list[float]:
    """The share of each update, oldest first, in a mean that sums to 1.

    Each update's decay takes that share of the weight from all before it.
    """
    weights: list[float] = []
    for decay in decays:
        weights = [decay * weight for weight in weights] + [1 - decay]
    return [weight / sum(weights) for weight in weights]


def weighted_mean(factors: Iterable[Tensor], weights: Iterable[float]) -> Tensor:
    """`Σ w A`."""
    terms = [w * a for w, a in zip(weights, factors, strict=True)]
    return torch.stack(terms).sum(0)


def kept_matrix(moment: Moment) -> Tensor:
    """What a moment holds of its factor: one square matrix, without what it dropped."""
    tensor = moment.tensor
    if moment.form == "diagonal":
        return torch.diag(tensor[0]) / moment.weight
    if moment.form == "rows":
        tensor = tensor.mT @ tensor
    whole = torch.block_diag(*tensor) if tensor.ndim == 3 else tensor
    return whole / moment.weight


def trace_of(moment: Moment) -> float:
    """The trace of the factor, with what was dropped."""
    return float(kept_matrix(moment).trace()) + moment.dropped / moment.weight


def blocks_of(matrix: Tensor, groups: int) -> Tensor:
    """`[groups, rows, columns]` on the diagonal of a block-diagonal matrix."""
    rows, columns = (size // groups for size in matrix.shape)
    return torch.stack(
        [
            matrix[i * rows : (i + 1) * rows, i * columns : (i + 1) * columns]
            for i in range(groups)
        ]
    )


def settings(**changes: Any) -> CurvatureSettings:
    return CurvatureSettings(**{"damping": DAMPING, "decay": 0.8} | changes)


def spectral_rows(*shape: int, seed: int) -> Tensor:
    """Rows of a spectrum that falls with the square of its index, turned at random."""
    d = shape[-1]
    spectrum = torch.arange(1, d + 1, dtype=torch.float64) ** -1.0
    return (normal(*shape, seed=seed) * spectrum) @ torch.linalg.qr(
        normal(d, d, seed=d)
    )[0]


@dataclass
class Run:
    """A history and, beside it, all the rows that it was made of."""

    history: LayerHistory
    d_in: int = 11
    d_out: int = 7
    groups: int = 1
    rows: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    decays: list[float] = field(default_factory=list)

    def fold(self, count: int, **changes: Any) -> None:
        """Add an update of random rows of unequal scale."""
        seed, groups = len(self.rows), (self.groups,) if self.groups > 1 else ()
        activations = spectral_rows(*groups, count, self.d_in, seed=2 * seed)
        if self.history.diagonal:
            activations = normal(1, self.d_in, seed=seed).abs()
        derivatives = spectral_rows(*groups, count, self.d_out, seed=2 * seed + 1)
        pair = (1 + seed % 3) * activations, 0.3 * derivatives
        chosen = settings(**changes)
        self.history = self.history.fold(*pair, chosen)
        self.rows.append(pair)
        self.decays.append(chosen.decay)

    def exact(self, last: int | None = None) -> tuple[Tensor, Tensor]:
        """Both factors as one matrix each, of all or the last updates."""
        rows = self.rows[-last:] if last else self.rows
        weights = update_weights(self.decays[-len(rows) :])
        activations = [
            diagonal_factor(a, d.shape[-2])
            if self.history.diagonal
            else whole_factor(a)
            for a, d in rows
        ]
        derivatives = [whole_factor(d) for _, d in rows]
        means = (weighted_mean(side, weights) for side in (activations, derivatives))
        first, second = means
        return first, second

    def precondition(self, damping: float = DAMPING, **changes: Any) -> Any:
        return self.history.precondition(settings(**changes), "pi", damping=damping)


def run_of(history: History, *, diagonal: bool = False, **sizes: Any) -> Run:
    return Run(LayerHistory.empty(history, diagonal=diagonal), **sizes)


def split_pi(a: Tensor, g: Tensor, damping: float = DAMPING) -> tuple[float, float]:
    """λ_A and λ_G from the traces of dense factors."""
    pi = math.sqrt(float(a.trace()) / len(a) / (float(g.trace()) / len(g)))
    return pi * damping**0.5, damping**0.5 / pi


def dense_preconditioned(a: Tensor, g: Tensor, gradient: Tensor) -> Tensor:
    """`(G + λ_G)⁻¹ ∇W (A + λ_A)⁻¹` of dense factors."""
    shares = split_pi(a, g)
    identities = (torch.eye(len(m), dtype=torch.float64) for m in (a, g))
    damped_a, damped_g = (
        m + share * one
        for m, share, one in zip((a, g), shares, identities, strict=True)
    )
    return torch.linalg.inv(damped_g) @ gradient @ torch.linalg.inv(damped_a)


def assert_preconditions(
    layer: LayerPreconditioner, run: Run, exact: tuple[Tensor, Tensor]
) -> None:
    """The layer's preconditioner is that of the exact factors."""
    groups = (run.groups,) if run.groups > 1 else ()
    gradient = normal(*groups, run.d_out, run.d_in, seed=77)
    whole = torch.block_diag(*gradient) if groups else gradient
    expected = dense_preconditioned(*exact, whole)
    applied = layer.apply(gradient)
    expected = blocks_of(expected, run.groups) if groups else expected
    assert relative_error(applied, expected) < EXACT
