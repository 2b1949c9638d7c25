"""Layers whose parameters `fully_shard` (FSDP2) has spread over the ranks.

A rank has the gradients of some output channels: rows of the gradient as a matrix. The
activation factor multiplies these by themselves, the derivative factor needs one sum
over the ranks (`skfac.curvature.parts`), of `n · d_in` numbers a layer. An embedding is
split by tokens, which are columns: no rank needs anything of another there.
"""

import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, distributed, nn

from skfac.client.config import PreconditionerConfig
from skfac.client.world import World
from skfac.curvature.geometry import LayerGeometry
from skfac.curvature.layer import LayerPreconditioner
from skfac.curvature.parts import left_of_part, left_share, of_columns
from skfac.wire.errors import ConfigurationError
from skfac.wire.runs import runs_within

_BUCKET_BYTES = 64 << 20  # of one all-reduce, unless a single layer has more


@dataclass(frozen=True, eq=False)
class Shard:
    """The part of a layer's gradient matrix that this rank holds.

    Attributes:
        own: Which rows of the matrix, or columns of an embedding's.
        by_columns: Whether they are columns.
        geometry: The layer's, as if it had no more than this part.
        mesh: The `DeviceMesh` of the ranks, which has one dimension.
    """

    own: slice
    by_columns: bool
    geometry: LayerGeometry
    mesh: Any


@dataclass(frozen=True, eq=False)
class Part:
    """A gradient that is to be preconditioned together with its other parts.

    Attributes:
        shard: Which part it is.
        gradient: It, as a matrix.
        ready: What the whole is preconditioned with.
    """

    shard: Shard
    gradient: Tensor
    ready: LayerPreconditioner

    def share(self) -> Tensor | None:
        """Make what the other parts need to know of this one.

        Returns:
            A matrix of the same shape for all parts; None for an embedding.
        """
        if self.shard.by_columns:
            return None
        return left_share(self.ready.derivatives, self.shard.own, self.gradient)

    def direction(self, total: Tensor | None) -> Tensor:
        """Precondition this part, given the sum of all parts' shares.

        Returns:
            A matrix shaped like `gradient`.
        """
        activations, derivatives = self.ready.activations, self.ready.derivatives
        own = self.shard.own
        if total is None:
            return of_columns(activations, own).right(derivatives.left(self.gradient))
        return activations.right(left_of_part(derivatives, own, self.gradient, total))


def precondition_parts(parts: Sequence[Part]) -> list[Tensor]:
    """Precondition the gradients of sharded layers.

    All ranks call it with the parts of the same layers, in the same order.

    Returns:
        The directions, one a part.
    """
    directions: dict[int, Tensor] = {}
    for bucket in _buckets(parts):
        shares = {i: share for i in bucket if (share := parts[i].share()) is not None}
        meshes = [parts[i].shard.mesh for i in shares]
        totals = dict(zip(shares, _summed(list(shares.values()), meshes), strict=True))
        for i in bucket:
            directions[i] = parts[i].direction(totals.get(i))
    return [directions[i] for i in range(len(parts))]


def sum_sharded(values: Tensor, shards: Sequence[Shard | None]) -> Tensor:
    """Add up over the ranks what the parts of each sharded layer give.

    Args:
        values: One a layer.
        shards: One a layer; None leaves its value as it is.

    Returns:
        Values of whole layers.
    """
    alike: dict[Any, list[int]] = defaultdict(list)
    for i, shard in enumerate(shards):
        if shard is not None:
            alike[shard.mesh].append(i)
    numbers = list(values.unbind())  # an index on a GPU would have to be copied there
    for mesh, places in alike.items():
        (total,) = _summed([torch.stack([numbers[i] for i in places])], [mesh])
        for i, number in zip(places, total.unbind(), strict=True):
            numbers[i] = number
    return torch.stack(numbers) if alike else values


def _buckets(parts: Sequence[Part]) -> Iterator[list[int]]:
    # Runs of layers that fit in the memory of one all-reduce, on all ranks the same:
    # of columns each rank has another number, and sends nothing.
    def nbytes(index: int) -> int:
        if parts[index].shard.by_columns:
            return 0
        basis = parts[index].ready.derivatives.tensor
        columns = parts[index].gradient.shape[-1]
        return int(basis.shape[-2] * columns * basis.itemsize)

    return runs_within(_BUCKET_BYTES, range(len(parts)), nbytes)


def _summed(shares: Sequence[Tensor], meshes: Sequence[Any]) -> list[Tensor]:
    # Over the ranks, those of one mesh and dtype in one message.
    alike: dict[tuple[Any, torch.dtype], list[int]] = defaultdict(list)
    for i, (share, mesh) in enumerate(zip(shares, meshes, strict=True)):
        alike[mesh, share.dtype].append(i)
    totals: dict[int, Tensor] = {}
    for (mesh, _), places in alike.items():
        # Where the mesh can reduce it: an offloaded gradient is on the host.
        flat = torch.cat([shares[i].reshape(-1).to(mesh.device_type) for i in places])
        distributed.all_reduce(flat, group=mesh.get_group())
        split = torch.split(flat, [shares[i].numel() for i in places])
        for i, total in zip(places, split, strict=True):
            totals[i] = total.to(shares[i].device).view_as(shares[i])
    return [totals[i] for i in range(len(shares))]


