"""What row space does not know of leaves gradients as they should be."""

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from skfac.client import Preconditioner
from tests.support.models import sgd

STEPS = 4
CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-12}
Loss = Callable[[Any, Tensor], Tensor]


def model_of_two() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 9), nn.Tanh(), nn.Linear(9, 3)).double()


def batch(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(6, 8, generator=generator, dtype=torch.float64)


def loss_of(model: nn.Module, inputs: Tensor) -> Tensor:
    found: Tensor = model(inputs).square().mean()
    return found


def gradients_of(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def gradients(
    model: nn.Module, apply: str, loss: Loss = loss_of, **settings: Any
) -> list[dict[str, Tensor]]:
    """Take steps without an update: the gradients of each."""
    settings = {
        **{"update_every": 1, "trust": "none", "damping": 0.01, "on_late": "wait"},
        **{"wire_dtype": "float64", **settings},
    }
    found = []
    with Preconditioner(model, sgd(model), apply=apply, **settings) as pre:
        for step in range(STEPS):
            model.zero_grad()
            loss(model, batch(step)).backward()
            pre.step()
            found.append(
                {
                    name: parameter.grad.clone()
                    for name, parameter in model.named_parameters()
                    if parameter.grad is not None
                }
            )
    return found


def assert_same_gradients(make: Callable[[], nn.Module], **settings: Any) -> None:
    for mine, expected in zip(
        gradients(make(), "row", **settings),
        gradients(make(), "gradient", **settings),
        strict=True,
    ):
        assert mine.keys() == expected.keys()
        for name, gradient in mine.items():
            torch.testing.assert_close(gradient, expected[name], **CLOSE)


def test_what_an_instance_s_own_forward_adds_gets_its_gradient():
    def adapted() -> nn.Module:
        model = model_of_two()
        layer = model[0]
        layer.down = nn.Parameter(torch.randn(8, 2, dtype=torch.float64))
        plain = layer.forward
        layer.forward = lambda x: 3 * plain(x) + (x @ layer.down).sum(-1, keepdim=True)
        return model

    assert_same_gradients(adapted)


@contextmanager
def everywhere(scale: nn.Parameter) -> Iterator[None]:
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, _, output: output * scale if type(module) is nn.Linear else None
    )
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("place", ["global", "prepended"])
def test_what_a_hook_before_ours_adds_gets_its_gradient(place):
    scales = []
    for apply in ("row", "gradient"):
        model, scale = model_of_two(), nn.Parameter(torch.tensor(2.0).double())

        def loss(model: Any, inputs: Tensor, scale: nn.Parameter = scale) -> Tensor:
            if place == "global":
                with everywhere(scale):
                    return loss_of(model, inputs)
            handle = model[0].register_forward_hook(
                lambda module, _, output: output * scale, prepend=True
            )
            try:
                return loss_of(model, inputs)
            finally:
                handle.remove()

        found = gradients(model, apply, loss)
        scales.append((scale.grad, found))

    (mine, others), (expected, theirs) = scales
    assert mine is not None
    torch.testing.assert_close(mine, expected, **CLOSE)
    for one, other in zip(others, theirs, strict=True):
        torch.testing.assert_close(one["0.weight"], other["0.weight"], **CLOSE)


def penalized(model: nn.Module, inputs: Tensor) -> Tensor:
    weight = next(model.parameters())
    return loss_of(model, inputs) + 0.3 * weight.square().sum()


def test_a_penalty_on_a_layer_that_is_used_twice_is_seen():
    def twice() -> nn.Module:
        torch.manual_seed(0)
        shared = nn.Linear(8, 8)
        return nn.Sequential(shared, nn.Tanh(), shared, nn.Linear(8, 3)).double()

    assert_same_gradients(twice, loss=penalized)


def test_a_penalty_beside_a_gradient_by_the_inputs_is_seen():
    def loss(model: Any, inputs: Tensor) -> Tensor:
        found = penalized(model, inputs.requires_grad_())
        torch.autograd.grad(found, inputs, retain_graph=True)
        return found

    assert_same_gradients(model_of_two, loss=loss)


def test_a_penalty_that_comes_late_is_said(caplog):
    steps = iter(range(2 * STEPS))

    def loss(model: Any, inputs: Tensor) -> Tensor:
        return (loss_of if next(steps) % STEPS < 2 else penalized)(model, inputs)

    rows = gradients(model_of_two(), "row", loss)
    expected = gradients(model_of_two(), "gradient", loss)

    (record,) = (r for r in caplog.records if "gradient space" in r.message)
    assert record.levelno == logging.WARNING
    assert "may have missed" in record.message
    for step in (0, 1, 3):  # the penalty came in step 2
        torch.testing.assert_close(rows[step], expected[step], **CLOSE)


def test_a_layer_that_fell_back_stays_so_when_a_run_is_resumed():
    model = model_of_two()
    settings: dict[str, Any] = {"apply": "row", "update_every": 1, "on_late": "wait"}
    with Preconditioner(model, sgd(model), **settings) as pre:
        for step in range(2):
            model.zero_grad()
            penalized(model, batch(step)).backward()
            pre.step()
        state = pre.state_dict()
    with Preconditioner(model, sgd(model), **settings) as pre:
        pre.load_state_dict(state)
        model.zero_grad()
        penalized(model, batch(2)).backward()
        pre.step()
        layers = pre.report()["layers"]

    assert [layers["0"]["apply"], layers["2"]["apply"]] == ["gradient", "row"]
    assert state["gradient_space"] == ["0"]


@pytest.mark.parametrize("passes", [1, 3])
def test_a_monte_carlo_fisher_in_micro_batches(passes):
    def steps(apply: str) -> list[Tensor]:
        model, found = model_of_two(), []
        optimizer = sgd(model)
        with Preconditioner(
            model,
            optimizer,
            fisher="monte_carlo",
            accumulation_steps=passes,
            **{"update_every": 1, "on_late": "wait", "wire_dtype": "float64"},
            apply=apply,
        ) as pre:
            for step in range(STEPS):
                optimizer.zero_grad()
                for place in range(passes):
                    output = model(batch(10 * step + place))
                    drawn = output.detach() + batch(100 * step + place)[:, :3]
                    pre.capture_from((output - drawn).square().mean() / passes)
                    (output.square().mean() / passes).backward()
                pre.step()
                grads = [p.grad for p in model.parameters() if p.grad is not None]
                found.append(torch.cat([grad.reshape(-1) for grad in grads]))
            assert pre.report()["versions"]["solved"] > 0
        return found

    for mine, expected in zip(steps("row"), steps("gradient"), strict=True):
        torch.testing.assert_close(mine, expected, **CLOSE)


def test_a_bias_that_is_frozen_later_counts_as_zero():
    def loss(model: Any, inputs: Tensor) -> Tensor:
        model[0].bias.requires_grad_(False)
        return loss_of(model, inputs)

    assert_same_gradients(model_of_two, loss=loss)


def test_float16_has_no_room_for_long_directions():
    model = model_of_two().half()
    found = gradients(
        copy.deepcopy(model),
        "row",
        lambda model, inputs: model(inputs.half()).float().square().sum(),
        **{"damping": 1e-7, "trust": "kl", "wire_dtype": "float32"},
    )

    assert all(g.isfinite().all() for step in found for g in step.values())


@pytest.mark.parametrize("apply", ["row", "gradient"])
@pytest.mark.parametrize("layout", ["sparse", "csr", "nested"])
# torch calls both layouts a prototype or a beta.
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested:UserWarning")
def test_inputs_that_are_no_plain_tensors_train_on(layout, apply, caplog):
    def inputs_of(step: int) -> Tensor:
        dense = batch(step) * (batch(step + 1) > 0)
        if layout == "nested":
            parts = [dense[:4], dense[4:]]
            return torch.nested.nested_tensor(parts, layout=torch.jagged)
        return dense.to_sparse() if layout == "sparse" else dense.to_sparse_csr()

    def loss(model: Any, inputs: Tensor) -> Tensor:
        output = model(inputs_of(0))
        return (output.values() if layout == "nested" else output).square().mean()

    model, plain = model_of_two(), model_of_two()
    found = gradients(model, apply, loss)
    loss(plain, batch(0)).backward()

    assert "Layer '0' gives no rows" in caplog.text
    torch.testing.assert_close(found[0]["0.weight"], plain[0].weight.grad, **CLOSE)
