"""Errors become statuses and come back as what they were."""

import inspect

import grpc
import pytest

from skfac.wire import errors
from skfac.wire.errors import (
    AuthenticationError,
    InvalidRequestError,
    LimitExceededError,
    PermissionDeniedError,
    ServerUnavailableError,
    ServiceError,
    SessionMismatchError,
    SessionNotFoundError,
    SkfacError,
    code_of,
    error_of,
    status_of,
)

STATUSES = {
    InvalidRequestError: grpc.StatusCode.INVALID_ARGUMENT,
    SessionNotFoundError: grpc.StatusCode.NOT_FOUND,
    SessionMismatchError: grpc.StatusCode.FAILED_PRECONDITION,
    LimitExceededError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    AuthenticationError: grpc.StatusCode.UNAUTHENTICATED,
    PermissionDeniedError: grpc.StatusCode.PERMISSION_DENIED,
    ServerUnavailableError: grpc.StatusCode.UNAVAILABLE,
}
SERVICE_ERRORS = pytest.mark.parametrize("kind", ServiceError.__subclasses__())


def test_every_service_error_has_a_status_of_its_own():
    assert set(ServiceError.__subclasses__()) == set(STATUSES)
    assert all(not kind.__subclasses__() for kind in STATUSES)
    assert len({status_of(kind("")) for kind in STATUSES}) == len(STATUSES)


def test_one_base_class_catches_everything():
    found = [kind for _, kind in inspect.getmembers(errors, inspect.isclass)]

    assert all(issubclass(kind, SkfacError) for kind in found)
    assert len(found) > len(STATUSES)


@SERVICE_ERRORS
def test_the_status_is_what_the_protocol_says(kind):
    assert status_of(kind("")) is STATUSES[kind]
    assert code_of(kind("")) == STATUSES[kind].value[0]


@SERVICE_ERRORS
def test_an_error_comes_back_by_status_and_by_number(kind):
    error = kind("What happened.")

    for code in (status_of(error), code_of(error)):
        again = error_of(code, str(error))
        assert type(again) is kind
        assert str(again) == "What happened."


@pytest.mark.parametrize(
    "status", [s for s in grpc.StatusCode if s not in STATUSES.values()]
)
def test_statuses_of_no_error_mean_that_the_call_was_cut(status):
    for code in (status, status.value[0]):
        error = error_of(code, "What happened.")
        assert type(error) is ServerUnavailableError
        assert str(error) == f"{status.name}: What happened."


@pytest.mark.parametrize("code", [-1, 17, 4096])
def test_unknown_numbers_mean_that_the_call_was_cut(code):
    error = error_of(code, "What happened.")

    assert type(error) is ServerUnavailableError
    assert str(error) == f"code {code}: What happened."
