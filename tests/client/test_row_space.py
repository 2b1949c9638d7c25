"""Row space against gradient space: the same steps, whatever the trainer does."""

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from skfac.client import Preconditioner

STEPS = 5
CLOSE = {"rtol": 1e-9, "atol": 1e-12}


class TransposedLinear(nn.Module):
    """What transformers calls Conv1D."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf) / nx**0.5)
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


TransposedLinear.__name__ = "Conv1D"
TransposedLinear.__module__ = "transformers.pytorch_utils"


def mlp(*, bias: bool = True, first: type[nn.Module] = nn.Linear) -> nn.Sequential:
    """Layers on which rows are cheaper, and one on which they are not."""
    torch.manual_seed(0)
    head = (
        TransposedLinear(40, 30) if first is TransposedLinear else first(30, 40, bias)
    )
    return nn.Sequential(
        head,
        nn.ReLU(inplace=True),
        nn.Linear(40, 50, bias),
        nn.Tanh(),
        nn.Linear(50, 4, bias),
    ).double()


def batch_at(step: int, size: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(size, 30, generator=generator, dtype=torch.float64)
    return inputs, inputs[:, :4].argmax(1)


def loss_of(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(inputs), labels)


def train(
    model: nn.Module,
    apply: str,
    *,
    backward=lambda model, step, scaler: scaled(model, step, scaler).backward(),
    scaler=None,
    **settings,
):
    """Some steps of a copy of a model.

    Returns:
        Its parameters and the report.
    """
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    chosen: dict[str, Any] = {
        "update_every": 2,
        "lag": 1,
        "on_late": "wait",
        "wire_dtype": "float64",
        "kl_clip": 1e-3,
    } | settings
    with Preconditioner(
        model, optimizer, apply=apply, grad_scaler=scaler, **chosen
    ) as preconditioner:
        for step in range(STEPS):
            backward(model, step, scaler)
            preconditioner.step()
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad()
        report = preconditioner.report()
    return [p.detach().clone() for p in model.parameters()], report


def scaled(model, step, scaler) -> Tensor:
    loss = loss_of(model, *batch_at(step))
    return loss if scaler is None else scaler.scale(loss)


def applied(report) -> list[str]:
    return [layer["apply"] for layer in report["layers"].values()]


def assert_same_steps(model, expected=("row", "row", "row"), **settings):
    """Row space and gradient space take the same steps."""
    rows, row_report = train(model, "row", **settings)
    gradients, report = train(model, "gradient", **settings)

    assert applied(row_report) == list(expected)
    assert set(applied(report)) == {"gradient"}
    for row, gradient, start in zip(rows, gradients, model.parameters(), strict=True):
        torch.testing.assert_close(row, gradient, **CLOSE)
        assert not torch.allclose(row, start)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("trust", ["kl", "graft", "none"])
def test_the_steps_are_the_same(bias, trust):
    assert_same_steps(mlp(bias=bias), trust=trust)


@pytest.mark.parametrize("history", ["window", "ema"])
def test_the_steps_are_the_same_with_a_history(history):
    assert_same_steps(mlp(), history=history, rank=16)


def test_the_steps_are_the_same_for_transposed_weights():
    assert_same_steps(mlp(first=TransposedLinear))


def test_the_steps_are_the_same_in_micro_batches():
    def backward(model, step, scaler):
        inputs, labels = batch_at(step)
        for part in (slice(0, 3), slice(3, 12)):
            share = len(inputs[part]) / len(inputs)
            (share * loss_of(model, inputs[part], labels[part])).backward()

    assert_same_steps(mlp(), backward=backward, accumulation_steps=2)


def test_the_steps_are_the_same_under_a_loss_scale():
    assert_same_steps(mlp(), scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))


def test_the_steps_are_the_same_on_sequences():
    def backward(model, step, scaler):
        tokens = torch.stack([batch_at(10 * step + t, 4)[0] for t in range(3)], 1)
        model(tokens).square().sum(2).mean().backward()

    assert_same_steps(mlp(), backward=backward)


def test_the_steps_are_the_same_for_a_layer_that_is_used_twice():
    torch.manual_seed(0)
    shared = nn.Linear(30, 30)
    model = nn.Sequential(shared, nn.Tanh(), shared, nn.Linear(30, 4)).double()

    assert_same_steps(model, expected=["gradient", "row"])


def test_the_steps_are_the_same_through_checkpointing():
    def backward(model, step, scaler):
        inputs, labels = batch_at(step)
        hidden = torch.utils.checkpoint.checkpoint(
            model[:3], inputs.requires_grad_(), use_reentrant=False
        )
        loss_of(model[3:], hidden, labels).backward()

    assert_same_steps(mlp(), backward=backward)


def test_inputs_get_the_same_gradients():
    gradients = []
    for apply in ("row", "gradient"):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with Preconditioner(model, optimizer, apply=apply):
            inputs, labels = batch_at(0)
            loss_of(model, inputs.requires_grad_(), labels).backward()
        gradients.append(inputs.grad)
    torch.testing.assert_close(*gradients)


def test_mixed_precision_comes_out_in_the_parameter_s_type():
    def backward(model, step, scaler):
        inputs, labels = batch_at(step)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, inputs.float(), labels)
        loss.backward()

    model = mlp().float()
    rows, report = train(model, "row", backward=backward, wire_dtype="float32")
    gradients, _ = train(model, "gradient", backward=backward, wire_dtype="float32")

    assert set(applied(report)) == {"row"}
    for row, gradient, start in zip(rows, gradients, model.parameters(), strict=True):
        assert row.dtype == torch.float32
        # Gradient space gets its products rounded to bfloat16.
        moved = (gradient - start).norm()
        assert (row - gradient).norm() < 0.05 * moved


def wide() -> nn.Sequential:
    """Layers of which rows save much, as long as they are few; much; nothing."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(30, 2000), nn.Tanh(), nn.Linear(2000, 50), nn.Tanh(), nn.Linear(50, 4)
    ).double()


