"""What the endpoints serve, as a lane knows it: signatures, kept fresh, and breakers closed when models are back."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Collection

import msgspec

from samphire.errors import EndpointUnavailableError, SamphireError, TransientError, UnknownModelError
from samphire.wire import keys
from samphire.wire.signature import ModelSignature
from samphire_broker.repository.record import read_record
from samphire_broker.settings import Settings
from samphire_workers.intake.checking import Checker
from samphire_workers.intake.unserved import Unserved
from samphire_workers.triton.endpoint import Endpoint
from samphire_workers.triton.endpoints import Endpoints
from samphire_workers.triton.errors import UnservedError
from samphire_workers.triton.signatures import Signatures, form

logger = logging.getLogger(__name__)

FRESH_S = 2.0
"""A signature in use is looked up again after this long, so new versions are noticed."""

UNUSED_FRESH_S = 5.0
"""And one that is not in use, which clients may still want to know."""

CHECK_S = 0.5

TROUBLE_BYTES = 4096
"""Most bytes of a trouble that clients are told."""

DIFFERING_S = 2.0
"""Between two looks at an endpoint whose signature of a model differs from that of others."""


class ServedModels:
    """Checkers by model name."""

    def __init__(self, endpoints: Endpoints, settings: Settings, worker_id: str) -> None:
        self._endpoints = endpoints
        self._worker_id = worker_id
        self._endpoints.on_ready = self._is_ready
        self._settings = settings
        self._signatures = Signatures([endpoint.url for endpoint in endpoints.all])
        self._unserved = Unserved(settings.unserved_timeout_s)
        self._endpoints.on_away = self._unserved.begin_again
        self._not_joined: dict[str, ModelSignature] = {}
        """Models that have answered a micro-batch with another number of rows than it had, as they were then."""
        self._checkers: dict[str, tuple[Checker, float]] = {}
        self._used: set[str] = set()
        self.on_new: Callable[[str], None] = lambda model: None
        """Called with a model that is served and was not known."""
        self.queues: set[str] = set()
        """Queues of the models in the endpoints' repositories."""
        self._troubles: dict[str, str] = {}
        """Why models are not loaded, as an endpoint and the stack on this machine tell it."""

    def known(self, model: str) -> Checker | None:
        """The checker of a model, if it is in memory."""
        found = self._checkers.get(model)
        self._used.add(model)
        return found[0] if found else None

    def signatures(self) -> dict[str, bytes]:
        """What is known of the models, as clients read it (see the key schema)."""
        told = {keys.parse_queue(queue)[0]: b"" for queue in self.queues}
        if told:
            told[keys.CATALOGUE_COMPLETE] = b"1"
        for model, (checker, _) in self._checkers.items():
            told[model] = msgspec.json.encode(checker.signature)
        for model, reason in self._troubles.items():
            told[keys.CATALOGUE_TROUBLE + model] = reason.encode(errors="backslashreplace")[:TROUBLE_BYTES]
        if not self._endpoints.some_ready.is_set():
            told[keys.CATALOGUE_AWAY + self._worker_id] = self._endpoints.urls.encode()
        return told

    def _troubles_of_stack(self) -> dict[str, str]:
        """What the stack on this machine that runs our Triton tells of its models: Triton itself does not tell all."""
        record = read_record(self._settings.data_dir.expanduser())
        return record.troubles if record is not None and record.triton in self._settings.triton_urls else {}

    async def checker(self, model: str, *, fresh: bool = False) -> Checker:
        """Return the checker of a model, from memory or from an endpoint.

        Raises:
            UnknownModelError: no such model.
            EndpointUnavailableError: the model, or every endpoint, is away.
        """
        found = self.known(model)
        if found and not fresh:
            return found
        return await self._look_up(model)

    async def _look_up(self, model: str) -> Checker:
        """Ask all endpoints that serve a model: they must agree on what it takes."""
        serving = self._endpoints.serving(model)
        asked = await asyncio.gather(*(self._ask(one, model) for one in serving), return_exceptions=True)
        refused: list[BaseException] = []
        for endpoint, error in zip(serving, asked, strict=True):
            if error is not None:
                logger.debug("model %s on %s: %s", model, endpoint.url, error, extra={"action": "lookup_failed"})
                if not isinstance(error, EndpointUnavailableError):
                    refused.append(error)
        found = self._checkers.get(model)
        if found is not None:
            return found[0]
        raise refused[0] if refused else EndpointUnavailableError(f"model {model!r} is away")

    async def has_changed(self, endpoint: Endpoint, signature: ModelSignature) -> bool:
        """Whether an endpoint takes something else for a model than what a request was checked against."""
        with contextlib.suppress(SamphireError):
            await self._ask(endpoint, signature.name)
        now = self._signatures.of(endpoint.url, signature.name)
        return now is None or form(now) != form(signature)

    def _is_ready(self, endpoint: Endpoint) -> None:
        if len(self._endpoints.all) > 1:
            for model in self._checkers:
                self._endpoints.hold(endpoint, model)

    async def _ask(self, endpoint: Endpoint, model: str) -> None:
        try:
            signature = await endpoint.signature(model)
        except UnknownModelError as error:
            self._signatures.forget(endpoint.url, model)
            self.lost(endpoint, model, unknown=True)
            if self._endpoints.forget_unknown(model):
                self._unserved.is_unknown(model)
                raise
            raise EndpointUnavailableError(str(error)) from error
        except TransientError as error:
            await self.no_answer(endpoint, model)
            raise EndpointUnavailableError(str(error)) from error
        except SamphireError:
            self._signatures.forget(endpoint.url, model)
            if any(self._signatures.of(one.url, model) for one in self._endpoints.serving(model)):
                self.lost(endpoint, model, DIFFERING_S)  # the others serve it
            else:
                self._checkers.pop(model, None)
            raise
        self._signatures.note(endpoint.url, signature)
        answering = {one.url for one in self._endpoints.all if self._endpoints.answers(one)}
        differing = self._signatures.differing(model, answering)
        if endpoint.url not in differing:
            self._endpoints.restore(endpoint, model)
        for other in self._endpoints.all:
            if other.url in differing:
                self.lost(other, model, DIFFERING_S)
        self._renew(model)
        if endpoint.url in differing:
            raise EndpointUnavailableError(f"model {model!r} takes something else on {endpoint.url}")

    def _renew(self, model: str) -> None:
        """Check requests by what the first endpoint that serves a model has said of it."""
        serving = self._endpoints.serving(model)
        known = [self._signatures.of(one.url, model) for one in self._endpoints.all if one in serving]
        signature = next((found for found in known if found is not None), None)
        if signature is None:
            return
        self._unserved.is_served(model)
        checker, _ = self._checkers.get(model, (None, 0.0))
        if checker is None:
            self.on_new(model)
        if checker is None or checker.signature != signature:  # else what it has checked already still holds
            checker = Checker(signature, self._settings, may_join=self._not_joined.get(model) != signature)
        self._checkers[model] = (checker, time.monotonic())

    def stateful(self) -> set[str]:
        """The models that keep state between the requests of a sequence, as far as they are known."""
        return {model for model, (checker, _) in self._checkers.items() if checker.signature.sequence_batching}

    def joins(self, model: str) -> bool:
        """Whether requests of a model are joined, as far as it is known."""
        found = self._checkers.get(model)
        return found is not None and found[0].joins

    def join_no_more(self, signature: ModelSignature, error: SamphireError) -> None:
        """Ask a model for one request at a time from now on, until its signature changes; say so once."""
        if self._not_joined.get(signature.name) == signature:
            return
        self._not_joined[signature.name] = signature
        checker = Checker(signature, self._settings, may_join=False)
        self._checkers[signature.name] = (checker, time.monotonic())
        logger.warning(
            "%s. Its requests are not joined any more, each is asked alone. Take dynamic_batching out of its config if "
            "its rows depend on each other",
            error,
            extra={"action": "join_no_more"},
        )

    async def no_answer(self, endpoint: Endpoint, model: str) -> None:
        """A model did not answer on an endpoint: it is away there, or the whole endpoint is."""
        if self._endpoints.answers(endpoint) and not await endpoint.is_ready():
            self._endpoints.mark_away(endpoint)
        self.lost(endpoint, model)

    def lost(self, endpoint: Endpoint, model: str, pause_s: float = 0.0, *, unknown: bool = False) -> None:
        """Treat a model as away on an endpoint until it has been seen ready there again."""
        self._endpoints.trip(endpoint, model, pause_s, unknown=unknown)
        if self._endpoints.is_away(model):
            self._checkers.pop(model, None)
            if self._endpoints.all_answer and not unknown:
                self._unserved.is_away(model)

    def given_up(self) -> set[str]:
        """Models that were not loaded in time: their tasks fail."""
        return self._unserved.given_up()

    def why_given_up(self, model: str) -> UnservedError:
        """What such a task fails with."""
        reason = self._troubles.get(model) or "no endpoint has said why"
        return UnservedError(
            f"model {model!r} was not loaded within {self._settings.unserved_timeout_s:g} s "
            f"(SAMPHIRE_UNSERVED_TIMEOUT_S): {reason}"
        )

    async def watch(self, on_back: Callable[[], None]) -> None:
        """Keep signatures fresh and look whether models that were away are back, for ever."""
        while True:
            await self._endpoints.some_ready.wait()
            await self._probe(on_back)
            try:
                endpoint = self._endpoints.pick()
                index = await endpoint.index()
                self.queues = {keys.queue_name(model) for model in index}
                self._troubles = {model: reason for model, reason in index.items() if reason}
                self._troubles |= self._troubles_of_stack()
                ready = await endpoint.models(ready=True)
            except SamphireError:
                await asyncio.sleep(CHECK_S)
                continue
            stale = self._stale(self._used, FRESH_S)
            self._used -= stale
            for model in stale | self._stale(ready | set(self._checkers), UNUSED_FRESH_S):
                try:
                    await self._look_up(model)
                except SamphireError as error:
                    logger.debug("model %s: %s", model, error, extra={"action": "lookup_failed"})
            await asyncio.sleep(CHECK_S)

    async def _probe(self, on_back: Callable[[], None]) -> None:
        for endpoint, model in self._endpoints.to_probe():
            was_away = self._endpoints.is_away(model)
            try:
                await self._ask(endpoint, model)
            except SamphireError as error:
                logger.debug("model %s on %s: %s", model, endpoint.url, error, extra={"action": "lookup_failed"})
            if was_away and not self._endpoints.is_away(model):
                on_back()

    def _stale(self, models: Collection[str], fresh_s: float) -> set[str]:
        oldest = time.monotonic() - fresh_s
        return {model for model in models if model not in self._checkers or self._checkers[model][1] < oldest}
