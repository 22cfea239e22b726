"""Threads in which Celery's own code works on canvases, each with a Celery application of its own.

Producers name the queues of next steps, and workers push with rights that producers lack: a queue whose name
is that of a key with state is refused.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, TypeVar

from celery import Celery
from celery.app.amqp import AMQP
from celery.backends.redis import RedisBackend
from kombu.exceptions import OperationalError
from kombu.transport import redis as kombu_redis
from redis.exceptions import RedisError

from samphire.errors import BrokerUnavailableError, InvalidInputError, SamphireError
from samphire.transport.connection import translate
from samphire.wire.keys import may_be_queue
from samphire_broker.store import OtherEnd
from samphire_workers.celery_settings import BROKER_SETTINGS
from samphire_workers.unexpected import is_shortage, our_error

T = TypeVar("T")

CAPTURING_THREAD, COUNTING_THREAD = "samphire-canvas", "samphire-chord"
LARGE_CANVAS_THREAD = f"{CAPTURING_THREAD}-large"

_STATES = {"SUCCESS": "succeeded", "FAILURE": "failed", "REVOKED": "cancelled"}


class CheckedChannel(kombu_redis.Channel):
    """Pushes to queues, and to no other key."""

    def _put(self, queue: str, message: dict[str, Any], **kwargs: Any) -> None:
        options = self.connection.client.transport_options
        if not may_be_queue(queue, options["samphire_namespace"], options["global_keyprefix"]):
            raise InvalidInputError(f"expected the name of a queue for a next step, given {queue[:200]!r}")
        self._push(queue, message, **kwargs)

    def _push(self, queue: str, message: dict[str, Any], **kwargs: Any) -> None:
        super()._put(queue, message, **kwargs)  # type: ignore[no-untyped-call]

    def _put_fanout(self, exchange: str, message: dict[str, Any], routing_key: str, **kwargs: Any) -> None:
        raise InvalidInputError(f"a next step cannot go to the fanout exchange {exchange[:200]!r}")


class CheckedTransport(kombu_redis.Transport):
    """kombu's Redis transport, which pushes to queues only."""

    Channel = CheckedChannel


class OwnThreadBackend(RedisBackend):  # type: ignore[misc]
    """Celery's Redis backend, of whose results nobody unsubscribes but the threads here.

    A result does when it is collected, which happens in any thread: while the broker is away that blocks for many
    seconds, in the lane's thread as well.
    """

    def remove_pending_result(self, result: Any) -> Any:
        """Unsubscribe from a result, where that holds up no lane."""
        if threading.current_thread().name.startswith((CAPTURING_THREAD, COUNTING_THREAD)):
            return super().remove_pending_result(result)
        return result

    def _other_end(self, task_id: str, state: str, meta: dict[str, Any], stream: str) -> OtherEnd:
        """The end of a task that no worker holds, as the store writes it."""
        meta["task_id"] = task_id
        return OtherEnd(task_id, _STATES.get(state, "failed"), self.encode(meta), stream)


class OnceAMQP(AMQP):  # type: ignore[misc]
    """Celery's sender of messages, which tries once: a producer's `retry_policy` would hold up everybody's canvases.

    What the broker does not take now is asked again by whoever asked for the canvas.
    """

    @cached_property
    def send_task_message(self) -> Callable[..., Any]:
        """Send one message."""
        send = self._create_task_sender()

        def send_once(*args: Any, **kwargs: Any) -> Any:
            return send(*args, **{**kwargs, "retry": False, "retry_policy": None})

        return send_once


def make_app(conf: Any, name: str, transport: type, backend: type) -> Celery:
    """Make the application of the thread that calls this, which Celery finds from then on.

    Args:
        conf: of the worker's own application.
        name: of the new one.
        transport: how it pushes.
        backend: how it stores.
    """
    made = Celery(name, set_as_current=False, amqp=OnceAMQP)
    made.conf.update(
        {name: conf[name] for name in BROKER_SETTINGS},
        broker_transport=_path(transport),
        result_backend=f"{_path(backend)}+{conf.result_backend.removeprefix('redis+')}",
        result_expires=conf.result_expires,
        result_chord_expires=conf.result_chord_expires,
        task_routes=conf.task_routes,
        task_serializer="json",
        result_serializer="json",
        accept_content=["json"],
        broker_pool_limit=conf.broker_pool_limit,
    )
    made.finalize()
    made.set_current()
    return made


def _path(found: type) -> str:
    return f"{found.__module__}:{found.__name__}"


async def in_thread(thread: ThreadPoolExecutor, work: Callable[..., T], *args: Any) -> T:
    """Run `work`; whatever it raises, a stored SystemExit too, is one task's error and never the worker's."""

    def run() -> tuple[T | None, BaseException | None]:
        try:
            return work(*args), None
        except BaseException as error:  # noqa: BLE001
            return None, error

    try:
        result, error = await asyncio.get_running_loop().run_in_executor(thread, run)
    except RuntimeError as no_thread:
        raise our_error(no_thread) from no_thread
    if error is None:
        return result  # type: ignore[return-value]
    raise _translated(error) from error


def _translated(error: BaseException) -> SamphireError:
    if isinstance(error, SamphireError):
        return error
    if is_shortage(error):
        return our_error(error)
    cause = error.__cause__ if isinstance(error, OperationalError) else error
    if isinstance(cause, RedisError | OSError):
        known = translate(cause)
        if known.retryable:
            return known
    elif isinstance(error, OperationalError) and cause is None:
        return BrokerUnavailableError(f"the next steps were not found out: {error}")
    return InvalidInputError(f"the canvas of the task is not understood: {error!r}")
