"""What a trainer uses: K-FAC's preconditioned gradient, computed elsewhere."""

import atexit
import logging
import math
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from skfac.client.adaptive import LevenbergMarquardt, difference, oldest_step
from skfac.client.apply import Apply
from skfac.client.capture import Capture
from skfac.client.checkpoint import from_state_dict, to_state_dict
from skfac.client.config import PreconditionerConfig, check_targets
from skfac.client.due import DueVersions
from skfac.client.job import layers_of, session_of
from skfac.client.loss_scale import LossScale
from skfac.client.meeting import await_links, check_steps, made_by_all
from skfac.client.newcomers import Newcomers
from skfac.client.order import StepOrder
from skfac.client.pace import Pace
from skfac.client.phases import phase
from skfac.client.ready import ReadyVersions
from skfac.client.report import describe
from skfac.client.row_space import RowSpace
from skfac.client.servers import Servers
from skfac.client.static_graph import check_not_static
from skfac.client.step_log import StepLog
from skfac.client.store import Store
from skfac.client.targets import Names, Target
from skfac.client.transport import connect
from skfac.client.world import check_joined, check_ranks, world_of
from skfac.curvature.layer import LayerPreconditioner
from skfac.wire.errors import ConfigurationError
from skfac.wire.state import SessionState

logger = logging.getLogger(__name__)


