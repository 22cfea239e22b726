"""Triton backend `onnxruntime`, in Python: serves `<version>/model.onnx` with ONNX Runtime.

It stands in for Triton's own onnxruntime backend where that is not installed (the embedded stack), so
that one model repository serves in both. Python-based backend: see "Python-based backends" in the
documentation of triton-inference-server/python_backend.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils

PREFERRED_PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")


class TritonPythonModel:
    """One instance of one model version."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the version's model file on the GPU where there is one."""
        available = onnxruntime.get_available_providers()
        providers = [provider for provider in PREFERRED_PROVIDERS if provider in available]
        if args["model_instance_kind"] == "CPU":
            providers = ["CPUExecutionProvider"]
        config = json.loads(args["model_config"])
        filename = config.get("default_model_filename") or "model.onnx"
        path = Path(args["model_repository"]) / args["model_version"] / filename
        options = onnxruntime.SessionOptions()
        # The embedded stack shares few cores with its broker and workers: no spinning thread pools.
        options.intra_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        self.output_names = [output["name"] for output in config["output"]]

    def execute(self, requests: list[Any]) -> list[Any]:
        """Run each request through the session; one that fails does not fail the others."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        wanted = [name for name in self.output_names if name in request.requested_output_names()]
        feeds = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        try:
            outputs = self.session.run(wanted, feeds)
        except Exception as error:  # noqa: BLE001 - whatever the runtime raises belongs to this request
            return pb_utils.InferenceResponse([], pb_utils.TritonError(str(error)))
        tensors = [
            pb_utils.Tensor(name, np.ascontiguousarray(output)) for name, output in zip(wanted, outputs, strict=True)
        ]
        return pb_utils.InferenceResponse(tensors)
