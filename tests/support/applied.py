"""`Apply` by hand: layers, versions of them, and one step."""

import torch

from skfac.client.apply import Apply
from skfac.client.config import PreconditionerConfig
from skfac.client.layers import track_layers
from skfac.client.ready import ReadyVersions
from skfac.client.row_space import RowSpace
from skfac.curvature.layer import precondition_layer
from skfac.wire.outcome import Version

LR = 0.3


def layers_of(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    return track_layers(model, optimizer, ())


def raw_gradients(layers) -> list[torch.Tensor]:
    return [layer.gradient().clone() for layer in layers]


def version_of(layer, index: int, *, dtype=torch.float32, rows: int = 4) -> Version:
    sides = [
        torch.randn(rows, dim, dtype=dtype)
        for dim in (layer.spec.d_in, layer.spec.d_out)
    ]
    inverses = precondition_layer(*sides, damping=0.1, split="pi")
    return Version(index, 0, inverses, rows=rows, ranks=1, updates=1)


def apply(layers, versions, *, kl_clip=1e9, trust="kl") -> Apply:
    """One step of `Apply`, everything in gradient space."""
    config = PreconditionerConfig(apply="gradient")
    rows = RowSpace(layers, config, lambda *_: None)
    done = Apply(layers, ReadyVersions(layers), rows)
    done(versions, trust=trust, kl_clip=kl_clip)
    return done
