"""Every architecture in every mode, and what the modes must not change."""

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from skfac.client import Preconditioner
from skfac.wire.snapshot import LayerRows
from tests.compatibility.cells import (
    CELLS,
    MICRO_BATCHES,
    MODES,
    problems,
    record_rows,
    run,
)
from tests.compatibility.table import HEADER, cell, committed, counts_of
from tests.support.architectures import ARCHITECTURES, loss_of

REGENERATE = "Run `python -m tests.compatibility.table` to renew docs/compatibility.md."

# One worker has all tests of a model: they share its runs, and compiling takes long.
GROUPS = {name: pytest.mark.xdist_group(name) for name in ARCHITECTURES}

every_model = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=GROUPS[name]) for name in ARCHITECTURES]
)
every_cell = pytest.mark.parametrize(
    ("name", "mode"),
    [pytest.param(name, mode, marks=GROUPS[name]) for name, mode in CELLS],
)


def assert_close(
    actual: Iterable[Tensor], expected: Iterable[Tensor], *, tolerance: float
) -> None:
    """Compare in the Frobenius norm.

    A tensor that is far smaller than the others may be nothing but rounding: softmax
    ignores a shift of all keys, so the derivatives of attention keys sum to zero.
    """
    pairs = list(zip(actual, expected, strict=True))
    least = 0.1 * max(other.norm() for _, other in pairs)
    for one, other in pairs:
        assert one.shape == other.shape
        assert (one - other).norm() <= tolerance * max(other.norm(), least)


def assert_same_rows(actual, expected, *, tolerance: float = 1e-4) -> None:
    for side in ("activations", "derivatives"):
        assert all(getattr(rows, side).shape[-2] > 0 for rows in actual)
        one, other = ([getattr(r, side) for r in rows] for rows in (actual, expected))
        assert_close(one, other, tolerance=tolerance)


def assert_same_gradients(actual, expected) -> None:
    assert actual.keys() == expected.keys()
    assert_close(actual.values(), expected.values(), tolerance=1e-3)


@pytest.mark.timeout(180)  # a compiler on a busy machine
@every_cell
def test_a_cell_of_the_table(name, mode):
    for apply in MODES[mode].applies:
        assert problems(name, apply, run(name, mode, apply)) == []
    assert committed()[name][mode] == cell(name, mode), REGENERATE


@every_model
def test_what_is_preconditioned_is_in_the_table(name):
    line = committed()[name]

    assert list(line) == list(HEADER), REGENERATE
    found = counts_of(run(name, "eager", "gradient"))
    assert list(line.values())[1:3] == found, REGENERATE


def test_the_table_has_all_models():
    assert list(committed()) == list(ARCHITECTURES), REGENERATE


@every_model
def test_both_spaces_take_the_same_steps(name):
    rows, gradients = (
        run(name, "eager", apply).gradients for apply in ("row", "gradient")
    )
    assert_same_gradients(rows, gradients)


@pytest.mark.filterwarnings("ignore::skfac.client.PassThroughWarning")
@every_model
def test_accumulation_captures_the_rows_of_its_micro_batches(name):
    architecture = ARCHITECTURES[name]
    model = architecture.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    parts = []
    for part in architecture.batch(0).split(MICRO_BATCHES):
        with Preconditioner(model, optimizer) as preconditioner:
            pushed = record_rows(preconditioner)
            loss_of(model, part).backward()
            preconditioner.step()
            optimizer.zero_grad()
        parts.append(pushed[0])
    expected = [
        LayerRows(
            index,
            torch.cat([rows.activations for rows in split], dim=-2),
            torch.cat([rows.derivatives for rows in split], dim=-2),
        )
        for index, split in enumerate(zip(*parts, strict=True))
    ]
    for apply in MODES["accumulation"].applies:
        assert_same_rows(run(name, "accumulation", apply).rows, expected)


@every_model
@pytest.mark.parametrize("apply", ["gradient", "row"])
def test_checkpointing_changes_neither_rows_nor_gradients(name, apply):
    plain, checkpointed = run(name, "eager", apply), run(name, "checkpointing", apply)

    assert_same_rows(checkpointed.rows, plain.rows)
    assert_same_gradients(checkpointed.gradients, plain.gradients)


@every_model
def test_compiling_changes_neither_rows_nor_gradients(name):
    plain, compiled = run(name, "eager", "row"), run(name, "torch.compile", "row")

    assert_same_rows(compiled.rows, plain.rows)
    assert_same_gradients(compiled.gradients, plain.gradients)


@every_model
@pytest.mark.parametrize("apply", ["gradient", "row"])
def test_autocast_keeps_the_parameters_types(name, apply):
    plain, cast = run(name, "eager", apply), run(name, "bf16 autocast", apply)

    for parameter, gradient in cast.gradients.items():
        assert gradient.dtype == cast.dtypes[parameter] == torch.float32
        assert gradient.isfinite().all()
    # Of step 0: the weights are the same.
    assert_same_rows(cast.rows, plain.rows, tolerance=0.1)
