"""A model with every kind of layer that can be sharded, and ways to shard it."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

BATCH = 8  # of all ranks together


class Reader(nn.Module):
    """Two ranks share its channels unevenly, and of `narrow` one has nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.convolution = nn.Conv1d(6, 5, 3)
        self.wide = nn.Linear(5 * 8, 21, bias=False)  # low-rank inverses
        self.narrow = nn.Linear(21, 1)
        self.head = nn.Linear(1, 3)  # dense inverses

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.convolution(self.embedding(tokens).transpose(1, 2)).tanh()
        return self.head(self.narrow(self.wide(x.flatten(1)).tanh()))


class Even(nn.Module):
    """Layers whose output channels are the second dimension of their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.convolution = nn.ConvTranspose1d(6, 4, 3)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.convolution(self.embedding(tokens).transpose(1, 2)).tanh()
        return self.head(x.mean(2))


def build(kind: type[nn.Module] = Reader, dtype=torch.float64) -> nn.Module:
    torch.manual_seed(3)
    return kind().to(dtype)


def shard(model: nn.Module, **settings: Any) -> None:
    """Shard two layers alone, all others together."""
    alone = [m for n, m in model.named_children() if n in ("convolution", "wide")]
    for module in alone:
        fully_shard(module, **settings)
    fully_shard(model, **settings)


def by_channels(parameter: nn.Parameter) -> Shard:
    """Place a parameter of `Even` by its output channels."""
    return Shard(1) if len(parameter) in (6, 7) else Shard(0)


def share_of_batch(step: int, rank: int, ranks: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(7, (BATCH, 10), generator=generator)
    return tokens.chunk(ranks)[rank], tokens.sum(1).fmod(3).chunk(ranks)[rank]


def whole(model: nn.Module) -> Tensor:
    """All parameters in one vector, put together again."""
    parameters = [
        p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()
    ]
    return torch.cat([p.detach().flatten() for p in parameters])
