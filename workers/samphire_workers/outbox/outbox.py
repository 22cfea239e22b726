"""The outbox: what is put out of each task that names a webhook."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from samphire.errors import InvalidInputError
from samphire.wire.contract import CanvasStart
from samphire.wire.deliveries import LAST
from samphire_broker.store import OtherEnd, Webhook
from samphire_broker.webhooks.endpoint import Destination, Event
from samphire_workers.intake.request import Request
from samphire_workers.outbox.book import EndpointBook
from samphire_workers.outbox.payload import About, iso_time, number_of, webhook

logger = logging.getLogger(__name__)

_encode = msgspec.json.Encoder().encode


class Outbox:
    """Makes the webhooks of tasks.

    Args:
        book: the endpoints.
        now: the broker's time, in s since 1970.
        gateway_url: where results can be read; "" where there is no gateway.
    """

    def __init__(self, book: EndpointBook, now: Callable[[], float], gateway_url: str) -> None:
        self._book = book
        self._now = now
        self._gateway_url = gateway_url

    def of_end(
        self, request: Request, state: str, *, answer: object = None, error: Mapping[str, str] | None = None
    ) -> tuple[Webhook, ...]:
        """What tells of a task's end; nothing where nobody is to be told.

        A chain that never begins is told of as its last step, which has its id.
        """
        more: dict[str, Any] = {} if error is None else {"error": error}
        if isinstance(request.payload, CanvasStart):
            return self._of_step(request.task_id, state, request.payload.last_arguments(), more)
        destination = request.destination
        if destination is None:
            return ()
        if answer is not None and destination.result_bytes:
            encoded = _encode(answer)
            if len(encoded) <= destination.result_bytes:
                more["result"] = msgspec.Raw(encoded)
        return self._of_end(destination, about(request), state, more)

    def of_event(self, request: Request, event: Event, number: int, more: Mapping[str, Any]) -> Webhook | None:
        """What tells of a task under way, where somebody is to be told.

        Args:
            request: the task.
            event: what happened.
            number: of the event in its attempt; the start is 1.
            more: what else is said.
        """
        destination = request.destination
        if destination is None or event not in destination.events:
            return None
        sequence = number_of(request.attempts, number)
        return self._webhook(destination, about(request), event, sequence, {"state": "running", **more})

    def of_other_end(self, end: OtherEnd, kwargs: Mapping[str, Any]) -> tuple[Webhook, ...]:
        """What tells of the end of a task that nobody will ever run, by the arguments that it would have had."""
        return self._of_step(end.task_id, end.state, kwargs, {})

    def _of_step(
        self, task_id: str, state: str, kwargs: Mapping[str, Any], more: Mapping[str, Any]
    ) -> tuple[Webhook, ...]:
        found = named_in(kwargs)
        if found is None:
            return ()
        named, tenant, model = found
        try:
            destination = self._book.resolve(named, tenant)
        except InvalidInputError as error:
            logger.warning(
                "no webhook tells of the end of task %s, a step that never ran: %s",
                task_id,
                error,
                extra={"action": "no_webhook"},
            )
            return ()
        return self._of_end(destination, About(task_id, tenant, model), state, more)

    def _of_end(self, destination: Destination, of: About, state: str, more: Mapping[str, Any]) -> tuple[Webhook, ...]:
        if "terminal" not in destination.events:
            return ()
        told = {"state": state, "finished_at": iso_time(self._now()), **more}
        return (self._webhook(destination, of, state, LAST, told),)

    def _webhook(
        self, destination: Destination, of: About, event: str, sequence: int, more: Mapping[str, Any]
    ) -> Webhook:
        return webhook(destination, of, event, sequence, self._now(), more, self._gateway_url)


def named_in(kwargs: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """The webhook, the tenant and the model that the arguments of an inference name; None where no webhook is named.

    They may come from anybody: what is no text names none.
    """
    webhook, tenant, model = (kwargs.get(name) or "" for name in ("webhook", "tenant", "model_name"))
    if not webhook or not all(isinstance(text, str) for text in (webhook, tenant, model)):
        return None
    return webhook, tenant, model


def about(request: Request) -> About:
    """What is known of a task."""
    headers = request.envelope.headers if request.envelope is not None else None
    infer = request.infer
    return About(
        request.task_id,
        infer.tenant if infer is not None else "",
        request.model,
        request.version,
        headers.samphire_sent_at if headers is not None else None,
        request.started_at,
    )
