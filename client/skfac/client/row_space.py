"""Preconditions the rows of fully connected layers inside their own backward.

The weight gradient of `B` rows is `Dᵀ X`, so

    P = (G + λ_G I)⁻¹ Dᵀ X (A + λ_A I)⁻¹ = D̃ᵀ X̃,
    D̃ = D (G + λ_G I)⁻¹,  X̃ = X (A + λ_A I)⁻¹:

turning the rows costs `4 B n (d_in + d_out)` operations, turning the gradient
`8 n d_in d_out`. It is linear in the rows, so that accumulation, loss scales and means
over ranks work as for any gradient.

A forward hook replaces the layer's output by the same tensor with another backward, so
the module keeps its class, name, parameters and other hooks.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.modules import module as torch_modules
from torch.utils.hooks import RemovableHandle

from skfac.client.config import PreconditionerConfig
from skfac.client.hooks import (
    ForwardHook,
    HookedLayers,
    backward_id,
    without_autocast,
)
from skfac.client.layers import TrackedLayer
from skfac.client.phases import phase
from skfac.client.rows import Rows
from skfac.curvature.inverse import DenseInverse, LowRankInverse
from skfac.curvature.layer import LayerPreconditioner
from skfac.curvature.tensors import in_dtype

logger = logging.getLogger(__name__)

# Multiplications to be saved for each row of an inverse, or a backward of our own costs
# more than it saves: by `benchmarks/step.py --model deep` it does so with 128 features,
# takes as long with 192, and saves with 256.
_WORTH_IT = 2**15

FULLY_CONNECTED = {"linear", "hf_conv1d"}

_ELSEWHERE = "its weight gets gradients from elsewhere, too"
_HARM = (
    " In this step a part of its gradient may have missed the preconditioner. "
    "apply='gradient' silences this."
)

Provide = Callable[[int, torch.device, torch.dtype], LayerPreconditioner | None]
"""Finds what a layer is preconditioned with in this step, by its index."""


class _Given(NamedTuple):
    # A weight gradient that a backward made here; no reference to it, as torch would
    # copy a gradient that somebody else holds.
    backward: int
    mark: tuple[int, int]
    turned: bool


class RowSpace:
    """Layers whose gradients leave the backward preconditioned.

    A layer falls back to gradient space, for good and saying so, when its weight gets
    a gradient that does not come from its own rows: in row space that part would
    miss the preconditioner. So does one that is used several times in a backward, as
    nobody could tell then. Gradients are looked at from the first step on, so that
    most of this is known before there are versions.

    Attributes:
        active: Indices of the layers that may be preconditioned here.
        left: Indices of those that fell back.
        used: Indices of those that were, in the latest step.
    """

    def __init__(
        self,
        layers: Sequence[TrackedLayer],
        config: PreconditionerConfig,
        provide: Provide,
        world_size: int = 1,
    ) -> None:
        self._layers = layers
        self._always = config.apply == "row"
        self._passes = config.accumulation_steps
        self._provide = provide
        self._backwards: list[list[Rows]] = [[] for _ in layers]
        self._pending: list[list[tuple[int, Rows]]] = [[] for _ in layers]
        self._given: dict[int, list[_Given]] = {}
        self._raw: set[int] = set()  # whose gradients of this step began as raw ones
        # The first forward of a layer in a step decides for all of them: gradients of
        # both kinds would add up otherwise.
        self._chosen: dict[int, bool] = {}
        self._sampling = False
        self.used: set[int] = set()
        self.left: set[int] = set()
        self.active = {
            index
            for index, layer in enumerate(layers)
            # The rows of one rank do not tell the trust region of several.
            if world_size == 1 and _is_eligible(layer, config)
        }
        # Until the step ends a layer that fell back is replaced as before: activation
        # checkpointing wants a second forward to be as the first.
        self._replaced = set(self.active)
        chosen = sorted(self.active)
        self._hooks = HookedLayers(
            [layers[index] for index in chosen],
            [partial(self._replace, index) for index in chosen],
        )
        self._watches: dict[int, list[RemovableHandle]] = {}

    def take(self, index: int) -> Rows | None:
        """Take the rows of the backwards since the last call.

        Returns:
            The rows if the layer's gradient is preconditioned already, else None.
        """
        backwards, self._backwards[index] = self._backwards[index], []
        self._pending[index].clear()
        self._raw.discard(index)
        self._chosen.pop(index, None)
        if index not in self.active:
            self._replaced.discard(index)
        (self.used.add if backwards else self.used.discard)(index)
        if len(backwards) < 2:
            return backwards[0] if backwards else None
        names = [field.name for field in fields(Rows)]
        sides = (torch.cat([getattr(b, name) for b in backwards]) for name in names)
        return Rows(*sides)

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Let the backward inside make no weight gradients.

        Yields:
            Nothing.
        """
        self._sampling = True
        try:
            yield
        finally:
            self._sampling = False

    def leave(self, indices: Iterable[int]) -> None:
        """Send layers to gradient space for good, from the next step on."""
        for index in indices:
            self.active.discard(index)
            self.left.add(index)

    def close(self) -> None:
        """Remove the hooks; idempotent."""
        self._hooks.remove()
        for watch in chain.from_iterable(self._watches.values()):
            watch.remove()

    def weight_gradients(
        self, index: int, inputs: Tensor, derivatives: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Make the gradients of weight and bias in a layer's backward.

        Args:
            index: Of the layer.
            inputs: Its input, `[..., features]`.
            derivatives: Of the loss by its output, `[..., d_out]`.

        Returns:
            Preconditioned ones if the layer has a version, else raw ones.
        """
        if self._sampling:
            return None, None  # a backward that only derivatives are wanted of
        self._forget_thrown_away(index)
        layer = self._layers[index]
        dtype = layer.weight.dtype
        x, d = (in_dtype(_flat(rows), dtype) for rows in (inputs, derivatives))
        if torch.is_grad_enabled():
            self._demote(index, "it takes part in a double backward", harm=True)
        ready = None
        if index in self.active and index not in self._raw:
            ready = self._provide(index, d.device, dtype)
        if ready is None:
            weight = _as_weight(layer, d.T @ x)
            bias = None if layer.bias is None else d.sum(0)
        else:
            weight, bias = self._turned(index, ready, x, d)
        given = _Given(backward_id(), _mark(weight), ready is not None)
        known = self._given.setdefault(index, [])
        if known and known[0].backward != given.backward:
            known.clear()
        known.append(given)
        return weight, bias

    def _turned(
        self, index: int, ready: LayerPreconditioner, x: Tensor, d: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        layer, wide = self._layers[index], ready.activations.tensor.dtype
        x, d = in_dtype(x, wide), in_dtype(d, wide)
        with phase("apply"):
            turned_d = ready.derivatives.right(d)
            if layer.bias is None:
                ones = turned_ones = x.new_zeros(len(x))
                turned_x = ready.activations.right(x)
            else:
                ones = x.new_ones(len(x))
                inverse = ready.activations
                assert isinstance(inverse, LowRankInverse | DenseInverse)
                turned_x, turned_ones = inverse.right_of_ones(x)
        one = Rows(x, d, turned_x, turned_d, turned_ones, ones)
        self._pending[index].append((backward_id(), one))
        bias = None
        if layer.bias is not None:
            bias = in_dtype(turned_ones @ turned_d, layer.bias.dtype)
        if layer.geometry.kind == "hf_conv1d":
            weight = turned_x.T @ turned_d
        else:
            weight = turned_d.T @ turned_x
        return in_dtype(weight, layer.weight.dtype), bias

    def _replace(self, index: int, inputs: Tensor, output: Tensor) -> Tensor | None:
        layer = self._layers[index]
        self._forget_thrown_away(index)
        if index not in self._replaced:
            return None
        if index not in self._chosen:
            worth_it = self._always or self._is_worth_it(layer, output)
            self._chosen[index] = worth_it and _is_plain(layer, inputs)
        if not (self._chosen[index] and _computes_alone(layer)):
            return None
        self._begin_to_watch(index)
        replaced: Tensor = _RowBackward.apply(  # type: ignore[no-untyped-call]
            output.detach(), inputs, layer.weight, layer.bias, self, index
        )
        return replaced

    def _is_worth_it(self, layer: TrackedLayer, output: Tensor) -> bool:
        rows = output.numel() // output.shape[-1] * self._passes
        d_in, d_out = layer.geometry.d_in, layer.geometry.d_out
        return d_in * d_out - rows * (d_in + d_out) >= _WORTH_IT

    def _forget_thrown_away(self, index: int) -> None:
        if self._layers[index].weight.grad is None:
            self._backwards[index].clear()
            self._raw.discard(index)

    def _begin_to_watch(self, index: int) -> None:
        # Only now: a layer of many rows never comes here, and hooks cost time.
        if index in self._watches:
            return
        weight = self._layers[index].weight
        if weight.grad is not None:
            self._raw.add(index)
        self._watches[index] = [
            weight.register_hook(partial(self._watch, index)),  # type: ignore[no-untyped-call]
            weight.register_post_accumulate_grad_hook(partial(self._count, index)),  # type: ignore[no-untyped-call]
        ]

    def _count(self, index: int, weight: Tensor) -> None:
        # Rows of torch.autograd.grad stay behind: their gradient goes elsewhere.
        number, pending = backward_id(), self._pending[index]
        self._backwards[index] += [rows for n, rows in pending if n == number]
        self._pending[index] = [(n, rows) for n, rows in pending if n != number]

    def _watch(self, index: int, gradient: Tensor | None) -> None:
        if gradient is None or self._sampling:
            return
        # The very tensor that this layer's backward has made, if nothing was added.
        given = self._given.pop(index, [])
        if given and given[0].backward != backward_id():
            given = []
        turned = any(one.turned for one in given)
        if not turned and not self._backwards[index]:
            self._raw.add(index)
        if len(given) > 1:
            self._demote(index, "it is used several times in a backward", harm=turned)
        elif given and given[0].mark != _mark(gradient):
            self._demote(index, _ELSEWHERE, harm=turned)
        elif not turned and self._backwards[index]:
            self._demote(index, _ELSEWHERE, harm=True)

    def _demote(self, index: int, why: str, *, harm: bool) -> None:
        if index not in self.active:
            return
        self.leave([index])
        logger.log(
            logging.WARNING if harm else logging.INFO,
            "Layer %r is preconditioned in gradient space from now on: %s.%s",
            self._layers[index].name,
            why,
            _HARM if harm else "",
        )


class _RowBackward(torch.autograd.Function):
    """The output of a fully connected layer, with this module's backward."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        output: Tensor,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: RowSpace,
        index: int,
    ) -> Tensor:
        # Declared as changed: then it is no view, and may be changed in place.
        ctx.mark_dirty(output)
        ctx.save_for_backward(inputs, weight)
        ctx.rows, ctx.index = rows, index
        ctx.listeners = []  # see `skfac.client.tap`
        return output

    @staticmethod
    def backward(ctx: Any, *derivatives: Any) -> Any:  # noqa: ANN401
        (d,) = derivatives
        for listener in ctx.listeners:
            listener(d)
        inputs, weight = ctx.saved_tensors
        with without_autocast(d.device.type):
            by_input = None
            if ctx.needs_input_grad[1]:
                matrix = _as_weight(ctx.rows._layers[ctx.index], weight)
                by_input = in_dtype(d @ in_dtype(matrix, d.dtype), inputs.dtype)
            by_weight, by_bias = ctx.rows.weight_gradients(ctx.index, inputs, d)
        return None, by_input, by_weight, by_bias, None, None


