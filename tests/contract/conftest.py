"""The engines that the tests of this folder are run with, each started once."""

import pytest

from tests.support.targets import grpc_place, ray_place, unix_address

SERVERS = ["tcp", "unix", "ray"]


@pytest.fixture(scope="session")
def tcp():
    with grpc_place("127.0.0.1:0") as place:
        yield place


@pytest.fixture(scope="session")
def unix(tmp_path_factory):
    with grpc_place(unix_address(tmp_path_factory.mktemp("contract"))) as place:
        yield place


@pytest.fixture(scope="session")
def ray(ray_cluster):
    with ray_place() as place:
        yield place


@pytest.fixture(params=SERVERS)
def place(request):
    """A server that can be lost; tests give their jobs names of their own."""
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["embedded", *SERVERS])
def target(request) -> str:
    """Wherever an engine can run."""
    if request.param == "embedded":
        return "embedded"
    return request.getfixturevalue(request.param).target
