"""Whether what a server sent can be applied to a layer at all."""

import math

from skfac.curvature.inverse import FactorInverse
from skfac.curvature.layer import LayerPreconditioner
from skfac.wire.session import LayerSpec


def is_usable(preconditioner: LayerPreconditioner, layer: LayerSpec) -> bool:
    """Check the shapes and numbers of both inverses.

    Returns:
        Whether they fit the layer and are finite, and the damping is positive.
    """
    return _fits(preconditioner.activations, layer, layer.d_in) and _fits(
        preconditioner.derivatives, layer, layer.d_out
    )


def _fits(inverse: FactorInverse, layer: LayerSpec, dim: int) -> bool:
    matrix = inverse.tensor
    groups = layer.block_shape
    if matrix.ndim != len(groups) + 2 or matrix.shape[:-2] != groups:
        return False
    if (inverse.dim, matrix.shape[-1]) != (dim, dim):
        return False
    # A sum is one pass; of finite inverses it is far from overflowing.
    return inverse.damping > 0 and math.isfinite(float(matrix.sum()))
