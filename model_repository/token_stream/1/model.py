"""Triton Python-backend model that streams the tokens of a text: decoupled, with a thread for each stream."""

import re
import threading
import time
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

DELAY_MAX_MS = 60_000
CHECK_INTERVAL_S = 0.1
"""A stream that waits for its next token notices within this time that it was cancelled."""

_TOKEN = re.compile(r"\s*(?:\w{1,8}|[^\w\s])|\s+")
"""Up to eight letters or one sign, with the white space before it; every character is in exactly one token."""


def _read(request: Any) -> tuple[list[str], float]:
    """Return the tokens of BYTES `text` [1], and the seconds before each from INT32 `delay_ms` [1].

    Raises:
        ValueError: the text is not UTF-8, or the delay is out of range.
    """
    text = pb_utils.get_input_tensor_by_name(request, "text").as_numpy()[0]
    delay = pb_utils.get_input_tensor_by_name(request, "delay_ms")
    delay_ms = 0 if delay is None else int(delay.as_numpy()[0])
    if not 0 <= delay_ms <= DELAY_MAX_MS:
        raise ValueError(f"delay_ms: expected 0 to {DELAY_MAX_MS}, given {delay_ms}")
    try:
        return _TOKEN.findall(text.decode()), delay_ms / 1000
    except UnicodeDecodeError as error:
        raise ValueError(f"text: expected UTF-8, given bytes that are not: {error}") from error


def _end(sender: Any, error: Any = None) -> None:
    """Send the final response: an empty one, or the TritonError `error`."""
    final = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
    if error is None:
        sender.send(flags=final)
    else:
        sender.send(pb_utils.InferenceResponse([], error), flags=final)


class TritonPythonModel:
    """The class that Triton's Python backend looks for."""

    def initialize(self, args: dict[str, str]) -> None:
        """Begin without streams."""
        self._stopping = threading.Event()
        self._streams: set[threading.Thread] = set()

    def execute(self, requests: list[Any]) -> None:
        """Give each request a thread of its own and return at once, so that streams run side by side."""
        self._streams = {thread for thread in self._streams if thread.is_alive()}
        for request in requests:
            thread = threading.Thread(target=self._serve, args=(request, request.get_response_sender()))
            thread.start()
            self._streams.add(thread)

    def finalize(self) -> None:
        """End every stream."""
        self._stopping.set()
        for thread in self._streams:
            thread.join()

    def _serve(self, request: Any, sender: Any) -> None:
        """Answer one request; whatever happens, its stream ends."""
        try:
            self._stream(sender, *_read(request))
        except ValueError as error:
            _end(sender, pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG))
        except Exception as error:  # noqa: BLE001 - the client must hear of it, whatever it is
            _end(sender, pb_utils.TritonError(f"the stream broke: {error!r}"))
        else:
            _end(sender)

    def _stream(self, sender: Any, tokens: list[str], delay_s: float) -> None:
        """Send tokens until all are sent or the request was cancelled.

        Raises:
            RuntimeError: the model is being unloaded.
        """
        for index, token in enumerate(tokens):
            due = time.monotonic() + delay_s
            while not sender.is_cancelled():
                left_s = max(0.0, due - time.monotonic())
                if self._stopping.wait(min(left_s, CHECK_INTERVAL_S)):
                    raise RuntimeError("the model is being unloaded")
                if left_s <= CHECK_INTERVAL_S:
                    break
            else:
                return
            tensors = [
                pb_utils.Tensor("token", np.array([token.encode()], np.object_)),
                pb_utils.Tensor("index", np.array([index], np.int32)),
            ]
            sender.send(pb_utils.InferenceResponse(tensors))
