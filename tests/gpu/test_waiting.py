"""The trainer's thread never waits for the GPU: it runs ahead as it does without us."""

import pytest
import torch
from torch import nn

from skfac.client import Preconditioner
from tests.support.models import batch_at, sgd, small_cnn
from tests.support.servers import LONG_S, ServerProcess
from tests.support.targets import unix_address

SECOND = 2_000_000_000  # of cycles: no GPU of today runs much faster than 2 GHz
LONG = 5  # seconds, for what a GPU that others use takes much less than
pytestmark = pytest.mark.gpu
WARM = 6


@pytest.fixture(params=["embedded", "server"])
def target(request, tmp_path):
    if request.param == "embedded":
        yield "embedded"
        return
    with ServerProcess(unix_address(tmp_path), device="cuda") as server:
        yield server.address


def occupy(seconds: int = 1) -> torch.cuda.Event:
    """Keep the stream busy; returns what tells whether it still is."""
    done = torch.cuda.Event()
    torch.cuda._sleep(seconds * SECOND)
    done.record()
    return done


def mlp() -> nn.Module:
    wide = nn.Linear(64, 900), nn.ReLU(), nn.Linear(900, 900), nn.ReLU()
    return nn.Sequential(nn.Flatten(), *wide, nn.Linear(900, 5))


@pytest.mark.parametrize("trust", ["kl", "graft"])
@pytest.mark.parametrize("make", [small_cnn, mlp])
@pytest.mark.parametrize("scaled", [False, True])
def test_no_part_of_a_step_waits(target, make, trust, scaled):
    # Every step captures a snapshot and begins to use the version of the one before.
    model = make().cuda()
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cuda", enabled=scaled)
    batches = [[tensor.cuda() for tensor in batch_at(step)] for step in range(WARM + 3)]
    settings = {"update_every": 1, "lag": 1, "trust": trust, "grad_scaler": scaler}
    with Preconditioner(model, optimizer, target=target, **settings) as pre:
        for step, (images, labels) in enumerate(batches):
            torch.cuda.synchronize()
            pre._store.settle(LONG_S)
            busy = occupy() if step >= WARM else None
            optimizer.param_groups[0]["lr"] *= 0.9  # as a schedule does

            loss = nn.functional.cross_entropy(model(images), labels)
            scaler.scale(loss).backward()
            pre.step()

            assert busy is None or not busy.query(), step
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        report = pre.report()
    assert report["versions"]["solved"] >= len(report["layers"]) * (WARM + 2)
    assert report["raw_gradients"] == len(report["layers"])  # of step 0 alone


def test_the_copy_of_a_version_waits_for_nothing_of_the_trainer():
    # Else it would come as late as the last kernel that is queued.
    model = mlp().cuda()
    optimizer = sgd(model)
    images, labels = (tensor.cuda() for tensor in batch_at(0))
    with Preconditioner(model, optimizer, update_every=5, lag=4) as pre:
        nn.functional.cross_entropy(model(images), labels).backward()
        pre.step()
        torch.cuda.synchronize()
        busy = occupy(LONG)
        versions = pre._store.settle(LONG_S).expected[0]

        assert not busy.query()
        assert all(version in pre._ready._begun for version in versions)
        copies = [pre._ready._begun[version] for version in versions]
        for copy in copies:
            assert copy._done is not None
            copy._done.synchronize()
        assert not busy.query()
