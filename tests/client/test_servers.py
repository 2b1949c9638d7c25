"""All ranks use one map of the layers, whatever each of them sees of the servers.

There is no network: a thread stands for each rank, a fake for each transport.
"""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from skfac.client.servers import Servers
from skfac.client.step_log import StepLog
from skfac.client.store import Store
from tests.support.values import layer_spec, session_spec

NAMES = ("a:1", "b:1", "c:1", "d:1")
LAYERS = 5
TIMEOUT_S = 30.0


class Table:
    """What the ranks pass to each other."""

    def __init__(self, size: int) -> None:
        self.given: list = [None] * size
        self.barrier = threading.Barrier(size, timeout=TIMEOUT_S)


class Together:
    """A world whose ranks are threads."""

    def __init__(self, rank: int, table: Table) -> None:
        self.rank, self.size, self._table = rank, len(table.given), table

    def _all(self, mine):
        self._table.given[self.rank] = mine
        self._table.barrier.wait()
        theirs = list(self._table.given)
        self._table.barrier.wait()
        return theirs

    def agree(self, flags):
        columns = zip(*self._all(list(flags)), strict=True)
        return [all(column) for column in columns]

    def gather(self, text):
        return self._all(text)


class FakeTransport:
    """Remembers which layers it was given at each step."""

    def __init__(self, target: str, link) -> None:
        self.target, self.link = target, link
        self.pushed: list[tuple[int, list[int]]] = []
        self.closed = threading.Event()

    def push(self, snapshot) -> None:
        self.pushed.append((snapshot.step, snapshot.layers))

    def counts(self):
        return {"connects": 1}

    def close(self) -> None:
        self.closed.set()


class Rank:
    """One rank's servers, its store, and every transport that it has had."""

    def __init__(self, rank: int, table: Table) -> None:
        layers = (layer_spec(f"l{i}") for i in range(LAYERS))
        spec = session_spec(*layers, lag=0, world_size=len(table.given))
        self.store = Store(spec)
        self.transports: list[FakeTransport] = []
        world: Any = Together(rank, table)
        self.servers = Servers(
            NAMES[:1], spec, world, self.store, StepLog(), self.connect
        )
        # A lookout that sees what a test says, when it says so.
        self.servers._lookout = SimpleNamespace(  # type: ignore[assignment]
            view=NAMES[:1], failures=0, close=lambda: None
        )

    def connect(self, target, *, link) -> Any:
        self.transports.append(FakeTransport(target, link))
        return self.transports[-1]

    def see(self, view, up) -> None:
        self.servers._lookout.view = view  # type: ignore[union-attr, misc]
        self.servers._look_for_gone(view)
        for server in self.servers._servers:
            self.store.link(server.number).set_link(up=server.target in up)

    def push(self, step: int) -> dict[str, list[int]]:
        only = lambda own, _: SimpleNamespace(step=step, layers=own)  # noqa: E731
        self.servers.push(SimpleNamespace(step=step, only=only))  # type: ignore[arg-type]
        pushed = {t.target: t.pushed[-1] for t in self.transports if t.pushed}
        return {t: layers for t, (at, layers) in pushed.items() if at == step}


subsets = st.sets(st.sampled_from(NAMES)).map(lambda s: tuple(sorted(s)))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), ranks=st.integers(1, 3))
def test_one_map_on_all_ranks_of_servers_that_all_have_found(data, ranks):
    table = Table(ranks)
    each = [Rank(rank, table) for rank in range(ranks)]
    with ThreadPoolExecutor(ranks) as pool:
        used = set(NAMES[:1])
        for step in range(data.draw(st.integers(1, 6))):
            views = [data.draw(subsets.filter(bool)) for _ in each]
            ups = [set(data.draw(subsets)) for _ in each]
            for rank, view, up in zip(each, views, ups, strict=True):
                rank.see(view, up)
            before = used
            maps = list(pool.map(Rank.push, each, [step] * ranks))

            assert all(other == maps[0] for other in maps)
            assert sorted(itertools.chain(*maps[0].values())) == list(range(LAYERS))
            used = set(each[0].servers.targets)
            common = set.intersection(*map(set, views))
            assert used == (common or before)
            assert set(maps[0]) <= used
            # As soon as all ranks reach one, nobody uses what some do not reach.
            reached = used & before & set.intersection(*ups)
            if reached:
                assert set(maps[0]) <= reached


def test_a_server_that_left_is_kept_until_it_owes_nothing():
    rank = Rank(0, Table(1))
    rank.see(NAMES[:1], NAMES[:1])
    rank.push(0)
    rank.see(NAMES[1:2], NAMES[:1])
    rank.push(1)  # the first is still there and owes step 0
    first = rank.transports[0]
    assert not first.closed.is_set()
    assert [t.target for t in rank.transports] == list(NAMES[:2])
    first.link.set_link(up=False)  # and now it will never send it
    assert rank.store.counts["gone"] == LAYERS
    rank.push(2)

    assert first.closed.wait(TIMEOUT_S)
    assert rank.servers.counts() == {"connects": 2}
    assert rank.servers.describe()["server_changes"] == 1


def test_nobody_waits_for_a_server_whose_name_is_gone():
    rank = Rank(0, Table(1))
    rank.see(NAMES[:1], NAMES[:1])
    rank.push(0)
    rank.store.link(0).set_link(up=False)
    assert rank.store.owes(0)  # it may be back
    rank.servers._look_for_gone(NAMES[1:2])

    assert not rank.store.owes(0)
    assert rank.store.counts["gone"] == LAYERS


def test_a_server_that_one_rank_cannot_reach_is_waited_for_by_none(caplog):
    table = Table(2)
    each = [Rank(rank, table) for rank in range(2)]
    for rank in each:
        rank.servers._lookout = None
    each[0].store.link(0).set_link(up=True)
    with ThreadPoolExecutor(2) as pool:
        for step in range(3):
            list(pool.map(Rank.push, each, [step] * 2))
            proposals = list(pool.map(lambda rank: rank.store.propose(0, 600.0), each))
            assert not any(any(one.settled) for one in proposals)
    assert caplog.text.count("Another rank cannot reach a:1") == 1

    each[1].store.link(0).set_link(up=True)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(Rank.push, each, [3] * 2))
    assert all(rank.store._hoped_for(3) for rank in each)
