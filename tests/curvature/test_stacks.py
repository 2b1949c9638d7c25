"""Many factors at once: each has the bits, or the refusal, that it has alone."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from skfac.curvature import stacks
from skfac.curvature.damped import DampedFactor, NoInverse
from skfac.curvature.factor import Moment, look_at, moment_of, moments_of
from skfac.curvature.halves import gram
from skfac.curvature.inverse import (
    DenseInverse,
    DiagonalInverse,
    FactorInverse,
    LowRankInverse,
)
from skfac.curvature.invert import invert_factors, invert_moment
from skfac.curvature.layer import (
    DampedLayer,
    LayerPreconditioner,
    StackedPreconditioner,
    precondition_layers,
    precondition_moments,
)
from skfac.curvature.stacks import in_stacks, read_numbers
from tests.support.dense import normal
from tests.support.values import assert_same_preconditioner, same_bits

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
# Some matrices fill whole vectors of the processor, others end inside of one.
SHAPES = [(4, 9), (33, 77), (8, 8), (33, 33), (1, 5), (12, 5), (64, 100), (2, 33, 40)]


@pytest.fixture
def stacked(monkeypatch):
    """Stacks on the CPU, as on a GPU."""
    monkeypatch.setattr(stacks, "faster_on", lambda device: True)


def moments(*shapes: tuple[int, ...]) -> list[Moment]:
    return [
        moment_of(normal(*shape, seed=seed), count=shape[-2])
        for seed, shape in enumerate(shapes)
    ]


def all_forms() -> list[Moment]:
    diagonal = moment_of(normal(3, 9), count=2, diagonal=True)
    dense = moment_of(normal(40, 33), count=40)
    assert dense.form == "dense"
    dropped = moment_of(normal(9, 20), count=9).compressed(rank=4)
    return [*moments(*SHAPES, *SHAPES), diagonal, dense, dropped]


def factors_of(taken: list[Moment], dtype: torch.dtype) -> list[DampedFactor]:
    return [DampedFactor(m, 0.1 + i, dtype) for i, m in enumerate(taken)]


def alone(factor: DampedFactor) -> FactorInverse:
    return invert_moment(factor.moment, damping=factor.damping, dtype=factor.dtype)


def singular() -> Moment:
    return Moment("dense", torch.diag(torch.tensor([1.0, -5.0])).double(), 1.0)


def assert_same(actual: FactorInverse | NoInverse, expected: FactorInverse) -> None:
    assert type(actual) is type(expected)
    assert actual.damping == expected.damping
    assert same_bits(actual.tensor, expected.tensor)
    assert actual.tensor.stride() == expected.tensor.stride()


@DTYPES
@pytest.mark.parametrize("backwards", [False, True])
def test_the_bits_do_not_depend_on_the_others(dtype, backwards):
    factors = factors_of(all_forms(), dtype)
    factors = factors[::-1] if backwards else factors

    together = invert_factors(factors)

    forms = {LowRankInverse, DenseInverse, DiagonalInverse}
    assert {type(inverse) for inverse in together} == forms
    for factor, inverse in zip(factors, together, strict=True):
        assert_same(inverse, alone(factor))


@DTYPES
def test_stacks_find_the_same_inverses(stacked, dtype):
    factors = factors_of(all_forms(), dtype)

    together = invert_factors(factors)

    for factor, inverse in zip(factors, together, strict=True):
        expected = alone(factor)
        assert type(inverse) is type(expected)
        torch.testing.assert_close(inverse.tensor, expected.tensor)
        assert inverse.tensor.is_contiguous()


def test_nothing_is_nothing():
    assert invert_factors([]) == precondition_layers([]) == []


@pytest.mark.parametrize("how", ["alone", "in stacks"])
def test_what_cannot_be_inverted_costs_no_other(how, request):
    if how == "in stacks":
        request.getfixturevalue("stacked")
    good = moments((2, 2), (3, 2), (2, 5), (2, 5))
    steep = moment_of(1e6 * normal(2, 5), count=2)
    factors = factors_of(
        [good[0], singular(), good[1], good[2], steep, good[3]], torch.float32
    )

    found = invert_factors(factors)

    refused = [i for i, one in enumerate(found) if isinstance(one, NoInverse)]
    assert refused == [1, 4]
    assert "is not positive definite: its leading minor of order 2" in found[1].reason
    assert "float32 holds at most" in found[4].reason
    for i in (0, 2, 3, 5):
        torch.testing.assert_close(found[i].tensor, alone(factors[i]).tensor)


def test_a_refusal_is_the_error_of_the_factor_alone():
    (refused,) = invert_factors(factors_of([singular()], torch.float64))

    with pytest.raises(torch.linalg.LinAlgError) as raised:
        alone(factors_of([singular()], torch.float64)[0])
    assert str(raised.value) == refused.reason


def test_rows_are_not_modified():
    taken = all_forms()
    before = [moment.tensor.clone() for moment in taken]

    invert_factors(factors_of(taken, torch.float64))

    assert all(same_bits(m.tensor, old) for m, old in zip(taken, before, strict=True))


def test_layers_have_the_bits_that_they_have_alone():
    sides = moments((4, 9), (4, 6), (7, 5), (7, 12), (33, 33), (33, 77))
    layers = [
        DampedLayer(a, g, damping, "pi", torch.float32)
        for a, g, damping in zip(sides[::2], sides[1::2], (0.1, 1.0, 2.0), strict=True)
    ]
    never = DampedLayer(sides[0], sides[1], float("nan"), "pi", torch.float32)
    layers.insert(1, never)
    layers.insert(2, DampedLayer(sides[0], singular(), 0.1, "equal", torch.float32))

    found = precondition_layers(layers)

    assert isinstance(found[1], NoInverse)
    assert "damping must be positive and finite" in found[1].reason
    assert isinstance(found[2], NoInverse)
    for i in (0, 3, 4):
        layer = layers[i]
        expected = precondition_moments(
            layer.activations,
            layer.derivatives,
            damping=layer.damping,
            split=layer.split,
            dtype=layer.dtype,
        )
        assert isinstance(found[i], LayerPreconditioner)
        assert_same_preconditioner(found[i], expected)


def test_stacks_are_of_equal_shapes(stacked):
    heights = []

    def operation(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        heights.append(len(first))
        return first @ second, first.sum((-2, -1))

    firsts = [normal(*shape, seed=i) for i, shape in enumerate([(2, 3), (4, 3)] * 3)]
    seconds = [normal(3, 2 + (i == 4), seed=i) for i in range(6)]

    results = in_stacks(operation, firsts, seconds)

    assert sorted(heights) == [1, 2, 3]
    for first, second, (product, total) in zip(firsts, seconds, results, strict=True):
        torch.testing.assert_close(product, first @ second)
        torch.testing.assert_close(total, first.sum())


def test_the_traces_of_many_are_those_of_each(stacked, monkeypatch):
    taken, waits = [replace(moment) for moment in all_forms()], []

    def read(tensors):
        waits.append(len(tensors))
        return read_numbers(tensors)

    monkeypatch.setattr("skfac.curvature.factor.read_numbers", read)
    look_at(taken)

    assert waits == [len(taken)]
    for moment in taken:
        alone = replace(moment)
        assert "trace" in vars(moment)
        assert "trace" not in vars(alone)
        assert moment.trace == pytest.approx(alone.trace, rel=1e-12)
    look_at(taken)
    assert len(waits) == 1


def test_rows_are_multiplied_once(stacked, monkeypatch):
    products = []

    def multiply(side: Tensor) -> Tensor:
        products.append(side.shape)
        return gram(side)

    monkeypatch.setattr("skfac.curvature.factor.gram", multiply)
    shapes = [(4, 9), (12, 5), (4, 9)]
    rows = [normal(*shape) for shape in shapes]
    taken = moments_of(rows, counts=[4, 12, 4], diagonal=3 * [False])
    look_at(taken)
    found = invert_factors(factors_of(taken, torch.float64))

    assert not any(isinstance(inverse, NoInverse) for inverse in found)
    assert products == [(2, 4, 9), (1, 5, 12)]


def preconditioner(seed: int, *, activations, derivatives) -> LayerPreconditioner:
    sides = (
        (normal(*activations, seed=seed), activations),
        (
            normal(*derivatives, seed=100 + seed),
            derivatives,
        ),
    )
    moments = [
        moment_of(rows, count=rows.shape[-2], diagonal=shape == FLAT)
        for rows, shape in sides
    ]
    damping, dtype = 0.1 * (seed + 1), torch.float64
    return precondition_moments(*moments, damping=damping, split="pi", dtype=dtype)


LOW, TALL, FLAT = (3, 7), (20, 5), (2, 6)


@pytest.mark.parametrize(
    ("activations", "derivatives"),
    [
        (LOW, LOW),
        (TALL, LOW),
        (LOW, TALL),
        (TALL, TALL),
        (FLAT, LOW),
        ((2, 3, 7), (2, 9, 4)),
    ],
)
def test_gradients_of_equal_shapes_are_preconditioned_together(
    activations, derivatives
):
    sides = {"activations": activations, "derivatives": derivatives}
    ones = [preconditioner(seed, **sides) for seed in range(3)]
    groups = activations[:-2]
    gradients = [
        normal(*groups, derivatives[-1], activations[-1], seed=i) for i in (7, 8, 9)
    ]

    stack = StackedPreconditioner(ones[:2])
    memory = {tensor.data_ptr() for view in stack.views for tensor in view.tensors}
    for taken in (ones[:2], ones[1:], [stack.views[0], ones[0]]):
        expected = [
            one.with_tensors(*(t.clone() for t in one.tensors)) for one in taken
        ]
        stack.replace(taken)

        directions = stack.apply(torch.stack(gradients[:2]))
        for i, (one, view) in enumerate(zip(expected, stack.views, strict=True)):
            assert_same_preconditioner(view, one)
            direction = directions[i] * stack.factors[i]
            torch.testing.assert_close(direction, one.apply(gradients[i]))
    assert memory == {t.data_ptr() for view in stack.views for t in view.tensors}


class Products(TorchDispatchMode):
    """Notes where matrix products of a shape are."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.places: list[int] = []
        self._shape = shape

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **kwargs or {})
        if op.overloadpacket is torch.ops.aten.mm and result.shape == self._shape:
            self.places.append(result.data_ptr())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_come_and_go_in_one_place(dtype):
    # Else what stays lies between them, and memory is used only once: an engine took
    # twice the memory that it needed.
    factors = factors_of(moments((4, 9), (4, 9), (4, 9)), dtype)
    with Products((4, 9)) as products:
        found = invert_factors(factors)

    stay = {inverse.tensor.data_ptr() for inverse in found}
    assert len(products.places) == len(stay) == 3
    assert len(set(products.places)) == 1
    assert not stay & set(products.places)


def test_numbers_stay_numbers_on_the_cpu_and_are_scalars_elsewhere(monkeypatch):
    cpu = torch.device("cpu")
    assert stacks.numbers_for(cpu, [1.5, 2.5]) == [1.5, 2.5]
    assert stacks.for_each(1.5, torch.ones(2, 3)) == 1.5

    monkeypatch.setattr(stacks, "faster_on", lambda device: True)
    scalars = stacks.numbers_for(cpu, [1.5, 2.5])
    assert [tuple(one.shape) for one in scalars] == [(), ()]
    (scaled,), (other,) = in_stacks(
        lambda rows, by: (rows * stacks.for_each(by, rows),),
        [torch.ones(2, 3), torch.ones(2, 3)],
        scalars,
    )
    assert torch.equal(scaled, torch.full((2, 3), 1.5))
    assert torch.equal(other, torch.full((2, 3), 2.5))
