"""Other ways to run a model: copies, transforms, compiled, in other types."""

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call

from skfac.client import Preconditioner
from tests.compatibility.cells import record_rows
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
def test_copies_of_a_hooked_model_are_models_of_their_own(apply):
    model, x = mlp(4, 6, 3), normal(8, 4)
    saved = io.BytesIO()
    with Preconditioner(model, sgd(model), **EXACT, apply=apply) as pre:
        pushed = record_rows(pre)
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]  # noqa: S301
        torch.save(model, saved)
        saved.seek(0)
        copies.append(torch.load(saved, weights_only=False))
        squares(model(x)).backward()
        for other in copies:
            squares(other(x)).backward()
        pre.step()
    assert [rows.derivatives.shape[0] for rows in pushed[0]] == [8, 8]
    for other in copies:
        for one, two in zip(other.parameters(), model.parameters(), strict=True):
            assert one is not two
            torch.testing.assert_close(one.grad, two.grad)


@both_spaces
def test_a_functional_call_with_other_parameters_is_not_the_model(apply):
    model, x = mlp(4, 6, 3), normal(8, 4)
    others = {
        n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()
    }

    def backward(model: nn.Module) -> None:
        squares(functional_call(model, others, (2 * x,))).backward()
        per_sample = torch.func.vmap(
            torch.func.grad(lambda p, i: squares(functional_call(model, p, (i,)))),
            in_dims=(None, 0),
        )
        per_sample({n: p.detach() for n, p in others.items()}, x)
        squares(model(x)).backward()

    found = preconditioned(model, backward, apply=apply)
    expected = preconditioned(model, lambda m: squares(m(x)).backward(), apply=apply)
    assert_same(found, expected)


def by_reverse(model: nn.Module, x: Tensor) -> None:
    torch.func.jacrev(model)(x[0])


def by_sample(model: nn.Module, x: Tensor) -> None:
    torch.func.vmap(torch.func.grad(lambda sample: model(sample).sum()))(x)


def by_batch(model: nn.Module, x: Tensor) -> None:
    torch.func.vmap(model)(x)


def by_jvp(model: nn.Module, x: Tensor) -> None:
    torch.func.jvp(model, (x,), (x,))


def by_dual(model: nn.Module, x: Tensor) -> None:
    with forward_ad.dual_level():
        model(forward_ad.make_dual(x, x))


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # torch's
@both_spaces
@pytest.mark.parametrize(
    "transform", [by_reverse, by_sample, by_batch, by_jvp, by_dual]
)
def test_other_ways_to_differentiate_leave_nothing(apply, transform):
    def backward(model: nn.Module) -> None:
        transform(model, 2 * x)
        squares(model(x)).backward()

    model, x = mlp(4, 6, 3), normal(8, 4)
    found = preconditioned(model, backward, apply=apply)
    expected = preconditioned(model, lambda m: squares(m(x)).backward(), apply=apply)
    assert_same(found, expected)


# Torch looks at every tensor's .grad and hides its own warning, but not from "error".
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@both_spaces
def test_a_compiled_model_is_a_model(apply):
    def backward(model: nn.Module) -> None:
        squares(model(x)).backward()

    torch.compiler.reset()
    x = normal(8, 4)
    compiled = torch.compile(mlp(4, 6, 3), backend="eager")
    found = preconditioned(compiled, backward, apply=apply)
    expected = preconditioned(mlp(4, 6, 3), backward, apply=apply)
    assert_same(
        {name.removeprefix("_orig_mod."): g for name, g in found.items()}, expected
    )


@both_spaces
def test_a_model_may_change_its_type_between_steps(apply):
    model, x = mlp(4, 6, 3).float(), normal(8, 4)
    with Preconditioner(model, sgd(model), **EXACT, apply=apply) as pre:
        squares(model(x.float())).backward()
        pre.step()
        model.zero_grad()
        model.double()
        for _ in range(2):
            model.zero_grad()
            squares(model(x)).backward()
            pre.step()
    expected = kfac(model[:2](x), model(x).detach())
    found = {n: p.grad for n, p in model[2].named_parameters()}
    torch.testing.assert_close(as_matrix(found), expected, **CLOSE)


@both_spaces
def test_bfloat16_weights_get_bfloat16_gradients(apply):
    model, x = mlp(4, 6, 3), normal(8, 4)
    expected = preconditioned(model, lambda m: squares(m(x)).backward(), apply=apply)
    cast = copy.deepcopy(model).bfloat16()
    found = preconditioned(
        cast, lambda m: squares(m(x.bfloat16())).backward(), apply=apply
    )
    for name, gradient in found.items():
        assert gradient.dtype == torch.bfloat16
        difference = (gradient.double() - expected[name]).norm()
        assert difference < 0.1 * expected[name].norm()


@both_spaces
def test_a_copy_is_compiled_as_a_whole(apply):
    model, x = mlp(4, 6, 3), normal(8, 4)
    with Preconditioner(model, sgd(model), apply=apply):
        copied = copy.deepcopy(model)
    torch.compiler.reset()

    compiled = torch.compile(copied, backend="eager", fullgraph=True)

    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@both_spaces
def test_a_model_that_has_run_compiled_may_be_wrapped(apply):
    # Compiled code does not look for hooks that came after it.
    torch.compiler.reset()
    x = normal(8, 4)
    model = mlp(4, 6, 3)
    compiled = torch.compile(model, backend="eager")
    squares(compiled(x)).backward()
    for _ in range(2):
        found = preconditioned(
            model, lambda model: squares(compiled(x)).backward(), apply=apply
        )
        expected = kfac(model[:2](x), model(x).detach())
        torch.testing.assert_close(as_matrix(found, "2"), expected, **CLOSE)
