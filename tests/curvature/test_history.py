"""`LayerHistory` against the weighted mean of dense factors of all its updates."""

import math

import pytest
import torch

from skfac.curvature.history import LayerHistory
from skfac.curvature.inverse import DenseInverse, DiagonalInverse, LowRankInverse
from skfac.curvature.layer import precondition_layer
from tests.support.dense import normal, relative_error
from tests.support.weighted import (
    DAMPING,
    EXACT,
    assert_preconditions,
    run_of,
    settings,
    split_pi,
    update_weights,
)

LinAlgError = torch.linalg.LinAlgError  # type: ignore[attr-defined]  # C++ has it

GROUPS = pytest.mark.parametrize("groups", [1, 3], ids=["whole", "grouped"])
KINDS = pytest.mark.parametrize(
    "kind",
    [{}, {"groups": 3}, {"diagonal": True}],
    ids=["whole", "grouped", "diagonal"],
)
HISTORIES = pytest.mark.parametrize("history", ["snapshot", "window", "ema"])


# Rows per update: fewer than d for good, across d_out and d_in, and beyond both.
COUNTS = {
    "below d": [1, 2, 1],
    "crossing d_out": [3, 3, 2, 1],
    "crossing both": [3, 4, 2, 5, 3],
    "one update beyond": [2, 13, 2],
    "all beyond": [12, 15],
    "first of d": [11, 1, 1],
}
EACH_COUNTS = pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)


@EACH_COUNTS
@KINDS
def test_ema_is_the_weighted_mean_of_all_updates(counts, kind):
    run = run_of("ema", **kind)

    for updates, count in enumerate(counts, start=1):
        run.fold(count)

        assert_preconditions(run.precondition(), run, run.exact())
        assert run.history.updates == updates
        assert len(run.history.activations) == len(run.history.derivatives) == 1


@EACH_COUNTS
@KINDS
@pytest.mark.parametrize("window", [1, 2, 3, 9])
def test_window_is_the_weighted_mean_of_the_last_updates(counts, window, kind):
    run = run_of("window", **kind)

    for updates, count in enumerate(counts, start=1):
        run.fold(count, window=window)

        assert_preconditions(run.precondition(), run, run.exact(window))
        assert run.history.updates == min(updates, window)
        assert len(run.history.activations) == min(updates, window)


@EACH_COUNTS
@GROUPS
def test_snapshot_is_the_newest_update(counts, groups):
    run = run_of("snapshot", groups=groups)

    for count in counts:
        run.fold(count)

        assert_preconditions(run.precondition(), run, run.exact(1))
        assert run.history.updates == len(run.history.activations) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [4, 9, 14])
def test_snapshot_has_the_bits_of_the_rows_alone(count, dtype):
    rows = normal(count, 11).to(dtype), normal(count, 7, seed=1).to(dtype)
    history = LayerHistory.empty("snapshot").fold(*rows, settings())

    layer = history.precondition(settings(), "pi", damping=DAMPING)

    alone = precondition_layer(*rows, damping=DAMPING, split="pi")
    assert all(map(torch.equal, layer.tensors, alone.tensors))
    assert layer.activations.damping == alone.activations.damping
    assert layer.derivatives.damping == alone.derivatives.damping
    assert layer.tensors[0].dtype is layer.tensors[1].dtype is dtype


@pytest.mark.parametrize("history", ["window", "ema"])
@pytest.mark.parametrize("count", [4, 14])
def test_without_decay_every_history_is_a_snapshot(history, count):
    run = run_of(history)

    for _ in range(3):
        run.fold(count, decay=0.0)

        assert_preconditions(run.precondition(), run, run.exact(1))
        assert run.history.updates == 1


@pytest.mark.parametrize("history", ["window", "ema"])
def test_an_update_without_decay_forgets_and_the_next_remembers_again(history):
    run = run_of(history)

    for updates, decay in zip([1, 2, 1, 2], [0.5, 0.5, 0.0, 0.5], strict=True):
        run.fold(4, decay=decay)

        assert_preconditions(run.precondition(), run, run.exact())
        assert run.history.updates == updates


