"""Layers of equal shapes, whose gradients a GPU preconditions as one.

What costs there is to start a product, not the product, unless a layer is large. So the
versions of such layers are kept in stacks that new versions are copied into, and a step
copies their gradients into stacks. Of a small model all that follows is replayed.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from skfac.client.directions import InStack, gradients_of
from skfac.client.layers import TrackedLayer
from skfac.client.ready import ReadyVersions
from skfac.client.replay import Replay
from skfac.curvature import stacks
from skfac.curvature.layer import LayerPreconditioner, StackedPreconditioner

MOST_STACKED = 1 << 22
"""Numbers of a gradient; one that has more keeps a GPU busy by itself."""

MOST_REPLAYED = 1 << 26
"""Numbers of all gradients in stacks; with more, kernels are long anyhow.

Replayed kernels keep their memory, about three times as much as these numbers take.
"""


class StackedLayers:
    """Some layers of one geometry and what preconditions them, as one.

    Args:
        layers: They.
        versions: Theirs, of equal forms and shapes.
    """

    def __init__(
        self,
        layers: Sequence[TrackedLayer],
        versions: Sequence[LayerPreconditioner],
    ) -> None:
        self.layers = layers
        self.versions = StackedPreconditioner(versions)
        self._inputs: list[Tensor] | None = None

    @property
    def numel(self) -> int:
        """Numbers of all gradients."""
        return sum(gradient.numel() for gradient in gradients_of(self.layers))

    def gather(self) -> tuple[list[Tensor], list[Tensor]]:
        """Make room for the gradients that there are now.

        Returns:
            What they are to be copied to, and they.
        """
        gradients, count = gradients_of(self.layers), len(self.layers)
        if self._inputs is None:
            firsts = gradients[::count]  # of a weight, and of a bias if there are any
            self._inputs = [one.new_empty(count, *one.shape) for one in firsts]
        return [one for stack in self._inputs for one in stack.unbind()], gradients

    def release(self) -> None:
        """Give up the room for gradients."""
        self._inputs = None

    def direction(self) -> InStack:
        """Precondition the gradients that were gathered.

        Returns:
            Their directions.
        """
        assert self._inputs is not None
        weight, *bias = self._inputs
        matrices = self.layers[0].geometry.to_matrix(weight, bias[0] if bias else None)
        matrices = matrices.to(self.versions.dtype)
        directions = self.versions.apply(matrices)
        return InStack.of(self.layers, matrices, directions, self.versions.factors)


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
        self._held: dict[int, LayerPreconditioner] = {}
        self._alike: list[tuple[tuple[object, ...], list[int]]] = []
        self._stacks: list[StackedLayers] = []
        self._replay: Replay[list[InStack]] | None = None

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

    def directions(self, versions: dict[int, LayerPreconditioner]) -> list[InStack]:
        """Precondition the gradients of layers.

        Args:
            versions: Of each layer that has a gradient, by its index.

        Returns:
            Their directions, which the next call may overwrite.
        """
        if versions.keys() != self._held.keys() or any(
            one is not self._held[index] for index, one in versions.items()
        ):
            self._take(versions)
        targets: list[Tensor] = []
        gradients: list[Tensor] = []
        for stack in self._stacks:
            for many, more in zip((targets, gradients), stack.gather(), strict=True):
                many += more
        if targets:
            torch._foreach_copy_(targets, gradients)
        if self._replay is not None:
            return self._replay()
        found = self._directions()
        for stack in self._stacks:
            stack.release()
        return found

    def _directions(self) -> list[InStack]:
        return [stack.direction() for stack in self._stacks]

    def _take(self, versions: dict[int, LayerPreconditioner]) -> None:
        alike = self._find_alike(versions)
        self._held = dict(versions)
        if alike == self._alike:
            for stack, (_, indices) in zip(self._stacks, alike, strict=True):
                stack.versions.replace([versions[index] for index in indices])
        else:
            self._stacks, self._replay = [], None  # old memory first
            for _, indices in alike:
                layers = [self._layers[index] for index in indices]
                ones = [versions[index] for index in indices]
                self._stacks.append(StackedLayers(layers, ones))
            self._alike = alike
            self._begin_to_replay()
        for stack, (_, indices) in zip(self._stacks, alike, strict=True):
            for index, view in zip(indices, stack.versions.views, strict=True):
                self._ready.hold(index, view)
                self._held[index] = view

    def _begin_to_replay(self) -> None:
        devices = {layer.weight.device for s in self._stacks for layer in s.layers}
        if len(devices) == 1 and sum(s.numel for s in self._stacks) <= MOST_REPLAYED:
            self._replay = Replay(self._directions, devices.pop())

    def _find_alike(
        self, versions: dict[int, LayerPreconditioner]
    ) -> list[tuple[tuple[object, ...], list[int]]]:
        alike: dict[tuple[object, ...], list[int]] = {}
        for index, one in versions.items():
            layer = self._layers[index]
            forms = type(one.activations), type(one.derivatives)
            shapes = tuple(tensor.shape for tensor in one.tensors)
            kind = layer.weight.device, layer.weight.dtype, one.tensors[0].dtype
            key = layer.geometry, layer.weight.shape, *forms, *shapes, *kind
            alike.setdefault(key, []).append(index)
        return list(alike.items())
