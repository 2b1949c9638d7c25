"""What a trainer uses: K-FAC's preconditioned gradient, computed elsewhere."""

import atexit
import logging
import sys
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from skfac.client.apply import Apply
from skfac.client.capture import Capture
from skfac.client.checkpoint import from_state_dict, to_state_dict
from skfac.client.config import WIRE_DTYPES, PreconditionerConfig, check_target
from skfac.client.layers import track_layers
from skfac.client.store import Store
from skfac.client.transport import connect
from skfac.wire.errors import ConfigurationError
from skfac.wire.outcome import Version
from skfac.wire.session import SessionSpec

logger = logging.getLogger(__name__)

_RANK = 0
_WORLD_SIZE = 1


class Preconditioner:
    """Replaces gradients by SKFAC-preconditioned ones, between backward and update.

    Every `update_every` steps it captures the rows of both Kronecker factors of each
    `nn.Linear` and `nn.Conv2d`, sends them to an engine, and from `lag` steps later on
    applies what comes back: `(G + λ_G I)⁻¹ ∇W (A + λ_A I)⁻¹`, inside a trust region.
    Losses are means over the batch, whose first dimension counts the samples.

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
        target: `"embedded"` runs the engine on a thread of this process, `"host:port"`
            or `"unix:/path"` uses a server. One that cannot be reached is tried again
            in the background; training goes on meanwhile.
        settings: The attributes of `PreconditionerConfig`.

    Raises:
        ConfigurationError: If a setting is wrong, the model has no layer to
            precondition, or ranks train together (not built yet).
        ServiceError: If the server refuses this trainer.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        target: str = "embedded",
        **settings: Any,  # noqa: ANN401  # the attributes of PreconditionerConfig
    ) -> None:
        self.config = config = PreconditionerConfig.of(settings)
        target = check_target(target)
        _check_single_rank()
        self._layers = track_layers(model, optimizer, config.skip)
        spec = SessionSpec(
            job=config.job or _made_up_job(),
            instance=uuid.uuid4().hex,
            world_size=_WORLD_SIZE,
            layers=tuple(layer.spec for layer in self._layers),
            damping_split=config.damping_split,
            history=config.history,
            update_every=config.update_every,
            lag=config.lag,
            on_late=config.on_late,
        )
        self._step = 0
        self._captured = -1
        self._raw = 0
        self._closed = False
        self._apply = Apply(self._layers)
        self._store = Store(spec, wait_s=config.wait_s)
        self._transport = connect(target, spec, self._store)
        self._capture = Capture(self._layers, WIRE_DTYPES[config.wire_dtype])
        atexit.register(self.close)
        try:
            if not self._store.await_link(config.wait_s):
                logger.warning(
                    "No server at %s after wait_s = %g s; training begins with raw "
                    "gradients.",
                    target,
                    config.wait_s,
                )
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

        Call it once a step, after `backward()` and before `optimizer.step()`.
        Nothing that happens to a server or the network raises here, unless `on_late`
        says so.

        Raises:
            ConfigurationError: If the preconditioner is closed, or a schedule gives a
                value out of range.
            LateVersionError: Under `on_late="raise"`, if a version is late.
            ServiceError: Under `on_late="wait"` or `"raise"`, if the server refuses
                this trainer.
        """
        if self._closed:
            raise ConfigurationError("This preconditioner is closed.")
        step, config = self._step, self.config
        # A step that raised may be tried again; its rows were taken then.
        if step % config.update_every == 0 and step > self._captured:
            self._push_snapshot(step)
        versions = self._fresh(self._store.versions_at(step))
        self._apply(versions, kl_clip=config.kl_clip_at(step))
        self._raw += versions.count(None)
        self._step = step + 1
        self._capture.armed = self._step % config.update_every == 0

    def report(self) -> dict[str, Any]:
        """Describe what happened so far.

        Returns:
            Plain data: `step` (steps done), `connected`, `failure` (why no server will
            answer, or None), `layers` (by name, the `version` in use and its `age` in
            steps, None if there is none), `raw_gradients` (layer-steps without a
            version), `waited_s`, `versions` (counts by layer and version: `solved`,
            `superseded`, `failed`, `empty`, `refused`, `late`, ...; and of `waits`),
            `transport` (counts of connects, disconnects and bytes).
        """
        in_use = self._store.in_use
        layers = {
            layer.name: {
                "version": version.step if version else None,
                "age": self._step - 1 - version.step if version else None,
            }
            for layer, version in zip(self._layers, in_use, strict=True)
        }
        failure = self._store.failure
        return {
            "step": self._step,
            "connected": self._store.link_up,
            "failure": None if failure is None else str(failure),
            "layers": layers,
            "raw_gradients": self._raw,
            "waited_s": self._store.waited_s,
            "versions": dict(self._store.counts),
            "transport": dict(self._transport.counts()),
        }

    def state_dict(self) -> dict[str, Any]:
        """Copy everything that the next steps depend on.

        Versions on their way are waited for, up to `wait_s`, so that a run that is
        resumed takes the very same steps.

        Returns:
            Nested dicts of numbers, strings and tensors.
        """
        state = self._store.settle(self.config.wait_s)
        return to_state_dict(self._step, [layer.name for layer in self._layers], state)

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
        self._step, versions = from_state_dict(state, names)
        self._store.restore(versions)
        self._capture.armed = self._step % self.config.update_every == 0

    def close(self) -> None:
        """Leave the session, remove the hooks and end all threads; idempotent."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        self._capture.close()
        self._transport.close()

    def _push_snapshot(self, step: int) -> None:
        damping = self.config.damping_at(step)
        snapshot = self._capture.take(_RANK, step, damping)
        self._store.expect(step)
        self._transport.push(snapshot)
        self._captured = step

    def _fresh(self, versions: list[Version | None]) -> list[Version | None]:
        oldest = self._step - self.config.max_staleness
        return [v if v is not None and v.step >= oldest else None for v in versions]


def _check_single_rank() -> None:
    # Each rank would precondition with its own curvature, and replicas diverge.
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        world_size = distributed.get_world_size()
        if world_size > 1:
            raise ConfigurationError(
                f"Training with {world_size} ranks is not built yet; this version of "
                "skfac only serves trainers with one process."
            )


def _made_up_job() -> str:
    return f"{Path(sys.argv[0]).stem or 'python'}-{uuid.uuid4().hex[:8]}"
