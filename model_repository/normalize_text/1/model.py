"""Triton Python-backend model that gives texts which mean the same one spelling, for search and deduplication."""

import unicodedata
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils


def _normalize(text: str) -> str:
    """Return `text` in NFKC, case folded, with single spaces and none at the ends."""
    folded = unicodedata.normalize("NFKC", text).casefold()  # folding can undo the normal form
    return " ".join(unicodedata.normalize("NFKC", folded).split())


def _answer(request: Any) -> Any:
    """Return the response for BYTES `text` [rows, 1]: `normalized` of that shape, INT32 `characters` of each."""
    given = pb_utils.get_input_tensor_by_name(request, "text").as_numpy()
    try:
        texts = [_normalize(text.decode()) for text in given.ravel()]
    except UnicodeDecodeError as error:
        message = f"text: expected UTF-8, given bytes that are not: {error}"
        return pb_utils.InferenceResponse([], pb_utils.TritonError(message, pb_utils.TritonError.INVALID_ARG))
    normalized = np.array([text.encode() for text in texts], np.object_).reshape(given.shape)
    characters = np.array([len(text) for text in texts], np.int32).reshape(given.shape)
    return pb_utils.InferenceResponse(
        [pb_utils.Tensor("normalized", normalized), pb_utils.Tensor("characters", characters)]
    )


class TritonPythonModel:
    """The class that Triton's Python backend looks for."""

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request on its own: a bad text fails its request alone."""
        return [_answer(request) for request in requests]
