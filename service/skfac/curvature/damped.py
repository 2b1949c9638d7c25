"""What is inverted: a factor, its damping, and when there is no inverse of the two."""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from skfac.curvature.factor import Moment

# A result is refused when rounding it to its dtype could cost this share of the
# smallest eigenvalue; past that the inverse may not be positive definite any more.
_ROUNDING_SHARE = 0.1


@dataclass(frozen=True)
class NoInverse:
    """Says that a damped factor cannot be inverted.

    Attributes:
        reason: A sentence for people.
    """

    reason: str


@dataclass(frozen=True, eq=False)
class DampedFactor:
    """The matrix `A + λ I`.

    Attributes:
        moment: `weight · A`.
        damping: `λ > 0`, added to every eigenvalue of the factor. So is what `moment`
            says to have dropped, which leaves the trace of the factor as it was.
        dtype: What the inverse is rounded to.

    Raises:
        ValueError: If `damping` is not positive.
    """

    moment: Moment
    damping: float
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if not self.damping > 0:
            raise ValueError(f"damping must be positive, got {self.damping}.")

    @cached_property
    def total_damping(self) -> float:
        """The damping and what was dropped."""
        return self.damping + self.moment.mean_dropped

    @property
    def low_rank(self) -> bool:
        """Whether the Gram matrix of rows is inverted, not the factor."""
        return self.moment.form == "rows"

    @property
    def condition_bound(self) -> float:
        """At least the condition `(λ_max + λ) / λ`: `λ_max` is not above the trace."""
        return self._trace_bound / self.total_damping

    @property
    def _trace_bound(self) -> float:
        return self.moment.trace / self.moment.weight + self.total_damping

    @property
    def overflow(self) -> NoInverse | None:
        """Why the inverse would not be finite in `dtype`, or None.

        Its eigenvalues are at most `1 / λ`, and so are its numbers; those of `V` are at
        most 1. So nobody needs to look at what comes out.
        """
        damping, smallest = self.total_damping, 1 / torch.finfo(self.dtype).max
        if damping >= smallest:
            return None
        return NoInverse(
            f"With damping {damping:.3g} the inverse of a factor would not be finite: "
            f"{self.dtype} needs at least {smallest:.3g}."
        )

    def refusal(
        self, damped: Float[Tensor, "*groups m m"], minor: int
    ) -> NoInverse | None:
        """Tell whether a factorization is to be trusted.

        Args:
            damped: The matrix that was factorized, `weight` times this one.
            minor: Order of its first leading minor that is not positive; 0 if all are.

        Returns:
            Why not, or None.
        """
        damping = self.total_damping
        limit = _ROUNDING_SHARE / torch.finfo(self.dtype).eps
        # No eigenvalue is above the trace, which is known, or the largest row sum.
        largest = self._trace_bound
        if not largest / damping <= limit:
            largest = float(damped.abs().sum(-1).amax()) / self.moment.weight
        if not largest / damping <= limit:
            return NoInverse(
                f"A factor with eigenvalues up to {largest - damping:.3g} and damping "
                f"{damping:.3g} has condition {largest / damping:.3g}; {self.dtype} "
                f"holds at most {limit:.3g}."
            )
        if minor:
            return NoInverse(
                f"A factor with damping {damping:.3g} is not positive definite: its "
                f"leading minor of order {minor} is not."
            )
        return self.overflow
