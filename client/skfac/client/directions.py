"""Directions of a step: preconditioned gradients, before the trust region.

A direction is of one layer, or of several layers whose numbers come together. Each kind
tells what a trust region asks for, and is written back times a factor.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from skfac.client.layers import TrackedLayer
from skfac.client.rows import Rows
from skfac.curvature.stacks import for_each
from skfac.curvature.trust import inner


class Factor:
    """A scalar or one number a layer, cast once for all that are alike."""

    def __init__(self, value: Tensor) -> None:
        self._value = value
        self._casts: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def like(self, tensor: Tensor) -> Tensor:
        """Cast it.

        Returns:
            It, on the device and in the dtype of a tensor.
        """
        key = tensor.device, tensor.dtype
        if key not in self._casts:
            self._casts[key] = self._value.to(*key)
        return self._casts[key]

    def changes(self, tensor: Tensor) -> bool:
        """Tell whether multiplying by it may change a tensor; never wait for a GPU.

        Returns:
            False only if it is one; on a GPU always True.
        """
        return tensor.device.type != "cpu" or float(self.like(tensor)) != 1.0


@dataclass(frozen=True, eq=False)
class _OfOneLayer:
    layer: TrackedLayer

    @property
    def layers(self) -> Sequence[TrackedLayer]:
        """The one layer."""
        return (self.layer,)


@dataclass(frozen=True, eq=False)
class InRowSpace(_OfOneLayer):
    """A layer whose gradient its backward has preconditioned.

    Attributes:
        layer: It.
        rows: Of its backwards.
        loss_scale: What the loss was multiplied by in them.
    """

    rows: Rows
    loss_scale: float | Tensor

    def inner(self) -> Tensor:
        """Multiply direction and gradient.

        Returns:
            `<P, ∇W>`, a scalar.
        """
        # The rows are those of the scaled loss, the gradient is unscaled by now.
        return self.rows.inner() / self.loss_scale**2

    def squares(self) -> tuple[Tensor, Tensor]:
        """Square gradient and direction.

        Returns:
            `‖∇W‖²` and `‖P‖²`, times the square of the loss scale.
        """
        return self.rows.gradient_square(), self.rows.direction_square()


@dataclass(frozen=True, eq=False)
class InGradientSpace(_OfOneLayer):
    """The direction of a layer, beside its gradient.

    Attributes:
        layer: It.
        gradient: A matrix.
        direction: Shaped like it.
    """

    gradient: Tensor
    direction: Tensor

    def inner(self) -> Tensor:
        """Multiply direction and gradient.

        Returns:
            `<P, ∇W>`, a scalar.
        """
        return inner(self.direction, self.gradient)

    def squares(self) -> tuple[Tensor, Tensor]:
        """Square gradient and direction.

        Returns:
            `‖∇W‖²` and `‖P‖²`.
        """
        return (
            inner(self.gradient, self.gradient),
            inner(self.direction, self.direction),
        )


@dataclass(frozen=True, eq=False)
class InStack:
    """The directions of layers of equal shapes.

    Attributes:
        layers: They.
        gradients: Their matrices, `[layers, *groups, d_out, d_in]`.
        directions: Shaped like `gradients`, without `factors`.
        factors: What the direction of each layer lacks, `[layers]`.
        products: `<P, ∇W>` of each layer.
    """

    layers: Sequence[TrackedLayer]
    gradients: Tensor
    directions: Tensor
    factors: Tensor
    products: Tensor

    @classmethod
    def of(
        cls,
        layers: Sequence[TrackedLayer],
        gradients: Tensor,
        directions: Tensor,
        factors: Tensor,
    ) -> "InStack":
        """Multiply directions and gradients.

        Returns:
            What has the products, too.
        """
        products = _inners(directions, gradients) * factors
        return cls(layers, gradients, directions, factors, products)

    def inner(self) -> Tensor:
        """Give the product of directions and gradients.

        Returns:
            `<P, ∇W>` of each layer.
        """
        return self.products

    def squares(self) -> tuple[Tensor, Tensor]:
        """Square gradients and directions.

        Returns:
            `‖∇W‖²` and `‖P‖²` of each layer.
        """
        squares = _inners(self.directions, self.directions) * self.factors.square()
        return _inners(self.gradients, self.gradients), squares

    def scaled(self, factor: Tensor) -> list[Tensor]:
        """Multiply the directions by a scalar, or one number a layer.

        Returns:
            What is shaped like the gradients of all weights, then of all biases.
        """
        by = self.factors * factor
        parts = self.layers[0].geometry.from_matrix(self.directions)
        return [
            one
            for part in parts
            if part is not None
            for one in (part * for_each(by, part)).unbind()
        ]


Direction = InRowSpace | InGradientSpace | InStack
"""All of them."""


def write(directions: Iterable[tuple[Direction, Factor]]) -> None:
    """Replace gradients by directions.

    Args:
        directions: Each with the factor that its trust region takes it by.
    """
    in_place: dict[tuple[object, ...], tuple[Factor, list[Tensor]]] = {}
    copies: dict[torch.device, tuple[list[Tensor], list[Tensor]]]
    copies = defaultdict(lambda: ([], []))
    for one, factor in directions:
        if isinstance(one, InGradientSpace):
            one.layer.set_gradient(one.direction, factor.like(one.direction))
        elif isinstance(one, InStack):
            targets, sources = copies[one.directions.device]
            targets += gradients_of(one.layers)
            sources += one.scaled(factor.like(one.directions))
        else:
            for gradient in one.layer.gradients:
                key = factor, gradient.device, gradient.dtype
                in_place.setdefault(key, (factor, []))[1].append(gradient)
    for factor, gradients in in_place.values():
        if factor.changes(gradients[0]):  # a pass over all of them
            torch._foreach_mul_(gradients, factor.like(gradients[0]))
    for targets, sources in copies.values():
        torch._foreach_copy_(targets, sources)


def gradients_of(layers: Sequence[TrackedLayer]) -> list[Tensor]:
    """List the gradients of layers that have all or none a bias.

    Returns:
        Those of their weights, then of their biases.
    """
    parameters = [layer.weight for layer in layers]
    parameters += [layer.bias for layer in layers if layer.bias is not None]
    return [p.grad for p in parameters if p.grad is not None]


def _inners(left: Tensor, right: Tensor) -> Tensor:
    return (left * right).flatten(1).sum(1)
