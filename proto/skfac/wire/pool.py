"""How the actors of a pool are called, and which of them has the session of a job."""

import hashlib
import re
from collections.abc import Iterable

from skfac.wire.errors import ConfigurationError

_TARGET = re.compile(r"ray://(?P<namespace>[^/]+)/(?P<pool>[^/]+)(/(?P<index>\d+))?")
_NAME = re.compile(r"(?P<pool>.+)-(?P<index>\d+)-of-(?P<count>\d+)")


def pool_of(target: str) -> tuple[str, str, int | None]:
    """Read a target of the form `ray://namespace/pool` or `ray://namespace/pool/index`.

    Returns:
        The namespace, the pool, and the actor's index if there is one.

    Raises:
        ConfigurationError: If it has another form.
    """
    match = _TARGET.fullmatch(target)
    if match is None:
        raise ConfigurationError(f"{target!r} is not ray://namespace/pool.")
    index = None if match["index"] is None else int(match["index"])
    return match["namespace"], match["pool"], index


def actor_names(pool: str, count: int) -> list[str]:
    """Name the actors of a pool.

    Returns:
        `count` names; each tells how many there are.
    """
    return [f"{pool}-{index}-of-{count}" for index in range(count)]


def actors_of(pool: str, names: Iterable[str]) -> list[str]:
    """Find the actors of a pool among other names.

    Args:
        pool: Its name.
        names: Of actors of any kind.

    Returns:
        The names of all of its actors, those that are gone for good included; empty if
        there is no such pool.
    """
    matches = filter(None, map(_NAME.fullmatch, names))
    counts = [int(match["count"]) for match in matches if match["pool"] == pool]
    return actor_names(pool, max(counts, default=0))


def actor_of_job(job: str, count: int) -> int:
    """Choose the actor that has the whole session of a job.

    All ranks of the job must get the same one, on any machine and after any restart.

    Args:
        job: Its name.
        count: Actors of the pool.

    Returns:
        The actor's index, from 0 to `count - 1`.
    """
    digest = hashlib.sha256(job.encode()).digest()
    return int.from_bytes(digest[:8], "big") % count
