"""Training loops out of the ordinary: each gets what the plain one would."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from skfac.client import Preconditioner
from skfac.curvature.linear import LinearGeometry

BOTH = pytest.mark.parametrize("apply", ["gradient", "auto"])


def wide(seed: int = 0) -> nn.Sequential:
    """Large enough for row space."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 8)).double()


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr)


def loss_of(model: nn.Module, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 256, generator=generator, dtype=torch.float64)
    return model(inputs).square().sum(-1).mean()


def settings(**changes: object) -> dict[str, object]:
    return {
        "on_late": "wait",
        "update_every": 1,
        "wire_dtype": "float64",
        "trust": "none",
        **changes,
    }


def flat(model: nn.Module) -> Tensor:
    return torch.cat(
        [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    )


@BOTH
def test_learning_rates_are_those_of_a_state_that_was_loaded(apply):
    model = wide()
    optimizer = sgd(model, lr=100.0)
    with Preconditioner(
        model, optimizer, **settings(apply=apply, trust="kl", kl_clip=1e-3)
    ) as pre:
        optimizer.load_state_dict(optimizer.state_dict())
        scales = []
        for step, rate in enumerate((100.0, 100.0, 1e-6)):
            optimizer.param_groups[0]["lr"] = rate
            optimizer.zero_grad()
            loss_of(model, 16, step).backward()
            pre.step()
            scales.append(pre.report()["trust_scale"])

    assert scales[0] < 1
    assert scales[1] < 1
    assert scales[2] == 1


def assert_same_in_both_spaces(
    backward: Callable[[nn.Module, int], None], caplog: Any, **own: Any
) -> None:
    """Gradients are the same wherever they are preconditioned, and nothing is said."""

    def gradients(apply: str) -> list[Tensor]:
        model, found = wide(), []
        optimizer = sgd(model)
        with Preconditioner(model, optimizer, **settings(apply=apply, **own)) as pre:
            for step in range(4):
                optimizer.zero_grad()
                backward(model, step)
                pre.step()
                found.append(flat(model))
        return found

    for mine, expected in zip(gradients("auto"), gradients("gradient"), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-12)
    assert "gradient space" not in caplog.text


@pytest.mark.parametrize(
    "sizes", [(20, 20), (200, 20), (200, 20, 20), (20, 200), (20, 200, 20)]
)
@pytest.mark.parametrize("first", ["train", "eval"])
def test_micro_batches_of_any_size_are_preconditioned_as_a_whole(sizes, first, caplog):
    def backward(model: nn.Module, step: int) -> None:
        for place, size in enumerate(sizes):
            model.train(place > 0 or first == "train")
            loss_of(model, size, 10 * step + place).backward()

    passes = len(sizes) - (first == "eval")
    assert_same_in_both_spaces(backward, caplog, accumulation_steps=passes)


@pytest.mark.parametrize("sizes", [(20, 200), (200, 20)])
def test_forwards_of_any_size_in_one_backward_are_of_one_kind(sizes, caplog):
    def backward(model: nn.Module, step: int) -> None:
        losses = [loss_of(model, size, 10 * step + size) for size in sizes]
        torch.stack(losses).sum().backward()

    assert_same_in_both_spaces(backward, caplog)


@BOTH
def test_a_layer_that_was_frozen_before_its_first_forward_is_left_alone(apply):
    generator, critic = nn.Linear(8, 256).double(), wide()
    optimizer = sgd(critic)
    with Preconditioner(critic, optimizer, **settings(apply=apply)) as pre:
        critic.requires_grad_(False)
        noise = torch.randn(4, 8, dtype=torch.float64)
        critic(generator(noise)).sum().backward()
        pre.step()
        assert all(p.grad is None for p in critic.parameters())

        critic.requires_grad_(True)
        for step in range(2):
            loss_of(critic, 16, step).backward()
            raw = flat(critic).clone()
            pre.step()
            optimizer.zero_grad()

    assert generator.weight.grad is not None
    assert raw.numel()
    assert pre.report()["layers"]["0"]["version"] is not None


def test_a_monte_carlo_fisher_goes_on_without_a_layer_that_is_frozen():
    model = wide()
    optimizer = sgd(model)
    with Preconditioner(model, optimizer, **settings(fisher="monte_carlo")) as pre:
        for step in range(4):
            model[0].requires_grad_(step < 2)
            loss = loss_of(model, 16, step)
            pre.capture_from(loss.exp())
            loss.backward()
            pre.step()
            optimizer.zero_grad()
        versions = {
            name: one["version"] for name, one in pre.report()["layers"].items()
        }

    assert versions == {"0": 1, "2": 2}


@BOTH
def test_rows_of_gradients_thrown_away_before_the_backward_do_not_count(apply):
    def run(between: bool) -> list[Tensor]:
        model, found = wide(), []
        optimizer = sgd(model)
        with Preconditioner(
            model, optimizer, **settings(apply=apply, trust="kl", kl_clip=1e-4)
        ) as pre:
            for step in range(3):
                if not between:
                    optimizer.zero_grad()
                loss = loss_of(model, 16, step)
                if between:
                    optimizer.zero_grad()
                loss.backward()
                pre.step()
                found.append(flat(model).clone())
                (100 * loss_of(model, 16, 70 + step)).backward()  # of somebody else
        return found

    for mine, expected in zip(run(True), run(False), strict=True):
        assert torch.equal(mine, expected)


@pytest.mark.parametrize(
    ("fisher", "apart"),
    [("empirical", False), ("monte_carlo", False), ("monte_carlo", True)],
)
def test_checkpointing_takes_no_rows_away(fisher, apart):
    def run(checkpointed: bool) -> list[Tensor]:
        model, found = wide(), []
        optimizer = sgd(model)

        def loss(seed: int) -> Tensor:
            generator = torch.Generator().manual_seed(seed)
            inputs = torch.randn(16, 256, generator=generator, dtype=torch.float64)
            first = model[:2]
            if checkpointed:
                hidden = checkpoint(first, inputs, use_reentrant=False)
            else:
                hidden = first(inputs)
            return model[2](hidden).square().sum(-1).mean()

        with Preconditioner(
            model, optimizer, **settings(fisher=fisher, apply="gradient")
        ) as pre:
            for step in range(4):
                if apart:
                    pre.capture_from(loss(step).exp())
                whole = loss(step)
                if fisher == "monte_carlo" and not apart:
                    pre.capture_from(whole.exp())
                whole.backward()
                pre.step()
                found.append(flat(model).clone())
                optimizer.zero_grad()
            assert pre.report()["versions"].keys() <= {"solved", "waits"}
        return found

    for one, other in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_a_weight_whose_bias_is_frozen_later_is_still_preconditioned():
    model = nn.Sequential(nn.Linear(6, 4)).double()
    optimizer = sgd(model)
    inputs = torch.randn(5, 6, dtype=torch.float64)
    with Preconditioner(model, optimizer, **settings(apply="gradient")) as pre:
        for step in range(3):
            model[0].bias.requires_grad_(step < 2)
            optimizer.zero_grad()
            model(inputs).square().sum(-1).mean().backward()
            raw = model[0].weight.grad.clone()
            pre.step()

    assert model[0].bias.grad is None
    assert not torch.allclose(model[0].weight.grad, raw)


def test_forwards_without_a_backward_leave_nothing(monkeypatch):
    model = wide()
    with Preconditioner(model, sgd(model), **settings(apply="gradient")) as pre:
        made: list[weakref.ref[Tensor]] = []
        record = LinearGeometry.activation_rows

        def noted(self, *args: object) -> Tensor:
            rows = record(self, *args)
            made.append(weakref.ref(rows))
            return rows

        monkeypatch.setattr(LinearGeometry, "activation_rows", noted)
        for seed in range(3):
            loss_of(model, 16, seed)
        gc.collect()
        assert [rows() for rows in made] == [None] * 6
        loss_of(model, 16, 9).backward()
        pre.step()
        assert pre.report()["raw_gradients"] == 2


def test_inputs_too_large_for_the_damping_are_said(caplog):
    torch.manual_seed(0)
    model = nn.Linear(6, 4)
    with Preconditioner(
        model, sgd(model), damping=1e-3, lag=1, update_every=1, on_late="wait"
    ) as pre:
        for _ in range(2):
            model.zero_grad()
            model(300 * torch.rand(16, 6)).mean().backward()
            pre.step()
        report = pre.report()

    assert report["layers"]["model"]["damping_factor"] > 1
    assert report["versions"]["overdamped"] >= 1
    assert "Layer 'model' has" in caplog.text
    assert "times the damping that was asked for" in caplog.text
