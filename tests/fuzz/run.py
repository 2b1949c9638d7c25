"""Broken frames and hostile streams against a real server, beside an honest session.

    python tests/fuzz/run.py [--frames 100000] [--streams 1000] [--seed 0]

The last line is one JSON object; the exit code is 1 if the server crashed or grew, or
if the honest session lost a version or its p99 inversion latency more than doubled.
Growth is counted from the first tenth of the frames and streams to the end.
"""

import argparse
import json
import os
import queue
import random
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, suppress
from pathlib import Path
from statistics import median
from typing import Any

import grpc
import psutil
from rich.console import Console
from rich.progress import track

sys.path.insert(0, str(Path(__file__).parents[2]))

from skfac.v1 import preconditioning_pb2 as pb
from skfac.wire.channel import CLIENT_OPTIONS, SERVICE
from skfac.wire.outcome import Version
from tests.fuzz.mutate import CORPUS, SESSION_ID, SPEC, mutated
from tests.support.raw_client import RawClient, decoded, snapshot_of, spec_of
from tests.support.servers import ServerProcess

LONG_S = 3600.0
CONSOLE = Console(stderr=True)
FRAMES_PER_STREAM = 100
STREAMS = 64
POOL_THREADS = STREAMS + 16  # which the server starts one by one, and keeps
SETTINGS: dict[str, Any] = {
    "idle_s": 2.0, "lease_s": 5.0, "log_level": "error", "max_snapshot_bytes": 10**7,
    "max_session_bytes": 10**8, "max_streams": STREAMS,
}  # fmt: skip


class Honest:
    """A session that pushes and receives on two streams that stay open."""

    def __init__(self, address: str) -> None:
        self.lost = self.steps = 0
        self.latencies_s: list[float] = []
        self._client = RawClient(address, spec_of("honest", (60, 40), (40, 10)))
        self._frames: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        push: Any = self._client.channel.stream_stream(f"/{SERVICE}/PushSnapshots")
        fetch: Any = self._client.channel.unary_stream(
            f"/{SERVICE}/StreamPreconditioners",
            pb.StreamPreconditionersRequest.SerializeToString,
        )
        session_id = self._client.grant.session_id
        self._acks = push(iter(self._frames.get, None), timeout=LONG_S)
        request = pb.StreamPreconditionersRequest(session_id=session_id)
        self._outcomes = decoded(fetch(request, timeout=LONG_S))
        self._inversions_s: list[float] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def p99(self) -> tuple[float, float]:
        """The p99 of inversions and of whole turns since it was asked last, seconds.

        The server tells that of the latest 512 inversions; it is the median of these.
        """
        turns, self.latencies_s = self.latencies_s, []
        inversions, self._inversions_s = self._inversions_s, []
        return median(inversions) if inversions else 0.0, _p99(turns)

    def close(self) -> None:
        """Stop, and end both streams."""
        self._stop.set()
        self._thread.join()
        self._frames.put(None)
        self._client.channel.close()

    def _run(self) -> None:
        layers = len(self._client.spec.layers)
        while not self._stop.wait(0.01):
            began_s = time.monotonic()
            try:
                for frame in self._client.frames(
                    snapshot_of(self._client.spec, self.steps)
                ):
                    self._frames.put(frame)
                next(self._acks)
                got = [next(self._outcomes) for _ in range(layers)]
            except (grpc.RpcError, StopIteration):
                self.lost += layers
                return
            self.lost += sum(
                not isinstance(one, Version) or one.step != self.steps for one in got
            )
            self.latencies_s.append(time.monotonic() - began_s)
            self.steps += 1
            if self.steps % 20 == 0:
                self._inversions_s.append(self._server_p99_s())

    def _server_p99_s(self) -> float:
        request = pb.GetStatusRequest(session_id=self._client.grant.session_id)
        status = self._client.stub.GetStatus(request, timeout=30.0)
        return float(status.sessions[0].inversion.p99_s)


def _p99(values: list[float]) -> float:
    ordered = sorted(values)
    return ordered[int(0.99 * len(ordered))] if ordered else 0.0


def whole_messages(session_id: str) -> list[bytes]:
    """The corpus, of a session that is open."""
    paths = sorted(CORPUS.iterdir())
    known = session_id.encode()
    return [p.read_bytes().replace(SESSION_ID.encode(), known) for p in paths]


def push_broken(address: str, session_id: str, seed: int) -> None:
    """One stream of broken frames, for rows or for histories."""
    whole = whole_messages(session_id)
    method = "ImportState" if seed % 4 == 0 else "PushSnapshots"
    with grpc.insecure_channel(address, CLIENT_OPTIONS) as channel:
        call: Any = channel.stream_stream(f"/{SERVICE}/{method}")
        first = seed * FRAMES_PER_STREAM
        frames = (mutated(first + i, whole) for i in range(FRAMES_PER_STREAM))
        with suppress(grpc.RpcError):
            list(call(frames, timeout=30.0))


def hold(address: str, session_id: str, seed: int) -> None:
    """One stream that is hostile in a way chosen by the seed."""
    choose = random.Random(seed)  # noqa: S311
    kinds = (_silent, _half, _unread, _slow_request, _cancelled, _socket, _bomb)
    with suppress(grpc.RpcError, OSError):
        choose.choice(kinds)(address, session_id, choose)


def _call(address: str, method: str, requests: Any, **settings: Any) -> None:
    with grpc.insecure_channel(address, CLIENT_OPTIONS) as channel:
        call: Any = channel.stream_stream(f"/{SERVICE}/{method}")
        list(call(requests, timeout=15.0, **settings))


