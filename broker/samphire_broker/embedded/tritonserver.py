"""The embedded Triton: the `tritonserver` binary of the nvidia-pytriton wheel, on loopback.

The wheel carries the Python backend only; `onnxruntime` is added as a Python-based backend. Model
control is explicit: the stack loads every model after each start, so a restarted server gets its
versions back.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import os
import shutil
import stat
import sys
import sysconfig
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import numpy as np
from tritonclient.grpc import InferInput, InferRequestedOutput
from tritonclient.grpc.aio import InferenceServerClient
from tritonclient.utils import InferenceServerException

from samphire_broker.embedded.ports import LOOPBACK
from samphire_broker.embedded.process import PartError, PartSpec
from samphire_broker.repository.loads import BACKENDS, Loads, StillLoadingError

SHARED_MEMORY = Path("/dev/shm")

Note = Callable[[str, str], None]
"""Called with a model and why it did not load."""


def _package_folder() -> Path:
    found = importlib.util.find_spec("pytriton")  # found, not imported: the import is slow and not needed
    if found is None or not found.submodule_search_locations:
        raise PartError("no Triton found: pip install 'samphire[embedded]', or set SAMPHIRE_TRITON_URLS")
    return Path(found.submodule_search_locations[0])


def _lay_out_backends(package: Path, target: Path) -> None:
    """Make the backends folder: copies, because Triton refuses links that lead out of a backend."""
    shutil.rmtree(target, ignore_errors=True)
    python_backend = target / "python"
    python_backend.mkdir(parents=True)
    source = package / "tritonserver" / "backends" / "python"
    for path in [*source.glob("*.py"), source / "libtriton_python.so"]:
        shutil.copyfile(path, python_backend / path.name)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = package / "tritonserver" / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.is_file():
        raise PartError(f"the embedded Triton has no Python {version} stub: use Python 3.11")
    shutil.copyfile(stub, python_backend / stub.name)
    (python_backend / stub.name).chmod(stat.S_IRWXU)
    ours = resources.files("samphire_broker.embedded") / "backends" / "onnxruntime" / "model.py"
    (target / "onnxruntime").mkdir()
    (target / "onnxruntime" / "model.py").write_bytes(ours.read_bytes())


async def load_all_models(client: InferenceServerClient, loads: Loads, note: Note, failed: set[str]) -> None:
    """Load every model of the repository; one that is broken is reported and does not stop the rest.

    `failed` has those that did not load the last time: that they do now is told as well.
    """
    index = await client.get_model_repository_index(as_json=True)
    for name in sorted({entry["name"] for entry in index.get("models", [])}):
        try:
            reason = await loads.load(name)
        except StillLoadingError as error:
            reason = str(error)
        if reason or name in failed:
            note(name, reason)
        (failed.add if reason else failed.discard)(name)


async def probe_numpy(client: InferenceServerClient) -> None:
    """Send values through `identity` and compare them, where that model is loaded.

    Raises:
        PartError: something else came back (numpy 2 makes the stub return empty outputs, silently).
    """
    if not await client.is_model_ready("identity"):
        return
    values = np.arange(4, dtype=np.float32).reshape(1, 4)
    tensor = InferInput("input_fp32", [1, 4], "FP32")
    tensor.set_data_from_numpy(values)
    wanted = [InferRequestedOutput("output_fp32")]
    result = await client.infer("identity", [tensor], outputs=wanted, client_timeout=30)
    echoed = result.as_numpy("output_fp32")
    if echoed is None or not np.array_equal(echoed, values):
        raise PartError(
            f"the embedded Triton returned {echoed!r} for {values!r}: its Python stub needs numpy<2 "
            f"(installed: {np.__version__})"
        )


def triton_spec(
    data_dir: Path,
    grpc_port: int,
    http_port: int,
    metrics_port: int,
    progress: Callable[[str], None],
    note: Note = lambda model, reason: None,
) -> PartSpec:
    """Triton over `data_dir/model_repository`, every address bound to loopback; `note` is told what does not load.

    Raises:
        PartError: the nvidia-pytriton wheel is missing.
    """
    package = _package_folder()
    backends = data_dir / "triton" / "backends"
    log_file = data_dir / "logs" / "triton.log"
    failed: set[str] = set()
    shm_prefix = "samphire-" + hashlib.sha256(str(data_dir).encode()).hexdigest()[:12]
    command = [str(package / "tritonserver" / "bin" / "tritonserver")]
    command += [f"--model-repository={data_dir / 'model_repository'}", f"--backend-directory={backends}"]
    # One model that does not load is that model's trouble, not the server's: it stays ready for the others.
    command += ["--model-control-mode=explicit", "--exit-on-error=false", "--strict-readiness=false"]
    command += [f"--grpc-address={LOOPBACK}", f"--grpc-port={grpc_port}"]
    command += [f"--http-address={LOOPBACK}", f"--http-port={http_port}"]
    command += [f"--metrics-address={LOOPBACK}", f"--metrics-port={metrics_port}"]
    command += ["--disable-auto-complete-config"]
    for backend in BACKENDS:
        command.append(f"--backend-config={backend},shm-region-prefix-name={shm_prefix}-{backend}-")

    def unlink_shared_memory() -> None:
        for region in SHARED_MEMORY.glob(f"{shm_prefix}-*"):
            region.unlink(missing_ok=True)

    def before_start() -> None:
        unlink_shared_memory()
        _lay_out_backends(package, backends)

    async def wait_ready(_pid: int) -> None:
        async with InferenceServerClient(f"{LOOPBACK}:{grpc_port}") as client:
            while True:
                try:
                    if await client.is_server_ready(client_timeout=2):
                        break
                except InferenceServerException:  # not listening yet
                    pass
                await asyncio.sleep(0.1)
            await load_all_models(client, Loads(client, log_file, progress), note, failed)
            await probe_numpy(client)

    libraries = [str(package.parent / "nvidia_pytriton.libs"), sysconfig.get_config_var("LIBDIR")]
    return PartSpec(
        name="triton",
        command=command,
        env={
            # The stub embeds an isolated interpreter: PYTHONPATH is ignored, and it takes the packages of the
            # first python3 on the PATH. With another than ours it could find numpy 2 there.
            "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}",
            "LD_LIBRARY_PATH": ":".join(filter(None, [*libraries, os.environ.get("LD_LIBRARY_PATH")])),
        },
        log_file=log_file,
        address=f"{LOOPBACK}:{grpc_port}",
        wait_ready=wait_ready,
        ready_timeout_s=300.0,
        stop_timeout_s=20.0,
        before_start=before_start,
        after_stop=unlink_shared_memory,
    )
