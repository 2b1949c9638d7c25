"""Collects the rows of every layer during a training step's forward and backward."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from skfac.client.config import WIRE_DTYPES, PreconditionerConfig
from skfac.client.hooks import HookedLayers, backward_id, without_autocast
from skfac.client.layers import TrackedLayer
from skfac.client.phases import phase
from skfac.client.tap import listen_to
from skfac.curvature.geometry import LayerGeometry
from skfac.curvature.positions import Empty, Positions, all_positions, draw_positions
from skfac.curvature.settings import CurvatureSettings
from skfac.curvature.tensors import in_dtype, without_graph
from skfac.wire.errors import ConfigurationError
from skfac.wire.report import NO_STEPS, StepReport
from skfac.wire.snapshot import LayerRows, Snapshot
from skfac.wire.staging import HostCopy, Staging

logger = logging.getLogger(__name__)

HostMemory = Callable[[int, Sequence[int], torch.dtype], Tensor]
"""Makes memory on the CPU for the rows of a layer."""

_CALLS_PER_SEED = 1000  # forwards of one layer in one step, far beyond any model


def host_memory(layer: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Make memory for rows that need not be anywhere in particular.

    Returns:
        A tensor on the CPU.
    """
    return torch.empty(tuple(shape), dtype=dtype)


@dataclass(eq=False)
class _Call:
    # One forward of a layer. A layer that is used twice has two, and the rows of each
    # stay together whatever the order of the backward.
    number: int
    activations: Tensor
    derivatives: Tensor | None = None
    pending: tuple[int, Tensor] | None = None  # of a backward, by its number

    def add(self, derivatives: Tensor) -> None:
        known = self.derivatives
        self.derivatives = derivatives if known is None else known + derivatives


@dataclass(frozen=True, eq=False)
class _Counted:
    # A parameter that tells of its backwards.
    weight: nn.Parameter
    handle: RemovableHandle


@dataclass(frozen=True, eq=False)
class PendingSnapshot:
    """A snapshot on its way to host memory.

    Attributes:
        rank: Who captured it.
        step: Step of the backward.
        settings: How it is to be weighed and damped.
        report: How the steps before it fared.
    """

    rank: int
    step: int
    settings: CurvatureSettings
    _copies: Mapping[int, HostCopy]
    report: StepReport = NO_STEPS

    def wait(self) -> Snapshot:
        """Block until the rows are in host memory.

        Returns:
            The snapshot.
        """
        pairs = ((index, copy.wait()) for index, copy in self._copies.items())
        rows = (LayerRows(index, a, d) for index, (a, d) in pairs)
        settings, report = self.settings, self.report
        return Snapshot(self.rank, self.step, settings, tuple(rows), report)

    def only(self, layers: Iterable[int], report: StepReport) -> "PendingSnapshot":
        """Leave out the rows of all layers but some.

        Args:
            layers: Those that stay.
            report: How they fared.

        Returns:
            A snapshot that shares the rows.
        """
        copies = {index: self._copies[index] for index in layers}
        return replace(self, _copies=copies, report=report)


