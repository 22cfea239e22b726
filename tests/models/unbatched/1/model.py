import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
            text = pb_utils.get_input_tensor_by_name(request, "text")
            name = text.as_numpy()[0].decode() if text is not None else "nobody"
            greeting = np.array([f"hello {name}".encode()], dtype=np.object_)
            tensors = [pb_utils.Tensor("y", x), pb_utils.Tensor("greeting", greeting)]
            responses.append(pb_utils.InferenceResponse(tensors))
        return responses
