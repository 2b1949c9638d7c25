"""Suite-wide settings."""

import os

import pytest
import torch
from hypothesis import settings

from tests.support.cluster import local_cluster

# Reproducible in CI, and no deadline: the first torch call is slow.
settings.register_profile("default", deadline=None, derandomize=True)
settings.load_profile("default")

# Tensors are tiny here: more threads would only spin on each other's cores. The
# processes that tests start inherit it.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed_torch():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def ray_cluster():
    """One cluster of Ray for all tests that need one: it takes seconds to start."""
    with local_cluster():
        yield
