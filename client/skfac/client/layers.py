"""Which layers of a model are preconditioned, and their gradients as matrices."""

import fnmatch
import warnings
from collections import defaultdict
from collections.abc import Iterable, Set
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from skfac.client.rates import LearningRates
from skfac.client.shards import FullySharded, Shard, is_sharded, local, shard_of
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
        rates: The learning rates of what trains it.
        shard: Which part of the gradient this rank has; None if all of it.
    """

    name: str
    modules: tuple[nn.Module, ...]
    weight: nn.Parameter
    bias: nn.Parameter | None
    geometry: LayerGeometry
    rates: LearningRates
    shard: Shard | None = None

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
        """The current learning rate; the larger one of weight and bias."""
        return self.rates.of(self.weight, self.bias)

    def runs_in(self, module: nn.Module) -> bool:
        """Check that a module computes with this layer's parameters.

        Returns:
            False for a copy of the model, and where `torch.func` has put others.
        """
        weight = getattr(module, "weight", None)
        if self.shard is None:
            return weight is self.weight
        # In a forward fully_shard has the whole weight there, another parameter.
        return isinstance(weight, nn.Parameter) and not is_sharded(weight)

    def check_parameters(self) -> None:
        """Check that the module still has the parameters it was wrapped with.

        Raises:
            ConfigurationError: If it has others.
        """
        if all(map(self._has_ours, self.modules)):
            return
        raise ConfigurationError(
            f"Layer {self.name!r} has got other parameters since the Preconditioner "
            "was made. Call fully_shard, and make the optimizer, before it."
        )

    def _has_ours(self, module: nn.Module) -> bool:
        weight = getattr(module, "weight", None)
        if self.shard is not None:
            return weight is self.weight or not is_sharded(weight)
        bias = getattr(module, "bias", None) if self.geometry.bias else None
        return weight is self.weight and bias is self.bias

    def gradient(self) -> Tensor | None:
        """Read the gradient with the bias as last column.

        Returns:
            A matrix `[*groups, d_out, d_in]`, or None if there is no gradient now. Of a
            sharded layer it is the part that this rank has, which may have no rows.
        """
        weight = self.weight.grad
        bias = None if self.bias is None else self.bias.grad
        if self.bias is not None and bias is None and not self.bias.requires_grad:
            bias = torch.zeros_like(self.bias)  # frozen since
        if weight is None or (self.bias is not None and bias is None):
            return None
        return self._part.to_matrix(
            local(weight), None if bias is None else local(bias)
        )

    @property
    def _part(self) -> LayerGeometry:
        return self.geometry if self.shard is None else self.shard.geometry

    @property
    def gradients(self) -> list[Tensor]:
        """The gradients that there are now, of weight and bias."""
        found = (self.weight.grad, None if self.bias is None else self.bias.grad)
        return [gradient for gradient in found if gradient is not None]

    def set_gradient(self, matrix: Tensor, factor: Tensor) -> None:
        """Write what `gradient` is the shape of back, times a scalar."""
        if matrix.numel() == 0:
            return  # a rank that has nothing of a small layer
        parts = self._part.from_matrix(matrix)
        for parameter, part in zip((self.weight, self.bias), parts, strict=True):
            if parameter is not None and parameter.grad is not None:
                assert part is not None
                torch.mul(part, factor, out=local(parameter.grad))


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
        ConfigurationError: If no layer is left, or one is sharded in a way that it
            cannot be preconditioned in.
    """
    _check_trained(model, optimizer)
    sharded = FullySharded(model)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    rates = LearningRates(optimizer)
    tracked, passed = [], []
    refused = [
        f"{name!r}, because FullyShardedDataParallel (FSDP1) flattens its parameters: "
        "use fully_shard"
        for name in sharded.flat
        if not any(fnmatch.fnmatch(name, pattern) for pattern in skip)
    ]
    found = _by_weight(model, trained)
    shared = _shared_biases(found)
    for modules in found:
        names = [name for name, _ in modules]
        if any(fnmatch.filter(names, pattern) for pattern in skip):
            continue
        try:
            layer = _track(modules, rates, trained - shared, sharded)
        except ValueError as error:
            refused.append(f"{names[0]!r}, because {error}")
            continue
        if layer is None:
            passed += modules
        else:
            tracked.append(layer)
    if refused:
        raise ConfigurationError(_refused_text(refused))
    if passed:
        warnings.warn(_passed_text(passed), PassThroughWarning, stacklevel=3)
    if not tracked:
        if not any(id(parameter) in trained for parameter in model.parameters()):
            raise ConfigurationError(
                "The optimizer has none of this model's parameters."
            )
        raise ConfigurationError(
            "The model has no layer to precondition: none is linear, a convolution or "
            "an embedding of torch that the optimizer trains and skip leaves in."
        )
    return tracked


