"""Rows of `nn.Embedding`: a linear layer on one-hot inputs, whose factor is diagonal.

With `x` the one-hot vector of a token, `x xᵀ` has a single entry on its diagonal, so
the activation factor is made of token counts and no one-hot vector is ever formed.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from skfac.curvature.positions import (
    Empty,
    Positions,
    by_sample,
    new_memory,
    sample_extents,
    sum_rows,
)


@dataclass(frozen=True, kw_only=True)
class EmbeddingGeometry:
    """An `nn.Embedding` on tokens `[]`, `[batch]` or `[batch, *positions]`.

    `expand`, and `subsample` on average, give the factor of the one-hot inputs exactly.
    So does every reduction for tokens `[batch]`, where `S = 1`. Otherwise `reduce` and
    `authors` do not: the mean of several one-hot vectors has a factor that is not
    diagonal. In its place they take the tokens' frequencies over all positions, as if
    each sample had one token.

    Attributes:
        d_in: Size of the vocabulary.
        d_out: Size of an embedding.
        padding: The token that trains nothing and counts as `x = 0`, if there is one.
    """

    d_in: int
    d_out: int
    padding: int | None = None

    @property
    def kind(self) -> str:
        """Always "embedding"."""
        return "embedding"

    @property
    def groups(self) -> int:
        """Always 1."""
        return 1

    @property
    def bias(self) -> bool:
        """Never."""
        return False

    @property
    def diagonal(self) -> bool:
        """Always."""
        return True

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
        inputs: Int[Tensor, "*batch_positions"],
        positions: Positions,
        empty: Empty = new_memory,
    ) -> Float[Tensor, "m d_in"]:
        """Count the tokens.

        Returns:
            One row `x` in float64, or none if there are no tokens. With `n` the number
            of derivative rows, the diagonal of the factor is `x² / n`.
        """
        batch, count = sample_extents(inputs[..., None])
        tokens = inputs.reshape(batch, count)
        if positions.picked is not None:
            tokens = tokens.index_select(1, positions.picked.to(tokens.device))
        if tokens.numel() == 0:
            return torch.empty(0, self.d_in, dtype=torch.double, device=tokens.device)
        pooled = positions.reduction in ("reduce", "authors")
        counts = self._counts(tokens.flatten())
        return (counts / count if pooled else counts * count).sqrt()[None]

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
            One row per sample, or per sample and kept position.
        """
        return sum_rows(by_sample(derivatives), positions, scale, empty)

    def to_matrix(
        self, weight: Float[Tensor, "*stack d_in d_out"], bias: Tensor | None
    ) -> Float[Tensor, "*stack d_out d_in"]:
        """Turn a weight into the matrix that multiplies one-hot columns.

        Returns:
            A view.
        """
        assert bias is None
        return weight.mT

    def from_matrix(
        self, matrix: Float[Tensor, "*stack d_out d_in"]
    ) -> tuple[Float[Tensor, "*stack d_in d_out"], None]:
        """Turn a matrix into the shape of the weight.

        Returns:
            A view, and no bias.
        """
        return matrix.mT, None

    def _counts(self, tokens: Int[Tensor, " tokens"]) -> Float[Tensor, " d_in"]:
        # Not bincount: on a GPU it waits for the result. Sums of ones are exact in any
        # order, so this is deterministic.
        ones = torch.ones_like(tokens, dtype=torch.double)
        if self.padding is not None:
            ones = (tokens != self.padding).double()
        return ones.new_zeros(self.d_in).index_add_(0, tokens, ones)


def embedding_geometry(module: nn.Embedding) -> EmbeddingGeometry | None:
    """Describe an `nn.Embedding`.

    Returns:
        Its geometry, or None if its gradient is not that of a linear layer, or sparse.
    """
    if module.sparse or module.max_norm is not None or module.scale_grad_by_freq:
        return None
    d_in, d_out = module.weight.shape
    return EmbeddingGeometry(d_in=d_in, d_out=d_out, padding=module.padding_idx)
