"""What a server shares with others of its machine: addresses and threads."""

import socket
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from skfac.v1 import preconditioning_pb2 as pb
from skfac.v1.preconditioning_pb2_grpc import PreconditioningServiceStub
from tests.support.raw_client import TIMEOUT_S, RawClient, spec_of
from tests.support.servers import serving


@pytest.fixture
def server():
    with serving() as server:
        yield server


@pytest.fixture
def client(server):
    with RawClient(server.address, spec_of("job")) as client:
        yield client


def test_two_servers_cannot_share_an_address(server):
    with (
        pytest.raises(OSError, match=r"Cannot listen on address"),
        serving(address=server.address),
    ):
        pass
    with (
        pytest.raises(OSError, match=r"Cannot listen on metrics_address"),
        serving(metrics_address=server.metrics_address),
    ):
        pass


def test_a_unix_socket_is_not_taken_over(tmp_path):
    address = f"unix:{tmp_path}/socket"
    with serving(address=address), RawClient(address, spec_of("job")) as client:
        with (
            pytest.raises(OSError, match=r"Another server listens there"),
            serving(address=address),
        ):
            pass
        client.versions_of(0)
    with socket.socket(socket.AF_UNIX) as stale:  # as of a server that was killed
        stale.bind(str(tmp_path / "socket"))
    with serving(address=address), RawClient(address, spec_of("job")) as client:
        client.versions_of(0)


def test_a_server_that_gets_no_more_threads_goes_on(server, client, monkeypatch):
    def fail(*_):
        raise RuntimeError("can't start new thread")

    client.versions_of(0)
    with monkeypatch.context() as patched:
        patched.setattr(ThreadPoolExecutor, "_adjust_thread_count", fail)
        for step in range(1, 4):
            client.versions_of(step)
        with grpc.insecure_channel(server.address) as channel:
            stub = PreconditioningServiceStub(channel)
            assert stub.GetStatus(pb.GetStatusRequest(), timeout=TIMEOUT_S).sessions
    client.versions_of(4)
