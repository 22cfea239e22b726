"""Triton Python-backend model for measuring streams: a thread for each, numbers at an even pace with their time."""

import threading
import time
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """The class that Triton's Python backend looks for."""

    def execute(self, requests: list[Any]) -> None:
        """Give each request a thread of its own and return at once."""
        for request in requests:
            count = int(pb_utils.get_input_tensor_by_name(request, "count").as_numpy()[0])
            interval_s = float(pb_utils.get_input_tensor_by_name(request, "interval_s").as_numpy()[0])
            threading.Thread(target=self.tick, args=(request.get_response_sender(), count, interval_s)).start()

    def tick(self, sender: Any, count: int, interval_s: float) -> None:
        """Send numbers from 0 on, each in its time whatever the one before took."""
        begun = time.monotonic()
        for number in range(count):
            time.sleep(max(0.0, begun + number * interval_s - time.monotonic()))
            if sender.is_cancelled():
                break
            tensors = [
                pb_utils.Tensor("number", np.array([number], np.int32)),
                pb_utils.Tensor("at", np.array([time.time()], np.float64)),
            ]
            sender.send(pb_utils.InferenceResponse(tensors))
        sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
