"""Links do what their weather says, each way on its own."""

import socket
import socketserver
import threading
import time
from collections.abc import Iterator

import pytest

from tests.faults.proxy import Proxies, Proxy, Weather

LONG_S = 20.0
SHORT_S = 0.2


class Echo(socketserver.BaseRequestHandler):
    """Sends back what it gets, with the server's name before each read."""

    def handle(self) -> None:
        assert isinstance(self.server, EchoServer)
        try:
            while data := self.request.recv(65536):
                self.request.sendall(self.server.prefix + data)
        except ConnectionResetError:
            pass


class EchoServer(socketserver.ThreadingTCPServer):
    daemon_threads = True

    def __init__(self, prefix: bytes = b"") -> None:
        super().__init__(("127.0.0.1", 0), Echo)
        self.prefix = prefix
        self.target = f"127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


@pytest.fixture
def proxies() -> Iterator[Proxies]:
    with Proxies() as running:
        yield running


@pytest.fixture
def server() -> Iterator[EchoServer]:
    with EchoServer() as running:
        yield running


def joined(proxy: Proxy) -> socket.socket:
    host, _, port = proxy.address.rpartition(":")
    end = socket.create_connection((host, int(port)), timeout=LONG_S)
    end.settimeout(LONG_S)
    return end


def read(end: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = end.recv(count - len(data))
        assert more, f"The connection ended after {data!r}."
        data += more
    return data


def test_bytes_pass_unchanged_and_are_counted(proxies, server):
    proxy = proxies.open(server.target)
    sent = bytes(range(256)) * 4096
    with joined(proxy) as end:
        threading.Thread(target=end.sendall, args=(sent,)).start()
        assert read(end, len(sent)) == sent
    assert proxy.passed == {"up": len(sent), "down": len(sent)}


def test_an_end_is_passed_on_after_what_came_before_it(proxies, server):
    proxy = proxies.open(server.target)
    proxy.change("up", Weather(delay_s=0.05))
    with joined(proxy) as end:
        end.sendall(b"last words")
        end.shutdown(socket.SHUT_WR)
        assert read(end, 10) == b"last words"
        assert end.recv(1) == b""


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_delay_is_of_its_way_and_keeps_the_order(way, proxies, server):
    proxy = proxies.open(server.target, seed=3)
    proxy.change(way, Weather(delay_s=SHORT_S, jitter_s=SHORT_S))
    with joined(proxy) as end:
        began_s = time.monotonic()
        for number in range(20):
            end.sendall(bytes([number]))
            time.sleep(0.002)  # reads of their own
        assert read(end, 20) == bytes(range(20))
        assert time.monotonic() - began_s >= SHORT_S


def test_what_was_sent_first_may_arrive_last_on_another_link(proxies, server):
    slow, fast = proxies.open(server.target), proxies.open(server.target)
    slow.change("up", Weather(delay_s=2 * SHORT_S))
    with joined(slow) as first, joined(fast) as second:
        first.sendall(b"1")
        second.sendall(b"2")
        assert read(second, 1) == b"2"
        first.setblocking(False)
        with pytest.raises(BlockingIOError):
            first.recv(1)
        first.settimeout(LONG_S)
        assert read(first, 1) == b"1"


def test_a_throttle_bounds_the_rate(proxies, server):
    proxy = proxies.open(server.target)
    proxy.change("up", Weather(bytes_per_s=100e3))
    with joined(proxy) as end:
        began_s = time.monotonic()
        end.sendall(bytes(30_000))
        read(end, 30_000)
        assert time.monotonic() - began_s >= 0.3


def test_a_stalled_link_is_silent_until_it_goes_on(proxies, server):
    proxy = proxies.open(server.target)
    with joined(proxy) as end:
        proxy.change("down", Weather(stalled=True))
        end.sendall(b"hello")
        end.settimeout(SHORT_S)
        with pytest.raises(TimeoutError):
            end.recv(1)
        assert proxy.passed["down"] == 0
        proxy.change("down", Weather())
        end.settimeout(LONG_S)
        assert read(end, 5) == b"hello"


def test_a_cut_resets_what_is_open_and_nothing_else(proxies, server):
    proxy, other = proxies.open(server.target), proxies.open(server.target)
    with joined(proxy) as end, joined(other) as neighbour:
        end.sendall(b"a")
        read(end, 1)
        neighbour.sendall(b"b")
        proxy.cut()
        with pytest.raises(ConnectionResetError):
            end.recv(1)
        assert read(neighbour, 1) == b"b"
    with joined(proxy) as again:
        again.sendall(b"c")
        assert read(again, 1) == b"c"


def test_a_server_that_is_not_there_refuses(proxies):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    proxy = proxies.open(f"127.0.0.1:{port}")
    # Sooner or later: the kernel may know of it before it tells of the connection.
    with pytest.raises(ConnectionResetError), joined(proxy) as end:
        end.recv(1)


def test_another_server_can_take_the_place(proxies, server):
    with EchoServer(b"new:") as other:
        proxy = proxies.open(server.target)
        with joined(proxy) as old:
            old.sendall(b"a")
            assert read(old, 1) == b"a"
            proxy.lead_to(other.target)
            old.sendall(b"x")
            assert read(old, 1) == b"x"
        with joined(proxy) as new:
            new.sendall(b"x")
            assert read(new, 5) == b"new:x"
