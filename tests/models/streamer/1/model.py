import json
import os
import threading
import time
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonPythonModel:
    """Plans: outputs; interval_s between them; size of each; end (with_last, alone, exit: the process ends);
    error_after; wrong_after (an output of another type); progress; slots (two such requests run at once);
    ignores_cancel; log (a file to which begin and end of each request are written)."""

    def initialize(self, args):
        self.slots = threading.Semaphore(2)
        self.free = threading.Semaphore(10**6)

    def execute(self, requests):
        for request in requests:
            threading.Thread(target=self.serve, args=(request, request.get_response_sender())).start()

    def serve(self, request, sender):
        plan = json.loads(pb_utils.get_input_tensor_by_name(request, "plan").as_numpy()[0])
        with self.slots if plan.get("slots") else self.free:
            note(plan, "begin")
            ended = self.give_out(plan, sender)
            note(plan, ended)
        if plan.get("end") == "exit":
            os._exit(1)
        if ended == "cancelled" or not (plan.get("outputs") and plan.get("end") == "with_last"):
            sender.send(flags=FINAL)  # Triton dies where is_cancelled() is asked after this

    def give_out(self, plan, sender):
        outputs, begun = plan.get("outputs", 3), time.monotonic()
        for number in range(outputs):
            if number == plan.get("error_after", -1):
                sender.send(pb_utils.InferenceResponse([], pb_utils.TritonError("the model raised")))
                return "raised"
            if not wait(plan, sender, begun + (number + 1) * plan.get("interval_s", 0.0)):
                return "cancelled"
            if plan.get("progress"):
                told = [
                    pb_utils.Tensor("samphire_progress", np.array([(number + 1) / outputs], np.float32)),
                    pb_utils.Tensor("samphire_message", np.array([f"step {number + 1}".encode()], np.object_)),
                ]
                sender.send(pb_utils.InferenceResponse(told))
            value = np.full(plan.get("size", 1), number, np.float32)
            if number == plan.get("wrong_after", -1):
                value = value.astype(np.int64)
            tensors = [pb_utils.Tensor("value", value), pb_utils.Tensor("at", np.array([time.time()], np.float64))]
            is_last = number == outputs - 1 and plan.get("end") == "with_last"
            sender.send(pb_utils.InferenceResponse(tensors), **({"flags": FINAL} if is_last else {}))
        return "end"


def wait(plan, sender, until):
    """Whether the request is still wanted then."""
    while (left := until - time.monotonic()) > 0:
        if not plan.get("ignores_cancel") and sender.is_cancelled():
            return False
        time.sleep(min(left, 0.02))
    return True


def note(plan, what):
    if "log" in plan:
        with Path(plan["log"]).open("a") as log:
            log.write(f"{plan.get('name', '')} {what} {time.time()} {os.getpid()}\n")
