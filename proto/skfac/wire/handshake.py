"""Says why no connection came about where gRPC only says that there is none."""

import socket
import ssl

from skfac.wire.credentials import SYSTEM, Credentials

_TIMEOUT_S = 2.0
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def why_unavailable(target: str, credentials: Credentials | None) -> str | None:
    """Shake hands with a server once more, to find what is wrong with TLS.

    Args:
        target: `host:port` or `unix:path`.
        credentials: Those that gRPC had no success with.

    Returns:
        A sentence; None if TLS is not what is wrong.
    """
    tls = credentials is not None and credentials.root_ca is not None
    try:
        with _connected(target) as raw:
            if tls and credentials is not None:
                return _refusal(raw, target, credentials)
            # Without TLS a server answers this, with TLS it hangs up or sends an alert.
            raw.sendall(_PREFACE)
            answer = raw.recv(1)
    except (OSError, ValueError):
        return None
    if answer and answer != b"\x15":  # the beginning of a TLS alert
        return None
    return (
        "The server does not talk to callers without TLS: give credentials a root_ca, "
        "or the command --root-ca."
    )


def _refusal(raw: socket.socket, target: str, credentials: Credentials) -> str | None:
    own = None if credentials.root_ca == SYSTEM else str(credentials.root_ca)
    try:
        context = ssl.create_default_context(cafile=own)
        context.set_alpn_protocols(["h2"])
        if credentials.certificate is not None and credentials.key is not None:
            context.load_cert_chain(credentials.certificate, credentials.key)
        host = credentials.server_name or target.rpartition(":")[0].strip("[]")
        with context.wrap_socket(raw, server_hostname=host) as secured:
            secured.sendall(_PREFACE)
            if secured.recv(1):  # what is wrong with our certificate comes after it
                return None
    except ssl.SSLCertVerificationError as error:
        return f"The server's certificate is not accepted: {error.verify_message}."
    except ssl.SSLError as error:
        reason = (error.reason or "UNKNOWN").replace("_", " ").lower()
        if "wrong version" in reason:
            return "The server does not talk TLS: leave out root_ca."
        return f"The server does not accept this end's certificate: {reason}."
    except ConnectionError:
        pass
    return (
        "The server hung up after the TLS handshake, as one does that wants a "
        "certificate of this end, or another one."
    )


def _connected(target: str) -> socket.socket:
    if target.startswith("unix:"):
        raw = socket.socket(socket.AF_UNIX)
        raw.settimeout(_TIMEOUT_S)
        path = target.removeprefix("unix:")
        try:
            raw.connect(path.removeprefix("//"))
        except OSError:
            raw.close()
            raise
        return raw
    host, _, port = target.rpartition(":")
    return socket.create_connection((host.strip("[]"), int(port)), _TIMEOUT_S)
