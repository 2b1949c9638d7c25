"""What one session remembers of earlier updates, and how much it may."""

import math

from skfac.curvature.factor import MOMENT_BYTES
from skfac.curvature.finite import all_finite
from skfac.curvature.history import LayerHistory
from skfac.curvature.settings import CurvatureSettings
from skfac.wire.errors import (
    InvalidRequestError,
    LimitExceededError,
    SessionMismatchError,
)
from skfac.wire.messages import DTYPES
from skfac.wire.session import MAX_WINDOW, LayerSpec, SessionSpec
from skfac.wire.snapshot import SnapshotHeader
from skfac.wire.state import LayerState, LayerStateHeader, MomentHeader, SessionState

_ITEM_BYTES = 8  # of a history's numbers, which are float64


def check_finite(state: SessionState) -> None:
    """Check the numbers of a state.

    Raises:
        InvalidRequestError: If any is NaN or infinite, or negative in a diagonal.
    """
    for layer in state.layers:
        problem = None
        if not all(map(all_finite, layer.tensors)):
            problem = "NaN or infinite entries"
        elif layer.history.diagonal and any(
            bool((moment.tensor < 0).any()) for moment in layer.history.activations
        ):
            problem = "negative entries in a diagonal"
        if problem is not None:
            raise InvalidRequestError(
                f"The history of layer index {layer.layer} has {problem}; nothing was "
                "imported."
            )


class Histories:
    """The histories of one session's layers; the engine's lock guards it.

    Attributes:
        begun: Whether a (layer, step) is complete, after which nothing is imported.
        nbytes: Bytes of all histories.
    """

    def __init__(self, spec: SessionSpec, *, max_bytes: int) -> None:
        self.begun = False
        self.nbytes = 0
        self._spec = spec
        self._max_bytes = max_bytes
        self._states: dict[int, LayerState] = {}
        self._imported: dict[int, int] = {}  # layer -> newest step that was imported

    def of(self, layer: int) -> LayerHistory:
        """Find the history of a layer.

        Returns:
            It; an empty one before the first update.
        """
        if layer in self._states:
            return self._states[layer].history
        diagonal = self._spec.layers[layer].diagonal
        return LayerHistory.empty(self._spec.history, diagonal=diagonal)

    def store(self, layer: int, step: int, history: LayerHistory) -> None:
        """Keep the history of a layer after a step; none of a single snapshot."""
        before = self._states.get(layer)
        unchanged = before is not None and history is before.history
        if history.history == "snapshot" or not history.updates or unchanged:
            return
        if before is not None:
            self.nbytes -= before.history.nbytes
            step = max(step, before.step)
        self._states[layer] = LayerState(layer, step, history)
        self.nbytes += history.nbytes

    def state(self) -> SessionState:
        """Collect all histories.

        Returns:
            Those that are not empty, by layer.
        """
        return SessionState(
            tuple(self._states[layer] for layer in sorted(self._states))
        )

    def replace(self, state: SessionState) -> None:
        """Go on from a state whose layers were checked by `check_state`.

        Raises:
            InvalidRequestError: If it has a layer twice.
            SessionMismatchError: If the session has begun.
        """
        self._check_not_begun()
        states = {layer.layer: layer for layer in state.layers}
        if len(states) < len(state.layers):
            raise InvalidRequestError("A state has the history of a layer twice.")
        self._states = states
        self._imported = {layer: state.step for layer, state in states.items()}
        self.nbytes = sum(state.history.nbytes for state in states.values())

    # ---------------------------------------------------------------- checks

    def check_snapshot(self, header: SnapshotHeader) -> None:
        """Check that the histories have room for a snapshot, and are older.

        Raises:
            SessionMismatchError: If it is not newer than an imported history.
            LimitExceededError: If the histories could grow over the limit.
        """
        for rows in header.layers:
            imported = self._imported.get(rows.layer, -1)
            if header.step <= imported:
                raise SessionMismatchError(
                    f"Rank {header.rank} pushed step {header.step} of layer "
                    f"{self._spec.layers[rows.layer].name!r}, whose imported history "
                    f"ends at step {imported}; steps must not go backwards."
                )
        if self._spec.history == "snapshot":
            return
        counts = {
            rows.layer: rows.count * self._spec.world_size for rows in header.layers
        }
        full_bytes = sum(
            self._full_bytes(self._spec.layers[layer], header.settings, count)
            for layer, count in counts.items()
        )
        rest = (s.history.nbytes for i, s in self._states.items() if i not in counts)
        self._check_bytes(full_bytes + sum(rest))

    def check_state(self, header: LayerStateHeader, taken_bytes: int) -> None:
        """Check a layer's history before memory is taken for it.

        Args:
            header: What it declares.
            taken_bytes: Bytes of the histories that came with it and before it.

        Raises:
            InvalidRequestError: If the layer, a form, dtype, shape or number is wrong.
            SessionMismatchError: If the session has begun.
            LimitExceededError: If it is over the limit.
        """
        self._check_not_begun()
        if not 0 <= header.layer < len(self._spec.layers):
            raise InvalidRequestError(
                f"Layer index {header.layer} is outside the session's "
                f"{len(self._spec.layers)} layers."
            )
        layer = self._spec.layers[header.layer]
        problem = _first_problem(self._spec, layer, header)
        if problem is not None:
            raise InvalidRequestError(f"The history of layer {layer.name!r} {problem}.")
        self._check_bytes(taken_bytes + header.nbytes)

    def _check_not_begun(self) -> None:
        if self.begun:
            raise SessionMismatchError(
                f"Job {self._spec.job!r} has complete snapshots already; histories are "
                "imported before the first."
            )

    def _check_bytes(self, nbytes: int) -> None:
        if nbytes <= self._max_bytes:
            return
        ways_out = {
            "ema": "a smaller `rank` makes them smaller",
            "window": "a smaller `window` makes them smaller, or an ema with a `rank`",
            "snapshot": "with history = 'snapshot' there are none",
        }
        raise LimitExceededError(
            f"The histories of job {self._spec.job!r} take up to {nbytes} bytes, over "
            f"max_history_bytes = {self._max_bytes}; {ways_out[self._spec.history]}."
        )

    def _full_bytes(
        self, layer: LayerSpec, settings: CurvatureSettings, count: int
    ) -> int:
        total = 0
        for dim, diagonal in ((layer.d_in, layer.diagonal), (layer.d_out, False)):
            if diagonal:
                rows = 1
            elif self._spec.history == "ema":
                rows = min(dim, settings.rank or dim)
            else:
                rows = min(dim, count)
            updates = settings.window if self._spec.history == "window" else 1
            moment_bytes = _ITEM_BYTES * layer.groups * rows * dim
            total += updates * (moment_bytes + MOMENT_BYTES)
        return total


