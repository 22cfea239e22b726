"""Third-party errors in our words: every one of them has a translation."""

from __future__ import annotations

import inspect
import subprocess
import sys

import grpc
import pytest
import redis.exceptions

from samphire import errors
from samphire.transport.address import redact
from samphire.transport.connection import translate
from samphire_workers.triton import errors as triton_errors


def all_errors() -> list[type[errors.SamphireError]]:
    classes = [value for value in vars(errors).values() if inspect.isclass(value)]
    return [value for value in classes if issubclass(value, errors.SamphireError)]


def test_every_error_of_redis_py_is_translated() -> None:
    """Walks redis-py's own tree."""
    classes = [value for value in vars(redis.exceptions).values() if inspect.isclass(value)]
    walked = [value for value in classes if issubclass(value, redis.RedisError)]
    assert len(walked) > 20
    for kind in walked:
        error = kind.__new__(kind)
        Exception.__init__(error, "x")
        assert isinstance(translate(error), errors.SamphireError), kind


def test_losing_the_broker_is_transient() -> None:
    """Whatever layer noticed it."""
    for error in (redis.ConnectionError("x"), redis.TimeoutError("x"), OSError("x"), TimeoutError()):
        assert isinstance(translate(error), errors.BrokerUnavailableError)
        assert translate(error).retryable
    assert isinstance(translate(redis.exceptions.OutOfMemoryError("x")), errors.BrokerMemoryFullError)
    for text in ("READONLY You can't write", "MISCONF disk full", "BUSY a script", "NOREPLICAS x"):
        assert translate(redis.exceptions.ResponseError(text)).retryable


def test_every_grpc_status_is_translated() -> None:
    """Walks gRPC's own list."""
    for code in grpc.StatusCode:
        assert isinstance(triton_errors.translate(code, "x"), errors.SamphireError), code


@pytest.mark.parametrize(
    ("code", "details", "expected"),
    [
        (grpc.StatusCode.UNAVAILABLE, "Request timeout expired", errors.EndpointTimeoutError),
        (grpc.StatusCode.UNAVAILABLE, "[request id: 7] Request timeout expired", errors.EndpointTimeoutError),
        (grpc.StatusCode.UNAVAILABLE, "Exceeds maximum queue size", errors.QueueFullError),
        (
            grpc.StatusCode.UNAVAILABLE,
            "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:1: Connection refused",
            errors.EndpointUnavailableError,
        ),
        (grpc.StatusCode.UNAVAILABLE, "recvmsg:Connection reset by peer", triton_errors.EndpointDiedError),
        (grpc.StatusCode.UNAVAILABLE, "Socket closed", triton_errors.EndpointDiedError),
        (grpc.StatusCode.INTERNAL, "Received RST_STREAM with error code 2", triton_errors.EndpointDiedError),
        (grpc.StatusCode.UNKNOWN, "Stream removed", triton_errors.EndpointDiedError),
        (grpc.StatusCode.INTERNAL, "Stub process 'x_0_0' is not healthy.", triton_errors.StubDiedError),
        (grpc.StatusCode.NOT_FOUND, "Request for unknown model: 'x' is not found", errors.UnknownModelError),
        (grpc.StatusCode.CANCELLED, "CANCELLED", errors.EndpointUnavailableError),
        # What a model says in its own words is the model's.
        (grpc.StatusCode.INTERNAL, "the service 'x' is not healthy", errors.ModelFaultError),
        (grpc.StatusCode.INTERNAL, "message: Stub process 'x_0_0' is not healthy.\n\nAt: x", errors.ModelFaultError),
        (grpc.StatusCode.INTERNAL, "OSError: [Errno 104] Connection reset by peer", errors.ModelFaultError),
        (grpc.StatusCode.INTERNAL, "Connection reset by peer", errors.ModelFaultError),
        (grpc.StatusCode.INTERNAL, "the Socket closed", errors.ModelFaultError),
        (grpc.StatusCode.UNAVAILABLE, "my timeout expired", triton_errors.UnclearUnavailableError),
        (grpc.StatusCode.UNAVAILABLE, "[Errno 104] Connection reset by peer", triton_errors.UnclearUnavailableError),
        (grpc.StatusCode.CANCELLED, "I have given up", triton_errors.UnclearUnavailableError),
        (grpc.StatusCode.NOT_FOUND, "no such word", errors.ModelFaultError),
        (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "Stream removed (received metadata size exceeds hard limit (value length 20000 vs. 16384))",
            errors.ModelFaultError,
        ),
        (grpc.StatusCode.INTERNAL, "division by zero", errors.ModelFaultError),
        (grpc.StatusCode.INVALID_ARGUMENT, "wrong shape", errors.InvalidInputError),
    ],
)
def test_tritons_messages_decide_where_its_status_does_not(
    code: grpc.StatusCode, details: str, expected: type[errors.SamphireError]
) -> None:
    """UNAVAILABLE and INTERNAL mean several things."""
    assert type(triton_errors.translate(code, details)) is expected


def test_errors_come_back_by_name_with_their_message() -> None:
    """What a worker stored is what a client raises; foreign names become model faults."""
    for kind in all_errors():
        again = errors.error_from_name(kind.__name__, "what happened")
        assert type(again) is kind
        assert str(again) == "what happened"
    assert str(errors.error_from_name("KeyError", "'x'")) == "KeyError: 'x'"


def test_every_error_is_drawn_in_the_tree_and_has_a_default_message() -> None:
    """The module's docstring is the map."""
    for kind in all_errors():
        assert kind.__name__ in (errors.__doc__ or "")
        assert str(kind()) == kind.default_message == (kind.__doc__ or "").splitlines()[0]


def test_default_messages_are_there_without_docstrings() -> None:
    """`python -OO` drops them."""
    command = [sys.executable, "-OO", "-c", "import samphire; print(samphire.ClientClosedError())"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "The client is closed.\n"


def test_passwords_are_not_shown() -> None:
    """Neither in messages nor in representations."""
    assert redact("redis://user:secret@host:1/0") == "redis://user:***@host:1/0"
    assert redact("redis://host:1/0") == "redis://host:1/0"
