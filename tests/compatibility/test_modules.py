"""What models are made of: shared, tied, frozen, idle and moved layers."""

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from skfac.client import PassThroughWarning, Preconditioner
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


@both_spaces
def test_a_linear_layer_gets_kfac(apply):
    model, x = mlp(5, 3), normal(8, 5)
    found = preconditioned(model, lambda m: squares(m(x)).backward(), apply=apply)

    expected = kfac(x, model(x).detach())
    torch.testing.assert_close(as_matrix(found, "0"), expected, **CLOSE)


def reusing(x: Tensor, checkpointing: str) -> Callable[[nn.Module], None]:
    """A backward through three uses of a model, each of them checkpointed."""

    def backward(model: nn.Module) -> None:
        def use(hidden: Tensor) -> Tensor:
            return model(hidden).tanh()  # saved: the forward is run again up to here

        hidden = x.clone().requires_grad_()
        for _ in range(3):
            if checkpointing == "none":
                hidden = use(hidden)
            else:
                reentrant = checkpointing == "reentrant"
                hidden = checkpoint(use, hidden, use_reentrant=reentrant)
        squares(hidden).backward()

    return backward


@both_spaces
@pytest.mark.parametrize("checkpointing", ["none", "non-reentrant", "reentrant"])
def test_a_reused_module_has_the_rows_of_all_its_uses(apply, checkpointing):
    model, x = mlp(4, 4), normal(6, 4)
    inputs, outputs = [x], []
    for _ in range(3):
        outputs.append(model(inputs[-1]))
        outputs[-1].retain_grad()
        inputs.append(outputs[-1].tanh())
    squares(inputs[-1]).backward()
    derivatives = torch.cat([6 * output.grad for output in outputs])

    found = preconditioned(model, reusing(x, checkpointing), apply=apply)
    # Three rows a sample: the gradient is their sum over the batch of 6.
    expected = 3 * kfac(torch.cat(inputs[:-1]), derivatives)
    torch.testing.assert_close(as_matrix(found, "0"), expected, **CLOSE)


@pytest.mark.parametrize("checkpointing", ["non-reentrant", "reentrant"])
@pytest.mark.parametrize("trust", ["kl", "graft"])
def test_the_trust_region_sees_all_uses_of_a_checkpointed_module(checkpointing, trust):
    model, backward = mlp(4, 4), reusing(normal(6, 4), checkpointing)
    row, gradient = (
        preconditioned(model, backward, apply=apply, trust=trust, kl_clip=1e-4)
        for apply in ("row", "gradient")
    )
    assert_same(row, gradient)


@both_spaces
def test_two_linear_layers_that_share_their_parameters_are_one(apply):
    x = normal(6, 4)
    tied, reused = mlp(4, 4, 4), mlp(4, 4)
    tied[2].weight, tied[2].bias = tied[0].weight, tied[0].bias
    found = preconditioned(tied, lambda m: squares(m(x)).backward(), apply=apply)
    expected = preconditioned(
        reused, lambda m: squares(m(m(x).tanh())).backward(), apply=apply
    )
    assert_same(found, expected)


def test_layers_that_share_only_their_weight_pass_through():
    model, x = mlp(4, 4, 4, 3), normal(6, 4)
    model[2].weight = model[0].weight
    squares(model(x)).backward()
    raw = gradients_of(model)
    with pytest.warns(PassThroughWarning, match=r"\(Linear: 0, 2\)"):
        found = preconditioned(model, lambda m: squares(m(x)).backward())

    assert found.keys() == raw.keys()
    for name, gradient in found.items():
        assert torch.allclose(gradient, raw[name]) == (not name.startswith("4"))


