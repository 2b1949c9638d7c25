"""Rows that go past the object store, and what happens where they cannot."""

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import nn

from skfac.client import Preconditioner
from skfac.wire import direct
from tests.support.cluster import crash
from tests.support.models import flat_parameters, sgd
from tests.support.servers import LONG_S

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.skipif(find_spec("nixl") is None, reason="NIXL is for Linux"),
]

BATCH, WIDTH, STEPS = 96, 2048, 6


@pytest.fixture(scope="module")
def pool(ray_cluster):
    from skfac.service.ray import start_pool

    with start_pool(name="direct", num_cpus=0, takes_direct=True) as pool:
        yield pool


def trained(target: Any, width: int = WIDTH, before=lambda _: None):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(20, width), nn.Tanh(), nn.Linear(width, 5))
    optimizer = sgd(model)
    settings = {"update_every": 1, "on_late": "wait", "wait_s": LONG_S}
    with Preconditioner(model, optimizer, target=target, **settings) as pre:
        for step in range(STEPS):
            before(step)
            generator = torch.Generator().manual_seed(step)
            inputs = torch.randn(BATCH, 20, generator=generator)
            nn.functional.cross_entropy(
                model(inputs), torch.arange(BATCH) % 5
            ).backward()
            pre.step()
            optimizer.step()
            optimizer.zero_grad()
        report = pre.report()
    return flat_parameters(model), report


def test_large_rows_go_past_the_store_to_the_same_bits(pool):
    found, report = trained(pool.target)
    expected, _ = trained("embedded")

    assert torch.equal(found, expected)
    sent = report["transport"]
    assert sent["direct_sent_bytes"] == sent["sent_bytes"] > STEPS * direct.LEAST_BYTES
    assert sent.get("disconnects", 0) == 0


def test_small_rows_go_through_the_store(pool):
    _, report = trained(pool.target, width=30)

    assert report["versions"]["solved"] > 0
    assert report["transport"]["direct_sent_bytes"] == 0


def test_a_trainer_without_nixl_uses_the_store(pool, monkeypatch):
    monkeypatch.setattr(direct, "is_available", lambda: False)
    found, report = trained(pool.target)

    assert torch.equal(found, trained("embedded")[0])
    assert report["transport"]["direct_sent_bytes"] == 0


def test_a_pool_that_was_not_made_for_it_is_not_asked(ray_cluster):
    from skfac.service.ray import start_pool

    with start_pool(name="plain", num_cpus=0) as plain:
        _, report = trained(plain.target)

    assert report["versions"]["solved"] > 0
    assert report["transport"]["direct_sent_bytes"] == 0


def test_after_a_failure_rows_go_through_the_store_without_losing_a_bit(pool, caplog):
    def before(step: int) -> None:
        if step == STEPS // 2:
            crash(pool.actors[0])

    found, report = trained(pool.target, before=before)

    assert torch.equal(found, trained("embedded")[0])
    assert report["transport"]["direct_sent_bytes"] > 0
    assert report["transport"]["disconnects"] == 1


def test_rows_without_memory_are_not_worth_it():
    large = torch.zeros(direct.LEAST_BYTES, dtype=torch.uint8)
    assert direct.is_worth_it([large])
    assert not direct.is_worth_it([large[1:]])
    assert not direct.is_worth_it([large, torch.empty(0, 3)])


def test_a_payload_of_anything_is_for_the_checks_to_refuse():
    assert direct.arrays_in("nonsense") == "nonsense"
    (array, other) = direct.arrays_in([torch.ones(3, dtype=torch.uint8), 5])
    assert array.tolist() == [1, 1, 1]
    assert other == 5
