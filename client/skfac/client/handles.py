"""Handles of Ray's actors as targets, for those who have Ray; nobody else needs it."""

import sys
from typing import Any, Self


class ActorTarget(str):
    """The text that stands for an actor, the same on every rank.

    Attributes:
        handle: The actor's.
    """

    handle: Any

    @classmethod
    def of(cls, handle: Any) -> Self:  # noqa: ANN401  # Ray may not be installed
        """Name an actor by its id.

        Returns:
            Its target.
        """
        target = cls(f"ray-actor:{handle._actor_id.hex()}")
        target.handle = handle
        return target


def is_handle(target: object) -> bool:
    """Tell whether a target is the handle of an actor.

    Returns:
        Whether it is; False without Ray, where there are none.
    """
    actor = sys.modules.get("ray.actor")
    return actor is not None and isinstance(target, actor.ActorHandle)
