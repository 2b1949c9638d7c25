"""What is trained in the study: four small tasks on real data."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from autoencoder import autoencoding
from common.data import fashion_mnist as fashion_mnist
from common.data import python_manual as python_manual
from common.training import Task as Task  # and for the tests, which lack the path
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

VALIDATIONS = 18
"""How often a run is validated, about, besides its start."""

CONTEXT = 64
_WIDTH = 64
_HEADS = 4


@dataclass(frozen=True, kw_only=True)
class StudyTask:
    """A task and how long it is trained.

    Attributes:
        title: What it is called in tables and plots.
        epochs: Passes over the training data.
        positions: Loss terms of an example: 1, or the characters of a window.
        load: Makes the task, once per process.
    """

    title: str
    epochs: int
    load: Callable[[], Task]
    positions: int = 1


@cache
def task_of(name: str) -> Task:
    """Load a task, once per process.

    Args:
        name: A key of `TASKS`.

    Returns:
        The task, validated about `VALIDATIONS` times in a run.
    """
    task = TASKS[name].load()
    steps = TASKS[name].epochs * task.epoch_steps
    return replace(task, validate_every=max(1, steps // VALIDATIONS))


def steps_of(name: str) -> int:
    """Count the steps of a run.

    Returns:
        Steps.
    """
    return TASKS[name].epochs * task_of(name).epoch_steps


def _accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(-1) == labels).float().mean()


def _character_loss(logits: Tensor, characters: Tensor) -> Tensor:
    return cross_entropy(logits.flatten(0, 1), characters.flatten())


def build_mlp() -> nn.Sequential:
    """Make 784-256-256-10 with ReLU."""
    return nn.Sequential(
        nn.Linear(784, 256),
        nn.ReLU(),
        nn.Linear(256, 256),
        nn.ReLU(),
        nn.Linear(256, 10),
    )


def build_cnn() -> nn.Sequential:
    """Make three convolutions that halve the image thrice, and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 10),
    )


class Block(nn.Module):
    """A pre-norm block of causal self-attention and an MLP.

    Not `nn.TransformerEncoderLayer`: its fused attention hides a linear layer from
    hooks, which every K-FAC needs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(_WIDTH)
        self.qkv = nn.Linear(_WIDTH, 3 * _WIDTH)
        self.out = nn.Linear(_WIDTH, _WIDTH)
        self.mlp_norm = nn.LayerNorm(_WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(_WIDTH, 4 * _WIDTH), nn.GELU(), nn.Linear(4 * _WIDTH, _WIDTH)
        )

    def forward(self, states: Tensor) -> Tensor:
        """Map states (batch, length, width) to states of the same shape."""
        heads = self.qkv(self.attention_norm(states)).unflatten(-1, (3, _HEADS, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(query, key, value, is_causal=True)
        states = states + self.out(mixed.transpose(1, 2).flatten(2))
        result: Tensor = states + self.mlp(self.mlp_norm(states))
        return result


class CharacterTransformer(nn.Module):
    """Two blocks of width 64 that predict each next character.

    Args:
        vocabulary: How many characters there are.
    """

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, _WIDTH)
        self.positions = nn.Parameter(torch.randn(CONTEXT, _WIDTH) * 0.1)
        self.blocks = nn.Sequential(Block(), Block())
        self.norm = nn.LayerNorm(_WIDTH)
        self.head = nn.Linear(_WIDTH, vocabulary)

    def forward(self, characters: Tensor) -> Tensor:
        """Map characters (batch, length) to logits (batch, length, vocabulary)."""
        states = self.embedding(characters) + self.positions[: characters.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(states)))
        return logits


def _clothes(
    build_model: Callable[[], nn.Module], *, train: int, validation: int, flat: bool
) -> Task:
    split = fashion_mnist(train=train, validation=validation)
    inputs, val_inputs = split.inputs, split.val_inputs
    if flat:
        inputs, val_inputs = inputs.flatten(1), val_inputs.flatten(1)
    return Task(
        inputs=inputs,
        targets=split.labels,
        val_inputs=val_inputs,
        val_targets=split.val_labels,
        build_model=build_model,
        loss=cross_entropy,
        loss_name="cross-entropy",
        metric=_accuracy,
        metric_name="accuracy",
    )


def _characters() -> Task:
    text = python_manual(length=CONTEXT, train=6400, validation=128)
    return Task(
        inputs=text.inputs,
        targets=text.targets,
        val_inputs=text.val_inputs,
        val_targets=text.val_targets,
        build_model=partial(CharacterTransformer, len(text.vocabulary)),
        loss=_character_loss,
        loss_name="cross-entropy per character",
        metric=_accuracy,
        metric_name="accuracy",
        batch_size=32,
    )


TASKS = {
    "mnist-autoencoder": StudyTask(
        title="MNIST-5k autoencoder", epochs=6, load=autoencoding
    ),
    "fashion-mlp": StudyTask(
        title="Fashion-MNIST MLP",
        epochs=2,
        load=partial(_clothes, build_mlp, train=12800, validation=2000, flat=True),
    ),
    "fashion-cnn": StudyTask(
        title="Fashion-MNIST CNN",
        epochs=5,
        load=partial(_clothes, build_cnn, train=5120, validation=1000, flat=False),
    ),
    "characters": StudyTask(
        title="Character transformer", epochs=1, positions=CONTEXT, load=_characters
    ),
}
"""By name, in the order of the tables."""
