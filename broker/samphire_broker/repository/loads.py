"""Loads of models by a Triton whose repository and log lie here.

Where Triton cannot read a model's configuration, its answer says only that; the reason stands in its log.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from tritonclient.grpc.aio import InferenceServerClient
from tritonclient.utils import InferenceServerException

LOAD_TIMEOUT_S = 300.0
READY_TIMEOUT_S = 5.0
BACKENDS = ("python", "onnxruntime")
"""What the embedded Triton has."""
_OTHER_BACKENDS = (
    f"the embedded Triton has {' and '.join(BACKENDS)} only; a full Triton, named in SAMPHIRE_TRITON_URLS, may have it"
)
_NO_BACKEND = ", try specifying runtime on the model configuration."
_POLL_FAILED = "failed to poll from model repository"


class TritonAwayError(Exception):
    """Triton does not answer: nothing is known of what was asked."""


class StillLoadingError(Exception):
    """Triton goes on with a load after its time was over: what becomes of it is not known yet."""


class Loads:
    """Loads by one Triton.

    Args:
        client: of that Triton.
        log: its log.
        say: is told what is loaded.
    """

    def __init__(
        self, client: InferenceServerClient, log: Path, say: Callable[[str], None] = lambda line: None
    ) -> None:
        self._client = client
        self._log = log
        self._say = say

    async def is_ready(self) -> bool:
        """Whether Triton answers."""
        try:
            return bool(await self._client.is_server_ready(client_timeout=READY_TIMEOUT_S))
        except InferenceServerException:
            return False

    async def load(self, model: str) -> str:
        """Load a model, or what is new of it; returns why that failed, empty if it did not.

        Raises:
            TritonAwayError: no answer.
            StillLoadingError: it has not ended within `LOAD_TIMEOUT_S`.
        """
        self._say(f"triton: loading model {model}")
        was_served = "READY" in await self._states(model)
        seen = self._log.stat().st_size if self._log.exists() else 0
        try:
            await self._client.load_model(model, client_timeout=LOAD_TIMEOUT_S)
        except InferenceServerException as error:
            if _is_late(error):
                return await self._after_timeout(model, was_served=was_served)
            reason = _reason(error)
            if _POLL_FAILED in reason:
                reason = _poll_failure(self._log, seen, model) or reason
            self._say(f"triton: model {model} did not load: {reason}")
            return reason
        return ""

    async def _states(self, model: str) -> dict[str, str]:
        """States of a model's versions in Triton's index, each with its reason."""
        try:
            index = await self._client.get_model_repository_index(client_timeout=READY_TIMEOUT_S)
        except InferenceServerException as error:
            raise TritonAwayError(error.message()) from error
        return {entry.state: entry.reason for entry in index.models if entry.name == model}

    async def _after_timeout(self, model: str, *, was_served: bool) -> str:
        """What has become of a load whose answer did not come in time, as far as Triton's index tells.

        While what was served before is loaded anew, it stands there as ready.
        """
        states = await self._states(model)
        if "READY" in states and not was_served:
            return ""
        reason = states.get("UNAVAILABLE", "")
        if reason and reason != "unloaded" and len(states) == 1:
            return reason
        raise StillLoadingError(
            f"it has not loaded within {LOAD_TIMEOUT_S:.0f} s, and Triton goes on with it: what becomes of it is not "
            f"known. `samphire models reload {model}` looks again"
        )

    async def unload(self, model: str) -> str:
        """Unload a model; returns why that failed, empty if it did not; raises as `load` does."""
        try:
            await self._client.unload_model(model, client_timeout=LOAD_TIMEOUT_S)
        except InferenceServerException as error:
            return _reason(error)
        return ""


def _is_late(error: InferenceServerException) -> bool:
    return bool(error.status() == "StatusCode.DEADLINE_EXCEEDED")


def _reason(error: InferenceServerException) -> str:
    if error.status() == "StatusCode.UNAVAILABLE":
        raise TritonAwayError(error.message()) from error
    if _is_late(error):
        return f"Triton has not answered within {LOAD_TIMEOUT_S:.0f} s"
    said = " ".join(str(error.message()).rstrip(";\n").split())  # it ends so, for a list of versions; one line
    # A runtime in the config would not help: there is no such backend.
    return said.replace(_NO_BACKEND, f": {_OTHER_BACKENDS}") if said.endswith(_NO_BACKEND) else said


def _poll_failure(log: Path, seen: int, model: str) -> str:
    with log.open("rb") as lines:
        lines.seek(seen)
        text = lines.read().decode(errors="replace")
    said = f"(?:Error parsing (text-format .*)\\n)?.*Poll failed for model directory '{re.escape(model)}': (.*)"
    reasons = re.findall(said, text)
    if not reasons:
        return ""
    detail, reason = reasons[-1]
    return ": ".join(filter(None, [reason.rstrip().removesuffix('"'), detail]))
