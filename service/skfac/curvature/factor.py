"""What a Kronecker factor is made of: rows that are kept, added and compressed.

A factor `A` is a positive semidefinite `d × d` matrix; with groups it is block
diagonal and has one such block per group. A `Moment` holds `weight · A` in the
smallest form that is exact, so that moments of several updates can be added. The only
step that is not exact is `Moment.compressed`: it keeps the leading eigen-directions
and remembers the trace of what it cut off.

Sources: keeping leading directions of the small Gram matrix of a stream of rows is in
Ghashami, Liberty, Phillips & Woodruff, "Frequent Directions: Simple and Deterministic
Matrix Sketching", SIAM J. Comput. 2016 (there "iterative SVD"); giving the lost part
back as a multiple of the identity is in Luo et al., "Robust Frequent Directions with
Application in Online Learning", JMLR 2019. Deviations: nothing is subtracted from
the directions that stay, and the multiple is the one that leaves the trace as it was.
`docs/history.md` has the error bound.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from skfac.curvature import stacks
from skfac.curvature.halves import gram
from skfac.curvature.stacks import in_stacks, read_numbers

Form = Literal["rows", "dense", "diagonal"]

MOMENT_BYTES = 1024
"""What a moment takes besides its numbers, about: many small ones are not free."""


@dataclass(frozen=True, eq=False)
class Moment:
    """The matrix `weight · A`, in float64.

    Attributes:
        form: What `tensor` is.
        tensor: `"rows"`: `R` of shape `[*groups, m, d]` with `Rᵀ R = weight · A`;
            `"dense"`: the matrix, `[*groups, d, d]`; `"diagonal"`: its diagonal,
            `[1, d]`.
        weight: `> 0`, what `tensor` has to be divided by.
        dropped: `>= 0`, the trace of `weight · A`, summed over groups, that `tensor`
            lacks. It counts as spread evenly over all eigenvalues.
    """

    form: Form
    tensor: Float[Tensor, "*groups rows dim"]
    weight: float
    dropped: float = 0.0

    @property
    def dim(self) -> int:
        """The size `d` of one group's block."""
        return self.tensor.shape[-1]

    @property
    def eigenvalues(self) -> int:
        """How many eigenvalues the factor has: groups times `d`."""
        groups = self.tensor.shape[0] if self.tensor.ndim == 3 else 1
        return groups * self.dim

    @cached_property  # what the inverse is made of, the trace, and what is cut off
    def square(self) -> Float[Tensor, "*groups m m"]:
        """`R Rᵀ` of rows, with their nonzero eigenvalues; a dense matrix itself."""
        return gram(self.tensor) if self.form == "rows" else self.tensor

    @cached_property
    def trace(self) -> float:
        """The trace of what `tensor` holds, summed over groups; see `look_at`."""
        return float(_on_diagonal(self).sum())

    @property
    def bare(self) -> "Moment":
        """The same without `square`, which takes memory."""
        return replace(self)

    @property
    def mean_eigenvalue(self) -> float:
        """`tr A` over the number of eigenvalues, exact; 0 for an empty factor."""
        if self.eigenvalues == 0:
            return 0.0
        return (self.trace + self.dropped) / (self.weight * self.eigenvalues)

    @property
    def mean_dropped(self) -> float:
        """What truncation takes off the mean eigenvalue; damping gives it back."""
        return self.dropped / (self.weight * max(self.eigenvalues, 1))

    def check(self) -> None:
        """Check that a moment of `moments_of` is of some examples, and finite.

        Raises:
            ValueError: If it is not.
        """
        if self.weight < 1:
            shape = tuple(self.tensor.shape)
            raise ValueError(f"A factor needs at least one row, got shape {shape}.")
        if not math.isfinite(self.trace):
            raise ValueError(
                "The rows of a factor must be finite; the sum of their squares is "
                f"{self.trace}."
            )

    def scaled(self, by: float) -> "Moment":
        """Give the factor another weight.

        Args:
            by: `>= 0`, what the weight is multiplied by.

        Returns:
            A moment of the same factor.
        """
        return replace(
            self,
            tensor=self.tensor * (math.sqrt(by) if self.form == "rows" else by),
            weight=self.weight * by,
            dropped=self.dropped * by,
        )

    def compressed(self, *, rank: int | None, energy: float = 1.0) -> "Moment":
        """Keep the leading eigen-directions and count the trace of the others.

        A diagonal is never cut. All groups keep equally many directions, and nothing is
        decomposed where nothing can be cut.

        Args:
            rank: At least 1: most directions to keep; None for no limit.
            energy: In (0, 1]: fewest directions that hold this share of the trace, what
                was dropped before included.

        Returns:
            A moment with the same trace, in at most `rank` rows if any were cut.

        Raises:
            torch.linalg.LinAlgError: If the decomposition fails.
        """
        size = min(self.tensor.shape[-2:])
        rank = size if rank is None else min(rank, size)
        if self.form == "diagonal" or (rank == size and energy == 1):
            return self
        values, vectors = torch.linalg.eigh(self.square)
        values = values.flip(-1).clamp(min=0)
        if energy < 1:
            total = self.trace + self.dropped
            rank = min(rank, _holding(values, energy * total))
        if rank == size:
            return self
        leading = vectors.mT.flip(-2)[..., :rank, :]
        if self.form == "rows":
            kept = leading @ self.tensor
        else:
            kept = leading * values[..., :rank, None].sqrt()
        cut = self.trace - float(kept.square().sum())
        dropped = self.dropped + max(cut, 0.0)
        return replace(self, form="rows", tensor=kept, dropped=dropped)


