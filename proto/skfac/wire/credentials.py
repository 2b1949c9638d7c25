"""What a caller proves itself with, and how it knows its server."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc

from skfac.wire.addresses import is_local
from skfac.wire.channel import CLIENT_OPTIONS, MAX_FRAME_BYTES
from skfac.wire.errors import ConfigurationError
from skfac.wire.pem import Authorities, KeyPair, read_file, signature

SYSTEM: Final = "system"
"""As `root_ca`: the authorities that gRPC trusts without being told."""

_File = str | Path | None


@dataclass(frozen=True, kw_only=True)
class Credentials:
    """TLS and a token, for servers that ask for them; files are read anew now and then.

    Example:
        ```python
        Credentials(root_ca="ca.pem", token_file="mnist.token")
        ```

    Attributes:
        root_ca: PEM file of the authorities that sign the servers' certificates, or
            `"system"`; None for no TLS.
        certificate: PEM file of the own certificate (and its chain), for mutual TLS.
        key: PEM file of its key.
        token: Proves the right to a job.
        token_file: File that holds the token instead.
        server_name: The name in the servers' certificates, if it is not the host that
            the target names.
        insecure_token: Send the token unencrypted to another machine.

    Raises:
        ConfigurationError: If two of these contradict each other.
    """

    root_ca: _File = None
    certificate: _File = None
    key: _File = None
    token: str | None = field(default=None, repr=False)
    token_file: _File = None
    server_name: str | None = None
    insecure_token: bool = False

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise ConfigurationError("certificate and key belong together: give both.")
        if self.root_ca is None and (self.certificate or self.server_name):
            raise ConfigurationError(
                "certificate and server_name are for TLS: give root_ca, too, a file or "
                f"{SYSTEM!r}."
            )
        if self.token is not None and self.token_file is not None:
            raise ConfigurationError("Give a token or a token_file, not both.")
        if self.token is not None:
            _checked_token(self.token, "The token")

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that are read."""
        own = None if self.root_ca == SYSTEM else self.root_ca
        named = own, self.certificate, self.key, self.token_file
        return tuple(Path(file) for file in named if file is not None)

    def signature(self) -> tuple[object, ...]:
        """Find what changes when a file is replaced.

        Returns:
            A value that compares.
        """
        return signature(self.files)

    def check(self, target: str) -> None:
        """Check that the token may go to a target.

        Raises:
            ConfigurationError: If another machine would get it unencrypted.
        """
        has_token = self.token is not None or self.token_file is not None
        encrypted = self.root_ca is not None or is_local(target)
        if has_token and not (encrypted or self.insecure_token):
            raise ConfigurationError(
                f"The token would be sent to {target} unencrypted: give root_ca, or "
                "set insecure_token."
            )

    def read_tls(self) -> grpc.ChannelCredentials | None:
        """Read what TLS needs.

        Returns:
            It; None without TLS.

        Raises:
            ConfigurationError: If a file is not good.
        """
        if self.root_ca is None:
            return None
        roots = pair = None
        if self.root_ca != SYSTEM:
            roots = Authorities.read(Path(self.root_ca)).pem
        if self.certificate is not None and self.key is not None:
            pair = KeyPair.read(Path(self.certificate), Path(self.key))
        key, chain = (None, None) if pair is None else (pair.key, pair.chain)
        return grpc.ssl_channel_credentials(roots, key, chain)

    def read_token(self) -> str | None:
        """Read the token.

        Returns:
            It, if there is one.

        Raises:
            ConfigurationError: If its file holds none.
        """
        if self.token_file is None:
            return self.token
        text = read_file(Path(self.token_file)).decode("ascii", "replace").strip()
        return _checked_token(text, f"The token in {self.token_file}")


def open_channel(
    target: str,
    credentials: Credentials | None,
    *,
    receive_bytes: int = MAX_FRAME_BYTES,
) -> grpc.Channel:
    """Make a channel to a server, with the files as they are now.

    Args:
        target: `host:port` or `unix:path`.
        credentials: Of the caller; None for none.
        receive_bytes: What an answer may have at most.

    Returns:
        The channel; close it.

    Raises:
        ConfigurationError: If a file is not good, or another machine would get the
            token unencrypted.
    """
    limit = {"grpc.max_receive_message_length": receive_bytes}
    options: list[tuple[str, Any]] = [*(dict(CLIENT_OPTIONS) | limit).items()]
    if credentials is None:
        return grpc.insecure_channel(target, options)
    credentials.check(target)
    tls, token = credentials.read_tls(), credentials.read_token()
    if credentials.server_name is not None:
        options.append(("grpc.ssl_target_name_override", credentials.server_name))
    channel = (
        grpc.insecure_channel(target, options)
        if tls is None
        else grpc.secure_channel(target, tls, options)
    )
    if token is None:
        return channel
    return grpc.intercept_channel(channel, _Bearer(token))


def _checked_token(token: str, what: str) -> str:
    # As HTTP allows it; the text itself must never be in a message.
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigurationError(
            f"{what} is empty or has spaces or characters that are not ASCII; `skfac "
            "token` makes good ones."
        )
    return token


class _Details(grpc.ClientCallDetails):
    def __init__(self, details: grpc.ClientCallDetails, token: str) -> None:
        self.method = details.method
        self.timeout = details.timeout
        own = ("authorization", f"Bearer {token}")
        self.metadata = (*(details.metadata or ()), own)
        self.credentials = details.credentials
        self.wait_for_ready = details.wait_for_ready
        self.compression = details.compression


class _Bearer(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    # Not gRPC's call credentials, which refuse loopback and Unix sockets without TLS.

    def __init__(self, token: str) -> None:
        self._token = token

    def _intercept(
        self,
        continuation: Callable[[grpc.ClientCallDetails, Any], Any],
        details: grpc.ClientCallDetails,
        request: Any,  # noqa: ANN401  # a message or an iterator of them
    ) -> Any:  # noqa: ANN401  # the call
        return continuation(_Details(details, self._token), request)

    # The stubs know these as generic functions.
    intercept_unary_unary = _intercept  # type: ignore[assignment]
    intercept_unary_stream = _intercept  # type: ignore[assignment]
    intercept_stream_unary = _intercept  # type: ignore[assignment]
    intercept_stream_stream = _intercept  # type: ignore[assignment]
