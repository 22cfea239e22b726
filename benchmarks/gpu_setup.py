"""`make bench-gpu`: installs the wheels of `make gpu-wheels` on a machine without a network, and runs the benchmark.

Needs nothing but Python, its pip, and torch. `python3 benchmarks/gpu_setup.py [OPTION...]`, options as benchmarks.gpu.

The wheels go into a virtual environment and not into a folder on PYTHONPATH: Triton's stub, which runs the models, does
not read that variable, and takes the packages of the first python3 on the PATH. There our numpy comes before that of
the machine. The folders where the machine has its own packages follow, so that torch is found.
"""

from __future__ import annotations

import ctypes
import lzma
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WHEELS = Path(os.environ.get("GPU_WHEELS", ROOT / "build" / "gpu-wheels"))
ENVIRONMENT = ROOT / "build" / "gpu-environment"
VERSION = "{}.{}".format(*sys.version_info)
PROBE = """
import numpy, torch
assert numpy.__version__.startswith("1."), numpy.__version__
assert torch.from_numpy(numpy.ones(1)).numpy()[0] == 1
print("torch", torch.__version__, "with numpy", numpy.__version__, "CUDA", torch.cuda.is_available())
"""


def install() -> Path:
    """Make the environment; its Python."""
    made_for = (WHEELS / "PYTHON").read_text().strip() if WHEELS.is_dir() else None
    if made_for != VERSION:
        raise SystemExit(
            f"{WHEELS}: expected wheels for Python {VERSION}, found {made_for}: make gpu-wheels makes them"
        )
    venv.create(ENVIRONMENT, clear=True, with_pip=False)
    packages = ENVIRONMENT / "lib" / f"python{VERSION}" / "site-packages"
    wheels = sorted(map(str, WHEELS.glob("*.whl")))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    subprocess.run([*pip, "--target", str(packages), *wheels], check=True)
    theirs = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (packages / "machine.pth").write_text("".join(f"{path}\n" for path in theirs))
    return ENVIRONMENT / "bin" / "python"


def library_folders() -> list[str]:
    """Where to find Python's own library, which Triton's stub is linked with; some installations lack it.

    Raises:
        SystemExit: it is neither here nor among the wheels.
    """
    name = f"libpython{VERSION}.so.1.0"
    given = os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)
    if (Path(sysconfig.get_config_var("LIBDIR") or "/") / name).is_file():
        return given  # Samphire looks there
    try:
        ctypes.CDLL(name)
    except OSError as error:
        packed, unpacked = WHEELS / f"{name}.xz", ENVIRONMENT / "lib" / name
        if not packed.is_file():
            raise SystemExit(f"{name} is missing, which Triton needs for Python models: {error}") from error
        unpacked.write_bytes(lzma.decompress(packed.read_bytes()))
        return [str(unpacked.parent), *given]
    return given


def main() -> None:
    """Set up, then become the benchmark."""
    python = install()
    paths = [ROOT / "clients" / "python", ROOT / "broker", ROOT / "workers", ROOT]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, library_folders())),
    }
    subprocess.run([python, "-c", PROBE], env=environment, check=True)
    os.chdir(ROOT)
    os.execve(python, [str(python), "-m", "benchmarks.gpu", *sys.argv[1:]], environment)


if __name__ == "__main__":
    main()
