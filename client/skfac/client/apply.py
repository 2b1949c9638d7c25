"""Turns the gradients of a model into preconditioned ones, inside a trust region."""

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from skfac.client.directions import (
    Direction,
    Factor,
    InGradientSpace,
    InRowSpace,
    InStack,
    write,
)
from skfac.client.hooks import without_autocast
from skfac.client.layers import TrackedLayer
from skfac.client.phases import phase
from skfac.client.ready import ReadyVersions
from skfac.client.row_space import RowSpace
from skfac.client.shards import Part, precondition_parts, sum_sharded
from skfac.client.stacked import Stacks
from skfac.curvature.layer import LayerPreconditioner
from skfac.curvature.stacks import numbers_on
from skfac.curvature.tensors import in_dtype, on_device
from skfac.curvature.trust import Trust, graft_scale, kl_scale
from skfac.wire.outcome import Version

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Prediction:
    """What the latest step does to the loss if the curvature is right: scalars.

    Attributes:
        slope: `Σ_layers lr <P, ∇W>` of the directions before the trust region, or as
            `trust="graft"` has scaled them.
        square: `Σ_layers lr² <P, ∇W>`, which bounds `lr² <P, F P>`; likewise.
        scale: ν of `trust="kl"`, else 1.
    """

    slope: Tensor
    square: Tensor
    scale: Tensor

    @property
    def decrease(self) -> float:
        """The decrease of the quadratic model along a plain gradient step."""
        nu = self.scale
        return float(nu * self.slope - nu.square() * self.square / 2)


