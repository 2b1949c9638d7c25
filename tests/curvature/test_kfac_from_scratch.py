"""K-FAC from the library's rows against exact curvature, where the two must agree.

Source: Dangel et al., "Kronecker-factored Approximate Curvature (KFAC) From Scratch",
arXiv 2507.05127: every case below is one where K-FAC is known to be exact.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from skfac.curvature.geometry import LayerGeometry
from skfac.curvature.positions import Positions, Reduction
from tests.support.curvature import (
    Loss,
    diagonal_blocks,
    divisor,
    empirical_fisher_block,
    ggn_block,
    hessian_roots,
)
from tests.support.dense import geometry_for, normal, relative_error

Curvature = Callable[[nn.Module, str, Tensor, Tensor, Loss], Tensor]
Kfac = Callable[[nn.Module, str, tuple[Tensor, Tensor], Loss, Reduction], Tensor]

EXACT = 1e-9
BIAS = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
REDUCTION = pytest.mark.parametrize("reduction", ["mean", "sum"])
POOL = pytest.mark.parametrize("pool", [torch.mean, torch.sum], ids=["mean", "sum"])


MODE = pytest.mark.parametrize("mode", ["reduce", "expand"])


class Pool(nn.Module):
    """The mean or the sum over the given dimensions."""

    def __init__(self, pool: Callable[..., Tensor], dims: tuple[int, ...]):
        super().__init__()
        self.pool, self.dims = pool, dims

    def forward(self, outputs: Tensor) -> Tensor:
        return self.pool(outputs, self.dims)


@dataclass(frozen=True, eq=False)
class Recording:
    """One forward pass as a layer saw it."""

    geometry: LayerGeometry
    inputs: Tensor
    outputs: Tensor
    predictions: Tensor

    def blocks(self, vectors: list[Tensor], loss: Loss, reduction: Reduction) -> Tensor:
        """`G ⊗ A` of each group, where G sums over `vectors`, both average over rows.

        Each vector is a derivative of the per-sample losses for the predictions. It
        is divided by what the loss divides by, as in a training step; `scale` must
        undo that. A factor is `XᵀX / rows` and every vector brings as many rows, so
        the factors are added up over the vectors.
        The block is that of the mean of the per-sample losses; a loss that adds them
        has `batch` times that curvature.
        """
        batch, scale = len(self.predictions), divisor(loss, len(self.predictions))
        positions, factors = Positions(reduction, None), []
        for vector in vectors:
            (derivatives,) = torch.autograd.grad(
                self.predictions, self.outputs, vector / scale, retain_graph=True
            )
            rows = self.geometry.derivative_rows(derivatives, positions, scale=scale)
            factors.append(_by_group(rows.mT @ rows / rows.shape[-2]))
        columns = self.geometry.activation_rows(self.inputs.detach(), positions)
        product = columns.mT @ columns
        if self.geometry.diagonal:
            product = product.diagonal().diag()
        summed = torch.stack(factors).sum(0)
        pairs = zip(summed, _by_group(product / rows.shape[-2]), strict=True)
        return torch.stack([torch.kron(g, a) for g, a in pairs]) * (batch / scale)


def _by_group(factor: Tensor) -> Tensor:
    return factor if factor.ndim == 3 else factor[None]


def record(model: nn.Module, layer: str, inputs: Tensor) -> Recording:
    module, seen = model.get_submodule(layer), []
    with module.register_forward_hook(lambda _, args, out: seen.append((args[0], out))):
        predictions = model(inputs)
    ((layer_inputs, layer_outputs),) = seen
    return Recording(geometry_for(module), layer_inputs, layer_outputs, predictions)


def type2_kfac(
    model: nn.Module,
    layer: str,
    batch: tuple[Tensor, Tensor],
    loss: Loss,
    reduction: Reduction,
) -> Tensor:
    """K-FAC of the GGN: backpropagate the columns of the loss Hessian's root."""
    inputs, targets = batch
    recording = record(model, layer, inputs)
    roots = hessian_roots(loss, recording.predictions.detach(), targets)
    vectors = [root.reshape(recording.predictions.shape) for root in roots.unbind(-1)]
    return recording.blocks(vectors, loss, reduction)


def empirical_kfac(
    model: nn.Module,
    layer: str,
    batch: tuple[Tensor, Tensor],
    loss: Loss,
    reduction: Reduction,
) -> Tensor:
    """K-FAC of the empirical Fisher: backpropagate the gradient of the loss."""
    inputs, targets = batch
    recording = record(model, layer, inputs)
    predictions = recording.predictions.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(predictions, targets), predictions)
    vectors = [gradient * divisor(loss, len(inputs))]
    return recording.blocks(vectors, loss, reduction)


def weighted_layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if hasattr(module, "weight")]