def _by_weight(
    model: nn.Module, trained: Set[int]
) -> list[list[tuple[str, nn.Module]]]:
    # Modules that train and their names, those that share their weight together.
    sharing: dict[int, list[tuple[str, nn.Module]]] = defaultdict(list)
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if id(p) in trained]
        own = [p for p in own if p.requires_grad]
        if not own:
            continue
        weight = _weight_of(module)
        key = id(weight) if any(p is weight for p in own) else id(module)
        # A model that is a layer itself has no other name.
        sharing[key].append((name or "model", module))
    return list(sharing.values())


def _weight_of(module: nn.Module) -> nn.Parameter | None:
    # To read what a parametrization computes may change its state.
    return module._parameters.get("weight")


def _shared_biases(found: Iterable[list[tuple[str, nn.Module]]]) -> set[int]:
    # Those of layers with different weights: in no single matrix.
    owners: dict[int, set[int]] = defaultdict(set)
    for modules in found:
        for _, module in modules:
            bias = module._parameters.get("bias")
            if bias is not None:
                owners[id(bias)].add(id(modules))
    return {bias for bias, own in owners.items() if len(own) > 1}


def _track(
    named: list[tuple[str, nn.Module]],
    rates: LearningRates,
    trained: Set[int],
    sharded: FullySharded,
) -> TrackedLayer | None:
    name, first = named[0]
    modules = [module for _, module in named]
    if _weight_of(first) is None:
        return None
    geometry = geometry_of(first)
    if geometry is None or any(geometry_of(m) != geometry for m in modules[1:]):
        return None
    weight, bias = first.weight, first.bias if geometry.bias else None
    assert isinstance(weight, nn.Parameter)
    assert bias is None or isinstance(bias, nn.Parameter)
    if geometry.bias and any(module.bias is not bias for module in modules):
        return None  # one weight, several biases: not one matrix
    if id(weight) not in trained or not weight.requires_grad:
        return None
    if bias is not None and id(bias) not in trained:
        return None
    shard = shard_of(weight, bias, geometry, fully_sharded=sharded.has(name))
    return TrackedLayer(name, tuple(modules), weight, bias, geometry, rates, shard)


def _check_trained(model: object, optimizer: object) -> None:
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"model must be a module, got {type(model).__name__}.")
    if not hasattr(optimizer, "param_groups"):
        raise ConfigurationError(
            f"optimizer must be one of torch's, got {type(optimizer).__name__}."
        )
    for place, group in enumerate(optimizer.param_groups):
        if group.get("lr") is None:
            raise ConfigurationError(
                f"Parameter group {place} of {type(optimizer).__name__} has no "
                "learning rate, which the trust region needs: give the optimizer an lr."
            )


def _refused_text(refused: list[str]) -> str:
    shown = "; ".join(refused[:_NAMES_IN_WARNING])
    more = len(refused) - _NAMES_IN_WARNING
    return (
        f"These layers cannot be preconditioned: {shown}"
        + (f"; and {more} more" if more > 0 else "")
        + ". Shard them otherwise, or leave them alone by naming them in skip=(...)."
    )


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
