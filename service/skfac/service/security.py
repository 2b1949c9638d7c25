"""Whom a server lets in, and how it is known: certificates, access and the guard."""

from collections.abc import Callable
from pathlib import Path

import grpc

from skfac.service.access import Access, Caller
from skfac.service.certificates import ServerCertificates
from skfac.service.config import ServiceConfig
from skfac.service.engine import EngineCalls
from skfac.service.guard import CallersEngine, Guard
from skfac.service.metrics import Metrics
from skfac.service.watch import Watch


class Security:
    """What of it a configuration asks for; follows its files until `close`.

    Attributes:
        interceptors: For the gRPC server.

    Raises:
        ConfigurationError: If a file is no good.
    """

    def __init__(self, config: ServiceConfig, metrics: Metrics) -> None:
        self._metrics = metrics
        self._certificates: ServerCertificates | None = None
        self._access: Access | None = None
        self.interceptors: list[grpc.ServerInterceptor] = []
        looks: list[Callable[[], None]] = []
        if config.tls_certificate:
            self._certificates = ServerCertificates(config, metrics)
            looks.append(self._certificates.refresh)
        if config.access_file:
            self._access = Access(Path(config.access_file), metrics)
            guard = Guard(self._access)
            self.interceptors.append(guard)
            looks.append(guard.refresh)
        self._watch = Watch(looks)

    def bind(self, server: grpc.Server, address: str) -> int:
        """Let a server listen.

        Returns:
            The port.

        Raises:
            RuntimeError: If the address cannot be bound.
        """
        if self._certificates is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, self._certificates.credentials())

    def engine_of(
        self, engine: EngineCalls
    ) -> Callable[[grpc.ServicerContext], EngineCalls]:
        """Show each caller the part of an engine that is its own.

        Returns:
            Gives a call the engine as its caller may use it.
        """
        access = self._access
        if access is None:
            return lambda _: engine
        return lambda call: CallersEngine(
            engine, access, self._metrics, Caller.of(call)
        )

    def close(self) -> None:
        """Follow the files no longer; idempotent."""
        self._watch.close()
