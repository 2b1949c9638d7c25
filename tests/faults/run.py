"""Plays one schedule against real processes and writes down what they did."""

import contextlib
import queue
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from tests.faults.processes import RankProcess, Scrape, Server
from tests.faults.proxy import Proxies, Proxy, Way, Weather
from tests.faults.rank import Orders, checkpoint
from tests.faults.schedule import Event, Shape

HUNG_S = 90.0  # no rank has taken a step, or ended, for so long
STARTS_S = 300.0  # the same before the first step: a busy machine imports slowly
_TICK_S = 0.02


@dataclass(frozen=True)
class Setting:
    """What a run is made of, besides its faults.

    Attributes:
        shape: Ranks, servers and steps.
        seed: Of the links' delays and the order of the digits.
        settings: Keywords of `Preconditioner`.
        server: Settings of `skfac serve`.
        batch: Digits of all ranks in a step.
        pace_s: Least time of a step.
        every: Steps between checkpoints; 0 for none.
        shared: Whether tensors may go through shared memory, past the links.
        links: Whether there are links with delays between ranks and servers.
    """

    shape: Shape
    seed: int
    settings: dict[str, Any]
    server: dict[str, Any] = field(default_factory=dict)
    batch: int = 64
    pace_s: float = 0.0
    every: int = 0
    shared: bool = False
    links: bool = True


@dataclass(frozen=True)
class Fired:
    """An event that has happened, when, and at which start of the job."""

    event: Event
    time_s: float
    start: int


@dataclass(eq=False)
class Evidence:
    """What happened in a run.

    Attributes:
        steps: For each start of the job, for each rank, its lines in order.
        done: The last line of each rank.
        stops: Rank, beginning and end of each time that a rank was stopped.
        fired: The events.
        scrapes: For each server what a scraper saw.
        passed: Bytes over each link, by way, in the order of ranks and servers.
        hung: What did not end; empty if all did.
    """

    steps: list[list[list[dict[str, Any]]]] = field(default_factory=list)
    done: dict[int, dict[str, Any]] = field(default_factory=dict)
    stops: list[tuple[int, float, float]] = field(default_factory=list)
    fired: list[Fired] = field(default_factory=list)
    scrapes: list[list[Scrape]] = field(default_factory=list)
    passed: list[list[dict[Way, int]]] = field(default_factory=list)
    hung: str = ""