@pytest.mark.parametrize("history", ["window", "ema"])
@GROUPS
def test_a_schedule_of_decays_weighs_old_updates_by_later_decays(history, groups):
    run = run_of(history, groups=groups)

    for decay in [0.9, 0.2, 0.5, 0.99, 0.7]:
        run.fold(3, decay=decay)

        assert_preconditions(run.precondition(), run, run.exact())
    assert update_weights([0.9, 0.2, 0.5]) == pytest.approx(
        [w / 0.91 for w in (0.1 * 0.2 * 0.5, 0.8 * 0.5, 0.5)]
    )


def test_a_window_follows_its_schedule():
    run, held = run_of("window"), 0

    for window in [2, 2, 2, 4, 4, 4, 1, 3, 3]:
        run.fold(2, window=window)
        held = min(held + 1, window)

        assert run.history.updates == held
        assert_preconditions(run.precondition(), run, run.exact(held))


def test_each_update_counts_by_its_own_number_of_rows():
    run = run_of("window")

    for count in (1, 6, 2):
        run.fold(count, decay=0.5)

    a, _ = run.exact()
    by_hand = sum(
        w * rows[0].T @ rows[0] / len(rows[0])
        for w, rows in zip((1 / 7, 2 / 7, 4 / 7), run.rows, strict=True)
    )
    torch.testing.assert_close(a, by_hand)
    assert_preconditions(run.precondition(), run, (a, run.exact()[1]))


@HISTORIES
@pytest.mark.parametrize("rank", [1, 3])
def test_a_diagonal_is_exact_whatever_the_rank(history, rank):
    run = run_of(history, diagonal=True)
    for _ in range(3):
        run.fold(4, rank=rank)

    layer = run.precondition(rank=rank, energy=0.5)

    a, g = run.exact(1 if history == "snapshot" else None)
    assert isinstance(layer.activations, DiagonalInverse)
    share, _ = split_pi(a, g)
    expected = torch.linalg.inv(a + share * torch.eye(len(a), dtype=torch.float64))
    torch.testing.assert_close(torch.diag(layer.activations.diagonal[0]), expected)


def test_a_diagonal_takes_any_number_of_rows():
    derivatives = normal(4, 7)
    split_up = normal(6, 11)
    collapsed = split_up.square().sum(0, keepdim=True).sqrt()

    layers = [
        LayerHistory.empty("ema", diagonal=True)
        .fold(rows, derivatives, settings())
        .precondition(settings(), "pi", damping=DAMPING)
        for rows in (split_up, collapsed)
    ]

    torch.testing.assert_close(layers[0].tensors, layers[1].tensors)


@pytest.mark.parametrize("history", ["window", "ema"])
@pytest.mark.parametrize("parts", [2, 3])
def test_rows_of_several_workers_are_those_of_one(history, parts):
    alone = together = LayerHistory.empty(history)
    gradient = normal(7, 11, seed=5)

    for seed in range(3):
        rows = normal(8, 18, seed=seed)
        sizes = [*range(1, parts), 8 - sum(range(1, parts))]
        shards = torch.cat(rows.split(sizes)[::-1])
        alone = alone.fold(rows[:, :11], rows[:, 11:], settings(rank=9))
        together = together.fold(shards[:, :11], shards[:, 11:], settings(rank=9))

    applied = [
        one.precondition(settings(rank=9), "pi", damping=DAMPING).apply(gradient)
        for one in (alone, together)
    ]
    assert relative_error(applied[1], applied[0]) < EXACT


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("history", ["window", "ema"])
def test_row_and_gradient_space_agree(history, rank):
    run = run_of(history)
    for _ in range(4):
        run.fold(4, rank=rank)
    activations, derivatives = run.rows[-1]
    gradient = derivatives.T @ activations / 4

    layer = run.precondition(rank=rank)

    applied = layer.apply(gradient)
    turned = layer.derivatives.right(derivatives).T @ layer.activations.right(
        activations
    )
    assert relative_error(turned / 4, applied) < EXACT
    assert (applied * gradient).sum() > 0


@HISTORIES
@pytest.mark.parametrize("count", [3, 8])
def test_nothing_is_decomposed_where_nothing_can_be_cut(history, count, monkeypatch):
    rows = [(normal(count, 11, seed=j), normal(count, 7, seed=-j)) for j in range(3)]

    def refuse(*_: object) -> None:
        raise AssertionError("decomposed for nothing")

    for name in ("eigh", "eigvalsh", "svd"):
        monkeypatch.setattr(torch.linalg, name, refuse)
    kept = LayerHistory.empty(history)
    for rank, pair in zip((None, 40, 11), rows, strict=True):
        kept = kept.fold(*pair, settings(rank=rank))
        kept.precondition(settings(rank=rank), "pi", damping=DAMPING)


