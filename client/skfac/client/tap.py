"""Listens to the derivatives of a layer's output, in its backward."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Listener = Callable[[Tensor], None]
"""What is called with the derivatives, in each backward."""


def listen_to(output: Tensor, listener: Listener) -> Tensor | None:
    """Have the derivatives of an output told.

    A hook on the output itself would be lost when a model changes it in place and it
    is a view, as that of a linear layer on sequences is.

    Args:
        output: What a layer has just computed.
        listener: Whom to tell.

    Returns:
        What replaces the output; None if it may stay, as its backward is one of ours
        and tells its `listeners`.
    """
    listeners: list[Listener] | None = getattr(output.grad_fn, "listeners", None)
    if listeners is not None:
        listeners.append(listener)
        return None
    tapped: Tensor = _Tap.apply(output.detach(), output, listener)  # type: ignore[no-untyped-call]
    return tapped


class _Tap(torch.autograd.Function):
    """The output of a layer, with somebody listening to its derivatives."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        output: Tensor,
        original: Tensor,
        listener: Listener,
    ) -> Tensor:
        ctx.mark_dirty(output)  # then it is no view, and may be changed in place
        ctx.listener = listener
        return output

    @staticmethod
    def backward(ctx: Any, *derivatives: Any) -> Any:  # noqa: ANN401
        ctx.listener(derivatives[0])
        return None, derivatives[0], None
