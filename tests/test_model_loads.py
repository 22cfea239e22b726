"""Loads of models while others are served: slow ones, broken ones, several at once, one whose answer comes too late."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tritonclient.grpc.aio import InferenceServerClient

from samphire import Client
from samphire_broker.repository import loads
from samphire_broker.repository.loads import Loads, StillLoadingError
from samphire_broker.settings import shipped_model_repository
from tests.stacks import ENDS_S, SAMPHIRE, Up, bound, clean_environment, eventually, running_stack

TAKEN_S = 60
PUBLISHERS = 8
IMAGE = {"image": np.zeros((1, 8, 8), np.float32)}

MODEL = """
import json
import os
import time
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        self.folder = Path(json.loads(args["model_config"])["parameters"]["folder"]["string_value"])
        self.tell("begin")
        while (self.folder / "hold").exists():
            time.sleep(0.02)
        self.tell("end")
        if (self.folder / "broken").exists():
            raise ValueError("its weights are torn")

    def tell(self, what):
        with (self.folder / "journal").open("a") as journal:
            journal.write(f"{what} {os.getpid()} {GENERATION}\\n")

    def execute(self, requests):
        y = np.array([[GENERATION]], np.float32)
        return [pb_utils.InferenceResponse([pb_utils.Tensor("y", y)]) for _ in requests]

    def finalize(self):
        self.tell("over")
