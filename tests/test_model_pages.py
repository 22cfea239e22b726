"""docs/models.md: what it says to type is typed, in an empty folder."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
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
