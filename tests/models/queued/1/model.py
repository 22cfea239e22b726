import time

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            seconds = pb_utils.get_input_tensor_by_name(request, "seconds").as_numpy()
            until = time.monotonic() + float(seconds.max())
            while time.monotonic() < until and not request.is_cancelled():
                time.sleep(min(0.05, max(0.0, until - time.monotonic())))
            timeout = pb_utils.Tensor("timeout_us", np.array([[request.timeout()]], np.int64))
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("slept", seconds), timeout]))
        return responses
