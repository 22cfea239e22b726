"""Hostile ids, names and errors: what a terminal and a worker's log show of them."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from samphire import Client
from samphire_broker.shown import shown, shown_lines
from samphire_workers import worker_log
from samphire_workers.worker_log import REPEATED, Escaping, Repeats, filter_log
from tests.stacks import Up, Valkey, eventually, samphire
from tests.support.lane import body
from tests.support.names import KEYS
from tests.support.plain import plain_celery
from tests.workers import running_worker

FORGED = "[2026-01-01 00:00:00,000: CRITICAL/MainProcess] forged"
HOSTILE = "evil\x1b[2J\r\n" + FORGED


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("task 1: é, 模型 and \\n", "task 1: é, 模型 and \\n"),
        ("a\nb\r\t\0", "a\\nb\\r\\t\\x00"),
        ("\x1b[31mred\x9b", "\\x1b[31mred\\x9b"),
        ("\u202egnp.exe \u2028\ud800", "\\u202egnp.exe \\u2028\\ud800"),
        (7, "7"),
    ],
)
def test_what_is_not_printable_is_shown_as_an_escape(text: object, expected: str) -> None:
    """Everything else is as it was."""
    assert shown(text) == expected


def test_a_traceback_keeps_its_lines() -> None:
    """And nothing else of it."""
    assert shown_lines("a\n  b\x1b\r\nc") == "a\n  b\\x1b\\r\nc"


def test_the_commands_show_no_escape_sequences(valkey: Valkey) -> None:
    """For people; JSON has its own escapes."""
    attempt = {"at": "2026-01-01T00:00:00+00:00", "worker": HOSTILE, "error": HOSTILE, "traceback": f"1\n2\n{HOSTILE}"}
    fields = {
        **{"message": HOSTILE, "list": f"inference.{HOSTILE}", "task_id": HOSTILE, "died_at": time.time()},
        **{"model": HOSTILE, "reason": "invalid_input", "error": HOSTILE, "attempts": 1},
        "history": json.dumps([attempt]),
    }
    valkey.client.hset(KEYS.dead_prefix + HOSTILE, mapping=fields)
    valkey.client.zadd(KEYS.dead, {HOSTILE: time.time()})
    valkey.client.lpush(f"inference.{HOSTILE}", "x")
    failure = {"exc_type": "ModelFaultError", "exc_message": [HOSTILE], "exc_module": "samphire.errors"}
    meta = {"status": "FAILURE", "task_id": "t", "result": failure, "traceback": None, "children": []}
    valkey.client.set(KEYS.meta_prefix + "t", json.dumps(meta))
    for arguments in (
        ["dead-letters", "list"],
        ["dead-letters", "show", HOSTILE],
        ["queues"],
        ["result", "t"],
        ["watch", "t"],
        ["result", HOSTILE],
        ["cancel", "--timeout-s", "0.1", HOSTILE],
        ["doctor"],
    ):
        ended = samphire(valkey.url, *arguments)
        told = ended.stdout + ended.stderr
        assert "\x1b" not in told and "\r" not in told, arguments
        assert FORGED not in told.splitlines(), arguments
        if arguments not in (["queues"], ["doctor"]):
            assert "\\x1b[2J\\r\\n[2026" in told, (arguments, told)
    (line,) = samphire(valkey.url, "dead-letters", "list", "--json").stdout.splitlines()
    assert json.loads(line)["id"] == HOSTILE


def test_a_task_id_forges_no_line_of_a_workers_log(stack: Up, valkey: Valkey, tmp_path: Path) -> None:
    """The real log of a real worker."""
    with (
        running_worker(tmp_path / "w", valkey.url, stack.triton_grpc) as worker,
        plain_celery(valkey.url) as app,
        Client(valkey.url) as client,
    ):
        app.send_task("samphire.infer", queue="inference", kwargs=body("nope"), task_id=HOSTILE)
        eventually(lambda: "forged" in worker.log(), 30, "the failure in the log")
        eventually(lambda: [letter.id for letter in client.dead_letters.list()] == [HOSTILE], 30, "the letter")
    log = worker.log()
    assert f"task evil\\x1b[2J\\r\\n{FORGED} failed: " in log
    assert not [line for line in log.splitlines() if line.startswith(FORGED)]
    # Celery's banner, which is printed and not logged, has its lines.
    assert {"[tasks]", "  . samphire.infer"} <= set(log.splitlines())


def _written(tmp_path: Path, say: Any) -> str:
    logger = logging.Logger("hostile")
    path = tmp_path / "log"
    handler = logging.FileHandler(path)
    logger.addHandler(handler)
    filter_log(logger)
    filter_log(logger)
    assert [type(known) for known in handler.filters] == [Repeats, Escaping]
    say(logger)
    handler.close()
    return path.read_text()


def test_an_exceptions_text_forges_no_line_either(tmp_path: Path) -> None:
    """Its traceback is indented."""

    def say(logger: logging.Logger) -> None:
        try:
            raise ValueError(HOSTILE)
        except ValueError:
            logger.exception("a\nb %s", "c\n")

    lines = _written(tmp_path, say).splitlines()
    assert lines[:2] == ["a\\nb c", "  Traceback (most recent call last):"]
    assert lines[-1] == f"  {FORGED}" and "ValueError: evil\\x1b[2J\\r" in lines[-2]


def test_a_record_that_cannot_be_formatted_meets_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The handler says so, as ever."""
    monkeypatch.setattr(sys, "stderr", (tmp_path / "stderr").open("w"))
    assert _written(tmp_path, lambda logger: logger.error("%d", "x")) == ""
    sys.stderr.close()
    assert "--- Logging error ---" in (tmp_path / "stderr").read_text()


def test_what_is_repeated_is_told_once_a_minute() -> None:
    """With how often it was, each place in the code by itself; all else is told each time."""
    now = 0.0
    lines: list[str] = []

    class Keeping(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler = Keeping()
    handler.addFilter(Repeats(60, clock=lambda: now))
    logger = logging.getLogger("tests.repeats")
    logger.propagate = False
    logger.addHandler(handler)

    def fail(times: int) -> None:
        for number in range(times):
            logger.warning("claim failed: %s", f"100 % {number}", extra={"action": "claim_failed"})
            logger.warning("endpoint %s is away", number, extra={"action": "endpoint_away"})

    fail(3)
    logger.error("heartbeat failed", extra={"action": "beat_failed"})
    assert [line for line in lines if "away" not in line] == ["claim failed: 100 % 0", "heartbeat failed"]
    assert len(lines) == 5
    now, lines = 59.9, lines[:0]
    fail(1)
    now = 60.0
    fail(2)
    now = 200.0
    fail(1)
    told = [line for line in lines if "away" not in line]
    assert told == [
        "claim failed: 100 % 0 (3 more like this since the last line)",
        "claim failed: 100 % 0 (1 more like this since the last line)",
    ]
    logger.removeHandler(handler)


def test_every_repeated_action_is_one() -> None:
    """A word that nobody logs would hide that another is missing."""
    folder = Path(worker_log.__file__).parent
    text = "".join(path.read_text() for path in folder.rglob("*.py") if path.name != "worker_log.py")
    assert all(f'"action": "{action}"' in text for action in REPEATED)
    once = {
        "delivery_failed",
        "lookup_failed",
        "metrics_failed",
        "refusal_failed",
        "reload_failed",
        "seek_failed",
        "task_failed",
    }
    assert set(re.findall(r'"action": "(\w+_failed)"', text)) - REPEATED == once | {"who_waits_failed"}
