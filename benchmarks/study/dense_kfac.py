"""Synchronous dense K-FAC in one process: what SKFAC is compared with.

Both factors of a layer are running means with bias correction, `d × d` and inverted
whole at each update, before the gradient of the same step is preconditioned: nothing is
late and nothing is of low rank. Nothing here uses `skfac`, so that it can be compared
with it.

Sources: Martens & Grosse, "Optimizing Neural Networks with Kronecker-factored
Approximate Curvature", ICML 2015 (running means, π); Eschenhagen et al.,
"Kronecker-Factored Approximate Curvature for Modern Neural Network Architectures",
NeurIPS 2023 (layers used at many positions: `reduce`); Ba, Grosse & Martens,
"Distributed Second-Order Optimization using Kronecker-Factored Approximations", ICLR
2017 (KL clip).
"""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot, unfold
from torch.optim import Optimizer


@dataclass(frozen=True, kw_only=True)
class DenseKfacSettings:
    """How the curvature is estimated and used.

    Attributes:
        damping: λ > 0, of the Kronecker product.
        kl_clip: κ > 0 of the trust region.
        damping_split: `"pi"` by the factors' traces, `"equal"` √λ for both.
        update_every: Steps between updates of the factors and their inverses.
        decay: Of the running means of the factors.
    """

    damping: float
    kl_clip: float
    damping_split: Literal["pi", "equal"] = "pi"
    update_every: int = 1
    decay: float = 0.95


@dataclass(eq=False)
class _Layer:
    module: nn.Module
    inputs: Tensor | None = None
    derivatives: Tensor | None = None
    factors: tuple[Tensor, Tensor] | None = None
    inverses: tuple[Tensor, Tensor] | None = None
    weight_of_mean: float = field(default=0.0)


class DenseKfac:
    """Preconditions the gradients of linear, convolutional and embedding layers.

    It runs before each step of the optimizer it is attached to.

    Args:
        model: Trained by `optimizer` on a mean over the batch.
        optimizer: Whose steps it precedes, and whose learning rate it reads.
        settings: How.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, settings: DenseKfacSettings
    ) -> None:
        self._settings = settings
        self._steps = 0
        self._layers = []
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
                layer = _Layer(module)
                module.register_forward_hook(_capturing(layer))
                self._layers.append(layer)
        optimizer.register_step_pre_hook(self._before_step)

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:  # noqa: ANN401
        if self._steps % self._settings.update_every == 0:
            for layer in self._layers:
                _update(layer, self._settings)
        self._steps += 1
        directions = []
        model_decrease = 0.0
        rate = optimizer.param_groups[0]["lr"]
        for layer in self._layers:
            assert layer.inverses is not None
            inverse_a, inverse_g = layer.inverses
            gradient = _gradient(layer.module)
            direction = inverse_g @ gradient @ inverse_a
            directions.append(direction)
            model_decrease += rate**2 * float((direction * gradient).sum())
        clipped = math.sqrt(self._settings.kl_clip / max(abs(model_decrease), 1e-30))
        for layer, direction in zip(self._layers, directions, strict=True):
            _set_gradient(layer.module, direction * min(1.0, clipped))


def _capturing(layer: _Layer) -> Any:  # noqa: ANN401  # torch names no type for hooks
    def keep_derivatives(derivatives: Tensor) -> None:
        layer.derivatives = derivatives.detach()

    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:
            layer.inputs = inputs[0].detach()
            output.register_hook(keep_derivatives)  # type: ignore[no-untyped-call]  # untyped

    return hook


def _update(layer: _Layer, settings: DenseKfacSettings) -> None:
    assert layer.inputs is not None
    assert layer.derivatives is not None
    newest = (
        _activation_factor(layer.module, layer.inputs),
        _derivative_factor(layer.module, layer.derivatives),
    )
    decay = settings.decay
    older = layer.factors or tuple(torch.zeros_like(factor) for factor in newest)
    factor_a, factor_g = (
        decay * old + (1 - decay) * new for old, new in zip(older, newest, strict=True)
    )
    layer.factors = factor_a, factor_g
    layer.weight_of_mean = decay * layer.weight_of_mean + 1 - decay
    mean_a, mean_g = factor_a / layer.weight_of_mean, factor_g / layer.weight_of_mean
    root, pi = math.sqrt(settings.damping), 1.0
    if settings.damping_split == "pi":
        eigenvalues = float(mean_a.diagonal().mean()), float(mean_g.diagonal().mean())
        pi = math.sqrt(eigenvalues[0] / eigenvalues[1]) if min(eigenvalues) > 0 else 1.0
    layer.inverses = _inverse(mean_a, root * pi), _inverse(mean_g, root / pi)


def _inverse(factor: Tensor, damping: float) -> Tensor:
    damped = factor.double() + damping * torch.eye(len(factor), dtype=torch.double)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return inverse.to(factor.dtype)


def _activation_factor(module: nn.Module, inputs: Tensor) -> Tensor:
    if isinstance(module, nn.Embedding):
        # The frequencies of the tokens, as if each example had one.
        tokens = one_hot(inputs.flatten(), module.num_embeddings)
        return tokens.to(module.weight.dtype).mean(0).diag()
    if isinstance(module, nn.Conv2d):
        assert not isinstance(module.padding, str)
        patches = unfold(
            inputs,
            module.kernel_size,
            dilation=module.dilation,
            padding=module.padding,
            stride=module.stride,
        )
        rows = patches.mean(2)
    else:
        rows = inputs.reshape(len(inputs), -1, inputs.shape[-1]).mean(1)
    if module.bias is not None:
        rows = torch.cat([rows, torch.ones_like(rows[:, :1])], 1)
    return rows.T @ rows / len(rows)


def _derivative_factor(module: nn.Module, derivatives: Tensor) -> Tensor:
    batch = len(derivatives)
    if isinstance(module, nn.Conv2d):
        rows = derivatives.sum((2, 3))
    else:
        rows = derivatives.reshape(batch, -1, derivatives.shape[-1]).sum(1)
    rows = rows * batch  # the loss is a mean
    return rows.T @ rows / batch


def _gradient(module: nn.Module) -> Tensor:
    assert isinstance(module.weight, Tensor)
    assert module.weight.grad is not None
    if isinstance(module, nn.Embedding):
        return module.weight.grad.T
    matrix = module.weight.grad.flatten(1)
    if isinstance(module.bias, Tensor):
        assert module.bias.grad is not None
        matrix = torch.cat([matrix, module.bias.grad[:, None]], 1)
    return matrix


def _set_gradient(module: nn.Module, matrix: Tensor) -> None:
    assert isinstance(module.weight, Tensor)
    if isinstance(module, nn.Embedding):
        module.weight.grad = matrix.T
        return
    if isinstance(module.bias, Tensor):
        module.bias.grad = matrix[:, -1].clone()
        matrix = matrix[:, :-1]
    module.weight.grad = matrix.reshape(module.weight.shape).contiguous()
