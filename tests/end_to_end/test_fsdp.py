"""Models that `fully_shard` has spread over the ranks, against DDP on the same data."""

from contextlib import closing
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from skfac.client import ConfigurationError, Preconditioner, shards
from tests.support.ranks import run_ranks
from tests.support.servers import LONG_S, ServerProcess
from tests.support.sharded import (
    Even,
    Reader,
    build,
    by_channels,
    shard,
    share_of_batch,
    whole,
)

pytestmark = [
    pytest.mark.timeout(300),  # each rank imports torch; a busy machine
    pytest.mark.xdist_group("fsdp"),  # one worker makes the runs, once
]

STEPS = 6
SETTINGS = {
    "damping": 0.02,
    "kl_clip": 0.05,
    "update_every": 2,
    "wait_s": LONG_S,
    "wire_dtype": "float64",
}
EXACT = {"rtol": 1e-10, "atol": 1e-10}


class Trainer:
    """Trains as one of the ranks, with DDP, or sharded in the way that `how` says."""

    def __init__(self, how: dict[str, Any] | None, model: nn.Module, **settings: Any):
        self.passes = settings.pop("passes", 1)
        self.wasteful = settings.pop("wasteful", False)
        self.model = model
        self.trained: nn.Module = model
        if how is None:
            self.trained = DistributedDataParallel(model)
        else:
            shard(model, **how)
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
        with torch.no_grad():  # leaves whole parameters in a sharded model
            model(share_of_batch(0, 0, 1)[0])
        self.settings = SETTINGS | settings | {"accumulation_steps": self.passes}

    def preconditioner(self, target: str) -> Preconditioner:
        return Preconditioner(
            self.model, self.optimizer, target=target, **self.settings
        )

    def backward(self, step: int) -> None:
        ranks = distributed.get_world_size()
        tokens, labels = share_of_batch(step, distributed.get_rank(), ranks)
        for part in range(self.passes):
            if isinstance(self.model, FSDPModule):
                self.model.set_requires_gradient_sync(part == self.passes - 1)
            outputs = self.trained(tokens.chunk(self.passes)[part])
            loss = cross_entropy(outputs, labels.chunk(self.passes)[part])
            (loss / self.passes).backward()

    def run(self, preconditioner: Preconditioner, steps: range) -> list[Tensor]:
        after = []
        for step in steps:
            if self.wasteful:
                self.backward(step + 1000)
                self.optimizer.zero_grad()
            self.backward(step)
            preconditioner.step()
            self.optimizer.step()
            self.optimizer.zero_grad()
            after.append(whole(self.model))
        return after


def train(target: str, how: dict[str, Any] | None, **settings: Any) -> dict[str, Any]:
    kind = settings.pop("kind", Reader)
    dtype = settings.pop("dtype", torch.float64)
    trainer = Trainer(how, build(kind, dtype), **settings)
    with trainer.preconditioner(target) as preconditioner:
        after = trainer.run(preconditioner, range(STEPS))
        return {"after": after, "report": preconditioner.report()}


def resume(target: str) -> dict[str, Any]:
    trainer = Trainer({}, build())
    with trainer.preconditioner(target) as first:
        after = trainer.run(first, range(3))
        state = first.state_dict()
    with trainer.preconditioner(target) as second:
        second.load_state_dict(state)
        after += trainer.run(second, range(3, STEPS))
        return {"after": after, "report": second.report()}


def with_small_messages(target: str) -> dict[str, Any]:
    usual, shards._BUCKET_BYTES = shards._BUCKET_BYTES, 1000
    try:
        return train(target, {})
    finally:
        shards._BUCKET_BYTES = usual


def everything(rank: int, target: str) -> dict[str, dict[str, Any]]:
    """All runs in one process: what takes time is to start it."""
    twice = {"passes": 2}
    # Its gradients wait elsewhere until they are reduced.
    reduced = {"mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32)}
    half = {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)}
    single = {"dtype": torch.float32, "wire_dtype": "float32"}
    placed = {"shard_placement_fn": by_channels}
    return {
        "ddp": train(target, None),
        "sharded": train(target, {}),
        "kept": train(target, {"reshard_after_forward": False}),
        "small messages": with_small_messages(target),
        "resumed": resume(target),
        "ddp, graft": train(target, None, trust="graft"),
        "graft": train(target, {}, trust="graft"),
        "ddp, twice": train(target, None, **twice),
        "twice": train(target, {}, **twice),
        "twice, reduced in float32": train(target, reduced, **twice),
        "ddp, wasteful": train(target, None, wasteful=True),
        "wasteful": train(target, {}, wasteful=True),
        "ddp, even": train(target, None, kind=Even),
        "by channels": train(target, placed, kind=Even),
        "ddp, single": train(target, None, **single),
        "single": train(target, {}, **single),
        "half": train(target, half, **single),
    }


@pytest.fixture(scope="module")
def runs():
    with ServerProcess() as server:
        return run_ranks(2, everything, server.address)


PAIRS = [
    ("sharded", "ddp", EXACT),
    ("kept", "ddp", EXACT),
    ("small messages", "sharded", {"rtol": 0, "atol": 0}),
    ("resumed", "sharded", {"rtol": 0, "atol": 0}),
    ("graft", "ddp, graft", EXACT),
    ("twice", "ddp, twice", EXACT),
    ("twice, reduced in float32", "ddp, twice", {"rtol": 1e-5, "atol": 1e-5}),
    ("wasteful", "ddp, wasteful", EXACT),
    ("by channels", "ddp, even", EXACT),
    ("single", "ddp, single", {"rtol": 1e-4, "atol": 1e-4}),
]


