"""The lane's way: claim, sort out, check, batch; then dispatch and settle.

    claim loop -> Sorter: read -> (route | schedule | expire | errand | dead letter)
                          per model: check -> micro-batches
               -> Dispatcher, per batch: load -> start -> Triton -> split -> Endings -> settle loop

Everything runs on one event loop. Every background task belongs to one TaskGroup, so none can end
unnoticed: an error in any of them ends the lane, and whoever runs it starts a new one, which adopts what
the old one held. At most `inflight_max` tasks and `inflight_max_bytes` bytes are held at any time.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

from samphire.errors import SamphireError
from samphire.wire.envelope import describe
from samphire_broker.settings import Settings
from samphire_broker.store import Claimed, Store, WorkerInfo
from samphire_workers.claims.ledger import Ledger
from samphire_workers.claims.limits import AdaptiveLimits
from samphire_workers.inference.dispatcher import Dispatcher
from samphire_workers.inference.sequences import Sequences
from samphire_workers.inference.starting import Starter
from samphire_workers.intake.kinds import Kinds
from samphire_workers.intake.request import Kind, Request
from samphire_workers.intake.served import ServedModels
from samphire_workers.lane.claim_loop import ClaimLoop
from samphire_workers.lane.kinds import kinds_of
from samphire_workers.lane.running import Runner
from samphire_workers.lane.sorting import Sorter, read_or_error
from samphire_workers.monitoring.observers import LaneSeen, Observers
from samphire_workers.outbox.book import EndpointBook
from samphire_workers.outbox.outbox import Outbox
from samphire_workers.queues.discovery import QueueDiscovery
from samphire_workers.queues.round_robin import RoundRobin
from samphire_workers.queues.search import cancel_everywhere, requests_for
from samphire_workers.queues.wake import QueueWatch
from samphire_workers.repeat import persist
from samphire_workers.settlement import outcome
from samphire_workers.settlement.canvas import Canvas
from samphire_workers.settlement.endings import Endings
from samphire_workers.triton.endpoints import Endpoints
from samphire_workers.upkeep.periodic import keep_clock, keep_time, tell_clients, tell_observers, watch_letters
from samphire_workers.webhooks.deliveries import Deliveries
from samphire_workers.webhooks.leading import Leading
from samphire_workers.work import Work

logger = logging.getLogger(__name__)


class ScheduledTask(NamedTuple):
    """A task that waits for its time."""

    task_id: str
    due_s: float
    """Its time, in s since 1970."""
    list_key: str
    name: str
    described: str


class Lane:
    """One worker's lane over one broker and its endpoints. Run it once.

    Args:
        settings, store, endpoints, info, watch, canvas: of the worker.
        observers: are told of what happens.
        extra_kinds: kinds of task beside those of the table, as tests have them.
    """

    def __init__(
        self,
        settings: Settings,
        store: Store,
        endpoints: Endpoints,
        info: WorkerInfo,
        observers: Observers,
        watch: QueueWatch,
        canvas: Canvas,
        extra_kinds: Sequence[Kind] = (),
    ) -> None:
        self._settings = settings
        self._store = store
        self._endpoints = endpoints
        self._observers = observers
        self._watch = watch
        self._work = work = Work()
        self._round_robin = RoundRobin(settings.queue_weights)
        self._served = ServedModels(endpoints, settings, info.id)
        self._served.on_new = observers.served
        self._discovery = QueueDiscovery(store, endpoints, self._served, self._round_robin, watch, work)
        limits = AdaptiveLimits(settings.inflight_max)
        self._ledger = ledger = Ledger(store, limits, self._discovery, watch, observers)
        self._book = EndpointBook(store, settings)
        outbox = Outbox(self._book, store.clock.now, settings.gateway_url)
        self._endings = endings = Endings(settings, store, ledger, work, canvas, observers, outbox, info.hostname)
        self._leading = Leading(settings, store, ledger, self._book, watch)
        self._deliveries = Deliveries(
            settings, store, ledger, work, endings, observers, self._book, self._leading, info.hostname
        )
        self._kinds = Kinds([*kinds_of(endings, self._deliveries), *extra_kinds])
        self._discovery.on_deliveries = self._leading.note
        self._discovery.serve_always(self._kinds.queues)
        starter = Starter(settings, store, endings, ledger, work, info, observers)
        self._dispatcher = Dispatcher(
            settings, store, endpoints, self._served, ledger, work, endings, starter, observers
        )
        self._runner = Runner(store, ledger, work, starter, endings)
        self._sequences = Sequences(store, self._served, endpoints, endings, ledger, work, self._dispatcher)
        sorter = Sorter(
            settings,
            store,
            self._kinds,
            self._served,
            self._discovery,
            watch,
            ledger,
            work,
            endings,
            self._sequences,
            self._dispatcher,
            self._runner,
            self._book,
        )
        self._claims = ClaimLoop(
            settings,
            store,
            endpoints,
            self._served,
            watch,
            self._round_robin,
            self._discovery,
            ledger,
            endings,
            self._dispatcher,
            self._sequences,
            self._leading,
            sorter,
            observers,
        )

    async def run(self) -> None:
        """Move tasks until `stop`; then finish what is held and return.

        Raises:
            ExceptionGroup: a background task failed; whatever was held is still in the in-flight hash.
        """
        try:
            await self._run()
        finally:
            await self._deliveries.close()

    async def _run(self) -> None:
        async with self._work as work:
            for forever in (
                self._endpoints.watch(),
                self._served.watch(self._watch.wake),
                self._endings.settler.run(),
                self._endings.log_writer.run(),
                self._discovery.discover(self._claims.may_claim),
                self._discovery.look(),
                self._watch.listen(),
                self._sequences.lead(self._watch.wake, self._ledger.some_of),
                self._book.keep_fresh(),
                self._leading.lead(),
                self._observers.run(),
                keep_clock(self._store, self.cancel),
                keep_time(self._store.clock),
                watch_letters(self._store, self._settings, self._observers),
                tell_clients(self._store, self._served.signatures),
            ):
                work.keep(forever)
            if self._observers.want_states:
                work.keep(tell_observers(self._store, self._observers, self._seen, self._round_robin.lists))
            await self._claims.run()
            await self._leading.stop()
            await self._endings.settler.drain()
            while await work.wait_for_begun():
                await self._endings.settler.drain()  # what it refuses is work again
            work.end_kept()
            self._watch.close()

    def _seen(self) -> LaneSeen:
        endpoints = {endpoint.url: self._endpoints.answers(endpoint) for endpoint in self._endpoints.all}
        return LaneSeen(len(self._ledger), self._ledger.nbytes, endpoints, self._endpoints.open_breakers())

    def requests(self) -> list[Request]:
        """What this lane holds, claimed and not yet settled."""
        return self._ledger.requests()

    def queues(self) -> list[str]:
        """The queues that this lane claims from."""
        return self._round_robin.queues

    def send_events(self, wanted: bool) -> None:
        """Send task events to monitors, or none."""
        self._observers.enable(wanted)

    async def scheduled(self, most: int) -> list[ScheduledTask]:
        """Tasks that wait for their time, of all workers, the earliest first."""
        found = []
        for task_id, due_s, list_key, message in await self._store.scheduled(most):
            request, _ = read_or_error(Claimed(f"0:{list_key}", len(message), message), self._settings, self._kinds)
            described = describe(request.infer) if request.infer is not None else ""
            name = request.envelope.headers.task if request.envelope is not None else ""
            found.append(ScheduledTask(task_id, due_s, list_key, name, described))
        return found

    async def cancel(self, task_ids: Sequence[str]) -> dict[str, str]:
        """End tasks, those that clients ask for among them; see `Store.cancel`."""
        verdicts = await self._store.cancel(outcome.revoked_meta("", "revoked"), task_ids)
        for task_id, verdict in verdicts.items():
            if verdict == "cancelled":
                self._observers.cancelled(task_id)
        running = {task_id for task_id, verdict in verdicts.items() if verdict == "running"}
        if running:
            for request in self.requests():
                if request.task_id in running and not request.over:
                    self._endings.cancel_running(request)
            self._dispatcher.stop_over()
            self._runner.stop_over()
        if again := requests_for(verdicts):
            self._work.begin(self._cancel_again(again))
        return verdicts

    async def _cancel_again(self, requests: Sequence[str]) -> None:
        meta = outcome.revoked_meta("", "revoked")
        try:
            verdicts = await persist(lambda: cancel_everywhere(self._store, requests, meta, self._round_robin.queues))
        except SamphireError as error:  # a client that has no answer asks again
            logger.warning(
                "%d cancellations are not answered now; their clients ask again: %s",
                len(requests),
                error,
                extra={"action": "seek_failed"},
            )
            return
        for task_id, verdict in verdicts.items():
            if verdict == "cancelled":
                self._observers.cancelled(task_id)

    def hand_back(self) -> None:
        """Claim nothing more, and give what is held back to the queues instead of finishing it."""
        self.stop()
        self._work.is_handed_back = True
        self._dispatcher.hand_back()
        self._runner.hand_back()
        self._deliveries.hand_back()

    def stop(self) -> None:
        """Claim nothing more; `run` returns once everything held is settled."""
        self._claims.stop()
