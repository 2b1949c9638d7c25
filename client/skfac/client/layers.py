"""Which layers of a model are preconditioned, and their gradients as matrices."""

import fnmatch
import warnings
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from skfac.curvature.geometry import LayerGeometry, geometry_of
from skfac.wire.errors import ConfigurationError
from skfac.wire.session import LayerSpec

_NAMES_IN_WARNING = 3  # of each type of module; a deep model has hundreds


class PassThroughWarning(UserWarning):
    """Some trained layers are not preconditioned; the message names them."""


@dataclass(frozen=True, eq=False)
class TrackedLayer:
    """A layer whose gradient is preconditioned.

    Attributes:
        name: Qualified name of its first module.
        modules: The module, or all modules that share its weight and bias.
        weight: The parameter.
        bias: The other parameter, or None if the layer trains none.
        geometry: How its inputs and derivatives become rows.
        group: The optimizer's parameter group of its weight.
    """

    name: str
    modules: tuple[nn.Module, ...]
    weight: nn.Parameter
    bias: nn.Parameter | None
    geometry: LayerGeometry
    group: dict[str, Any]

    @property
    def spec(self) -> LayerSpec:
        """What is declared to the server."""
        geometry = self.geometry
        return LayerSpec(
            self.name,
            geometry.kind,
            geometry.d_in,
            geometry.d_out,
            geometry.bias,
            geometry.groups,
            geometry.diagonal,
        )

    @property
    def learning_rate(self) -> float | Tensor:
        """The current learning rate of the weight."""
        rate: float | Tensor = self.group["lr"]
        return rate

    def runs_in(self, module: nn.Module) -> bool:
        """Check that a module computes with this layer's parameters.

        Returns:
            False for a copy of the model, and where `torch.func` has put others.
        """
        return getattr(module, "weight", None) is self.weight

    def gradient(self) -> Tensor | None:
        """Read the gradient with the bias as last column.

        Returns:
            A matrix `[*groups, d_out, d_in]`, or None if there is no gradient now.
        """
        weight = self.weight.grad
        bias = None if self.bias is None else self.bias.grad
        if weight is None or (self.bias is not None and bias is None):
            return None
        return self.geometry.to_matrix(weight, bias)

    @property
    def gradients(self) -> list[Tensor]:
        """The gradients that there are now, of weight and bias."""
        found = (self.weight.grad, None if self.bias is None else self.bias.grad)
        return [gradient for gradient in found if gradient is not None]

    def set_gradient(self, matrix: Tensor, factor: Tensor) -> None:
        """Write a gradient of shape `[*groups, d_out, d_in]` back, times a scalar."""
        parts = self.geometry.from_matrix(matrix)
        for parameter, part in zip((self.weight, self.bias), parts, strict=True):
            if parameter is not None:
                assert part is not None
                assert parameter.grad is not None
                torch.mul(part, factor, out=parameter.grad)


def track_layers(
    model: nn.Module, optimizer: torch.optim.Optimizer, skip: tuple[str, ...]
) -> list[TrackedLayer]:
    """Choose the layers to precondition.

    Modules that share their weight and bias and are of the same shape are one layer.
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
    tracked, passed = [], []
    for modules in _by_weight(model, groups):
        names = [name for name, _ in modules]
        if any(fnmatch.filter(names, pattern) for pattern in skip):
            continue
        layer = _track(modules, groups)
        if layer is None:
            passed += modules
        else:
            tracked.append(layer)
    if passed:
        warnings.warn(_passed_text(passed), PassThroughWarning, stacklevel=3)
    if not tracked:
        raise ConfigurationError(
            "The model has no layer to precondition: none is linear, a convolution or "
            "an embedding of torch that the optimizer trains and skip leaves in."
        )
    return tracked


def _by_weight(
    model: nn.Module, groups: dict[int, dict[str, Any]]
) -> Iterable[list[tuple[str, nn.Module]]]:
    # Modules that train and their names, those that share their weight together.
    sharing: dict[int, list[tuple[str, nn.Module]]] = defaultdict(list)
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if id(p) in groups]
        trained = [p for p in own if p.requires_grad]
        if not trained:
            continue
        weight = getattr(module, "weight", None)
        key = id(weight) if any(p is weight for p in trained) else id(module)
        # A model that is a layer itself has no other name.
        sharing[key].append((name or "model", module))
    return sharing.values()


def _track(
    named: list[tuple[str, nn.Module]], groups: dict[int, dict[str, Any]]
) -> TrackedLayer | None:
    name, first = named[0]
    modules = [module for _, module in named]
    geometry = geometry_of(first)
    if geometry is None or any(geometry_of(m) != geometry for m in modules[1:]):
        return None
    weight, bias = first.weight, first.bias if geometry.bias else None
    assert isinstance(weight, nn.Parameter)
    assert bias is None or isinstance(bias, nn.Parameter)
    if geometry.bias and any(module.bias is not bias for module in modules):
        return None  # one weight, several biases: not one matrix
    group = groups.get(id(weight))
    if group is None or not weight.requires_grad:
        return None
    if bias is not None and id(bias) not in groups:
        return None
    return TrackedLayer(name, tuple(modules), weight, bias, geometry, group)


def _passed_text(passed: Iterable[tuple[str, nn.Module]]) -> str:
    by_type: dict[str, list[str]] = defaultdict(list)
    for name, module in passed:
        by_type[type(module).__name__].append(name)
    parts = []
    for kind, names in by_type.items():
        shown = ", ".join(names[:_NAMES_IN_WARNING])
        more = len(names) - _NAMES_IN_WARNING
        parts.append(f"{kind}: {shown}" + (f" and {more} more" if more > 0 else ""))
    return (
        "These layers train and are not preconditioned; their gradients pass through "
        f"unchanged ({'; '.join(parts)}). Name them in skip=(...) to silence this."
    )
