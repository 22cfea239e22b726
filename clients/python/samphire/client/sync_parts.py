"""The blocking counterparts of handles and of a client's parts: each runs the asynchronous one on the client's loop."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Coroutine, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, overload

from samphire.client.dead_letters import AsyncDeadLetters, DeadLetter, LetterFilter, Letters
from samphire.client.detail import TaskDetail
from samphire.client.events import TaskEvent
from samphire.client.models import AsyncModels, ServedModel
from samphire.client.results import InferResult, Status
from samphire.client.streams import Resume
from samphire.client.task import AsyncTask
from samphire.client.waiter import Look
from samphire.client.webhooks import AsyncWebhooks, WebhookDelivery, WebhookEndpoint

if TYPE_CHECKING:
    from samphire.client.aio import AsyncClient
    from samphire.client.sync import Client

T = TypeVar("T")
P = TypeVar("P")


class Task:
    """A handle of one submitted task."""

    def __init__(self, client: Client, task_id: str, look: Look) -> None:
        self._client = client
        self._look: Look = look
        self._process = os.getpid()
        self.id = task_id
        """The task's id, also Celery's."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id}>"

    def _run(self, use: Callable[[AsyncTask], Coroutine[Any, Any, T]]) -> T:
        # After a fork the events of this task go to the parent's client.
        look: Look = self._look if self._process == os.getpid() else "often"
        if isinstance(look, int):
            self._look = "now"

        async def run() -> T:
            return await use(AsyncTask(self._client._client._session, self.id, look))

        return self._client._run(run)

    @overload
    def status(self, *, detail: Literal[False] = False) -> Status: ...

    @overload
    def status(self, *, detail: Literal[True]) -> TaskDetail: ...

    def status(self, *, detail: bool = False) -> Status | TaskDetail:
        """See `AsyncTask.status`."""
        if detail:
            return self._run(lambda task: task.status(detail=True))
        return self._run(lambda task: task.status())

    def result(self, timeout_s: float | None = None, *, delete: bool = False) -> InferResult:
        """See `AsyncTask.result`."""
        return self._run(lambda task: task.result(timeout_s, delete=delete))

    def cancel(self, timeout_s: float = 5.0) -> bool:
        """See `AsyncTask.cancel`."""
        return self._run(lambda task: task.cancel(timeout_s))

    def _reader(self) -> AsyncTask:
        if isinstance(self._look, int):
            self._look = "now"  # its end may be told to the reader
        return AsyncTask(self._client._client._session, self.id, "often")

    def progress(self) -> TaskEvent | None:
        """See `AsyncTask.progress`."""
        return self._run(lambda task: task.progress())

    def events(self, after: str | None = None) -> Iterator[TaskEvent]:
        """See `AsyncTask.events`."""
        events = self._reader().events(after)
        with self._client._iterating(events) as iterator:
            yield from iterator

    def stream(self, after: str | None = None, *, resume: Resume = "restart") -> Iterator[TaskEvent]:
        """See `AsyncTask.stream`."""
        events = self._reader().stream(after, resume=resume)
        with self._client._iterating(events) as iterator:
            yield from iterator


class Part(Generic[P]):
    """A part of a client, which has it anew for each call."""

    def __init__(self, client: Client, part: Callable[[AsyncClient], P]) -> None:
        self._client = client
        self._part = part

    def _run(self, use: Callable[[P], Coroutine[Any, Any, T]]) -> T:
        async def run() -> T:
            return await use(self._part(self._client._client))

        return self._client._run(run)


class DeadLetters(Part[AsyncDeadLetters]):
    """See `AsyncDeadLetters`."""

    def list(self, which: LetterFilter | None = None, *, limit: int | None = 100) -> Letters:
        """See `AsyncDeadLetters.list`."""
        return self._run(lambda letters: letters.list(which, limit=limit))

    def get(self, letter_id: str) -> DeadLetter:
        """See `AsyncDeadLetters.get`."""
        return self._run(lambda letters: letters.get(letter_id))

    def redrive(self, letter_ids: Iterable[str], *, rate_per_s: float | None = None, timeout_s: float = 30.0) -> int:
        """See `AsyncDeadLetters.redrive`."""
        return self._run(lambda letters: letters.redrive(letter_ids, rate_per_s=rate_per_s, timeout_s=timeout_s))

    def purge(self, letter_ids: Iterable[str], *, timeout_s: float = 30.0) -> int:
        """See `AsyncDeadLetters.purge`."""
        return self._run(lambda letters: letters.purge(letter_ids, timeout_s=timeout_s))


class Models(Part[AsyncModels]):
    """See `AsyncModels`."""

    def list(self) -> list[ServedModel]:
        """See `AsyncModels.list`."""
        return self._run(lambda models: models.list())

    def get(self, model: str) -> ServedModel:
        """See `AsyncModels.get`."""
        return self._run(lambda models: models.get(model))


class Webhooks(Part[AsyncWebhooks]):
    """See `AsyncWebhooks`."""

    def endpoints(self) -> list[WebhookEndpoint]:
        """See `AsyncWebhooks.endpoints`."""
        return self._run(lambda webhooks: webhooks.endpoints())

    def has_default_secret(self) -> bool:
        """See `AsyncWebhooks.has_default_secret`."""
        return self._run(lambda webhooks: webhooks.has_default_secret())

    def delivery(self, task_id: str, webhook: str) -> WebhookDelivery | None:
        """See `AsyncWebhooks.delivery`."""
        return self._run(lambda webhooks: webhooks.delivery(task_id, webhook))


def tell_in_full(blocking: type, asynchronous: type) -> None:
    """Give the methods of a blocking class the whole text of the asynchronous ones that they refer to."""
    for name, member in vars(blocking).items():
        told = inspect.getdoc(getattr(asynchronous, name, None))
        if told and (member.__doc__ or "").startswith("See `"):
            member.__doc__ = f"{told}\n\n{member.__doc__}"


_KINDS: tuple[tuple[type, type], ...] = (
    (Task, AsyncTask),
    (DeadLetters, AsyncDeadLetters),
    (Models, AsyncModels),
    (Webhooks, AsyncWebhooks),
)
for _kinds in _KINDS:
    tell_in_full(*_kinds)