def check(runs, pairs):
    for name, reference, tolerance in pairs:
        for rank in runs:
            found, expected = rank[name], runs[0][reference]
            for step in range(STEPS):
                torch.testing.assert_close(
                    found["after"][step],
                    expected["after"][step],
                    msg=lambda text, at=(name, step): f"{at}: {text}",
                    **tolerance,
                )
    for name, mine in runs[0].items():
        for rank in runs[1:]:
            assert all(map(torch.equal, mine["after"], rank[name]["after"])), name
        assert not torch.allclose(mine["after"][0], mine["after"][-1]), name


def test_a_sharded_model_takes_the_steps_of_ddp_and_ranks_agree(runs):
    check(runs, PAIRS)


def unevenly(rank: int, target: str) -> dict[str, dict[str, Any]]:
    """What may depend on how the layers are cut."""
    return {
        "ddp": train(target, None),
        "sharded": train(target, {}),
        "resumed": resume(target),
        "ddp, graft": train(target, None, trust="graft"),
        "graft": train(target, {}, trust="graft"),
        "ddp, twice": train(target, None, passes=2),
        "twice": train(target, {}, passes=2),
    }


@pytest.mark.long
@pytest.mark.parametrize("ranks", [3, 4])
def test_more_ranks_than_two_do_the_same(ranks):
    with ServerProcess() as server:
        runs = run_ranks(ranks, unevenly, server.address)

    check(runs, [pair for pair in PAIRS if pair[0] in runs[0]])


def test_every_layer_is_preconditioned_when_a_version_is_due(runs):
    for rank in runs:
        for name in ("sharded", "twice", "wasteful", "half", "by channels"):
            report = rank[name]["report"]
            layers = len(report["layers"])
            assert report["versions"]["solved"] == layers * STEPS // 2, name
            assert report["raw_gradients"] == layers, name  # of the first step
            assert report["not_finite"] == 0, name


def test_rows_in_half_precision_make_nearly_the_same_steps(runs):
    mine, others = (runs[0][name]["after"] for name in ("half", "single"))
    moved = torch.linalg.norm(others[-1] - others[0])
    assert torch.linalg.norm(mine[-1] - others[-1]) < 0.2 * moved


def hybrid(model: nn.Module) -> None:
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    fully_shard(model, mesh=mesh)


def tensor_parallel(model: nn.Module) -> None:
    mesh = init_device_mesh("cpu", (2,))
    parallelize_module(model, mesh, {"0": ColwiseParallel()})


def by_inputs(model: nn.Module) -> None:
    fully_shard(model, shard_placement_fn=lambda p: Shard(p.ndim - 1))


REFUSED = {
    "hybrid": (nn.Linear(4, 2), hybrid, {}, "mesh of 2 dimensions (2, 1)"),
    "tensor parallel": (nn.Linear(4, 2), tensor_parallel, {}, "tensor parallelism"),
    "FSDP1": (nn.Linear(4, 2), None, {}, "FSDP1"),
    "by inputs": (nn.Linear(4, 2), by_inputs, {}, "dimension 1 of its weight"),
    "groups": (nn.Conv1d(4, 4, 3, groups=2), fully_shard, {}, "groups"),
    "transposed": (nn.ConvTranspose1d(4, 4, 3), fully_shard, {}, "shard_placement_fn"),
    "sampled": (nn.Linear(4, 2), fully_shard, {"fisher": "monte_carlo"}, "empirical"),
}


def refused(rank: int, target: str) -> dict[str, str]:
    """Messages by the keys of `REFUSED`, and of what does not fit the ranks."""
    said: dict[str, str] = {}

    def refuse(name: str, model: nn.Module, **settings: Any) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        try:
            Preconditioner(model, optimizer, target=target, **settings).close()
        except ConfigurationError as error:
            said[name] = str(error)

    for name, (layer, way, settings, _) in REFUSED.items():
        model: nn.Module = nn.Sequential(layer)
        if way is None:
            model = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
        else:
            way(model)
        refuse(name, model, **settings)
    alone = [distributed.new_group([one]) for one in range(2)][rank]
    model = nn.Sequential(nn.Linear(4, 2))
    fully_shard(model)
    refuse("other ranks", model, process_group=alone)
    refuse("row", model, process_group=alone, apply="row")
    said["late"] = late(target)
    said["skipped"] = skipped(target)
    return said


def late(target: str) -> str:
    model = nn.Sequential(nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with closing(Preconditioner(model, optimizer, target=target)) as preconditioner:
        fully_shard(model)
        model(torch.randn(3, 4)).sum().backward()
        try:
            preconditioner.step()
        except ConfigurationError as error:
            return str(error)
    return ""


def skipped(target: str) -> str:
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 1, groups=2))
    fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings = {"target": target, "skip": "1"}
    with closing(Preconditioner(model, optimizer, **settings)) as preconditioner:
        return ", ".join(preconditioner.report()["layers"])


def test_what_cannot_be_sharded_is_refused_by_name():
    with ServerProcess() as server:
        for said in run_ranks(2, refused, server.address):
            for name, (_, _, _, text) in REFUSED.items():
                assert text in said[name]
                assert "'0'" in said[name] or name == "FSDP1"
            for name in ("hybrid", "FSDP1", "groups", "transposed", "sampled"):
                assert "skip=(" in said[name]
            assert "process_group" in said["other ranks"]
            assert "'0' is sharded" in said["row"]
            assert "before it" in said["late"]
            assert said["skipped"] == "0"