"""
CONFIG = """
name: "held" backend: "python" max_batch_size: 8
input [ { name: "x", data_type: TYPE_FP32, dims: [ 1 ] } ]
output [ { name: "y", data_type: TYPE_FP32, dims: [ 1 ] } ]
parameters { key: "folder" value { string_value: "FOLDER" } }
"""


class Held:
    """A model whose load a test holds up."""

    def __init__(self, models: Path, folder: Path) -> None:
        self.place = models / "held"
        self.folder = folder
        folder.mkdir()

    def write(self, generation: int) -> None:
        """Change it."""
        (self.place / "1").mkdir(parents=True, exist_ok=True)
        (self.place / "1" / "model.py").write_text(MODEL.replace("GENERATION", str(generation)))
        (self.place / "config.pbtxt").write_text(CONFIG.replace("FOLDER", str(self.folder)))

    def journal(self) -> list[str]:
        """What its processes have told, in order."""
        journal = self.folder / "journal"
        return journal.read_text().splitlines() if journal.exists() else []

    def processes(self, what: str) -> set[str]:
        """Those that have told this."""
        return {line.split()[1] for line in self.journal() if line.startswith(f"{what} ")}

    def is_loading(self) -> bool:
        """Whether a load of it is held up."""
        told = [line.split()[0] for line in self.journal()]
        return told.count("begin") > told.count("end")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(shipped_model_repository() / "identity", folder / "identity")
    return folder


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Iterator[Up]:
    options = ("--model-repository", str(models), "--watch-models")
    with running_stack(tmp_path_factory.mktemp("stack"), *options) as running:
        yield running


@pytest.fixture
def held(models: Path, tmp_path: Path, up: Up) -> Iterator[Held]:
    model = Held(models, tmp_path / "held")
    yield model
    shutil.rmtree(model.place, ignore_errors=True)
    for name in ("hold", "broken"):
        (model.folder / name).unlink(missing_ok=True)
    with Client(up.broker_url) as client:
        eventually(lambda: all(found.name != "held" for found in client.models.list()), TAKEN_S, "its end")


def command(up: Up, *arguments: str) -> list[str]:
    return [SAMPHIRE, *arguments, "--data-dir", str(up.data_dir)]


def environment(up: Up) -> dict[str, str]:
    return clean_environment() | {"SAMPHIRE_BROKER_URL": up.broker_url, "SAMPHIRE_TRITON_URLS": up.triton_grpc}


def generation(client: Client) -> float:
    return float(client.submit("held", {"x": [[0.0]]}).result(TAKEN_S).outputs["y"][0, 0])


def is_ready(client: Client, name: str) -> bool:
    return any(model.name == name and model.signature is not None for model in client.models.list())


def trouble(client: Client, name: str) -> str:
    return next((model.trouble for model in client.models.list() if model.name == name), "")


def test_while_a_model_loads_the_others_are_served(up: Up, held: Held) -> None:
    """Triton calls itself not ready by default then; nobody takes it for an outage, and `doctor` is content."""
    (held.folder / "hold").touch()
    held.write(1)
    with Client(up.broker_url) as client:
        eventually(held.is_loading, TAKEN_S, "the load to begin")
        for _ in range(20):
            client.submit("identity", {"input_fp32": [[1.0]]}).result(TAKEN_S)
        asked = subprocess.run(
            [*command(up, "doctor"), "--json"], capture_output=True, text=True, timeout=ENDS_S, env=environment(up)
        )
        findings = [json.loads(line) for line in asked.stdout.splitlines()]
        about = [finding for finding in findings if "triton" in json.dumps(finding).lower()]
        assert about and not [finding for finding in about if finding["state"] == "error"], asked.stdout
        assert held.is_loading(), "it was held up all the time"
        waiting = client.submit("held", {"x": np.zeros((1, 1), np.float32)})
        (held.folder / "hold").unlink()
        assert float(waiting.result(TAKEN_S).outputs["y"][0, 0]) == 1


def test_loads_of_one_model_come_one_after_the_other(up: Up, held: Held) -> None:
    """Eight publishers and the watcher: none loads while another does, and whoever asks meanwhile gets an answer."""
    held.write(1)
    with Client(up.broker_url) as client:
        eventually(lambda: is_ready(client, "held"), TAKEN_S, "the model")
        seen: list[float] = []
        ended = threading.Event()

        def ask() -> None:
            while not ended.is_set():
                seen.append(generation(client))

        asking = threading.Thread(target=ask)
        asking.start()
        try:
            held.write(2)
            reload = command(up, "models", "reload", "held")
            started = [
                subprocess.Popen(bound(reload, "KILL"), env=environment(up), stderr=subprocess.PIPE, text=True)
                for _ in range(PUBLISHERS)
            ]
            for publisher in started:
                _, said = publisher.communicate(timeout=ENDS_S)
                assert publisher.returncode == 0, said
            eventually(lambda: seen and seen[-1] == 2, TAKEN_S, "the new one")
        finally:
            ended.set()
            asking.join(TAKEN_S)
        assert seen == sorted(seen), "an older one answered after a newer one"
        loads_told = [line.split() for line in held.journal() if line.split()[0] in ("begin", "end")]
        assert [what for what, _, _ in loads_told] == ["begin", "end"] * (len(loads_told) // 2)
        assert len(loads_told) // 2 > PUBLISHERS / 2
        shutil.rmtree(held.place)
        eventually(lambda: not is_ready(client, "held"), TAKEN_S, "the end of the model")
        eventually(lambda: held.processes("over") == held.processes("begin"), TAKEN_S, "the words of all processes")


def test_a_broken_model_does_not_stop_the_next(up: Up, held: Held, models: Path) -> None:
    """A good ONNX model that comes after it is served; the mended one too, without a restart."""
    (held.folder / "broken").touch()
    held.write(1)
    with Client(up.broker_url) as client:
        eventually(lambda: "its weights are torn" in trouble(client, "held"), TAKEN_S, "the reason")
        shutil.copytree(shipped_model_repository() / "digits", models / "digits")
        try:
            eventually(lambda: is_ready(client, "digits"), TAKEN_S, "the good one")
            client.submit("digits", IMAGE).result(TAKEN_S)
            (held.folder / "broken").unlink()
            held.write(2)
            eventually(lambda: is_ready(client, "held"), TAKEN_S, "the mended one")
            assert generation(client) == 2
            eventually(lambda: not trouble(client, "held"), TAKEN_S, "the end of its trouble")
        finally:
            shutil.rmtree(models / "digits")


def test_a_load_whose_answer_comes_too_late(up: Up, held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has become of it is read from Triton's index; of what was served before nothing is known then."""
    held.write(1)
    with Client(up.broker_url) as client:
        eventually(lambda: is_ready(client, "held"), TAKEN_S, "the model")
    monkeypatch.setattr(loads, "LOAD_TIMEOUT_S", 1.0)
    going_on = r"has not loaded within 1 s, and Triton goes on with it.*samphire models reload held"

    class EndingLoads(Loads):
        """The load ends between its answer, which is late, and the look at the index."""

        looks = 0

        async def _states(self, model: str) -> dict[str, str]:
            self.looks += 1
            if self.looks == 2:
                (held.folder / "hold").unlink()
                while held.is_loading():
                    await asyncio.sleep(0.02)
                async with asyncio.timeout(TAKEN_S):
                    while "LOADING" in await super()._states(model):
                        await asyncio.sleep(0.02)
            return await super()._states(model)

    async def test() -> None:
        log = up.data_dir / "logs" / "triton.log"
        model = up.data_dir / "model_repository" / "held" / "1" / "model.py"  # what Triton itself reads
        async with InferenceServerClient(up.triton_grpc) as triton:
            (held.folder / "hold").touch()
            model.write_text(model.read_text().replace("1.0", "2.0") + "\n# changed")
            with pytest.raises(StillLoadingError, match=going_on):
                await Loads(triton, log).load("held")
            assert held.is_loading()
            (held.folder / "hold").unlink()
            monkeypatch.setattr(loads, "LOAD_TIMEOUT_S", TAKEN_S)
            assert await Loads(triton, log).load("held") == ""

            for broken, outcome in ((False, ""), (True, "its weights are torn")):
                assert await Loads(triton, log).unload("held") == ""
                while "READY" in await Loads(triton, log)._states("held"):
                    await asyncio.sleep(0.02)
                (held.folder / "hold").touch()
                if broken:
                    (held.folder / "broken").touch()
                monkeypatch.setattr(loads, "LOAD_TIMEOUT_S", 1.0)
                assert outcome in await EndingLoads(triton, log).load("held")
                monkeypatch.setattr(loads, "LOAD_TIMEOUT_S", TAKEN_S)

    asyncio.run(test())
