"""A link to a server that can be made slow, thin, dead or cut, each way on its own.

TCP keeps the order of bytes within a connection. What overtakes what is decided between
connections and between the two ways of one: the rows of one rank arrive long after
those of another, or a version is held back while the messages of another link pass.
"""

import asyncio
import contextlib
import math
import random
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Self

Way = Literal["up", "down"]
"""Rows go up to the server; versions and acknowledgements come down."""

_READ_BYTES = 64 * 1024
_IN_FLIGHT = 1024  # reads that a link holds, so that a delay costs no bandwidth
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close with a reset


@dataclass(frozen=True)
class Weather:
    """What happens to bytes on one way of a link.

    Attributes:
        delay_s: How long each of them travels.
        jitter_s: Most that is added to it, at random; order is kept.
        bytes_per_s: Most that passes.
        stalled: Whether nothing passes at all, without an error.
    """

    delay_s: float = 0.0
    jitter_s: float = 0.0
    bytes_per_s: float = math.inf
    stalled: bool = False


@dataclass(eq=False)
class _Way:
    weather: Weather = Weather()
    passable: asyncio.Event = field(default_factory=asyncio.Event)
    nbytes: int = 0

    def __post_init__(self) -> None:
        self.passable.set()

    def change(self, weather: Weather) -> None:
        self.weather = weather
        if weather.stalled:
            self.passable.clear()
        else:
            self.passable.set()


class Proxy:
    """One link, as `Proxies.open` makes it; its methods may be called from any thread.

    Attributes:
        address: Where it listens.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, target: str, seed: int) -> None:
        self._loop = loop
        self._target = target
        self._random = random.Random(seed)  # noqa: S311  # replayed, not kept secret
        self._ways: dict[Way, _Way] = {"up": _Way(), "down": _Way()}
        self._open: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self.address = ""

    async def listen(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        self.address = f"127.0.0.1:{port}"

    def change(self, way: Way, weather: Weather) -> None:
        """Let another weather begin; it holds for what is read from now on."""
        self._loop.call_soon_threadsafe(self._ways[way].change, weather)

    def lead_to(self, target: str) -> None:
        """Connect to another server from now on; connections that are open stay."""
        self._target = target

    def cut(self) -> None:
        """Reset all connections; new ones are accepted."""
        self._loop.call_soon_threadsafe(self._reset_all)

    @property
    def passed(self) -> dict[Way, int]:
        """Bytes that have passed."""
        return {name: way.nbytes for name, way in self._ways.items()}

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        self._reset_all()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _reset_all(self) -> None:
        for writer in list(self._open):
            _reset(writer)

    async def _accept(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._open.add(writer)
        host, _, port = self._target.rpartition(":")
        ends = [writer]
        try:
            far_reader, far_writer = await asyncio.open_connection(host, int(port))
            ends.append(far_writer)
            self._open.add(far_writer)
            async with asyncio.TaskGroup() as both:
                both.create_task(self._pass("up", reader, far_writer))
                both.create_task(self._pass("down", far_reader, writer))
        except* (OSError, asyncio.CancelledError):
            pass  # refused, or cut by either end: so the other is, below
        finally:
            for end in ends:
                _reset(end)
                self._open.discard(end)
            self._tasks.discard(task)

    async def _pass(
        self, name: Way, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        way, loop = self._ways[name], self._loop
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_IN_FLIGHT)

        async def read() -> None:
            last_s = 0.0
            while data := await reader.read(_READ_BYTES):
                last_s = max(last_s, loop.time() + self._travel_s(way.weather))
                await queue.put((last_s, data))
            await queue.put((last_s, b""))

        async def write() -> None:
            while True:
                due_s, data = await queue.get()
                await asyncio.sleep(max(due_s - loop.time(), 0))
                await way.passable.wait()
                await asyncio.sleep(len(data) / way.weather.bytes_per_s)
                if not data:
                    writer.write_eof()
                    return
                way.nbytes += len(data)
                writer.write(data)
                await writer.drain()

        async with asyncio.TaskGroup() as halves:
            halves.create_task(read())
            halves.create_task(write())

    def _travel_s(self, weather: Weather) -> float:
        return weather.delay_s + weather.jitter_s * self._random.random()


class Proxies:
    """Runs links on a thread of its own until it is left."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._proxies: list[Proxy] = []
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxies")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for proxy in self._proxies:
            self._run(proxy.close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def open(self, target: str, seed: int = 0) -> Proxy:
        """Open a link to a server.

        Args:
            target: `host:port`; it need not listen yet.
            seed: Of the jitter.

        Returns:
            The link, which listens.
        """
        proxy = Proxy(self._loop, target, seed)
        self._run(proxy.listen)
        self._proxies.append(proxy)
        return proxy

    def _run(self, body: Callable[[], Coroutine[Any, Any, None]]) -> None:
        asyncio.run_coroutine_threadsafe(body(), self._loop).result(timeout=30)


def _reset(writer: asyncio.StreamWriter) -> None:
    end: socket.socket | None = writer.get_extra_info("socket")
    if end is not None:
        with contextlib.suppress(OSError):  # closed already
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()
