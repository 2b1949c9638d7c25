"""Rows with NaN of one rank: no rank waits for a version of that step."""

from dataclasses import replace

import pytest
import torch

from skfac.wire.errors import InvalidRequestError
from skfac.wire.outcome import Loss, Version
from skfac.wire.snapshot import Snapshot
from tests.support.values import Harness, keys, layer_spec, session_spec, snapshot

SPEC = session_spec(layer_spec("a"), layer_spec("b", 4, 3), world_size=2)


def spoilt(sent: Snapshot) -> Snapshot:
    first, *others = sent.layers
    bad = replace(first, derivatives=torch.full_like(first.derivatives, torch.nan))
    return replace(sent, layers=(bad, *others))


@pytest.fixture
def harness():
    with Harness(assembly_timeout_s=1000) as harness:
        yield harness


@pytest.mark.parametrize("order", ["good first", "bad first"])
def test_all_ranks_are_told_at_once(harness, order):
    session_id = harness.open(SPEC)
    harness.open(SPEC, 1)
    subscription = harness.engine.subscribe(session_id, {})
    good, bad = snapshot(SPEC, 3, rank=0), spoilt(snapshot(SPEC, 3, rank=1))
    if order == "good first":
        assert harness.engine.submit(session_id, good)
    with pytest.raises(InvalidRequestError, match="derivatives of layer 'a' at step 3"):
        harness.engine.submit(session_id, bad)
    if order == "bad first":
        harness.engine.submit(session_id, good)

    lost = harness.take(subscription, 2)
    for rank in (0, 1):
        harness.engine.submit(session_id, snapshot(SPEC, 4, rank=rank))
    solved = harness.take(subscription, 2)

    assert all(isinstance(one, Loss) and one.reason == "refused" for one in lost)
    assert sorted(keys(lost)) == [(0, 3), (1, 3)]
    assert all(isinstance(one, Version) for one in solved)
    assert sorted(keys(solved)) == [(0, 4), (1, 4)]
    (status,) = harness.engine.status().sessions
    assert (status.queued, status.refused) == (0, 1)


def test_a_rank_alone_is_told_by_the_refusal(harness):
    spec = replace(SPEC, world_size=1)
    session_id = harness.open(spec)
    subscription = harness.engine.subscribe(session_id, {})
    with pytest.raises(InvalidRequestError):
        harness.engine.submit(session_id, spoilt(snapshot(spec, 0)))
    harness.engine.submit(session_id, snapshot(spec, 1))

    assert sorted(keys(harness.take(subscription, 2))) == [(0, 1), (1, 1)]
