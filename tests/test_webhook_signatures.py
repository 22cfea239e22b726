"""Signatures of webhooks: checked with the libraries that receivers use, and given whatever a stranger may send."""

from __future__ import annotations

import base64
import json
import math
import subprocess
import sys
from datetime import UTC, datetime
from typing import Any

import openai
import pytest
import standardwebhooks
import svix.webhooks
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hypothesis import given
from hypothesis import strategies as st

from samphire import InvalidInputError, WebhookVerificationError
from samphire.webhooks import verify
from samphire.webhooks.signing import SigningKey, new_key_pair, new_secret, public_key_of, signed_content

NOW = 1_795_840_000
BODY = b'{"type":"task.succeeded","data":{"task_id":"t","sequence":1}}'
SECRETS = [new_secret(), new_secret()]
PRIVATE, PUBLIC = new_key_pair()


def signed(*keys: str, body: bytes = BODY, at: object = NOW, webhook_id: str = "msg_1") -> dict[str, str]:
    content = signed_content(webhook_id, str(at), body)
    return {
        "webhook-id": webhook_id,
        "webhook-timestamp": str(at),
        "webhook-signature": " ".join(SigningKey.parse(key).sign(content) for key in keys),
    }


def test_the_specifications_library_signs_the_same() -> None:
    """With the secret, the id, the time and the body of its own test."""
    secret, webhook_id, at, body = (
        "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
        "msg_p5jXN8AQM9LWM0D4loKWxJek",
        1614265330,
        '{"test": 2432232314}',
    )
    theirs = standardwebhooks.Webhook(secret).sign(webhook_id, datetime.fromtimestamp(at, UTC), body)
    ours = SigningKey.parse(secret).sign(signed_content(webhook_id, str(at), body.encode()))
    assert ours == theirs == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


@pytest.mark.parametrize("secret", SECRETS, ids=["first", "second"])
@pytest.mark.parametrize(
    "keys", [SECRETS, [*SECRETS, PRIVATE], [PRIVATE, *SECRETS]], ids=["v1", "v1a last", "v1a first"]
)
def test_each_library_verifies_with_each_live_secret(secret: str, keys: list[str]) -> None:
    """A second secret, or an ed25519 signature, beside its own does not disturb it."""
    now = int(datetime.now(UTC).timestamp())
    headers = signed(*keys, at=now)
    assert standardwebhooks.Webhook(secret).verify(BODY, headers)
    svix.webhooks.Webhook(secret).verify(BODY, headers)
    client = openai.OpenAI(api_key="none", webhook_secret=secret)
    client.webhooks.verify_signature(BODY, headers)
    assert verify(BODY, headers, secret).data == {"task_id": "t", "sequence": 1}
    with pytest.raises(Exception, match="signature"):
        standardwebhooks.Webhook(new_secret()).verify(BODY, headers)


def test_ed25519_is_over_id_timestamp_and_body() -> None:
    """Checked with the library itself."""
    headers = signed(PRIVATE)
    version, _, signature = headers["webhook-signature"].partition(",")
    key = Ed25519PublicKey.from_public_bytes(base64.b64decode(PUBLIC.removeprefix("whpk_")))
    key.verify(base64.b64decode(signature), f"msg_1.{NOW}.".encode() + BODY)
    assert version == "v1a" and public_key_of(PRIVATE) == PUBLIC
    assert verify(BODY, headers, PUBLIC, now_s=NOW).type == "task.succeeded"
    with pytest.raises(WebhookVerificationError):
        verify(BODY, headers, new_key_pair()[1], now_s=NOW)
    with pytest.raises(WebhookVerificationError):  # a signature of one kind is none of the other
        verify(BODY, headers, SECRETS[0], now_s=NOW)


def test_the_layout_of_the_header() -> None:
    """Some libraries raise at a double space, or one at an end."""
    value = signed(*SECRETS, PRIVATE)["webhook-signature"]
    assert "  " not in value and value == value.strip()
    assert all(entry.count(",") == 1 for entry in value.split(" "))


@pytest.mark.parametrize("off", [-299, 0, 299])
def test_a_timestamp_near_now_is_good(off: int) -> None:
    """On both sides."""
    assert verify(BODY, signed(SECRETS[0], at=NOW + off), SECRETS[0], now_s=NOW).timestamp.timestamp() == NOW + off


