"""docs/model-howtos.md: its scripts and commands are run, and one stack serves what they made."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import sklearn.datasets
import yaml
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from samphire import Client
from tests.stacks import ENDS_S, Up, clean_environment, eventually, running_stack, samphire

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "model-howtos.md").read_text()
FENCES = re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL)
PYTHON = [text for kind, text in FENCES if kind == "python"]
SCRIPTS = {name: text for text in PYTHON for name in re.findall(r"\A# (\w+\.py)\n", text)}
PARTS_OF_CONFIGS = [text for kind, text in FENCES if kind == "protobuf"]
SHOWN = [text.strip() for kind, text in FENCES if kind == "text"]
TYPED = [line.removeprefix("$ ") for kind, text in FENCES if kind == "console" for line in text.splitlines()]

ANSWER_S = 120
"""A task of a model that is not served would wait for ever."""

IMAGE = np.array(sklearn.datasets.load_digits().images[:5], np.float32)[..., np.newaxis]
NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def typed(beginning: str) -> str:
    """The one command of the page that begins so."""
    (command,) = (line for line in TYPED if line.startswith(beginning))
    return command


def run(command: list[str] | str, folder: Path, **environment: str) -> str:
    return subprocess.run(
        command,
        cwd=folder,
        shell=isinstance(command, str),
        env=clean_environment() | {"KERAS_HOME": str(folder / "keras")} | environment,
        capture_output=True,
        text=True,
        timeout=ENDS_S,
        check=True,
    ).stdout


# -- what is served ---------------------------------------------------------------------------------

KERAS = """
import os
os.environ["KERAS_BACKEND"] = "torch"
import keras
import numpy as np
model = keras.saving.load_model("strokes.keras")
try:
    model.export("never.onnx", format="onnx", verbose=False)
except ValueError as error:
    print(error)
np.save("expected.npy", model.predict(np.load("images.npy"), verbose=0))
one = keras.InputSpec(shape=(1, 8, 8, 1), dtype="float32", name="image")
model.export("one.onnx", format="onnx", verbose=False, input_signature=[one])
"""


def install_words(folder: Path, target: str, release: str) -> None:
    """Install a package named num2words, of this test's making: the page's own comes from a network."""
    project = folder / f"num2words-{release}"
    (project / "num2words").mkdir(parents=True, exist_ok=True)
    (project / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n'
        f'[project]\nname = "num2words"\nversion = "{release}"\n'
    )
    (project / "num2words" / "__init__.py").write_text(
        f"NAMES = {NAMES}\n\n\ndef num2words(number, lang):\n    return f'{{NAMES[number]}} {{lang}} {release}'\n"
    )
    pip = [sys.executable, "-m", "pip", "install", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    run([*pip, "--target", target, str(project)], folder)


def copy_model(models: Path, name: str, source: str, more: str, leave_out: str = "") -> Path:
    """A model with the files of another, and more in its config."""
    left_out = shutil.ignore_patterns(leave_out) if leave_out else None
    shutil.copytree(models / source, models / name, ignore=left_out)
    config = models / name / "config.pbtxt"
    config.write_text(config.read_text().replace(f'name: "{source}"', f'name: "{name}"') + more)
    return models / name


def make_words(folder: Path) -> None:
    """`words` as the page makes it, with two releases of its package, and with an environment of its own."""
    _, _, _, target, package = typed("pip install").split()
    assert (target, package) == ("models/words/1/packages", "num2words")
    install_words(folder, target, "1.0")
    two = copy_model(folder / "models", "words_two", "words", "version_policy { all { } }")
    shutil.copytree(two / "1", two / "2", ignore=shutil.ignore_patterns("packages"))
    install_words(folder, str(two / "2" / "packages"), "2.0")

    parameter = PARTS_OF_CONFIGS[0].replace("/srv/environments", str(folder))
    copy_model(folder / "models", "words_alone", "words", parameter, leave_out="packages")
    make = typed("python3.11 -m venv").replace("/srv/environments", str(folder)).split()[2:]
    run([sys.executable, "-m", *make, "--without-pip"], folder)
    packages = folder / "words" / "lib" / "python3.11" / "site-packages"
    install_words(folder, str(packages), "3.0")
    for name in ("numpy", "numpy.libs"):
        (packages / name).symlink_to(Path(np.__file__).parents[1] / name)


def make_strokes(folder: Path) -> str:
    """Two more models of the Keras model, and what Keras says; returns what it says of one that was never called."""
    np.save(folder / "images.npy", IMAGE)
    said = run([sys.executable, "-c", KERAS], folder)
    models = folder / "models"
    net = copy_model(models, "net", "strokes", 'default_model_filename: "net.onnx"')
    config = (net / "config.pbtxt").read_text().replace('backend: "onnxruntime"', 'platform: "onnxruntime_onnx"')
    (net / "config.pbtxt").write_text(config)
    (net / "1" / "model.onnx").rename(net / "1" / "net.onnx")
    one = copy_model(models, "one", "strokes", "")
    shutil.copy(folder / "one.onnx", one / "1" / "model.onnx")
    return said


class Howtos(NamedTuple):
    """What the page's scripts made, served."""

    folder: Path
    up: Up
    client: Client
    said_by_keras: str

    def word(self, model: str, version: int | str = "champion") -> str:
        """What a model of `words` makes of a seven."""
        seven = np.eye(10, dtype=np.float32)[[7]]
        task = self.client.submit(model, {"probabilities": seven}, version=version)
        word: bytes = task.result(ANSWER_S).outputs["word"][0, 0]
        return word.decode()

    def listed(self, model: str) -> str:
        """The line of `samphire models list`."""
        lines = samphire(self.up.broker_url, "models", "list").stdout.splitlines()
        return next((" ".join(line.split()) for line in lines if line.split()[0] == model), "")


