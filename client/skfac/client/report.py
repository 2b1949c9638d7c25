"""What a trainer's layers are preconditioned with, as plain data."""

from collections.abc import Sequence
from typing import Any

from skfac.client.layers import TrackedLayer
from skfac.client.row_space import RowSpace
from skfac.client.store import Store
from skfac.wire.outcome import Version


def describe(
    layers: Sequence[TrackedLayer], store: Store, rows: RowSpace, step: int
) -> dict[str, Any]:
    """Describe the link to the server and every layer.

    Args:
        layers: The layers.
        store: Their versions.
        rows: Knows which of them are preconditioned in row space.
        step: The latest step.

    Returns:
        `connected`, `failure`, `layers`, `waited_s` and `versions`, as
        `Preconditioner.report` describes them.
    """
    failure = store.failure
    return {
        "connected": all(store.links),
        "failure": None if failure is None else str(failure),
        "layers": {
            layer.name: _of_version(version, step)
            | {"apply": "row" if index in rows.used else "gradient"}
            for index, (layer, version) in enumerate(
                zip(layers, store.in_use, strict=True)
            )
        },
        "waited_s": store.waited_s,
        "versions": dict(store.counts),
    }


def _of_version(version: Version | None, step: int) -> dict[str, Any]:
    if version is None:
        names = "version", "age", "updates", "rank", "damping_factor"
        return dict.fromkeys(names)
    inverses = version.preconditioner
    rank = [
        inverses.activations.tensor.shape[-2],
        inverses.derivatives.tensor.shape[-2],
    ]
    return {
        "version": version.step,
        "age": step - version.step,
        "updates": version.updates,
        "rank": rank,
        "damping_factor": version.damping_factor,
    }