class Apply:
    """Preconditions what is not preconditioned yet, then keeps all within the trust.

    Both the versions and the gradients are taken to the wider dtype of the two; the
    result has the gradient's. A layer whose gradient is not finite stays so, as a
    whole; it takes no part in the trust region of the others.

    Attributes:
        prediction: Of the latest step; None before the first.
        taking_part: The indices of the layers that had a gradient in it.
        not_finite: Layer-steps whose gradient was not finite.
    """

    def __init__(
        self, layers: Sequence[TrackedLayer], ready: ReadyVersions, rows: RowSpace
    ) -> None:
        self._layers = layers
        self._ready = ready
        self._rows = rows
        self._not_finite: Tensor | None = None
        self._rates: tuple[list[float | Tensor], Tensor] | None = None
        self._stacks = Stacks(layers, ready)
        self._said = False
        self.prediction: Prediction | None = None
        self.taking_part: list[int] = []

    @property
    def not_finite(self) -> int:
        """Layer-steps whose gradient was not finite."""
        return 0 if self._not_finite is None else int(self._not_finite)

    @torch.no_grad()
    def __call__(
        self,
        versions: Sequence[Version | None],
        *,
        trust: Trust,
        kl_clip: float,
        loss_scale: float | Tensor = 1.0,
    ) -> None:
        """Replace the gradient of every layer that has one.

        Args:
            versions: The version of each layer; None keeps its raw gradient, which is
                bounded by the same trust region.
            trust: How far a step may go.
            kl_clip: κ of `trust="kl"`.
            loss_scale: What the loss was multiplied by in the backward.
        """
        with ExitStack() as stack:
            for kind in {layer.weight.device.type for layer in self._layers}:
                stack.enter_context(without_autocast(kind))
            self._run(versions, trust, kl_clip, loss_scale)

    def _run(
        self,
        versions: Sequence[Version | None],
        trust: Trust,
        kl_clip: float,
        loss_scale: float | Tensor,
    ) -> None:
        with phase("apply"):
            directions = self._directions(versions, loss_scale)
        if not directions:
            self._say_nothing_there()
            return
        with phase("trust"):
            clip = kl_clip if trust == "kl" else None
            grafts = _grafts(directions) if trust == "graft" else None
            self.prediction = self._predict(directions, clip, grafts)
            if grafts is None:
                factors = [Factor(self.prediction.scale)] * len(directions)
            else:
                factors = _factors_of(directions, grafts)
            write(zip(directions, factors, strict=True))

    def _say_nothing_there(self) -> None:
        if not self._said and all(layer.weight.grad is None for layer in self._layers):
            self._said = True
            logger.warning(
                "step() found no gradients: call it after backward(), before "
                "optimizer.step() and zero_grad()."
            )

    def _directions(
        self, versions: Sequence[Version | None], loss_scale: float | Tensor
    ) -> list[Direction]:
        found: list[Direction] = []
        parts: dict[int, Part] = {}
        stackable: dict[int, LayerPreconditioner] = {}
        self.taking_part = []
        for index in range(len(self._layers)):
            one = self._begin(index, versions, loss_scale)
            if one is not None:
                self.taking_part.append(index)
            if isinstance(one, Part):
                parts[index] = one
            elif isinstance(one, LayerPreconditioner):
                stackable[index] = one
            elif one is not None:
                found.append(one)
        directions = precondition_parts(list(parts.values()))
        for (index, part), direction in zip(parts.items(), directions, strict=True):
            found.append(InGradientSpace(self._layers[index], part.gradient, direction))
        return [*found, *self._stacks.directions(stackable)]

    def _begin(
        self, index: int, versions: Sequence[Version | None], loss_scale: float | Tensor
    ) -> Direction | Part | LayerPreconditioner | None:
        # A part waits for the other parts, a preconditioner for layers of its shape.
        layer = self._layers[index]
        rows, weight = self._rows.take(index), layer.weight.grad
        if weight is None:
            return None
        if rows is not None:
            return InRowSpace(layer, rows, loss_scale)
        ready = self._ready.get(index, versions, weight.device, weight.dtype)
        if ready is not None and self._stacks.may_have(layer):
            return ready
        gradient = layer.gradient()
        if gradient is None:
            return None
        if ready is None:
            return InGradientSpace(layer, gradient, gradient)
        gradient = in_dtype(gradient, ready.activations.tensor.dtype)
        if layer.shard is None:
            return InGradientSpace(layer, gradient, ready.apply(gradient))
        return Part(layer.shard, gradient, ready)

    def _predict(
        self,
        directions: Sequence[Direction],
        kl_clip: float | None,
        grafts: Tensor | None,
    ) -> Prediction:
        products = _over_ranks([one.inner() for one in directions], directions)
        layers = _layers_of(directions)
        lr = self._learning_rates(layers, products.device)
        finite = products.isfinite()
        count = (~finite).sum()
        self._not_finite = (
            count
            if self._not_finite is None
            else on_device(self._not_finite, count.device) + count
        )
        if grafts is not None:  # the step that is taken counts
            lr = lr * grafts.where(finite, 0.0)
        products = products.where(finite, 0.0)
        square = (products * lr.square()).sum()
        scale = torch.ones_like(square)
        if kl_clip is not None:
            scale = kl_scale(square, kl_clip=kl_clip)
        return Prediction((products * lr).sum(), square, scale)

    def _learning_rates(
        self, layers: Sequence[TrackedLayer], device: torch.device
    ) -> Tensor:
        rates = [_plain(layer.learning_rate) for layer in layers]
        if any(isinstance(rate, Tensor) for rate in rates):
            return torch.stack(
                [torch.as_tensor(r, dtype=torch.float64, device=device) for r in rates]
            )
        known = self._rates
        if known is None or known[0] != rates or known[1].device != device:
            self._rates = known = rates, numbers_on(device, [float(r) for r in rates])
        return known[1]


def _plain(rate: float | Tensor) -> float | Tensor:
    # A copy of a tensor to a GPU would wait for it, unlike one of a number.
    on_host = isinstance(rate, Tensor) and rate.device.type == "cpu"
    return float(rate) if on_host else rate


def _grafts(directions: Sequence[Direction]) -> Tensor:
    sides = zip(*(one.squares() for one in directions), strict=True)
    gradients, squares = (_over_ranks(side, directions) for side in sides)
    return graft_scale(gradients, squares)


def _factors_of(directions: Sequence[Direction], grafts: Tensor) -> list[Factor]:
    split = torch.split(grafts, [len(one.layers) for one in directions])
    return [
        Factor(own if isinstance(one, InStack) else own.squeeze(0))
        for one, own in zip(directions, split, strict=True)
    ]


def _over_ranks(values: Sequence[Tensor], directions: Sequence[Direction]) -> Tensor:
    # A number of each layer, of the whole layer.
    layers = _layers_of(directions)
    device = layers[0].weight.device
    flat = [on_device(value, device).reshape(-1) for value in values]
    return sum_sharded(torch.cat(flat).double(), [layer.shard for layer in layers])


def _layers_of(directions: Sequence[Direction]) -> list[TrackedLayer]:
    return [layer for one in directions for layer in one.layers]