def _flat(values: Tensor) -> Tensor:
    return values if values.ndim == 2 else values.reshape(-1, values.shape[-1])


def _as_weight(layer: TrackedLayer, matrix: Tensor) -> Tensor:
    # Between [d_out, features] and the weight's own layout, in both directions.
    return matrix.T if layer.geometry.kind == "hf_conv1d" else matrix


def _mark(gradient: Tensor) -> tuple[int, int]:
    return gradient.data_ptr(), gradient._version


def _is_plain(layer: TrackedLayer, inputs: Tensor) -> bool:
    # Float16 has no room for directions before the trust region has shortened them; a
    # frozen bias has no rows.
    if inputs.layout != torch.strided or inputs.is_nested:
        return False
    trained = layer.bias is None or layer.bias.requires_grad
    return trained and layer.weight.dtype != torch.float16


def _computes_alone(layer: TrackedLayer) -> bool:
    # Whether an output is that of the weight only: what a forward of another kind or a
    # hook before ours has done to it would not get its gradient.
    if torch_modules._global_forward_hooks:
        return False
    for module in layer.modules:
        first = next(iter(module._forward_hooks.values()))
        if "forward" in module.__dict__ or type(first) is not ForwardHook:
            return False
    return True


def _is_eligible(layer: TrackedLayer, config: PreconditionerConfig) -> bool:
    return (
        config.apply != "gradient"
        and config.lag > 0
        and layer.shard is None
        and layer.geometry.kind in FULLY_CONNECTED
    )
