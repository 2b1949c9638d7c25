"""Suite-wide settings."""

import os
from importlib.util import find_spec

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


# `make page-check` installs what these need.
collect_ignore = [] if find_spec("selenium") else ["browser"]


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks for groups
def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="there is no CUDA device here")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)
    # Some tests look for "the" cluster of Ray on this machine: one worker has them all.
    for item in items:
        params = item.callspec.id if hasattr(item, "callspec") else ""
        words = {*item.path.parts, *item.path.stem.split("_"), *params.split("-")}
        if "ray" in words or "ray_cluster" in item.fixturenames:
            item.add_marker(pytest.mark.xdist_group("ray"))


@pytest.fixture(autouse=True)
def _one_worker_has_the_group(request):
    """A pytest that is too new for pytest-xdist would run a group's tests at once."""
    group = request.node.get_closest_marker("xdist_group")
    if group is not None and hasattr(request.config, "workerinput"):
        assert request.node.nodeid.endswith(f"@{group.args[0]}")


@pytest.fixture(autouse=True)
def _seed_torch():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def ray_cluster():
    """One cluster of Ray for all tests that need one: it takes seconds to start."""
    with local_cluster():
        yield
