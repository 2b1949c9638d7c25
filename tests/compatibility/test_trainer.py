"""What trainers do around a step: scalers, closures, groups, throw-aways, penalties."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from skfac.client import Preconditioner
from tests.compatibility.cells import gradients_of
from tests.compatibility.steps import (
    CLOSE,
    EXACT,
    as_matrix,
    assert_same,
    both_spaces,
    kfac,
    mlp,
    preconditioned,
    sgd,
    squares,
)
from tests.support.dense import normal

SCALE = 2.0**10


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def loss_at(model: nn.Module, step: int) -> Tensor:
    return squares(model(normal(8, 4, seed=step)))


def trained(model: nn.Module, steps: int = 5, **settings: Any) -> dict[str, Tensor]:
    """The parameters after some plain steps."""
    optimizer = sgd(model)
    with Preconditioner(model, optimizer, **(EXACT | settings)) as pre:
        for step in range(steps):
            loss_at(model, step).backward()
            pre.step()
            optimizer.step()
            optimizer.zero_grad()
    return parameters_of(model)


@both_spaces
@pytest.mark.parametrize("explicit", [True, False])
@pytest.mark.parametrize("trust", ["kl", "none"])
def test_a_grad_scaler_changes_nothing(apply, explicit, trust):
    settings = {"apply": apply, "trust": trust, "kl_clip": 1e-4}
    model = mlp(4, 6, 3)
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=2)
    with Preconditioner(
        model, optimizer, **(EXACT | settings), grad_scaler=scaler
    ) as pre:
        for step in range(5):
            scaler.scale(loss_at(model, step)).backward()
            if explicit:
                scaler.unscale_(optimizer)
            pre.step()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert scaler.get_scale() > SCALE
    assert_same(parameters_of(model), trained(mlp(4, 6, 3), **settings))


@both_spaces
def test_an_overflow_is_skipped_by_the_scaler(apply):
    model = mlp(4, 6, 3)
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    weights, versions = [], []
    with Preconditioner(
        model, optimizer, **EXACT, apply=apply, grad_scaler=scaler
    ) as pre:
        for step in range(6):
            loss = loss_at(model, step) * (float("inf") if step == 2 else 1.0)
            scaler.scale(loss).backward()
            pre.step()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            weights.append(parameters_of(model)["0.weight"])
            versions.append(pre.report()["layers"]["0"]["version"])
        refused = pre.report()["versions"]["refused"]
    moved = [not torch.equal(a, b) for a, b in itertools.pairwise(weights)]

    assert moved == [True, False, True, True, True]
    assert all(w.isfinite().all() for w in weights)
    assert versions == [None, 0, 1, 1, 3, 4]  # that of step 2 is none
    assert refused == 2  # layers
    assert scaler.get_scale() == SCALE / 2


@both_spaces
def test_a_scaler_with_accumulation_is_one_batch(apply):
    model, x = mlp(4, 6, 3), normal(8, 4)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    optimizer = sgd(model)
    with Preconditioner(
        model,
        optimizer,
        **EXACT,
        apply=apply,
        grad_scaler=scaler,
        accumulation_steps=4,
    ) as pre:
        for _ in range(2):
            model.zero_grad()
            for part in x.chunk(4):
                scaler.scale(squares(model(part)) / 4).backward()
            pre.step()
            scaler.update()
    expected = kfac(model[:2](x), model(x).detach())
    torch.testing.assert_close(as_matrix(gradients_of(model), "2"), expected, **CLOSE)


@both_spaces
@pytest.mark.parametrize("how", ["eval", "no_grad", "inference_mode"])
def test_forwards_that_do_not_train_leave_nothing(apply, how):
    def evaluate() -> Tensor:
        if how != "eval":
            with getattr(torch, how)():
                return model(normal(3, 4)).sum()
        model.eval()
        outputs = model(normal(3, 4))
        model.train()
        return outputs.sum()

    def backward(model: nn.Module) -> None:
        unused = evaluate()
        outputs = model(x)
        nothing = 0 * evaluate().clone()  # which has a backward in eval mode
        (squares(outputs) + nothing).backward()
        assert unused.isfinite()
        evaluate()

    model, x = mlp(4, 6, 3), normal(8, 4)
    found = preconditioned(model, backward, apply=apply)
    expected = preconditioned(model, lambda m: squares(m(x)).backward(), apply=apply)
    assert_same(found, expected)


@both_spaces
def test_a_nan_in_one_layer_harms_no_other(apply):
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(4, 3), "b": nn.Linear(4, 3)}).double()
    x = normal(8, 4)
    reports = []
    settings = EXACT | {"trust": "kl", "kl_clip": 1e9}
    with Preconditioner(model, sgd(model), **settings, apply=apply) as pre:
        for step in range(4):
            model.zero_grad()
            broken = float("nan") if step == 2 else 1.0
            (squares(model["a"](x)) + broken * squares(model["b"](x))).backward()
            pre.step()
            reports.append(pre.report())
            if step == 2:
                found = gradients_of(model)
    expected = kfac(x, model["a"](x).detach())
    torch.testing.assert_close(as_matrix(found, "a"), expected, **CLOSE)
    assert found["b.weight"].isnan().all()
    assert [report["not_finite"] for report in reports] == [0, 0, 1, 1]
    # Its snapshot is dropped, of both layers, and the next step is as before.
    assert reports[3]["layers"]["a"]["version"] == 1
    expected = kfac(x, model["b"](x).detach())
    torch.testing.assert_close(as_matrix(gradients_of(model), "b"), expected, **CLOSE)


@both_spaces
def test_the_trust_region_knows_each_group_s_learning_rate(apply):
    kappa, rates, x = 1e-4, (0.3, 0.02), normal(8, 4)
    model = mlp(4, 6, 3)
    optimizer = torch.optim.SGD(
        [
            {"params": model[0].parameters(), "lr": rates[0]},
            {"params": model[2].parameters(), "lr": rates[1]},
        ]
    )
    settings = EXACT | {"trust": "kl", "kl_clip": kappa}
    with Preconditioner(model, optimizer, **settings, apply=apply) as pre:
        for _ in range(2):
            model.zero_grad()
            squares(model(x)).backward()
            pre.step()
    found = gradients_of(model)
    raw, free = mlp(4, 6, 3), mlp(4, 6, 3)
    squares(raw(x)).backward()
    directions = preconditioned(free, lambda m: squares(m(x)).backward())
    square = sum(
        rate**2 * (directions[name] * gradient).sum()
        for layer, rate in zip("02", rates, strict=True)
        for name, gradient in gradients_of(raw).items()
        if name.startswith(layer)
    )
    nu = (kappa / square).sqrt().clamp(max=1.0)
    assert nu < 1
    assert_same(found, {name: nu * p for name, p in directions.items()})


@both_spaces
def test_an_optimizer_may_call_a_closure(apply):
    model = mlp(4, 6, 3)
    optimizer = sgd(model)
    with Preconditioner(model, optimizer, **EXACT, apply=apply) as pre:
        for step in range(5):

            def closure(step: int = step) -> Tensor:
                optimizer.zero_grad()
                loss = loss_at(model, step)
                loss.backward()
                pre.step()
                return loss

            optimizer.step(closure)
    assert_same(parameters_of(model), trained(mlp(4, 6, 3), apply=apply))


@both_spaces
@pytest.mark.parametrize("trust", ["none", "kl", "graft"])
def test_gradients_that_are_thrown_away_leave_nothing(apply, trust):
    def backward(model: nn.Module) -> None:
        squares(model(5 * x)).backward()
        model.zero_grad()
        squares(model(x)).backward()

    model, x = mlp(4, 6, 3), normal(8, 4)
    settings = {"apply": apply, "trust": trust, "kl_clip": 1e-4}
    found = preconditioned(model, backward, **settings)
    expected = preconditioned(model, lambda m: squares(m(x)).backward(), **settings)
    assert_same(found, expected)


@both_spaces
@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_may_be_set_to_zero_instead_of_none(apply, set_to_none):
    model = mlp(4, 6, 3)
    optimizer = sgd(model)
    settings = EXACT | {"apply": apply, "trust": "kl"}
    with Preconditioner(model, optimizer, **settings) as pre:
        for step in range(5):
            optimizer.zero_grad(set_to_none=set_to_none)
            loss_at(model, step).backward()
            pre.step()
            optimizer.step()
    expected = trained(mlp(4, 6, 3), apply=apply, trust="kl")
    assert_same(parameters_of(model), expected)


@both_spaces
def test_gradients_are_clipped_after_the_step(apply):
    # Before it, row space has preconditioned already; after it, both are the same.
    def backward(model: nn.Module) -> None:
        squares(model(x)).backward()

    model, x = mlp(4, 6, 3), normal(8, 4)
    free = preconditioned(model, backward, apply=apply)
    with Preconditioner(model, sgd(model), **EXACT, apply=apply) as pre:
        for _ in range(2):
            model.zero_grad()
            backward(model)
            pre.step()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    assert norm > 0.1
    expected = {name: gradient * 0.1 / norm for name, gradient in free.items()}
    for name, gradient in gradients_of(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("apply", ["gradient", "row"])
def test_where_a_gradient_is_raw_after_the_backward(apply):
    def backward(model: nn.Module) -> None:
        squares(model(x)).backward()

    raw, model, x = mlp(4, 6, 3), mlp(4, 6, 3), normal(8, 4)
    backward(raw)
    with Preconditioner(model, sgd(model), **EXACT, apply=apply) as pre:
        backward(model)
        pre.step()
        model.zero_grad()
        backward(model)
        seen = gradients_of(model)
        pre.step()
    if apply == "gradient":
        assert_same(seen, gradients_of(raw))
    else:
        assert_same(seen, gradients_of(model))
