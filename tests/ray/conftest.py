"""A pool of one actor for the tests of this folder."""

import pytest


@pytest.fixture(scope="session")
def pool(ray_cluster):
    from skfac.service.ray import start_pool

    with start_pool(name="shared", num_cpus=0) as pool:
        yield pool
