"""What gRPC and Triton say of a request that failed, in Samphire's words.

A status alone does not tell: UNAVAILABLE is also a queue's time-out and a queue that is full, INTERNAL is also a Python
model's process that died; and a Python model may answer any text, with most statuses. So what gRPC and Triton say
themselves is recognized by its whole form, and everything else counts as the model's own words. docs/errors.md lists
what the real server says.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import grpc

from samphire.errors import (
    EndpointTimeoutError,
    EndpointUnavailableError,
    InvalidInputError,
    ModelFaultError,
    PayloadTooLargeError,
    QueueFullError,
    SamphireError,
    UnknownModelError,
)

_ERRORS: Mapping[grpc.StatusCode, type[SamphireError]] = {
    grpc.StatusCode.OK: ModelFaultError,
    grpc.StatusCode.CANCELLED: EndpointUnavailableError,
    grpc.StatusCode.UNKNOWN: ModelFaultError,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidInputError,
    grpc.StatusCode.DEADLINE_EXCEEDED: EndpointTimeoutError,
    grpc.StatusCode.NOT_FOUND: ModelFaultError,
    grpc.StatusCode.ALREADY_EXISTS: ModelFaultError,
    grpc.StatusCode.PERMISSION_DENIED: EndpointUnavailableError,
    grpc.StatusCode.UNAUTHENTICATED: EndpointUnavailableError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: PayloadTooLargeError,
    grpc.StatusCode.FAILED_PRECONDITION: ModelFaultError,
    grpc.StatusCode.ABORTED: EndpointUnavailableError,
    grpc.StatusCode.UNIMPLEMENTED: InvalidInputError,
    grpc.StatusCode.OUT_OF_RANGE: InvalidInputError,
    grpc.StatusCode.INTERNAL: ModelFaultError,
    grpc.StatusCode.UNAVAILABLE: EndpointUnavailableError,
    grpc.StatusCode.DATA_LOSS: ModelFaultError,
}


class EndpointDiedError(EndpointUnavailableError):
    """The connection broke under the request: the endpoint has died, perhaps of it."""


class GivenUpError(EndpointUnavailableError):
    """The worker waits no more for what an endpoint was asked: it may have been carried out there."""


class UnservedError(EndpointUnavailableError):
    """The model was never loaded, and its tasks wait no longer."""

    retryable = False


class StubDiedError(EndpointUnavailableError):
    """The process of a Python model has died; the model says that it is ready, and never answers again."""


class StalledError(EndpointTimeoutError):
    """A model that streams has given out nothing for too long."""


class UnclearUnavailableError(EndpointUnavailableError):
    """The status says that the endpoint is away, the text is not gRPC's or Triton's: a proxy's, or the model's own.

    Whether the endpoint and the model are ready tells which.
    """


_REQUEST = r"(?:\[request id: [^\]]*\] )?"  # newer Tritons begin with it
_PEER = r"(?:(?:recvmsg|sendmsg): ?|(?:ipv4|ipv6|unix):\S+: )?"
_Form = tuple[frozenset[grpc.StatusCode], "re.Pattern[str]", type[SamphireError]]


def _form(codes: str, text: str, kind: type[SamphireError]) -> _Form:
    return frozenset(grpc.StatusCode[code] for code in codes.split()), re.compile(text, re.DOTALL), kind


_FORMS: tuple[_Form, ...] = (
    _form("UNAVAILABLE", _REQUEST + "Request timeout expired", EndpointTimeoutError),
    _form("UNAVAILABLE", _REQUEST + "Exceeds maximum queue size", QueueFullError),
    _form("INTERNAL", r"Stub process '[^']+_\d+_\d+' is not healthy\.", StubDiedError),
    _form("NOT_FOUND UNAVAILABLE", "Request for unknown model: .*", UnknownModelError),
    # A message of the model's that is larger than the largest that gRPC is told to take.
    _form("RESOURCE_EXHAUSTED", r"(?:Stream removed \()?received metadata size exceeds .*", ModelFaultError),
    _form("UNAVAILABLE INTERNAL UNKNOWN", r"Received RST_STREAM with error code \d+.*", EndpointDiedError),
    _form("UNAVAILABLE INTERNAL UNKNOWN", r"Stream removed(?: \(.*\))?", EndpointDiedError),
    _form("UNAVAILABLE", _PEER + "(?:Connection reset(?: by peer)?|Broken pipe|Socket closed)", EndpointDiedError),
    _form("UNAVAILABLE", r"(?:failed to connect|connections? to) .*", EndpointUnavailableError),
    _form("UNAVAILABLE", r"(?:Connect|DNS|Domain name|Name or service|GOAWAY|keepalive) .*", EndpointUnavailableError),
    _form("UNAVAILABLE", "(?:empty address list|Cancelling all calls|Channel is closed).*", EndpointUnavailableError),
    _form("UNAVAILABLE", _REQUEST + "Server (?:is )?(?:stopping|exiting|not ready).*", EndpointUnavailableError),
    _form("CANCELLED", "(?:|CANCELLED|Channel closed!?|Locally cancelled by application!?)", EndpointUnavailableError),
)
_UNCLEAR = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.ABORTED)


def translate(code: grpc.StatusCode, details: str, retry_after_s: float | None = None) -> SamphireError:
    """Return the Samphire error for a gRPC status and its text."""
    for codes, text, known in _FORMS:
        if code in codes and text.fullmatch(details):
            return known(details or code.name, retry_after_s=retry_after_s)
    kind: type[SamphireError] = UnclearUnavailableError if code in _UNCLEAR and details else _ERRORS[code]
    return kind(details or code.name, retry_after_s=retry_after_s)


def translate_text(text: str) -> SamphireError:
    """Return the Samphire error for the text of an error that stands in a stream, where no status goes with it."""
    for _, form, known in _FORMS:
        if form.fullmatch(text):
            return known(text)
    return ModelFaultError(text)
