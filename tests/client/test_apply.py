"""Gradients after `Apply`, against the formulas in dense algebra."""

import pytest
import torch
from torch import nn

from skfac.client.apply import Apply
from skfac.client.layers import track_layers
from skfac.curvature.layer import precondition_layer
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
    return Version(index, 0, inverses, rows=4, ranks=1)


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

    Apply(layers)(versions, kl_clip=kl_clip)

    for layer, direction in zip(layers, expected, strict=True):
        gradient = layer.gradient()
        assert gradient is not None
        torch.testing.assert_close(gradient, 0.5 * direction)  # ν = √(1/4)


def test_a_small_step_is_not_lengthened():
    model = model_with_gradients()
    layers = layers_of(model)
    raw = raw_gradients(layers)

    Apply(layers)([None, None], kl_clip=1e9)

    for layer, gradient in zip(layers, raw, strict=True):
        assert torch.equal(layer.gradient(), gradient)


def test_raw_gradients_are_bounded_too():
    model = model_with_gradients()
    layers = layers_of(model)
    raw = raw_gradients(layers)
    norm = sum(g.square().sum() for g in raw)

    Apply(layers)([None, None], kl_clip=1e-4)

    factor = (1e-4 / (LR**2 * norm)).sqrt()
    for layer, gradient in zip(layers, raw, strict=True):
        torch.testing.assert_close(layer.gradient(), gradient * factor)


def test_a_layer_without_a_gradient_is_left_alone():
    model = model_with_gradients()
    layers = layers_of(model)
    model[0].weight.grad = None
    versions = [version_of(layer, index) for index, layer in enumerate(layers)]
    bias, other = model[0].bias.grad.clone(), model[1].weight.grad.clone()

    Apply(layers)(versions, kl_clip=1e-3)

    assert model[0].weight.grad is None
    assert torch.equal(model[0].bias.grad, bias)
    assert not torch.equal(model[1].weight.grad, other)


def test_no_gradients_are_no_error():
    model = model_with_gradients()
    layers = layers_of(model)
    model.zero_grad()

    Apply(layers)([None, None], kl_clip=1e-3)

    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("gradient", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("wire", [torch.float32, torch.float64])
def test_gradients_keep_their_type(gradient, wire):
    model = model_with_gradients(gradient)
    layers = layers_of(model)
    raw = [gradient.double() for gradient in raw_gradients(layers)]
    versions = [version_of(layer, i, dtype=wire) for i, layer in enumerate(layers)]

    Apply(layers)(versions, kl_clip=1e9)

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
    apply, results = Apply(layers), []
    for _ in range(2):
        start = [torch.ones_like(parameter) for parameter in model.parameters()]
        for parameter, gradient in zip(model.parameters(), start, strict=True):
            parameter.grad = gradient
        apply([version_of(x, i) for i, x in enumerate(layers)], kl_clip=1e9)
        results.append(model[0].weight.grad.clone())
    assert not torch.allclose(*results)
