"""The numbers that a trainer may change from one snapshot to the next."""

import math
from dataclasses import dataclass
from typing import Literal

History = Literal["snapshot", "window", "ema"]


@dataclass(frozen=True, kw_only=True)
class CurvatureSettings:
    """How one snapshot is weighed, compressed and damped; it travels with its rows.

    Attributes:
        damping: `λ > 0` of the Kronecker product.
        decay: `0 <= β < 1`: what an update keeps of the history before it, under
            `history="window"` and `"ema"`.
        window: Updates that `history="window"` holds. At least 1.
        rank: Most directions that a factor is kept in; None for no limit.
        energy: Share of a factor's trace that its inverse keeps, in (0, 1].

    Raises:
        ValueError: If a number is out of range.
    """

    damping: float
    decay: float = 0.95
    window: int = 10
    rank: int | None = None
    energy: float = 1.0

    def __post_init__(self) -> None:
        if not (self.damping > 0 and math.isfinite(self.damping)):
            raise ValueError(
                f"damping must be positive and finite, got {self.damping}."
            )
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be from 0 to below 1, got {self.decay}.")
        if self.window < 1:
            raise ValueError(f"window must be at least 1, got {self.window}.")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}.")
        if not 0 < self.energy <= 1:
            raise ValueError(f"energy must be above 0 and at most 1: {self.energy}.")
