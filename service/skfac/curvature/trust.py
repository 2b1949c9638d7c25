"""How long a preconditioned step may be.

`"kl"`: a step `-lr ν P` changes the model's output distribution by a KL divergence of
about `lr² ν² <P, F P> ≈ lr² ν² <P, ∇W>`; ν keeps that below κ.
`"graft"`: each layer's step gets the length of its raw gradient and keeps its own
direction only. `"none"`: the step is left as it is.

Sources: Ba, Grosse & Martens, "Distributed Second-Order Optimization using
Kronecker-Factored Approximations", ICLR 2017, in the form used by kfac-pytorch;
Agarwal et al., "Learning Rate Grafting: Transferability of Optimizer Tuning", 2021.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from skfac.curvature.tensors import in_dtype

Trust = Literal["kl", "graft", "none"]


def inner(left: Float[Tensor, "..."], right: Float[Tensor, "..."]) -> Float[Tensor, ""]:
    """Multiply two directions in one pass over them.

    Returns:
        `Σ left · right`, a scalar; in float32 at least, as 256² is infinite in float16.
    """
    wide = torch.promote_types(left.dtype, torch.float32)
    first, second = (in_dtype(one.reshape(-1), wide) for one in (left, right))
    return torch.dot(first, second)


def kl_scale(model_decrease: Float[Tensor, ""], *, kl_clip: float) -> Float[Tensor, ""]:
    """Factor ν that shortens a step to the trust region, never lengthens it.

    Args:
        model_decrease: `Σ_layers lr² <P, ∇W>`, a scalar; `P` the step's direction,
            `∇W` the raw gradient, `lr` the current learning rate.
        kl_clip: `κ > 0`, the largest KL divergence allowed.

    Returns:
        `ν = min(1, √(κ / |model_decrease|))`, a scalar on the same device; NaN if
        `model_decrease` is NaN.
    """
    return (kl_clip / model_decrease.abs()).sqrt().clamp(max=1.0)


def graft_scale(
    gradient_square: Float[Tensor, "*layers"],
    direction_square: Float[Tensor, "*layers"],
) -> Float[Tensor, "*layers"]:
    """Factors that give directions of layers the length of their raw gradients.

    Args:
        gradient_square: `‖∇W‖²`, a scalar or one for each layer.
        direction_square: `‖P‖²`, likewise.

    Returns:
        `‖∇W‖ / ‖P‖` of each, on the same device; 1 where `P` is zero.
    """
    ratio = (gradient_square / direction_square).sqrt()
    return torch.where(direction_square == 0, torch.ones_like(ratio), ratio)
