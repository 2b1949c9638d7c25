"""A server that dies between two ranks' answers, and one that solves the step again."""

import time
from collections.abc import Callable

import torch

from skfac.client.capture import PendingSnapshot
from skfac.client.store import Store
from skfac.client.transport import Transport, connect
from skfac.wire.staging import HostCopy
from tests.faults.proxy import Proxies, Proxy, Weather
from tests.support.servers import LONG_S, serving
from tests.support.values import layer_spec, session_spec, snapshot

SPEC = session_spec(
    layer_spec("a"), world_size=2, lag=1, update_every=50, on_late="keep"
)


class Rank:
    """One of two ranks, without a model."""

    def __init__(self, rank: int, link: Proxy) -> None:
        self.rank, self.link, self.store = rank, link, Store(SPEC)
        face = self.store.link(0)
        self.transport: Transport = connect(link.address, SPEC, rank, face)

    def push(self, step: int) -> None:
        rows = snapshot(SPEC, step, self.rank)
        copies = {
            r.layer: HostCopy([r.activations, r.derivatives], None) for r in rows.layers
        }
        self.store.expect(step)
        self.transport.push(PendingSnapshot(self.rank, step, rows.settings, copies))


def until(condition: Callable[[], object]) -> None:
    end_s = time.monotonic() + LONG_S
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.01)


def decide(ranks: list[Rank], step: int) -> None:
    """What `World.least` does between the ranks."""
    proposals = [rank.store.propose(step, wait_s=0.0) for rank in ranks]
    told = [proposal for proposal in proposals if proposal is not None]
    assert len(told) == len(ranks)
    least = [min(column) for column in zip(*(p.numbers for p in told), strict=True)]
    for rank, proposal in zip(ranks, told, strict=True):
        rank.store.adopt(proposal, least)


def test_two_versions_of_one_step_are_used_by_no_rank():
    with Proxies() as proxies:
        with serving() as server:
            ranks = [Rank(rank, proxies.open(server.address)) for rank in range(2)]
            until(lambda: all(rank.store.links[0] for rank in ranks))
            ranks[1].link.change("down", Weather(stalled=True))
            for rank in ranks:
                rank.push(0)
            until(lambda: ranks[0].store.counts["solved"])
            for rank in ranks:  # so that the end of the server is not told either
                rank.link.cut()
        with serving(assembly_timeout_s=0.1) as server:
            for rank in ranks:
                rank.link.lead_to(server.address)
            ranks[1].link.change("down", Weather())
            until(lambda: ranks[1].store.counts["solved"])
            both = [rank.store._expected[0][0] for rank in ranks]
            decide(ranks, 1)
            for rank in ranks:
                rank.transport.close()

    # Rank 0 had discarded its rows, so that the second version is of rank 1's alone.
    assert [version.ranks for version in both] == [2, 1]
    assert not torch.equal(*(v.preconditioner.tensors[0] for v in both))
    for rank in ranks:
        assert rank.store.in_use == [None]
        assert rank.store.counts["unlike"] == 1
        assert rank.store.counts["failed"] == 1
        assert rank.store.propose(2, wait_s=0.0) is None  # it is over


def test_equal_versions_are_used():
    with Proxies() as proxies, serving() as server:
        ranks = [Rank(rank, proxies.open(server.address)) for rank in range(2)]
        for rank in ranks:
            rank.push(0)
        until(lambda: all(rank.store.counts["solved"] for rank in ranks))
        decide(ranks, 1)
        for rank in ranks:
            rank.transport.close()

    used = [rank.store.in_use[0] for rank in ranks]
    assert torch.equal(*(v.preconditioner.tensors[0] for v in used if v is not None))
    assert not any(rank.store.counts["unlike"] for rank in ranks)
