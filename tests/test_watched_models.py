"""Models of one's own: what `samphire up` serves, how changes are taken over while it runs, and `samphire models`."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tritonclient.grpc import InferenceServerClient

from samphire import Client, ServedModel, UnknownModelError
from samphire_broker.repository.changes import STILL_S
from samphire_broker.settings import shipped_model_repository
from tests.stacks import ENDS_S, SAMPHIRE, Up, clean_environment, eventually, running_stack, stop
from tests.test_stack import run_up

TAKEN_S = 60
IMAGE = np.zeros((1, 8, 8), np.float32)

MODEL = """
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        answers = []
        for request in requests:
            x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
            answers.append(pb_utils.InferenceResponse([pb_utils.Tensor("y", (x * {factor}).astype(np.float32))]))
        return answers
"""
CONFIG = """
name: "times"
backend: "python"
max_batch_size: 8
input [ { name: "x", data_type: TYPE_FP32, dims: [ 1 ] } ]
output [ { name: "y", data_type: TYPE_FP32, dims: [ 1 ] } ]
"""


def write_times(folder: Path, version: int, factor: int) -> None:
    place = folder / "times" / str(version)
    place.mkdir(parents=True)
    (place / "model.py").write_text(MODEL.replace("{factor}", str(factor)))
    (folder / "times" / "config.pbtxt").write_text(CONFIG)


def copy_model(folder: Path, name: str) -> None:
    shutil.copytree(shipped_model_repository() / name, folder / name)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models of one's own")
    copy_model(folder, "identity")
    copy_model(folder, "digits")
    return folder


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Iterator[Up]:
    options = ("--model-repository", str(models), "--watch-models")
    with running_stack(tmp_path_factory.mktemp("watching"), *options) as running:
        yield running


@pytest.fixture(autouse=True)
def only_the_models_of_before(models: Path) -> Iterator[None]:
    """What a test that failed has left would fail the others too."""
    yield
    shutil.rmtree(models / "times", ignore_errors=True)


def samphire(up: Up, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = clean_environment() | {"SAMPHIRE_BROKER_URL": up.broker_url, "SAMPHIRE_DATA_DIR": str(up.data_dir)}
    command = [SAMPHIRE, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=ENDS_S, check=False, env=environment)


def told(up: Up, name: str) -> ServedModel | None:
    with Client(up.broker_url) as client:
        return next((model for model in client.models.list() if model.name == name), None)


def versions(up: Up, name: str) -> tuple[str, ...]:
    found = told(up, name)
    return found.signature.versions if found is not None and found.signature is not None else ()


def trouble(up: Up, name: str) -> str:
    found = told(up, name)
    return found.trouble if found is not None else ""


def answer(up: Up, model: str = "digits") -> str:
    with Client(up.broker_url) as client:
        inputs = {"digits": {"image": IMAGE}, "identity": {"input_fp32": [[1.0]]}, "times": {"x": [[1.0]]}}
        result = client.submit(model, inputs[model]).result(TAKEN_S)
        return result.model_version if model != "times" else str(float(result.outputs["y"][0, 0]))


def test_a_version_comes_and_goes(up: Up, models: Path) -> None:
    """It answers without a restart; what is deleted is served no more, so that deleting it is a rollback."""
    eventually(lambda: versions(up, "digits") == ("1", "2"), TAKEN_S, "both versions")
    assert answer(up) == "2"
    shutil.copytree(models / "digits" / "1", models / "digits" / "3")
    eventually(lambda: versions(up, "digits") == ("1", "2", "3"), TAKEN_S, "version 3")
    assert answer(up) == "3"
    shutil.rmtree(models / "digits" / "3")
    eventually(lambda: versions(up, "digits") == ("1", "2"), TAKEN_S, "version 2 as the newest")
    assert answer(up) == "2"


def test_a_model_comes_changes_and_goes(up: Up, models: Path) -> None:
    """Each change answers; a model that was deleted is unknown."""
    write_times(models, 1, 2)
    eventually(lambda: versions(up, "times") == ("1",), TAKEN_S, "the new model")
    assert answer(up, "times") == "2.0"
    (models / "times" / "1" / "model.py").write_text(MODEL.replace("{factor}", "3"))
    eventually(lambda: answer(up, "times") == "3.0", TAKEN_S, "its new code")
    shutil.rmtree(models / "times")
    eventually(lambda: told(up, "times") is None, TAKEN_S, "its end")
    with Client(up.broker_url) as client, pytest.raises(UnknownModelError, match="no model 'times'"):
        client.models.get("times")


def test_what_is_being_written_is_not_taken(up: Up, models: Path) -> None:
    """Only once it has been still for a second: each byte on its way is a change."""
    whole = MODEL.replace("{factor}", "2")
    while True:
        before = up.output.read_text()
        write_times(models, 1, 2)
        code = models / "times" / "1" / "model.py"
        began = wrote = time.monotonic()
        longest_s = 0.0
        while wrote - began < 3:
            code.write_text(whole[: len(whole) // 2] + f"# {time.monotonic()}\n")
            now = time.monotonic()
            longest_s, wrote = max(longest_s, now - wrote), now
            time.sleep(0.1)
        after = up.output.read_text()
        if longest_s < STILL_S / 2:  # else this machine was too slow to write without a pause
            break
        shutil.rmtree(models / "times")
        eventually(lambda: told(up, "times") is None, TAKEN_S, "the end of the trial")
    assert after == before
    code.write_text(whole)
    eventually(lambda: versions(up, "times") == ("1",), TAKEN_S, "the whole model")
    assert "model times is not" not in up.output.read_text().removeprefix(before)
    assert answer(up, "times") == "2.0"
    shutil.rmtree(models / "times")
    eventually(lambda: told(up, "times") is None, TAKEN_S, "its end")


@pytest.mark.parametrize("fault", ["config", "file"])
def test_a_broken_change_leaves_what_is_served(up: Up, models: Path, fault: str) -> None:
    """Triton's own reason is told by `up`, `models`, `doctor` and the SDK; what is mended is taken."""
    path = models / "digits" / ("config.pbtxt" if fault == "config" else "2/model.onnx")
    before = path.read_bytes()
    path.write_bytes(before + b"name: {{\n" if fault == "config" else b"no ONNX")
    reason = "failed to read text proto" if fault == "config" else "INVALID_PROTOBUF"
    detail = "text-format inference.ModelConfig" if fault == "config" else "version 2 is at UNAVAILABLE"
    eventually(lambda: reason in trouble(up, "digits"), TAKEN_S, "the trouble")
    assert answer(up) == "2"
    listed = samphire(up, "models", "list")
    examined = samphire(up, "doctor", "--broker-url", up.broker_url)
    for text in (listed.stdout, examined.stdout, up.output.read_text(), trouble(up, "digits")):
        assert reason in text and detail in text
    assert "versions 1, 2; not as its files are: " in listed.stdout
    path.write_bytes(before)
    eventually(lambda: not trouble(up, "digits"), TAKEN_S, "the end of the trouble")
    assert answer(up) == "2"