@pytest.fixture(scope="module")
def howtos(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Howtos]:
    folder = tmp_path_factory.mktemp("howtos")
    assert set(SCRIPTS) == {"photo.py", "strokes.py", "traced.py", "words.py", "strokes_in_words.py"}
    for name, text in SCRIPTS.items():
        (folder / name).write_text(text)
        run([sys.executable, name], folder)
    said = make_strokes(folder)
    make_words(folder)
    with (
        running_stack(folder / "stack", "--model-repository", str(folder / "models")) as up,
        Client(up.broker_url) as client,
    ):
        yield Howtos(folder, up, client, said)


def test_a_torch_model_with_its_preprocessing(howtos: Howtos) -> None:
    """A photo of another size than the example's gives the answer that torch itself gives."""
    photo = Path(sklearn.datasets.__file__).parent / "images" / "flower.jpg"
    shutil.copy(photo, howtos.folder / "photo.jpg")
    (client,) = (text for text in PYTHON if "photo.jpg" in text)
    given = run([sys.executable, "-c", client], howtos.folder, SAMPHIRE_BROKER_URL=howtos.up.broker_url)
    code = SCRIPTS["photo.py"].partition("version = Path")[0] + LOCAL
    expected = run([sys.executable, "-c", code], howtos.folder)
    numbers = [[float(word) for word in text.replace("[", " ").replace("]", " ").split()] for text in (given, expected)]
    assert len(numbers[0]) == 10
    np.testing.assert_allclose(numbers[0], numbers[1], atol=1e-4)


LOCAL = """
import numpy as np
from PIL import Image
pixels = np.array(Image.open("photo.jpg").convert("RGB"))[np.newaxis]
print(served(torch.from_numpy(pixels)).detach().numpy())
"""


def test_a_keras_model(howtos: Howtos) -> None:
    """Five rows in one request, and one by one, have the answers of Keras."""
    expected = np.load(howtos.folder / "expected.npy")
    for model in ("strokes", "net"):  # the second with its file's name and its platform in the config
        together = howtos.client.submit(model, {"image": IMAGE}).result(ANSWER_S).outputs["probabilities"]
        np.testing.assert_allclose(together, expected, atol=1e-5)
    tasks = [howtos.client.submit("strokes", {"image": row[np.newaxis]}) for row in IMAGE]
    alone = [task.result(ANSWER_S).outputs["probabilities"][0] for task in tasks]
    np.testing.assert_allclose(alone, expected, atol=1e-5)


def test_what_keras_and_samphire_refuse(howtos: Howtos) -> None:
    """A model that was never called, and a file whose batch is fixed: as the page has it."""
    said = "The model provided has never called"
    assert howtos.said_by_keras.startswith(said) and said in " ".join(PAGE.split())
    eventually(lambda: "whose first dimension is not free" in howtos.listed("one"), 30, "the reason")


def test_torchscript(howtos: Howtos) -> None:
    """torch reads the file and gets the model's answer; the embedded Triton's refusal is the page's."""
    run([sys.executable, "-c", SCRIPTS["traced.py"].partition("version = Path")[0] + READ], howtos.folder)
    (shown,) = (text for text in SHOWN if text.startswith("traced"))
    eventually(lambda: howtos.listed("traced") == " ".join(shown.split()), 30, "the page's line")
    reason = shown.partition("not loaded: ")[2]
    assert f"triton: model traced did not load: {reason}\n" in howtos.up.output.read_text()


