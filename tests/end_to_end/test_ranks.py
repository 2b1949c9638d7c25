"""Several ranks of one job: the same versions at the same step on all of them."""

import hashlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from skfac.client import ConfigurationError, Preconditioner
from tests.support.models import flat_parameters
from tests.support.ranks import run_ranks
from tests.support.servers import LONG_S, ServerProcess

pytestmark = pytest.mark.timeout(180)  # each rank imports torch; a busy machine

STEPS = 12
BATCH = 8  # of all ranks together
SETTINGS = {"damping": 0.02, "kl_clip": 0.05, "update_every": 2, "wait_s": LONG_S}


def build(dtype=torch.float32) -> nn.Module:
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(80, 6), nn.Linear(6, 3)
    )
    return model.to(dtype)


def share_of_batch(step: int, rank: int, ranks: int, dtype=torch.float32):
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(BATCH, 2, 6, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (BATCH,), generator=generator)
    return inputs.to(dtype).chunk(ranks)[rank], labels.chunk(ranks)[rank]


def digest(parameters: Tensor) -> str:
    return hashlib.sha256(parameters.numpy().tobytes()).hexdigest()


def train(
    rank: int,
    target: str,
    *,
    ddp: bool,
    dtype=torch.float32,
    before: Callable[[int], None] = lambda _: None,
    **settings: Any,
) -> dict[str, Any]:
    """Train as one of the ranks there are; alone if there is no group.

    `before` is called with each step before it begins.
    """
    ranks = distributed.get_world_size() if distributed.is_initialized() else 1
    model = build(dtype)
    trained = DistributedDataParallel(model) if ddp else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    digests, trajectory = [], []
    with Preconditioner(
        model, optimizer, target=target, **{**SETTINGS, **settings}
    ) as preconditioner:
        for step in range(STEPS):
            before(step)
            inputs, labels = share_of_batch(step, rank, ranks, dtype)
            nn.functional.cross_entropy(trained(inputs), labels).backward()
            if ranks > 1 and not ddp:
                for parameter in model.parameters():
                    assert parameter.grad is not None
                    distributed.all_reduce(parameter.grad)
                    parameter.grad.div_(ranks)
            preconditioner.step()
            optimizer.step()
            optimizer.zero_grad()
            trajectory.append(flat_parameters(model))
            digests.append(digest(trajectory[-1]))
        used = preconditioner._store.in_use
        versions = [v.preconditioner.tensors for v in used if v is not None]
        report = preconditioner.report()
    return {
        "digests": digests,
        "parameters": trajectory[-1],
        "trajectory": trajectory,
        "versions": versions,
        "report": report,
    }


def as_rank(rank: int, target: str, ddp: bool, settings: dict[str, Any]):
    return train(rank, target, ddp=ddp, **settings)


@pytest.mark.parametrize("ddp", [True, False], ids=["ddp", "all-reduce"])
def test_replicas_are_identical_after_every_step(ddp):
    with ServerProcess() as server:
        first, second = run_ranks(2, as_rank, server.address, ddp, {})

    assert first["digests"] == second["digests"]
    assert len(set(first["digests"])) == STEPS
    assert [first["report"]["rank"], second["report"]["rank"]] == [0, 1]
    for report in (first["report"], second["report"]):
        assert report["world_size"] == 2
        assert report["versions"]["solved"] == 3 * STEPS // 2
        assert report["raw_gradients"] == 3  # of the first step


@pytest.mark.parametrize("ranks", [2, 4])
def test_more_ranks_with_the_same_batch_give_the_same_preconditioner(ranks):
    settings = {"wire_dtype": "float64", "dtype": torch.float64, "apply": "gradient"}
    with ServerProcess() as server:
        alone = train(0, server.address, ddp=False, **settings)
        together = run_ranks(ranks, as_rank, server.address, True, settings)

    for rank in together:
        torch.testing.assert_close(
            rank["parameters"], alone["parameters"], rtol=1e-10, atol=1e-10
        )
        for mine, others in zip(rank["versions"], alone["versions"], strict=True):
            for a, b in zip(mine, others, strict=True):
                # Vᵀ is unique up to a rotation; the projector is not.
                torch.testing.assert_close(a.mT @ a, b.mT @ b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_synchronous_run_does_not_depend_on_the_number_of_ranks(ranks):
    # `lag=0`: the version of a step is made of the rows of that very step.
    settings = {
        "lag": 0,
        "update_every": 1,
        "on_late": "wait",
        "apply": "gradient",
        "wire_dtype": "float64",
        "dtype": torch.float64,
    }
    alone = train(0, "embedded", ddp=False, **settings)
    with ServerProcess() as server:
        together = run_ranks(ranks, as_rank, server.address, False, settings)

    assert alone["report"]["raw_gradients"] == 0
    for rank in together:
        assert rank["digests"] == together[0]["digests"]
        assert rank["report"]["raw_gradients"] == 0
        # Up to the order in which gradients are summed.
        for mine, others in zip(rank["trajectory"], alone["trajectory"], strict=True):
            torch.testing.assert_close(mine, others, rtol=1e-10, atol=1e-10)


def refused(rank: int, target: str, settings: dict[str, Any]) -> str:
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigurationError) as error:
        Preconditioner(model, optimizer, target=target, **settings)
    return str(error.value)


@pytest.mark.parametrize(
    ("target", "settings", "text"),
    [
        ("embedded", {}, "skfac serve"),
        ("127.0.0.1:9", {"apply": "row"}, "apply='auto'"),
    ],
)
def test_what_ranks_cannot_do_says_what_to_do_instead(target, settings, text):
    for message in run_ranks(2, refused, target, settings):
        assert text in message
