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

DATATYPES = {
    "tensor(bool)": "TYPE_BOOL",
    "tensor(uint8)": "TYPE_UINT8",
    "tensor(uint16)": "TYPE_UINT16",
    "tensor(uint32)": "TYPE_UINT32",
    "tensor(uint64)": "TYPE_UINT64",
    "tensor(int8)": "TYPE_INT8",
    "tensor(int16)": "TYPE_INT16",
    "tensor(int32)": "TYPE_INT32",
    "tensor(int64)": "TYPE_INT64",
    "tensor(float16)": "TYPE_FP16",
    "tensor(bfloat16)": "TYPE_BF16",
    "tensor(float)": "TYPE_FP32",
    "tensor(double)": "TYPE_FP64",
    "tensor(string)": "TYPE_STRING",
}
"""ONNX Runtime's names of types to those of a config."""

PREFERRED_PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")


def check_config(config: dict[str, Any], inputs: list[Any], outputs: list[Any]) -> None:
    """Refuse a config that says something else than the ONNX file, as Triton's own backend does.

    Args:
        config: the model's, as Triton gives it.
        inputs, outputs: of the ONNX file, each with `name`, `type` and `shape` (no number: that dimension is free).

    Raises:
        TritonModelException: with what the file has and what the config says.
    """
    of_states = {name for state in _states(config) for name in (state["input_name"], state["output_name"])}
    controls = {control["name"] for control in config.get("sequence_batching", {}).get("control_input", [])}
    batched = int(config.get("max_batch_size", 0)) > 0
    for what, said, has in (("input", config["input"], inputs), ("output", config["output"], outputs)):
        known = {tensor.name: tensor for tensor in has}
        for tensor in said:
            if tensor["name"] not in known:
                names = ", ".join(sorted(known))
                raise _refusal(f"the config has the {what} {tensor['name']!r}, the ONNX file has {names}")
            _check_tensor(f"{what} {tensor['name']!r}", tensor, known[tensor["name"]], batched)
        if what == "input" and (missing := known.keys() - {tensor["name"] for tensor in said} - of_states - controls):
            raise _refusal(f"the ONNX file has the input {sorted(missing)[0]!r}, and the config does not")


def _states(config: dict[str, Any]) -> list[dict[str, Any]]:
    return list(config.get("sequence_batching", {}).get("state", []))


def _check_tensor(what: str, said: dict[str, Any], has: Any, batched: bool) -> None:
    if has.type in DATATYPES and said["data_type"] != DATATYPES[has.type]:
        raise _refusal(f"{what} is {DATATYPES[has.type]} in the ONNX file, and {said['data_type']} in the config")
    shape = [dimension if isinstance(dimension, int) else -1 for dimension in has.shape]
    reshape = said.get("reshape")
    dims = [int(dimension) for dimension in (reshape["shape"] if reshape else said["dims"])]
    if batched:
        if not shape or shape[0] != -1:
            raise _refusal(
                f"{what} has the shape {shape} in the ONNX file, whose first dimension is not free: export the model "
                "with a free first dimension, or set max_batch_size: 0"
            )
        shape = shape[1:]
    if len(shape) != len(dims) or any(fixed not in (-1, dim) for fixed, dim in zip(shape, dims, strict=True)):
        rows = "without the batch dimension " if batched else ""
        raise _refusal(f"{what} has the shape {shape} {rows}in the ONNX file, and dims {dims} in the config")


def _refusal(reason: str) -> Exception:
    error: Exception = pb_utils.TritonModelException(f"the config contradicts the model: {reason}")
    return error


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
        check_config(config, self.session.get_inputs(), self.session.get_outputs())
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
