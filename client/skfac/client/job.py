"""What a trainer declares when it opens its sessions: its layers, and the rest."""

import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

from torch import nn
from torch.optim import Optimizer

from skfac.client.config import PreconditionerConfig
from skfac.client.hooks import check_free
from skfac.client.layers import TrackedLayer, track_layers
from skfac.client.shards import check_shards
from skfac.client.world import World
from skfac.wire.session import SessionSpec


def layers_of(
    model: nn.Module,
    optimizer: Optimizer,
    world: World,
    config: PreconditionerConfig,
) -> list[TrackedLayer]:
    """Choose the layers of a job.

    Returns:
        They.

    Raises:
        ConfigurationError: If there are none, or one cannot be preconditioned.
    """
    layers = track_layers(model, optimizer, config.skip)
    check_free(layers)
    check_shards(((one.name, one.shard) for one in layers), world, config)
    return layers


def session_of(
    config: PreconditionerConfig, world: World, layers: Sequence[TrackedLayer]
) -> SessionSpec:
    """Describe the session of a job, alike on all ranks, which call it together.

    Args:
        config: The settings; without a name the job is called as the program is.
        world: The ranks.
        layers: What is preconditioned.

    Returns:
        The specification, of an instance that no earlier start of the job had.
    """
    program = Path(sys.argv[0]).stem or "python"
    return SessionSpec(
        job=world.share(config.job or f"{program}-{uuid.uuid4().hex[:8]}"),
        instance=world.share(uuid.uuid4().hex),
        world_size=world.size,
        layers=tuple(layer.spec for layer in layers),
        damping_split=config.damping_split,
        history=config.history,
        update_every=config.least_update_every,
        lag=config.lag,
        on_late=config.on_late,
    )
