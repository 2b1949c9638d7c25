"""Forward hooks that live as long as a preconditioner, and on its own modules only."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from skfac.client.layers import TrackedLayer

Body = Callable[[Tensor, Tensor], Tensor | None]
"""What a hook does with a layer's input and output; a tensor replaces the output."""


class ForwardHook:
    """Calls `body` for each forward of a layer that trains.

    That is: in training mode, with gradients enabled, with the layer's own parameters.
    A copy of the model (`deepcopy`, pickle) carries hooks that do nothing, and
    `torch.compile` breaks its graph here instead of tracing what is not a tensor.
    """

    def __init__(self, layer: TrackedLayer | None, body: Body | None) -> None:
        self._layer = layer
        self._body = body

    def __reduce__(self) -> tuple[Any, ...]:
        return ForwardHook, (None, None)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch has no types
    def __call__(
        self,
        module: nn.Module,
        positional: tuple[Tensor, ...],
        named: dict[str, Tensor],
        output: Tensor,
    ) -> Tensor | None:
        """Look at one forward, as torch calls hooks.

        Returns:
            What replaces the output, or None.
        """
        layer, body = self._layer, self._body
        if layer is None or body is None:
            return None
        if not (module.training and output.requires_grad and layer.runs_in(module)):
            return None
        inputs = positional[0] if positional else next(iter(named.values()))
        with torch.autocast(output.device.type, enabled=False):
            return body(inputs, output)


class HookedLayers:
    """Hooks on all modules of some layers, removed together."""

    def __init__(
        self,
        layers: Sequence[TrackedLayer],
        bodies: Sequence[Body],
    ) -> None:
        # In front, so that the hooks of others see the output that is used.
        self._handles = [
            module.register_forward_hook(
                ForwardHook(layer, body), with_kwargs=True, prepend=True
            )
            for layer, body in zip(layers, bodies, strict=True)
            for module in layer.modules
        ]

    def remove(self) -> None:
        """Take all hooks away; idempotent."""
        for handle in self._handles:
            handle.remove()
