"""A running server: engine, gRPC front, health, reflection and metrics endpoint."""

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self
from wsgiref.simple_server import WSGIServer

import grpc
import prometheus_client
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from skfac.service.config import ServiceConfig
from skfac.service.local_engine import LocalEngine
from skfac.service.metrics import Metrics
from skfac.service.regions import Regions
from skfac.service.servicer import PreconditioningServicer
from skfac.v1 import preconditioning_pb2 as pb
from skfac.wire.channel import SERVER_OPTIONS, SERVICE
from skfac.wire.shared_memory import MAX_SNAPSHOTS

logger = logging.getLogger(__name__)

_CONTROL_THREADS = 16  # that bulk streams cannot take
_HEALTH_NAMES = ("", "live", "ready", SERVICE)


class Server:
    """Serves from construction until `close`, which is graceful and idempotent.

    Attributes:
        address: Where gRPC listens, with the real port.
        metrics_address: Where Prometheus finds the metrics; empty if nowhere.

    Raises:
        OSError: If an address cannot be bound.
    """

    def __init__(self, config: ServiceConfig) -> None:
        self._config = config
        self._metrics = Metrics()
        self._closed = False
        self._pool = ThreadPoolExecutor(
            config.max_streams + _CONTROL_THREADS, thread_name_prefix="skfac-rpc"
        )
        self._grpc = grpc.server(
            self._pool,
            options=SERVER_OPTIONS,
            maximum_concurrent_rpcs=config.max_streams + 4 * _CONTROL_THREADS,
        )
        self.address = self._bind()
        self._exporter, self.metrics_address = self._export()
        self._engine = LocalEngine(config, self._metrics)
        servicer = PreconditioningServicer(
            self._engine,
            self._metrics,
            Regions(MAX_SNAPSHOTS * config.max_snapshot_bytes),
            max_streams=config.max_streams,
            pinned=config.device.startswith("cuda"),
        )
        self._grpc.add_generic_rpc_handlers((servicer.handler(),))
        self._health = self._add_health_and_reflection()
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
        """Stop: not ready, solve what was accepted, end the streams, stop."""
        if self._closed:
            return
        self._closed = True
        self._set_health(("", "ready", SERVICE), serving=False)
        if not self._engine.drain(self._config.grace_s):
            logger.warning(
                "Snapshots are left unsolved after grace_s = %g s.",
                self._config.grace_s,
            )
        self._engine.close()
        self._grpc.stop(self._config.grace_s).wait()
        self._pool.shutdown()
        if self._exporter is not None:
            server, thread = self._exporter
            server.shutdown()
            server.server_close()
            thread.join()

    def _bind(self) -> str:
        address = self._config.address
        try:
            port = self._grpc.add_insecure_port(address)
        except RuntimeError as error:
            raise OSError(f"Cannot listen on address {address!r}: {error}") from None
        if address.startswith("unix:"):
            return address
        return f"{address.rpartition(':')[0]}:{port}"

    def _export(self) -> tuple[tuple[WSGIServer, threading.Thread] | None, str]:
        address = self._config.metrics_address
        if not address:
            return None, ""
        host, _, port = address.rpartition(":")
        try:
            server, thread = prometheus_client.start_http_server(
                int(port), host.strip("[]"), self._metrics.registry
            )
        except OSError as error:
            raise OSError(
                f"Cannot listen on metrics_address {address!r}: {error.strerror}. "
                "Choose another, or none with an empty one."
            ) from None
        return (server, thread), f"{host}:{server.server_port}"

    def _add_health_and_reflection(self) -> health.HealthServicer:
        servicer = health.HealthServicer()
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
