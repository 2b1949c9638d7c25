"""Turns the gradients of a model into preconditioned ones, inside a trust region."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from skfac.client.layers import TrackedLayer
from skfac.client.phases import phase
from skfac.client.ready import ReadyVersions
from skfac.client.row_space import Rows, RowSpace
from skfac.client.shards import Part, precondition_parts, sum_sharded
from skfac.curvature import stacks
from skfac.curvature.layer import LayerPreconditioner, apply_in_stacks
from skfac.curvature.trust import Trust, graft_scale, inner, kl_scale
from skfac.wire.outcome import Version

_MOST_STACKED = 1 << 20  # numbers of a gradient; more keep a GPU busy by themselves


@dataclass(frozen=True, eq=False)
class Prediction:
    """What the latest step does to the loss if the curvature is right: scalars.

    Attributes:
        slope: `Σ_layers lr <P, ∇W>` of the directions before the trust region.
        square: `Σ_layers lr² <P, ∇W>`, which bounds `lr² <P, F P>`.
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


@dataclass(frozen=True, eq=False)
class _InRowSpace:
    # A layer whose gradient its backward has preconditioned.
    layer: TrackedLayer
    rows: Rows
    loss_scale: float | Tensor

    def inner(self) -> Tensor:
        # The rows are those of the scaled loss, the gradient is unscaled by now.
        return self.rows.inner() / self.loss_scale**2

    def squares(self) -> tuple[Tensor, Tensor]:
        return self.rows.gradient_square(), self.rows.direction_square()


@dataclass(frozen=True, eq=False)
class _InGradientSpace:
    layer: TrackedLayer
    gradient: Tensor
    direction: Tensor

    def inner(self) -> Tensor:
        return inner(self.direction, self.gradient)

    def squares(self) -> tuple[Tensor, Tensor]:
        return (
            inner(self.gradient, self.gradient),
            inner(self.direction, self.direction),
        )


_Step = _InRowSpace | _InGradientSpace


@dataclass(frozen=True, eq=False)
class _Whole:
    # A gradient that is to be preconditioned together with those of its shape.
    gradient: Tensor
    ready: LayerPreconditioner


class _Factor:
    # A scalar, cast once for all gradients of a device and dtype.

    def __init__(self, value: Tensor) -> None:
        self._value = value
        self._casts: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def like(self, tensor: Tensor) -> Tensor:
        key = tensor.device, tensor.dtype
        if key not in self._casts:
            self._casts[key] = self._value.to(*key)
        return self._casts[key]


class Apply:
    """Preconditions what is not preconditioned yet, then keeps all within the trust.

    Both the versions and the gradients are taken to the wider dtype of the two; the
    result has the gradient's. A layer whose gradient is not finite keeps it, as without
    a preconditioner; it takes no part in the trust region of the others.

    Attributes:
        prediction: Of the latest step; None before the first.
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
        self.prediction: Prediction | None = None

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
        with phase("apply"):
            steps = self._prepare(versions, loss_scale)
        if not steps:
            return
        with phase("trust"):
            self.prediction = self._predict(steps, kl_clip if trust == "kl" else None)
            if trust == "graft":
                sides = zip(*(step.squares() for step in steps), strict=True)
                totals = zip(*(_over_ranks(s, steps) for s in sides), strict=True)
                for step, squares in zip(steps, totals, strict=True):
                    _write([step], _Factor(graft_scale(*squares)))
            else:
                _write(steps, _Factor(self.prediction.scale))

    def _prepare(
        self, versions: Sequence[Version | None], loss_scale: float | Tensor
    ) -> list[_Step]:
        found = [
            self._begin(index, versions, loss_scale)
            for index in range(len(self._layers))
        ]
        parts = [one for one in found if isinstance(one, Part)]
        small = [one for one in found if isinstance(one, _Whole)]
        of_parts = iter(precondition_parts(parts))
        of_small = iter(
            apply_in_stacks([o.ready for o in small], [o.gradient for o in small])
        )
        steps: list[_Step] = []
        for layer, one in zip(self._layers, found, strict=True):
            if isinstance(one, Part | _Whole):
                direction = next(of_parts if isinstance(one, Part) else of_small)
                steps.append(_InGradientSpace(layer, one.gradient, direction))
            elif one is not None:
                steps.append(one)
        return steps

    def _begin(
        self, index: int, versions: Sequence[Version | None], loss_scale: float | Tensor
    ) -> _Step | Part | _Whole | None:
        layer = self._layers[index]
        rows = self._rows.take(index)
        if layer.weight.grad is None:
            return None
        if rows is not None:
            return _InRowSpace(layer, rows, loss_scale)
        gradient = layer.gradient()
        if gradient is None:
            return None
        ready = self._ready.get(index, versions, gradient.device, gradient.dtype)
        if ready is None:
            return _InGradientSpace(layer, gradient, gradient)
        gradient = gradient.to(ready.activations.tensor.dtype)
        if layer.shard is not None:
            return Part(layer.shard, gradient, ready)
        if stacks.faster_on(gradient.device) and gradient.numel() <= _MOST_STACKED:
            return _Whole(gradient, ready)
        return _InGradientSpace(layer, gradient, ready.apply(gradient))

    def _predict(self, steps: Sequence[_Step], kl_clip: float | None) -> Prediction:
        device = steps[0].layer.weight.device
        products = _over_ranks([step.inner() for step in steps], steps)
        lr = self._learning_rates(steps, device)
        finite = products.isfinite()
        count = (~finite).sum()
        self._not_finite = (
            count if self._not_finite is None else self._not_finite.to(device) + count
        )
        products = products.where(finite, 0.0)
        square = (products * lr.square()).sum()
        scale = torch.ones_like(square)
        if kl_clip is not None:
            scale = kl_scale(square, kl_clip=kl_clip)
        return Prediction((products * lr).sum(), square, scale)

    def _learning_rates(self, steps: Sequence[_Step], device: torch.device) -> Tensor:
        # Copied to the device only when they change: each copy would stop a GPU.
        rates = [step.layer.learning_rate for step in steps]
        if any(isinstance(rate, Tensor) for rate in rates):
            return torch.stack(
                [torch.as_tensor(r, dtype=torch.float64, device=device) for r in rates]
            )
        known = self._rates
        if known is None or known[0] != rates or known[1].device != device:
            found = torch.tensor(rates, dtype=torch.float64, device=device)
            self._rates = known = rates, found
        return known[1]


def _over_ranks(values: Sequence[Tensor], steps: Sequence[_Step]) -> Tensor:
    # A number of each layer, of the whole layer.
    device = steps[0].layer.weight.device
    numbers = torch.stack([value.to(device) for value in values]).double()
    return sum_sharded(numbers, [step.layer.shard for step in steps])


def _write(steps: Sequence[_Step], factor: _Factor) -> None:
    in_place: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for step in steps:
        if isinstance(step, _InGradientSpace):
            direction = step.direction
            step.layer.set_gradient(direction, factor.like(direction))
            continue
        for gradient in step.layer.gradients:
            in_place[gradient.device, gradient.dtype].append(gradient)
    for gradients in in_place.values():
        torch._foreach_mul_(gradients, factor.like(gradients[0]))
