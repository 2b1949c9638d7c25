"""Layers of equal shapes, whose gradients a GPU preconditions as one.

What costs there is to start a product, not the product, unless a layer is large. So the
versions of such layers are kept in stacks, made once for each version, and a step makes
stacks of their gradients.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from skfac.client.directions import InStack, gradients_of
from skfac.client.layers import TrackedLayer
from skfac.client.ready import ReadyVersions
from skfac.curvature import stacks
from skfac.curvature.layer import LayerPreconditioner, stack_preconditioners

MOST_STACKED = 1 << 22
"""Numbers of a gradient; one that has more keeps a GPU busy by itself."""


@dataclass(frozen=True, eq=False)
class StackedLayers:
    """Some layers and what preconditions them, as one.

    Attributes:
        layers: Of one geometry.
        versions: Theirs, without damping; see `stack_preconditioners`.
        factors: What the results lack, `[layers]`.
    """

    layers: tuple[TrackedLayer, ...]
    versions: LayerPreconditioner
    factors: Tensor

    def direction(self) -> InStack:
        """Precondition the gradients that there are now.

        Returns:
            Their directions.
        """
        gradients = gradients_of(self.layers)
        count = len(self.layers)
        weight = torch.stack(gradients[:count])
        bias = torch.stack(gradients[count:]) if gradients[count:] else None
        matrices = self.layers[0].geometry.to_matrix(weight, bias)
        matrices = matrices.to(self.versions.activations.tensor.dtype)
        flat = matrices.flatten(0, -3)  # with groups there are more of them
        directions = self.versions.apply(flat).view_as(matrices)
        return InStack(self.layers, matrices, directions, self.factors)


class Stacks:
    """Keeps the versions of layers of equal shapes in stacks.

    A version is held once: `ReadyVersions` gets a view of the stack for it.

    Args:
        layers: Of the model.
        ready: Holds their versions.
    """

    def __init__(self, layers: Sequence[TrackedLayer], ready: ReadyVersions) -> None:
        self._layers = layers
        self._ready = ready
        self._stacked: dict[int, LayerPreconditioner] = {}
        self._stacks: list[StackedLayers] = []
        self._others: dict[int, LayerPreconditioner] = {}

    def may_have(self, layer: TrackedLayer) -> bool:
        """Tell whether a layer with a gradient is one for a stack.

        Returns:
            Whether it is whole, small, and where stacks are faster.
        """
        gradient, bias = layer.weight.grad, layer.bias
        return (
            layer.shard is None
            and gradient is not None
            and (bias is None or bias.grad is not None)
            and gradient.numel() <= MOST_STACKED
            and stacks.faster_on(gradient.device)
        )

    def of(
        self, versions: dict[int, LayerPreconditioner]
    ) -> tuple[list[StackedLayers], dict[int, LayerPreconditioner]]:
        """Put layers in stacks.

        Args:
            versions: By the index of each layer that has a gradient.

        Returns:
            Stacks of two or more, and the others; the same as before if `versions` is.
        """
        if versions.keys() != self._stacked.keys() or any(
            one is not self._stacked[index] for index, one in versions.items()
        ):
            self._stacks, self._stacked = [], dict(versions)  # old memory first
            self._others = dict(versions)
            for indices in self._alike(versions):
                self._stacks.append(self._stack(indices))
        return self._stacks, self._others

    def _alike(self, versions: dict[int, LayerPreconditioner]) -> list[list[int]]:
        alike: dict[tuple[object, ...], list[int]] = {}
        for index, one in versions.items():
            layer = self._layers[index]
            forms = type(one.activations), type(one.derivatives)
            shapes = tuple(tensor.shape for tensor in one.tensors)
            kind = layer.weight.device, layer.weight.dtype, one.tensors[0].dtype
            key = layer.geometry, layer.weight.shape, *forms, *shapes, *kind
            alike.setdefault(key, []).append(index)
        return [indices for indices in alike.values() if len(indices) > 1]

    def _stack(self, indices: list[int]) -> StackedLayers:
        ones = [self._stacked[index] for index in indices]
        versions, factors, views = stack_preconditioners(ones)
        for index, view in zip(indices, views, strict=True):
            self._ready.hold(index, view)
            self._stacked[index] = view
            del self._others[index]
        layers = tuple(self._layers[index] for index in indices)
        like = versions.activations.tensor
        numbers = stacks.numbers_on(like.device, factors).to(like.dtype)
        return StackedLayers(layers, versions, numbers)
