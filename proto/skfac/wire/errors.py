"""Every error this project raises on purpose, and its gRPC status.

SkfacError
├── ConfigurationError        a setting is wrong, or not built yet; fix the program
├── LateVersionError          a version missed its deadline under `on_late="raise"`
└── ServiceError              what a server answers instead of a result
    ├── InvalidRequestError       the caller sent something unusable; do not retry
    ├── SessionNotFoundError      the session is gone; open it again
    ├── SessionMismatchError      this rank disagrees with its session; do not retry
    ├── LimitExceededError        over a limit of the server
    ├── AuthenticationError       the server does not know the caller's credentials
    ├── PermissionDeniedError     they are not good for this job
    └── ServerUnavailableError    no server answers, or it is stopping; retry

Library code raises these; only `status_of` and `error_of` translate them.
"""

import grpc


class SkfacError(Exception):
    """Base class: catch it to handle any failure of this library."""


class ConfigurationError(SkfacError, ValueError):
    """A setting that is out of range, unknown, or not built yet."""


class LateVersionError(SkfacError):
    """A version that did not arrive in time, under `on_late="raise"`."""


class ServiceError(SkfacError):
    """What a server answers instead of a result.

    Attributes:
        layer: Name of the layer at fault, where the server knows that it is a single
            one; else, and at the client, empty.
    """

    def __init__(self, message: str = "", *, layer: str = "") -> None:
        super().__init__(message)
        self.layer = layer


class InvalidRequestError(ServiceError):
    """A request that is wrong whatever the server's state is."""


class SessionNotFoundError(ServiceError):
    """A session that the server does not know, or knows no longer."""


class SessionMismatchError(ServiceError):
    """A rank whose specification, step or state contradicts its session."""


class LimitExceededError(ServiceError):
    """A request over a limit that the server states in the message."""


class AuthenticationError(ServiceError):
    """Credentials that are missing, or that the server does not know."""


class PermissionDeniedError(ServiceError):
    """Credentials that the server knows, for a job that they are not good for."""


class ServerUnavailableError(ServiceError):
    """A server that cannot be reached, or that is stopping."""


_STATUS: dict[type[ServiceError], grpc.StatusCode] = {
    InvalidRequestError: grpc.StatusCode.INVALID_ARGUMENT,
    SessionNotFoundError: grpc.StatusCode.NOT_FOUND,
    SessionMismatchError: grpc.StatusCode.FAILED_PRECONDITION,
    LimitExceededError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    AuthenticationError: grpc.StatusCode.UNAUTHENTICATED,
    PermissionDeniedError: grpc.StatusCode.PERMISSION_DENIED,
    ServerUnavailableError: grpc.StatusCode.UNAVAILABLE,
}
_ERROR = {code: error for error, code in _STATUS.items()}
_BY_NUMBER = {code.value[0]: code for code in grpc.StatusCode}


def status_of(error: ServiceError) -> grpc.StatusCode:
    """Find the status that tells a caller what to do about an error.

    Returns:
        The error's gRPC status.
    """
    return _STATUS[type(error)]


def code_of(error: ServiceError) -> int:
    """Find the number that stands for an error inside a message.

    Returns:
        Its `google.rpc.Code`.
    """
    number: int = status_of(error).value[0]
    return number


def error_of(code: grpc.StatusCode | int, message: str) -> ServiceError:
    """Turn a status back into the error it stands for.

    Args:
        code: A gRPC status or its number. Statuses that no error of ours has, such as
            CANCELLED or INTERNAL, mean that the call was cut: retry.
        message: Text of the new error.

    Returns:
        The error, not raised.
    """
    status = _BY_NUMBER.get(code) if isinstance(code, int) else code
    if status in _ERROR:
        return _ERROR[status](message)
    name = status.name if status is not None else f"code {code}"
    return ServerUnavailableError(f"{name}: {message}")
