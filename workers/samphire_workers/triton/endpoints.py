"""The endpoints of a worker: which answer, which model is away on which, and whose turn it is."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from samphire.errors import EndpointUnavailableError
from samphire_workers.triton.endpoint import Endpoint
from samphire_workers.triton.errors import GivenUpError

logger = logging.getLogger(__name__)

PROBE_INTERVAL_S = 0.5


class Breaker(NamedTuple):
    """Why nothing of a model goes to an endpoint."""

    not_before: float
    """It is not probed before this time of the monotonic clock."""
    unknown: bool
    """The endpoint has no such model; another may have it."""


class Endpoints:
    """Breakers: one for each endpoint, and one for each model on it.

    An open breaker lets nothing through until a probe has seen the endpoint, or the model on it, ready again:
    probes close breakers, never requests.
    """

    def __init__(self, urls: Sequence[str]) -> None:
        self._all = [Endpoint(url) for url in urls]
        self._ready: list[Endpoint] = []
        self._open: dict[tuple[Endpoint, str], Breaker] = {}
        """The open breakers of models."""
        self._turn = 0
        self.some_ready = asyncio.Event()
        self.on_ready: Callable[[Endpoint], None] = lambda endpoint: None
        """Called before an endpoint that has become ready is asked for anything."""
        self.on_away: Callable[[], None] = lambda: None
        """Called when an endpoint that was ready does not answer."""

    @property
    def all(self) -> list[Endpoint]:
        """All endpoints, whether they answer or not, in the order in which they were given."""
        return self._all

    @property
    def urls(self) -> str:
        """Addresses of all of them."""
        return ", ".join(endpoint.url for endpoint in self._all)

    async def watch(self) -> None:
        """Keep track of which endpoints are ready, for ever; one that hangs holds up no other."""
        async with asyncio.TaskGroup() as group:
            for endpoint in self._all:
                group.create_task(self._watch(endpoint))

    async def _watch(self, endpoint: Endpoint) -> None:
        while True:
            if not await endpoint.is_ready():
                self.mark_away(endpoint)
            elif endpoint not in self._ready:
                logger.info("endpoint %s is ready", endpoint.url, extra={"action": "endpoint_ready"})
                self.on_ready(endpoint)
                self._ready.append(endpoint)
                self.some_ready.set()
            await asyncio.sleep(PROBE_INTERVAL_S)

    def mark_away(self, endpoint: Endpoint) -> None:
        """Send nothing to this endpoint until it has answered a probe again; what is under way there is given up."""
        if endpoint in self._ready:
            logger.warning(
                "endpoint %s is away: nothing is sent there until it answers a probe",
                endpoint.url,
                extra={"action": "endpoint_away"},
            )
            self._ready.remove(endpoint)
            self.on_away()
        if not self._ready:
            self.some_ready.clear()
        endpoint.give_up_all(GivenUpError(f"endpoint {endpoint.url} does not answer"))

    @property
    def all_answer(self) -> bool:
        """Whether every endpoint has answered the last probe."""
        return len(self._ready) == len(self._all)

    def answers(self, endpoint: Endpoint) -> bool:
        """Whether an endpoint has answered the last probe."""
        return endpoint in self._ready

    def trip(self, endpoint: Endpoint, model: str, pause_s: float = 0.0, *, unknown: bool = False) -> None:
        """Send nothing of a model to an endpoint until a probe, `pause_s` from now or later, has seen it ready there.

        `unknown`: the endpoint says that it has no such model.
        """
        if (endpoint, model) not in self._open:
            logger.warning(
                "model %s is away on %s: nothing of it is sent there until a probe has seen it ready",
                model,
                endpoint.url,
                extra={"action": "breaker_open"},
            )
        self._open[endpoint, model] = Breaker(time.monotonic() + pause_s, unknown)

    def hold(self, endpoint: Endpoint, model: str) -> None:
        """Send nothing of a model to an endpoint until a probe has seen what it takes there."""
        self._open.setdefault((endpoint, model), Breaker(0.0, unknown=False))

    def restore(self, endpoint: Endpoint, model: str) -> None:
        """A model was seen ready on an endpoint."""
        if self._open.pop((endpoint, model), None) is not None:
            logger.info("model %s is back on %s", model, endpoint.url, extra={"action": "breaker_closed"})

    def forget_unknown(self, model: str) -> bool:
        """Forget the breakers of a model that every endpoint has said it has not; whether that is so.

        Endpoints that are away just now count: they may have it. Nobody waits for what nobody has.
        """
        found = [self._open.get((endpoint, model)) for endpoint in self._all]
        unknown = all(breaker is not None and breaker.unknown for breaker in found)
        if unknown:
            for endpoint in self._all:
                del self._open[endpoint, model]
        return unknown

    def to_probe(self) -> list[tuple[Endpoint, str]]:
        """Open breakers of models on endpoints that answer, whose pause is over."""
        now = time.monotonic()
        pairs = self._open.items()
        return [pair for pair, breaker in pairs if pair[0] in self._ready and breaker.not_before <= now]

    def open_breakers(self) -> list[tuple[str, str]]:
        """Addresses and models whose breakers are open."""
        return [(endpoint.url, model) for endpoint, model in self._open]

    def is_away(self, model: str) -> bool:
        """Whether no endpoint can be asked for a model."""
        return not any((endpoint, model) not in self._open for endpoint in self._ready)

    def away(self) -> set[str]:
        """The models that no endpoint can be asked for, as far as any was asked."""
        return {model for _, model in self._open if self.is_away(model)}

    def serving(self, model: str) -> list[Endpoint]:
        """The endpoints that can be asked for a model, beginning with the next in turn."""
        usable = [endpoint for endpoint in self._ready if (endpoint, model) not in self._open]
        self._turn += 1
        start = self._turn % len(usable) if usable else 0
        return usable[start:] + usable[:start]

    def pick(self, model: str = "") -> Endpoint:
        """The next endpoint, in turn, that can be asked for a model.

        Raises:
            EndpointUnavailableError: there is none.
        """
        if not self._open and len(self._ready) == 1:
            return self._ready[0]
        for endpoint in self.serving(model):
            return endpoint
        of = f" for model {model!r}" if model else ""
        raise EndpointUnavailableError(f"no endpoint of {self.urls} is ready{of}")

    def pick_for(self, model: str, sequence_id: str, pinned: Endpoint | None) -> Endpoint:
        """The endpoint of a sequence: the one that it began on, or the same for all workers that ask.

        Source: rendezvous hashing (Thaler and Ravishankar, 1996).

        Raises:
            EndpointUnavailableError: it, or every one, cannot be asked for the model.
        """
        usable = [one for one in self._ready if (one, model) not in self._open and pinned in (None, one)]
        if not usable:
            raise EndpointUnavailableError(f"the endpoint of sequence {sequence_id!r} of model {model!r} is away")
        return max(usable, key=lambda one: hashlib.sha256(f"{one.url} {model} {sequence_id}".encode()).digest())

    async def close(self) -> None:
        """Close all channels."""
        for endpoint in self._all:
            await endpoint.close()
