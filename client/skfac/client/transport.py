"""The seam between the trainer and wherever the engine runs."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from skfac.client.capture import PendingSnapshot
from skfac.client.config import check_target
from skfac.client.handles import ActorTarget
from skfac.client.link import Link
from skfac.wire.credentials import Credentials
from skfac.wire.errors import ConfigurationError
from skfac.wire.session import SessionSpec
from skfac.wire.state import SessionState


class Transport(Protocol):
    """Brings snapshots to an engine and its outcomes to a `Link`, on its own threads.

    It connects by itself, again and again, and tells the link about it; nothing that
    happens to a server is raised here.
    """

    def push(self, snapshot: PendingSnapshot) -> None:
        """Take a snapshot and return at once."""

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Make memory for rows, where they can be sent from without a copy."""

    def export_state(self, timeout_s: float) -> SessionState | None:
        """Copy what the server keeps of earlier updates.

        Returns:
            The histories that were folded when it was called; None, which is logged, if
            no server is connected or it gave none in time.
        """

    def import_state(self, state: SessionState, timeout_s: float) -> bool:
        """Let the server go on from exported histories, before anything is pushed.

        Returns:
            Whether it does; if not, its histories are as they were, and it is logged
            why. Trying again is safe.
        """

    def counts(self) -> Mapping[str, int]:
        """Count what went over it: connects, disconnects, bytes each way."""

    def close(self) -> None:
        """Leave the session and end all threads; idempotent."""


def connect(
    target: str,
    spec: SessionSpec,
    rank: int,
    link: Link,
    credentials: Credentials | None = None,
    device: torch.device = torch.device("cpu"),  # noqa: B008  # immutable
) -> Transport:
    """Start the transport that a target needs.

    Args:
        target: As `check_target` takes it.
        spec: The session to open.
        rank: Of this process.
        link: Takes the outcomes.
        credentials: For a server.
        device: Where the model is, and so the embedded engine.

    Returns:
        The running transport.

    Raises:
        ConfigurationError: If the target is none of these, or needs what is not
            installed, or the credentials are no good, or not for it.
    """
    by_ray = isinstance(check_target(target), ActorTarget) or target.startswith("ray:")
    if credentials is not None and (by_ray or target == "embedded"):
        raise ConfigurationError(
            f"credentials are for servers: {target!r} takes none, as an engine in this "
            "process needs none and Ray trusts everybody in its cluster."
        )
    if target == "embedded":
        # The one place where the client needs the server's code.
        from skfac.client.embedded import EmbeddedTransport

        return EmbeddedTransport(spec, link, device)
    if by_ray:
        from skfac.client.ray_transport import RayTransport  # needs Ray

        return RayTransport(target, spec, rank, link)
    from skfac.client.grpc_transport import GrpcTransport

    return GrpcTransport(target, spec, rank, link, credentials)
