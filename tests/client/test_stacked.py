"""Layers of equal shapes, preconditioned as one: as they are alone."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from skfac.client.apply import Apply
from skfac.client.config import PreconditionerConfig
from skfac.client.ready import ReadyVersions
from skfac.client.row_space import RowSpace
from skfac.client.stacked import StackedLayers
from skfac.curvature import stacks
from skfac.curvature.factor import moment_of
from skfac.curvature.layer import precondition_moments
from skfac.wire.outcome import Version
from tests.support.applied import apply, layers_of, raw_gradients, version_of


@pytest.fixture
def stacked(monkeypatch) -> list[int]:
    """Stacks on the CPU, as on a GPU; the heights of those that were multiplied."""
    heights = []
    direction = StackedLayers.direction

    def recorded(self):
        heights.append(len(self.layers))
        return direction(self)

    monkeypatch.setattr(stacks, "faster_on", lambda device: True)
    monkeypatch.setattr(StackedLayers, "direction", recorded)
    return heights


def set_random_gradients(model, seed=0):
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)


def channels_last(layer: nn.Conv2d) -> nn.Conv2d:
    weight = layer.weight.data.to(memory_format=torch.channels_last)
    layer.weight = nn.Parameter(weight)
    return layer


SEVERAL = {
    "linear": lambda: nn.Linear(5, 4),
    "linear without bias": lambda: nn.Linear(5, 4, bias=False),
    "Conv1D": lambda: Conv1D(4, 5),
    "embedding": lambda: nn.Embedding(6, 5),
    "convolution": lambda: nn.Conv2d(3, 5, (2, 3)),
    "convolution without bias": lambda: nn.Conv2d(3, 5, 3, bias=False),
    "channels last": lambda: channels_last(nn.Conv2d(3, 5, 3)),
    "groups": lambda: nn.Conv1d(4, 6, 3, groups=2),
    "depthwise": lambda: nn.Conv2d(6, 6, 3, groups=6, bias=False),
    "transposed": lambda: nn.ConvTranspose2d(3, 5, 2),
    "transposed in groups": lambda: nn.ConvTranspose1d(4, 6, 3, groups=2, bias=False),
}


def any_version_of(layer, index: int, dtype) -> Version:
    spec = layer.spec
    groups = (spec.groups,) if spec.groups > 1 else ()
    sides = [
        moment_of(
            torch.randn(*groups, 4, dim, dtype=torch.float64),
            count=4,
            diagonal=diagonal,
        )
        for dim, diagonal in ((spec.d_in, spec.diagonal), (spec.d_out, False))
    ]
    damping = 0.1 * (index + 1)
    inverses = precondition_moments(*sides, damping=damping, split="pi", dtype=dtype)
    return Version(index, 0, inverses, rows=4, ranks=1, updates=1)


@pytest.mark.parametrize("trust", ["kl", "graft", "none"])
@pytest.mark.parametrize("kind", SEVERAL)
@pytest.mark.parametrize("wire", [torch.float32, torch.float64])
def test_layers_of_equal_shapes_are_preconditioned_together(
    trust, kind, wire, stacked, monkeypatch
):
    model = nn.Sequential(*(SEVERAL[kind]() for _ in range(3)), nn.Linear(7, 3))
    layers = layers_of(model)
    versions = [any_version_of(layer, i, wire) for i, layer in enumerate(layers)]
    kl_clip = 1e-3
    with monkeypatch.context() as alone:
        alone.setattr(stacks, "faster_on", lambda device: False)
        set_random_gradients(model)
        expected = apply(layers, versions, trust=trust, kl_clip=kl_clip).prediction
        gradients = [parameter.grad for parameter in model.parameters()]
    assert stacked == []

    set_random_gradients(model)
    before = [parameter.grad for parameter in model.parameters()]
    found = apply(layers, versions, trust=trust, kl_clip=kl_clip).prediction

    assert stacked == [3, 1]
    for parameter, raw, gradient in zip(
        model.parameters(), before, gradients, strict=True
    ):
        assert parameter.grad is raw  # in place: a bucket of DDP may be there
        torch.testing.assert_close(raw, gradient)
    for name in ("slope", "square", "scale"):
        value = getattr(expected, name)  # a sum of products in float32
        torch.testing.assert_close(getattr(found, name), value, rtol=1e-5, atol=0)


def test_stacks_are_of_what_is_small_and_has_a_version_and_a_gradient(
    stacked, monkeypatch
):
    monkeypatch.setattr("skfac.client.stacked.MOST_STACKED", 25)
    wide = [nn.Linear(6, 5) for _ in range(2)]
    model = nn.Sequential(*(nn.Linear(5, 5) for _ in range(5)), *wide)
    set_random_gradients(model)
    model[3].bias.grad = None
    layers = layers_of(model)
    versions = [version_of(layer, index) for index, layer in enumerate(layers)]
    versions[1] = None
    expected = raw_gradients([layer for i, layer in enumerate(layers) if i != 3])
    expected.insert(3, None)
    for i in (0, 2, 4, 5, 6):
        expected[i] = versions[i].preconditioner.apply(expected[i])

    apply(layers, versions, trust="none")

    assert stacked == [3]
    for layer, direction in zip(layers, expected, strict=True):
        if direction is not None:
            torch.testing.assert_close(layer.gradient(), direction)


def test_a_gradient_in_a_stack_that_is_not_finite_spoils_no_other(stacked):
    model = nn.Sequential(*(nn.Linear(5, 5) for _ in range(3)))
    set_random_gradients(model)
    layers = layers_of(model)
    versions = [version_of(layer, index) for index, layer in enumerate(layers)]
    model[1].weight.grad[1, 2] = float("inf")
    raw = raw_gradients(layers)

    done = apply(layers, versions, trust="none")

    assert stacked == [3]
    assert done.not_finite == 1
    for i in (0, 2):
        expected = versions[i].preconditioner.apply(raw[i])
        torch.testing.assert_close(layers[i].gradient(), expected)


def test_versions_are_held_once_and_stay_where_they_are(stacked):
    model = nn.Sequential(*(nn.Linear(5, 5) for _ in range(3)))
    layers = layers_of(model)
    ready = ReadyVersions(layers)
    rows = RowSpace(layers, PreconditionerConfig(apply="gradient"), lambda *_: None)
    step = Apply(layers, ready, rows)
    versions = [version_of(layer, index) for index, layer in enumerate(layers)]
    memory = set()
    for changed in ([], [1], [], [0, 1, 2]):
        for index in changed:
            versions[index] = version_of(layers[index], index)
        set_random_gradients(model)
        raw = raw_gradients(layers)

        step(versions, trust="none", kl_clip=1.0)

        for layer, version, before in zip(layers, versions, raw, strict=True):
            expected = version.preconditioner.apply(before)
            torch.testing.assert_close(layer.gradient(), expected)
        held = [one[1].activations.tensor for one in ready._ready]
        memory |= {tensor.untyped_storage().data_ptr() for tensor in held}
    assert len(memory) == 1


def test_stacks_follow_what_the_model_does(stacked):
    # Other ranks of the versions, a layer that is not used, or has no version yet.
    model = nn.Sequential(*(nn.Linear(5, 5) for _ in range(3)))
    layers = layers_of(model)
    rows = RowSpace(layers, PreconditionerConfig(apply="gradient"), lambda *_: None)
    step = Apply(layers, ReadyVersions(layers), rows)
    versions = [version_of(layer, index) for index, layer in enumerate(layers)]
    wider = [version_of(layer, index, rows=3) for index, layer in enumerate(layers)]
    plan = [
        (versions, []),
        ([*versions[:2], None], []),
        (versions, [0]),
        ([*versions[:2], wider[2]], []),
        (wider, []),
        (versions, []),
    ]
    for current, unused in plan:
        set_random_gradients(model)
        for index in unused:
            model[index].weight.grad = None
        raw = [layer.gradient() for layer in layers]
        raw = [None if gradient is None else gradient.clone() for gradient in raw]

        step(current, trust="none", kl_clip=1.0)

        for layer, version, before in zip(layers, current, raw, strict=True):
            if before is not None:
                expected = (
                    before if version is None else version.preconditioner.apply(before)
                )
                torch.testing.assert_close(layer.gradient(), expected)
    assert stacked == [3, 2, 2, 2, 1, 3, 3]


@pytest.mark.parametrize("most", [0, 10**9])
def test_a_large_model_keeps_no_copies_of_its_gradients(stacked, monkeypatch, most):
    monkeypatch.setattr("skfac.client.stacked.MOST_REPLAYED", most)
    model = nn.Sequential(*(nn.Linear(5, 5) for _ in range(3)))
    layers = layers_of(model)
    versions = [version_of(layer, index) for index, layer in enumerate(layers)]
    set_random_gradients(model)

    done = apply(layers, versions, trust="none")

    (stack,) = done._stacks._stacks
    assert (stack._inputs is not None) == (most > 0)
