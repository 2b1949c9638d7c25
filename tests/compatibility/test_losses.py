"""What trainers do with losses: look at gradients, sum them, penalise them."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from skfac.client import Preconditioner
from tests.compatibility.cells import gradients_of
from tests.compatibility.steps import (
    EXACT,
    assert_same,
    both_spaces,
    mlp,
    preconditioned,
    sgd,
    squares,
)
from tests.support.dense import normal


def parameter_gradients(loss: Tensor, model: nn.Module, inputs: Tensor) -> None:
    torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)


def input_gradients(loss: Tensor, model: nn.Module, inputs: Tensor) -> None:
    torch.autograd.grad(loss, inputs, retain_graph=True)


def differentiable_gradients(loss: Tensor, model: nn.Module, inputs: Tensor) -> None:
    torch.autograd.grad(loss, inputs, create_graph=True)


def gradients_of_another(loss: Tensor, model: nn.Module, inputs: Tensor) -> None:
    torch.autograd.grad(squares(model(2 * inputs)), inputs)


@both_spaces
@pytest.mark.parametrize("trust", ["none", "kl"])
@pytest.mark.parametrize(
    "look",
    [
        parameter_gradients,
        input_gradients,
        differentiable_gradients,
        gradients_of_another,
    ],
)
def test_gradients_that_are_only_looked_at_do_not_count(apply, trust, look):
    def backward(model: nn.Module) -> None:
        inputs = x.clone().requires_grad_()
        loss = squares(model(inputs))
        look(loss, model, inputs)
        loss.backward()

    model, x = mlp(4, 6, 3), normal(8, 4)
    settings = {"apply": apply, "trust": trust, "kl_clip": 1e-4}
    found = preconditioned(model, backward, **settings)
    expected = preconditioned(model, lambda m: squares(m(x)).backward(), **settings)
    assert_same(found, expected)


@both_spaces
def test_two_losses_of_one_forward_are_their_sum(apply):
    def backward(model: nn.Module) -> None:
        outputs = model(x)
        squares(outputs).backward(retain_graph=True)
        (3 * outputs.sum(1).mean()).backward()

    def at_once(model: nn.Module) -> None:
        outputs = model(x)
        (squares(outputs) + 3 * outputs.sum(1).mean()).backward()

    model, x = mlp(4, 6, 3), normal(8, 4)
    settings = {"apply": apply, "trust": "kl", "kl_clip": 1e-4}
    found = preconditioned(model, backward, **settings)
    assert_same(found, preconditioned(model, at_once, **settings))


def penalised(model: nn.Module, x: Tensor) -> None:
    """The gradient of a loss and of the square of its gradient by the inputs."""
    inputs = x.clone().requires_grad_()
    loss = squares(model(inputs))
    (slope,) = torch.autograd.grad(loss, inputs, create_graph=True)
    (loss + slope.square().sum()).backward()


@both_spaces
def test_a_gradient_penalty_keeps_its_gradient(apply):
    # The damping is far above both factors: the preconditioner is 1/damping.
    model, plain, x = mlp(4, 6, 3), mlp(4, 6, 3), normal(8, 4)
    penalised(plain, x)
    damping = 1e16
    found = preconditioned(
        model, lambda m: penalised(m, x), apply=apply, damping=damping
    )
    for name, gradient in gradients_of(plain).items():
        torch.testing.assert_close(
            damping * found[name], gradient, rtol=1e-3, atol=1e-6
        )


def test_a_weight_penalty_sends_its_layer_to_gradient_space(caplog):
    def backward(model: Any) -> None:
        (squares(model(x)) + model[0].weight.square().sum()).backward()

    x = normal(8, 4)
    found = []
    with caplog.at_level(logging.INFO, "skfac.client.row_space"):
        for apply in ("row", "gradient"):
            model = mlp(4, 6, 3)
            with Preconditioner(model, sgd(model), **EXACT, apply=apply) as pre:
                for _ in range(3):
                    model.zero_grad()
                    backward(model)
                    pre.step()
                layers = pre.report()["layers"]
            assert layers["0"]["apply"] == "gradient"
            assert layers["2"]["apply"] == apply
            found.append(gradients_of(model))
    assert_same(*found)
    (text,) = (r.message for r in caplog.records if r.name.endswith("row_space"))
    assert "Layer '0' is preconditioned in gradient space from now on" in text


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_layer_falls_back_while_checkpoints_are_open(use_reentrant, caplog):
    model, apply = penalized(use_reentrant, "row")
    assert apply == ["gradient", "row"]
    # It is known in the first step, before any version.
    assert "may have missed" not in caplog.text
    expected, _ = penalized(use_reentrant, "gradient")
    for mine, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def penalized(use_reentrant, apply):
    """A model after three steps of two checkpoints each, and where it applies."""
    model = mlp(4, 4, 3)
    optimizer = sgd(model)
    settings = EXACT | {"apply": apply, "accumulation_steps": 2}
    with Preconditioner(model, optimizer, **settings) as pre:
        for step in range(3):
            losses = []
            for part in range(2):
                x = normal(8, 4, seed=2 * step + part).requires_grad_()
                hidden = checkpoint(model[:2], x, use_reentrant=use_reentrant)
                penalty = model[0].weight.square().sum()
                losses.append((squares(model[2](hidden)) + penalty) / 2)
            for loss in losses:
                loss.backward()
            pre.step()
            optimizer.step()
            optimizer.zero_grad()
        layers = pre.report()["layers"]
    return model, [layer["apply"] for layer in layers.values()]
