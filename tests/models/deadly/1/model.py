import os
import signal
import time

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
            if (x % 1 == 0.5).any():
                time.sleep(7)
                x = x - 0.5
            if (x == 666).any():
                os._exit(1)  # as the kernel does when memory runs out
            if (x == 999).any():
                os.kill(os.getppid(), signal.SIGKILL)
                time.sleep(60)
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("y", x * 2)]))
        return responses
