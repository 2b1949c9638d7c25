"""Who may have which jobs: a list in a file, which is read anew when it changes."""

import hashlib
import hmac
import logging
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import grpc

from skfac.wire.errors import (
    AuthenticationError,
    ConfigurationError,
    PermissionDeniedError,
)
from skfac.wire.pem import read_file, signature

if TYPE_CHECKING:
    from skfac.service.metrics import Metrics  # which needs torch

logger = logging.getLogger(__name__)

_TOKEN: Final = re.compile(r"sha256:([0-9a-f]{64})")
_CERTIFICATE: Final = re.compile(r"certificate:(.+)")
_BEARER: Final = re.compile(r"bearer +(\S+)", re.IGNORECASE)


@dataclass(frozen=True)
class Caller:
    """What a call proves about who makes it.

    Attributes:
        digest: SHA-256 of its token, if it has one.
        names: The common name and the alternative names of its certificate, which
            gRPC has checked.
    """

    digest: bytes | None = None
    names: tuple[str, ...] = ()

    @classmethod
    def of(cls, context: grpc.ServicerContext) -> "Caller":
        """Find who makes a call.

        Returns:
            The caller; of several tokens none counts.
        """
        known: Any = context.auth_context()  # lists of bytes, whatever the stubs say
        keys = "x509_common_name", "x509_subject_alternative_name"
        names = (
            name.decode(errors="replace") for k in keys for name in known.get(k, ())
        )
        metadata = context.invocation_metadata()
        sent = [str(value) for key, value in metadata if key == "authorization"]
        bearer = _BEARER.fullmatch(sent[0]) if len(sent) == 1 else None
        digest = None if bearer is None else hash_token(bearer[1])
        return cls(digest, tuple(names))


@dataclass(frozen=True)
class Rule:
    """One line of the list.

    Attributes:
        jobs: Pattern (as in `fnmatch`) of names of jobs.
        digest: SHA-256 of the token that gives them; or
        names: pattern of a name in the certificate that does.
    """

    jobs: str
    digest: bytes | None = None
    names: str = ""

    def is_met_by(self, caller: Caller) -> bool:
        """Compare with a caller, in a time that tells nothing about digests.

        Returns:
            Whether the caller may have the jobs.
        """
        if self.digest is None:
            return any(fnmatchcase(name, self.names) for name in caller.names)
        return hmac.compare_digest(self.digest, caller.digest or b"")


class Access:
    """Decides whose calls are taken, and for which jobs.

    Args:
        file: The list.
        metrics: Count what is refused.

    Raises:
        ConfigurationError: If the list is no good to begin with. Later on such a list
            changes nothing, which is logged and counted.
    """

    def __init__(self, file: Path, metrics: "Metrics") -> None:
        self._file = file
        self._metrics = metrics
        self._lock = threading.Lock()
        self._signature = signature([file])
        self._failed: object = None  # the signature of a list that is no good
        self._rules = read_rules(file)

    def check(self, caller: Caller) -> None:
        """Check that a caller may have any job.

        Raises:
            AuthenticationError: If not.
        """
        if self._patterns(caller):
            return
        if caller.digest is not None:
            reason, text = "unknown_token", "The token is not known to this server"
        elif caller.names:
            reason, text = "unknown_certificate", "The certificate's name is not known"
        else:
            reason, text = "no_credentials", "This server wants a token"
        self._metrics.denied.labels(reason).inc()
        raise AuthenticationError(f"{text}; its operator gives access to jobs.")

    def check_job(self, caller: Caller, job: str) -> None:
        """Check that a caller may have a job, whether there is such a job or not.

        Raises:
            AuthenticationError: If the caller may have none.
            PermissionDeniedError: If it may have others only.
        """
        self.check(caller)
        if not self.may(caller, job):
            self._metrics.denied.labels("other_job").inc()
            raise PermissionDeniedError(
                f"These credentials are not good for job {job!r}; the server's "
                "operator gives access to jobs."
            )

    def may(self, caller: Caller, job: str) -> bool:
        """Decide on a job.

        Returns:
            Whether the caller may have it.
        """
        return any(fnmatchcase(job, jobs) for jobs in self._patterns(caller))

    def refresh(self, on_change: Callable[[Callable[[Caller], bool]], None]) -> None:
        """Look at the list, and read it if it has changed, until that succeeds.

        Args:
            on_change: Is told so, and how to find the callers whose access is another.
        """
        with self._lock:
            found = signature([self._file])
            if found == self._signature:
                return
            before = self._rules
            try:
                self._rules = read_rules(self._file)
            except ConfigurationError as error:
                if found != self._failed:  # it is tried again, and said once
                    self._failed = found
                    self._metrics.reload_failures.labels("access").inc()
                    logger.error("%s The old list stays in use.", error)
                return
            self._signature, self._failed = found, None
            logger.info("%d rules of access are read anew.", len(self._rules))
        on_change(lambda c: _patterns(before, c) != self._patterns(c))

    def _patterns(self, caller: Caller) -> frozenset[str]:
        return _patterns(self._rules, caller)


def hash_token(token: str) -> bytes:
    """Find what the list holds of a token.

    Returns:
        32 bytes.
    """
    return hashlib.sha256(token.encode()).digest()


def rule_of_token(jobs: str, token: str) -> str:
    """Write the line that gives a token access.

    Returns:
        The line, without its end.
    """
    return f"{jobs}  sha256:{hash_token(token).hex()}"


def read_rules(file: Path) -> tuple[Rule, ...]:
    """Read a list: one rule a line, of a pattern of jobs and who may have them.

    Args:
        file: Lines such as `mnist-*  sha256:<64 hexadecimal digits>` or
            `mnist-*  certificate:*.trainers.example`; what follows a `#` is for people.

    Returns:
        The rules.

    Raises:
        ConfigurationError: If the file cannot be read, has a line that is no rule, or
            none that is one.
    """
    rules = []
    lines = read_file(file).decode("utf-8", "replace").splitlines()
    for number, line in enumerate(lines, start=1):
        words = re.sub(r"(^|\s)#.*", "", line).split()
        if words:
            rules.append(_rule(words, f"Line {number} of access_file {file}"))
    if not rules:
        raise ConfigurationError(
            f"access_file {file} has no rule, so that nobody could call: add a line "
            "that `skfac token` prints."
        )
    return tuple(rules)


def _rule(words: list[str], where: str) -> Rule:
    if len(words) == 2:
        jobs, who = words
        if token := _TOKEN.fullmatch(who):
            return Rule(jobs, digest=bytes.fromhex(token[1]))
        if names := _CERTIFICATE.fullmatch(who):
            return Rule(jobs, names=names[1])
    # Not the line itself: it may hold a token.
    raise ConfigurationError(
        f"{where} is no rule. A rule is a pattern of jobs and, after a space, "
        "sha256:<64 hexadecimal digits> or certificate:<pattern of names>; `skfac "
        "token` prints one."
    )


def _patterns(rules: tuple[Rule, ...], caller: Caller) -> frozenset[str]:
    # All rules are looked at, wherever one is met.
    return frozenset([rule.jobs for rule in rules if rule.is_met_by(caller)])