@pytest.mark.parametrize(
    "at",
    [
        NOW - 301,
        NOW + 301,
        NOW * 1000,
        "nan",
        "1e9",
        "123.0",
        "-1",
        "+1",
        "",
        " 1",
        "１７９５８４００００",
        "9" * 400,
        "inf",
    ],
)
def test_any_other_timestamp_is_refused(at: object) -> None:
    """Too far away, in ms, or no whole number in plain digits; although it is signed."""
    with pytest.raises(WebhookVerificationError):
        verify(BODY, signed(SECRETS[0], at=at), SECRETS[0], now_s=NOW)


@pytest.mark.parametrize("tolerance", [math.nan, math.inf, -1, None, "300", True])
def test_a_tolerance_that_is_none_is_the_receivers_error(tolerance: Any) -> None:
    """It must not let everything through."""
    with pytest.raises(InvalidInputError, match="tolerance_s"):
        verify(BODY, signed(SECRETS[0]), SECRETS[0], tolerance_s=tolerance, now_s=NOW)


@pytest.mark.parametrize(
    "secrets",
    ["", [], "whsec_", "whsec_!!", "whsec_AAAA", PRIVATE, "whpk_AAAA", [SECRETS[0], 3]],
    ids=["empty", "none", "prefix", "no base64", "short", "private", "short public", "no text"],
)
def test_secrets_that_are_none_are_the_receivers_error(secrets: Any) -> None:
    """And the message shows no secret."""
    with pytest.raises(InvalidInputError) as raised:
        verify(BODY, signed(SECRETS[0]), secrets, now_s=NOW)
    assert PRIVATE.removeprefix("whsk_") not in str(raised.value)


def test_what_was_changed_is_refused() -> None:
    """The body, the id, the time, the signature; and JSON that was read and written again."""
    headers = signed(SECRETS[0])
    for name, other in (("webhook-id", "msg_2"), ("webhook-timestamp", str(NOW + 1)), ("webhook-signature", "v1,AAAA")):
        with pytest.raises(WebhookVerificationError):
            verify(BODY, headers | {name: other}, SECRETS[0], now_s=NOW)
    for body in (BODY + b" ", json.dumps(json.loads(BODY)).encode()):
        with pytest.raises(WebhookVerificationError):
            verify(body, headers, SECRETS[0], now_s=NOW)


def test_headers_come_in_many_forms() -> None:
    """Names in any case, text or bytes, a mapping or pairs; junk before a good signature does not hurt."""
    headers = signed(SECRETS[0])
    junk = "v1 ,, v1,é v1,=== v2,AAAA " + headers["webhook-signature"]
    for given_headers in (
        headers,
        {name.upper(): value for name, value in headers.items()},
        [(name.encode(), value.encode()) for name, value in headers.items()],
        headers | {"webhook-signature": junk, "samphire-watermark": "7"},
    ):
        assert verify(BODY, given_headers, SECRETS[0], now_s=NOW).id == "msg_1"
    assert verify(BODY.decode(), headers | {"samphire-watermark": "7"}, SECRETS, now_s=NOW).watermark == 7


hashable = st.one_of(st.none(), st.integers(), st.text(), st.binary())
anything = st.one_of(hashable, st.lists(st.text()))


@given(
    body=st.one_of(st.binary(), st.text(alphabet=st.characters()), anything),
    headers=st.one_of(
        st.dictionaries(
            st.one_of(st.sampled_from(["webhook-id", "webhook-timestamp", "webhook-signature"]), hashable),
            anything,
        ),
        anything,
    ),
)
def test_garbage_is_one_class_of_error(body: Any, headers: Any) -> None:
    """A receiver answers 400 to it, and never 500."""
    with pytest.raises(WebhookVerificationError):
        verify(body, headers, [SECRETS[0], PUBLIC], now_s=NOW)


@given(signature=st.text(), at=st.one_of(st.just(str(NOW)), st.text()), body=st.binary())
def test_garbage_in_the_right_places_is_one_class_of_error(signature: str, at: str, body: bytes) -> None:
    """Also signed garbage: a body that is no event."""
    with pytest.raises(WebhookVerificationError):
        verify(
            body, {"webhook-id": "m", "webhook-timestamp": at, "webhook-signature": signature}, SECRETS[0], now_s=NOW
        )
    if b'"type"' not in body:
        with pytest.raises(WebhookVerificationError):
            verify(body, signed(SECRETS[0], body=body), SECRETS[0], now_s=NOW)


def test_receivers_need_nothing_but_the_standard_library_for_v1() -> None:
    """The light SDK: neither cryptography nor aiohttp nor yarl is loaded."""
    code = (
        "import sys, samphire.webhooks as w\n"
        f"w.verify({BODY!r}, {signed(SECRETS[0])!r}, {SECRETS[0]!r}, now_s={NOW})\n"
        "assert not {'cryptography.hazmat.primitives', 'aiohttp', 'yarl'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
