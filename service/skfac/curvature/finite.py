"""Whether all numbers of a tensor are finite, in one pass in nearly all cases.

A sum has a NaN or an infinity if a term has: a finite sum is proof, at a tenth of the
time that `isfinite` takes. Finite terms can overflow; then the terms are looked at.
"""

import math
from collections.abc import Sequence

from torch import Tensor

from skfac.curvature.stacks import faster_on, in_stacks, read_numbers


def all_finite(tensor: Tensor) -> bool:
    """Check a tensor for NaN and infinities.

    Returns:
        Whether it has none.
    """
    return _all_finite(tensor, float(tensor.sum()))


def are_finite(tensors: Sequence[Tensor]) -> list[bool]:
    """Check tensors of one device as `all_finite` does, waiting for a GPU once.

    Returns:
        Of each whether it has none.
    """
    if not tensors or not faster_on(tensors[0].device):
        return [all_finite(tensor) for tensor in tensors]
    flat = [tensor.reshape(-1) for tensor in tensors]
    sums = in_stacks(lambda one: (one.sum(-1).double(),), flat)
    totals = read_numbers([total for (total,) in sums])
    return [
        _all_finite(one, *total) for one, total in zip(tensors, totals, strict=True)
    ]


def _all_finite(tensor: Tensor, total: float) -> bool:
    return math.isfinite(total) or bool(tensor.isfinite().all())
