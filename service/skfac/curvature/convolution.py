"""Rows of convolutions of one to three dimensions, grouped and transposed ones too.

A convolution multiplies its weight matrix with a patch of its input at each output
position. Along one direction, kernel entry `k` of output `o` meets the input at
`stride · o + dilation · k - padding`. A transposed convolution has input and output the
other way round: `o = stride · i + dilation · k - padding`, and where no such `i` exists
the patch has a zero.

Both are linear in `o` and `i`, which is why nothing is ever padded with zeros, stuffed
with zeros or unfolded here: what an entry of the kernel meets over all positions is a
strided slice of the input, and its mean separates into the directions.

Source: Grosse & Martens, "A Kronecker-factored approximate Fisher matrix for
convolution layers", ICML 2016 (patches). Deviation: each group of a grouped convolution
is a layer of its own, with factors of its own.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from skfac.curvature.positions import (
    Empty,
    Positions,
    new_memory,
    sum_rows,
    with_bias_column,
)

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]
Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
TransposedConvolution = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One direction of a convolution.

    Attributes:
        kernel: Entries of the kernel.
        stride: As torch means it.
        dilation: As torch means it.
        before: Zeros in front of the input; outputs cut off there if transposed.
        after: The same behind it; may be negative if transposed.
        transposed: Whether the stride is that of the input over the output.
    """

    kernel: int
    stride: int
    dilation: int
    before: int
    after: int
    transposed: bool = False

    def outputs(self, extent: int) -> int:
        """Count the outputs for an input of this extent.

        Returns:
            At least 1 for what torch accepts.
        """
        span = self.dilation * (self.kernel - 1) + 1
        padding = self.before + self.after
        if self.transposed:
            return (extent - 1) * self.stride + span - padding
        return (extent + padding - span) // self.stride + 1

    def met(self, entry: int, extent: int) -> slice:
        """Find which inputs a kernel entry meets, over all outputs.

        Returns:
            A slice of the input, shorter than the outputs where padding is met.
        """
        # coarse · stride + shift = fine
        shift = self.dilation * entry - self.before
        fine, coarse = extent, self.outputs(extent)
        if self.transposed:
            fine, coarse = coarse, fine
        first = max(0, -(shift // self.stride))
        last = min(coarse - 1, (fine - 1 - shift) // self.stride)
        if last < first:
            return slice(0, 0)
        if self.transposed:
            return slice(first, last + 1)
        return slice(
            first * self.stride + shift, last * self.stride + shift + 1, self.stride
        )

    def sources(
        self, outputs: Int[Tensor, " p"], extent: int
    ) -> Int[Tensor, "p kernel"]:
        """Find the input that each kernel entry meets at some outputs.

        Returns:
            Its index, or -1 where the patch has a zero.
        """
        shifts = torch.arange(self.kernel, device=outputs.device) * self.dilation
        shifts -= self.before
        if not self.transposed:
            index = outputs[:, None] * self.stride + shifts
            return index.masked_fill((index < 0) | (index >= extent), -1)
        fine = outputs[:, None] - shifts
        index = torch.div(fine, self.stride, rounding_mode="floor")
        between = fine % self.stride != 0
        return index.masked_fill(between | (index < 0) | (index >= extent), -1)


@dataclass(frozen=True, kw_only=True)
class ConvGeometry:
    """A convolution on inputs `[channels, *space]` or `[batch, channels, *space]`.

    Attributes:
        d_in: Columns of a group's weight matrix: channels of the group · entries of
            the kernel, plus 1 with a bias.
        d_out: Output channels of a group.
        bias: Whether the layer has a bias.
        groups: Groups of channels.
        axes: One for each direction.
        border: How much is padded with something else than zeros, as
            `torch.nn.functional.pad` takes it; empty for zeros, which `axes` know of.
        padding_mode: What the border is filled with.
    """

    d_in: int
    d_out: int
    bias: bool
    groups: int
    axes: tuple[Axis, ...]
    border: tuple[int, ...] = ()
    padding_mode: PaddingMode = "zeros"

    @property
    def kind(self) -> str:
        """Such as "conv2d" or "conv_transpose3d"."""
        name = "conv_transpose" if self._transposed else "conv"
        return f"{name}{len(self.axes)}d"

    @property
    def diagonal(self) -> bool:
        """Never."""
        return False

    def extents(
        self, outputs: Float[Tensor, "*batch_channels_space"]
    ) -> tuple[int, int]:
        """Count the samples of an output, and the positions of each.

        Returns:
            Both.
        """
        batch = self._batched(outputs)
        return batch.shape[0], math.prod(batch.shape[2:])

    def activation_rows(
        self,
        inputs: Float[Tensor, "*batch_channels_space"],
        positions: Positions,
        empty: Empty = new_memory,
    ) -> Float[Tensor, "*groups n d_in"]:
        """Make rows of the patches at the output positions.

        Returns:
            One row per sample, or per sample and kept position; entries are ordered as
            in `to_matrix`.

        Raises:
            ValueError: If the positions are not those of the output that such an input
                has without further arguments.
        """
        images = self._batched(inputs)
        if self.border:
            images = nn.functional.pad(images, self.border, mode=self.padding_mode)
        grid = self._grid(images)
        count = math.prod(grid)
        if positions.count not in (None, count):
            raise ValueError(
                f"A {self.kind} with {positions.count} output positions should have "
                f"{count} on an input of shape {tuple(inputs.shape)}: calls with "
                "output_size=... are not supported. Name the layer in skip=(...)."
            )
        if positions.reduction in ("reduce", "authors"):
            rows = self._by_group(self._mean_patch(images))
            return with_bias_column(rows, self.bias, empty)
        picked = torch.arange(count) if positions.picked is None else positions.picked
        patches = self._patches(images, picked.to(images.device), grid)
        return with_bias_column(self._by_group(patches), self.bias) * math.sqrt(count)

    def derivative_rows(
        self,
        derivatives: Float[Tensor, "*batch_channels_space"],
        positions: Positions,
        *,
        scale: float | Float[Tensor, ""],
        empty: Empty = new_memory,
    ) -> Float[Tensor, "*groups n d_out"]:
        """Make rows of the output positions, times `scale`.

        Returns:
            As many rows as there are of activations.
        """
        values = self._batched(derivatives).flatten(2).transpose(1, 2)
        return self._by_group(sum_rows(values, positions, scale, empty))

    def to_matrix(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Join weight `[*stack, first, second, *kernel]` and bias `[*stack, channels]`.

        Returns:
            `[*stack, *groups, d_out, d_in]` with the bias in the last column; a view of
            the weight if there is none and the memory allows.
        """
        assert (bias is not None) == self.bias
        at = weight.ndim - 2 - len(self.axes)
        first = weight.shape[at]
        matrix = torch.unflatten(weight, at, (self.groups, first // self.groups))
        if self._transposed:
            matrix = matrix.transpose(at + 1, at + 2)
        matrix = matrix.flatten(at + 2)
        if bias is not None:
            column = torch.unflatten(bias, -1, (self.groups, self.d_out))[..., None]
            matrix = torch.cat([matrix, column], -1)
        return matrix.squeeze(at) if self.groups == 1 else matrix

    def from_matrix(self, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        """Split what `to_matrix` returns into weight and bias.

        Returns:
            Views where the memory allows.
        """
        blocks = matrix.unsqueeze(-3) if self.groups == 1 else matrix
        at = blocks.ndim - 3
        columns = blocks[..., :-1] if self.bias else blocks
        weight = torch.unflatten(
            columns, -1, (-1, *(axis.kernel for axis in self.axes))
        )
        if self._transposed:
            weight = weight.transpose(at + 1, at + 2)
        bias = blocks[..., -1].flatten(at) if self.bias else None
        return weight.flatten(at, at + 1), bias

    @property
    def _transposed(self) -> bool:
        return self.axes[0].transposed

    def _batched(self, images: Tensor) -> Tensor:
        return images if images.ndim == len(self.axes) + 2 else images[None]

    def _grid(self, images: Tensor) -> list[int]:
        sides = zip(self.axes, images.shape[2:], strict=True)
        return [axis.outputs(extent) for axis, extent in sides]

    def _by_group(
        self, rows: Float[Tensor, "n columns"]
    ) -> Float[Tensor, "*groups n d"]:
        if self.groups == 1:
            return rows.contiguous()
        count, columns = rows.shape
        blocks = rows.reshape(count, self.groups, columns // self.groups)
        return blocks.transpose(0, 1).contiguous()

    def _mean_patch(
        self, images: Float[Tensor, "batch channels *space"]
    ) -> Float[Tensor, "batch entries"]:
        means = images
        for axis, extent in zip(self.axes, images.shape[2:], strict=True):
            slices = (axis.met(entry, extent) for entry in range(axis.kernel))
            sums = [means[:, :, inputs].sum(2) for inputs in slices]
            # Each direction goes from the front of the space to the end of the kernel.
            means = torch.stack(sums, -1) / axis.outputs(extent)
        return means.flatten(1)

    def _patches(
        self,
        images: Float[Tensor, "batch channels *space"],
        picked: Int[Tensor, " p"],
        grid: list[int],
    ) -> Float[Tensor, "n entries"]:
        flat, inside = self._sources(images, picked, grid)
        index = flat.flatten().expand(*images.shape[:2], -1)
        values = images.flatten(2).gather(2, index)
        patches = values.reshape(*images.shape[:2], *flat.shape)
        patches = patches.masked_fill_(~inside, 0).transpose(1, 2)
        return patches.flatten(2).flatten(0, 1)

    def _sources(
        self, images: Tensor, picked: Int[Tensor, " p"], grid: list[int]
    ) -> tuple[Int[Tensor, "p kernel"], Bool[Tensor, "p kernel"]]:
        # Flat indices into the space of the input, and where they mean something.
        flat = picked.new_zeros(len(picked), 1)
        inside = torch.ones_like(flat, dtype=torch.bool)
        outputs = torch.unravel_index(picked, grid)
        sides = zip(self.axes, images.shape[2:], outputs, strict=True)
        for axis, extent, output in sides:
            source = axis.sources(output, extent)[:, None]
            flat = (flat[..., None] * extent + source).flatten(1)
            inside = (inside[..., None] & (source >= 0)).flatten(1)
        return flat.where(inside, 0), inside


def conv_geometry(module: Convolution, *, bias: bool) -> ConvGeometry:
    """Describe a convolution.

    Returns:
        Its geometry.
    """
    channels, columns, *kernel = module.weight.shape
    padding = list(_paddings(module))
    border: list[int] = []
    if module.padding_mode != "zeros":
        # torch pads the last direction first.
        border = [side for pair in reversed(padding) for side in pair]
        padding = [(0, 0)] * len(kernel)
    axes = (
        Axis(kernel=k, stride=s, dilation=d, before=before, after=after)
        for k, s, d, (before, after) in zip(
            kernel, module.stride, module.dilation, padding, strict=True
        )
    )
    return ConvGeometry(
        d_in=columns * math.prod(kernel) + bias,
        d_out=channels // module.groups,
        bias=bias,
        groups=module.groups,
        axes=tuple(axes),
        border=tuple(border),
        padding_mode=module.padding_mode,
    )


def conv_transpose_geometry(
    module: TransposedConvolution, *, bias: bool
) -> ConvGeometry:
    """Describe a transposed convolution.

    Returns:
        Its geometry.
    """
    channels, d_out, *kernel = module.weight.shape
    assert not isinstance(module.padding, str)
    sides = zip(
        kernel,
        module.stride,
        module.dilation,
        module.padding,
        module.output_padding,
        strict=True,
    )
    axes = (
        Axis(kernel=k, stride=s, dilation=d, before=p, after=p - extra, transposed=True)
        for k, s, d, p, extra in sides
    )
    return ConvGeometry(
        d_in=channels // module.groups * math.prod(kernel) + bias,
        d_out=d_out,
        bias=bias,
        groups=module.groups,
        axes=tuple(axes),
    )


def _paddings(module: Convolution) -> Iterator[tuple[int, int]]:
    kernel = module.weight.shape[2:]
    for axis, size in enumerate(kernel):
        if module.padding == "same":
            # An odd total goes behind the input, as torch does it.
            total = module.dilation[axis] * (size - 1)
            yield total // 2, total - total // 2
        elif isinstance(module.padding, str):
            yield 0, 0
        else:
            yield module.padding[axis], module.padding[axis]
