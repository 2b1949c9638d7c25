"""From the rows of one layer to the preconditioner of its gradient.

Source: Martens & Grosse, "Optimizing Neural Networks with Kronecker-factored
Approximate Curvature", ICML 2015.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from skfac.curvature.damped import DampedFactor, NoInverse
from skfac.curvature.damping import DampingSplit, split_damping
from skfac.curvature.factor import Moment, moment_of
from skfac.curvature.inverse import FactorInverse, LowRankInverse
from skfac.curvature.invert import invert_factors
from skfac.curvature.stacks import numbers_on


@dataclass(frozen=True, eq=False)
class LayerPreconditioner:
    """`∇W ↦ (G + λ_G I)⁻¹ ∇W (A + λ_A I)⁻¹`.

    Attributes:
        activations: Inverse of the damped activation factor, `[*groups, d_in, d_in]`.
        derivatives: Inverse of the damped derivative factor, `[*groups, d_out, d_out]`.
    """

    activations: FactorInverse
    derivatives: FactorInverse

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """The tensors of both inverses, activations first."""
        return self.activations.tensor, self.derivatives.tensor

    def with_tensors(
        self, activations: Tensor, derivatives: Tensor
    ) -> "LayerPreconditioner":
        """Hold both inverses in other tensors, such as copies elsewhere.

        Returns:
            A preconditioner with the same damping; this one if they are its own.
        """
        if activations is self.tensors[0] and derivatives is self.tensors[1]:
            return self
        return replace(
            self,
            activations=self.activations.with_tensor(activations),
            derivatives=self.derivatives.with_tensor(derivatives),
        )

    def apply(
        self, gradient: Float[Tensor, "*groups d_out d_in"]
    ) -> Float[Tensor, "*groups d_out d_in"]:
        """Precondition a gradient, bias column included.

        Returns:
            The preconditioned gradient, a new tensor.
        """
        return self.activations.right(self.derivatives.left(gradient), spoil=True)


class StackedPreconditioner:
    """The preconditioners of several layers, whose forms and shapes are equal, as one.

    The memory stays where it is when others replace them.

    Args:
        ones: At least one, all on one device.

    Attributes:
        factors: What the result of `apply` lacks, one number for each.
        views: Each of them, held in the memory of all.
    """

    def __init__(self, ones: Sequence[LayerPreconditioner]) -> None:
        sides = zip(*(one.tensors for one in ones), strict=True)
        self._stacks = [side[0].new_empty(len(side), *side[0].shape) for side in sides]
        undamped, _ = _without_damping(ones[0])
        # Groups are more of the same.
        flat = [stack.flatten(0, -3) for stack in self._stacks]
        self._whole = undamped.with_tensors(*flat)
        self.factors = self._stacks[0].new_empty(len(ones))
        self.views: list[LayerPreconditioner] = []
        self.replace(ones)

    @property
    def dtype(self) -> torch.dtype:
        """Of all tensors."""
        dtype: torch.dtype = self.factors.dtype
        return dtype

    def replace(self, ones: Sequence[LayerPreconditioner]) -> None:
        """Take others, of the same forms and shapes.

        Args:
            ones: As many; they may be views of before.
        """
        sides = zip(*(one.tensors for one in ones), strict=True)
        targets = [one for stack in self._stacks for one in stack.unbind()]
        sources = [tensor for side in sides for tensor in side]
        torch._foreach_copy_(targets, sources)
        factors = [_without_damping(one)[1] for one in ones]
        self.factors.copy_(numbers_on(self.factors.device, factors))
        views = zip(*(stack.unbind() for stack in self._stacks), strict=True)
        self.views = [
            one.with_tensors(*view) for one, view in zip(ones, views, strict=True)
        ]

    def apply(
        self, gradients: Float[Tensor, "layers *groups d_out d_in"]
    ) -> Float[Tensor, "layers *groups d_out d_in"]:
        """Precondition a gradient with each.

        Returns:
            New tensors, each without its factor.
        """
        return self._whole.apply(gradients.flatten(0, -3)).view_as(gradients)


@dataclass(frozen=True, eq=False)
class DampedLayer:
    """What the preconditioner of a layer is made of.

    Attributes:
        activations: What the activation factor is made of.
        derivatives: What the derivative factor is made of.
        damping: `λ > 0` of the Kronecker product.
        split: How λ is shared by the factors; see `split_damping`.
        dtype: What the results are rounded to.
    """

    activations: Moment
    derivatives: Moment
    damping: float
    split: DampingSplit
    dtype: torch.dtype

    @cached_property
    def factors(self) -> tuple[DampedFactor, DampedFactor]:
        """The damped factors, activations first, each with its share of λ.

        Raises:
            ValueError: If `damping` is not positive and finite, or cannot be shared.
        """
        shares = split_damping(
            self.damping,
            self.split,
            mean_eigenvalue_activations=self.activations.mean_eigenvalue,
            mean_eigenvalue_derivatives=self.derivatives.mean_eigenvalue,
        )
        return (
            DampedFactor(self.activations, shares.activations, self.dtype),
            DampedFactor(self.derivatives, shares.derivatives, self.dtype),
        )


def precondition_layer(
    activations: Float[Tensor, "*groups n d_in"],
    derivatives: Float[Tensor, "*groups n d_out"],
    *,
    damping: float,
    split: DampingSplit,
) -> LayerPreconditioner:
    """Build the preconditioner of one layer from one snapshot of its rows.

    Args:
        activations: Rows of the activation factor, the bias column included.
        derivatives: Rows of the derivative factor, from the same step and examples.
        damping: `λ > 0` of the Kronecker product.
        split: How λ is shared by the factors; see `split_damping`.

    Returns:
        Both damped inverses, in the dtype of the rows.

    Raises:
        ValueError: If there are no rows, `damping` is not positive and finite, or the
            rows are not.
        torch.linalg.LinAlgError: If a damped factor cannot be inverted.
    """
    count = derivatives.shape[-2]
    return precondition_moments(
        moment_of(activations, count=count),
        moment_of(derivatives, count=count),
        damping=damping,
        split=split,
        dtype=derivatives.dtype,
    )


def precondition_moments(
    activations: Moment,
    derivatives: Moment,
    *,
    damping: float,
    split: DampingSplit,
    dtype: torch.dtype,
) -> LayerPreconditioner:
    """Build the preconditioner of one layer from the moments of its rows.

    Args:
        activations: What the activation factor is made of.
        derivatives: What the derivative factor is made of.
        damping: `λ > 0` of the Kronecker product.
        split: How λ is shared by the factors; see `split_damping`.
        dtype: What the results are rounded to.

    Returns:
        Both inverses, each damped by its share of λ and by what truncation dropped.

    Raises:
        ValueError: If `damping` is not positive and finite.
        torch.linalg.LinAlgError: If a damped factor cannot be inverted.
    """
    layer = DampedLayer(activations, derivatives, damping, split, dtype)
    found = _joined(*invert_factors(layer.factors))
    if isinstance(found, NoInverse):
        raise torch.linalg.LinAlgError(found.reason)  # type: ignore[attr-defined]  # C++ defines it
    return found


def precondition_layers(
    layers: Sequence[DampedLayer],
) -> list[LayerPreconditioner | NoInverse]:
    """Build the preconditioners of many layers together; see `invert_factors`.

    Args:
        layers: With all moments on one device.

    Returns:
        For each what `precondition_moments` returns, or why it has none.
    """
    factors: list[DampedFactor] = []
    refused: list[NoInverse | None] = []
    for layer in layers:
        try:
            factors += layer.factors
            refused.append(None)
        except ValueError as error:
            refused.append(NoInverse(str(error)))
    inverses = iter(invert_factors(factors))
    return [
        _joined(next(inverses), next(inverses)) if refusal is None else refusal
        for refusal in refused
    ]


def _without_damping(one: LayerPreconditioner) -> tuple[LayerPreconditioner, float]:
    (activations, first), (derivatives, second) = map(
        _undamped, (one.activations, one.derivatives)
    )
    return LayerPreconditioner(activations, derivatives), first * second


def _undamped(inverse: FactorInverse) -> tuple[FactorInverse, float]:
    # All other forms have it in their tensor.
    if isinstance(inverse, LowRankInverse):
        return replace(inverse, damping=1.0), 1 / inverse.damping
    return inverse, 1.0


def _joined(
    activations: FactorInverse | NoInverse, derivatives: FactorInverse | NoInverse
) -> LayerPreconditioner | NoInverse:
    if isinstance(activations, NoInverse):
        return activations
    if isinstance(derivatives, NoInverse):
        return derivatives
    return LayerPreconditioner(activations, derivatives)
