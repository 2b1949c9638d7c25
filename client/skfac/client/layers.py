"""Which layers of a model are preconditioned, and their gradients as matrices."""

import fnmatch
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from skfac.curvature.geometry import LayerGeometry, geometry_of
from skfac.wire.errors import ConfigurationError
from skfac.wire.session import LayerSpec


class PassThroughWarning(UserWarning):
    """Some trained layers are not preconditioned; the message names them."""


@dataclass(frozen=True, eq=False)
class TrackedLayer:
    """A layer whose gradient is preconditioned.

    Attributes:
        name: Qualified module name.
        module: The layer.
        geometry: How its inputs and derivatives become rows.
        group: The optimizer's parameter group of its weight.
    """

    name: str
    module: nn.Linear | nn.Conv2d
    geometry: LayerGeometry
    group: dict[str, Any]

    @property
    def spec(self) -> LayerSpec:
        """What is declared to the server."""
        geometry = self.geometry
        return LayerSpec(
            self.name, geometry.kind, geometry.d_in, geometry.d_out, geometry.bias
        )

    @property
    def learning_rate(self) -> float:
        """The current learning rate of the weight."""
        return float(self.group["lr"])

    def gradient(self) -> Tensor | None:
        """Read the gradient with the bias as last column.

        Returns:
            A matrix `[d_out, d_in]`, or None if the layer has no gradient now.
        """
        if self.module.weight.grad is None:
            return None
        matrix = self.module.weight.grad.reshape(self.geometry.d_out, -1)
        if not self.geometry.bias:
            return matrix
        assert self.module.bias is not None
        bias = self.module.bias.grad
        if bias is None:
            return None
        return torch.cat([matrix, bias.unsqueeze(1)], dim=1)

    def set_gradient(self, matrix: Tensor) -> None:
        """Write a gradient of shape `[d_out, d_in]` back in place."""
        weight = self.module.weight.grad
        assert weight is not None
        if self.geometry.bias:
            assert self.module.bias is not None
            assert self.module.bias.grad is not None
            self.module.bias.grad.copy_(matrix[:, -1])
            matrix = matrix[:, :-1]
        weight.copy_(matrix.reshape(weight.shape))


def track_layers(
    model: nn.Module, optimizer: torch.optim.Optimizer, skip: tuple[str, ...]
) -> list[TrackedLayer]:
    """Choose the layers to precondition.

    Layers that train and cannot be preconditioned pass through untouched; one warning
    names them, but for those that `skip` names.

    Args:
        model: The model; frozen layers and layers that `optimizer` lacks are left out.
        optimizer: Trains the model.
        skip: Patterns of names to leave alone.

    Returns:
        The layers in the order of `model.named_modules()`.

    Raises:
        ConfigurationError: If no layer is left.
    """
    groups = {
        id(parameter): group
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    owners = Counter(
        id(parameter)
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
    )
    tracked, passed = [], []
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if id(p) in groups]
        if not any(p.requires_grad for p in own):
            continue
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in skip):
            continue
        layer = _track(name, module, groups)
        if layer is not None and owners[id(layer.module.weight)] == 1:
            tracked.append(layer)
        else:
            passed.append(f"{name or 'the model itself'} ({type(module).__name__})")
    if passed:
        text = (
            "These layers train and are not preconditioned; their gradients pass "
            f"through unchanged: {', '.join(passed)}. Name them in skip=(...) to "
            "silence this."
        )
        warnings.warn(text, PassThroughWarning, stacklevel=3)
    if not tracked:
        raise ConfigurationError(
            "The model has no layer to precondition: none is an nn.Linear or an "
            "ungrouped nn.Conv2d that the optimizer trains and skip leaves in."
        )
    return tracked


def _track(
    name: str, module: nn.Module, groups: dict[int, dict[str, Any]]
) -> TrackedLayer | None:
    geometry = geometry_of(module)
    if geometry is None:
        return None
    assert isinstance(module, (nn.Linear, nn.Conv2d))
    group = groups.get(id(module.weight))
    if group is None or not module.weight.requires_grad:
        return None
    if geometry.bias and id(module.bias) not in groups:
        return None
    # A model that is a layer itself has no other name.
    return TrackedLayer(name or "model", module, geometry, group)
