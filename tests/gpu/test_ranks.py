"""What ranks agree on, and sharded models, where the trainer's group is NCCL's.

One GPU takes one rank of NCCL, so these are groups of one.
"""

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh

from skfac.client import Preconditioner
from skfac.client.world import Ranks
from tests.support import sharded

pytestmark = pytest.mark.gpu


@pytest.fixture
def nccl(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    store = distributed.HashStore()
    distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_ranks_agree_beside_nccl(nccl):
    ranks = Ranks(distributed.group.WORLD)

    assert ranks.least([3, -1]) == [3, -1]
    assert ranks.agree([True, False]) == [True, False]
    assert ranks.mean(0.5) == 0.5
    assert ranks.share("dns:///name") == "dns:///name"
    assert ranks.gather("a") == ["a"]


def trained(model: nn.Module) -> torch.Tensor:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings = {"update_every": 2, "lag": 1, "on_late": "wait", "damping": 0.1}
    with Preconditioner(model, optimizer, **settings) as pre:
        for step in range(8):
            tokens, labels = sharded.share_of_batch(step, 0, 1)
            outputs = model(tokens.cuda())
            nn.functional.cross_entropy(outputs, labels.cuda()).backward()
            pre.step()
            optimizer.step()
            optimizer.zero_grad()
        assert pre.report()["versions"]["solved"] > 0
    return sharded.whole(model).cpu()


def test_a_model_that_is_fully_sharded_on_gpus(nccl):
    model = sharded.build().cuda()
    sharded.shard(model, mesh=init_device_mesh("cuda", (1,)))

    found, expected = trained(model), trained(sharded.build().cuda())

    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