READ = """
x = torch.rand(5, 4)
torch.testing.assert_close(torch.jit.load("models/traced/1/model.pt")(x), model(x))
"""


def test_packages_beside_a_model(howtos: Howtos) -> None:
    """Two versions have two releases of one package; another package in its place is loaded with the model."""
    assert howtos.word("words") == "seven en 1.0"
    assert howtos.word("words_two", 1) == "seven en 1.0"
    assert howtos.word("words_two", 2) == "seven en 2.0"
    (package,) = (howtos.folder / "models" / "words_two" / "2" / "packages").rglob("num2words/__init__.py")
    package.write_text(package.read_text().replace("2.0", "2.0.1"))
    done = samphire(howtos.up.broker_url, "models", "reload", "words_two", "--data-dir", str(howtos.up.data_dir))
    assert done.returncode == 0, done.stdout + done.stderr
    assert howtos.word("words_two", 2) == "seven en 2.0.1"
    assert howtos.word("words_two", 1) == "seven en 1.0"


def test_an_environment_of_a_model(howtos: Howtos) -> None:
    """Nothing but the environment has this release of the package."""
    assert howtos.word("words_alone") == "seven en 3.0"


def test_an_ensemble(howtos: Howtos) -> None:
    """Images go in, words come out."""
    expected = [NAMES[best] for best in np.load(howtos.folder / "expected.npy").argmax(axis=1)]
    words = howtos.client.submit("strokes_in_words", {"image": IMAGE}).result(ANSWER_S).outputs["word"]
    assert [word.decode() for word in words[:, 0]] == [f"{name} en 1.0" for name in expected]


# -- what is not served here ------------------------------------------------------------------------


@pytest.mark.skipif(any(Path("/dev").glob("nvidia[0-9]*")), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    """The page's commands, with a model in `photo`'s place; both kinds of group have the reason in Triton's words."""
    photo = tmp_path / "models" / "photo"
    (photo / "1").mkdir(parents=True)
    (photo / "1" / "model.py").write_text("class TritonPythonModel:\n    pass\n")
    (photo / "config.pbtxt").write_text('name: "photo"\nbackend: "python"\n')
    run(typed("mkdir "), tmp_path)
    run(typed("(cat "), tmp_path)
    repository = tmp_path / "models-gpu"
    (shown,) = (text for text in SHOWN if text.startswith("photo"))
    both = copy_model(repository, "both", "photo", "")
    (both / "config.pbtxt").write_text('name: "both"\nbackend: "python"\n' + PARTS_OF_CONFIGS[1])
    with running_stack(tmp_path / "stack", "--model-repository", str(repository)) as up:

        def listed() -> dict[str, str]:
            lines = samphire(up.broker_url, "models", "list", "--json").stdout.splitlines()
            return {model["name"]: model["trouble"] for model in map(json.loads, lines)}

        troubles = eventually(lambda: len(found := listed()) == 2 and found, 30, "both models in the list")
        assert troubles["photo"] == shown.partition("not loaded: ")[2]
        assert "specifies invalid or unsupported gpu id 0" in troubles["both"]
        assert f"triton: model photo did not load: {troubles['photo']}\n" in up.output.read_text()


def test_every_config_is_one_of_tritons() -> None:
    """Its own message takes the configs of the page, their parts, and the settings of the table in models.md."""
    for name, script in SCRIPTS.items():
        (text,) = re.findall(r'^CONFIG = """(.*?)"""', script, re.DOTALL | re.MULTILINE)
        assert text_format.Parse(text, ModelConfig()).name == name.removesuffix(".py")
    parts = [text_format.Parse(text, ModelConfig()) for text in PARTS_OF_CONFIGS]
    assert parts[0].parameters["EXECUTION_ENV_PATH"].string_value == "/srv/environments/words"
    (group,) = parts[1].instance_group
    assert (group.kind, list(group.gpus), group.count) == (group.KIND_GPU, [0, 1], 2)
    table = (ROOT / "docs" / "models.md").read_text().partition("| setting |")[2].partition("\n\n")[0]
    settings = re.findall(r"^\| `(.*?)` \|", table, re.MULTILINE)
    assert len(settings) > 10
    for setting in settings:
        if setting.isidentifier():
            assert setting in ModelConfig.DESCRIPTOR.fields_by_name
        else:
            text_format.Parse(setting, ModelConfig())


def test_the_container_is_that_of_the_compose_file() -> None:
    services: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    assert services["triton-cpu"]["image"] in typed("docker run")
