"""S8: which way tensors take is found out, makes no difference and leaves nothing."""

import errno
import os
import time
from pathlib import Path

import pytest
import torch

from skfac.client import Preconditioner
from skfac.client.shared_link import SharedLink
from skfac.service import regions
from skfac.wire import shared_memory
from skfac.wire.arena import Arena
from skfac.wire.shared_memory import open_region
from tests.support.models import backward, flat_parameters, sgd, small_cnn
from tests.support.servers import LONG_S, ServerProcess, free_address, serving

# On one worker: the tests would see the memory of each other.
pytestmark = pytest.mark.xdist_group("shared_memory")

STEPS = 12
SHARED = ("shared_sent_bytes", "shared_received_bytes")


def left_behind() -> set[Path]:
    return set(shared_memory.FOLDER.glob("skfac-*"))


@pytest.fixture(autouse=True)
def _nothing_is_left():
    before = left_behind()
    yield
    assert left_behind() <= before


class Trainer:
    """Trains step by step, and waits for every version."""

    def __init__(self, target: str, **settings) -> None:
        self.model = small_cnn()
        self.optimizer = sgd(self.model)
        self.preconditioner = Preconditioner(
            self.model,
            self.optimizer,
            target=target,
            **{
                "update_every": 1,
                "lag": 1,
                "on_late": "wait",
                "wait_s": LONG_S,
                **settings,
            },
        )
        self.trajectory: list[torch.Tensor] = []

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, *_: object) -> None:
        self.preconditioner.close()

    def train(self, steps: int = STEPS) -> dict[str, int]:
        """Take steps; returns the counts of the transport."""
        for _ in range(steps):
            backward(self.model, len(self.trajectory))
            self.preconditioner.step()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.trajectory.append(flat_parameters(self.model))
        return self.preconditioner.report()["transport"]


def trained(target: str, **settings) -> tuple[list[torch.Tensor], dict[str, int]]:
    with Trainer(target, **settings) as trainer:
        counts = trainer.train()
    return trainer.trajectory, counts


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, first, second))


@pytest.fixture(scope="module")
def expected():
    return trained("embedded")[0]


@pytest.mark.parametrize("kind", ["TCP", "Unix socket"])
def test_processes_of_one_host_share_memory(kind, tmp_path, expected):
    address = free_address() if kind == "TCP" else f"unix:{tmp_path}/skfac.sock"
    with ServerProcess(address) as server:
        trajectory, counts = trained(server.address)

    assert same(trajectory, expected)
    # All but the first snapshots and versions, for which there was no region yet.
    assert all(counts[name] > counts["sent_bytes"] for name in SHARED)


@pytest.mark.parametrize("history", ["window", "ema"])
def test_histories_change_nothing_of_it(history):
    settings = {"history": history, "window": 3, "rank": 20}
    with serving() as server:
        trajectory, counts = trained(server.address, **settings)

    assert same(trajectory, trained("embedded", **settings)[0])
    assert all(counts[name] > 0 for name in SHARED)


