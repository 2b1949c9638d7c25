"""A local cluster of Ray for tests, and what its actors do there."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil
from tenacity import Retrying, retry_if_exception_message, stop_after_attempt

STORE_BYTES = 200 * 1024 * 1024


@contextmanager
def local_cluster() -> Iterator[None]:
    """Ray on this machine; nothing of it is left afterwards."""
    os.environ["RAY_AUTH_MODE"] = "disabled"  # else it writes a token to HOME
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # At 15, its default, a busy test starves an actor. Ray knows no other spelling.
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
    import ray

    # It gives its own processes 30 s to begin, which a busy machine may not do.
    for attempt in Retrying(
        retry=retry_if_exception_message(match=".*timed out during startup"),
        stop=stop_after_attempt(3),
        before_sleep=lambda _: ray.shutdown(),
        reraise=True,
    ):
        with attempt:
            ray.init(
                num_cpus=2,
                include_dashboard=False,
                log_to_driver=False,
                object_store_memory=STORE_BYTES,
            )
    try:
        yield
    finally:
        ray.shutdown()


def engine_processes() -> list[psutil.Process]:
    """The processes of this cluster's engines that are running."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it ended meanwhile
            if "EngineActor" in " ".join(process.cmdline()):
                found.append(process)
    return found


def crash(actor: Any) -> None:
    """Kill an actor as a crash would: Ray starts it again."""
    import ray

    ray.kill(actor, no_restart=False)
