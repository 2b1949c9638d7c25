"""Certificates and lists of access as tests need them, in files."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import trustme

from skfac.service.access import rule_of_token

LATER = datetime.now(UTC) + timedelta(days=30)
PAST = datetime.now(UTC) - timedelta(days=1)


class Authority:
    """Signs certificates, which it puts into a folder."""

    def __init__(self, folder: Path, name: str = "ca") -> None:
        self._folder = folder
        self._signer = trustme.CA()
        self.file = folder / f"{name}.pem"
        self._signer.cert_pem.write_to_path(str(self.file))

    @property
    def pem(self) -> bytes:
        """Its own certificate."""
        return self._signer.cert_pem.bytes()

    def issue(
        self, name: str, *hosts: str, until: datetime = LATER, into: str = ""
    ) -> tuple[Path, Path]:
        """Make a certificate with a common name, and its key; returns both files."""
        made = self._signer.issue_cert(
            *(hosts or (f"{name}.example",)),
            common_name=name,
            not_before=until - timedelta(days=60),
            not_after=until,
        )
        stem = into or name
        pair = self._folder / f"{stem}.pem", self._folder / f"{stem}.key"
        chain = b"".join(pem.bytes() for pem in made.cert_chain_pems)
        replace(pair[0], chain.decode())
        replace(pair[1], made.private_key_pem.bytes().decode())
        return pair

    def server(self, **settings: object) -> dict[str, str]:
        """The settings of a server on loopback with a certificate."""
        certificate, key = self.issue("server", "127.0.0.1", **settings)  # type: ignore[arg-type]
        files = {"tls_certificate": str(certificate), "tls_key": str(key)}
        return {"address": "127.0.0.1:0", **files}  # where its name is true


def replace(file: Path, text: str) -> None:
    """Write a file at once, as whoever renews one should."""
    new = file.with_suffix(".new")
    new.write_text(text)
    new.replace(file)


def access(file: Path, **tokens: str) -> str:
    """Write a list that gives each job (a pattern) one token."""
    lines = (rule_of_token(jobs.replace("_any", "*"), t) for jobs, t in tokens.items())
    replace(file, "# jobs  token\n" + "\n".join(lines) + "\n")
    return str(file)


@contextmanager
def nobody() -> Iterator[None]:
    """As a user who may read little; tests may run as root."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
