"""What a server keeps of earlier updates, so that a checkpoint can hold it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from skfac.curvature.factor import MOMENT_BYTES, Form, Moment
from skfac.curvature.history import LayerHistory
from skfac.curvature.settings import History
from skfac.wire.snapshot import TensorHeader


@dataclass(frozen=True)
class MomentHeader:
    """What a `Moment` declares."""

    form: Form
    tensor: TensorHeader
    weight: float
    dropped: float


@dataclass(frozen=True)
class LayerStateHeader:
    """What a `LayerState` declares."""

    layer: int
    step: int
    history: History
    diagonal: bool
    updates: int
    dtype: torch.dtype
    activations: tuple[MomentHeader, ...]
    derivatives: tuple[MomentHeader, ...]

    @property
    def tensors(self) -> list[TensorHeader]:
        """All tensors in the order of the payload."""
        return [moment.tensor for moment in self.activations + self.derivatives]

    @property
    def nbytes(self) -> int:
        """Bytes that the history takes; see `LayerHistory.nbytes`."""
        return sum(tensor.nbytes + MOMENT_BYTES for tensor in self.tensors)


@dataclass(frozen=True, eq=False)
class LayerState:
    """The history of one layer.

    Attributes:
        layer: Index in the session's layers.
        step: Capture step of the newest update in it.
        history: The updates.
    """

    layer: int
    step: int
    history: LayerHistory

    @property
    def header(self) -> LayerStateHeader:
        """What is known of this history before its payload is there."""
        history = self.history
        return LayerStateHeader(
            layer=self.layer,
            step=self.step,
            history=history.history,
            diagonal=history.diagonal,
            updates=history.updates,
            dtype=history.dtype,
            activations=tuple(map(_header, history.activations)),
            derivatives=tuple(map(_header, history.derivatives)),
        )

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors in the order of the payload."""
        moments = self.history.activations + self.history.derivatives
        return [moment.tensor for moment in moments]

    def with_tensors(self, tensors: Sequence[Tensor]) -> "LayerState":
        """Hold the history in other tensors, such as copies elsewhere.

        Args:
            tensors: One for each of `tensors`.

        Returns:
            The same history.
        """
        first = len(self.history.activations)
        history = replace(
            self.history,
            activations=_held_in(self.history.activations, tensors[:first]),
            derivatives=_held_in(self.history.derivatives, tensors[first:]),
        )
        return replace(self, history=history)


@dataclass(frozen=True, eq=False)
class SessionState:
    """The histories of all layers that have one."""

    layers: tuple[LayerState, ...]


def _header(moment: Moment) -> MomentHeader:
    tensor = TensorHeader.of(moment.tensor)
    return MomentHeader(moment.form, tensor, moment.weight, moment.dropped)


def _held_in(
    moments: tuple[Moment, ...], tensors: Sequence[Tensor]
) -> tuple[Moment, ...]:
    pairs = zip(moments, tensors, strict=True)
    return tuple(replace(moment, tensor=tensor) for moment, tensor in pairs)
