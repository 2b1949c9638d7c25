"""Versions and histories as plain data that `torch.save` and safetensors can hold."""

from dataclasses import dataclass
from typing import Any

from skfac.client.config import WIRE_DTYPES
from skfac.curvature.factor import Moment
from skfac.curvature.history import LayerHistory
from skfac.curvature.inverse import (
    DenseInverse,
    DiagonalInverse,
    FactorInverse,
    LowRankInverse,
)
from skfac.curvature.layer import LayerPreconditioner
from skfac.wire.errors import ConfigurationError
from skfac.wire.outcome import Loss, Outcome, Version
from skfac.wire.state import LayerState, SessionState

_FORMAT = 2
_FORMS: dict[str, type[LowRankInverse] | type[DenseInverse] | type[DiagonalInverse]] = {
    "low_rank": LowRankInverse,
    "dense": DenseInverse,
    "diagonal": DiagonalInverse,
}


@dataclass(frozen=True, eq=False)
class StoreState:
    """All versions of a store, as a checkpoint holds them.

    Attributes:
        in_use: The version of each layer that steps use.
        expected: Capture step -> the outcome of each layer; None if none came yet.
    """

    in_use: list[Version | None]
    expected: dict[int, list[Outcome | None]]


def to_state_dict(
    step: int, names: list[str], state: StoreState, history: SessionState | None
) -> dict[str, Any]:
    """Write a store's versions as nested dicts of numbers, strings and tensors.

    Args:
        step: The trainer's next step.
        names: Layer names in the order of the store.
        state: The versions.
        history: What the server keeps of earlier updates, if anything.

    Returns:
        The state.
    """
    return {
        "format": _FORMAT,
        "step": step,
        "layers": names,
        "in_use": [_encode(version) for version in state.in_use],
        "expected": {c: list(map(_encode, row)) for c, row in state.expected.items()},
        "history": [
            {"layer": s.layer, "step": s.step} | _encode_history(s.history)
            for s in (history.layers if history else ())
        ],
    }


def from_state_dict(
    state: dict[str, Any], names: list[str]
) -> tuple[int, StoreState, SessionState | None]:
    """Read what `to_state_dict` wrote.

    Args:
        state: The state.
        names: Layer names of the model that goes on.

    Returns:
        The trainer's next step, the versions, and the server's history, if any.

    Raises:
        ConfigurationError: If the state is of another format or another model.
    """
    if state.get("format") != _FORMAT:
        raise ConfigurationError(
            f"This state has format {state.get('format')!r}; expected {_FORMAT}."
        )
    if state["layers"] != names:
        raise ConfigurationError(
            f"This state is of layers {state['layers']}; the model has {names}."
        )
    in_use = [_decode(index, entry) for index, entry in enumerate(state["in_use"])]
    expected = {
        step: [_decode(index, entry) for index, entry in enumerate(row)]
        for step, row in state["expected"].items()
    }
    versions = [v if isinstance(v, Version) else None for v in in_use]
    layers = tuple(
        LayerState(entry["layer"], entry["step"], _decode_history(entry))
        for entry in state["history"]
    )
    history = SessionState(layers) if layers else None
    return state["step"], StoreState(versions, expected), history


def _encode(outcome: Outcome | None) -> dict[str, Any] | None:
    if outcome is None:
        return None
    if isinstance(outcome, Loss):
        lost = {"reason": outcome.reason, "message": outcome.message}
        return {"step": outcome.step, "lost": lost}
    return {
        "step": outcome.step,
        "rows": outcome.rows,
        "ranks": outcome.ranks,
        "updates": outcome.updates,
        "damping_factor": outcome.damping_factor,
        "activations": _encode_inverse(outcome.preconditioner.activations),
        "derivatives": _encode_inverse(outcome.preconditioner.derivatives),
    }


def _decode(layer: int, entry: dict[str, Any] | None) -> Outcome | None:
    if entry is None:
        return None
    if "lost" in entry:
        return Loss(layer, entry["step"], **entry["lost"])
    preconditioner = LayerPreconditioner(
        activations=_decode_inverse(entry["activations"]),
        derivatives=_decode_inverse(entry["derivatives"]),
    )
    counts = entry["rows"], entry["ranks"], entry["updates"]
    factor = entry.get("damping_factor", 1.0)  # which older states lack
    return Version(layer, entry["step"], preconditioner, *counts, factor)


def _encode_inverse(inverse: FactorInverse) -> dict[str, Any]:
    form = next(name for name, kind in _FORMS.items() if isinstance(inverse, kind))
    return {"form": form, "tensor": inverse.tensor, "damping": inverse.damping}


def _decode_inverse(entry: dict[str, Any]) -> FactorInverse:
    return _FORMS[entry["form"]](entry["tensor"], entry["damping"])


def _encode_history(history: LayerHistory) -> dict[str, Any]:
    return {
        "history": history.history,
        "diagonal": history.diagonal,
        "updates": history.updates,
        "dtype": str(history.dtype).removeprefix("torch."),
        "activations": [vars(moment) for moment in history.activations],
        "derivatives": [vars(moment) for moment in history.derivatives],
    }


def _decode_history(entry: dict[str, Any]) -> LayerHistory:
    return LayerHistory(
        history=entry["history"],
        diagonal=entry["diagonal"],
        updates=entry["updates"],
        dtype=WIRE_DTYPES[entry["dtype"]],
        activations=tuple(Moment(**moment) for moment in entry["activations"]),
        derivatives=tuple(Moment(**moment) for moment in entry["derivatives"]),
    )
