"""What a trainer holds: the versions and snapshots that can be in flight, no more."""

import gc
from contextlib import nullcontext

import pytest

from skfac.client import Preconditioner
from skfac.client.capture import PendingSnapshot
from skfac.wire.outcome import Version
from tests.support.models import backward, sgd, small_cnn
from tests.support.servers import ServerProcess

LAYERS = 4


@pytest.fixture(autouse=True)
def _only_new_objects():
    """What was there before is not looked through, again and again."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def alive(kind: type) -> list:
    return [found for found in gc.get_objects() if type(found) is kind]


@pytest.mark.parametrize(("lag", "update_every"), [(1, 1), (3, 3), (5, 2)])
@pytest.mark.parametrize("remote", [False, True], ids=["embedded", "gRPC"])
def test_no_more_versions_and_snapshots_than_can_be_in_flight(
    lag, update_every, remote
):
    in_flight = -(-lag // update_every) + 1
    model = small_cnn()
    optimizer = sgd(model)
    with ServerProcess() if remote else nullcontext() as server:
        target = "embedded" if server is None else server.address
        with Preconditioner(
            model,
            optimizer,
            target=target,
            lag=lag,
            update_every=update_every,
            on_late="wait",
        ) as preconditioner:
            for step in range(2 * (lag + update_every)):
                backward(model, step)
                preconditioner.step()
                optimizer.zero_grad()
                if remote:  # the embedded engine's own are in this process, too
                    steps = {version.step for version in alive(Version)}
                    assert len(steps) <= in_flight
                    assert steps or step < lag
                snapshots = {snapshot.step for snapshot in alive(PendingSnapshot)}
                assert len(snapshots) <= in_flight


def test_snapshots_for_a_server_that_is_away_are_dropped():
    model = small_cnn()
    optimizer = sgd(model)
    with Preconditioner(
        model, optimizer, target="unix:/nowhere/socket", update_every=1, wait_s=0.01
    ) as preconditioner:
        for step in range(8):
            backward(model, step)
            preconditioner.step()
            optimizer.zero_grad()
            assert len({snapshot.step for snapshot in alive(PendingSnapshot)}) <= 2
        lost = preconditioner.report()["versions"]["superseded"]

    assert lost == 6 * LAYERS