def is_sharded(parameter: Tensor | None) -> bool:
    """Tell whether a parameter is a DTensor, importing nothing for it.

    Returns:
        Whether it is.
    """
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(parameter, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """Find the part of a tensor that is here.

    Returns:
        The memory of a DTensor on this rank, or the tensor.
    """
    if not is_sharded(tensor):
        return tensor
    part: Tensor = tensor.to_local()  # type: ignore[attr-defined]  # of DTensor
    return part


class FullySharded:
    """Which modules of a model `fully_shard` looks after.

    Making one reshards the model: until its first backward, a forward may have left
    whole parameters in it, which the optimizer does not know.
    """

    def __init__(self, model: nn.Module) -> None:
        named = dict(model.named_modules())
        self._roots = [name for name, one in named.items() if _is_a(one, "FSDPModule")]
        for name in self._roots:
            named[name].reshard()
        self.flat = [
            name or "model"
            for name, one in named.items()
            if _is_a(one, "FullyShardedDataParallel")
        ]

    def has(self, name: str) -> bool:
        """Tell whether a module's parameters are in its care.

        Returns:
            Whether it or a module that contains it was passed to `fully_shard`.
        """
        return any(
            root in ("", name) or name.startswith(f"{root}.") for root in self._roots
        )


def shard_of(
    weight: nn.Parameter,
    bias: nn.Parameter | None,
    geometry: LayerGeometry,
    *,
    fully_sharded: bool,
) -> Shard | None:
    """Find which part of a layer's gradient is here.

    Args:
        weight: Of the layer.
        bias: Of the layer, if it trains one.
        geometry: Of the whole layer.
        fully_sharded: Whether `fully_shard` looks after it.

    Returns:
        The part, or None if all of it is.

    Raises:
        ValueError: If it cannot be preconditioned part by part; says why.
    """
    if not is_sharded(weight):
        if is_sharded(bias):
            raise ValueError("its bias is a DTensor and its weight is not")
        return None
    if bias is not None and not is_sharded(bias):
        raise ValueError("its weight is a DTensor and its bias is not")
    mesh, dim = _placement(weight, fully_sharded=fully_sharded)
    if bias is not None and _placement(bias, fully_sharded=True) != (mesh, 0):
        raise ValueError("its bias is not sharded as its weight is")
    by_columns = geometry.diagonal and dim == 0
    if geometry.groups > 1:
        raise ValueError("it has groups, and a shard may have parts of several")
    if not by_columns and dim != (channels := _channels_dim(geometry)):
        raise ValueError(
            f"dimension {dim} of its weight is sharded, and its output channels are "
            f"dimension {channels}, which a shard_placement_fn may choose"
        )
    own = _range(weight.shape[dim], mesh)
    found = weight.to_local().shape[dim]  # type: ignore[attr-defined]  # of DTensor
    if own.stop - own.start != found:
        raise ValueError(f"this rank holds {found} channels instead of {own}")
    extent = {"d_in" if by_columns else "d_out": found}
    return Shard(own, by_columns, replace(geometry, **extent), mesh)  # type: ignore[type-var]  # they are dataclasses


def check_shards(
    named: Iterable[tuple[str, Shard | None]],
    world: World,
    config: PreconditionerConfig,
) -> None:
    """Check that sharded layers can be trained by these ranks with these settings.

    Raises:
        ConfigurationError: If they cannot.
    """
    for name, shard in named:
        if shard is None:
            continue
        if config.apply == "row":
            raise ConfigurationError(
                f"apply='row' needs whole layers, and {name!r} is sharded. Use "
                "apply='auto'."
            )
        ranks = distributed.get_process_group_ranks(shard.mesh.get_group())
        if sorted(ranks) != sorted(world.members):
            raise ConfigurationError(
                f"Layer {name!r} is sharded over ranks {ranks} and trained by ranks "
                f"{list(world.members)}: pass the mesh's group as process_group, or "
                "name the layer in skip=(...)."
            )
        if config.fisher == "monte_carlo":
            raise ConfigurationError(
                f"fisher='monte_carlo' needs whole layers, and {name!r} is sharded. "
                "Use fisher='empirical', or name the layer in skip=(...)."
            )


def _placement(parameter: Tensor, *, fully_sharded: bool) -> tuple[Any, int]:
    # The mesh and the dimension that is split over it.
    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]  # of DTensor
    if mesh.ndim != 1:
        raise ValueError(
            f"it is sharded over a mesh of {mesh.ndim} dimensions {tuple(mesh.shape)}, "
            "as hybrid sharding (HSDP) and tensor parallelism do"
        )
    if not fully_sharded:
        raise ValueError(
            "it is a DTensor that fully_shard does not look after, as with tensor "
            "parallelism"
        )
    if not placements[0].is_shard():
        raise ValueError(f"it is placed as {placements[0]}")
    return mesh, placements[0].dim


def _channels_dim(geometry: LayerGeometry) -> int:
    # Of the weight: where the output channels are.
    second = ("conv_transpose", "hf_conv1d", "embedding")
    return 1 if geometry.kind.startswith(second) else 0


def _range(extent: int, mesh: Any) -> slice:  # noqa: ANN401  # a DeviceMesh
    # As DTensor cuts: equal parts, the last ones smaller or empty.
    size = -(-extent // mesh.size())
    start = min(size * mesh.get_local_rank(), extent)
    return slice(start, min(start + size, extent))


def _is_a(module: nn.Module, name: str) -> bool:
    # By name: torch's package takes a second to import.
    return any(
        base.__name__ == name and base.__module__.startswith("torch.distributed")
        for base in type(module).__mro__
    )