def test_a_model_that_dies_comes_back_as_it_was_served(up: Up, models: Path) -> None:
    """Although its files in the folder are broken: the mirror has the last ones that loaded."""
    path = models / "identity" / "config.pbtxt"
    before = path.read_text()
    path.write_text("{{")
    eventually(lambda: trouble(up, "identity"), TAKEN_S, "the trouble")
    with InferenceServerClient(up.triton_grpc) as triton:
        triton.unload_model("identity")
        triton.load_model("identity")
    assert answer(up, "identity") == "1"
    path.write_text(before)
    eventually(lambda: not trouble(up, "identity"), TAKEN_S, "the end of the trouble")


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("dims: [ 8, 8 ]", "dims: [ 9, 8 ]", "'image' has the shape [8, 8] without the batch dimension"),
        ("TYPE_FP32, dims: [ 10 ]", "TYPE_FP16, dims: [ 10 ]", "'probabilities' is TYPE_FP32 in the ONNX file"),
        ('name: "image"', 'name: "picture"', "the config has the input 'picture', the ONNX file has image"),
        ("max_batch_size: 64", "max_batch_size: 0", "has the shape [-1, 8, 8] in the ONNX file, and dims [8, 8]"),
    ],
)
def test_a_config_that_contradicts_its_onnx_file(up: Up, models: Path, old: str, new: str, text: str) -> None:
    """It is refused at load: an answer of other shape than was promised comes too late."""
    path = models / "digits" / "config.pbtxt"
    before = path.read_text()
    assert old in before
    path.write_text(before.replace(old, new))
    eventually(lambda: text in trouble(up, "digits"), TAKEN_S, "the refusal")
    assert answer(up) == "2"
    path.write_text(before)
    eventually(lambda: not trouble(up, "digits"), TAKEN_S, "the end of the trouble")


