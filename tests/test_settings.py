"""Settings are checked when they are read, and the error names the setting."""

import pytest
from pydantic import ValidationError

from samphire import Client, InvalidInputError
from samphire_broker.settings import Settings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TRITON_URLS", "http://host:8001"),
        ("TRITON_URLS", "host"),
        ("TRITON_URLS", " , "),
        ("LEASE_S", "0"),
        ("RESULT_TTL_S", "soon"),
        ("MAX_ATTEMPTS", "-1"),
        ("CLAIM_MAX", "5000"),
        ("EVENTS_PER_S", "-5"),
        ("QUEUE_WEIGHTS", '{"digits": 0}'),
    ],
)
def test_bad_values_are_refused_by_name(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    """A wrong environment variable stops the worker at start."""
    monkeypatch.setenv(f"SAMPHIRE_{name}", value)
    with pytest.raises(ValidationError, match=name.lower()):
        Settings()


def test_good_values_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists by comma, objects as JSON."""
    monkeypatch.setenv("SAMPHIRE_TRITON_URLS", "a:1, b:2")
    monkeypatch.setenv("SAMPHIRE_QUEUE_WEIGHTS", '{"digits": 4}')
    settings = Settings()
    assert settings.triton_urls == ("a:1", "b:2")
    assert settings.queue_weights == {"digits": 4}


@pytest.mark.parametrize("url", ["http://host", "host:6379", "redis://host:port/0"])
def test_a_bad_broker_url_is_refused_by_the_client(url: str) -> None:
    """Before anything is sent."""
    with pytest.raises(InvalidInputError, match="expected a broker URL"):
        Client(url)
