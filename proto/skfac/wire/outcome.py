"""What becomes of one (layer, step): a version, or the word that none will come."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import xxhash

from skfac.curvature.layer import LayerPreconditioner

LossReason = Literal["superseded", "failed", "empty", "refused", "gone"]


@dataclass(frozen=True, eq=False)
class Version:
    """A preconditioner; its version is the step its rows were captured at.

    Attributes:
        layer: Index in the session's layers.
        step: Capture step.
        preconditioner: Both damped inverses.
        rows: Rows of the newest update, over all ranks.
        ranks: Ranks whose rows are in that update.
        updates: Updates that the factors are made of; it falls when a server that was
            restarted begins a new history.
        damping_factor: What the damping that was asked for was multiplied by, because
            with less there was no inverse; mostly 1.
    """

    layer: int
    step: int
    preconditioner: LayerPreconditioner
    rows: int
    ranks: int
    updates: int
    damping_factor: float = 1.0

    @cached_property
    def fingerprint(self) -> int:
        """A positive number below 2⁶³, of all that a step makes of this version."""
        digest = xxhash.xxh3_64()
        both = self.preconditioner
        for inverse in (both.activations, both.derivatives):
            tensor = inverse.tensor.detach().cpu().contiguous()
            what = type(inverse).__name__, tuple(tensor.shape), inverse.damping
            digest.update(repr((what, tensor.dtype)).encode())
            if tensor.numel():
                digest.update(tensor.numpy().data.cast("B"))
        return (digest.intdigest() >> 1) | 1


@dataclass(frozen=True)
class Loss:
    """A version that will never come.

    Attributes:
        layer: Index in the session's layers.
        step: Capture step.
        reason: `"superseded"` by a newer one once it was past due, `"failed"`
            numerically, `"empty"` because no rank had rows, `"refused"` because the
            server did not take the rows, or `"gone"` because the server has left,
            which only the client can tell.
        message: A sentence for people.
    """

    layer: int
    step: int
    reason: LossReason
    message: str


Outcome = Version | Loss
