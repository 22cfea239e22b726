"""Settings are checked when they are read, and the error names the setting as it was written."""

import subprocess
import sys

import pytest

from samphire import Client, InvalidInputError
from samphire_broker.settings import read_settings
from tests.stacks import ENDS_S, SAMPHIRE, clean_environment

MALFORMED = [
    ("METRICS_PORT", "-1"),
    ("METRICS_PORT", "65536"),
    ("METRICS_PORT", "on"),
    ("METRICS_HOST", "http://host"),
    ("METRICS_HOST", "a b"),
    ("BROKER_URL", "http://host"),
    ("BROKER_URL", "redis://host:port/0"),
    ("BROKER_URL", "redis://host:99999/0"),
    ("TRITON_URLS", "http://host:8001"),
    ("TRITON_URLS", "host"),
    ("TRITON_URLS", " , "),
    ("TRITON_URLS", "host:0"),
    ("TRITON_URLS", "host:70000"),
    ("TRITON_URLS", "a b:8001"),
    ("TRITON_URLS", "host:8001/path"),
    ("TRITON_URLS", "good:8001,bad"),
    ("TRITON_TIMEOUT_S", "0"),
    ("TRITON_TIMEOUT_S", "inf"),
    ("LEASE_S", "0"),
    ("LEASE_S", "nan"),
    ("LEASE_S", "1e300"),
    ("RESULT_TTL_S", "soon"),
    ("RESULT_TTL_S", "1e30"),
    ("DEAD_LETTER_TTL_S", "-1"),
    ("MAX_ATTEMPTS", "-1"),
    ("MAX_ATTEMPTS", "2.5"),
    ("MAX_ATTEMPTS", "1000000"),
    ("BACKOFF_BASE_S", "-0.1"),
    ("BACKOFF_CAP_S", "inf"),
    ("BACKOFF_JITTER", "1.01"),
    ("BACKOFF_JITTER", "-0.1"),
    ("MODEL_RETRIES", '{"digits": {"max_attempts": 0}}'),
    ("MODEL_RETRIES", '{"digits": {"backoff_jitter": 2}}'),
    ("MODEL_RETRIES", '{"digits": {"attempts": 2}}'),
    ("MODEL_RETRIES", '{"digits": 3}'),
    ("MODEL_RETRIES", "{digits"),
    ("SHUTDOWN_TIMEOUT_S", "-1"),
    ("CLAIM_MAX", "5000"),
    ("INFLIGHT_MAX", "0"),
    ("INFLIGHT_MAX_BYTES", "1"),
    ("MAX_MESSAGE_BYTES", "1mb"),
    ("MAX_REQUEST_BYTES", "1"),
    ("INLINE_OUTPUT_BYTES", "-1"),
    ("EVENTS_PER_S", "-5"),
    ("QUEUE_WEIGHTS", '{"digits": 0}'),
    ("QUEUE_WEIGHTS", '{"digits": "many"}'),
    ("QUEUE_WEIGHTS", "[1]"),
    ("QUEUE_WEIGHTS", "digits=2"),
]

COMMANDS = {
    "worker": [sys.executable, "-m", "celery", "-A", "samphire_workers.app", "worker"],
    "up": [SAMPHIRE, "up", "--broker-port", "0"],
    "doctor": [SAMPHIRE, "doctor"],
}


@pytest.mark.parametrize(("name", "value"), MALFORMED)
def test_bad_values_are_refused_by_name(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    """As the variable that the user has set."""
    monkeypatch.setenv(f"SAMPHIRE_{name}", value)
    with pytest.raises(InvalidInputError, match=f"SAMPHIRE_{name}"):
        read_settings()


@pytest.mark.parametrize("command", sorted(COMMANDS))
@pytest.mark.parametrize(
    "wrong",
    [
        {"SAMPHIRE_MAX_ATTEMPTS": "-1", "SAMPHIRE_BACKOFF_JITTER": "1.5"},
        {"SAMPHIRE_QUEUE_WEIGHTS": "digits=2"},
        {"SAMPHIRE_TRITON_URLS": "http://triton:8000", "SAMPHIRE_BROKER_URL": "localhost:6379"},
    ],
    ids=lambda wrong: "+".join(wrong),
)
def test_every_command_refuses_at_start(command: str, wrong: dict[str, str]) -> None:
    """All that is wrong is named, in lines for a person; nothing was started."""
    ended = subprocess.run(
        COMMANDS[command],
        env=clean_environment() | wrong,
        capture_output=True,
        text=True,
        timeout=ENDS_S,
        check=False,
    )
    said = ended.stdout + ended.stderr
    assert ended.returncode not in (0, -1)
    assert "Traceback" not in said
    assert all(name in said for name in wrong), said


@pytest.mark.parametrize("prefix", ["shop:x", "inference.", "celery-task-", "_kombu.", "unacked"])
def test_a_celery_key_prefix_that_is_somebody_elses_is_refused(monkeypatch: pytest.MonkeyPatch, prefix: str) -> None:
    """The namespace's, the queues' of a deployment without one, and Celery's own."""
    monkeypatch.setenv("SAMPHIRE_NAMESPACE", "shop")
    monkeypatch.setenv("SAMPHIRE_CELERY_KEY_PREFIX", prefix)
    with pytest.raises(InvalidInputError, match="SAMPHIRE_CELERY_KEY_PREFIX"):
        read_settings()


def test_good_values_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists by comma, objects as JSON; what is empty is not set."""
    monkeypatch.setenv("SAMPHIRE_TRITON_URLS", "a:1, b_2.example-3:65535,[::1]:8001")
    monkeypatch.setenv("SAMPHIRE_QUEUE_WEIGHTS", '{"digits": 4}')
    monkeypatch.setenv("SAMPHIRE_MODEL_RETRIES", '{"digits": {"max_attempts": 1}}')
    monkeypatch.setenv("SAMPHIRE_BROKER_URL", "rediss://user:secret@[::1]:6380/2")
    monkeypatch.setenv("SAMPHIRE_MAX_ATTEMPTS", "")
    settings = read_settings()
    assert settings.triton_urls == ("a:1", "b_2.example-3:65535", "[::1]:8001")
    assert settings.queue_weights == {"digits": 4}
    assert settings.model_retries["digits"].max_attempts == 1
    assert settings.broker_url.endswith("/2")
    assert settings.max_attempts == 3


@pytest.mark.parametrize("url", ["http://host", "host:6379", "redis://host:port/0"])
def test_a_bad_broker_url_is_refused_by_the_client(url: str) -> None:
    """Before anything is sent."""
    with pytest.raises(InvalidInputError, match="expected a broker URL"):
        Client(url)
