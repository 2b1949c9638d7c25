"""What becomes of one (layer, step): a version, or the word that none will come."""

from dataclasses import dataclass
from typing import Literal

from skfac.curvature.layer import LayerPreconditioner

LossReason = Literal["superseded", "failed", "empty", "refused"]


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
    """

    layer: int
    step: int
    preconditioner: LayerPreconditioner
    rows: int
    ranks: int
    updates: int


@dataclass(frozen=True)
class Loss:
    """A version that will never come.

    Attributes:
        layer: Index in the session's layers.
        step: Capture step.
        reason: `"superseded"` by a newer one once it was past due, `"failed"`
            numerically, `"empty"` because no rank had rows, or `"refused"` because
            the server did not take the rows.
        message: A sentence for people.
    """

    layer: int
    step: int
    reason: LossReason
    message: str


Outcome = Version | Loss