def test_each_layer_goes_where_it_costs_less():
    _, report = train(wide(), "auto")  # 12 rows

    assert applied(report) == ["row", "row", "gradient"]


def test_what_saves_little_costs_more_than_it_saves():
    _, report = train(mlp(), "auto")

    assert applied(report) == ["gradient", "gradient", "gradient"]


def test_more_micro_batches_make_rows_dearer():
    def backward(model, step, scaler):
        for _ in range(2):
            (loss_of(model, *batch_at(step, 11)) / 2).backward()

    _, report = train(wide(), "auto", backward=backward, accumulation_steps=2)

    assert applied(report) == ["gradient", "row", "gradient"]


def test_a_synchronous_run_is_in_gradient_space():
    _, report = train(wide(), "auto", lag=0)

    assert applied(report) == ["gradient"] * 3


def test_other_layers_stay_in_gradient_space():
    torch.manual_seed(0)
    convolution = nn.Conv2d(1, 8, 5)
    model = nn.Sequential(
        nn.Unflatten(1, (1, 5, 6)), convolution, nn.Flatten(), nn.Linear(16, 4)
    )
    _, report = train(model.double(), "row")

    assert applied(report) == ["gradient", "row"]


def test_gradients_that_were_thrown_away_leave_nothing():
    def backward(model, step, scaler):
        loss_of(model, *batch_at(step + 50)).backward()
        model.zero_grad()
        loss_of(model, *batch_at(step)).backward()

    model = mlp()
    expected, _ = train(model, "row")
    actual, _ = train(model, "row", backward=backward)

    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


def test_a_penalty_on_the_weights_sends_a_layer_to_gradient_space(caplog):
    def backward(model, step, scaler):
        penalty = 0.01 * model[0].weight.square().sum()
        (loss_of(model, *batch_at(step)) + penalty).backward()

    with caplog.at_level(logging.INFO, "skfac.client.row_space"):
        _, report = train(mlp(), "row", backward=backward)

    assert applied(report) == ["gradient", "row", "row"]
    (record,) = caplog.records
    assert "Layer '0' is preconditioned in gradient space" in record.message
    assert record.levelno == logging.INFO  # in the first step, before any version


