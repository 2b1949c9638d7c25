"""Runs keep the order, fit, and are as long as they can be."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skfac.wire.runs import runs_within


@given(
    sizes=st.lists(st.integers(0, 9)),
    limit=st.one_of(st.integers(0, 20), st.just(math.inf)),
)
def test_runs_are_as_long_as_they_can_be(sizes, limit):
    runs = list(runs_within(limit, range(len(sizes)), sizes.__getitem__))

    assert [place for run in runs for place in run] == list(range(len(sizes)))
    for run in runs:
        assert len(run) == 1 or sum(sizes[place] for place in run) <= limit
    for run, following in itertools.pairwise(runs):
        assert sum(sizes[place] for place in (*run, following[0])) > limit


@pytest.mark.parametrize("limit", [0, 5])
def test_what_is_too_large_is_alone(limit):
    assert list(runs_within(limit, [7, 6], float)) == [[7], [6]]
