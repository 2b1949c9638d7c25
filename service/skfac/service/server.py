"""A running server: engine, gRPC front, health, reflection and HTTP side."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from skfac.service.config import ServiceConfig
from skfac.service.deadlines import Deadlines
from skfac.service.local_engine import LocalEngine
from skfac.service.metrics import Metrics
from skfac.service.regions import Regions
from skfac.service.security import Security
from skfac.service.servicer import PreconditioningServicer
from skfac.service.state_volume import StateVolume
from skfac.service.status_page import StatusPage
from skfac.service.threads import CallThreads
from skfac.service.web import WebServer
from skfac.v1 import preconditioning_pb2 as pb
from skfac.wire.addresses import why_not_bound, why_taken
from skfac.wire.channel import SERVER_OPTIONS, SERVICE
from skfac.wire.errors import SessionNotFoundError
from skfac.wire.shared_memory import MAX_SNAPSHOTS
from skfac.wire.state import SessionState

logger = logging.getLogger(__name__)

_CONTROL_THREADS = 16  # that bulk streams cannot take
_PROBE_S = 2.0  # that a probe may let its thread wait: anybody may call there
_LAST_WORDS_S = 1.0  # that outcomes get to be sent, however long solving took
_HEALTH_NAMES = ("", "live", "ready", SERVICE)


class _Health(health.HealthServicer):
    def Watch(self, request, context, send_response_callback=None):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202, N802
        # It would keep a thread, and each name that anybody asks for, for ever.
        context.abort(grpc.StatusCode.UNIMPLEMENTED, "Use Check.")


class Server:
    """Serves from construction until `close`, which is graceful and idempotent.

    Attributes:
        address: Where gRPC listens, with the real port.
        metrics_address: Where Prometheus finds the metrics, and a browser the status
            page; empty if nowhere.
        health_address: Where probes without TLS find gRPC's health service; empty if
            nowhere.
        metrics: What it counts.
        unsaved: Sessions whose histories could not be saved by `close`.

    Raises:
        OSError: If an address cannot be bound, or state_dir cannot be used.
        ConfigurationError: If a certificate, key or list of access is no good.
    """

    def __init__(self, config: ServiceConfig) -> None:
        self._config = config
        self.metrics = Metrics(exemplars=config.metrics_exemplars)
        self._closed = False
        self._security = Security(config, self.metrics)
        self.unsaved = 0
        self._volume: StateVolume | None = None
        if config.state_dir:
            path = Path(config.state_dir)
            self._volume = StateVolume(path, config.lease_s, self.metrics)
        self._pool = CallThreads(
            config.max_streams + _CONTROL_THREADS, thread_name_prefix="skfac-rpc"
        )
        self._deadlines, self._probe_deadlines = (
            Deadlines(idle_s, self.metrics.idle_calls)
            for idle_s in (config.idle_s, min(config.idle_s, _PROBE_S))
        )
        self._grpc = grpc.server(
            self._pool,
            options=SERVER_OPTIONS,
            # Credentials first: who has none is not waited for.
            interceptors=[*self._security.interceptors, self._deadlines],
            maximum_concurrent_rpcs=config.max_streams + 4 * _CONTROL_THREADS,
        )
        self.address = self._bind()
        saved = self._volume.claim if self._volume else lambda _: SessionState(())
        self._engine = LocalEngine(config, self.metrics, saved=saved)
        try:
            self._web, self.metrics_address = self._open_web()
        except OSError:
            self._engine.close()
            raise
        servicer = PreconditioningServicer(
            self._security.engine_of(self._engine),
            self.metrics,
            Regions(MAX_SNAPSHOTS * config.max_snapshot_bytes),
            config=config,
        )
        self._grpc.add_generic_rpc_handlers((servicer.handler(),))
        self._health = self._add_health_and_reflection()
        self._probes, self.health_address = self._listen_to_probes()
        self._grpc.start()
        self._set_health(_HEALTH_NAMES, serving=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop: not ready, solve what was accepted, save, end the streams, stop."""
        if self._closed:
            return
        self._closed = True
        ends_s = time.monotonic() + self._config.grace_s
        self._set_health(("", "ready", SERVICE), serving=False)
        if not self._engine.drain(self._config.grace_s):
            logger.warning(
                "Snapshots are left unsolved after grace_s = %g s.",
                self._config.grace_s,
            )
        try:
            if self._volume is not None:
                self._save(self._volume)
        finally:
            self._stop(ends_s)

    def _save(self, volume: StateVolume) -> None:
        states = []
        for session in self._engine.open_sessions:
            try:
                state = self._engine.export_state(session.session_id)
            except SessionNotFoundError:
                continue  # its trainer left just now: the run is over
            except Exception:  # a job must not cost the others
                logger.exception("The histories of job %r are lost.", session.spec.job)
                self.unsaved += 1
                continue
            states.append((session.spec, state))
        self.unsaved += volume.save(states)
        volume.close()

    def _stop(self, ends_s: float) -> None:
        self._engine.close()
        # Streams end by themselves now; this is for those whose client does not read.
        left_s = max(ends_s - time.monotonic(), _LAST_WORDS_S)
        self._grpc.stop(left_s).wait(left_s + _LAST_WORDS_S)
        if self._probes is not None:
            self._probes.stop(None).wait(_LAST_WORDS_S)
        self._pool.shutdown(wait=False)  # nor is anybody waited for whom gRPC left
        for deadlines in (self._deadlines, self._probe_deadlines):
            deadlines.close()
        self._security.close()
        if self._web is not None:
            self._web.close()

    def _bind(self) -> str:
        return _bound("address", self._config.address, self._security.bind, self._grpc)

    def _listen_to_probes(self) -> tuple[grpc.Server | None, str]:
        address = self._config.health_address
        if not address:
            return None, ""
        server = grpc.server(
            CallThreads(_CONTROL_THREADS, thread_name_prefix="skfac-probe"),
            options=SERVER_OPTIONS,
            interceptors=[self._probe_deadlines],
            maximum_concurrent_rpcs=4 * _CONTROL_THREADS,
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        bound = _bound(
            "health_address", address, lambda s, a: s.add_insecure_port(a), server
        )
        server.start()
        return server, bound

    def _open_web(self) -> tuple[WebServer | None, str]:
        address = self._config.metrics_address
        if not address:
            return None, ""
        host, _, port = address.rpartition(":")
        page = StatusPage(self._engine.status) if self._config.status_page else None
        pages = page.pages() if page else {}
        try:
            web = WebServer(host.strip("[]"), int(port), self.metrics.registry, pages)
        except OSError as error:
            raise OSError(
                f"Cannot listen on metrics_address {address!r}: {error.strerror}. "
                "Choose another, or none with an empty one."
            ) from None
        return web, f"{host}:{web.server_port}"

    def _add_health_and_reflection(self) -> health.HealthServicer:
        servicer = _Health(experimental_non_blocking=False)
        health_pb2_grpc.add_HealthServicer_to_server(servicer, self._grpc)
        names = (
            pb.DESCRIPTOR.services_by_name["PreconditioningService"].full_name,
            health.SERVICE_NAME,
            reflection.SERVICE_NAME,
        )
        reflection.enable_server_reflection(names, self._grpc)
        return servicer

    def _set_health(self, names: tuple[str, ...], *, serving: bool) -> None:
        known = health_pb2.HealthCheckResponse
        status = known.SERVING if serving else known.NOT_SERVING
        for name in names:
            self._health.set(name, status)


def _bound(
    name: str,
    address: str,
    bind: Callable[[grpc.Server, str], int],
    server: grpc.Server,
) -> str:
    taken = why_taken(address)
    try:
        port = 0 if taken else bind(server, address)
    except RuntimeError as error:
        taken = why_not_bound(address) or str(error)
    if taken:
        raise OSError(f"Cannot listen on {name} {address!r}: {taken}")
    if address.startswith("unix:"):
        return address
    return f"{address.rpartition(':')[0]}:{port}"
