"""Gradients after `Apply`, against the formulas in dense algebra."""

import pytest
import torch
from torch import nn

from skfac.client.apply import Apply
from skfac.client.config import PreconditionerConfig
from skfac.client.ready import ReadyVersions
from skfac.client.row_space import RowSpace
from tests.support.applied import LR, apply, layers_of, raw_gradients, version_of


def model_with_gradients(dtype=torch.float32) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3, bias=False)).to(dtype)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model


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


@pytest.mark.parametrize("wrapped", [torch.bfloat16, torch.float16])
def test_a_step_inside_autocast_is_as_precise_as_outside(wrapped):
    results = []
    for enabled in (False, True):
        torch.manual_seed(0)
        model = model_with_gradients()
        layers = layers_of(model)
        versions = [version_of(layer, index) for index, layer in enumerate(layers)]
        with torch.autocast("cpu", dtype=wrapped, enabled=enabled):
            apply(layers, versions)
        results.append([parameter.grad for parameter in model.parameters()])
    assert all(map(torch.equal, *results))


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
