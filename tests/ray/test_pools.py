"""Pools are found by name, and nothing is left of them."""

import psutil
import pytest
from pydantic import ValidationError

from skfac.client import ConfigurationError
from skfac.wire.errors import ServerUnavailableError
from tests.end_to_end.test_faults import Trainer
from tests.support.cluster import engine_processes
from tests.support.servers import LONG_S


def actors() -> list[str]:
    import ray

    return [a["name"] for a in ray.util.list_named_actors(all_namespaces=True)]


def test_a_pool_is_found_by_name_until_it_is_stopped(ray_cluster):
    from skfac.service.ray import get_pool, start_pool

    before, others = actors(), engine_processes()
    with start_pool(2, name="two", namespace="prod", num_cpus=0) as pool:
        found = get_pool("two", "prod")
        assert found.target == pool.target == "ray://prod/two"
        assert found.actors == pool.actors
        assert [status["sessions"] for status in found.status()] == [(), ()]
        assert set(actors()) - set(before) == {"two-0-of-2", "two-1-of-2"}
        mine = [p for p in engine_processes() if p not in others]
    found.stop()  # idempotent

    assert actors() == before
    gone, _ = psutil.wait_procs(mine, timeout=LONG_S)
    assert len(gone) == 2
    with pytest.raises(ServerUnavailableError, match=r"no pool 'two' in .* 'prod'"):
        get_pool("two", "prod")


def test_a_name_is_taken_once(pool):
    from skfac.service.ray import start_pool

    before = actors()
    for count in (1, 2):
        with pytest.raises(ConfigurationError, match=r"a pool 'shared' .* already"):
            start_pool(count, name="shared")
    assert actors() == before


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"num_actors": 0}, ConfigurationError, "num_actors must be at least 1, got 0"),
        ({"name": "a/b"}, ConfigurationError, "got 'a/b'"),
        ({"namespace": ""}, ConfigurationError, "got ''"),
        ({"settings": {"leas_s": 3}}, ValidationError, "leas_s"),
        ({"settings": {"lease_s": -3}}, ValidationError, "lease_s"),
        (
            {"settings": {"device": "cuda:9"}},
            ServerUnavailableError,
            "An actor of the pool does not answer",
        ),
    ],
)
def test_what_cannot_start_leaves_nothing(pool, arguments, error, text):
    from skfac.service.ray import start_pool

    before = actors()
    with pytest.raises(error, match=text):
        start_pool(**{"name": "wrong", "num_cpus": 0, **arguments})
    assert actors() == before


def test_handles_are_targets(pool):
    for target in (pool.actors[0], list(pool.actors), pool.actors):
        with Trainer(target, update_every=1) as trainer:
            trainer.step_until(lambda report: report["versions"].get("solved", 0) >= 8)


def test_a_trainer_waits_for_a_pool(ray_cluster, caplog):
    from skfac.service.ray import start_pool

    with Trainer("ray://late/pool", wait_s=0.1, update_every=2) as trainer:
        trainer.step()
        assert "There is no ray://late/pool." in caplog.text
        with start_pool(name="pool", namespace="late", num_cpus=0):
            trainer.step_until(lambda report: report["versions"].get("solved", 0) >= 8)
