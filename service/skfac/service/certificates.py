"""What the server proves itself with, read anew when its files change."""

import logging
import threading
from pathlib import Path

import grpc

from skfac.service.config import ServiceConfig
from skfac.service.metrics import Metrics
from skfac.wire.errors import ConfigurationError
from skfac.wire.pem import Authorities, KeyPair, signature

logger = logging.getLogger(__name__)


class ServerCertificates:
    """The server's certificate, its key, and who signs the clients' certificates.

    Connections that exist stay as they are when files change; new ones see the new
    files. Files that are no good change nothing, which is logged and counted.

    Args:
        config: Names the files.
        metrics: Tell when certificates expire.

    Raises:
        ConfigurationError: If a file is no good to begin with.
    """

    def __init__(self, config: ServiceConfig, metrics: Metrics) -> None:
        self._pair = Path(config.tls_certificate), Path(config.tls_key)
        self._client_ca = Path(config.tls_client_ca) if config.tls_client_ca else None
        self._files = [*self._pair, *([self._client_ca] if self._client_ca else [])]
        self._metrics = metrics
        self._lock = threading.Lock()
        self._signature = signature(self._files)
        self._failed: object = None  # the signature of files that are no good
        self._current = self._read()
        self._handed_out = self._current

    def credentials(self) -> grpc.ServerCredentials:
        """Make what gRPC listens with.

        Returns:
            Credentials that follow the files.
        """
        return grpc.dynamic_ssl_server_credentials(
            self._current,
            self._newer,  # type: ignore[arg-type]  # None means as before
            require_client_authentication=self._client_ca is not None,
        )

    def refresh(self) -> None:
        """Look at the files; read them if they have changed, until that succeeds."""
        self._refresh(again=True)

    def _refresh(self, *, again: bool) -> None:
        with self._lock:
            found = signature(self._files)
            if found == self._signature or (found == self._failed and not again):
                return
            try:
                self._current = self._read()
            except ConfigurationError as error:
                if found != self._failed:  # it is tried again, and said once
                    self._failed = found
                    self._metrics.reload_failures.labels("certificate").inc()
                    logger.error("%s The old certificate stays in use.", error)
                return
            self._signature, self._failed = found, None
            logger.info("New connections get the certificate in %s.", self._pair[0])

    def _newer(self) -> grpc.ServerCertificateConfiguration | None:
        # gRPC asks at each handshake: files that are no good are not for each to read.
        self._refresh(again=False)
        if self._current is self._handed_out:
            return None
        self._handed_out = self._current
        return self._current

    def _read(self) -> grpc.ServerCertificateConfiguration:
        pair = KeyPair.read(*self._pair)
        expires_s = {"server": pair.expires_s}
        roots = None
        if self._client_ca is not None:
            authorities = Authorities.read(self._client_ca)
            roots, expires_s["client_ca"] = authorities.pem, authorities.expires_s
        for certificate, when_s in expires_s.items():
            self._metrics.certificate_expiry.labels(certificate).set(when_s)
        return grpc.ssl_server_certificate_configuration(
            [(pair.key, pair.chain)], roots
        )
