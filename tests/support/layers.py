"""Every kind of layer that is supported, and slow, obvious references for its rows.

The patch at an output position is the derivative of the output there for the weights of
its channel: autograd knows it for every kind of layer.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests.support.dense import normal

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class Conv1D(nn.Module):
    """Stands in for Hugging Face's class of this name: `y = x W + b`."""

    def __init__(self, nf: int, nx: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs @ self.weight + self.bias


Conv1D.__module__ = "transformers.pytorch_utils"


@dataclass(frozen=True, eq=False)
class Case:
    """A layer in float64 and an input for it.

    Attributes:
        make: Builds the layer; takes whether it has a bias.
        shape: Of the input; an embedding takes tokens of this shape.
    """

    make: Callable[[bool], nn.Module]
    shape: tuple[int, ...]

    def build(self, *, bias: bool) -> tuple[nn.Module, Tensor]:
        """The layer and its input."""
        module = self.make(bias).double()
        if not isinstance(module, nn.Embedding):
            return module, normal(*self.shape)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(module.num_embeddings, self.shape, generator=generator)
        return module, tokens


def _hf_conv1d(bias: bool) -> nn.Module:
    module = Conv1D(3, 5)
    module.bias.requires_grad_(bias)
    return module


def _linear(bias: bool) -> nn.Module:
    return nn.Linear(5, 3, bias=bias)


def _conv(kind: type[nn.Module], *sizes: object, **options: object) -> Callable:
    return lambda bias: kind(*sizes, **options, bias=bias)


CASES: dict[str, Case] = {
    "linear, vector": Case(_linear, (5,)),
    "linear": Case(_linear, (4, 5)),
    "linear, tokens": Case(_linear, (4, 3, 5)),
    "linear, grid": Case(_linear, (4, 3, 2, 5)),
    "hf_conv1d": Case(_hf_conv1d, (4, 5)),
    "hf_conv1d, tokens": Case(_hf_conv1d, (4, 3, 5)),
    "conv1d": Case(_conv(nn.Conv1d, 2, 3, 3, stride=2, padding=1), (3, 2, 8)),
    "conv1d, causal": Case(
        _conv(nn.Conv1d, 2, 2, 2, padding=3, dilation=3, groups=2), (3, 2, 7)
    ),
    "conv1d, same": Case(
        _conv(nn.Conv1d, 2, 3, 4, padding="same", padding_mode="reflect"), (3, 2, 7)
    ),
    "conv2d": Case(
        _conv(nn.Conv2d, 2, 3, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
        (3, 2, 6, 5),
    ),
    "conv2d, unbatched": Case(_conv(nn.Conv2d, 2, 3, (3, 2)), (2, 4, 5)),
    "conv2d, beyond the image": Case(
        _conv(nn.Conv2d, 1, 2, 2, padding=4, stride=3, dilation=2), (2, 1, 2, 3)
    ),
    "conv2d, grouped": Case(
        _conv(nn.Conv2d, 4, 6, (2, 3), groups=2, stride=2, padding=1), (3, 4, 5, 6)
    ),
    "conv2d, depthwise": Case(
        _conv(nn.Conv2d, 3, 3, 3, groups=3, padding="same"), (2, 3, 4, 5)
    ),
    "conv2d, depth multiplier": Case(
        _conv(nn.Conv2d, 2, 6, 2, groups=2, padding_mode="circular", padding=(1, 0)),
        (2, 2, 4, 3),
    ),
    "conv3d": Case(
        _conv(
            nn.Conv3d, 2, 3, (2, 1, 3), stride=(1, 2, 2), padding=(1, 0, 2), groups=1
        ),
        (2, 2, 3, 4, 3),
    ),
    "conv3d, grouped": Case(
        _conv(
            nn.Conv3d, 2, 4, (1, 2, 2), groups=2, padding=1, padding_mode="replicate"
        ),
        (2, 2, 2, 3, 2),
    ),
    "conv_transpose1d": Case(
        _conv(nn.ConvTranspose1d, 2, 3, 3, stride=2, padding=1, output_padding=1),
        (3, 2, 5),
    ),
    "conv_transpose2d": Case(
        _conv(
            nn.ConvTranspose2d,
            2,
            3,
            (2, 3),
            stride=(3, 1),
            padding=(0, 2),
            output_padding=(2, 1),
            dilation=(1, 2),
        ),
        (2, 2, 3, 4),
    ),
    "conv_transpose2d, unbatched": Case(
        _conv(nn.ConvTranspose2d, 2, 3, (2, 3), stride=2), (2, 2, 3)
    ),
    "conv_transpose2d, grouped": Case(
        _conv(nn.ConvTranspose2d, 4, 6, 3, groups=2, stride=(2, 3), padding=1),
        (2, 4, 3, 2),
    ),
    "conv_transpose2d, depthwise": Case(
        _conv(nn.ConvTranspose2d, 3, 3, (2, 1), groups=3, stride=2), (2, 3, 2, 3)
    ),
    "conv_transpose3d": Case(
        _conv(nn.ConvTranspose3d, 2, 2, (2, 1, 2), stride=(1, 2, 2), padding=(1, 0, 0)),
        (2, 2, 2, 2, 2),
    ),
    "embedding, one token": Case(lambda bias: nn.Embedding(5, 3), (4,)),
    "embedding": Case(lambda bias: nn.Embedding(5, 3), (4, 6)),
    "embedding, padded": Case(lambda bias: nn.Embedding(5, 3, padding_idx=2), (4, 6)),
    "embedding, grid": Case(lambda bias: nn.Embedding(5, 3), (4, 2, 3)),
}
"""Layers and input shapes by name."""

CASES_AND_BIAS = [
    (name, bias)
    for name in CASES
    for bias in (True, False)
    if not (bias and name.startswith("embedding"))
]
"""Names of cases with each bias that they can have."""


def trained(module: nn.Module) -> dict[str, Tensor]:
    """The parameters that train, by name."""
    return {n: p for n, p in module.named_parameters() if p.requires_grad}


def joined(module: nn.Module, parameters: dict[str, Tensor]) -> Tensor:
    """`[groups, d_out, d_in]` from a layer's parameters or their gradients."""
    weight, bias = parameters["weight"], parameters.get("bias")
    groups = getattr(module, "groups", 1)
    if isinstance(module, (Conv1D, nn.Embedding)):
        weight = weight.T
    blocks = list(weight.chunk(groups))
    if isinstance(module, TRANSPOSED):
        blocks = [block.transpose(0, 1) for block in blocks]
    matrix = torch.stack([block.flatten(1) for block in blocks])
    if bias is None:
        return matrix
    return torch.cat([matrix, torch.stack(bias.chunk(groups))[..., None]], 2)


def by_position(module: nn.Module, outputs: Tensor) -> Tensor:
    """Outputs, or what has their shape, as `[groups, batch, positions, d_out]`."""
    if isinstance(module, (*CONVS, *TRANSPOSED)):
        spatial = len(module.kernel_size)
        outputs = outputs if outputs.ndim == spatial + 2 else outputs[None]
        outputs = outputs.movedim(1, -1)
    elif outputs.ndim == 1:
        outputs = outputs[None]
    batch, channels = outputs.shape[0], outputs.shape[-1]
    values = outputs.reshape(batch, math.prod(outputs.shape[1:-1]), channels)
    return torch.stack(values.chunk(getattr(module, "groups", 1), dim=2))


def patches(module: nn.Module, inputs: Tensor) -> Tensor:
    """What `[W | b]` multiplies at each position: `[groups, batch, positions, d_in]`.

    Taken from the derivative of the first output channel of each group.
    """

    def first_channels(parameters: dict[str, Tensor]) -> Tensor:
        outputs = torch.func.functional_call(module, parameters, (inputs,))
        return by_position(module, outputs)[..., 0]

    parameters = {name: p.detach() for name, p in trained(module).items()}
    jacobian = torch.func.jacrev(first_channels)(parameters)
    groups = jacobian["weight"].shape[0]
    samples = jacobian["weight"].shape[1:3]
    flat = {name: value.flatten(0, 2) for name, value in jacobian.items()}
    matrices = torch.stack(
        [
            joined(module, dict(zip(flat, values, strict=True)))
            for values in zip(*flat.values(), strict=True)
        ]
    )
    # [group of the output, batch, position, group of the weight, d_out, d_in]
    matrices = matrices.unflatten(0, (groups, *samples))
    return torch.stack([matrices[g, :, :, g, 0] for g in range(groups)])


def unfolded(module: nn.Conv2d, images: Tensor) -> Tensor:
    """The same as `patches`, by `unfold`, without the column of the bias.

    Padding is torch's own resolution of it, not the library's.
    """
    padded = nn.functional.pad(
        images,
        module._reversed_padding_repeated_twice,
        mode="constant" if module.padding_mode == "zeros" else module.padding_mode,
    )
    columns = nn.functional.unfold(
        padded,
        kernel_size=module.kernel_size,
        dilation=module.dilation,
        stride=module.stride,
    ).transpose(1, 2)
    return torch.stack(columns.chunk(module.groups, dim=2))


def reference_rows(
    values: Tensor, side: str, reduction: str, picked: Tensor | None
) -> Tensor:
    """The table of modes, sample by sample; `values` as `by_position` gives them."""
    count = values.shape[2]
    at = range(count) if picked is None else picked.tolist()
    blocks = []
    for samples in values:
        rows = []
        for sample in samples:
            if reduction in ("reduce", "authors"):
                total = torch.stack([sample[s] for s in at]).sum(0)
                summed = side == "derivatives" and reduction == "reduce"
                rows.append(total if summed else total / count)
            else:
                scale = count**0.5 if side == "activations" else 1.0
                rows += [scale * sample[s] for s in at]
        blocks.append(torch.stack(rows))
    return torch.stack(blocks) if len(blocks) > 1 else blocks[0]
