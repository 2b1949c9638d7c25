"""Turns the gradients of a model into preconditioned ones, inside a trust region."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from skfac.client.layers import TrackedLayer
from skfac.client.ready import ReadyVersions
from skfac.client.row_space import Rows, RowSpace
from skfac.curvature.trust import Trust, graft_scale, kl_scale
from skfac.wire.outcome import Version


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

    def graft(self) -> Tensor:
        return graft_scale(self.rows.gradient_square(), self.rows.direction_square())

    def write(self, factor: Tensor) -> None:
        self.layer.scale_gradient(factor)


@dataclass(frozen=True, eq=False)
class _InGradientSpace:
    layer: TrackedLayer
    gradient: Tensor
    direction: Tensor

    def inner(self) -> Tensor:
        return torch.sum(self.direction * self.gradient)

    def graft(self) -> Tensor:
        return graft_scale(self.gradient.square().sum(), self.direction.square().sum())

    def write(self, factor: Tensor) -> None:
        self.layer.set_gradient(self.direction * factor.to(self.direction))


_Step = _InRowSpace | _InGradientSpace


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
        found = (
            self._prepare(index, versions, loss_scale)
            for index in range(len(self._layers))
        )
        steps = [step for step in found if step is not None]
        if not steps:
            return
        self.prediction = self._predict(steps, kl_clip if trust == "kl" else None)
        for step in steps:
            graft = trust == "graft"
            step.write(step.graft() if graft else self.prediction.scale)

    def _prepare(
        self, index: int, versions: Sequence[Version | None], loss_scale: float | Tensor
    ) -> _Step | None:
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
        return _InGradientSpace(layer, gradient, ready.apply(gradient))

    def _predict(self, steps: Sequence[_Step], kl_clip: float | None) -> Prediction:
        device = steps[0].layer.weight.device
        inner = torch.stack([s.inner().double().to(device) for s in steps])
        rates = [s.layer.learning_rate for s in steps]
        lr = torch.stack(
            [torch.as_tensor(rate, dtype=inner.dtype, device=device) for rate in rates]
        )
        finite = inner.isfinite()
        count = (~finite).sum()
        self._not_finite = (
            count if self._not_finite is None else self._not_finite.to(device) + count
        )
        inner = inner.where(finite, torch.zeros_like(inner))
        square = (inner * lr.square()).sum()
        scale = torch.ones_like(square)
        if kl_clip is not None:
            scale = kl_scale(square, kl_clip=kl_clip)
        return Prediction((inner * lr).sum(), square, scale)
