"""What one layer contributes to its two Kronecker factors: its rows.

A layer computes `s = W x̄`: `W` has shape `[d_out, d_in]` and `x̄` is the layer's
input with a 1 appended when the layer has a bias, so `d_in` counts the bias column.
`skfac.curvature.positions` says what becomes of several positions of a sample.

A grouped convolution has one such matrix for each group, and all shapes here have the
groups in front. An embedding is linear in one-hot inputs: its activation factor is
diagonal, and its activation rows are any rows whose squares add up to that diagonal.
"""

from typing import Protocol, get_args, runtime_checkable

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from skfac.curvature.convolution import (
    Convolution,
    TransposedConvolution,
    conv_geometry,
    conv_transpose_geometry,
)
from skfac.curvature.embedding import embedding_geometry
from skfac.curvature.linear import hf_conv1d_geometry, linear_geometry
from skfac.curvature.positions import Empty, Positions, new_memory

_HF_MODULES = ("transformers.pytorch_utils", "transformers.modeling_utils")
_SUPPORTED = {
    nn.Linear,
    nn.Embedding,
    *get_args(Convolution),
    *get_args(TransposedConvolution),
}
# Methods of the supported classes that decide what is computed.
_COMPUTING = ("forward", "_conv_forward", "_output_padding")


@runtime_checkable
class LayerGeometry(Protocol):
    """How a layer's inputs and output derivatives become rows.

    With `groups == 1` shapes have no dimension for the groups.
    """

    @property
    def kind(self) -> str:
        """The layer's type as it is declared to a server."""

    @property
    def groups(self) -> int:
        """Groups of channels, each with a weight matrix of its own."""

    @property
    def d_in(self) -> int:
        """Columns of a group's weight matrix, the bias column included."""

    @property
    def d_out(self) -> int:
        """Rows of a group's weight matrix."""

    @property
    def bias(self) -> bool:
        """Whether the last column of the weight matrix is the bias."""

    @property
    def diagonal(self) -> bool:
        """Whether the activation factor is diagonal."""

    def extents(self, outputs: Tensor) -> tuple[int, int]:
        """Count the samples of an output of the layer, and the positions of each."""

    def activation_rows(
        self, inputs: Tensor, positions: Positions, empty: Empty = new_memory
    ) -> Tensor:
        """Make rows `[*groups, n, d_in]` of the layer's input, in its dtype.

        They are new memory, made by `empty` where that saves a copy.

        A diagonal layer has rows `[m, d_in]` with any `m`: the squares in a column,
        added up and divided by the number of derivative rows, are an entry of the
        factor's diagonal.
        """

    def derivative_rows(
        self,
        derivatives: Tensor,
        positions: Positions,
        *,
        scale: float | Tensor,
        empty: Empty = new_memory,
    ) -> Tensor:
        """Make rows `[*groups, n, d_out]` of the loss gradient at the output.

        `scale` undoes the division that the loss did: the batch size for a loss that
        is a mean over the batch, 1 for a sum. It may be a tensor of no dimensions.
        """

    def to_matrix(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Join weight and bias to `[*groups, d_out, d_in]`; no bias if `bias` is False.

        Multiplied with the patch at a position it gives the output there.
        """

    def from_matrix(self, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        """Split a matrix into what has the shapes of weight and bias."""


def geometry_of(module: nn.Module) -> LayerGeometry | None:
    """Describe a layer that this project can precondition.

    Args:
        module: Any module. A bias that does not require gradients counts as none. A
            subclass of a supported class counts as it if it computes the same.

    Returns:
        Its geometry, or None if the module is not supported.
    """
    if not (_is_supported(module) and _owns_parameters(module)):
        return None
    bias = module.bias if hasattr(module, "bias") else None
    trains_bias = isinstance(bias, nn.Parameter) and bias.requires_grad
    if isinstance(module, nn.Linear):
        return linear_geometry(module, bias=trains_bias)
    if isinstance(module, nn.Embedding):
        return embedding_geometry(module)
    if isinstance(module, Convolution):
        return conv_geometry(module, bias=trains_bias)
    if isinstance(module, TransposedConvolution):
        return conv_transpose_geometry(module, bias=trains_bias)
    assert isinstance(module.weight, nn.Parameter)
    return hf_conv1d_geometry(module.weight, bias=trains_bias)


def _is_supported(module: nn.Module) -> bool:
    kind = type(module)
    for base in kind.__mro__:
        if base in _SUPPORTED or _is_hf_conv1d(base):
            return _computes_as(kind, base)
    return False


def _is_hf_conv1d(base: type) -> bool:
    # By name: transformers is not imported for it.
    return base.__name__ == "Conv1D" and base.__module__ in _HF_MODULES


def _computes_as(kind: type, base: type) -> bool:
    # torch's attention multiplies with the weight of its out_proj by itself.
    if issubclass(kind, NonDynamicallyQuantizableLinear):
        return False
    return all(getattr(kind, n, None) is getattr(base, n, None) for n in _COMPUTING)


def _owns_parameters(module: nn.Module) -> bool:
    # Not a weight that is computed from others (weight norm, pruning): its gradient
    # reaches those and not itself.
    if is_parametrized(module):
        return False  # before its weight is read, which may change it
    weight, bias = module.weight, getattr(module, "bias", None)
    return (
        isinstance(weight, nn.Parameter)
        and not is_lazy(weight)
        and weight.is_floating_point()
        and weight.numel() > 0
        and (bias is None or isinstance(bias, nn.Parameter))
    )
