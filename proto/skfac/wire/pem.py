"""Certificates and keys as files hold them, checked before anybody relies on them."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from skfac.wire.errors import ConfigurationError


@dataclass(frozen=True)
class KeyPair:
    """A private key and the chain of certificates that belongs to it.

    Attributes:
        chain: PEM, the own certificate first.
        key: PEM, not encrypted.
        expires_s: When the first of them expires, in seconds of the Unix epoch.
    """

    chain: bytes
    key: bytes = field(repr=False)
    expires_s: float

    @classmethod
    def read(cls, certificate: Path, key: Path) -> "KeyPair":
        """Read and check both files.

        Returns:
            The pair.

        Raises:
            ConfigurationError: If a file cannot be read or is no PEM, the key is not
                that of the certificate, or a certificate has expired.
        """
        chain, key_pem = read_file(certificate), read_file(key)
        certificates = _certificates(chain, certificate)
        try:
            private = load_pem_private_key(key_pem, password=None)
        except TypeError:
            raise ConfigurationError(
                f"The key {key} is encrypted; give one that is not, and that only its "
                "user can read."
            ) from None
        except (ValueError, UnsupportedAlgorithm):
            raise ConfigurationError(f"{key} holds no private key in PEM.") from None
        if private.public_key() != certificates[0].public_key():
            raise ConfigurationError(
                f"The key {key} is not that of the certificate {certificate}."
            )
        return cls(chain, key_pem, _expiry_s(certificates, certificate))


@dataclass(frozen=True)
class Authorities:
    """Certificates of those who sign the other end's.

    Attributes:
        pem: All of them.
        expires_s: When the last of them expires, in seconds of the Unix epoch.
    """

    pem: bytes
    expires_s: float

    @classmethod
    def read(cls, file: Path) -> "Authorities":
        """Read and check a file.

        Returns:
            What it holds.

        Raises:
            ConfigurationError: If it cannot be read, is no PEM, or all have expired.
        """
        pem = read_file(file)
        newest = max(_certificates(pem, file), key=lambda c: c.not_valid_after_utc)
        return cls(pem, _expiry_s([newest], file))


def read_file(file: Path) -> bytes:
    """Read a file that a setting names.

    Returns:
        Its bytes.

    Raises:
        ConfigurationError: If it cannot be read.
    """
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"Cannot read {file}: {error.strerror}.") from None


def signature(files: Iterable[Path]) -> tuple[object, ...]:
    """Find what changes when files are replaced or written to.

    Returns:
        A value that compares; files that are not there are part of it.
    """
    return tuple(map(_signature, files))


def _signature(file: Path) -> object:
    try:
        found = file.stat()
    except OSError:
        return None
    times = found.st_mtime_ns, found.st_ctime_ns  # the latter of modes and owners, too
    return found.st_dev, found.st_ino, *times, found.st_size


def _certificates(pem: bytes, file: Path) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError:
        raise ConfigurationError(f"{file} holds no certificate in PEM.") from None


def _expiry_s(certificates: list[x509.Certificate], file: Path) -> float:
    first = min(certificate.not_valid_after_utc for certificate in certificates)
    if first <= datetime.now(UTC):
        raise ConfigurationError(
            f"The certificate {file} expired on {first:%Y-%m-%d %H:%M} UTC; renew it."
        )
    return first.timestamp()
