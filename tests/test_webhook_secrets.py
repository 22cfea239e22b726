"""Secrets at rest: encrypted, bound to what they belong to, under keys that can be replaced."""

from __future__ import annotations

import os
import stat
from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from samphire import InvalidInputError
from samphire_broker.webhooks.secrets import SecretBox, SecretUnreadableError


def key() -> str:
    return b64encode(os.urandom(32)).decode()


def test_a_secret_is_read_by_whoever_has_the_key(tmp_path: Path) -> None:
    """And by nobody else, nor as another endpoint's, nor when a bit is changed."""
    setting = key()
    box = SecretBox(setting, tmp_path)
    sealed = box.seal("orders", "whsec_x")
    assert "whsec_x" not in sealed and sealed != box.seal("orders", "whsec_x")
    assert SecretBox(setting, tmp_path).open("orders", sealed) == "whsec_x"
    changed = sealed[:-4] + ("AAA=" if sealed[-4:] != "AAA=" else "BBB=")
    for other, name, text in (
        (SecretBox(key(), tmp_path), "orders", sealed),
        (box, "theirs", sealed),
        (box, "orders", changed),
        (box, "orders", sealed.partition(":")[0] + ":"),
        (box, "orders", sealed.partition(":")[0] + ":!!"),
        (box, "orders", ""),
    ):
        with pytest.raises(SecretUnreadableError) as raised:
            other.open(name, text)
        assert "whsec_x" not in str(raised.value)


def test_keys_are_replaced_one_by_one(tmp_path: Path) -> None:
    """The first encrypts, all decrypt."""
    old, new = key(), key()
    sealed = SecretBox(old, tmp_path).seal("orders", "s")
    both = SecretBox(f"{new}, {old}", tmp_path)
    assert both.open("orders", sealed) == "s"
    again = both.seal("orders", "s")
    assert SecretBox(new, tmp_path).open("orders", again) == "s"
    with pytest.raises(SecretUnreadableError):
        SecretBox(old, tmp_path).open("orders", again)


def test_the_file_is_made_once_and_for_its_owner(tmp_path: Path) -> None:
    """However many need it at once; a worker that was there before finds it."""
    before = SecretBox("", tmp_path)
    assert before.key_ids == ()
    with ThreadPoolExecutor(8) as pool:
        sealed = list(pool.map(lambda _: SecretBox("", tmp_path).seal("orders", "s"), range(50)))
    assert {before.open("orders", one) for one in sealed} == {"s"}
    file = tmp_path / "secret-key"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["secret-key"]


@pytest.mark.parametrize(
    "setting",
    ["x", "AAAA", b64encode(b"x" * 31).decode(), f"{key()},", f"{key()},nonsense"],
    ids=["letter", "short", "31 bytes", "empty second", "second"],
)
def test_a_setting_that_is_no_key_is_refused(setting: str, tmp_path: Path) -> None:
    """By name, with how to make one, and without what was given."""
    with pytest.raises(InvalidInputError, match=r"SAMPHIRE_SECRET_KEY.*openssl rand") as raised:
        SecretBox(setting, tmp_path)
    assert setting == "x" or setting not in str(raised.value)