class Tied(nn.Module):
    """A language model in small: the head has the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(tokens)))


def test_a_tied_embedding_passes_through():
    model, tokens = Tied().double(), torch.arange(6)
    squares(model(tokens)).backward()
    raw = model.embedding.weight.grad.clone()
    with pytest.warns(
        PassThroughWarning, match=r"\(Embedding: embedding; Linear: head\)"
    ):
        found = preconditioned(model, lambda m: squares(m(tokens)).backward())

    torch.testing.assert_close(found["embedding.weight"], raw)
    assert found.keys() == {"embedding.weight", "body.weight", "body.bias"}


@both_spaces
def test_frozen_layers_stay_out_of_it(apply):
    model, x = mlp(4, 6, 3), normal(8, 4)
    model[0].requires_grad_(False)
    with Preconditioner(model, sgd(model), **EXACT, apply=apply) as pre:
        assert list(pre.report()["layers"]) == ["2"]
    found = preconditioned(model, lambda m: squares(m(x)).backward(), apply=apply)

    assert found.keys() == {"2.weight", "2.bias"}
    expected = kfac(model[:2](x), model(x).detach())
    torch.testing.assert_close(as_matrix(found, "2"), expected, **CLOSE)


@both_spaces
@pytest.mark.parametrize("frozen", ["weight", "bias", "both"])
def test_a_layer_may_be_frozen_later(apply, frozen):
    def backward(model: nn.Module) -> None:
        squares(model(x)).backward()

    x = normal(8, 4)
    model = mlp(4, 6, 3)
    with Preconditioner(model, sgd(model), **EXACT, apply=apply) as pre:
        for step in range(4):
            if step == 2:
                names = ("weight", "bias") if frozen == "both" else (frozen,)
                for name in names:
                    getattr(model[0], name).requires_grad_(False)
            model.zero_grad()
            backward(model)
            pre.step()
    expected = kfac(model[:2](x), model(x).detach())
    found = {n: p.grad for n, p in model[2].named_parameters()}
    torch.testing.assert_close(as_matrix(found), expected, **CLOSE)
    for name, parameter in model[0].named_parameters():
        assert (parameter.grad is None) == (frozen in (name, "both"))
        assert parameter.grad is None or parameter.grad.isfinite().all()


def test_a_layer_that_is_never_used_costs_nothing(caplog):
    model = nn.ModuleDict({"used": nn.Linear(4, 3), "idle": nn.Linear(4, 3)}).double()
    x = normal(8, 4)
    with caplog.at_level(logging.WARNING):
        found = preconditioned(model, lambda m: squares(m["used"](x)).backward())

    assert found.keys() == {"used.weight", "used.bias"}
    expected = kfac(x, model["used"](x).detach())
    torch.testing.assert_close(as_matrix(found, "used"), expected, **CLOSE)
    assert {record.name for record in caplog.records} <= {
        "skfac.service.monitor",
        "skfac.client.store",
    }


@both_spaces
def test_a_layer_without_data_in_a_step_keeps_its_version(apply):
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(4, 3), "b": nn.Linear(4, 3)}).double()
    x = normal(8, 4)
    versions = []
    with Preconditioner(model, sgd(model), **EXACT, apply=apply) as pre:
        for used in ("ab", "a", "a", "ab"):
            model.zero_grad()
            sum(squares(model[name](x)) for name in used).backward()
            pre.step()
            layers = pre.report()["layers"]
            versions.append((layers["a"]["version"], layers["b"]["version"]))
    assert versions == [(None, None), (0, 0), (1, 0), (2, 0)]
    for name in "ab":
        found = {n: p.grad for n, p in model[name].named_parameters()}
        expected = kfac(x, model[name](x).detach())
        torch.testing.assert_close(as_matrix(found), expected, **CLOSE)


@both_spaces
def test_inputs_need_not_be_contiguous(apply):
    x = normal(5, 3, 8).transpose(1, 2)  # [5, 8, 3]
    image = normal(5, 6, 6, 4).permute(0, 3, 1, 2)
    for layer, inputs in (
        (nn.Linear(3, 4), x),
        (nn.Linear(3, 4), x[:, ::2]),
        (nn.Conv2d(4, 3, 3), image),
        (nn.Conv2d(4, 3, 3), image.flip(-1).transpose(2, 3)),
    ):
        assert not inputs.is_contiguous()
        model = layer.double()
        strided, contiguous = (
            preconditioned(
                model, lambda m, i=i: squares(m(i).flatten(1)).backward(), apply=apply
            )
            for i in (inputs, inputs.contiguous())
        )
        assert_same(strided, contiguous)


def test_multihead_attention_passes_through():
    model = nn.ModuleDict(
        {"attention": nn.MultiheadAttention(4, 2), "head": nn.Linear(4, 3)}
    ).double()

    def backward(model: nn.ModuleDict) -> None:
        hidden, _ = model["attention"](x, x, x)
        squares(model["head"](hidden)).backward()

    x = normal(6, 2, 4)
    backward(model)
    raw = {n: p.grad.clone() for n, p in model.named_parameters()}
    with pytest.warns(PassThroughWarning, match=r"attention; .*attention.out_proj"):
        found = preconditioned(model, backward)

    for name, gradient in found.items():
        same = torch.allclose(gradient, raw[name])
        assert same == name.startswith("attention")


@both_spaces
@pytest.mark.parametrize("update_every", [1, 2])  # the second step captures, or not
def test_activations_may_work_in_place(apply, update_every):
    def build(inplace: bool) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(4, 6),
            nn.ReLU(inplace),
            nn.Dropout(0.0, inplace),
            nn.Linear(6, 6),
            nn.SiLU(inplace),
            nn.Linear(6, 3),
        ).double()

    for inputs in (normal(8, 4), normal(8, 2, 4)):
        found = [
            preconditioned(
                build(inplace),
                lambda m, i=inputs: squares(m(i)).backward(),
                apply=apply,
                update_every=update_every,
            )
            for inplace in (True, False)
        ]
        assert_same(*found)