def _waiting(*messages: bytes) -> Any:
    yield from messages
    time.sleep(3.0)


def _silent(address: str, _: str, choose: random.Random) -> None:
    _call(address, choose.choice(["PushSnapshots", "ImportState"]), _waiting())


def _half(address: str, session_id: str, _: random.Random) -> None:
    whole = whole_messages(session_id)[-2]
    _call(address, "PushSnapshots", _waiting(whole[: len(whole) // 2], whole[:60]))


def _unread(address: str, session_id: str, _: random.Random) -> None:
    request = pb.StreamPreconditionersRequest(session_id=session_id)
    first = request.SerializeToString()
    _call(address, "StreamPreconditioners", _waiting(first, *[bytes(10_000)] * 20))


def _slow_request(address: str, _: str, choose: random.Random) -> None:
    methods = ["OpenSession", "GetStatus", "CloseSession", "StreamPreconditioners"]
    _call(address, choose.choice(methods), _waiting())


def _cancelled(address: str, session_id: str, _: random.Random) -> None:
    with grpc.insecure_channel(address, CLIENT_OPTIONS) as channel:
        call: Any = channel.stream_stream(f"/{SERVICE}/PushSnapshots")
        call(iter(whole_messages(session_id)), timeout=15.0).cancel()


def _socket(address: str, _: str, choose: random.Random) -> None:
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=3.0) as connection:
        preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
        connection.sendall(preface[: choose.randrange(len(preface) + 1)])
        connection.sendall(choose.randbytes(choose.randrange(50)))
        with suppress(TimeoutError):
            connection.recv(1000)


def _bomb(address: str, _: str, choose: random.Random) -> None:
    nbytes = choose.choice([10**6, 2 * 10**7])
    _call(
        address, "PushSnapshots", iter([bytes(nbytes)]),
        compression=grpc.Compression.Gzip,
    )  # fmt: skip


def measures(process: psutil.Process) -> dict[str, int]:
    """What must not grow."""
    return {
        "bytes": process.memory_full_info().uss,
        "descriptors": process.num_fds(),
        "threads": process.num_threads(),
    }


def connect_many(address: str, count: int) -> int:
    """Open connections that say nothing, all at once; returns how many were open."""
    host, _, port = address.rpartition(":")
    with ExitStack() as opened:
        for number in range(count):
            try:
                connection = socket.create_connection((host, int(port)), timeout=10.0)
            except OSError:
                return number
            opened.enter_context(connection)
        time.sleep(1.0)
    return count


def attack(address: str, frames: range, streams: range) -> None:
    """Broken frames on some threads and hostile streams on others."""
    with RawClient(address, SPEC) as victim, ThreadPoolExecutor(24) as hostile:
        session_id = victim.grant.session_id
        pushes = range(
            frames.start // FRAMES_PER_STREAM, frames.stop // FRAMES_PER_STREAM
        )
        calls = [hostile.submit(hold, address, session_id, seed) for seed in streams]
        with ThreadPoolExecutor(2) as broken:
            calls += [
                broken.submit(push_broken, address, session_id, n) for n in pushes
            ]
            for call in track(as_completed(calls), total=len(calls), console=CONSOLE):
                call.result()


def fuzz(frames: int, streams: int, seed: int, baseline_s: float) -> dict[str, Any]:
    """Run it; returns what is printed."""
    first, base = frames * seed, streams * seed
    with ServerProcess(**SETTINGS) as server:
        process = psutil.Process(server.process.pid)
        threads = process.num_threads()
        honest = Honest(server.address)
        time.sleep(baseline_s)
        quiet = honest.p99()
        os.nice(19)  # those who attack have processors of their own, elsewhere
        attack(
            server.address,
            range(first, first + frames // 10),
            range(base, base + streams // 10),
        )
        before = measures(process)
        honest.p99()
        attack(
            server.address,
            range(first + frames // 10, first + frames),
            range(base + streams // 10, base + streams),
        )
        connections = connect_many(server.address, streams)
        busy = honest.p99()
        time.sleep(3 * SETTINGS["idle_s"])
        after = measures(process)
        crashes = int(server.process.poll() is not None)
        honest.close()
    return {
        "frames": frames,
        "streams": streams,
        "connections": connections,
        "crashes": crashes,
        "honest_steps": honest.steps,
        "versions_lost": honest.lost,
        **{f"growth_{name}": after[name] - before[name] for name in before},
        "threads_beyond_pool": max(0, after["threads"] - threads - POOL_THREADS),
        "p99_ratio": round(busy[0] / quiet[0], 2) if quiet[0] else None,
        "p99_ms": [round(1e3 * quiet[0], 2), round(1e3 * busy[0], 2)],
        "turn_p99_ratio": round(busy[1] / quiet[1], 2) if quiet[1] else None,
    }


def main() -> int:
    """Fuzz, and print one JSON object last."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=100_000)
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--baseline-s", type=float, default=20.0)
    options = parser.parse_args()
    print(f"seed {options.seed}")
    found = fuzz(options.frames, options.streams, options.seed, options.baseline_s)
    print(json.dumps(found))
    return int(not passed(found))


def passed(found: dict[str, Any]) -> bool:
    """Whether all held, and all was measured."""
    ratio = found["p99_ratio"]
    return (
        found["crashes"] == found["versions_lost"] == found["threads_beyond_pool"] == 0
        and found["growth_bytes"] <= 32 * 2**20
        and found["growth_descriptors"] <= 8
        and ratio is not None
        and ratio <= 2.0
    )


if __name__ == "__main__":
    sys.exit(main())
