"""The ranks that train one model together, and what they have to decide as one.

Replicas stay identical only if every rank uses the same versions at the same step. What
arrived where differs from rank to rank, so that choice is made together: one reduction
of a few numbers on the CPU, and only in steps where something is due.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Protocol

import torch
from torch import distributed
from torch.distributed import ProcessGroup

from skfac.wire.errors import ConfigurationError


class World(Protocol):
    """The replicas of a model. All ranks call its methods in the same order.

    Attributes:
        rank: Of this process, in [0, size).
        size: How many processes there are.
        members: Their ranks among all processes of `torch.distributed`.
    """

    rank: int
    size: int
    members: Sequence[int]

    def least(self, numbers: Sequence[int]) -> list[int]:
        """Find the smallest of the numbers that the ranks pass.

        Args:
            numbers: As many on each rank, between -2⁶³ and 2⁶³.

        Returns:
            The minimum of each over the ranks; the same on all ranks.
        """

    def agree(self, flags: Sequence[bool]) -> list[bool]:
        """Find what is true on every rank.

        Args:
            flags: As many on each rank.

        Returns:
            For each whether all ranks passed True; the same on all ranks.
        """

    def mean(self, value: float) -> float:
        """Average a number over the ranks.

        Returns:
            The mean, the same on all ranks.
        """

    def share(self, text: str) -> str:
        """Let all ranks have what rank 0 passes.

        Returns:
            Rank 0's text.
        """

    def gather(self, text: str) -> list[str]:
        """Let all ranks have what each passes.

        Returns:
            The text of each rank.
        """


class Alone:
    """A `World` of one process, which costs nothing.

    Attributes:
        by_chance: Whether `torch.distributed` was not in use when it was made.
    """

    rank = 0
    size = 1

    def __init__(self, member: int = 0, *, by_chance: bool = False) -> None:
        self.members: Sequence[int] = (member,)
        self.by_chance = by_chance

    def least(self, numbers: Sequence[int]) -> list[int]:
        """Compare with nobody.

        Returns:
            The numbers.
        """
        return list(numbers)

    def agree(self, flags: Sequence[bool]) -> list[bool]:
        """Agree with oneself.

        Returns:
            The flags.
        """
        return list(flags)

    def mean(self, value: float) -> float:
        """Average one number.

        Returns:
            It.
        """
        return value

    def share(self, text: str) -> str:
        """Tell oneself.

        Returns:
            The text.
        """
        return text

    def gather(self, text: str) -> list[str]:
        """Tell oneself.

        Returns:
            The text alone.
        """
        return [text]


class Ranks:
    """A `World` of the processes of a `torch.distributed` group.

    It has a gloo group of its own: its few bytes neither wait for a GPU nor get between
    the collectives of the trainer.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self.rank = distributed.get_rank(group)
        self.size = distributed.get_world_size(group)
        self.members: Sequence[int] = distributed.get_process_group_ranks(group)
        self._first = self.members[0]
        # Never ended: torch would give the next one the same name, and old addresses.
        self._group = distributed.new_group(
            list(self.members),
            timeout=_timeout_of(group),
            backend="gloo",
            use_local_synchronization=True,
        )

    def least(self, numbers: Sequence[int]) -> list[int]:
        """Find the smallest of the numbers, by one small all-reduce.

        Returns:
            The minimum of each over the ranks.
        """
        least = torch.tensor(numbers, dtype=torch.int64)
        distributed.all_reduce(least, distributed.ReduceOp.MIN, self._group)
        found: list[int] = least.tolist()
        return found

    def agree(self, flags: Sequence[bool]) -> list[bool]:
        """Find what is true on every rank.

        Returns:
            For each flag whether all ranks passed True.
        """
        return [bool(bit) for bit in self.least(flags)]

    def mean(self, value: float) -> float:
        """Average a number over the ranks.

        Returns:
            The mean.
        """
        total = torch.tensor(value, dtype=torch.float64)
        distributed.all_reduce(total, distributed.ReduceOp.SUM, self._group)
        return float(total) / self.size

    def share(self, text: str) -> str:
        """Let all ranks have what rank 0 passes.

        Returns:
            Rank 0's text.
        """
        data = torch.frombuffer(bytearray(text.encode() or b"\0"), dtype=torch.uint8)
        length = torch.tensor(len(data))
        distributed.broadcast(length, self._first, self._group)
        if self.rank:
            data = torch.empty(int(length), dtype=torch.uint8)
        distributed.broadcast(data, self._first, self._group)
        return _text_of(data)

    def gather(self, text: str) -> list[str]:
        """Let all ranks have what each passes.

        Returns:
            The text of each rank.
        """
        data = torch.tensor(list(text.encode()), dtype=torch.uint8)
        lengths = [torch.tensor(0) for _ in range(self.size)]
        distributed.all_gather(lengths, torch.tensor(len(data)), self._group)
        padded = torch.zeros(1 + max(map(int, lengths)), dtype=torch.uint8)
        padded[: len(data)] = data
        texts = [torch.empty_like(padded) for _ in range(self.size)]
        distributed.all_gather(texts, padded, self._group)
        return list(map(_text_of, texts))


def _timeout_of(group: ProcessGroup) -> timedelta | None:
    # What the trainer has asked for; torch has no public way to read it.
    for device in getattr(group, "_device_types", ()):
        options = getattr(group._get_backend(device), "options", None)
        found = getattr(options, "_timeout", None)
        if isinstance(found, timedelta):
            return found
    return None


def _text_of(padded: torch.Tensor) -> str:
    return bytes(padded.tolist()).rstrip(b"\0").decode()


def world_of(group: ProcessGroup | None) -> World:
    """Find the ranks that train together.

    Args:
        group: Them, or None for all processes of `torch.distributed` if it is in use.

    Returns:
        The world.

    Raises:
        ConfigurationError: If this process does not belong to `group`.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return Alone(by_chance=True)
    if group is None:
        group = distributed.group.WORLD
    if group is None or distributed.get_rank(group) < 0:
        raise ConfigurationError(
            "process_group is a group that this process does not belong to."
        )
    if distributed.get_world_size(group) > 1:
        return Ranks(group)
    return Alone(distributed.get_rank())


def check_joined(world: World) -> None:
    """Check that a process that was alone has not become one of several since.

    Raises:
        ConfigurationError: If it has.
    """
    if not (isinstance(world, Alone) and world.by_chance):
        return
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    size = distributed.get_world_size()
    if size > 1:
        raise ConfigurationError(
            f"This process is one of {size} now, and was alone when the Preconditioner "
            "was made: make it after init_process_group. If ranks train apart, give "
            "process_group a group of this rank alone."
        )


def check_ranks(world: World, targets: Sequence[str], apply: str) -> None:
    """Check that several ranks can train with these settings.

    Raises:
        ConfigurationError: If they cannot.
    """
    if world.size == 1:
        return
    if "embedded" in targets:
        raise ConfigurationError(
            f"{world.size} ranks need one engine that has the rows of all of them: "
            "start a server with 'skfac serve' and pass its address as target, instead "
            "of 'embedded'."
        )
    if apply == "row":
        raise ConfigurationError(
            "apply='row' is for one rank: the trust region of several needs the whole "
            "gradient. Use apply='auto'."
        )
