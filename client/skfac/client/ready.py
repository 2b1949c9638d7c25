"""Versions copied to where a model is, once for each version."""

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch

from skfac.client.layers import TrackedLayer
from skfac.curvature.layer import LayerPreconditioner
from skfac.curvature.tensors import in_dtype, on_device
from skfac.wire.outcome import Loss, Outcome, Version
from skfac.wire.staging import DeviceCopy, Staging, wider


class ReadyVersions:
    """Keeps the latest version of each layer on the layer's device.

    The copy has the wider dtype of version and gradient, in which all products run. It
    is begun when a version arrives, so that no step waits for it.
    """

    def __init__(self, layers: Sequence[TrackedLayer]) -> None:
        self._layers = layers
        self._staging: dict[torch.device, Staging] = {}
        # What no step has used yet; a version that nobody keeps any more leaves it.
        self._begun: WeakKeyDictionary[Version, DeviceCopy] = WeakKeyDictionary()
        self._ready: list[tuple[Version, LayerPreconditioner] | None]
        self._ready = [None] * len(layers)

    def begin(self, version: Version) -> Outcome:
        """Start to copy a version that has arrived; called from any thread.

        Returns:
            The version; or a loss, if the device has no room for it.
        """
        layer = self._layers[version.layer]
        device = layer.weight.device
        if device.type == "cpu":
            return version
        tensors = version.preconditioner.tensors
        try:
            begun = self._staging_of(device).upload(tensors, layer.weight.dtype)
        except torch.OutOfMemoryError as error:
            text = f"{device} has no room for the inverse of {layer.name!r}: {error}"
            return Loss(version.layer, version.step, "failed", text)
        self._begun[version] = begun
        return version

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
            self._ready[index] = ready = version, self._copy(version, device, dtype)
        return ready[1]

    def hold(self, index: int, ready: LayerPreconditioner) -> None:
        """Hold what a layer is preconditioned with in other memory, from now on.

        Args:
            index: Of a layer that has a version.
            ready: What `get` gave, held elsewhere.
        """
        known = self._ready[index]
        assert known is not None
        self._ready[index] = known[0], ready

    def _copy(
        self, version: Version, device: torch.device, dtype: torch.dtype
    ) -> LayerPreconditioner:
        both = version.preconditioner
        begun = self._begun.pop(version, None) if self._staging else None
        here = list(both.tensors) if begun is None else begun.take()
        tensors = [
            in_dtype(on_device(tensor, device), wider(tensor.dtype, dtype))
            for tensor in here
        ]
        return both.with_tensors(*tensors)

    def _staging_of(self, device: torch.device) -> Staging:
        # Versions arrive on several threads: the dictionary keeps the first.
        if device not in self._staging:
            return self._staging.setdefault(device, Staging(device))
        return self._staging[device]