class Run:
    """One job under faults.

    Args:
        setting: The job.
        plan: Its faults.
        folder: For digits, logs and checkpoints; `digits.pt` is there.
        progress: Called with the steps that were taken.
    """

    def __init__(
        self,
        setting: Setting,
        plan: tuple[Event, ...],
        folder: Path,
        progress: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.evidence = Evidence()
        self._setting = setting
        self._folder = folder
        self._progress = progress
        self._plan = sorted(plan, key=lambda event: event.step)
        self._later: list[tuple[int, Callable[[], None]]] = []  # at a step
        self._timers: list[tuple[float, Callable[[], None]]] = []  # at a time
        self._lines: queue.Queue[tuple[int, dict[str, Any]]] = queue.Queue()
        self._step = 0
        self._crashed = False
        self._weather: dict[tuple[int, int, Way], list[Event]] = {}
        self._servers: list[Server] = []
        self._targets: list[str] = []
        self._ranks: list[RankProcess] = []
        self._open = contextlib.ExitStack()
        self._links: list[list[Proxy]] = []
        self._base: dict[tuple[int, int, Way], Weather] = {}

    def __enter__(self) -> Self:
        for index in range(self._setting.shape.servers):
            restarts = [
                e for e in self._plan if (e.kind, e.server) == ("restart", index)
            ]
            lives = len(restarts) + 1
            server = Server(index, self._folder, self._setting.server, lives)
            self._open.callback(server.close)
            self._servers.append(server)
        self._targets = [server.wait() for server in self._servers]
        if self._setting.links:
            self._open_links()
        self._start_ranks(0)
        return self

    def __exit__(self, *_: object) -> None:
        for rank in self._ranks:
            rank.close()
        self._open.close()

    def play(self) -> Evidence:
        """Let it run to its end.

        Returns:
            What happened.
        """
        last_s = time.monotonic()
        while not self._over():
            with contextlib.suppress(queue.Empty):
                self._take(*self._lines.get(timeout=_TICK_S))
                last_s = time.monotonic()
            now_s = time.monotonic()
            if self._crashed and all(rank.finished() for rank in self._ranks):
                self._start_again()
                last_s = now_s
            self._fire(now_s)
            trained = any(self.evidence.steps[-1])
            if now_s - last_s > (HUNG_S if trained else STARTS_S):
                self._give_up()
                break
        for server in self._servers:
            server.scrape()
        self.evidence.scrapes = [server.scrapes for server in self._servers]
        self.evidence.passed = [[p.passed for p in row] for row in self._links]
        return self.evidence

    # ---------------------------------------------------------------- the job

    def _over(self) -> bool:
        if self._crashed:
            return False
        return self._lines.empty() and all(rank.finished() for rank in self._ranks)

    def _take(self, rank: int, line: dict[str, Any]) -> None:
        if "done" in line:
            self.evidence.done[rank] = line
            return
        self.evidence.steps[-1][rank].append(line)
        if line["step"] >= self._step:
            self._step = line["step"] + 1
            self._progress(self._step)

    def _start_ranks(self, first: int) -> None:
        setting, shape = self._setting, self._setting.shape
        start = len(self.evidence.steps)
        self.evidence.steps.append([[] for _ in range(shape.ranks)])
        self._ranks = [
            RankProcess(
                Orders(
                    rank=rank,
                    ranks=shape.ranks,
                    targets=tuple(self._targets),
                    routes=self._routes_of(rank),
                    settings=setting.settings | {"job": f"faults-{setting.seed}"},
                    folder=str(self._folder),
                    meeting=f"start-{start}",
                    steps=shape.steps,
                    first=first,
                    every=setting.every,
                    order=setting.seed,
                    batch=setting.batch,
                    pace_s=setting.pace_s,
                    shared=setting.shared,
                ),
                self._lines,
            )
            for rank in range(shape.ranks)
        ]

    def _start_again(self) -> None:
        # With what all ranks have kept.
        while not self._lines.empty():
            self._take(*self._lines.get())
        self._crashed = False
        ranks, every = range(self._setting.shape.ranks), self._setting.every
        first = self._step // every * every if every else 0
        while first and not all(
            checkpoint(str(self._folder), rank, first).exists() for rank in ranks
        ):
            first -= every
        for rank in self._ranks:
            rank.close()
        self._start_ranks(first)

    def _give_up(self) -> None:
        silent = [rank.rank for rank in self._ranks if not rank.finished()]
        self.evidence.hung = f"ranks {silent} after step {self._step}"
        for rank in self._ranks:
            rank.dump()
        time.sleep(1.0)  # they write their stacks

    # ---------------------------------------------------------------- links

    def _open_links(self) -> None:
        proxies = self._open.enter_context(Proxies())
        draw = random.Random(self._setting.seed)  # noqa: S311  # replayed
        for rank in range(self._setting.shape.ranks):
            row = []
            for server, target in enumerate(self._targets):
                proxy = proxies.open(target, seed=draw.randrange(2**32))
                ways: tuple[Way, ...] = ("up", "down")
                for way in ways:
                    base = Weather(draw.uniform(0, 0.01), draw.uniform(0, 0.01))
                    self._base[rank, server, way] = base
                    self._weather[rank, server, way] = []
                    proxy.change(way, base)
                row.append(proxy)
            self._links.append(row)

    def _routes_of(self, rank: int) -> dict[str, str]:
        if not self._links:
            return {}
        addresses = [proxy.address for proxy in self._links[rank]]
        return dict(zip(self._targets, addresses, strict=True))

    def _let_it_rain(self, event: Event, *, begin: bool) -> None:
        where = event.rank, event.server, event.way
        active = self._weather[where]
        if begin:
            active.append(event)
        else:
            active.remove(event)
        weather = self._base[where]
        for one in active:
            if one.kind == "delay":
                delay_s = max(weather.delay_s, one.amount)
                weather = replace(weather, delay_s=delay_s, jitter_s=delay_s / 10)
            elif one.kind == "throttle":
                limit = min(weather.bytes_per_s, one.amount)
                weather = replace(weather, bytes_per_s=limit)
            else:
                weather = replace(weather, stalled=True)
        self._links[event.rank][event.server].change(event.way, weather)

    # ---------------------------------------------------------------- faults

    def _fire(self, now_s: float) -> None:
        while self._plan and self._plan[0].step <= self._step and not self._crashed:
            event = self._plan.pop(0)
            start = len(self.evidence.steps) - 1
            self.evidence.fired.append(Fired(event, now_s, start))
            self._begin(event)
        due = [action for step, action in self._later if step <= self._step]
        self._later = [entry for entry in self._later if entry[0] > self._step]
        due += [action for time_s, action in self._timers if time_s <= now_s]
        self._timers = [entry for entry in self._timers if entry[0] > now_s]
        for action in due:
            action()

    def _begin(self, event: Event) -> None:
        end = event.step + event.steps
        if event.kind in {"delay", "throttle", "blackhole"}:
            self._let_it_rain(event, begin=True)
            self._later.append((end, lambda: self._let_it_rain(event, begin=False)))
        elif event.kind == "cut":
            self._links[event.rank][event.server].cut()
        elif event.kind == "kill":
            self._servers[event.server].kill()
        elif event.kind == "restart":
            self._servers[event.server].kill()
            self._later.append((end, lambda: self._replace(event.server)))
        elif event.kind == "pause":
            server = self._servers[event.server]
            server.send(signal.SIGSTOP)
            goes_on_s = time.monotonic() + event.amount
            self._timers.append((goes_on_s, lambda: server.send(signal.SIGCONT)))
        elif event.kind == "stall":
            self._stop_rank(event)
        elif event.kind == "crash":
            self._crashed = True
            self._ranks[event.rank].process.kill()

    def _replace(self, index: int) -> None:
        target = self._servers[index].replace()
        for row in self._links:
            row[index].lead_to(target)

    def _stop_rank(self, event: Event) -> None:
        process = self._ranks[event.rank].process
        began_s = time.monotonic()
        process.send_signal(signal.SIGSTOP)

        def go_on() -> None:
            process.send_signal(signal.SIGCONT)
            stop = event.rank, began_s, time.monotonic()
            self.evidence.stops.append(stop)

        self._timers.append((began_s + event.amount, go_on))
