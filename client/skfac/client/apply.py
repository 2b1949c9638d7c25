"""Turns the gradients of a model into preconditioned ones, inside a trust region."""

from collections.abc import Sequence

import torch
from torch import Tensor

from skfac.client.layers import TrackedLayer
from skfac.curvature.layer import LayerPreconditioner
from skfac.curvature.trust import kl_scale
from skfac.wire.outcome import Version


class Apply:
    """Preconditions in gradient space, layer by layer, in place.

    Both the versions and the gradients are taken to the wider dtype of the two; the
    result has the gradient's.
    """

    def __init__(self, layers: Sequence[TrackedLayer]) -> None:
        self._layers = layers
        # On the layer's device; remade only when another version is in use.
        self._ready: list[tuple[Version, LayerPreconditioner] | None]
        self._ready = [None] * len(layers)

    @torch.no_grad()
    def __call__(self, versions: Sequence[Version | None], *, kl_clip: float) -> None:
        """Replace the gradient of every layer that has one.

        Args:
            versions: The version of each layer; None keeps its raw gradient, which is
                bounded by the same trust region.
            kl_clip: κ of the trust region.
        """
        steps: list[tuple[TrackedLayer, Tensor]] = []
        decrease: Tensor | None = None
        for index, layer in enumerate(self._layers):
            gradient = layer.gradient()
            if gradient is None:
                continue
            direction = self._precondition(index, versions[index], gradient)
            steps.append((layer, direction))
            inner = torch.sum(direction * gradient) * layer.learning_rate**2
            decrease = inner if decrease is None else decrease + inner.to(decrease)
        if decrease is None:
            return
        scale = kl_scale(decrease, kl_clip=kl_clip)
        for layer, direction in steps:
            layer.set_gradient(direction * scale.to(direction))

    def _precondition(
        self, index: int, version: Version | None, gradient: Tensor
    ) -> Tensor:
        if version is None:
            self._ready[index] = None
            return gradient
        ready = self._ready[index]
        if ready is None or ready[0] is not version:
            tensors = [
                tensor.to(
                    gradient.device,
                    torch.promote_types(tensor.dtype, gradient.dtype),
                    non_blocking=True,
                )
                for tensor in version.preconditioner.tensors
            ]
            ready = version, version.preconditioner.with_tensors(*tensors)
            self._ready[index] = ready
        return ready[1].apply(gradient.to(ready[1].activations.tensor.dtype))
