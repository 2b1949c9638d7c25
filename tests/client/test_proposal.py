"""What ranks make of their proposals: the version that all of them have, or none."""

import pytest

from skfac.client.proposal import Agreement, Proposal


def proposal(here: int, *, settled=True, alive=True) -> Proposal:
    return Proposal(4, 0.1, on_time=True, alive=alive, settled=(settled,), here=(here,))


def agreed(*proposals: Proposal) -> Agreement:
    least = [
        min(column) for column in zip(*(p.numbers for p in proposals), strict=True)
    ]
    found = [p.agreed(least) for p in proposals]
    assert all(one == found[0] for one in found)
    return found[0]


@pytest.mark.parametrize(
    ("here", "usable", "unlike"),
    [
        ((7, 7, 7), True, False),
        ((7, 0, 7), False, False),
        ((0, 0, 0), False, False),
        ((7, 7, 9), False, True),
        ((2**63 - 1, 2**63 - 1, 1), False, True),
        ((7, 9, 0), False, False),
    ],
)
def test_a_version_is_usable_if_all_have_the_same(here, usable, unlike):
    found = agreed(*map(proposal, here))

    assert (found.usable, found.unlike) == ([usable], [unlike])


def test_what_one_rank_still_expects_is_not_settled():
    assert agreed(proposal(7), proposal(0, settled=False)).settled == [False]
    assert agreed(proposal(7), proposal(0)).settled == [True]


def test_one_rank_that_no_server_answers_is_enough():
    assert not agreed(proposal(7), proposal(7, alive=False)).alive
    assert agreed(proposal(7), proposal(7)).alive