def test_a_name_that_cannot_be_one(up: Up, models: Path) -> None:
    """Triton itself dies of some; it is told, and the others are served."""
    copy_model(models, "normalize_text")
    (models / "normalize_text").rename(models / "normalize text")
    eventually(lambda: "expected a model name" in trouble(up, "normalize text"), TAKEN_S, "the trouble")
    shutil.rmtree(models / "normalize text")
    eventually(lambda: not trouble(up, "normalize text"), TAKEN_S, "its end")
    assert answer(up) == "2"


def test_a_folder_that_is_gone_leaves_what_is_served(up: Up, models: Path) -> None:
    """It is told once, and what has changed is taken once the folder is back."""
    aside = models.with_name("aside")
    models.rename(aside)
    eventually(lambda: f"{models} cannot be read" in up.output.read_text(), TAKEN_S, "the message")
    assert answer(up) == "2"
    aside.rename(models)
    shutil.copytree(models / "digits" / "1", models / "digits" / "3")
    eventually(lambda: versions(up, "digits") == ("1", "2", "3"), TAKEN_S, "version 3")
    shutil.rmtree(models / "digits" / "3")
    eventually(lambda: versions(up, "digits") == ("1", "2"), TAKEN_S, "version 2 as the newest")
    assert up.output.read_text().count(f"{models} cannot be read") == 1


def test_a_triton_that_dies_takes_the_change_later(up: Up, models: Path) -> None:
    """What changes while it is away is taken once it is back."""
    before = up.output.read_text()
    os.kill(up.ready["pids"]["triton"], signal.SIGKILL)
    shutil.copytree(models / "digits" / "1", models / "digits" / "3")
    eventually(lambda: versions(up, "digits") == ("1", "2", "3"), TAKEN_S, "version 3")
    shutil.rmtree(models / "digits" / "3")
    eventually(lambda: versions(up, "digits") == ("1", "2"), TAKEN_S, "version 2 as the newest")
    assert "triton ended (exit code" in up.output.read_text().removeprefix(before)


def test_the_command_tells_and_loads(up: Up, models: Path) -> None:
    """`list`, `show`, `reload` and `remove`, also as JSON, and with names that are wrong."""
    listed = samphire(up, "models", "list")
    assert [line.split()[0] for line in listed.stdout.splitlines()] == ["digits", "identity"]
    as_json = [json.loads(line) for line in samphire(up, "models", "list", "--json").stdout.splitlines()]
    assert [(one["name"], one["signature"]["versions"], one["trouble"]) for one in as_json] == [
        ("digits", ["1", "2"], ""),
        ("identity", ["1"], ""),
    ]
    shown = samphire(up, "models", "show", "digits")
    assert "input image FP32 [rows, 8, 8]" in shown.stdout and "at most 64 rows" in shown.stdout
    unknown = samphire(up, "models", "show", "nope")
    assert (unknown.returncode, "no model 'nope'; there are 'digits', 'identity'" in unknown.stderr) == (1, True)
    nothing = samphire(up, "models", "reload")
    assert (nothing.returncode, "nothing has changed" in nothing.stderr) == (0, True)
    again = samphire(up, "models", "reload", "digits")
    assert (again.returncode, "model digits is loaded as it is in" in again.stderr) == (0, True)
    missing = samphire(up, "models", "reload", "nope")
    assert (missing.returncode, "has no model nope; there are digits, identity" in missing.stderr) == (1, True)
    removed = samphire(up, "models", "remove", "digits")
    assert (removed.returncode, f"delete {models / 'digits'} there" in removed.stderr) == (1, True)
    assert answer(up) == "2"


def refusal(client: Client) -> str:
    """Why a client refuses a task of `times`; "" where it does not."""
    try:
        client.prepare("times", {"x": np.ones((1, 1), np.float32)})
    except UnknownModelError as error:
        return str(error)
    return ""


def test_queues_say_why_they_wait(up: Up, models: Path) -> None:
    """A model that is not loaded keeps its tasks; one that never loaded is refused with the reason."""
    with InferenceServerClient(up.triton_grpc) as triton, Client(up.broker_url) as client:
        triton.unload_model("identity")
        eventually(lambda: not versions(up, "identity"), TAKEN_S, "the unloading")
        task = client.submit("identity", {"input_fp32": np.ones((1, 1), np.float32)})
        row = next(
            line for line in samphire(up, "queues").stdout.splitlines() if line.startswith("inference.identity ")
        )
        assert row.endswith("model identity is not loaded")
        triton.load_model("identity")
        assert task.result(TAKEN_S)
        write_times(models, 1, 2)
        (models / "times" / "1" / "model.py").write_text("import what_is_not_installed")
        eventually(lambda: "what_is_not_installed" in refusal(client), TAKEN_S, "the refusal with its reason")
        assert "no model 'times' is loaded: " in refusal(client)
        shutil.rmtree(models / "times")
        eventually(lambda: told(up, "times") is None, TAKEN_S, "its end")