def test_a_penalty_of_its_own_backward_is_seen_too(caplog):
    def backward(model, step, scaler):
        loss_of(model, *batch_at(step)).backward()
        (0.01 * model[0].weight.square().sum()).backward()

    with caplog.at_level(logging.WARNING):
        _, report = train(mlp(), "row", backward=backward)

    assert applied(report) == ["gradient", "row", "row"]


def test_a_gradient_penalty_is_right():
    def backward(model, step, scaler):
        inputs, labels = batch_at(step)
        loss = loss_of(model, inputs.requires_grad_(), labels)
        (slope,) = torch.autograd.grad(loss, inputs, create_graph=True)
        (loss + slope.square().sum()).backward()

    model = mlp()
    rows, report = train(model, "row", backward=backward)
    gradients, _ = train(model, "gradient", backward=backward)

    assert set(applied(report)) == {"gradient"}
    for row, gradient in zip(rows, gradients, strict=True):
        torch.testing.assert_close(row, gradient, **CLOSE)


def test_hooks_of_others_see_the_output_that_is_used():
    model = mlp()
    seen: list[Tensor] = []
    model[2].register_forward_hook(
        lambda module, inputs, output: output.register_hook(seen.append) and None
    )
    model[2].register_full_backward_hook(
        lambda module, inputs, outputs: seen.append(outputs[0])
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Preconditioner(model, optimizer, apply="row"):
        loss_of(model, *batch_at(0)).backward()

    assert len(seen) == 2
    assert torch.equal(*seen)
    assert type(model[0]) is nn.Linear
    assert "forward" not in vars(model[0])


@pytest.mark.parametrize("apply", ["row", "gradient"])
def test_rows_are_of_the_derivatives_that_the_layer_gets(apply):
    model = mlp()
    layer, nodes = model[2], []

    def double(module, inputs, output):
        nodes.append(output.grad_fn)
        output.register_hook(lambda derivatives: 2 * derivatives)

    layer.register_forward_hook(double)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Preconditioner(model, optimizer, apply=apply, wire_dtype="float64") as pre:
        loss_of(model, *batch_at(0)).backward()
        rows = pre._capture.take(0).wait().layers[1]

    gradient = rows.derivatives.T @ rows.activations / 12
    torch.testing.assert_close(gradient[:, :-1], layer.weight.grad, **CLOSE)
    # In row space the layer's own backward tells them: there is no other one.
    (node,) = nodes
    expected = {"row": "_RowBackwardBackward", "gradient": "_TapBackward"}
    assert type(node).__name__ == expected[apply]


def test_closing_gives_the_module_its_own_backward_back():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Preconditioner(model, optimizer, apply="row"):
        assert "Addmm" not in str(model[0](batch_at(0)[0]).grad_fn)
    assert "Addmm" in str(model[0](batch_at(0)[0]).grad_fn)
    assert not model[0].weight._backward_hooks


def test_a_sampled_loss_leaves_no_gradients():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Preconditioner(model, optimizer, apply="row", fisher="monte_carlo") as pre:
        loss = loss_of(model, *batch_at(0))
        pre.capture_from(loss)

        assert all(p.grad is None for p in model.parameters())
        loss.backward()
        pre.step()


@pytest.mark.parametrize(("kl_clip", "writes"), [(1e9, 0), (1e-9, 1)])
def test_gradients_are_written_again_only_by_a_trust_region_that_binds(kl_clip, writes):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings = {"kl_clip": kl_clip, "on_late": "wait", "update_every": 1}
    with Preconditioner(model, optimizer, apply="row", **settings) as pre:
        for step in range(2):
            optimizer.zero_grad()
            loss_of(model, *batch_at(step)).backward()
            made = [parameter.grad._version for parameter in model.parameters()]
            pre.step()

        assert set(applied(pre.report())) == {"row"}
        assert (pre.report()["trust_scale"] == 1.0) == (not writes)
    now = [parameter.grad._version for parameter in model.parameters()]
    assert now == [version + writes for version in made]
