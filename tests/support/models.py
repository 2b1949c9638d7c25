"""Small trainers that are the same in every process."""

import torch
from torch import Tensor, nn

BATCH = 24


def small_cnn() -> nn.Sequential:
    """A convolution, a wide layer (d > n), and one with fewer columns than rows."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, stride=2, padding=1, dilation=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(6 * 9, 40),
        nn.Tanh(),
        nn.Linear(40, 8, bias=False),
        nn.Tanh(),
        nn.Linear(8, 5),
    )


def batch_at(step: int) -> tuple[Tensor, Tensor]:
    """The images and labels of a step."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(BATCH, 1, 8, 8, generator=generator)
    labels = (images[:, 0, :5, 0].argmax(1) + (images.mean((1, 2, 3)) > 0)) % 5
    return images, labels


def backward(model: nn.Module, step: int) -> float:
    """One forward and backward; returns the loss."""
    images, labels = batch_at(step)
    loss = nn.functional.cross_entropy(model(images), labels)
    loss.backward()
    return loss.item()


def sgd(model: nn.Module) -> torch.optim.SGD:
    """The optimizer of all tests."""
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def flat_parameters(model: nn.Module) -> Tensor:
    """A copy of all parameters in one vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])
