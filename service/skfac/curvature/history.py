"""What one layer's factors remember of earlier updates.

Update j's factor is `A_j = X_jᵀ X_j / n_j`. The history's factor is the weighted mean

    A = Σ_j w_j A_j / Σ_j w_j,    w_j = (1 - β_j) Π_{k > j} β_k,

where `β_k` is the decay that came with update k: `(1 - β) β^age` if it never changes.
The weights are divided by their sum, so that `A` is a mean from the first update on and
needs no correction for having started at zero.

- `"snapshot"`: the newest update alone, as in SKFAC (Tang et al., CVPR 2021).
- `"window"`: the last few updates: the same mean, cut off by age, exact.
- `"ema"`: all updates, as in K-FAC (Martens & Grosse, ICML 2015). It is exact while
  there are fewer rows than the rank cap, and where no cap is below `d`: then `d` rows
  or more become the matrix. Else it is compressed at each update.

`docs/history.md` has the costs and errors of each.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from skfac.curvature.damping import DampingSplit
from skfac.curvature.factor import (
    MOMENT_BYTES,
    Moment,
    add_moments,
    look_at,
    moments_of,
)
from skfac.curvature.layer import LayerPreconditioner, precondition_moments
from skfac.curvature.settings import CurvatureSettings, History


@dataclass(frozen=True, eq=False)
class Update:
    """What one update adds to a layer's factors.

    Attributes:
        moments: Of both, activations first; not checked yet.
        dtype: Of the derivative rows.
    """

    moments: tuple[Moment, Moment]
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class LayerHistory:
    """Both factors of one layer over several updates.

    Attributes:
        history: Which earlier updates count.
        diagonal: Whether the activation factor is diagonal, as an embedding's.
        activations: The activation factor's moments, oldest first: one per update for
            `"window"`, else at most one.
        derivatives: The derivative factor's moments, likewise.
        updates: How many updates have a weight in it.
        dtype: Of the newest update's rows; results have it too.
    """

    history: History
    diagonal: bool
    activations: tuple[Moment, ...]
    derivatives: tuple[Moment, ...]
    updates: int
    dtype: torch.dtype = torch.float32

    @staticmethod
    def empty(history: History, *, diagonal: bool = False) -> "LayerHistory":
        """Start without any update.

        Args:
            history: Which earlier updates will count.
            diagonal: Whether the activation factor is diagonal.

        Returns:
            A history to `fold` updates into.
        """
        return LayerHistory(history, diagonal, (), (), 0)

    @property
    def nbytes(self) -> int:
        """Bytes that it takes: of all tensors, and 1 KiB for each."""
        moments = self.activations + self.derivatives
        return sum(moment.tensor.nbytes + MOMENT_BYTES for moment in moments)

    def fold(
        self,
        activations: Float[Tensor, "*groups rows d_in"],
        derivatives: Float[Tensor, "*groups n d_out"],
        settings: CurvatureSettings,
    ) -> "LayerHistory":
        """Take in the rows of one update, all ranks together.

        Args:
            activations: Rows of the activation factor, the bias column included: `n`,
                or any number if the factor is diagonal.
            derivatives: Rows of the derivative factor, from the same examples.
            settings: Those of this update: `decay` is what it leaves of the weight of
                older updates; `window` or, for `"ema"`, `rank` bounds what stays.

        Returns:
            A new history; this one is as it was.

        Raises:
            ValueError: If there are no rows, or they are not finite.
            torch.linalg.LinAlgError: If the history cannot be compressed.
        """
        (update,) = updates_of([(activations, derivatives)], diagonal=[self.diagonal])
        return self.with_update(update, settings)

    def with_update(
        self, update: "Update", settings: CurvatureSettings
    ) -> "LayerHistory":
        """Take in an update, as `fold` does.

        Args:
            update: One of `updates_of`.
            settings: As for `fold`.

        Returns:
            A new history; this one is as it was.

        Raises:
            ValueError: As `fold` does.
            torch.linalg.LinAlgError: As `fold` does.
        """
        for newest in update.moments:
            newest.check()
        older = self.activations, self.derivatives
        kept = [
            _fold(self.history, moments, newest, settings)
            for moments, newest in zip(older, update.moments, strict=True)
        ]
        return replace(
            self,
            activations=kept[0],
            derivatives=kept[1],
            updates=self._updates(kept[1], settings),
            dtype=update.dtype,
        )

    def precondition(
        self, settings: CurvatureSettings, split: DampingSplit, *, damping: float
    ) -> LayerPreconditioner:
        """Build the layer's preconditioner from the weighted mean of its updates.

        Args:
            settings: `rank` and `energy` bound the directions of the result; a
                diagonal factor is never cut.
            split: How λ is shared by the factors; see `split_damping`.
            damping: `λ > 0` of the Kronecker product, in place of that of `settings`.

        Returns:
            Both inverses, each damped by its share of λ and by the mean of the
            eigenvalues that were cut, in the dtype of the newest rows.

        Raises:
            ValueError: If there was no update, or `damping` is not positive and finite.
            torch.linalg.LinAlgError: If a damped factor cannot be inverted.
        """
        activations, derivatives = self.mean(settings)
        return precondition_moments(
            activations, derivatives, damping=damping, split=split, dtype=self.dtype
        )

    def mean(self, settings: CurvatureSettings) -> tuple[Moment, Moment]:
        """Take the weighted mean of the updates.

        Args:
            settings: As for `precondition`.

        Returns:
            Moments of both factors, activations first.

        Raises:
            ValueError: If there was no update.
            torch.linalg.LinAlgError: If they cannot be compressed.
        """
        if not self.updates:
            raise ValueError("A history without updates cannot precondition a layer.")
        activations, derivatives = (
            add_moments(*side).compressed(rank=settings.rank, energy=settings.energy)
            for side in (self._to_use(self.activations), self._to_use(self.derivatives))
        )
        return activations, derivatives

    def _to_use(self, kept: tuple[Moment, ...]) -> tuple[Moment, ...]:
        # A snapshot is used at once; what stays is not to grow by what is made of it.
        return kept if self.history == "snapshot" else tuple(m.bare for m in kept)

    def _updates(self, kept: tuple[Moment, ...], settings: CurvatureSettings) -> int:
        if self.history == "ema" and settings.decay > 0:
            return self.updates + 1
        return len(kept)


def updates_of(
    rows: Sequence[tuple[Tensor, Tensor]], *, diagonal: Sequence[bool]
) -> list[Update]:
    """Take the updates of many layers together.

    Args:
        rows: Of the activation and the derivative factor of each, as for
            `LayerHistory.fold`, on one device.
        diagonal: Of each whether its activation factor is diagonal.

    Returns:
        One update each.
    """
    counts = [derivatives.shape[-2] for _, derivatives in rows]
    for (activations, _), count, one in zip(rows, counts, diagonal, strict=True):
        assert one or activations.shape[-2] == count, "One row per example."
    moments = moments_of(
        [side for sides in rows for side in sides],
        counts=[count for count in counts for _ in range(2)],
        diagonal=[side for one in diagonal for side in (one, False)],
    )
    look_at(moments)
    pairs = zip(moments[::2], moments[1::2], strict=True)
    return [
        Update(pair, sides[1].dtype) for pair, sides in zip(pairs, rows, strict=True)
    ]


def _fold(
    history: History,
    moments: tuple[Moment, ...],
    newest: Moment,
    settings: CurvatureSettings,
) -> tuple[Moment, ...]:
    if history == "snapshot":
        return (newest,)
    decay = settings.decay
    newest = newest.scaled((1 - decay) / newest.weight)
    older = tuple(moment.scaled(decay) for moment in moments if decay * moment.weight)
    if history == "window":
        return (*older, newest)[-settings.window :]
    return (add_moments(*older, newest).compressed(rank=settings.rank),)
