"""The rows that one rank captured at one step, and what it declares about them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from skfac.curvature.settings import CurvatureSettings
from skfac.wire.report import NO_STEPS, StepReport

ALIGNMENT = 64
"""Every tensor of a payload starts at a multiple of it, so that it is used in place."""


@dataclass(frozen=True)
class TensorHeader:
    """What is declared of a tensor that may not be here yet.

    Attributes:
        dtype: Of its elements.
        shape: Outermost extent first.
        shared_offset: Where it begins in shared memory; None if it is in the payload.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    shared_offset: int | None = None

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorHeader":
        """Describe a tensor.

        Returns:
            Its header.
        """
        return cls(tensor.dtype, tuple(tensor.shape))

    def at(self, shared_offset: int) -> "TensorHeader":
        """Describe the same tensor in shared memory.

        Returns:
            Its header.
        """
        # dataclasses.replace takes ten times as long, and forgets the sizes.
        moved = object.__new__(TensorHeader)
        moved.__dict__.update(self.__dict__, shared_offset=shared_offset)
        return moved

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the elements."""
        return math.prod(self.shape) * self.dtype.itemsize

    @cached_property
    def padded_nbytes(self) -> int:
        """Bytes up to where the next tensor of a payload begins."""
        return padded(self.nbytes)

    @cached_property
    def strides(self) -> tuple[int, ...]:
        """Of the contiguous tensor, in elements."""
        return strides_of(self.shape)


# A model has the same tensors again and again.
@lru_cache(maxsize=4096)
def header_of(dtype: torch.dtype, shape: tuple[int, ...]) -> TensorHeader:
    """Describe all tensors of a kind, once.

    Returns:
        The header of one in the payload, whose sizes are known.
    """
    header = TensorHeader(dtype, shape)
    _ = header.padded_nbytes, header.strides
    return header


@dataclass(frozen=True)
class RowsHeader:
    """What a `LayerRows` declares."""

    layer: int
    activations: TensorHeader
    derivatives: TensorHeader

    @property
    def count(self) -> int:
        """The examples `n` that the factors are divided by."""
        return self.derivatives.shape[-2]


@dataclass(frozen=True)
class SnapshotHeader:
    """What a `Snapshot` declares."""

    rank: int
    step: int
    settings: CurvatureSettings
    layers: tuple[RowsHeader, ...]
    report: StepReport = NO_STEPS

    @property
    def tensors(self) -> list[TensorHeader]:
        """All tensors in the order of the payload."""
        return [t for rows in self.layers for t in (rows.activations, rows.derivatives)]


@dataclass(frozen=True, eq=False)
class LayerRows:
    """The rows of both factors of one layer.

    With several groups both shapes have the groups in front: `[groups, n, d]`.

    Attributes:
        layer: Index in the session's layers.
        activations: Shape `[n, d_in]`, the bias column included; `[m, d_in]` with any
            `m` if the layer's activation factor is diagonal.
        derivatives: Shape `[n, d_out]`, of the loss of one example each.
    """

    layer: int
    activations: Tensor
    derivatives: Tensor

    @property
    def count(self) -> int:
        """The examples `n` that the factors are divided by."""
        return self.derivatives.shape[-2]

    @property
    def nbytes(self) -> int:
        """Bytes of both tensors."""
        return self.activations.nbytes + self.derivatives.nbytes

    @property
    def header(self) -> RowsHeader:
        """What is known of these rows before their payload is there."""
        return RowsHeader(
            self.layer,
            TensorHeader.of(self.activations),
            TensorHeader.of(self.derivatives),
        )


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The rows of all layers of one rank at one step.

    Attributes:
        rank: Who captured it.
        step: Step of the backward that the derivatives come from.
        settings: How the rows are weighed, compressed and damped.
        layers: Rows by layer; a layer that got no data is absent.
        report: How the steps before it fared.
    """

    rank: int
    step: int
    settings: CurvatureSettings
    layers: tuple[LayerRows, ...]
    report: StepReport = NO_STEPS

    @property
    def header(self) -> SnapshotHeader:
        """What is known of this snapshot before its payload is there."""
        headers = tuple(rows.header for rows in self.layers)
        return SnapshotHeader(self.rank, self.step, self.settings, headers, self.report)

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors in the order of the payload."""
        return [t for rows in self.layers for t in (rows.activations, rows.derivatives)]


def padded(nbytes: int) -> int:
    """Round up to the next multiple of the alignment.

    Returns:
        Bytes.
    """
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def strides_of(shape: Sequence[int]) -> tuple[int, ...]:
    """Find the strides of a contiguous tensor.

    Returns:
        They, in elements.
    """
    strides = [1] * len(shape)
    for i in range(len(shape) - 1, 0, -1):
        strides[i - 1] = strides[i] * max(shape[i], 1)
    return tuple(strides)
