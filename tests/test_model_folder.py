"""A folder of models and its mirror: what is read, what is refused, and that nothing is left half done."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
from pathlib import Path

import pytest

from samphire_broker.repository import mirror as mirror_module
from samphire_broker.repository.folder import Model, ModelFolderError, ignored_versions, look, mirrored
from samphire_broker.repository.mirror import Mirror


def write(folder: Path, *paths: str, text: str = "x") -> None:
    for path in paths:
        target = folder / path
        if path.endswith("/"):
            target.mkdir(parents=True, exist_ok=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)


def everything(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def begin(mirror: Mirror) -> dict[str, Model]:
    return asyncio.run(mirror.begin())


def test_a_mirror_has_exactly_what_the_folder_has(tmp_path: Path) -> None:
    """Deleted versions and models too; hidden files, caches and files beside the models are no models."""
    source, data = tmp_path / "models", tmp_path / "data"
    write(source, "a/config.pbtxt", "a/1/model.onnx", "a/2/model.onnx", "b/config.pbtxt", "ensemble/1/")
    write(source, ".git/config", "README.md", "__pycache__/a", "a/1/__pycache__/m.pyc", "a/.cache/x")
    mirror = Mirror(source, data)
    models = begin(mirror)
    assert sorted(models) == ["a", "b", "ensemble"]
    assert not any(model.trouble for model in models.values())
    assert sorted(everything(mirror.target)) == ["a/1/model.onnx", "a/2/model.onnx", "a/config.pbtxt", "b/config.pbtxt"]
    assert (mirror.target / "ensemble" / "1").is_dir()
    shutil.rmtree(source / "a" / "2")
    shutil.rmtree(source / "b")
    write(source, "a/config.pbtxt", text="new")
    write(mirror.target, "a/executions", "left/1/model.py")
    begin(mirror)
    assert everything(mirror.target) == {"a/1/model.onnx": "x", "a/config.pbtxt": "new"}
    assert mirrored(mirror.target) == look(source)


def test_what_has_not_changed_is_not_copied_again(tmp_path: Path) -> None:
    """A model may be large."""
    source = tmp_path / "models"
    write(source, "a/config.pbtxt", "a/1/model.onnx", "b/config.pbtxt")
    mirror = Mirror(source, tmp_path / "data")
    begin(mirror)
    before = {path: path.stat().st_ino for path in mirror.target.rglob("*") if path.is_file()}
    write(source, "b/config.pbtxt", text="new")
    begin(mirror)
    after = {path: path.stat().st_ino for path in mirror.target.rglob("*") if path.is_file()}
    assert [path.parent.name for path in before if before[path] != after[path]] == ["b"]


def test_links_are_followed(tmp_path: Path) -> None:
    """A model, a version and a file may lie elsewhere."""
    write(tmp_path / "elsewhere", "a/config.pbtxt", "a/1/model.onnx", "weights", "v2/model.onnx")
    source = tmp_path / "models"
    source.mkdir()
    (source / "a").symlink_to(tmp_path / "elsewhere" / "a")
    write(source, "b/config.pbtxt")
    (source / "b" / "2").symlink_to(tmp_path / "elsewhere" / "v2")
    (source / "b" / "weights").symlink_to(tmp_path / "elsewhere" / "weights")
    mirror = Mirror(source, tmp_path / "data")
    begin(mirror)
    assert sorted(everything(mirror.target)) == [
        "a/1/model.onnx",
        "a/config.pbtxt",
        "b/2/model.onnx",
        "b/config.pbtxt",
        "b/weights",
    ]
    assert not any(path.is_symlink() for path in mirror.target.rglob("*"))


def test_one_bad_model_does_not_stop_the_others(tmp_path: Path) -> None:
    """Each says what is wrong with it; what an earlier start had of it is not served."""
    source, data = tmp_path / "models", tmp_path / "data"
    write(source, "good/config.pbtxt", "loop/config.pbtxt", "fifo/config.pbtxt", "with space/config.pbtxt")
    write(source, "broken/config.pbtxt", "self/config.pbtxt")
    write(data, "model_repository/broken/config.pbtxt")
    (source / "loop" / "1").symlink_to(source / "loop")
    (source / "self" / "me").symlink_to(source / "self" / "me")
    (source / "broken" / "model.onnx").symlink_to(tmp_path / "nowhere")
    os.mkfifo(source / "fifo" / "pipe")
    (source / "file").symlink_to(source / "good" / "config.pbtxt")
    mirror = Mirror(source, data)
    troubles = {name: model.trouble for name, model in begin(mirror).items() if model.trouble}
    assert sorted(troubles) == ["broken", "fifo", "file", "loop", "self", "with space"]
    assert "model.onnx cannot be read: No such file or directory" in troubles["broken"]
    assert "pipe is no regular file" in troubles["fifo"]
    assert "is no folder" in troubles["file"]
    assert "a link to a folder that it lies in" in troubles["loop"]
    assert "Too many levels of symbolic links" in troubles["self"]
    assert "expected a model name" in troubles["with space"]
    assert list(mirrored(mirror.target)) == ["good"]


@pytest.mark.parametrize(
    ("paths", "text"),
    [
        ((), "has no models: expected a folder for each model"),
        (("README.md",), "has no models"),
        ((".git/config",), "has no models"),
        (("config.pbtxt", "1/model.onnx"), "is itself a model: expected the folder above it"),
        (("1/model.onnx", "2/model.onnx"), "is itself a model"),
    ],
)
def test_a_folder_without_models_is_refused(tmp_path: Path, paths: tuple[str, ...], text: str) -> None:
    """With what is expected; the mirror stays as it was."""
    source, data = tmp_path / "models", tmp_path / "data"
    source.mkdir()
    write(source, *paths)
    write(data, "model_repository/a/config.pbtxt")
    with pytest.raises(ModelFolderError, match=text):
        begin(Mirror(source, data))
    assert list(mirrored(data / "model_repository")) == ["a"]
    with pytest.raises(ModelFolderError, match="cannot be read: No such file"):
        begin(Mirror(tmp_path / "nowhere", data))


@pytest.mark.parametrize("fault", ["full", "changes"])
def test_a_copy_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """A disk that is full, a file that changes while it is copied: in the middle of a model."""
    source = tmp_path / "models"
    write(source, "a/config.pbtxt", "a/1/model.onnx", text="old")
    mirror = Mirror(source, tmp_path / "data")
    begin(mirror)
    write(source, "a/config.pbtxt", "a/1/model.onnx", text="newer")
    copied: list[str] = []

    def copy(path: Path, target: Path) -> None:
        copied.append(path.name)
        if fault == "full" and path.name == "config.pbtxt":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        copy2(path, target)
        if fault == "changes":
            path.write_text("newest of all")

    copy2 = shutil.copy2
    monkeypatch.setattr(mirror_module.shutil, "copy2", copy)
    with pytest.raises(ModelFolderError, match="No space left on device" if fault == "full" else "has changed while"):
        mirror.put("a", look(source)["a"])
    assert copied
    monkeypatch.undo()
    assert everything(mirror.target) == {"a/1/model.onnx": "old", "a/config.pbtxt": "old"}
    assert not any(path.is_file() for path in (tmp_path / "data" / "model_repository.drafts").rglob("*"))
    begin(mirror)
    assert everything(mirror.target) == everything(source)


def test_undo_puts_back_what_was_there(tmp_path: Path) -> None:
    """Nothing of a model that is new: Triton would load it again at each start."""
    source = tmp_path / "models"
    write(source, "a/config.pbtxt", text="old")
    mirror = Mirror(source, tmp_path / "data")
    begin(mirror)
    write(source, "a/config.pbtxt", "b/config.pbtxt", text="newer")
    for name, model in look(source).items():
        mirror.put(name, model)
        mirror.undo(name)
    assert everything(mirror.target) == {"a/config.pbtxt": "old"}


def test_names_that_are_not_utf_8(tmp_path: Path) -> None:
    """They are told with their bytes, as text that can be sent."""
    source = tmp_path / "models"
    write(source, "good/config.pbtxt", "link/config.pbtxt")
    (source / os.fsdecode(b"caf\xe9")).mkdir()
    (source / "link" / os.fsdecode(b"gon\xe9")).symlink_to(tmp_path / "nowhere")
    troubles = {name: model.trouble for name, model in begin(Mirror(source, tmp_path / "data")).items()}
    assert sorted(troubles) == ["caf\\udce9", "good", "link"]
    assert not troubles["good"] and "gon\\udce9 cannot be read" in troubles["link"]
    for text in (*troubles, *troubles.values()):
        text.encode()


def test_versions_that_triton_ignores(tmp_path: Path) -> None:
    """A number that begins with 0 is none, and Triton does not say so."""
    write(tmp_path, "a/config.pbtxt", "a/01/model.onnx", "a/1/model.onnx", "a/0/model.onnx", "a/data/0")
    assert ignored_versions(look(tmp_path)["a"]) == ["0", "01"]
