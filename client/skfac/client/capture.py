"""Collects the rows of every layer during a training step's forward and backward."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from skfac.client.layers import TrackedLayer
from skfac.wire.snapshot import LayerRows, Snapshot
from skfac.wire.staging import HostCopy, Staging


@dataclass(eq=False)
class _Call:
    # One forward of a layer. A layer that is used twice has two, and the rows of each
    # stay together whatever the order of the backward.
    activations: Tensor
    derivatives: Tensor | None = None


@dataclass(frozen=True, eq=False)
class PendingSnapshot:
    """A snapshot on its way to host memory.

    Attributes:
        rank: Who captured it.
        step: Step of the backward.
        damping: λ at this step.
    """

    rank: int
    step: int
    damping: float
    _copies: tuple[HostCopy, ...]

    def wait(self) -> Snapshot:
        """Block until the rows are in host memory.

        Returns:
            The snapshot.
        """
        pairs = (copy.wait() for copy in self._copies)
        rows = (LayerRows(index, a, d) for index, (a, d) in enumerate(pairs))
        return Snapshot(self.rank, self.step, self.damping, tuple(rows))


class Capture:
    """Hooks that collect rows while `armed`, and cost next to nothing otherwise.

    Only forwards that train count: in training mode, with gradients enabled. The rows
    are reduced right away, so that nothing a model does in place later changes them.
    """

    def __init__(self, layers: Sequence[TrackedLayer], dtype: torch.dtype) -> None:
        self.armed = True
        self._layers = layers
        self._dtype = dtype
        self._calls: list[list[_Call]] = [[] for _ in layers]
        self._staging: dict[torch.device, Staging] = {}
        self._hooks = [
            layer.module.register_forward_hook(self._hook(index), with_kwargs=True)
            for index, layer in enumerate(layers)
        ]

    def take(self, rank: int, step: int, damping: float) -> PendingSnapshot:
        """Close the snapshot of a step whose backward has run.

        Returns:
            The rows of all layers; a layer that got no data has none.
        """
        copies = []
        for layer, calls in zip(self._layers, self._calls, strict=True):
            done = [(c.activations, c.derivatives) for c in calls]
            pairs = [(a, d) for a, d in done if d is not None]
            rows = self._joined(layer, pairs)
            # By the rows' device: a model may be moved after it was wrapped.
            device = rows[0].device
            if device not in self._staging:
                self._staging[device] = Staging(device)
            copies.append(self._staging[device].to_host(rows))
            calls.clear()
        return PendingSnapshot(rank, step, damping, tuple(copies))

    def close(self) -> None:
        """Remove the hooks; idempotent."""
        for hook in self._hooks:
            hook.remove()

    def _joined(
        self, layer: TrackedLayer, pairs: list[tuple[Tensor, Tensor]]
    ) -> list[Tensor]:
        if not pairs:
            empty = torch.empty(0, dtype=self._dtype, device=layer.module.weight.device)
            dims = layer.geometry.d_in, layer.geometry.d_out
            return [empty.reshape(0, dim) for dim in dims]
        if len(pairs) == 1:
            return list(pairs[0])
        return [torch.cat(side) for side in zip(*pairs, strict=True)]

    def _hook(
        self, index: int
    ) -> Callable[
        [nn.Module, tuple[Tensor, ...], dict[str, Tensor], Tensor], Tensor | None
    ]:
        geometry = self._layers[index].geometry
        calls = self._calls[index]

        def hook(
            module: nn.Module,
            positional: tuple[Tensor, ...],
            named: dict[str, Tensor],
            output: Tensor,
        ) -> None:
            if not (self.armed and module.training and output.requires_grad):
                return
            inputs = positional[0] if positional else named["input"]
            with torch.no_grad():
                rows = geometry.activation_rows(inputs.detach().to(self._dtype))
            call = _Call(rows)
            calls.append(call)

            def keep(derivatives: Tensor) -> None:
                # Autograd's derivatives are of the mean over this forward's batch.
                call.derivatives = geometry.derivative_rows(
                    derivatives.detach().to(self._dtype), scale=float(len(rows))
                )

            output.register_hook(keep)  # type: ignore[no-untyped-call]

        return hook
