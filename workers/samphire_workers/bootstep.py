"""The lane as a bootstep of a real Celery worker: one thread with one event loop.

It is a *worker* step. A consumer step is stopped and started again with every reconnect of the stock
consumer, which the lane does not depend on.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import sys
import threading
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from celery import bootsteps
from celery.exceptions import ImproperlyConfigured
from celery.signals import worker_shutting_down

from samphire.errors import BrokerRightError, InvalidInputError
from samphire_broker.queues import refuse_queue
from samphire_broker.settings import read_settings
from samphire_broker.store import OtherDeploymentError, Store, WorkerInfo
from samphire_workers.lane.lane import Lane
from samphire_workers.monitoring.celery_events import CeleryEvents
from samphire_workers.monitoring.metrics import Metrics, Server, metrics_for
from samphire_workers.monitoring.observers import Observer, Observers
from samphire_workers.queues.wake import QueueWatch
from samphire_workers.settlement.canvas import Canvas
from samphire_workers.triton.endpoints import Endpoints
from samphire_workers.unexpected import is_shortage
from samphire_workers.upkeep.lease import keep_lease
from samphire_workers.upkeep.reaper import reap_others
from samphire_workers.upkeep.rights import check_rights

logger = logging.getLogger(__name__)

RESTART_MIN_S = 0.5
RESTART_MAX_S = 15.0
STEADY_S = 60.0
"""A lane that has run for so long has failed for the first time."""
FAILURES_MAX = 5
"""A lane that fails so often in a row keeps others from what it holds: its worker ends, and is to be started anew."""
HAND_BACK_S = 5.0
STOP_CHECK_S = 0.1
HAND_BACK_SIGNALS = 2
ASK_TIMEOUT_S = 5.0

GC_THRESHOLD = 20_000
"""Objects between two looks for cycles; a batch alone makes thousands, and no cycles."""
SWITCH_INTERVAL_S = 0.0005
"""How long the event thread may keep the lane from running; the interpreter's default is 5 ms."""


T = TypeVar("T")

serving: list[LaneStep] = []
"""The lanes of this process, for the control commands: one in a worker, none elsewhere."""


async def _answer(question: Callable[[Lane], Awaitable[T]], lane: Lane) -> T:
    return await question(lane)


