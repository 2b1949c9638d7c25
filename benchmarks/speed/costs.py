"""What a job costs a service, calculated from the shapes of its layers.

Per update, with `n` rows of a layer over all ranks, `d` columns of a side, and `r` rows
of what is sent back:

- up: each rank sends `n_rank (d_in + d_out)` numbers of a layer, float32;
- solve, of a side, `s = min(n, d)`: `2 s n d` for the Gram matrix of the smaller side
  (float64); then, below `d` rows, `s³/3 + s³/3` for the Cholesky factor and its inverse
  and `2 s² d` for `V`; from `d` rows on `d³` for the explicit inverse. Where a rank cap
  cuts `s` to `r`, first `9 s³` for the eigen-decomposition and `2 r s d` for the
  directions;
- down: each rank gets `r d` numbers of a side, float32, `r = min(n, d, cap)`.

Additions and multiplications count one each.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from skfac.wire.session import LayerSpec

_FLOAT_BYTES = 4  # on the wire


@dataclass(frozen=True, kw_only=True)
class Job:
    """What trains.

    Attributes:
        layers: Of the model.
        ranks: How many.
        rows: `n_rank`, rows of each layer that a rank sends for an update.
        cap: Most directions that an inverse keeps; None for no limit.
        update_every: Steps between updates.
        step_s: Seconds of a training step.
    """

    layers: Sequence[LayerSpec]
    ranks: int
    rows: int
    cap: int | None
    update_every: int
    step_s: float

    def kept(self, dim: int) -> int:
        """Count the rows of an inverse of a side of `dim` columns."""
        kept = min(self.ranks * self.rows, dim)
        return kept if self.cap is None else min(kept, self.cap)


@dataclass(frozen=True)
class Server:
    """What one server can do.

    Attributes:
        flops: Operations a second in float64, over a whole solve.
        bytes_per_s: Of its link, in each direction.
        layer_s: Seconds that a layer takes besides its operations.
    """

    flops: float
    bytes_per_s: float
    layer_s: float = 0.0

    def solve_s(self, flops: float) -> float:
        """Seconds of both inverses of a layer with so many operations."""
        return self.layer_s + flops / self.flops


def solve_flops(job: Job, layer: LayerSpec) -> float:
    """Count the operations of both inverses of a layer."""
    return sum(side_flops(job, dim) for dim in (layer.d_in, layer.d_out))


def side_flops(job: Job, dim: int) -> float:
    """Count the operations of one inverse."""
    rows, kept = job.ranks * job.rows, job.kept(dim)
    smaller = min(rows, dim)
    flops = 2.0 * smaller * rows * dim
    if kept < smaller:
        flops += 9.0 * smaller**3 + 2.0 * kept * smaller * dim + 2.0 * kept**2 * dim
    if kept < dim:
        return flops + 2 * kept**3 / 3 + 2.0 * kept**2 * dim
    return flops + float(dim) ** 3


def costs(job: Job, server: Server) -> dict[str, float | None]:
    """Calculate what a job costs.

    Returns:
        `up` and `down`, bytes of a rank a step; `down_share`, the latter over the bytes
        that a ring all-reduce of the gradients sends (twice the weights, float32);
        `solve_s`, seconds of one server for an update; `largest_s`, of the largest
        layer, which is not divided; `by_solving` and `by_link`, the servers that each
        of these needs to be done within `update_every` steps; `servers`, the greater
        of the two, None if one layer takes too long or there are more servers than
        layers.
    """
    budget_s = job.update_every * job.step_s
    flops = [solve_flops(job, layer) for layer in job.layers]
    dims = [dim for layer in job.layers for dim in (layer.d_in, layer.d_out)]
    up = sum(job.rows * dim for dim in dims) * _FLOAT_BYTES
    down = sum(job.kept(dim) * dim for dim in dims) * _FLOAT_BYTES
    weights = sum(layer.d_in * layer.d_out for layer in job.layers) * _FLOAT_BYTES
    times = list(map(server.solve_s, flops))
    solve_s, largest_s = sum(times), max(times)
    link_s = job.ranks * max(up, down) / server.bytes_per_s
    by_solving, by_link = (max(1, math.ceil(s / budget_s)) for s in (solve_s, link_s))
    servers = max(by_solving, by_link)
    possible = largest_s <= budget_s and servers <= len(job.layers)
    return {
        "up": up / job.update_every,
        "down": down / job.update_every,
        "down_share": down / job.update_every / (2 * weights),
        "solve_s": solve_s,
        "largest_s": largest_s,
        "by_solving": by_solving,
        "by_link": by_link,
        "servers": servers if possible else None,
    }
