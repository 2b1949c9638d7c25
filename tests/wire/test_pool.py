"""Names of pools and their actors, and which actor a job is given."""

import pytest

from skfac.wire.errors import ConfigurationError
from skfac.wire.pool import actor_names, actor_of_job, actors_of, pool_of


def test_a_target_names_namespace_and_pool():
    assert pool_of("ray://prod/my-pool") == ("prod", "my-pool", None)
    assert pool_of("ray://prod/my-pool/12") == ("prod", "my-pool", 12)


@pytest.mark.parametrize("target", ["ray://a", "ray:///b", "ray://a/b/c", "ray:a/b"])
def test_other_targets_are_refused(target):
    with pytest.raises(ConfigurationError, match="is not ray://namespace/pool"):
        pool_of(target)


def test_one_actor_tells_of_all():
    names = actor_names("pool", 3)
    others = ["x", "pool", "pool-1", "other-0-of-5", "my-pool-0-of-4"]

    assert actors_of("pool", [names[1], *others]) == names
    assert actors_of("pool", others) == []


def test_jobs_are_spread_and_stay_where_they_are():
    places = [actor_of_job(f"job {number}", 4) for number in range(400)]

    assert all(70 < places.count(index) < 130 for index in range(4))
    assert actor_of_job("mnist", 4) == 0  # on every machine, after any restart
    assert actor_of_job("cifar", 1) == 0