class Capture:
    """Hooks that collect rows while a step is armed, and do nothing otherwise.

    The rows are reduced right away, so that nothing a model does in place later changes
    them. Only backwards that add to the layer's gradient count, and not those that
    `torch.autograd.grad` runs beside them. Rows of a backward whose gradients were
    thrown away (`zero_grad` without a step) are thrown away too, at the layer's next
    forward.
    """

    def __init__(
        self,
        layers: Sequence[TrackedLayer],
        config: PreconditionerConfig,
        rank: int,
        empty: HostMemory = host_memory,
    ) -> None:
        self._layers = layers
        self._config = config
        self._rank = rank
        self._host_empty = empty
        self._dtype = WIRE_DTYPES[config.wire_dtype]
        self._step: int | None = None
        self._sampling = False
        # Of forwards whose backward has come; the others live as long as their graph.
        self._calls: list[list[_Call]] = [[] for _ in layers]
        self._forwards = [0] * len(layers)
        self._staging: dict[torch.device, Staging] = {}
        self._said: set[str] = set()
        bodies = [partial(self._record, index) for index in range(len(layers))]
        self._hooks = HookedLayers(layers, bodies, lambda: self._step is not None)
        self._counted: list[_Counted | None] = [None] * len(layers)
        self._arrived = [True] * len(layers)
        self._arrivals = [
            layer.weight.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                partial(self._note_arrival, index)
            )
            for index, layer in enumerate(layers)
            if layer.shard is not None
        ]

    def arm(self, step: int | None) -> None:
        """Collect the rows of this step from now on; None collects none."""
        self._step = step

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Take derivatives of the backward inside, where only those count.

        Yields:
            Nothing.
        """
        for index in range(len(self._layers)):
            self._forget_thrown_away(index)
        self._sampling = True
        try:
            yield
        finally:
            self._sampling = False

    def take(self, step: int) -> PendingSnapshot:
        """Close the snapshot of a step whose backward has run.

        Returns:
            The rows of all layers; a layer that got no data has none.

        Raises:
            ConfigurationError: If a schedule gives a value out of range, or a layer has
                got other parameters since it was wrapped.
        """
        settings = self._config.curvature_at(step)
        for layer in self._layers:
            layer.check_parameters()
        copies, found = {}, False
        for (index, layer), calls in zip(
            enumerate(self._layers), self._calls, strict=True
        ):
            rows = self._joined(layer, calls)
            # By the rows' device: a model may be moved after it was wrapped.
            device = rows[0].device
            if device not in self._staging:
                self._staging[device] = Staging(device)
            copies[index] = self._staging[device].to_host(rows)
            calls.clear()
            self._forwards[index] = 0
            found = found or rows[1].shape[-2] > 0
        if not found:
            self._say_once(
                "",
                "No layer had rows at step %d: was the model in eval() mode, or step() "
                "called before backward()?",
                step,
            )
        return PendingSnapshot(self._rank, step, settings, copies)

    def close(self) -> None:
        """Remove the hooks; idempotent."""
        self._hooks.remove()
        handles = [counted.handle for counted in self._counted if counted is not None]
        for handle in handles + self._arrivals:
            handle.remove()

    def _count_backwards(self, index: int) -> None:
        # By the parameter that computes: that of fully_shard is another one.
        weight, counted = self._layers[index].modules[0].weight, self._counted[index]
        if counted is not None:
            if counted.weight is weight:
                return
            counted.handle.remove()
        assert isinstance(weight, nn.Parameter)
        handle = weight.register_post_accumulate_grad_hook(partial(self._count, index))  # type: ignore[no-untyped-call]
        self._counted[index] = _Counted(weight, handle)

    def _note_arrival(self, index: int, weight: Tensor) -> None:
        self._arrived[index] = True

    def _count(self, index: int, weight: Tensor) -> None:
        # The gradient of a backward has arrived, so its derivatives count.
        number = backward_id()
        for call in self._calls[index]:
            if call.pending is not None and call.pending[0] == number:
                call.add(call.pending[1])
                call.pending = None

    def _joined(self, layer: TrackedLayer, calls: list[_Call]) -> list[Tensor]:
        ordered = sorted(calls, key=lambda call: call.number)
        done = [(c.activations, c.derivatives) for c in ordered]
        pairs = [(a, d) for a, d in done if d is not None]
        if not pairs:
            geometry, device = layer.geometry, layer.weight.device
            groups = () if geometry.groups == 1 else (geometry.groups,)
            return [
                torch.empty(*groups, 0, dim, dtype=self._dtype, device=device)
                for dim in (geometry.d_in, geometry.d_out)
            ]
        if len(pairs) == 1:
            return list(pairs[0])
        return [torch.cat(side, dim=-2) for side in zip(*pairs, strict=True)]

    def _record(self, index: int, inputs: Tensor, output: Tensor) -> Tensor | None:
        assert self._step is not None
        layer = self._layers[index]
        if inputs.layout != torch.strided or inputs.is_nested:
            self._say_unsupported(layer.name, "its input is sparse or nested.")
            return None
        # In a backward a forward is one of a checkpoint.
        if self._config.fisher != "monte_carlo" and backward_id() < 0:
            self._forget_thrown_away(index)
        self._count_backwards(index)
        geometry = layer.geometry
        batch, count = geometry.extents(output)
        positions = self._draw(self._step, index, count)
        empty = partial(self._empty, index)
        try:
            with phase("capture"):
                rows = self._activation_rows(geometry, inputs, positions, empty)
        except ValueError as error:  # a call that the geometry does not describe
            self._say_unsupported(layer.name, error)
            return None
        call = _Call(self._forwards[index], rows)
        self._forwards[index] += 1
        scale = self._derivative_scale(batch, output.device)
        listen = partial(self._listen, index, call, positions, scale)
        return listen_to(output, listen)

    def _forget_thrown_away(self, index: int) -> None:
        # Rows of gradients that nobody has any more.
        layer, calls = self._layers[index], self._calls[index]
        # A backward that fully_shard does not reduce has its gradient elsewhere.
        if layer.weight.grad is None and self._arrived[index]:
            calls[:] = [call for call in calls if call.derivatives is None]
            self._arrived[index] = layer.shard is None

    def _listen(
        self,
        index: int,
        call: _Call,
        positions: Positions,
        scale: float | Tensor,
        derivatives: Tensor,
    ) -> None:
        if self._step is None or (
            self._sampling != (self._config.fisher == "monte_carlo")
        ):
            return  # of a forward that ran ahead of its step
        layer, empty = self._layers[index], partial(self._empty, index)
        if layer.shard is None and not self._sampling:
            self._forget_thrown_away(index)  # between the forward and now
        with phase("capture"), without_autocast(derivatives.device.type):
            found = layer.geometry.derivative_rows(
                in_dtype(without_graph(derivatives), self._dtype),
                positions,
                scale=scale,
                empty=empty,
            )
        if self._sampling and call.derivatives is not None:
            raise ConfigurationError(
                "capture_from was called twice for one forward: take the rows of one "
                "draw for each."
            )
        if call not in self._calls[index]:
            self._calls[index].append(call)
        if self._sampling:  # of no gradient, but wanted
            call.add(found)
            return
        number, pending = backward_id(), call.pending
        if pending is not None and pending[0] == number:
            found = pending[1] + found
        call.pending = number, found

    def _draw(self, step: int, index: int, count: int) -> Positions:
        if self._config.reduction != "subsample":
            return all_positions(self._config.reduction, count)
        forwards = self._forwards[index]
        seed = (step * len(self._layers) + index) * _CALLS_PER_SEED + forwards
        return draw_positions(
            self._config.reduction,
            count,
            keep=int(self._config.at("positions", step)),
            seed=seed + (self._rank << 48),
        )

    def _activation_rows(
        self,
        geometry: LayerGeometry,
        inputs: Tensor,
        positions: Positions,
        empty: Empty,
    ) -> Tensor:
        inputs = without_graph(inputs)
        if inputs.is_floating_point():  # tokens are not
            inputs = in_dtype(inputs, self._dtype)
        rows = geometry.activation_rows(inputs, positions, empty)
        return in_dtype(rows, self._dtype)

    def _empty(self, index: int, shape: Sequence[int], like: Tensor) -> Tensor:
        # Where they can be sent from without a copy, if they are on the host.
        if like.device.type != "cpu":
            return like.new_empty(shape)
        return self._host_empty(index, shape, like.dtype)

    def _say_unsupported(self, name: str, error: ValueError | str) -> None:
        # Its rows are missing then: the layer keeps the version that it has.
        self._say_once(name, "Layer %r gives no rows: %s", name, error)

    def _say_once(self, layer: str, text: str, *arguments: object) -> None:
        # Once of each layer, and once of all together.
        level = logging.DEBUG if layer in self._said else logging.WARNING
        self._said.add(layer)
        logger.log(level, text, *arguments)

    def _derivative_scale(self, batch: int, device: torch.device) -> float | Tensor:
        # Autograd's derivatives are of the mean over this forward's batch, divided by
        # the micro-batches of a step and multiplied by the loss scale.
        scale = float(batch) if self._config.loss_reduction == "mean" else 1.0
        if self._config.loss_reduction == "mean":
            scale *= self._config.accumulation_steps
        scaler = self._config.grad_scaler
        if scaler is None or not scaler.is_enabled():
            return scale
        # A tensor on the device: reading the number would stop the trainer.
        return scale / scaler.scale(torch.ones((), device=device))
