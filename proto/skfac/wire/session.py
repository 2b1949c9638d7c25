"""What a job declares when it opens a session: plain values, checked once."""

from collections import Counter
from dataclasses import dataclass, fields
from typing import Literal

from skfac.curvature.damping import DampingSplit
from skfac.curvature.settings import History
from skfac.wire.errors import InvalidRequestError

OnLate = Literal["keep", "wait", "raise"]

MAX_JOB_LENGTH = 200
"""Of a job's name, which labels its metrics."""

MAX_NAME_LENGTH = 1000
"""Of a layer's name, its kind, and a run of a job."""

MAX_WORLD_SIZE = 2**20
"""Ranks of a job, each of which the server remembers."""

MAX_EXTENT = 2**40
"""Of a weight with all groups, far beyond any model and far below what overflows."""

MAX_WINDOW = 10_000
"""Updates that a history may hold one by one, so that a frame can name them."""

MAX_IN_FLIGHT = 64
"""Versions of a layer that both ends may have to keep at once."""


@dataclass(frozen=True)
class LayerSpec:
    """One layer of the model.

    Attributes:
        name: Qualified module name, unique in the session.
        kind: `"linear"`, `"hf_conv1d"`, `"conv1d"` to `"conv3d"`,
            `"conv_transpose1d"` to `"conv_transpose3d"` or `"embedding"`.
        d_in: Columns of a group's weight matrix, the bias column included. At least 1.
        d_out: Rows of a group's weight matrix. At least 1.
        bias: Whether the last column is the bias.
        groups: Weight matrices, one for each group of channels. At least 1.
        diagonal: Whether the activation factor is diagonal; such a layer has one group.
    """

    name: str
    kind: str
    d_in: int
    d_out: int
    bias: bool
    groups: int = 1
    diagonal: bool = False

    def __post_init__(self) -> None:
        if not self.name:
            raise InvalidRequestError("A layer has an empty name.")
        if len(self.name) > MAX_NAME_LENGTH:
            raise InvalidRequestError(
                f"Layer {self.name[:40]!r}... has a name of {len(self.name)} "
                f"characters; {MAX_NAME_LENGTH} are allowed."
            )
        if len(self.kind) > MAX_NAME_LENGTH:
            raise InvalidRequestError(
                f"Layer {self.name!r} has a kind of {len(self.kind)} characters; "
                f"{MAX_NAME_LENGTH} are allowed."
            )
        if not (1 <= self.d_in <= MAX_EXTENT and 1 <= self.d_out <= MAX_EXTENT):
            raise InvalidRequestError(
                f"Layer {self.name!r} declares a {self.d_out} × {self.d_in} weight; "
                f"both extents must be from 1 to {MAX_EXTENT}."
            )
        if not 1 <= self.groups * max(self.d_in, self.d_out) <= MAX_EXTENT:
            raise InvalidRequestError(
                f"Layer {self.name!r} declares {self.groups} groups of a {self.d_out} "
                f"× {self.d_in} weight; there is at least one group, and all of them "
                f"together have extents up to {MAX_EXTENT}."
            )
        if self.diagonal and self.groups > 1:
            raise InvalidRequestError(
                f"Layer {self.name!r} declares a diagonal activation factor and "
                f"{self.groups} groups; a diagonal layer has one group."
            )

    @property
    def block_shape(self) -> tuple[int, ...]:
        """What the shapes of the layer's tensors begin with: nothing, or the groups."""
        return () if self.groups == 1 else (self.groups,)


@dataclass(frozen=True, kw_only=True)
class SessionSpec:
    """A job as all of its ranks must declare it.

    Attributes:
        job: Names the session in status and metrics.
        instance: One run of the job; a restart has another.
        world_size: Ranks that push rows. At least 1.
        layers: The layers, in the order that indices refer to.
        damping_split: How λ is shared by the two factors.
        history: Which updates a factor is made of.
        update_every: The smallest number of steps between two snapshots, which may
            vary. At least 1.
        lag: Steps from the capture of a version to its first use.
        on_late: What the trainer does about a version that misses its deadline.
    """

    job: str
    instance: str
    world_size: int
    layers: tuple[LayerSpec, ...]
    damping_split: DampingSplit
    history: History
    update_every: int
    lag: int
    on_late: OnLate

    def __post_init__(self) -> None:
        if not 1 <= len(self.job) <= MAX_JOB_LENGTH:
            raise InvalidRequestError(
                f"A job name has 1 to {MAX_JOB_LENGTH} characters, got {len(self.job)}."
            )
        if len(self.instance) > MAX_NAME_LENGTH:
            raise InvalidRequestError(
                f"Job {self.job!r} has an instance of {len(self.instance)} "
                f"characters; {MAX_NAME_LENGTH} are allowed."
            )
        if self.world_size > MAX_WORLD_SIZE:
            raise InvalidRequestError(
                f"Job {self.job!r} has {self.world_size} ranks; at most "
                f"{MAX_WORLD_SIZE} are allowed."
            )
        if self.world_size < 1 or self.update_every < 1:
            raise InvalidRequestError(
                f"world_size and update_every must be at least 1, got "
                f"{self.world_size} and {self.update_every}."
            )
        if self.versions_in_flight > MAX_IN_FLIGHT:
            raise InvalidRequestError(
                f"lag = {self.lag} with update_every = {self.update_every} keeps "
                f"{self.versions_in_flight} versions of each layer in flight; at most "
                f"{MAX_IN_FLIGHT} are allowed."
            )
        if not self.layers:
            raise InvalidRequestError(f"Job {self.job!r} declares no layers.")
        ((name, count),) = Counter(layer.name for layer in self.layers).most_common(1)
        if count > 1:
            raise InvalidRequestError(f"Layer {name!r} is declared twice.")

    @property
    def versions_in_flight(self) -> int:
        """Versions of a layer between capture and deadline, plus the due one."""
        return -(-self.lag // self.update_every) + 1

    def check_rank(self, rank: int) -> None:
        """Check that a rank belongs to the job.

        Raises:
            InvalidRequestError: If `rank` is outside the world.
        """
        if not 0 <= rank < self.world_size:
            raise InvalidRequestError(
                f"Rank {rank} is outside the world of {self.world_size}."
            )

    def first_difference(self, other: "SessionSpec") -> str | None:
        """Compare with the specification of another rank.

        Returns:
            A sentence naming the first field that differs, or None if none does.
        """
        pairs = zip(self.layers, other.layers, strict=False)
        for index, (mine, theirs) in enumerate(pairs):
            if mine != theirs:
                return f"layer {index} is {theirs} instead of {mine}"
        if len(self.layers) != len(other.layers):
            return f"it has {len(other.layers)} layers instead of {len(self.layers)}"
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if mine != theirs:
                return f"{field.name} is {theirs!r} instead of {mine!r}"
        return None
