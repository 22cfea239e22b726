"""docs/upgrade.md: its numbers are those of docker-compose.yml, its lines for a copy of the data bring all back."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import redis

from samphire import Client
from samphire.wire.keys import SCHEMA_VERSION
from samphire_broker.embedded.ports import choose_port
from samphire_broker.settings import Settings
from tests.stacks import eventually, need_servers
from tests.support.compose import (  # noqa: F401
    ROOT,
    SECRETS,
    TIMEOUT_S,
    Deployment,
    process,
    seconds,
    services,
    valkey_here,
    words,
)

PAGE = (ROOT / "docs" / "upgrade.md").read_text()
DOCKERS_S = 10
"""After which Docker kills a container that says nothing else."""


def test_the_page_says_how_long_each_part_may_take(services: dict[str, Any]) -> None:
    rows = re.findall(r"(?m)^\| (Flower|Triton|Valkey) \|.*\| (\d+) s \|$", PAGE)
    told = {name.lower(): int(number) for name, number in rows}
    given = {name: seconds(service.get("stop_grace_period", f"{DOCKERS_S}s")) for name, service in services.items()}
    assert told == {"flower": given["flower"], "triton": given["triton-gpu"], "valkey": given["valkey"]}
    worker = re.search(r"(?m)^\| worker \|.*`SAMPHIRE_SHUTDOWN_TIMEOUT_S` \((\d+) s\).*\| (\d+) s more \|$", PAGE)
    assert worker is not None
    assert int(worker[1]) == Settings.model_fields["shutdown_timeout_s"].default
    assert int(worker[1]) + int(worker[2]) == given["worker"]
    drained = re.search(r"Triton \| .* for (\d+) s", PAGE)
    assert drained is not None and f"--exit-timeout-secs={drained[1]}" in words(services["triton-gpu"]["command"])
    lapsed = re.search(r"its lease \((\d+) s\)", PAGE)
    assert lapsed is not None and int(lapsed[1]) == Settings.model_fields["lease_s"].default


def test_the_page_knows_the_version_of_the_keys() -> None:
    assert f"it is {SCHEMA_VERSION} so far" in " ".join(PAGE.split())


def test_a_copy_of_the_data_brings_every_key_back(services: dict[str, Any], tmp_path: Path) -> None:
    """By the commands of the page, in the place of what was there, on a server that the file's command starts."""
    need_servers()
    places = {"6379": str(choose_port(0, ""))}
    places["valkey:6379"] = f"127.0.0.1:{places['6379']}"
    deployment = Deployment(services, places)

    def here(command: str, folder: Path) -> str:
        return command.replace("/data", str(folder))

    def keys() -> dict[bytes, Any]:
        with redis.Redis.from_url(deployment.broker_url) as server:
            return {key: server.dump(key) for key in server.scan_iter()}

    def answers() -> bool:
        try:
            with redis.Redis.from_url(deployment.broker_url) as server:
                return bool(server.ping())
        except redis.RedisError:
            return False

    (old, new), copy = (tmp_path / "old", tmp_path / "new"), tmp_path / "valkey-data.tar"
    for folder in (old, new):
        folder.mkdir()
    with process(valkey_here(deployment, old), tmp_path / "old.log", deployment.environment("valkey")):
        eventually(answers, 20, "the server's answer")
        with Client(deployment.broker_url) as client:
            for number in range(20):
                client.submit("digits", {"image": [[[number] * 100] * 100]})
        written = keys()
    assert any(b"inference" in key for key in written) and any(b"blob" in key for key in written)

    packed = re.search(r"--entrypoint (tar) valkey (.*) > valkey-data\.tar", PAGE)
    put_back = re.search(r"--entrypoint (sh) valkey -ec '(.*)' < valkey-data\.tar", PAGE)
    assert packed is not None and put_back is not None
    with copy.open("wb") as out:
        subprocess.run([packed[1], *here(packed[2], old).split()], stdout=out, timeout=TIMEOUT_S, check=True)
    (new / "appendonlydir").mkdir()
    (new / "appendonlydir" / "of-another-time").write_text("what was there")
    with copy.open("rb") as source:
        subprocess.run([put_back[1], "-ec", here(put_back[2], new)], stdin=source, timeout=TIMEOUT_S, check=True)
    assert not (new / "appendonlydir" / "of-another-time").exists()
    with process(valkey_here(deployment, new), tmp_path / "new.log", deployment.environment("valkey")):
        eventually(answers, 20, "the server's answer")
        assert keys() == written
