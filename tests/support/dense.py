"""Slow, obvious references for what `skfac.curvature` computes.

Curvature comes from autograd, inverses from `torch.linalg`, patches from `F.unfold`.
A layer's weight matrix is `[W | b]` flattened row by row, so its K-FAC block is
`G ⊗ A`.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from skfac.curvature.geometry import LayerGeometry, geometry_of

Loss = nn.MSELoss | nn.CrossEntropyLoss


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal float64 numbers that depend on nothing but `seed`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of `expected`."""
    assert actual.shape == expected.shape
    difference = (actual - expected).detach()
    return float(difference.norm() / expected.detach().norm())


def factor(rows: Tensor) -> Tensor:
    """`Xᵀ X / n`."""
    return rows.T @ rows / rows.shape[0]


def dense_inverse(rows: Tensor, damping: float) -> Tensor:
    """`(Xᵀ X / n + λ I)⁻¹` by the textbook O(d³) formula."""
    identity = torch.eye(rows.shape[1], dtype=rows.dtype)
    inverse: Tensor = torch.linalg.inv(factor(rows) + damping * identity)
    return inverse


def dense_split(
    activations: Tensor, derivatives: Tensor, damping: float
) -> tuple[float, float]:
    """`λ_A = π √λ` and `λ_G = √λ / π`, with π from the traces of the factors."""
    mean_a, mean_g = (
        float(factor(rows).trace()) / rows.shape[1]
        for rows in (activations, derivatives)
    )
    pi = (mean_a / mean_g) ** 0.5
    return pi * damping**0.5, damping**0.5 / pi


def geometry_for(module: nn.Module) -> LayerGeometry:
    """The library's geometry of a module that it must support."""
    geometry = geometry_of(module)
    assert geometry is not None
    return geometry


def joined(weight: Tensor, bias: Tensor | None) -> Tensor:
    """`[W | b]` of shape `[d_out, d_in]`, from parameters or their gradients."""
    columns = weight.flatten(1)
    return columns if bias is None else torch.cat([columns, bias[:, None]], 1)


def patches(module: nn.Conv2d, images: Tensor) -> Tensor:
    """The columns that `[W | b]` multiplies: `[batch, positions, d_in]`.

    Padding is torch's own resolution of it, not the library's.
    """
    padded = nn.functional.pad(
        images,
        module._reversed_padding_repeated_twice,
        mode="constant" if module.padding_mode == "zeros" else module.padding_mode,
    )
    columns = nn.functional.unfold(
        padded,
        kernel_size=module.kernel_size,
        dilation=module.dilation,
        stride=module.stride,
    ).transpose(1, 2)
    if module.bias is None:
        return columns
    return torch.cat([columns, columns.new_ones(*columns.shape[:2], 1)], 2)


def per_sample_losses(loss: Loss, predictions: Tensor, targets: Tensor) -> Tensor:
    """The loss of every sample on its own: what a batch loss averages or adds."""
    samples = _samples(predictions, targets)
    return torch.stack([loss(prediction, target) for prediction, target in samples])


def divisor(loss: Loss, batch: int) -> float:
    """What the batch loss divides the sum of `per_sample_losses` by."""
    return float(batch) if loss.reduction == "mean" else 1.0


def hessian_roots(loss: Loss, predictions: Tensor, targets: Tensor) -> Tensor:
    """`R_n` with `R_n R_nᵀ` the Hessian of loss n: `[batch, outputs, roots]`."""
    roots = []
    for prediction, target in _samples(predictions, targets):
        hessian = _hessian(loss, prediction, target).squeeze((0, 2))
        values, vectors = torch.linalg.eigh(hessian)
        roots.append(vectors * values.clamp(min=0).sqrt())
    return torch.stack(roots)


def ggn_block(
    model: nn.Module, layer: str, inputs: Tensor, targets: Tensor, loss: Loss
) -> Tensor:
    """`Jᵀ H J` of the batch loss for one layer's `[W | b]`."""
    predictions = model(inputs).detach()
    hessian = _hessian(loss, predictions, targets)
    hessian = hessian.reshape(predictions.numel(), predictions.numel())
    jacobian = _weight_jacobian(model, layer, inputs, torch.flatten)
    return jacobian.T @ hessian @ jacobian


def empirical_fisher_block(
    model: nn.Module, layer: str, inputs: Tensor, targets: Tensor, loss: Loss
) -> Tensor:
    """`Σ_n ∇_n ∇_nᵀ` over what the loss divides by, for one layer's `[W | b]`."""
    gradients = _weight_jacobian(
        model,
        layer,
        inputs,
        lambda predictions: per_sample_losses(loss, predictions, targets),
    )
    return gradients.T @ gradients / divisor(loss, len(inputs))


def _samples(predictions: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(predictions[:, None].unbind(), targets[:, None].unbind(), strict=True)


def _hessian(loss: Loss, predictions: Tensor, targets: Tensor) -> Tensor:
    # Not torch.func.hessian: its forward mode warns that torch.jit is deprecated.
    hessian: Tensor = torch.func.jacrev(torch.func.jacrev(loss))(predictions, targets)
    return hessian


def _weight_jacobian(
    model: nn.Module, layer: str, inputs: Tensor, output: Callable[[Tensor], Tensor]
) -> Tensor:
    """Jacobian of `output(model(inputs))` for `[W | b]`: `[outputs, d_out · d_in]`."""
    module = model.get_submodule(layer)
    parameters = dict(module.named_parameters(prefix=layer))

    def evaluate(parameters: dict[str, Tensor]) -> Tensor:
        predictions = torch.func.functional_call(model, parameters, (inputs,))
        return output(predictions)

    jacobian = torch.func.jacrev(evaluate)(parameters)
    columns: Tensor = jacobian[f"{layer}.weight"].flatten(2)
    if f"{layer}.bias" in jacobian:
        columns = torch.cat([columns, jacobian[f"{layer}.bias"][..., None]], 2)
    return columns.flatten(1)
