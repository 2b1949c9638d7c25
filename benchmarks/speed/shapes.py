"""The layers of some architectures, as a session declares them."""

from itertools import cycle, islice

from skfac.wire.session import LayerSpec


def resnet50() -> list[LayerSpec]:
    """The 53 convolutions and the classifier of ResNet-50 (He et al., CVPR 2016).

    Returns:
        54 layers, in the order of the forward.
    """
    layers = [_conv("conv1", 7, 3, 64)]
    before = 64
    for stage, (width, blocks) in enumerate(
        [(64, 3), (128, 4), (256, 6), (512, 3)], start=1
    ):
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            layers += [
                _conv(f"{name}.conv1", 1, before, width),
                _conv(f"{name}.conv2", 3, width, width),
                _conv(f"{name}.conv3", 1, width, 4 * width),
            ]
            if block == 0:
                layers.append(_conv(f"{name}.downsample", 1, before, 4 * width))
            before = 4 * width
    return [*layers, LayerSpec("fc", "linear", 2048 + 1, 1000, True)]


def gpt2() -> list[LayerSpec]:
    """The linear layers of the 12 blocks of GPT-2, 124M (Radford et al., 2019).

    Returns:
        48 layers, in the order of the forward.
    """
    return _gpt2(12, 768)


def gpt2_medium() -> list[LayerSpec]:
    """The linear layers of the 24 blocks of GPT-2 medium, 355M.

    Returns:
        96 layers, in the order of the forward.
    """
    return _gpt2(24, 1024)


def llama_7b() -> list[LayerSpec]:
    """The linear layers of the 32 blocks of LLaMA-7B (Touvron et al., 2023).

    Returns:
        224 layers, in the order of the forward.
    """
    width, inner = 4096, 11008
    sizes = {
        **{f"attention.w{side}": (width, width) for side in "qkvo"},
        **{f"feed_forward.w{part}": (width, inner) for part in "13"},
        "feed_forward.w2": (inner, width),
    }
    return [
        LayerSpec(f"layers.{block}.{name}", "linear", inputs, outputs, False)
        for block in range(32)
        for name, (inputs, outputs) in sizes.items()
    ]


ARCHITECTURES = {"resnet50": resnet50, "gpt2": gpt2}
"""By name."""


def layers_of(architecture: str, count: int) -> tuple[LayerSpec, ...]:
    """Take the layers of an architecture.

    Args:
        architecture: One of `ARCHITECTURES`.
        count: How many: more than it has are taken again under other names; 0 for
            all, once.

    Returns:
        The layers.
    """
    own = ARCHITECTURES[architecture]()
    taken = islice(cycle(own), count or len(own))
    return tuple(
        LayerSpec(f"{index}.{one.name}", one.kind, one.d_in, one.d_out, one.bias)
        for index, one in enumerate(taken)
    )


def _gpt2(blocks: int, width: int) -> list[LayerSpec]:
    sizes = {
        "attn.c_attn": (width, 3 * width),
        "attn.c_proj": (width, width),
        "mlp.c_fc": (width, 4 * width),
        "mlp.c_proj": (4 * width, width),
    }
    return [
        LayerSpec(f"h.{block}.{name}", "linear", inputs + 1, outputs, True)
        for block in range(blocks)
        for name, (inputs, outputs) in sizes.items()
    ]


def _conv(name: str, kernel: int, inputs: int, outputs: int) -> LayerSpec:
    return LayerSpec(name, "conv2d", kernel * kernel * inputs, outputs, False)
