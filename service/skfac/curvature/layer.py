"""From the rows of one layer to the preconditioner of its gradient.

Source: Martens & Grosse, "Optimizing Neural Networks with Kronecker-factored
Approximate Curvature", ICML 2015.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from skfac.curvature.damped import DampedFactor, NoInverse
from skfac.curvature.damping import DampingSplit, split_damping
from skfac.curvature.factor import Moment, moment_of
from skfac.curvature.inverse import FactorInverse, LowRankInverse, invert_factors
from skfac.curvature.stacks import in_stacks


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
            A preconditioner with the same damping.
        """
        return replace(
            self,
            activations=self.activations.with_tensor(activations),
            derivatives=self.derivatives.with_tensor(derivatives),
        )

    def without_damping(self) -> tuple["LayerPreconditioner", float]:
        """Take the damping of low-rank inverses out, which is all that is not a tensor.

        Returns:
            A preconditioner, and what its results lack as a factor.
        """
        (activations, first), (derivatives, second) = map(
            _without_damping, (self.activations, self.derivatives)
        )
        return LayerPreconditioner(activations, derivatives), first * second

    def apply(
        self, gradient: Float[Tensor, "*groups d_out d_in"]
    ) -> Float[Tensor, "*groups d_out d_in"]:
        """Precondition a gradient, bias column included.

        Returns:
            The preconditioned gradient, a new tensor.
        """
        return self.activations.right(self.derivatives.left(gradient))

    def apply_with(
        self, gradient: Tensor, activations: Tensor, derivatives: Tensor
    ) -> tuple[Tensor]:
        """Precondition as `apply` does, but with the tensors of others.

        Args:
            gradient: One, or a stack of them.
            activations: The tensor of the activations' inverse, or as many of them.
            derivatives: The tensor of the derivatives' inverse, or as many of them.

        Returns:
            What is shaped like `gradient`; the damping is this preconditioner's.
        """
        flat = [
            tensor if tensor.ndim < 4 else tensor.flatten(0, -3)  # a stack of groups
            for tensor in (gradient, activations, derivatives)
        ]
        return (self.with_tensors(*flat[1:]).apply(flat[0]).view_as(gradient),)


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

    def factors(self) -> tuple[DampedFactor, DampedFactor]:
        """Give each factor its share of λ.

        Returns:
            The damped factors, activations first.

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
    found = _joined(*invert_factors(layer.factors()))
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
            factors += layer.factors()
            refused.append(None)
        except ValueError as error:
            refused.append(NoInverse(str(error)))
    inverses = iter(invert_factors(factors))
    return [
        _joined(next(inverses), next(inverses)) if refusal is None else refusal
        for refusal in refused
    ]


def apply_in_stacks(
    preconditioners: Sequence[LayerPreconditioner], gradients: Sequence[Tensor]
) -> list[Tensor]:
    """Precondition gradients of equal shapes together; see `stacks`.

    It rounds otherwise than `LayerPreconditioner.apply`, also on the CPU.

    Args:
        preconditioners: One a layer, on the device and in the dtype of its gradient.
        gradients: One a layer, `[*groups, d_out, d_in]`.

    Returns:
        The preconditioned gradients, new tensors.
    """
    undamped = [one.without_damping() for one in preconditioners]
    alike: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for i, ((one, _), gradient) in enumerate(zip(undamped, gradients, strict=True)):
        forms = type(one.activations), type(one.derivatives)
        alike[*forms, gradient.device, gradient.dtype].append(i)
    found: dict[int, Tensor] = {}
    for places in alike.values():
        operands = [(gradients[i], *undamped[i][0].tensors) for i in places]
        results = in_stacks(
            undamped[places[0]][0].apply_with, *zip(*operands, strict=True)
        )
        directions = [direction for (direction,) in results]
        torch._foreach_mul_(directions, [undamped[i][1] for i in places])
        found.update(zip(places, directions, strict=True))
    return [found[i] for i in range(len(gradients))]


def _without_damping(inverse: FactorInverse) -> tuple[FactorInverse, float]:
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
