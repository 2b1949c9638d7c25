"""Exact curvature of one layer, by autograd.

A layer's weight matrix is `[W | b]` flattened row by row, so its K-FAC block is
`G ⊗ A`; a layer with groups has several matrices, one after the other.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from tests.support.layers import joined

Loss = nn.MSELoss | nn.CrossEntropyLoss


def per_sample_losses(loss: Loss, predictions: Tensor, targets: Tensor) -> Tensor:
    """The loss of every sample on its own: what a batch loss averages or adds."""
    samples = _samples(predictions, targets)
    return torch.stack([loss(prediction, target) for prediction, target in samples])


def divisor(loss: Loss, batch: int) -> float:
    """What the batch loss divides the sum of `per_sample_losses` by."""
    return float(batch) if loss.reduction == "mean" else 1.0


def hessian_roots(loss: Loss, predictions: Tensor, targets: Tensor) -> Tensor:
    """`R_n` with `R_n R_nᵀ` the Hessian of loss n: `[batch, outputs, roots]`.

    Outputs of several dimensions are flattened.
    """
    roots = []
    for prediction, target in _samples(predictions, targets):
        hessian = _hessian(loss, prediction, target)
        values, vectors = torch.linalg.eigh(hessian)
        roots.append(vectors * values.clamp(min=0).sqrt())
    return torch.stack(roots)


def ggn_block(
    model: nn.Module, layer: str, inputs: Tensor, targets: Tensor, loss: Loss
) -> Tensor:
    """`Jᵀ H J` of the batch loss for one layer's `[W | b]`."""
    predictions = model(inputs).detach()
    hessian = _hessian(loss, predictions, targets)
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


def diagonal_blocks(matrix: Tensor, groups: int) -> Tensor:
    """The blocks on the diagonal of a square matrix: `[groups, size, size]`."""
    size = len(matrix) // groups
    blocks = matrix.reshape(groups, size, groups, size)
    return torch.stack([blocks[group, :, group] for group in range(groups)])


def _samples(predictions: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(predictions[:, None].unbind(), targets[:, None].unbind(), strict=True)


def _hessian(loss: Loss, predictions: Tensor, targets: Tensor) -> Tensor:
    # Not torch.func.hessian: its forward mode warns that torch.jit is deprecated.
    hessian: Tensor = torch.func.jacrev(torch.func.jacrev(loss))(predictions, targets)
    return hessian.reshape(predictions.numel(), predictions.numel())


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
    columns = {name.removeprefix(f"{layer}."): rows for name, rows in jacobian.items()}
    outputs = (
        dict(zip(columns, values, strict=True))
        for values in zip(*columns.values(), strict=True)
    )
    return torch.stack([joined(module, output).flatten() for output in outputs])
