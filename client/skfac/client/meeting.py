"""What the ranks of a job find out about each other before they train.

A rank that went on alone, or otherwise than the others, would leave them waiting in a
collective, or be no replica of theirs.
"""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import TypeVar

from skfac.client.config import PreconditionerConfig
from skfac.client.store import Store
from skfac.client.world import World
from skfac.wire.errors import ConfigurationError, ServerUnavailableError, ServiceError

logger = logging.getLogger(__name__)

_OWN = {
    *("credentials", "grad_scaler", "process_group", "job"),
    *("wait_s", "resolve_every_s"),  # of this rank's patience only
}

_T = TypeVar("_T")


def made_by_all(
    world: World, config: PreconditionerConfig, make: Callable[[], _T]
) -> _T:
    """Make something that a rank may refuse to, and compare the settings of all.

    Args:
        world: The ranks.
        config: The settings of this one.
        make: Makes it; may raise a `ConfigurationError`.

    Returns:
        What was made.

    Raises:
        ConfigurationError: If any rank refuses, or has other settings.
    """
    made: list[_T] = []
    refusal: ConfigurationError | None = None
    try:
        made.append(make())
    except ConfigurationError as error:
        refusal = error
    own = {"refusal": refusal and str(refusal), "settings": _plain(config)}
    ranks = [json.loads(text) for text in world.gather(json.dumps(own))]
    if refusal is not None:
        raise refusal
    for rank, other in enumerate(ranks):
        if other["refusal"] is not None:
            raise ConfigurationError(f"Rank {rank} is refused: {other['refusal']}")
        for name, value in ranks[0]["settings"].items():
            if other["settings"].get(name) != value:
                raise ConfigurationError(
                    f"{name} is {value} on rank 0 and {other['settings'].get(name)} on "
                    f"rank {rank}: all ranks need the same settings."
                )
    return made[0]


def check_steps(world: World, step: int, next_capture: int) -> None:
    """Check that all ranks begin at the same step.

    Raises:
        ConfigurationError: If they do not.
    """
    ranks = world.gather(f"{step} {next_capture}")
    for rank, other in enumerate(ranks):
        if other != ranks[0]:
            first, its = ranks[0].split()[0], other.split()[0]
            raise ConfigurationError(
                f"Rank 0 begins at step {first} and rank {rank} at step {its}: call "
                "load_state_dict with a state of the same step on all ranks, or on "
                "none."
            )


def await_links(
    world: World, store: Store, targets: Sequence[str], wait_s: float
) -> None:
    """Wait until it is known what servers answer.

    Args:
        world: The ranks, which all call this.
        store: Of this rank.
        targets: Where the servers are.
        wait_s: Seconds that may be waited.

    Raises:
        ServiceError: If any rank is refused.
    """
    refusal: ServiceError | None = None
    connected = False
    try:
        connected = store.await_links(wait_s)
    except ServiceError as error:
        refusal = error
    # A rank that went on alone would wait for the others for ever.
    if not world.agree([refusal is None])[0]:
        raise refusal or ServerUnavailableError(
            "Another rank of this job is refused; see that rank's error."
        )
    if not connected:
        logger.warning(
            "No server at %s after wait_s = %g s; training begins with raw gradients.",
            ", ".join(targets),
            wait_s,
        )


def _plain(config: PreconditionerConfig) -> dict[str, str]:
    values = {
        one.name: getattr(config, one.name)
        for one in fields(config)
        if one.name not in _OWN
    }
    return {
        name: repr(value) if _is_plain(value) else f"of type {type(value).__name__}"
        for name, value in values.items()
    }


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float)
