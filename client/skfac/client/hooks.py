"""Forward hooks that live as long as a preconditioner, and on its own modules only."""

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from skfac.client.layers import TrackedLayer
from skfac.wire.errors import ConfigurationError

Body = Callable[[Tensor, Tensor], Tensor | None]
"""What a hook does with a layer's input and output; a tensor replaces the output."""

Wanted = Callable[[], bool]
"""Whether forwards are looked at now."""

_NOTHING = nullcontext()


def backward_id() -> int:
    """Tell backwards apart.

    Returns:
        A number of the backward that runs on this thread; -1 outside of any.
    """
    number: int = torch._C._current_graph_task_id()
    return number


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Compute in the dtypes of the operands.

    Returns:
        A context manager; one that does nothing where autocast is off, which is free.
    """
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return _NOTHING


class ForwardHook:
    """Calls `body` for each forward of a layer that trains, while `wanted` says so.

    That is: in training mode, with gradients enabled, with the layer's own parameters,
    and outside of `torch.func` and forward-mode differentiation.
    A copy of the model (`deepcopy`, pickle) carries hooks that do nothing, and
    `torch.compile` breaks its graph here instead of tracing what is not a tensor.
    """

    def __init__(
        self, layer: TrackedLayer | None, body: Body | None, wanted: Wanted | None
    ) -> None:
        self._layer = layer
        self._body = body
        self._wanted = wanted

    @property
    def is_at_work(self) -> bool:
        """Whether it is not that of a copy of the model."""
        return self._layer is not None

    def __reduce__(self) -> tuple[Any, ...]:
        return ForwardHook, (None, None, None)

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
        if self._layer is None:
            return None  # that of a copy breaks no graph
        if torch.compiler.is_compiling():
            found: Tensor | None
            found = _look_uncompiled(self, module, positional, named, output)
            return found
        return self._look(module, positional, named, output)

    def _look(
        self,
        module: nn.Module,
        positional: tuple[Tensor, ...],
        named: dict[str, Tensor],
        output: Tensor,
    ) -> Tensor | None:
        layer, body, wanted = self._layer, self._body, self._wanted
        assert layer is not None
        if body is None or wanted is None or not wanted():
            return None
        if not (module.training and output.requires_grad and layer.runs_in(module)):
            return None
        if not layer.weight.requires_grad:  # frozen since
            return None
        if (
            torch._C._are_functorch_transforms_active()
            or forward_ad._current_level >= 0
        ):
            return None
        inputs = positional[0] if positional else _input_of(named)
        with without_autocast(output.device.type):
            return body(inputs, output)


def _input_of(named: dict[str, Tensor]) -> Tensor:
    return named["input"] if "input" in named else next(iter(named.values()))


# Only where a compiler looks: the wrapper costs as much as a small layer.
_look_uncompiled = torch.compiler.disable(ForwardHook._look)  # type: ignore[no-untyped-call]


def check_free(layers: Sequence[TrackedLayer]) -> None:
    """Check that no other preconditioner is at work on layers.

    Raises:
        ConfigurationError: If one is.
    """
    for layer in layers:
        hooks = (hook for one in layer.modules for hook in one._forward_hooks.values())
        if any(isinstance(hook, ForwardHook) and hook.is_at_work for hook in hooks):
            raise ConfigurationError(
                f"Layer {layer.name!r} has another Preconditioner that is not closed: "
                "call its close(), or use `with`."
            )


class HookedLayers:
    """Hooks on all modules of some layers, removed together."""

    def __init__(
        self,
        layers: Sequence[TrackedLayer],
        bodies: Sequence[Body],
        wanted: Wanted = lambda: True,
    ) -> None:
        if "torch._dynamo" in sys.modules:
            # What has been compiled would not look at hooks that come later.
            torch.compiler.reset()
        # In front, so that the hooks of others see the output that is used.
        self._handles = [
            module.register_forward_hook(
                ForwardHook(layer, body, wanted), with_kwargs=True, prepend=True
            )
            for layer, body in zip(layers, bodies, strict=True)
            for module in layer.modules
        ]

    def remove(self) -> None:
        """Take all hooks away; idempotent."""
        for handle in self._handles:
            handle.remove()
