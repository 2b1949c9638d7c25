"""What one layer contributes to its two Kronecker factors: its rows.

A layer computes `s = W x̄`: `W` has shape `[d_out, d_in]` and `x̄` is the layer's
input with a 1 appended when the layer has a bias, so `d_in` counts the bias column.
A layer that uses its weight at several positions of a sample (the pixels of a
convolution, the tokens of a sequence) is reduced to one row a sample: the mean over
positions of `x̄` and the sum over positions of the derivative. That is exact for a
linear network wherever the derivative is the same at every position, as it is below a
mean or sum over positions; in front of a further convolution that cuts borders or
strides it is an approximation.

Sources: Grosse & Martens, "A Kronecker-factored approximate Fisher matrix for
convolution layers", ICML 2016 (patches); Eschenhagen et al., "Kronecker-Factored
Approximate Curvature for Modern Neural Network Architectures", NeurIPS 2023 (the
`reduce` setting).
"""

import math
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


@runtime_checkable
class LayerGeometry(Protocol):
    """How a layer's inputs and output derivatives become rows."""

    @property
    def kind(self) -> str:
        """The layer's type as it is declared to a server."""

    @property
    def d_in(self) -> int:
        """Columns of the weight matrix, the bias column included."""

    @property
    def d_out(self) -> int:
        """Rows of the weight matrix."""

    @property
    def bias(self) -> bool:
        """Whether the last column of the weight matrix is the bias."""

    def activation_rows(self, inputs: Tensor) -> Tensor:
        """Reduce the layer's input to rows of shape `[batch, d_in]`."""

    def derivative_rows(self, derivatives: Tensor, *, scale: float) -> Tensor:
        """Reduce the loss gradient at the output to rows `[batch, d_out]`.

        `scale` undoes the division that the loss did: the batch size for a loss that
        is a mean over the batch, 1 for a sum.
        """


@dataclass(frozen=True, kw_only=True)
class LinearGeometry:
    """`nn.Linear` on inputs `[batch, *positions, features]` or `[features]`."""

    d_in: int
    d_out: int
    bias: bool
    kind: Literal["linear"] = "linear"

    def activation_rows(
        self, inputs: Float[Tensor, "*batch_positions features"]
    ) -> Float[Tensor, "batch d_in"]:
        """Average over positions and append the bias column.

        Returns:
            One row per sample.
        """
        return _with_bias_column(_by_sample(inputs).mean(1), self.bias)

    def derivative_rows(
        self, derivatives: Float[Tensor, "*batch_positions d_out"], *, scale: float
    ) -> Float[Tensor, "batch d_out"]:
        """Sum over positions, times `scale`.

        Returns:
            One row per sample.
        """
        return _by_sample(derivatives).sum(1) * scale


@dataclass(frozen=True, kw_only=True)
class Conv2dGeometry:
    """An ungrouped `nn.Conv2d` on inputs `[batch, channels, height, width]`.

    Attributes:
        d_in: channels · kernel height · kernel width, plus 1 with a bias.
        d_out: Output channels.
        bias: Whether the layer has a bias.
        kernel: Kernel height and width.
        stride: Vertical and horizontal stride.
        dilation: Vertical and horizontal dilation.
        padding: Left, right, top and bottom padding in pixels.
        padding_mode: What fills the padding, as in `nn.Conv2d`.
    """

    d_in: int
    d_out: int
    bias: bool
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    padding: tuple[int, int, int, int]
    padding_mode: PaddingMode = "zeros"
    kind: Literal["conv2d"] = "conv2d"

    def activation_rows(
        self, inputs: Float[Tensor, "*batch channels height width"]
    ) -> Float[Tensor, "rows d_in"]:
        """Average the input patches over all output positions.

        The mean of a patch entry is the mean of a strided window of the input, and
        it separates into the two directions, so no patch is ever formed.

        Returns:
            One row per sample, entries ordered as in the flattened weight.
        """
        images = inputs.reshape(-1, *inputs.shape[-3:])
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        padded = nn.functional.pad(images, self.padding, mode=mode)
        columns = self._window_means(padded, dim=3, axis=1)
        patches = self._window_means(columns, dim=2, axis=0).transpose(2, 3)
        return _with_bias_column(patches.flatten(1), self.bias)

    def derivative_rows(
        self,
        derivatives: Float[Tensor, "*batch d_out height width"],
        *,
        scale: float,
    ) -> Float[Tensor, "rows d_out"]:
        """Sum over output positions, times `scale`.

        Returns:
            One row per sample.
        """
        return derivatives.reshape(-1, *derivatives.shape[-3:]).sum((2, 3)) * scale

    def _window_means(self, images: Tensor, *, dim: int, axis: int) -> Tensor:
        # Replaces `dim` by a last dimension with one mean per kernel offset.
        kernel, stride = self.kernel[axis], self.stride[axis]
        dilation = self.dilation[axis]
        span = dilation * (kernel - 1) + 1
        positions = (images.shape[dim] - span) // stride + 1
        reach = stride * (positions - 1) + 1
        index = [slice(None)] * images.ndim
        means = []
        for offset in range(0, span, dilation):
            index[dim] = slice(offset, offset + reach, stride)
            means.append(images[tuple(index)].mean(dim))
        return torch.stack(means, dim=-1)


def geometry_of(module: nn.Module) -> LayerGeometry | None:
    """Describe a layer that this project can precondition.

    Args:
        module: Any module. A bias that does not require gradients counts as none.

    Returns:
        Its geometry, or None if the module is not supported.
    """
    if type(module) is nn.Linear:
        bias = _trains_bias(module)
        return LinearGeometry(
            d_in=module.in_features + bias, d_out=module.out_features, bias=bias
        )
    if type(module) is nn.Conv2d and module.groups == 1:
        return _conv2d_geometry(module)
    return None


def _conv2d_geometry(module: nn.Conv2d) -> Conv2dGeometry:
    kernel, dilation = _pair(module.kernel_size), _pair(module.dilation)
    if module.padding == "same":
        # An odd total goes to the right and bottom, as torch does it.
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        top, left = (total // 2 for total in totals)
        padding = (left, totals[1] - left, top, totals[0] - top)
    elif isinstance(module.padding, str):
        padding = (0, 0, 0, 0)
    else:
        vertical, horizontal = _pair(module.padding)
        padding = (horizontal, horizontal, vertical, vertical)
    bias = _trains_bias(module)
    return Conv2dGeometry(
        d_in=module.in_channels * kernel[0] * kernel[1] + bias,
        d_out=module.out_channels,
        bias=bias,
        kernel=kernel,
        stride=_pair(module.stride),
        dilation=dilation,
        padding=padding,
        padding_mode=module.padding_mode,
    )


def _trains_bias(module: nn.Linear | nn.Conv2d) -> bool:
    return module.bias is not None and module.bias.requires_grad


def _pair(values: tuple[int, ...]) -> tuple[int, int]:
    first, second = values
    return first, second


def _by_sample(values: Tensor) -> Float[Tensor, "batch positions features"]:
    if values.ndim == 1:
        return values.reshape(1, 1, -1)
    # A named extent, not -1: an empty batch must keep its shape.
    positions = math.prod(values.shape[1:-1])
    return values.reshape(values.shape[0], positions, values.shape[-1])


def _with_bias_column(rows: Tensor, bias: bool) -> Tensor:
    return torch.cat([rows, rows.new_ones(rows.shape[0], 1)], 1) if bias else rows