def layer_errors(
    kfac: Kfac,
    exact: Curvature,
    model: nn.Module,
    batch: tuple[Tensor, Tensor],
    loss: Loss,
    reduction: Reduction = "reduce",
) -> dict[str, float]:
    """Relative error of the K-FAC blocks of every layer, by name.

    The blocks of a grouped layer are those on the diagonal.
    """
    errors = {}
    for layer in weighted_layers(model):
        blocks = kfac(model, layer, batch, loss, reduction)
        whole = exact(model, layer, *batch, loss)
        errors[layer] = relative_error(blocks, diagonal_blocks(whole, len(blocks)))
    return errors


def linear_net(
    *dims: int, bias: bool, between: nn.Module | None = None
) -> nn.Sequential:
    layers: list[nn.Module] = []
    for d_in, d_out in pairwise(dims):
        layers.append(nn.Linear(d_in, d_out, bias=bias, dtype=torch.float64))
        layers.extend([between] if between and d_out != dims[-1] else [])
    return nn.Sequential(*layers)


@BIAS
@REDUCTION
@MODE
@pytest.mark.parametrize(
    ("loss_type", "target"),
    [
        (nn.MSELoss, normal(1, 2, seed=7)),
        (nn.CrossEntropyLoss, torch.tensor([1])),
    ],
    ids=["mse", "cross-entropy"],
)
@pytest.mark.parametrize(
    ("kfac", "exact"),
    [(type2_kfac, ggn_block), (empirical_kfac, empirical_fisher_block)],
    ids=["type-2", "empirical"],
)
def test_one_datum_is_exact(kfac, exact, loss_type, target, mode, reduction, bias):
    model = linear_net(5, 4, 4, 2, bias=bias, between=nn.Tanh())
    loss = loss_type(reduction=reduction)

    errors = layer_errors(kfac, exact, model, (normal(1, 5), target), loss, mode)

    assert len(errors) == 3
    assert max(errors.values()) < EXACT, errors


@BIAS
@REDUCTION
def test_deep_linear_net_is_exact_for_type_2_only(reduction, bias):
    model = linear_net(4, 3, 3, 2, bias=bias)
    batch, loss = (normal(6, 4), normal(6, 2, seed=1)), nn.MSELoss(reduction=reduction)

    type2 = layer_errors(type2_kfac, ggn_block, model, batch, loss)
    empirical = layer_errors(empirical_kfac, empirical_fisher_block, model, batch, loss)

    assert len(type2) == 3
    assert max(type2.values()) < EXACT, type2
    assert min(empirical.values()) > 0.05, empirical


@BIAS
@REDUCTION
@pytest.mark.parametrize("positions", [(5,), (2, 3)], ids=["sequence", "grid"])
def test_positions_with_a_target_each_are_exact_for_expand_only(
    positions, reduction, bias
):
    model = linear_net(4, 3, 3, 2, bias=bias)
    batch = normal(6, *positions, 4), normal(6, *positions, 2, seed=1)
    loss = nn.MSELoss(reduction=reduction)

    expand, reduce = (
        layer_errors(type2_kfac, ggn_block, model, batch, loss, mode)
        for mode in ("expand", "reduce")
    )

    assert len(expand) == 3
    assert max(expand.values()) < EXACT, expand
    assert min(reduce.values()) > 0.05, reduce


@BIAS
@POOL
@REDUCTION
@pytest.mark.parametrize("positions", [(5,), (2, 3)], ids=["sequence", "grid"])
def test_pooled_positions_are_exact(positions, reduction, pool, bias):
    dims = tuple(range(1, 1 + len(positions)))
    model = linear_net(4, 3, 3, 2, bias=bias).append(Pool(pool, dims))
    batch = normal(6, *positions, 4), normal(6, 2, seed=1)

    errors = layer_errors(
        type2_kfac, ggn_block, model, batch, nn.MSELoss(reduction=reduction)
    )

    assert len(errors) == 3
    assert max(errors.values()) < EXACT, errors


@BIAS
@POOL
@REDUCTION
def test_expand_is_exact_only_behind_the_pool(reduction, pool, bias):
    model = linear_net(4, 3, 3, 3, 2, bias=bias).insert(2, Pool(pool, (1,)))
    batch = normal(6, 5, 4), normal(6, 2, seed=1)
    loss = nn.MSELoss(reduction=reduction)

    reduced, expanded = (
        layer_errors(type2_kfac, ggn_block, model, batch, loss, mode)
        for mode in ("reduce", "expand")
    )

    assert max(reduced.values()) < EXACT, reduced
    before, behind = list(expanded.values())[:2], list(expanded.values())[2:]
    assert max(behind) < EXACT, expanded
    assert min(before) > 0.05, expanded


