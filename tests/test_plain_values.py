"""What is nearly a value of Python's or JSON's own: numpy's scalars as options, kombu's typed JSON as arguments."""

from __future__ import annotations

import enum
import json
import uuid
from datetime import UTC, date, datetime, time
from decimal import Decimal
from typing import Any

import msgspec
import numpy as np
import pytest
from kombu.utils import json as kombu_json

from samphire.client.encoder import Encoder, Limits, request_for
from samphire.errors import InvalidInputError
from samphire.transport.address import Address
from samphire.transport.clock import BrokerClock
from samphire.transport.direct import DirectConnection
from samphire.wire.contract import InferRequest
from samphire.wire.tensors import array_to_bytes
from samphire.wire.typed_json import plain_arguments

HALF = "\ud800"


class Name(str, enum.Enum):  # noqa: UP042 - as applications have them
    IDENTITY = "identity"


class Number(enum.IntEnum):
    FIVE = 5


def sent(request: InferRequest) -> dict[str, Any]:
    """As it stands in the message."""
    encode = Encoder(
        request, 3, "events:c", Limits(8192, 2**20), BrokerClock(DirectConnection(Address.parse("redis://localhost")))
    )
    message = encode({np.str_("x"): np.ones(1, np.float32)}).message
    return dict(json.loads(json.loads(message)["body"])[1])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (np.float64(0.5), 0.5),
        (np.float32(0.5), 0.5),
        (np.int64(5), 5),
        (np.bool_(True), True),
        (np.str_("a"), "a"),
        (Number.FIVE, 5),
        (Name.IDENTITY, "identity"),
        (True, True),
    ],
)
def test_parameters_of_other_kinds_of_scalars(given: Any, expected: Any) -> None:
    """They arrive as what they are in Python."""
    found = sent(request_for("m", "champion", (), {"t": given}, ""))["parameters"]["t"]
    assert found == expected and type(found) is type(expected)


def test_names_of_other_kinds_of_text() -> None:
    """numpy's and those of enumerations."""
    request = request_for(Name.IDENTITY, np.int64(2), [np.str_("y")], {np.str_("t"): 1}, "", max_attempts=Number.FIVE)
    found = sent(request)
    assert found["model_name"] == "identity" and found["model_version"] == "2"
    assert found["inputs"][0]["name"] == "x" and found["outputs"] == [{"name": "y"}]
    assert found["parameters"] == {"t": 1} and found["max_attempts"] == 5


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float64("nan"), None, [1], b"a", HALF, 1j])
def test_a_parameter_that_cannot_be_sent_is_refused_by_name(value: Any) -> None:
    """Before anything is queued."""
    with pytest.raises(InvalidInputError, match="parameter 't'"):
        request_for("m", "champion", (), {"t": value}, "")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"model": HALF}, "model"),
        ({"model": b"m"}, "model"),
        ({"outputs": [HALF]}, "output"),
        ({"outputs": [1]}, "output"),
        ({"parameters": {HALF: 1}}, "parameter"),
        ({"parameters": {1: 1}}, "parameter"),
    ],
)
def test_names_that_are_no_text(options: dict[str, Any], named: str) -> None:
    """They are refused with what they were meant for."""
    with pytest.raises(InvalidInputError, match=named):
        request_for(**{"model": "m", "version": "champion", "outputs": (), "parameters": None, "tenant": "", **options})


class Torch:
    """A tensor as torch has it while it records gradients."""

    def __array__(self, *_args: Any, **_kwargs: Any) -> Any:
        raise RuntimeError("Can't call numpy() on Tensor that requires grad. Use tensor.detach().numpy() instead.")


@pytest.mark.parametrize("value", [[HALF], np.array([HALF], object), Torch()])
def test_inputs_that_cannot_be_sent_are_refused_by_name(value: Any) -> None:
    """Whatever numpy, torch or UTF-8 say of them."""
    with pytest.raises(InvalidInputError, match="'x'"):
        array_to_bytes("x", value)


def test_what_kombu_marks_is_made_plain() -> None:
    """Arguments only: the canvas is sent on as it is."""
    moment, number = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), uuid.UUID(int=5)
    kwargs = {"a": [b"hi", {"b": Decimal("1.5")}], "c": number, "d": moment, "e": date(2026, 1, 2), "f": time(3, 4)}
    embed = {"chain": [{"kwargs": {"x": b"hi"}}]}
    body = kombu_json.dumps([[b"first"], kwargs, embed])
    for given in (body, body.encode()):
        args, found, canvas = msgspec.json.decode(plain_arguments(given))
        assert args == ["first"]
        expected = {"a": ["hi", {"b": 1.5}], "c": number.hex, "d": moment.isoformat(), "e": "2026-01-02"}
        assert found == {**expected, "f": "03:04:00"}
        assert kombu_json.loads(json.dumps(canvas)) == embed


@pytest.mark.parametrize("kwargs", [{"a": b"\xff"}, {"a": {"__type__": "mine", "__value__": 1}}])
def test_what_cannot_be_made_plain_is_refused(kwargs: dict[str, Any]) -> None:
    """With what to do instead."""
    with pytest.raises(InvalidInputError, match=r"base64\.b64encode|'mine'"):
        plain_arguments(kombu_json.dumps([[], kwargs, {}]))


@pytest.mark.parametrize("body", ['"__type__"', '{"__type__', "[" * 100_000 + '"__type__"', '[1, "__type__"]'])
def test_what_is_no_body_is_left_to_others(body: str) -> None:
    """They say what is wrong with it."""
    assert msgspec.json.encode("__type__").decode() in body or "__type__" in plain_arguments(body)  # type: ignore[operator]
    plain_arguments(body)


def test_a_version_may_be_a_number() -> None:
    """As docs/celery.md says."""
    request = msgspec.json.decode(b'{"model_name": "m", "inputs": [], "model_version": 3}', type=InferRequest)
    assert request.model_version == request.version == "3"