@HISTORIES
def test_fold_leaves_the_history_and_the_rows_alone(history):
    rows = normal(3, 11), normal(3, 7)
    copies = [row.clone() for row in rows]
    first = LayerHistory.empty(history).fold(*rows, settings(rank=5))
    tensor = first.activations[0].tensor.clone()
    layer = first.precondition(settings(), "pi", damping=DAMPING)

    for _ in range(3):
        first.fold(*rows, settings(rank=5))
    again = first.precondition(settings(), "pi", damping=DAMPING)

    assert all(map(torch.equal, rows, copies))
    assert torch.equal(first.activations[0].tensor, tensor)
    assert all(map(torch.equal, layer.tensors, again.tensors))
    assert first.updates == 1


@HISTORIES
def test_rows_in_float32_are_kept_in_float64_and_give_float32(history):
    rows = normal(3, 11).float(), normal(3, 7).float()
    kept = LayerHistory.empty(history).fold(*rows, settings())
    kept = kept.fold(*rows, settings())

    layer = kept.precondition(settings(), "pi", damping=DAMPING)

    moments = kept.activations + kept.derivatives
    assert {moment.tensor.dtype for moment in moments} == {torch.float64}
    assert [tensor.dtype for tensor in layer.tensors] == [torch.float32] * 2
    assert kept.nbytes == sum(8 * moment.tensor.numel() + 1024 for moment in moments)


def test_the_same_rows_again_change_nothing_but_the_number_of_updates():
    rows = normal(5, 11), normal(5, 7)
    kept = LayerHistory.empty("ema")
    alone = precondition_layer(*rows, damping=DAMPING, split="pi")

    for _ in range(4):
        kept = kept.fold(*rows, settings())

    layer = kept.precondition(settings(), "pi", damping=DAMPING)
    gradient = normal(7, 11, seed=2)
    assert relative_error(layer.apply(gradient), alone.apply(gradient)) < EXACT


@HISTORIES
def test_damping_of_a_retry_replaces_that_of_the_settings(history):
    run = run_of(history)
    run.fold(4)

    layer = run.precondition(damping=4.0)

    product = layer.activations.damping * layer.derivatives.damping
    assert product == pytest.approx(4.0)


@HISTORIES
def test_a_condition_beyond_the_dtype_is_refused_until_damping_grows(history):
    rows = torch.full((3, 11), 1e3), torch.full((3, 7), 1e3)
    kept = LayerHistory.empty(history).fold(*rows, settings())

    with pytest.raises(LinAlgError, match=r"torch\.float32 holds at most"):
        kept.precondition(settings(), "equal", damping=1e-2)
    kept.precondition(settings(), "equal", damping=1e4)


@HISTORIES
@pytest.mark.parametrize("side", [0, 1])
def test_rows_that_are_not_finite_are_refused_and_leave_the_history(history, side):
    rows = [normal(3, 11), normal(3, 7)]
    kept = LayerHistory.empty(history).fold(*rows, settings())
    rows[side][1, 1] = math.nan

    with pytest.raises(ValueError, match="must be finite"):
        kept.fold(*rows, settings())
    kept.precondition(settings(), "pi", damping=DAMPING)


@HISTORIES
@pytest.mark.parametrize("diagonal", [False, True])
def test_rejects_an_update_without_rows(history, diagonal):
    with pytest.raises(ValueError, match="at least one row"):
        LayerHistory.empty(history, diagonal=diagonal).fold(
            torch.zeros(0, 3), torch.zeros(0, 2), settings()
        )


@HISTORIES
def test_rejects_preconditioning_without_an_update(history):
    with pytest.raises(ValueError, match="without updates"):
        LayerHistory.empty(history).precondition(settings(), "pi", damping=DAMPING)


def test_enough_updates_make_the_result_dense():
    run = run_of("window")
    run.fold(6)
    first = run.precondition()
    run.fold(6)

    assert isinstance(first.activations, LowRankInverse)
    assert isinstance(run.precondition().activations, DenseInverse)
