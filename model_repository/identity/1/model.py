"""Triton Python-backend model that returns its inputs: a yardstick for tests and benchmarks."""

from typing import Any

import triton_python_backend_utils as pb_utils


def _copy(tensor: Any) -> Any:
    """Return `tensor` under its output name, with datatype and shape unchanged."""
    name = tensor.name().replace("input_", "output_", 1)
    if name == "output_bf16":  # numpy has no bfloat16, so this datatype goes through DLPack
        return pb_utils.Tensor.from_dlpack(name, tensor.to_dlpack())
    return pb_utils.Tensor(name, tensor.as_numpy())


class TritonPythonModel:
    """The class that Triton's Python backend looks for."""

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request with copies of its own tensors."""
        return [pb_utils.InferenceResponse([_copy(t) for t in request.inputs()]) for request in requests]