class Preconditioner:
    """Replaces gradients by SKFAC-preconditioned ones, between backward and update.

    Every `update_every` steps it captures the rows of both Kronecker factors of each
    linear layer, convolution and embedding, sends them to an engine, and from `lag`
    steps later on applies what comes back: `(G + λ_G I)⁻¹ ∇W (A + λ_A I)⁻¹`, inside a
    trust region. The first dimension of a layer's input counts the samples.

    Example:
        ```python
        with Preconditioner(model, optimizer, target="localhost:50051") as pre:
            for x, y in loader:
                loss_fn(model(x), y).backward()
                pre.step()
                optimizer.step()
                optimizer.zero_grad()
        ```

    Args:
        model: Trained by `optimizer`; layers of other types pass through, which a
            `PassThroughWarning` says.
        optimizer: Any torch optimizer; its learning rates set the trust region.
        target: `"embedded"` runs the engine on a thread of this process, which on the
            CPU wants a core: `torch.set_num_threads(cores - 1)`. `"host:port"` or
            `"unix:/path"` uses a server, `"ray://namespace/pool"` or the handle of a
            Ray actor what `skfac.service.ray` started. A list of those spreads the
            layers over several, and so does `"dns:///name:port"` over all addresses of
            a name, which may change while training. One that cannot be reached is tried
            again in the background; training goes on meanwhile.
        settings: The attributes of `PreconditionerConfig`.

    Raises:
        ConfigurationError: If a setting is wrong, the model has no layer to
            precondition, one that is sharded in a way that cannot be or that has a
            preconditioner, several ranks have no server, or they have not the same
            settings.
        ServiceError: If the server refuses this trainer.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        target: Target = "embedded",
        **settings: Any,  # noqa: ANN401  # the attributes of PreconditionerConfig
    ) -> None:
        self.config = config = PreconditionerConfig.of(settings)
        self._world = world = world_of(config.process_group)
        names = Names(target)
        targets = names.shared(world)
        check_targets(targets)
        check_ranks(world, targets, config.apply)
        track = partial(layers_of, model, optimizer, world, config)
        self._layers = made_by_all(world, config, track)
        spec = session_of(config, world, self._layers)
        self._step = 0
        self._next_capture = 0
        self._raw = 0
        self._pace = Pace(config.lag)
        self._sampled = False
        self._met = False
        self._closed = False
        log = StepLog()
        self._ready = ReadyVersions(self._layers)
        self._store = Store(spec, len(targets), self._ready.begin)
        self._due = DueVersions(self._store, config, world, len(self._layers), log)
        reach = partial(
            connect,
            spec=spec,
            rank=world.rank,
            credentials=config.credentials,
            device=self._layers[0].weight.device,
        )
        lookout = names, config.resolve_every_s
        self._servers = Servers(targets, spec, world, self._store, log, reach, lookout)
        self._capture = Capture(self._layers, config, world.rank, self._servers.empty)
        self._capture.arm(0)
        # Its hooks come before those of the capture, which listens to the output that
        # they replace.
        self._rows = RowSpace(self._layers, config, self._provide, world.size)
        self._apply = Apply(self._layers, self._ready, self._rows)
        self._loss_scale = LossScale(config.grad_scaler, optimizer)
        self._order = StepOrder(optimizer)
        self._newcomers = Newcomers(model, optimizer)
        atexit.register(self.close)
        try:
            await_links(world, self._store, targets, config.at("wait_s", 0))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def step(self) -> None:
        """Precondition the gradients of the backward that has just run, in place.

        Call it once a step, after all of its backwards and before `optimizer.step()`.
        Nothing that happens to a server or the network raises here, unless `on_late`
        says so.

        Raises:
            ConfigurationError: If the preconditioner is closed, a schedule gives a
                value out of range, `capture_from` was forgotten, the model has got
                other parameters, or ranks begin at different steps.
            LateVersionError: Under `on_late="raise"`, if a version is late.
            ServiceError: Under `on_late="wait"` or `"raise"`, if the server refuses
                this trainer.
        """
        if self._closed:
            raise ConfigurationError("This preconditioner is closed.")
        if not self._met:
            self._meet()
        self._pace.step(self._store.waited_s)
        step, config = self._step, self.config
        loss_scale = self._loss_scale.unscale(self._layers[0].weight.device)
        # A step that raised may be tried again; its rows were taken then.
        if step == self._next_capture:
            self._push_snapshot(step)
        with phase("wait"):
            versions = self._due.at(step)
        self._apply(
            versions,
            trust=config.trust,
            kl_clip=config.at("kl_clip", step),
            loss_scale=loss_scale,
        )
        self._order.precondition()
        self._raw += sum(version is None for version in versions)
        self._step = step + 1
        self._arm()

    def capture_from(self, sampled_loss: Tensor) -> None:
        """Take this step's curvature from a loss against targets the model drew.

        For `fisher="monte_carlo"`: call it once for each forward, right before the
        backward of the training loss. It runs a second backward in steps that capture a
        snapshot, and nothing in others; gradients of parameters are not touched.

        Example:
            ```python
            logits = model(x)
            drawn = torch.distributions.Categorical(logits=logits.detach()).sample()
            pre.capture_from(cross_entropy(logits, drawn))
            cross_entropy(logits, y).backward()
            ```

        Args:
            sampled_loss: A scalar, reduced over the batch as the training loss is
                (and divided by `accumulation_steps` as that is).

        Raises:
            ConfigurationError: If `fisher` is `"empirical"`, or the model is one of
                `DistributedDataParallel(static_graph=True)`.
        """
        if self.config.fisher != "monte_carlo":
            raise ConfigurationError(
                "capture_from needs fisher='monte_carlo'; with 'empirical' the rows "
                "come from the training loss."
            )
        if self._step != self._next_capture:
            return
        if self._step == 0 and self._world.size > 1:
            check_not_static(sampled_loss)
        self._sampled = True
        weights = [one.weight for one in self._layers if one.weight.requires_grad]
        with self._capture.sampling(), self._rows.sampling():
            torch.autograd.grad(
                self._loss_scale.scaled(sampled_loss),
                weights,
                retain_graph=True,
                allow_unused=True,
            )

    @property
    def wants_losses(self) -> bool:
        """Whether adaptive damping asks for `observe_losses` after this step."""
        damping, step = self.config.damping, self._step - 1
        if not isinstance(damping, LevenbergMarquardt) or step < 0:
            return False
        versions = self._due.at(step)
        used = (versions[index] for index in self._apply.taking_part)
        return damping.wants(step, oldest_step(used))

    def observe_losses(self, before: float | Tensor, after: float | Tensor) -> None:
        """Show adaptive damping what a step did to the loss of its own batch.

        With several ranks each shows its own losses, and their mean counts.

        Example:
            ```python
            pre.step()
            optimizer.step()
            if pre.wants_losses:
                with torch.no_grad():
                    pre.observe_losses(loss, loss_fn(model(x), y))
            ```

        Args:
            before: The loss of the batch before `optimizer.step()`.
            after: The loss of the same batch after it.

        Raises:
            ConfigurationError: If `damping` is not adaptive, or before the first step.
        """
        damping, prediction = self.config.damping, self._apply.prediction
        if not isinstance(damping, LevenbergMarquardt) or prediction is None:
            raise ConfigurationError(
                "observe_losses needs damping=LevenbergMarquardt() and a step."
            )
        decrease = self._world.mean(difference(before, after))
        decrease = decrease if math.isfinite(decrease) else -math.inf
        damping.observe(
            self._step - 1, decrease=decrease, predicted=prediction.decrease
        )

    def report(self) -> dict[str, Any]:
        """Describe what happened so far.

        Returns:
            Plain data: `step` (steps done), `rank`, `world_size`, `connected`,
            `failure` (why no server will answer, or None), `layers` (by name: the
            `version` in use, its `age` in steps, the `updates` in its history, its
            `rank` (directions, of activations and derivatives) and `damping_factor`
            (more than 1 where the damping did not do), None if there is none; where it
            is applied), `longest_step_s` (from one `step()` to the next),
            `raw_gradients` (layer-steps without a version),
            `not_finite` (layer-steps whose gradient was not finite), `damping` (of the
            next snapshot), `trust_scale` (ν of the latest step), `waited_s`, `versions`
            (counts by layer and version: `solved`, `superseded`, `failed`, `empty`,
            `refused`, `late`, ...; and of `waits`), `transport` (counts of connects,
            disconnects and bytes), `servers` (by target: whether it is `connected`,
            which none is after `close`, and how many `layers` it has), `server_changes`
            (how often servers came or went), `lookup_failures` (of names; the servers
            stay as they are then).
        """
        prediction = self._apply.prediction
        return {
            "step": self._step,
            "rank": self._world.rank,
            "world_size": self._world.size,
            **describe(self._layers, self._store, self._rows, self._step - 1),
            "longest_step_s": self._pace.longest_s,
            "raw_gradients": self._raw,
            "not_finite": self._apply.not_finite,
            "damping": self.config.at("damping", self._step),
            "trust_scale": None if prediction is None else float(prediction.scale),
            "transport": dict(self._servers.counts()),
            **self._servers.describe(),
        }

    def state_dict(self) -> dict[str, Any]:
        """Copy everything that the next steps depend on.

        Versions on their way are waited for, up to `wait_s`, so that a run that is
        resumed takes the very same steps. The server's history is fetched, too.

        Returns:
            Nested dicts of numbers, strings and tensors.
        """
        wait_s = self.config.at("wait_s", self._step)
        versions = self._store.settle(wait_s)
        kept = self.config.history != "snapshot"
        history = self._servers.export_state(wait_s) if kept else None
        names = [layer.name for layer in self._layers]
        state = to_state_dict(self._step, names, versions, history)
        state["next_capture"] = self._next_capture
        state["gradient_space"] = [names[index] for index in sorted(self._rows.left)]
        if isinstance(self.config.damping, LevenbergMarquardt):
            state["damping"] = self.config.damping.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was called, before the first `step`.

        Raises:
            ConfigurationError: If the state is of another format or model, or steps
                have been taken already.
        """
        if self._step:
            raise ConfigurationError(
                f"A state is loaded before the first step, not after {self._step}."
            )
        names = [layer.name for layer in self._layers]
        self._step, versions, history = from_state_dict(state, names)
        self._store.restore(versions)
        self._next_capture = state["next_capture"]
        self._rows.leave(map(names.index, state.get("gradient_space", ())))
        if isinstance(self.config.damping, LevenbergMarquardt) and "damping" in state:
            self.config.damping.load_state_dict(state["damping"])
        self._meet()
        if self.config.history != "snapshot":
            self._import(history)
        self._arm()

    def close(self) -> None:
        """Leave the session, remove the hooks and end all threads; idempotent."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        for part in (self._order, self._capture, self._rows, self._servers):
            part.close()

    def _meet(self) -> None:
        check_joined(self._world)
        check_steps(self._world, self._step, self._next_capture)
        self._met = True

    def _import(self, history: SessionState | None) -> None:
        # One rank, before any of them pushes. All decide, whoever has a history.
        wait_s = self.config.at("wait_s", self._step)
        first = self._world.rank == 0
        mine = history if first else None
        done = mine is None or self._servers.import_state(mine, wait_s)
        if not self._world.agree([done])[0] and first:
            logger.warning("The server did not take the saved history: it starts anew.")

    def _provide(
        self, index: int, device: torch.device, dtype: torch.dtype
    ) -> LayerPreconditioner | None:
        with phase("wait"):
            versions = self._due.in_backward(self._step)
        return self._ready.get(index, versions, device, dtype)

    def _push_snapshot(self, step: int) -> None:
        if self.config.fisher == "monte_carlo" and not self._sampled:
            raise ConfigurationError(
                f"fisher='monte_carlo' takes the derivatives of step {step} from "
                "capture_from(sampled_loss), which was not called."
            )
        self._newcomers.look()
        with phase("capture"):
            snapshot = self._capture.take(step)
        update_every = int(self.config.at("update_every", step))
        with phase("enqueue"):
            self._servers.push(snapshot)
        self._next_capture = step + update_every
        self._sampled = False

    def _arm(self) -> None:
        due = self._step == self._next_capture
        self._capture.arm(self._step if due else None)
