"""Models whose steps are timed, with data of their shapes."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

_CLASSES = 10
_VOCABULARY = 96
_CONTEXT = 64
_HEADS = 4


@dataclass(frozen=True)
class Workload:
    """A model and the data of one step.

    Attributes:
        build: Makes the model, the same each time.
        inputs: One batch.
        labels: Classes, one for each output.
    """

    build: Callable[[], nn.Module]
    inputs: Tensor
    labels: Tensor

    def on(self, device: str) -> "Workload":
        """Move it to a device."""
        build = self.build
        return replace(
            self,
            build=lambda: build().to(device),
            inputs=self.inputs.to(device),
            labels=self.labels.to(device),
        )

    def loss(self, model: nn.Module) -> Tensor:
        """Run a model forward on the batch."""
        outputs: Tensor = model(self.inputs)
        return cross_entropy(outputs.flatten(0, -2), self.labels.flatten())


def _mlp(width: int, batch: int) -> Workload:
    def build() -> nn.Module:
        return nn.Sequential(
            nn.Linear(784, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, _CLASSES),
        )

    return Workload(build, torch.rand(batch, 784), torch.randint(_CLASSES, (batch,)))


def _deep(width: int, batch: int) -> Workload:
    # Layers that take no time: what is left is what each costs that is not products.
    def build() -> nn.Module:
        layers: list[nn.Module] = []
        for _ in range(60):
            linear = nn.Linear(width, width)
            # By torch's default the gradients of the first layers are about 1e-25, and
            # a CPU takes ten times as long for products with results below 1e-38.
            nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
            layers += [linear, nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(width, _CLASSES))

    return Workload(build, torch.rand(batch, width), torch.randint(_CLASSES, (batch,)))


def _cnn(width: int, batch: int) -> Workload:
    # As VGG: two convolutions, then half the extent and twice the channels.
    def build() -> nn.Module:
        layers: list[nn.Module] = []
        before = 3
        for channels in (width, 2 * width, 4 * width):
            for _ in range(2):
                layers += [nn.Conv2d(before, channels, 3, padding=1), nn.ReLU()]
                before = channels
            layers.append(nn.MaxPool2d(2))
        layers += [nn.Flatten(), nn.Linear(before * 16, _CLASSES)]
        return nn.Sequential(*layers)

    inputs = torch.rand(batch, 3, 32, 32)
    return Workload(build, inputs, torch.randint(_CLASSES, (batch,)))


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attention = nn.Linear(width, 3 * width)
        self.mixed = nn.Linear(width, width)
        self.wide = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)

    def forward(self, states: Tensor) -> Tensor:
        batch, length, _ = states.shape
        joined = self.attention(self.norms[0](states))
        q, k, v = joined.reshape(batch, length, 3, _HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True)
        states = states + self.mixed(mixed.transpose(1, 2).reshape_as(states))
        hidden = self.wide(self.norms[1](states))
        out: Tensor = states + self.narrow(nn.functional.gelu(hidden))
        return out


def _transformer(width: int, batch: int) -> Workload:
    # As GPT-2: layers of one width, attention over 64 tokens.
    def build() -> nn.Module:
        return nn.Sequential(
            nn.Embedding(_VOCABULARY, width),
            *(_Block(width) for _ in range(4)),
            nn.LayerNorm(width),
            nn.Linear(width, _VOCABULARY),
        )

    tokens = torch.randint(_VOCABULARY, (batch, _CONTEXT + 1))
    return Workload(build, tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


WORKLOADS: dict[str, Callable[[int, int], Workload]] = {
    "mlp": _mlp,
    "deep": _deep,
    "cnn": _cnn,
    "transformer": _transformer,
}
"""By name, from width and batch size."""
