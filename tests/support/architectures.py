"""Small copies of the models that people train, each with something to learn.

Every model maps the inputs of a batch to the logits of its labels. Importing this
module needs `transformers`, which looks for nothing on the network here: the models are
built from configurations.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

os.environ["HF_HUB_OFFLINE"] = "1"  # before the import, which reads it
os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"

import transformers

BATCH = 16
TOKENS = 24  # in the vocabulary
LENGTH = 8
CLASSES = 4
WIDTH = 32
IMAGE = 8
_LABELS: dict[str, Any] = {"num_labels": CLASSES}  # which no config declares


@dataclass(frozen=True)
class Batch:
    """Inputs and labels, one label for each vector of logits.

    Attributes:
        inputs: Images `[batch, 3, 8, 8]`, sequences `[batch, 8, 32]` or tokens
            `[batch, 8]`.
        labels: Classes, `[batch]` or `[batch, 8]`.
    """

    inputs: Tensor
    labels: Tensor

    def split(self, parts: int) -> list["Batch"]:
        """Cut it into micro-batches of equal size."""
        pairs = zip(self.inputs.chunk(parts), self.labels.chunk(parts), strict=True)
        return [Batch(inputs, labels) for inputs, labels in pairs]


@dataclass(frozen=True)
class Architecture:
    """A model, its data, and what a preconditioner is expected to find in it.

    Attributes:
        build: Makes the model.
        draw: Makes the inputs and labels from a generator.
        tracked: Layers that are preconditioned.
        passed: Modules that train and are not, by type.
        checkpoint: Switches activation checkpointing on.
        checkpointing: What that is, for the table.
        backend: Of `torch.compile`.
    """

    build: Callable[[], nn.Module]
    draw: Callable[[torch.Generator], tuple[Tensor, Tensor]]
    tracked: int
    passed: dict[str, int]
    checkpoint: Callable[[nn.Module], None]
    checkpointing: str = "non-reentrant"
    backend: str = "aot_eager"

    def model(self) -> nn.Module:
        """The model, the same each time."""
        torch.manual_seed(0)
        return self.build().train()

    def batch(self, seed: int) -> Batch:
        """The batch of a seed."""
        return Batch(*self.draw(torch.Generator().manual_seed(seed)))


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """The mean loss of a batch, smoothed so that it stays away from zero."""
    outputs = model(batch.inputs)
    logits: Tensor = getattr(outputs, "logits", outputs)
    return nn.functional.cross_entropy(
        logits.flatten(0, -2).float(), batch.labels.flatten(), label_smoothing=0.1
    )


def _images(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    # The brightest quarter, under noise.
    labels = torch.randint(CLASSES, (BATCH,), generator=generator)
    images = 0.5 * torch.randn(BATCH, 3, IMAGE, IMAGE, generator=generator)
    half = IMAGE // 2
    for image, label in zip(images, labels.tolist(), strict=True):
        row, column = divmod(label, 2)
        image[:, half * row :, half * column :][:, :half, :half] += 1.0
    return images, labels


def _colours(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    # The channel that is bright, if any.
    labels = torch.randint(CLASSES, (BATCH,), generator=generator)
    images = 0.5 * torch.randn(BATCH, 3, IMAGE, IMAGE, generator=generator)
    bright = nn.functional.one_hot(labels, CLASSES)[:, :3, None, None]
    return images + 2.0 * bright, labels


def _sequences(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    # The direction that the vectors lean to.
    labels = torch.randint(CLASSES, (BATCH,), generator=generator)
    sequences = torch.randn(BATCH, LENGTH, WIDTH, generator=generator)
    for sequence, label in zip(sequences, labels.tolist(), strict=True):
        sequence[:, label] += 2.0
    return sequences, labels


def _next_tokens(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    # Counting on from a start, by one.
    start = torch.randint(TOKENS, (BATCH, 1), generator=generator)
    tokens = (start + torch.arange(LENGTH + 1)) % TOKENS
    return tokens[:, :-1], tokens[:, 1:]


def _masked_tokens(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    # The last token stands for a mask; its neighbours tell what is under it.
    labels = _next_tokens(generator)[0] % (TOKENS - 1)
    masked = torch.rand(BATCH, LENGTH, generator=generator) < 0.2
    return labels.masked_fill(masked, TOKENS - 1), labels


def _gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=TOKENS,
            n_positions=LENGTH,
            n_embd=WIDTH,
            n_layer=2,
            n_head=2,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
            use_cache=False,
        )
    )


def _bert() -> nn.Module:
    return transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=TOKENS,
            max_position_embeddings=LENGTH,
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            use_cache=False,
        )
    )


def _vit() -> nn.Module:
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(
            image_size=IMAGE,
            patch_size=4,
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            initializer_range=0.2,
            **_LABELS,
        )
    )


def _resnet() -> nn.Module:
    return transformers.ResNetForImageClassification(
        transformers.ResNetConfig(
            embedding_size=8,
            hidden_sizes=[8, 16],
            depths=[1, 1],
            layer_type="basic",
            **_LABELS,
        )
    )


class _Pooled(nn.Module):
    # Stages on sequences, then a head on the mean over their positions.
    def __init__(self, body: nn.Module, width: int) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(width, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.body(inputs).mean(1))


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def forward(self, inputs: Tensor) -> Tensor:
        # oneDNN has no bfloat16 LSTM on every processor, and torch raises there.
        with torch.autocast("cpu", enabled=False):
            outputs: Tensor = self.lstm(inputs)[0]
        return outputs


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(
        WIDTH, nhead=2, dim_feedforward=2 * WIDTH, dropout=0.0, batch_first=True
    )
    return _Pooled(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), WIDTH)


def _lstm() -> nn.Module:
    return _Pooled(_Recurrent(), WIDTH)


def _cnn(**options: Any) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Sequential(
            nn.Conv2d(16, 32, 3, padding="same", **options), nn.ReLU(inplace=True)
        ),
        nn.Sequential(
            nn.Conv2d(32, 32, 3, stride=2, padding=2, **options), nn.ReLU(inplace=True)
        ),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 4, CLASSES),
    )


def _grouped_cnn() -> nn.Module:
    return _cnn(groups=4)


def _dilated_cnn() -> nn.Module:
    return _cnn(dilation=2)


def _checkpoint_transformers(model: nn.Module) -> None:
    assert isinstance(model, transformers.PreTrainedModel)
    model.activation_checkpointing_enable({"use_reentrant": False})


def _checkpoint(model: nn.Module, *names: str, use_reentrant: bool = False) -> None:
    for name in names:
        module = model.get_submodule(name)
        module.forward = _checkpointed(module.forward, use_reentrant)  # type: ignore[method-assign]


def _checkpointed(
    forward: Callable[..., Tensor], use_reentrant: bool
) -> Callable[..., Tensor]:
    def again(*inputs: Tensor, **options: Any) -> Tensor:
        if not torch.is_grad_enabled():  # checkpoint would warn
            return forward(*inputs, **options)
        outputs: Tensor = checkpoint(
            forward, *inputs, use_reentrant=use_reentrant, **options
        )
        return outputs

    return again


ARCHITECTURES: dict[str, Architecture] = {
    "GPT-2": Architecture(
        _gpt2,
        _next_tokens,
        tracked=9,
        passed={"LayerNorm": 5, "Embedding": 1, "Linear": 1},
        checkpoint=_checkpoint_transformers,
    ),
    "BERT": Architecture(
        _bert,
        _masked_tokens,
        tracked=15,
        passed={
            "LayerNorm": 6,
            "Embedding": 1,
            "Linear": 1,
            "BertLMPredictionHead": 1,
        },
        checkpoint=_checkpoint_transformers,
    ),
    "ViT": Architecture(
        _vit,
        _colours,
        tracked=14,
        passed={"LayerNorm": 5, "ViTEmbeddings": 1},
        checkpoint=_checkpoint_transformers,
    ),
    "ResNet": Architecture(
        _resnet,
        _images,
        tracked=7,
        passed={"BatchNorm2d": 6},
        checkpoint=lambda model: _checkpoint(model, "resnet.encoder.stages.1"),
    ),
    "nn.TransformerEncoder": Architecture(
        _encoder,
        _sequences,
        tracked=5,
        passed={
            "MultiheadAttention": 2,
            "NonDynamicallyQuantizableLinear": 2,
            "LayerNorm": 4,
        },
        checkpoint=lambda model: _checkpoint(model, "body.layers.0", "body.layers.1"),
    ),
    "CNN, grouped": Architecture(
        _grouped_cnn,
        _images,
        tracked=4,
        passed={},
        checkpoint=lambda model: _checkpoint(model, "2", "3"),
    ),
    "CNN, dilated": Architecture(
        _dilated_cnn,
        _images,
        tracked=4,
        passed={},
        checkpoint=lambda model: _checkpoint(model, "2", "3", use_reentrant=True),
        checkpointing="reentrant",
    ),
    "LSTM": Architecture(
        _lstm,
        _sequences,
        tracked=1,
        passed={"LSTM": 1},
        checkpoint=lambda model: _checkpoint(model, ""),
        backend="inductor",
    ),
}
"""By the name in the table."""
