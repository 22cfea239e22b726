import time

import numpy as np
import triton_python_backend_utils as pb_utils


def number(request, name):
    return int(pb_utils.get_input_tensor_by_name(request, name).as_numpy().ravel()[0])


class TritonPythonModel:
    def initialize(self, args):
        self.sums = {}

    def execute(self, requests):
        responses = []
        for request in requests:
            name, x = request.correlation_id(), number(request, "x")
            time.sleep(number(request, "ms") / 1000)
            if x < 0:
                responses.append(pb_utils.InferenceResponse([], pb_utils.TritonError("negative")))
                continue
            self.sums[name] = (0 if number(request, "START") else self.sums[name]) + x
            total = np.array([[self.sums[name]]], np.int32)
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("sum", total)]))
        return responses
