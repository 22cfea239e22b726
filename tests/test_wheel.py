"""The wheel as a user gets it: what is in it, and that its light base install works on every Python it names."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest

from samphire import Client
from samphire_broker.digits import load_split
from tests.stacks import Up, clean_environment

ROOT = Path(__file__).parents[1]
PACKAGES = ("clients/python/samphire", "broker/samphire_broker", "workers/samphire_workers")
MODELS = "samphire_broker/embedded/model_repository"
HEAVY = {"celery", "click", "fastapi", "grpcio", "kombu", "pydantic", "scikit-learn", "torch", "tritonclient"}
RUNNING = "{}.{}".format(*sys.version_info)
TIMEOUT_S = 300

USE = """
import importlib.metadata, json, sys
import numpy as np
import samphire
from samphire import Client, InvalidInputError, Step

images = np.array(json.load(sys.stdin), dtype=np.float32)
with Client() as client:
    one = client.submit("digits", {"image": images[:1]}).result(30)
    many = client.map("digits", ({"image": image[np.newaxis]} for image in images))
    said = [int(result.outputs["probabilities"].argmax()) for result in many]
    seen = Step("digits", {"image": images})
    kept = client.chain(seen, Step("identity", {"input_fp32": seen["probabilities"]})).result(30)
    try:
        client.submit("digits", {"image": images.astype(np.float64)}).result(30)
    except InvalidInputError as error:
        refused = str(error)
print(json.dumps({
    "file": samphire.__file__,
    "version": importlib.metadata.version("samphire"),
    "packages": sorted(each.name.lower() for each in importlib.metadata.distributions()),
    "one": int(one.outputs["probabilities"].argmax()),
    "said": said,
    "kept": kept.outputs["output_fp32"].argmax(axis=1).tolist(),
    "refused": refused,
}))
"""


def outside() -> dict[str, str]:
    """The environment without what leads to the checkout or to its constraints."""
    ours = ("PYTHONPATH", "VIRTUAL_ENV", "PIP_CONSTRAINT")
    return {name: value for name, value in clean_environment().items() if name not in ours}


def run(folder: Path, *command: str | Path, given: str = "", env: dict[str, str] | None = None) -> str:
    """Output of a command in `folder`."""
    ended = subprocess.run(
        command,
        input=given,
        capture_output=True,
        text=True,
        cwd=folder,
        env={**outside(), **(env or {})},
        timeout=TIMEOUT_S,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def interpreter(version: str) -> Path | None:
    """A Python of this version that works: the running one, one on the PATH, or pyenv's."""
    folders = [*os.get_exec_path(), *sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin"))]
    candidates = [Path(sys.executable), *(Path(folder) / f"python{version}" for folder in folders)]
    code = "import sys, venv; print('%d.%d' % sys.version_info[:2])"
    for candidate in candidates:
        if candidate.exists():
            ended = subprocess.run([candidate, "-c", code], capture_output=True, text=True, check=False, env=outside())
            if ended.stdout.strip() == version:
                return candidate
    return None


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("broker", "clients", "model_repository", "tests", "workers"):
        shutil.copytree(ROOT / name, folder / "checkout" / name)
    for name in (".gitignore", "LICENSE", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / "checkout")
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation")
    run(folder, *pip, "--wheel-dir", folder, folder / "checkout")
    (built,) = folder.glob("*.whl")
    return built


def sources(folder: Path) -> Iterator[str]:
    """Files below a folder of the checkout, by their names there."""
    for path in folder.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            yield path.relative_to(folder).as_posix()


def test_what_is_in_the_wheel(wheel: Path) -> None:
    """All files of the three packages and the models, the licence, and nothing else: no tests, no examples."""
    names = set(ZipFile(wheel).namelist())
    expected = {f"{Path(package).name}/{name}" for package in PACKAGES for name in sources(ROOT / package)}
    expected |= {f"{MODELS}/{name}" for name in sources(ROOT / "model_repository")}
    assert {name for name in names if ".dist-info/" not in name} == expected
    for name in ("samphire/transport/submit.lua", "samphire/py.typed", f"{MODELS}/digits/2/model.onnx"):
        assert name in names
    scripts = {name for name in names if name.startswith("samphire_broker/store/lua/") and name.endswith(".lua")}
    assert {"claim.lua", "settle.lua"} <= {Path(name).name for name in scripts}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


@pytest.mark.parametrize("version", sorted({"3.11", "3.12", "3.13", RUNNING}))
def test_the_base_install_works(wheel: Path, stack: Up, client: Client, tmp_path: Path, version: str) -> None:
    """In a fresh environment, without the checkout, warnings being errors; without any server's package."""
    python = interpreter(version)
    if python is None:
        pytest.skip(f"no Python {version} here")
    run(tmp_path, python, "-m", "venv", "--without-pip", "venv")
    fresh = tmp_path / "venv" / "bin" / "python"
    run(tmp_path, sys.executable, "-m", "pip", "--python", fresh, "install", "--quiet", wheel)
    (tmp_path / "use.py").write_text(USE)
    digits = load_split()
    images, labels = digits.held_out_images[:20], digits.held_out_labels[:20].tolist()
    environment = {"SAMPHIRE_BROKER_URL": stack.broker_url}
    found = json.loads(
        run(tmp_path, fresh, "-W", "error", "use.py", given=json.dumps(images.tolist()), env=environment)
    )
    expected = client.submit("digits", {"image": images}).result(30).outputs["probabilities"].argmax(axis=1).tolist()
    assert np.mean(np.equal(expected, labels)) >= 0.9
    assert found["one"] == expected[0]
    assert found["said"] == found["kept"] == expected
    assert "expected FP32, given FP64" in found["refused"]
    assert Path(found["file"]).is_relative_to(tmp_path / "venv")
    assert f"-{found['version']}-" in wheel.name
    assert "samphire" in found["packages"] and not HEAVY & set(found["packages"])
