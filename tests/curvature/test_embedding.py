"""Token counts of embeddings."""

import pytest
import torch
from torch import nn

from skfac.curvature.geometry import geometry_of
from skfac.curvature.positions import Positions
from tests.support.dense import geometry_for

# Two samples of three tokens, as often as this over the vocabulary.
TOKENS = torch.tensor([[0, 2, 2], [0, 3, 2]])
COUNTS = torch.tensor([2.0, 0.0, 3.0, 1.0], dtype=torch.float64)
REDUCE, AUTHORS, EXPAND = (
    Positions(reduction, None) for reduction in ("reduce", "authors", "expand")
)


def squares(tokens, positions, **options):
    geometry = geometry_for(nn.Embedding(4, 2, **options))
    (row,) = geometry.activation_rows(tokens, positions)
    return row**2


def test_expand_counts_every_token_times_the_positions():
    # n = 6 rows, S = 3: the diagonal is S · count / n.
    torch.testing.assert_close(squares(TOKENS, EXPAND) / 6, 3 * COUNTS / 6)


@pytest.mark.parametrize("positions", [REDUCE, AUTHORS])
def test_pooled_modes_take_frequencies(positions):
    diagonal = squares(TOKENS, positions) / 2  # n = 2 samples

    torch.testing.assert_close(diagonal, COUNTS / 6)
    assert diagonal.sum() == pytest.approx(1)


def test_subsample_counts_what_it_keeps():
    kept = squares(TOKENS, Positions("subsample", torch.tensor([0, 2])))

    # Tokens 0, 2 and 0, 2; n = 4.
    torch.testing.assert_close(
        kept / 4, torch.tensor([6.0, 0.0, 6.0, 0.0], dtype=torch.float64) / 4
    )


@pytest.mark.parametrize(("padding", "token"), [(0, 0), (2, 2), (-2, 2)])
def test_padding_counts_as_nothing_but_its_position_counts(padding, token):
    found = squares(TOKENS, REDUCE, padding_idx=padding)

    expected = COUNTS / 6
    expected[token] = 0
    torch.testing.assert_close(found / 2, expected)


def test_a_batch_of_padding_has_a_row_of_zeros():
    tokens = torch.full((2, 3), 1)

    assert torch.equal(squares(tokens, EXPAND, padding_idx=1), torch.zeros(4).double())


def test_a_single_token_is_one_sample():
    module = nn.Embedding(4, 2)
    token = torch.tensor(3)
    geometry = geometry_for(module)

    assert geometry.extents(module(token)) == (1, 1)
    assert geometry.activation_rows(token, REDUCE).tolist() == [[0, 0, 0, 1]]
    assert geometry.derivative_rows(module(token), REDUCE, scale=1.0).shape == (1, 2)


def test_tokens_of_32_bits():
    assert torch.equal(squares(TOKENS.int(), EXPAND), squares(TOKENS, EXPAND))


@pytest.mark.parametrize(
    "options",
    [{"sparse": True}, {"max_norm": 1.0}, {"scale_grad_by_freq": True}],
    ids=str,
)
def test_embeddings_with_other_gradients_are_not_supported(options):

    assert geometry_of(nn.Embedding(4, 2, **options)) is None
