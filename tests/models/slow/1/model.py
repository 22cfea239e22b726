import json
import time

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        parameters = json.loads(args["model_config"])["parameters"]
        time.sleep(float(parameters.get("load_s", {"string_value": "0"})["string_value"]))

    def execute(self, requests):
        responses = []
        for request in requests:
            seconds = pb_utils.get_input_tensor_by_name(request, "seconds").as_numpy()
            until = time.monotonic() + float(seconds.max())
            while time.monotonic() < until and not request.is_cancelled():
                time.sleep(min(0.05, max(0.0, until - time.monotonic())))
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("slept", seconds)]))
        return responses
