"""The engines that the tests of this folder are run with, each started once."""

import os

import pytest

from skfac.wire import shared_memory
from tests.support.servers import free_address
from tests.support.targets import grpc_place, ray_place, unix_address

SERVERS = ["tcp", "unix", "inline", "ray"]


@pytest.fixture(scope="session")
def tcp():
    with grpc_place(free_address()) as place:
        yield place


@pytest.fixture(scope="session")
def unix(tmp_path_factory):
    with grpc_place(unix_address(tmp_path_factory.mktemp("contract"))) as place:
        yield place


@pytest.fixture
def inline(tcp, tmp_path, monkeypatch):
    """The server of `tcp`, with which no memory can be shared."""

    def fail(*_: object) -> int:
        raise OSError("There is none.")

    monkeypatch.setattr(shared_memory, "FOLDER", tmp_path / "missing")
    monkeypatch.setattr(os, "memfd_create", fail)
    return tcp


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
