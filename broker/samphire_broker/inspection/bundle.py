"""The support file: what helps to understand a problem from afar, without secrets."""

from __future__ import annotations

import contextlib
import json
import os
import re
import zipfile
from dataclasses import asdict
from pathlib import Path
from urllib.parse import quote

import redis

from samphire import InvalidInputError, SamphireError
from samphire.transport.address import Address, broker_of, redact
from samphire.transport.connection import key_text
from samphire.wire.keys import Keys
from samphire_broker.inspection.checks import ALSO_REPORTED, PACKAGES, Finding, installed
from samphire_broker.inspection.overview import broker_connection, look

LOG_TAIL_BYTES = 200_000
_SECRET_NAME = re.compile(r"PASSWORD|SECRET|TOKEN|KEY", re.IGNORECASE)
_URL_PASSWORD = re.compile(r"(\w+://[^\s:/@]*:)[^\s@]+@")


def write_bundle(path: Path, findings: list[Finding], broker_url: str | None, data_dir: Path | None) -> None:
    """Pack what helps to understand a problem from afar, without secrets, tensors or messages."""
    contents = {
        "findings.json": json.dumps([asdict(finding) for finding in findings], indent=2),
        "versions.json": json.dumps({name: installed(name) for name in (*PACKAGES, *ALSO_REPORTED)}, indent=2),
        "environment.json": json.dumps(_environment(), indent=2),
    }
    try:
        broker = broker_of(broker_url)
        with broker_connection(broker) as client:
            contents["overview.json"] = json.dumps(look(client, broker.keys).as_dict(), indent=2)
            contents["broker.json"] = json.dumps(client.info(), indent=2, default=str)
            contents["dead_letters.json"] = json.dumps(_letters(client, broker.keys), indent=2)
    except SamphireError as error:
        contents["overview.json"] = json.dumps({"error": str(error)})
    if data_dir is not None:
        for log in sorted((data_dir / "logs").glob("*.log")):
            with log.open("rb") as file:
                file.seek(max(0, log.stat().st_size - LOG_TAIL_BYTES))
                contents[f"logs/{log.name}"] = file.read().decode(errors="replace")
    secrets = _secrets(broker_url, data_dir)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bundle:
        for name, text in contents.items():
            bundle.writestr(name, _redacted(text, secrets))


def _environment() -> dict[str, str]:
    names = sorted(name for name in os.environ if name.startswith(("SAMPHIRE_", "CELERY_", "FLOWER_")))
    return {name: "***" if _SECRET_NAME.search(name) else _without_password(os.environ[name]) for name in names}


def _without_password(value: str) -> str:
    return redact(value) if "://" in value else value


def _letters(client: redis.Redis, keys: Keys, most: int = 100) -> list[dict[str, str]]:
    fields = ("queue", "task_id", "model", "reason", "error", "attempts", "worker", "died_at")
    letters = []
    for letter in client.zrevrange(keys.dead, 0, most - 1):
        values = client.hmget(keys.dead_prefix + key_text(letter), list(fields))
        letters.append({name: key_text(value or b"") for name, value in zip(fields, values, strict=True)})
    return letters


def _secrets(broker_url: str | None, data_dir: Path | None) -> set[str]:
    urls = [broker_url or "", *(value for name, value in os.environ.items() if name.startswith("SAMPHIRE_"))]
    found: set[str] = set()
    for url in urls:
        with contextlib.suppress(InvalidInputError):
            password = Address.parse(url).password
            found |= {password, quote(password, safe=""), quote(password)}
    found |= {value for name, value in os.environ.items() if _SECRET_NAME.search(name) and "SAMPHIRE" in name}
    if data_dir is not None and (file := data_dir / "flower-password").is_file():
        found.add(file.read_text().strip())
    return {secret for secret in found if secret}


def _redacted(text: str, secrets: set[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, "***")
    return _URL_PASSWORD.sub(r"\1***@", text)