def test_what_is_deleted_between_two_starts_is_not_served(tmp_path: Path) -> None:
    """Copies of earlier starts are no source. Without `--watch-models` a command takes changes over."""
    folder = tmp_path / "models"
    copy_model(folder, "digits")
    write_times(folder, 1, 2)
    options = ("--model-repository", str(folder))
    with running_stack(tmp_path / "first", *options, data_dir=tmp_path / "data") as up:
        eventually(lambda: versions(up, "digits") == ("1", "2"), TAKEN_S, "both versions")
        eventually(lambda: versions(up, "times") == ("1",), TAKEN_S, "both models")
        (folder / "times" / "1" / "model.py").write_text("not Python")
        failed = samphire(up, "models", "reload")
        assert (failed.returncode, "What is served stays" in failed.stderr) == (1, True), failed.stderr
        assert answer(up, "times") == "2.0"
        write_times_again = MODEL.replace("{factor}", "5")
        (folder / "times" / "1" / "model.py").write_text(write_times_again)
        assert samphire(up, "models", "reload").returncode == 0
        eventually(lambda: answer(up, "times") == "5.0", TAKEN_S, "the new code")
        copy_model(folder, "identity")
        (folder / "identity" / "1" / "model.py").write_text("import what_is_not_installed")
        for _ in range(2):  # it may be installed meanwhile, which changes no file of the model
            failed = samphire(up, "models", "reload")
            assert (failed.returncode, "what_is_not_installed" in failed.stderr) == (1, True), failed.stderr
        eventually(lambda: "what_is_not_installed" in trouble(up, "identity"), TAKEN_S, "its trouble")
        shutil.rmtree(folder / "identity")
        assert samphire(up, "models", "reload").returncode == 0
        environment = clean_environment() | {"SAMPHIRE_DATA_DIR": str(up.data_dir)}
        stop(up, signal.SIGTERM)
        nobody = subprocess.run([SAMPHIRE, "models", "reload"], capture_output=True, text=True, env=environment)
        assert (nobody.returncode, "no `samphire up` runs with the data directory" in nobody.stderr) == (1, True)
    shutil.rmtree(folder / "times")
    shutil.rmtree(folder / "digits" / "2")
    with running_stack(tmp_path / "second", *options, data_dir=tmp_path / "data") as up:
        eventually(lambda: versions(up, "digits") == ("1",), TAKEN_S, "the only version")
        assert told(up, "times") is None
        assert answer(up) == "1"


@pytest.mark.parametrize(
    ("paths", "text"),
    [
        ([], "has no models: expected a folder for each model"),
        (["digits/config.pbtxt", "digits/1/model.onnx"], "is itself a model: expected the folder above it"),
    ],
)
def test_a_folder_without_models_is_said_at_once(tmp_path: Path, paths: list[str], text: str) -> None:
    """Before anything is started."""
    folder = tmp_path / "models"
    folder.mkdir()
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()
    ended = run_up(tmp_path, "--ports", "free", "--model-repository", str(folder / "digits" if paths else folder))
    assert (ended.returncode, text in ended.stderr, "starting" in ended.stderr) == (1, True, False)
    assert "Traceback" not in ended.stderr


def test_models_of_another_triton(tmp_path: Path, stack: Up) -> None:
    """Its own repository is the place; the command loads and unloads there, by name."""
    environment = {"SAMPHIRE_TRITON_URLS": stack.triton_grpc}
    refused = run_up(tmp_path, "--model-repository", str(tmp_path), env=environment)
    assert (refused.returncode, "SAMPHIRE_TRITON_URLS names another" in refused.stderr) == (1, True)

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        known = clean_environment() | environment
        return subprocess.run(
            [SAMPHIRE, "models", *arguments, "--data-dir", str(tmp_path / "none")],
            capture_output=True,
            text=True,
            timeout=ENDS_S,
            check=False,
            env=known,
        )

    assert command("reload").returncode == 2
    loaded = command("reload", "unbatched")
    assert (loaded.returncode, f"model unbatched is loaded on {stack.triton_grpc}" in loaded.stderr) == (0, True)
    removed = command("remove", "unbatched")
    assert (removed.returncode, f"model unbatched is unloaded on {stack.triton_grpc}" in removed.stderr) == (0, True)
    assert command("reload", "unbatched").returncode == 0
    failed = command("reload", "nope")
    assert (failed.returncode, "model nope is not loaded" in failed.stderr) == (1, True)
