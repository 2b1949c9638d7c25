"""Peers whose machine is gone: their connections stay open, and nothing says so."""

import time

import psutil
import pytest

from tests.faults.proxy import Proxies, Weather
from tests.support.raw_client import RawClient, spec_of
from tests.support.servers import ServerProcess

GONE = Weather(stalled=True)
PATIENCE_S = 60.0  # pings go every 10 s, and are waited for for 20


@pytest.mark.long
@pytest.mark.timeout(2 * PATIENCE_S)
def test_their_connections_and_calls_end():
    with ServerProcess(max_streams=4) as server, Proxies() as proxies:
        process = psutil.Process(server.process.pid)
        quiet = connections_of(process)
        links = [proxies.open(server.address) for _ in range(3)]
        clients = [RawClient(link.address, spec_of(link.address)) for link in links]
        for client in clients:
            client.versions_of(0)
        streams = [client.subscribe({0: 0, 1: 0}) for client in clients]
        assert connections_of(process) == quiet + len(links)
        for link in links:
            link.change("up", GONE)
            link.change("down", GONE)

        end_s = time.monotonic() + PATIENCE_S
        while connections_of(process) > quiet and time.monotonic() < end_s:
            time.sleep(0.5)

        assert connections_of(process) == quiet
        assert len(streams) == 3  # alive till here, or they would not be half open
        # Their streams held three of the four places that there are.
        with RawClient(server.address, spec_of("another")) as client:
            calls = [client.subscribe() for _ in range(3)]
            assert client.versions_of(0)
            for call in calls:
                call.cancel()


def connections_of(process: psutil.Process) -> int:
    return sum(c.status == psutil.CONN_ESTABLISHED for c in process.net_connections())