# `reduce` replaces Σ_s g_s x_sᵀ by (Σ_s g_s)(mean_s x_s)ᵀ, exact when g_s is the same
# at every position: under a pool always, under a second convolution only if each of
# its inputs meets each kernel entry once. A sum pool has S times the g_s of a mean
# pool, and the GGN S² times the curvature: no scale is left to choose.
UNIFORM_SECOND = {
    "1x1": nn.Conv2d(3, 2, 1),
    "circular-same": nn.Conv2d(3, 2, (3, 2), padding="same", padding_mode="circular"),
    "circular-dilated": nn.Conv2d(
        3, 2, 2, padding="same", dilation=(2, 1), padding_mode="circular"
    ),
}
UNEVEN_SECOND = {
    "unpadded": nn.Conv2d(3, 2, (2, 3)),
    "strided": nn.Conv2d(3, 2, (2, 3), stride=(2, 1), padding=1),
    "dilated": nn.Conv2d(3, 2, 2, dilation=(1, 2), padding=(0, 2)),
}


def conv_errors(
    second: nn.Conv2d, *, reduction: str, pool: Callable[..., Tensor], bias: bool
) -> dict[str, float]:
    first = nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2))
    if not bias:
        for conv in (first, second):
            conv.register_parameter("bias", None)
    model = nn.Sequential(first, second, Pool(pool, (2, 3))).double()
    batch = normal(4, 2, 7, 6), normal(4, 2, seed=1)
    return layer_errors(
        type2_kfac, ggn_block, model, batch, nn.MSELoss(reduction=reduction)
    )


@BIAS
@POOL
@REDUCTION
@pytest.mark.parametrize("second", UNIFORM_SECOND)
def test_pooled_convolutions_are_exact(second, reduction, pool, bias):
    conv = copy.deepcopy(UNIFORM_SECOND[second])

    errors = conv_errors(conv, reduction=reduction, pool=pool, bias=bias)

    assert len(errors) == 2
    assert max(errors.values()) < EXACT, errors


@BIAS
@POOL
@REDUCTION
@pytest.mark.parametrize("second", UNEVEN_SECOND)
def test_only_the_last_convolution_is_exact_in_general(second, reduction, pool, bias):
    conv = copy.deepcopy(UNEVEN_SECOND[second])

    first, last = conv_errors(conv, reduction=reduction, pool=pool, bias=bias).values()

    assert last < EXACT
    assert first > 1e-3


POOLED_LAYERS = {
    "conv1d": (nn.Conv1d(2, 3, 3, stride=2, padding=1), (2, 7)),
    "grouped conv2d": (nn.Conv2d(4, 6, (2, 3), groups=2, padding=1), (4, 4, 5)),
    "depthwise conv2d": (nn.Conv2d(3, 3, 2, groups=3), (3, 4, 3)),
    "conv3d": (nn.Conv3d(2, 3, 2, padding=(1, 0, 0)), (2, 2, 3, 2)),
    "conv_transpose1d": (
        nn.ConvTranspose1d(2, 3, 3, stride=2, output_padding=1),
        (2, 4),
    ),
    "grouped conv_transpose2d": (
        nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2),
        (4, 2, 3),
    ),
}


@BIAS
@POOL
@REDUCTION
@pytest.mark.parametrize("name", POOLED_LAYERS)
def test_every_kind_is_exact_under_a_pool(name, reduction, pool, bias):
    original, shape = POOLED_LAYERS[name]
    layer = copy.deepcopy(original)
    if not bias:
        layer.register_parameter("bias", None)
    spatial = tuple(range(2, 1 + len(shape)))
    model = nn.Sequential(layer, Pool(pool, spatial)).double()
    model.append(nn.Linear(layer.out_channels, 2, bias=bias).double())
    batch = normal(4, *shape), normal(4, 2, seed=1)

    errors = layer_errors(
        type2_kfac, ggn_block, model, batch, nn.MSELoss(reduction=reduction)
    )

    assert len(errors) == 2
    assert max(errors.values()) < EXACT, errors


class Tokens(nn.Module):
    """An embedding whose tokens come as floats, as any other input here."""

    def __init__(self, padding: int | None):
        super().__init__()
        self.table = nn.Embedding(5, 3, padding_idx=padding, dtype=torch.float64)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.table(inputs.long())


@REDUCTION
@pytest.mark.parametrize("padding", [None, 2])
@pytest.mark.parametrize(
    ("tokens", "mode"),
    [((6,), "reduce"), ((6,), "expand"), ((6, 4), "expand")],
    ids=["single, reduce", "single, expand", "a target each, expand"],
)
def test_an_embedding_is_exact(tokens, mode, padding, reduction):
    model = nn.Sequential(Tokens(padding), nn.Linear(3, 2, dtype=torch.float64))
    inputs = torch.arange(math.prod(tokens)).remainder(5).reshape(tokens).double()
    batch = inputs, normal(*tokens, 2, seed=1)

    errors = layer_errors(
        type2_kfac, ggn_block, model, batch, nn.MSELoss(reduction=reduction), mode
    )

    assert len(errors) == 2
    assert errors["0.table"] < EXACT, errors
