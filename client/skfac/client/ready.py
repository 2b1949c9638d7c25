"""Versions copied to where a model is, once for each version."""

from collections.abc import Sequence

import torch

from skfac.curvature.layer import LayerPreconditioner
from skfac.wire.outcome import Version


class ReadyVersions:
    """Keeps the latest version of each layer on the layer's device.

    The copy has the wider dtype of version and gradient, in which all products run.
    """

    def __init__(self, count: int) -> None:
        self._ready: list[tuple[Version, LayerPreconditioner] | None]
        self._ready = [None] * count

    def get(
        self,
        index: int,
        versions: Sequence[Version | None],
        device: torch.device,
        dtype: torch.dtype,
    ) -> LayerPreconditioner | None:
        """Find what a layer is preconditioned with.

        Args:
            index: Of the layer.
            versions: The version of each layer.
            device: Where the gradient is.
            dtype: Of the gradient.

        Returns:
            The version there, or None if the layer has none.
        """
        version = versions[index]
        if version is None:
            self._ready[index] = None
            return None
        ready = self._ready[index]
        if ready is None or ready[0] is not version:
            tensors = [
                tensor.to(
                    device, torch.promote_types(tensor.dtype, dtype), non_blocking=True
                )
                for tensor in version.preconditioner.tensors
            ]
            both = version.preconditioner
            if any(a is not b for a, b in zip(tensors, both.tensors, strict=True)):
                both = both.with_tensors(*tensors)
            ready = version, both
            self._ready[index] = ready
        return ready[1]