class LaneStep(bootsteps.StartStopStep):  # type: ignore[misc]
    """Starts the lane's thread with the worker, and stops it warm."""

    def __init__(self, parent: Any, **options: Any) -> None:
        super().__init__(parent, **options)
        self._settings = read_settings()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._lane: Lane | None = None
        self._registered: asyncio.Event | None = None
        self._metrics: tuple[Metrics, Server] | None = None
        self._stopping = False
        self._signals = 0
        """Times that the worker was asked to end; more than once means at once."""

    def include_if(self, parent: Any) -> bool:
        """Always; refuses a worker whose stock consumer would take what belongs to lanes."""
        for queue in parent.app.amqp.queues.consume_from:
            if reason := refuse_queue(queue):
                raise ImproperlyConfigured(reason)
        return True

    def start(self, parent: Any) -> None:
        """Start the thread."""
        serving.append(self)
        worker_shutting_down.connect(self._asked_to_end)
        self._info = WorkerInfo(id=uuid.uuid4().hex, hostname=parent.hostname, pid=os.getpid())
        self._app = parent.app
        if self._settings.metrics_port:
            self._metrics = metrics_for(parent.hostname, self._settings.metrics_host, self._settings.metrics_port)
        self._thread = threading.Thread(target=self._run, name="samphire-lane", daemon=True)
        self._thread.start()

    def stop(self, parent: Any) -> None:
        """Claim nothing more, finish what is held, end the thread."""
        if self in serving:
            serving.remove(self)
        self._stopping = True
        if self._loop is not None and self._thread is not None:
            self._end_lane(self._loop, self._thread)
        if self._metrics is not None:
            self._metrics[1].close()

    def _end_lane(self, loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
        loop.call_soon_threadsafe(self._stop_lane)
        give_up = time.monotonic() + self._settings.shutdown_timeout_s
        while thread.is_alive() and time.monotonic() < give_up and self._signals < HAND_BACK_SIGNALS:
            thread.join(STOP_CHECK_S)  # signals are handled in between
        if thread.is_alive():
            logger.warning(
                "the worker ends before its tasks have: what is under way goes back to its queues, for other workers",
                extra={"action": "hand_back"},
            )
            loop.call_soon_threadsafe(self._hand_back)
            thread.join(HAND_BACK_S)
        if thread.is_alive():
            logger.error("the lane did not end in time: other workers take over its tasks within seconds")

    def terminate(self, parent: Any) -> None:
        """Hand what is held back at once."""
        self._signals = HAND_BACK_SIGNALS
        self.stop(parent)

    def ask(self, question: Callable[[Lane], Awaitable[T]]) -> T | None:
        """Ask the lane from another thread; None where there is none, or it does not answer in time."""
        loop, lane = self._loop, self._lane
        if loop is None or lane is None or self._stopping:
            return None
        answer = asyncio.run_coroutine_threadsafe(_answer(question, lane), loop)
        try:
            return answer.result(ASK_TIMEOUT_S)
        except TimeoutError:
            answer.cancel()
            return None

    @property
    def _metrics_observers(self) -> list[Observer]:
        return [self._metrics[0]] if self._metrics is not None else []

    def _stop_lane(self) -> None:
        if self._registered is not None:
            self._registered.set()  # a broker that is away must not hold up the end
        if self._lane is not None:
            self._lane.stop()

    def _asked_to_end(self, **_: Any) -> None:
        self._signals += 1

    def _hand_back(self) -> None:
        if self._lane is not None:
            self._lane.hand_back()

    def _run(self) -> None:
        gc.collect()
        gc.freeze()  # what is loaded by now stays: it need not be looked through again and again
        gc.set_threshold(GC_THRESHOLD)
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        with asyncio.Runner() as runner:
            self._loop = runner.get_loop()
            try:
                runner.run(self._serve())
            except (BrokerRightError, OtherDeploymentError, InvalidInputError) as error:
                logger.critical("%s", error, extra={"action": "not_started"})
                os._exit(78)  # as EX_CONFIG: who supervises it need not try again and again
            except BaseException:
                # Nobody would notice a dead thread in a live worker: end it, so its supervisor restarts it.
                logger.critical(
                    "the lane has ended, and the worker with it: its supervisor has to start another", exc_info=True
                )
                os._exit(70)

    async def _serve(self) -> None:
        settings, info = self._settings, self._info
        registered = self._registered = asyncio.Event()
        watching = Observers(*self._metrics_observers)
        store = Store(settings, info.id)
        try:
            await check_rights(store, lambda: self._stopping)
            async with asyncio.TaskGroup() as group:
                vital = [
                    group.create_task(keep_lease(store, settings, info, registered, watching)),
                    group.create_task(reap_others(store, settings)),
                ]
                await registered.wait()
                await self._keep_lane_running(store)
                for task in vital:
                    task.cancel()
            await store.leave()
        finally:
            await store.close()

    async def _keep_lane_running(self, store: Store) -> None:
        failures, send_events = 0, True
        while not self._stopping:
            endpoints = Endpoints(self._settings.triton_urls)
            events = CeleryEvents(self._app, self._info.hostname, self._settings.events_per_s)
            events.enabled = send_events
            observers = Observers(events, *self._metrics_observers, now=store.clock.now)
            watch = QueueWatch(self._settings.broker)
            canvas = Canvas(self._app, self._info.hostname)
            self._lane = Lane(self._settings, store, endpoints, self._info, observers, watch, canvas)
            began = time.monotonic()
            try:
                await self._lane.run()
            except ExceptionGroup as error:
                if is_shortage(error):
                    logger.error("the worker is short of memory, threads or files: it gives back its tasks, and ends")
                    await store.give_back()
                    raise
                failures = 1 if time.monotonic() - began > STEADY_S else failures + 1
                if failures >= FAILURES_MAX:
                    logger.error(
                        "the lane has failed %d times in a row: the worker ends, and others take over",
                        failures,
                    )
                    raise  # what it holds is returned by others, as an attempt of what had started
                delay_s = min(RESTART_MIN_S * 2**failures, RESTART_MAX_S)
                logger.exception("the lane has failed: it starts again in %.1f s with what it held", delay_s)
                await asyncio.sleep(delay_s)
            finally:
                send_events = events.enabled  # the next lane does as this one was told to
                watch.close()
                canvas.close()
                await endpoints.close()
