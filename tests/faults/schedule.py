"""Which fault hits whom, and when: drawn from a seed, so that it can be replayed.

Events begin when the first rank has taken a number of steps, not at a time: a replay
meets them at the same point of training on a machine of any speed.
"""

import random
from dataclasses import dataclass, replace
from typing import Literal, get_args

from tests.faults.proxy import Way

Kind = Literal[
    "delay",  # bytes of a link travel longer
    "throttle",  # few of them pass
    "blackhole",  # none pass, and there is no error
    "cut",  # its connections are reset
    "kill",  # a server dies and is not replaced
    "restart",  # a server dies and another takes its place, knowing nothing
    "pause",  # a server is stopped and goes on
    "stall",  # a rank is stopped and goes on
    "crash",  # a rank dies, and the job starts again from its checkpoint
]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Event:
    """One fault.

    Attributes:
        kind: What happens.
        step: Steps of the first rank before it.
        rank: The rank that is hit, or whose link is.
        server: The server that is hit, or whose link is.
        way: Of the link.
        steps: How long the weather lasts, or a server that is restarted is missing.
        amount: Seconds of a delay, a pause or a stall; bytes per second of a throttle.
    """

    kind: Kind
    step: int
    rank: int = -1
    server: int = -1
    way: Way = "up"
    steps: int = 0
    amount: float = 0.0


@dataclass(frozen=True)
class Shape:
    """What a schedule is drawn for."""

    ranks: int = 4
    servers: int = 2
    steps: int = 300
    stall_s: float = 10.0
    pause_s: float = 2.0


def planned(seed: int, shape: Shape) -> tuple[Event, ...]:
    """Draw a schedule in which every kind of fault has its turn.

    One server dies for good and another is restarted, in an order that is drawn too:
    so there may be none for a while. Weather comes and goes all the time.
    """
    draw = random.Random(seed)  # noqa: S311  # replayed, not kept secret
    doomed, other = draw.sample(range(shape.servers), 2)
    slots = [0.2, 0.65]
    draw.shuffle(slots)
    missing = max(shape.steps // 30, 1)
    events = [
        Event("kill", _at(draw, shape, slots[0]), server=doomed),
        Event("restart", _at(draw, shape, slots[1]), server=other, steps=missing),
        Event("pause", _at(draw, shape, 0.1), server=doomed, amount=shape.pause_s),
        Event(
            "stall",
            _at(draw, shape, 0.45),
            rank=draw.randrange(shape.ranks),
            amount=shape.stall_s,
        ),
    ]
    if draw.random() < 0.5:
        rank = draw.randrange(shape.ranks)
        events.append(Event("crash", _at(draw, shape, 0.9), rank=rank))
    return _sorted(events + _weather(draw, shape, other))


def each_kind_once(seed: int, shape: Shape) -> tuple[Event, ...]:
    """Draw a short schedule with one event of each kind, evenly spread."""
    draw = random.Random(seed)  # noqa: S311  # replayed, not kept secret
    doomed, other = draw.sample(range(shape.servers), 2)
    rank = draw.randrange(shape.ranks)
    # The last server must not die before the links to it have had their weather.
    order: list[Kind] = ["delay", "throttle", "blackhole", "cut", "pause", "stall"]
    draw.shuffle(order)
    order += draw.sample(["kill", "restart"], 2)
    order.append("crash")
    gap = shape.steps // (len(order) + 2)
    amounts = {"delay": 0.3, "throttle": 20e3, "pause": shape.pause_s}
    return tuple(
        Event(
            kind,
            step=gap * (place + 1),
            rank=rank,
            server=doomed if kind == "kill" else other,
            way=draw.choice(["up", "down"]),
            steps=gap,
            amount=shape.stall_s if kind == "stall" else amounts.get(kind, 0.0),
        )
        for place, kind in enumerate(order)
    )


def without_crashes(events: tuple[Event, ...]) -> tuple[Event, ...]:
    """Leave the ranks alive."""
    return tuple(event for event in events if event.kind != "crash")


def _weather(draw: random.Random, shape: Shape, survivor: int) -> list[Event]:
    amounts: dict[Kind, tuple[float, float]] = {
        "delay": (0.05, 0.5),
        "throttle": (5e4, 5e5),
        "blackhole": (0, 0),
        "cut": (0, 0),
    }
    kinds = [*amounts, *draw.choices(list(amounts), [4, 2, 1, 2], k=6)]
    events = []
    for kind in kinds:
        event = Event(
            kind,
            step=int(draw.uniform(0.08, 0.9) * shape.steps),
            rank=draw.randrange(shape.ranks),
            server=draw.randrange(shape.servers),
            way=draw.choice(["up", "down"]),
            steps=draw.randint(shape.steps // 30, shape.steps // 8),
            amount=draw.uniform(*amounts[kind]),
        )
        events.append(event)
    # The delay that all runs have is of a link that is there, and long enough to see.
    first = replace(events[0], server=survivor, way="up", amount=draw.uniform(0.2, 0.5))
    return [replace(first, step=int(0.05 * shape.steps)), *events[1:]]


def _at(draw: random.Random, shape: Shape, share: float) -> int:
    return int((share + draw.uniform(-0.05, 0.05)) * shape.steps)


def _sorted(events: list[Event]) -> tuple[Event, ...]:
    return tuple(sorted(events, key=lambda event: (event.step, event.kind)))