def moment_of(
    rows: Float[Tensor, "*groups rows dim"], *, count: int, diagonal: bool = False
) -> Moment:
    """Take the moment of one update from its rows.

    Args:
        rows: `X`, one row per example, of any floating-point dtype. Not modified.
        count: `n >= 1`, the number of examples.
        diagonal: Whether all but the diagonal of the factor is zero, whatever the rows
            are; then their number needs not be `n`.

    Returns:
        `A = Xᵀ X / n`, or its diagonal, with the weight `n`.

    Raises:
        ValueError: If there are no examples, or numbers in `rows` are not finite or too
            large for float64.
    """
    (moment,) = moments_of([rows], counts=[count], diagonal=[diagonal])
    moment.check()
    return moment


def moments_of(
    sides: Sequence[Tensor], *, counts: Sequence[int], diagonal: Sequence[bool]
) -> list[Moment]:
    """Take moments as `moment_of` does, many together and unchecked.

    Args:
        sides: Rows of each, on one device.
        counts: The examples of each.
        diagonal: Of each whether it is diagonal.

    Returns:
        Moments that `Moment.check` is yet to be asked of.
    """
    found: dict[int, Moment] = {}
    for on_diagonal, operation in ((True, _diagonal), (False, _rows_or_matrix)):
        places = [i for i, one in enumerate(diagonal) if one == on_diagonal]
        made = in_stacks(operation, [sides[i] for i in places])
        for i, (tensor, *square) in zip(places, made, strict=True):
            form: Form = "rows" if square else "dense"
            form = "diagonal" if on_diagonal else form
            # The weight n, not 1: unscaled rows lose nothing to rounding.
            found[i] = Moment(form, tensor, float(counts[i]))
            if square:
                vars(found[i])["square"] = square[0]  # where the property keeps it
    return [found[i] for i in range(len(sides))]


def look_at(moments: Sequence[Moment]) -> None:
    """Find the traces of many moments at once, where asking one by one is slow.

    On a GPU each question would wait for the answer. On the CPU nothing is done.

    Args:
        moments: On one device.
    """
    unknown = [moment for moment in moments if "trace" not in vars(moment)]
    if not unknown or not stacks.faster_on(unknown[0].tensor.device):
        return
    rows = [m for m in unknown if m.form == "rows" and "square" not in vars(m)]
    squares = in_stacks(lambda tensor: (gram(tensor),), [m.tensor for m in rows])
    for moment, (square,) in zip(rows, squares, strict=True):
        vars(moment)["square"] = square
    diagonals = [_on_diagonal(moment).reshape(-1) for moment in unknown]
    sums = in_stacks(lambda diagonal: (diagonal.sum(-1),), diagonals)
    traces = read_numbers([total for (total,) in sums])
    for moment, (trace,) in zip(unknown, traces, strict=True):
        vars(moment)["trace"] = trace


def _on_diagonal(moment: Moment) -> Tensor:
    if moment.form == "diagonal":
        return moment.tensor
    return moment.square.diagonal(dim1=-2, dim2=-1)


def _diagonal(rows: Tensor) -> tuple[Tensor]:
    return (rows.double().square().sum(-2, keepdim=True),)


def _rows_or_matrix(rows: Tensor) -> tuple[Tensor, ...]:
    # Whichever is smaller. The product at once, while the rows are in the cache.
    rows = rows.to(torch.float64, copy=True)  # a history outlives its caller's
    if rows.shape[-2] < rows.shape[-1]:
        return rows, gram(rows)
    return (gram(rows.mT),)


def add_moments(*moments: Moment) -> Moment:
    """Add moments of one layer's side.

    Args:
        moments: At least one, of the same groups and `d`; a diagonal only with others.

    Returns:
        Their sum, exact; a single moment as it is.
    """
    if len(moments) == 1:
        return moments[0]
    first = moments[0]
    tensors = [moment.tensor for moment in moments]
    rows = sum(tensor.shape[-2] for tensor in tensors)
    form: Form = "diagonal"
    if first.form == "diagonal":
        tensor = torch.cat(tensors).sum(0, keepdim=True)
    elif all(moment.form == "rows" for moment in moments) and rows < first.dim:
        form, tensor = "rows", torch.cat(tensors, -2)
    else:
        form, tensor = "dense", _matrix(first)
        for moment in moments[1:]:
            tensor = tensor + _matrix(moment)
    weight = sum(moment.weight for moment in moments)
    return Moment(form, tensor, weight, sum(moment.dropped for moment in moments))


def _matrix(moment: Moment) -> Tensor:
    tensor = moment.tensor
    return gram(tensor.mT) if moment.form == "rows" else tensor


def _holding(values: Float[Tensor, "*groups size"], trace: float) -> int:
    # How many leading eigenvalues of each group it takes to hold the trace.
    held = values.reshape(-1, values.shape[-1]).sum(0).cumsum(0)
    return int((held < trace).sum()) + 1
