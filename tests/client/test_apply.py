"""Gradients after `Apply`, against the formulas in dense algebra."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from skfac.client.apply import Apply
from skfac.client.config import PreconditionerConfig
from skfac.client.layers import track_layers
from skfac.client.ready import ReadyVersions
from skfac.client.row_space import RowSpace
from skfac.client.stacked import StackedLayers
from skfac.curvature import stacks
from skfac.curvature.factor import moment_of
from skfac.curvature.layer import (
    precondition_layer,
    precondition_moments,
    stack_preconditioners,
)
from skfac.wire.outcome import Version

LR = 0.3


def model_with_gradients(dtype=torch.float32) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3, bias=False)).to(dtype)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model


def layers_of(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    return track_layers(model, optimizer, ())


def raw_gradients(layers) -> list[torch.Tensor]:
    return [layer.gradient().clone() for layer in layers]


def version_of(layer, index: int, *, dtype=torch.float32) -> Version:
    rows = [
        torch.randn(4, dim, dtype=dtype) for dim in (layer.spec.d_in, layer.spec.d_out)
    ]
    inverses = precondition_layer(*rows, damping=0.1, split="pi")
    return Version(index, 0, inverses, rows=4, ranks=1, updates=1)


def apply(layers, versions, *, kl_clip=1e9, trust="kl") -> Apply:
    """One step of `Apply`, everything in gradient space."""
    config = PreconditionerConfig(apply="gradient")
    rows = RowSpace(layers, config, lambda *_: None)
    done = Apply(layers, ReadyVersions(layers), rows)
    done(versions, trust=trust, kl_clip=kl_clip)
    return done


def dense(inverse) -> torch.Tensor:
    return inverse.left(torch.eye(inverse.dim, dtype=inverse.tensor.dtype))


def test_the_step_is_preconditioned_and_inside_the_trust_region():
    model = model_with_gradients()
    layers = layers_of(model)
    raw = raw_gradients(layers)
    versions = [version_of(layer, index) for index, layer in enumerate(layers)]
    expected = [
        dense(v.preconditioner.derivatives) @ g @ dense(v.preconditioner.activations)
        for v, g in zip(versions, raw, strict=True)
    ]
    decrease = sum((p * g).sum() * LR**2 for p, g in zip(expected, raw, strict=True))
    kl_clip = 0.25 * float(decrease)

    apply(layers, versions, kl_clip=kl_clip)

    for layer, direction in zip(layers, expected, strict=True):
        gradient = layer.gradient()
        assert gradient is not None
        torch.testing.assert_close(gradient, 0.5 * direction)  # ν = √(1/4)


def test_a_small_step_is_not_lengthened():
    model = model_with_gradients()
    layers = layers_of(model)
    raw = raw_gradients(layers)

    apply(layers, [None, None], kl_clip=1e9)

    for layer, gradient in zip(layers, raw, strict=True):
        assert torch.equal(layer.gradient(), gradient)


def test_raw_gradients_are_bounded_too():
    model = model_with_gradients()
    layers = layers_of(model)
    raw = raw_gradients(layers)
    norm = sum(g.square().sum() for g in raw)

    apply(layers, [None, None], kl_clip=1e-4)

    factor = (1e-4 / (LR**2 * norm)).sqrt()
    for layer, gradient in zip(layers, raw, strict=True):
        torch.testing.assert_close(layer.gradient(), gradient * factor)


def test_a_layer_without_a_gradient_is_left_alone():
    model = model_with_gradients()
    layers = layers_of(model)
    model[0].weight.grad = None
    versions = [version_of(layer, index) for index, layer in enumerate(layers)]
    bias, other = model[0].bias.grad.clone(), model[1].weight.grad.clone()

    apply(layers, versions, kl_clip=1e-3)

    assert model[0].weight.grad is None
    assert torch.equal(model[0].bias.grad, bias)
    assert not torch.equal(model[1].weight.grad, other)


def test_no_gradients_are_no_error():
    model = model_with_gradients()
    layers = layers_of(model)
    model.zero_grad()

    apply(layers, [None, None], kl_clip=1e-3)

    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("gradient", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("wire", [torch.float32, torch.float64])
def test_gradients_keep_their_type(gradient, wire):
    model = model_with_gradients(gradient)
    layers = layers_of(model)
    raw = [gradient.double() for gradient in raw_gradients(layers)]
    versions = [version_of(layer, i, dtype=wire) for i, layer in enumerate(layers)]

    apply(layers, versions, kl_clip=1e9)

    for layer, before, version in zip(layers, raw, versions, strict=True):
        after = layer.gradient()
        assert after is not None
        assert after.dtype == gradient
        inverses = version.preconditioner
        inverses = inverses.with_tensors(*(t.double() for t in inverses.tensors))
        exact = dense(inverses.derivatives) @ before @ dense(inverses.activations)
        error = (after.double() - exact).norm() / exact.norm()
        assert error < 10 * torch.finfo(gradient).eps


def test_a_new_version_replaces_the_old_one():
    model = model_with_gradients()
    layers = layers_of(model)
    rows = RowSpace(layers, PreconditionerConfig(), lambda *_: None)
    step, results = Apply(layers, ReadyVersions(layers), rows), []
    for _ in range(2):
        start = [torch.ones_like(parameter) for parameter in model.parameters()]
        for parameter, gradient in zip(model.parameters(), start, strict=True):
            parameter.grad = gradient
        versions = [version_of(x, i) for i, x in enumerate(layers)]
        step(versions, trust="kl", kl_clip=1e9)
        results.append(model[0].weight.grad.clone())
    assert not torch.allclose(*results)


def test_grafting_keeps_the_length_of_each_raw_gradient():
    model = model_with_gradients()
    layers = layers_of(model)
    raw = raw_gradients(layers)
    versions = [version_of(layers[0], 0), None]

    apply(layers, versions, trust="graft", kl_clip=1e-9)

    direction = (
        dense(versions[0].preconditioner.derivatives)
        @ raw[0]
        @ dense(versions[0].preconditioner.activations)
    )
    expected = direction * raw[0].norm() / direction.norm()
    torch.testing.assert_close(layers[0].gradient(), expected)
    torch.testing.assert_close(layers[1].gradient(), raw[1])


def test_no_trust_region_leaves_the_direction_as_it_is():
    model = model_with_gradients()
    layers = layers_of(model)
    raw = raw_gradients(layers)
    versions = [version_of(layer, index) for index, layer in enumerate(layers)]

    apply(layers, versions, trust="none", kl_clip=1e-9)

    for layer, before, version in zip(layers, raw, versions, strict=True):
        inverses = version.preconditioner
        exact = dense(inverses.derivatives) @ before @ dense(inverses.activations)
        torch.testing.assert_close(layer.gradient(), exact)


@pytest.mark.parametrize("trust", ["kl", "graft", "none"])
def test_a_gradient_that_is_not_finite_stays_where_it_is(trust):
    model = model_with_gradients()
    layers = layers_of(model)
    model[0].weight.grad[1, 2] = float("nan")
    other = raw_gradients(layers)[1]
    kl_clip = 1e-4

    done = apply(layers, [None, None], trust=trust, kl_clip=kl_clip)

    assert done.not_finite == 1
    assert model[0].weight.grad.isnan().any()
    nu = (kl_clip / (LR**2 * other.square().sum())).sqrt() if trust == "kl" else 1.0
    torch.testing.assert_close(layers[1].gradient(), other * nu)


def test_the_prediction_is_the_quadratic_model_s():
    model = model_with_gradients(torch.float64)
    layers = layers_of(model)
    raw = raw_gradients(layers)
    versions = [
        version_of(layer, index, dtype=torch.float64)
        for index, layer in enumerate(layers)
    ]
    kl_clip = 1e-4

    done = apply(layers, versions, kl_clip=kl_clip)

    steps = [LR * layer.gradient() for layer in layers]  # ν P lr
    slope = sum((s * g).sum() for s, g in zip(steps, raw, strict=True))
    assert done.prediction is not None
    # lr² ν² <P, ∇W> is the trust region's κ, which binds here.
    assert done.prediction.decrease == pytest.approx(float(slope) - kl_clip / 2)


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

    assert stacked == [3]
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


def test_versions_are_stacked_once_and_held_once(stacked, monkeypatch):
    built = []

    def recorded(ones):
        built.append(len(ones))
        return stack_preconditioners(ones)

    monkeypatch.setattr("skfac.client.stacked.stack_preconditioners", recorded)
    model = nn.Sequential(*(nn.Linear(5, 5) for _ in range(3)))
    layers = layers_of(model)
    ready = ReadyVersions(layers)
    rows = RowSpace(layers, PreconditionerConfig(apply="gradient"), lambda *_: None)
    step = Apply(layers, ready, rows)
    versions = [version_of(layer, index) for index, layer in enumerate(layers)]
    for changed in (None, None, 1, None):
        if changed is not None:
            versions[changed] = version_of(layers[changed], changed)
        set_random_gradients(model)
        raw = raw_gradients(layers)

        step(versions, trust="none", kl_clip=1.0)

        for layer, version, before in zip(layers, versions, raw, strict=True):
            expected = version.preconditioner.apply(before)
            torch.testing.assert_close(layer.gradient(), expected)
    assert built == [3, 3]
    held = [one[1].activations.tensor for one in ready._ready]
    assert len({tensor.untyped_storage().data_ptr() for tensor in held}) == 1
