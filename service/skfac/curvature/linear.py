"""Rows of fully connected layers: `nn.Linear` and the Conv1D of Hugging Face."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from skfac.curvature.positions import (
    Empty,
    Positions,
    by_sample,
    mean_rows,
    new_memory,
    sample_extents,
    sum_rows,
    with_bias_column,
)


@dataclass(frozen=True, kw_only=True)
class LinearGeometry:
    """A layer on inputs `[features]`, `[batch, features]` or with positions between.

    Attributes:
        d_in: Input features, plus 1 with a bias.
        d_out: Output features.
        bias: Whether the layer has a bias.
        kind: A weight of shape `[d_out, features]` is "linear", one of
            `[features, d_out]` is "hf_conv1d".
    """

    d_in: int
    d_out: int
    bias: bool
    kind: Literal["linear", "hf_conv1d"] = "linear"

    @property
    def groups(self) -> int:
        """Always 1."""
        return 1

    @property
    def diagonal(self) -> bool:
        """Never."""
        return False

    def extents(
        self, outputs: Float[Tensor, "*batch_positions d_out"]
    ) -> tuple[int, int]:
        """Count the samples of an output, and the positions of each.

        Returns:
            Both.
        """
        return sample_extents(outputs)

    def activation_rows(
        self,
        inputs: Float[Tensor, "*batch_positions features"],
        positions: Positions,
        empty: Empty = new_memory,
    ) -> Float[Tensor, "n d_in"]:
        """Append the bias column and make rows of the positions.

        Returns:
            One row per sample, or per sample and kept position.
        """
        values = by_sample(inputs)
        if values.ndim == 2 or positions.reduction in ("reduce", "authors"):
            # The mean of a column of ones: appended late, it is never formed.
            return with_bias_column(mean_rows(values, positions), self.bias, empty)
        if self.bias:
            values = with_bias_column(values, self.bias)
        return mean_rows(values, positions)

    def derivative_rows(
        self,
        derivatives: Float[Tensor, "*batch_positions d_out"],
        positions: Positions,
        *,
        scale: float | Float[Tensor, ""],
        empty: Empty = new_memory,
    ) -> Float[Tensor, "n d_out"]:
        """Make rows of the positions, times `scale`.

        Returns:
            As many rows as there are of activations.
        """
        return sum_rows(by_sample(derivatives), positions, scale, empty)

    def to_matrix(
        self,
        weight: Float[Tensor, "*stack rows columns"],
        bias: Float[Tensor, "*stack d_out"] | None,
    ) -> Float[Tensor, "*stack d_out d_in"]:
        """Join weight and bias.

        Returns:
            The bias in the last column; a view of the weight if there is none.
        """
        assert (bias is not None) == self.bias
        matrix = self._turned(weight)
        return matrix if bias is None else torch.cat([matrix, bias[..., None]], -1)

    def from_matrix(
        self, matrix: Float[Tensor, "*stack d_out d_in"]
    ) -> tuple[
        Float[Tensor, "*stack rows columns"], Float[Tensor, "*stack d_out"] | None
    ]:
        """Split a matrix into the shapes of weight and bias.

        Returns:
            Views.
        """
        if not self.bias:
            return self._turned(matrix), None
        return self._turned(matrix[..., :-1]), matrix[..., -1]

    def _turned(self, matrix: Tensor) -> Tensor:
        return matrix if self.kind == "linear" else matrix.mT


def linear_geometry(module: nn.Linear, *, bias: bool) -> LinearGeometry:
    """Describe an `nn.Linear`.

    Returns:
        Its geometry.
    """
    d_out, features = module.weight.shape
    return LinearGeometry(d_in=features + bias, d_out=d_out, bias=bias)


def hf_conv1d_geometry(
    weight: Float[Tensor, "features d_out"], *, bias: bool
) -> LinearGeometry:
    """Describe a Conv1D of Hugging Face, `y = x W + b`, by its weight.

    Returns:
        Its geometry.
    """
    features, d_out = weight.shape
    return LinearGeometry(
        d_in=features + bias, d_out=d_out, bias=bias, kind="hf_conv1d"
    )
