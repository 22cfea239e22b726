import numpy as np
import triton_python_backend_utils as pb_utils

STATUSES = ("internal", "unavailable", "not_found", "cancelled")


def tensors(rows, how):
    y = np.ones((rows + (how == "row"), 2 + (how == "shape")), np.float64 if how == "datatype" else np.float32)
    z = np.full((rows, 1), b"fine", np.object_)
    made = [pb_utils.Tensor("y", y), pb_utils.Tensor("z", z)]
    if how == "extra":
        made.append(pb_utils.Tensor("w", y))
    return made[:0] if how == "nothing" else made[:1] if how == "missing" else made


class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            rows = pb_utils.get_input_tensor_by_name(request, "how").as_numpy().ravel()
            how, _, text = next((row for row in rows if row != b"fine"), b"fine").decode().partition(":")
            if how == "raise":
                raise OSError(104, text)
            if how == "large":
                text, how = "x" * int(text), "internal"
            if how in STATUSES:
                responses.append(
                    pb_utils.InferenceResponse(
                        [], pb_utils.TritonError(text, getattr(pb_utils.TritonError, how.upper()))
                    )
                )
            else:
                responses.append(pb_utils.InferenceResponse(tensors(len(rows), how)))
        return responses