def _first_problem(
    spec: SessionSpec, layer: LayerSpec, header: LayerStateHeader
) -> str | None:
    counts = len(header.activations), len(header.derivatives)
    if spec.history == "snapshot" or header.history != spec.history:
        return f"is of {header.history!r}; the session keeps {spec.history!r}"
    if header.diagonal != layer.diagonal:
        return f"says diagonal = {header.diagonal}; the layer {layer.diagonal}"
    if header.dtype not in DTYPES.values():
        return f"is of dtype {header.dtype}; float32 and float64 are taken"
    if counts[0] != counts[1] or not 1 <= counts[0] <= header.updates:
        return (
            f"has {counts[0]} moments of activations and {counts[1]} of derivatives "
            f"for {header.updates} updates"
        )
    most = 1 if spec.history == "ema" else MAX_WINDOW
    if counts[0] > most:
        return f"has {counts[0]} moments a side; {spec.history!r} has at most {most}"
    for moment in header.activations:
        problem = _moment_problem(moment, layer, layer.d_in, diagonal=layer.diagonal)
        if problem is not None:
            return f"has activations {problem}"
    for moment in header.derivatives:
        problem = _moment_problem(moment, layer, layer.d_out, diagonal=False)
        if problem is not None:
            return f"has derivatives {problem}"
    return None


def _moment_problem(
    moment: MomentHeader, layer: LayerSpec, dim: int, *, diagonal: bool
) -> str | None:
    shape = moment.tensor.shape
    if (moment.form == "diagonal") != diagonal:
        return f"in the form {moment.form!r}"
    if moment.tensor.dtype not in DTYPES.values():
        return f"of dtype {moment.tensor.dtype}; float32 and float64 are taken"
    rows = {"dense": dim, "diagonal": 1}.get(moment.form)
    if rows is None:
        rows = shape[-2] if len(shape) >= 2 else 0
    if not rows or shape != (*layer.block_shape, rows, dim):
        return f"of shape {shape} in the form {moment.form!r}; d is {dim}"
    if not (moment.weight > 0 and math.isfinite(moment.weight)):
        return f"of weight {moment.weight}; it must be positive and finite"
    if not (moment.dropped >= 0 and math.isfinite(moment.dropped)):
        return f"with a dropped trace of {moment.dropped}; it must be finite and >= 0"
    return None