def test_rows_of_a_snapshot_take_one_part_of_the_memory(monkeypatch, expected):
    taken: list[int] = []
    arenas: set[Arena] = set()
    real = Arena.empty

    def empty(arena, shape, dtype):
        taken.append(dtype.itemsize)
        arenas.add(arena)
        return real(arena, shape, dtype)

    monkeypatch.setattr(Arena, "empty", empty)
    with serving() as server, Trainer(server.address) as trainer:
        trainer.train(STEPS // 2)  # the first snapshots have no such memory
        taken.clear()
        (arena,) = arenas
        for _ in range(STEPS // 2, STEPS):
            # There is room for three: a busy machine may give the first back too late.
            end_s = time.monotonic() + LONG_S
            while 3 * arena.free_bytes < 2 * len(arena._mapping):
                assert time.monotonic() < end_s, "It is not given back."
                time.sleep(0.001)
            trainer.train(1)

    assert taken == [1] * (STEPS - STEPS // 2)  # bytes
    assert same(trainer.trajectory, expected)


def seeing(monkeypatch: pytest.MonkeyPatch, **places: Path) -> None:
    """A server with another /dev/shm or /proc, as in a container of its own."""

    def opened(offer, limit):
        with pytest.MonkeyPatch.context() as patch:
            for name, place in places.items():
                patch.setattr(shared_memory, name, place)
            return open_region(offer, limit)

    monkeypatch.setattr(regions, "open_region", opened)


def fail(*_: object) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("why", ["another host", "full", "no such memory"])
def test_without_shared_memory_all_goes_inline(why, monkeypatch, tmp_path, expected):
    if why == "another host":
        seeing(monkeypatch, FOLDER=tmp_path, PROCESSES=tmp_path)
    elif why == "full":
        monkeypatch.setattr(os, "posix_fallocate", fail)
    else:
        monkeypatch.setattr(shared_memory, "FOLDER", tmp_path / "missing")
        monkeypatch.setattr(os, "memfd_create", fail)
    with serving() as server:
        trajectory, counts = trained(server.address)

    assert same(trajectory, expected)
    assert not any(counts.get(name) for name in SHARED)
    assert counts["sent_bytes"] > 0


@pytest.mark.parametrize("place", ["FOLDER", "PROCESSES"])
def test_one_of_both_places_is_enough(place, monkeypatch, tmp_path, expected):
    seeing(monkeypatch, **{place: tmp_path})
    with serving() as server:
        trajectory, counts = trained(server.address)

    assert same(trajectory, expected)
    assert all(counts[name] > 0 for name in SHARED)


def test_a_region_that_is_too_small_loses_nothing(monkeypatch, expected):
    # Room for some tensors of a snapshot, but not for the versions of a whole batch.
    made: list[tuple[int, int]] = []
    real = shared_memory.OwnRegion

    def small(token, up_nbytes, down_nbytes, *, sealed):
        made.append((up_nbytes, down_nbytes))
        return real(token, up_nbytes // 5, down_nbytes // 5, sealed=sealed)

    monkeypatch.setattr("skfac.client.shared_link.OwnRegion", small)
    with serving() as server:
        trajectory, counts = trained(server.address)

    assert same(trajectory, expected)
    (wanted,) = made
    assert 0 < counts["shared_sent_bytes"] < wanted[0] * STEPS // 3
    assert counts["shared_received_bytes"] < counts["received_bytes"]


@pytest.mark.parametrize("named", [False, True])
def test_a_killed_server_leaves_nothing_and_the_next_one_shares_too(
    named, monkeypatch, expected
):
    if named:
        monkeypatch.setattr(os, "memfd_create", fail)
    with ServerProcess() as server, Trainer(server.address) as trainer:
        before = dict(trainer.train(5))
        assert all(before[name] > 0 for name in SHARED)
        server.kill()
        with ServerProcess(server.address):
            after = trainer.train(STEPS - 5)

    assert after["connects"] == 2
    assert all(after[name] > before[name] for name in SHARED)
    assert same(trainer.trajectory, expected)


def test_a_server_that_dies_with_an_offer_unanswered_leaves_nothing(monkeypatch):
    monkeypatch.setattr(os, "memfd_create", fail)  # so that there is a name
    with ServerProcess() as server:
        real = SharedLink.offer

        def offer_to_the_dead(link, snapshot):
            frames = list(real(link, snapshot))
            if frames:
                assert left_behind()
                server.kill()
            yield from frames

        monkeypatch.setattr(SharedLink, "offer", offer_to_the_dead)
        with Trainer(server.address, on_late="keep", wait_s=0.1) as trainer:
            for _ in range(10_000):
                if trainer.train(1).get("disconnects"):  # counted once all is let go
                    break
            assert not left_behind()
