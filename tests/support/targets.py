"""Every place where an engine can run, for tests that all of them must pass."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.cluster import crash
from tests.support.servers import ServerProcess

LIMITS: dict[str, Any] = {"max_layers": 6, "max_snapshot_bytes": 100_000}


@dataclass(frozen=True, eq=False)
class Place:
    """Where an engine runs.

    Attributes:
        target: What a trainer passes.
        crash: Ends it as a crash would.
        restart: Lets it be there again, with nothing in it; Ray does that by itself.
    """

    target: str
    crash: Callable[[], None]
    restart: Callable[[], None]


@contextmanager
def grpc_place(address: str) -> Iterator[Place]:
    """A server in a process of its own."""
    running = [ServerProcess(address, **LIMITS)]  # type: ignore[arg-type]

    def restart() -> None:
        running.append(
            ServerProcess(running[0].address, **LIMITS)  # type: ignore[arg-type]
        )

    try:
        yield Place(running[0].address, lambda: running[-1].kill(), restart)
    finally:
        running[-1].kill()


@contextmanager
def ray_place() -> Iterator[Place]:
    """One of two actors of Ray; needs a cluster."""
    from skfac.service.ray import start_pool

    with start_pool(2, name="contract", num_cpus=0, settings=LIMITS) as pool:
        yield Place(pool.targets[0], lambda: crash(pool.actors[0]), lambda: None)


def unix_address(folder: Path) -> str:
    """A socket in a folder."""
    return f"unix:{folder}/skfac.sock"
