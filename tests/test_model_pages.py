"""docs/models.md: what it says to type is typed, in an empty folder."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import sklearn.datasets
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from tests.stacks import ENDS_S, SAMPHIRE, clean_environment, eventually, running_stack

PAGE = (Path(__file__).parents[1] / "docs" / "models.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
TYPED = [line.removeprefix("$ ") for line in re.findall(r"^\$ .*$", PAGE, re.MULTILINE)]


def test_from_nothing_to_an_answer(tmp_path: Path) -> None:
    """Three commands; the backend's code gets the same answer."""
    (tmp_path / "iris.py").write_text(PYTHON[0])
    make, serve, submit = TYPED
    assert make == "python iris.py" and serve.startswith("samphire up ")
    subprocess.run([sys.executable, "iris.py"], cwd=tmp_path, check=True, timeout=ENDS_S)
    options = [str(tmp_path / word) if word == "models" else word for word in serve.split()[2:]]
    with running_stack(tmp_path / "stack", *options) as up:
        environment = clean_environment() | {"SAMPHIRE_BROKER_URL": up.broker_url}

        def run(command: list[str] | str, **changes: Any) -> str:
            return subprocess.run(
                command, capture_output=True, text=True, timeout=ENDS_S, check=True, env=environment, **changes
            ).stdout

        typed = run(submit.replace("samphire", SAMPHIRE, 1), shell=True)
        assert "iris version 1, task " in typed
        pipeline = make_pipeline(StandardScaler(), LogisticRegression()).fit(*load_iris(return_X_y=True))
        expected = pipeline.predict_proba(np.array([[5.1, 3.5, 1.4, 0.2]], np.float32))[0]
        given = run([sys.executable, "-c", PYTHON[1]])
        for text in (given.strip("[]\n"), typed.partition("probabilities FP32[1, 3]: ")[2]):
            np.testing.assert_allclose([float(word) for word in text.replace(",", " ").split()], expected, atol=1e-4)
        eventually(lambda: "iris" in run([SAMPHIRE, "models", "list"]), ENDS_S, "the model in the list")


def test_a_torch_model_with_its_preprocessing(tmp_path: Path) -> None:
    """A photo of another size than the example's gives the answer that torch itself gives."""
    (tmp_path / "photo.py").write_text(PYTHON[2])
    subprocess.run([sys.executable, "photo.py"], cwd=tmp_path, check=True, timeout=ENDS_S, capture_output=True)
    photo = Path(sklearn.datasets.__file__).parent / "images" / "flower.jpg"
    shutil.copy(photo, tmp_path / "photo.jpg")
    with running_stack(tmp_path / "stack", "--model-repository", str(tmp_path / "models")) as up:
        environment = clean_environment() | {"SAMPHIRE_BROKER_URL": up.broker_url}
        client = [sys.executable, "-c", PYTHON[3]]
        options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": ENDS_S, "check": True}
        given = subprocess.run(client, cwd=tmp_path, env=environment, **options).stdout
    code = PYTHON[2].partition("version = Path")[0] + LOCAL
    expected = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, **options).stdout
    numbers = [[float(word) for word in text.replace("[", " ").replace("]", " ").split()] for text in (given, expected)]
    assert len(numbers[0]) == 10
    np.testing.assert_allclose(numbers[0], numbers[1], atol=1e-4)


LOCAL = """
import numpy as np
from PIL import Image
pixels = np.array(Image.open("photo.jpg").convert("RGB"))[np.newaxis]
print(served(torch.from_numpy(pixels)).detach().numpy())
"""
