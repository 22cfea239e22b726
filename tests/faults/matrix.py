"""The faults. Each proves that it happened, and that work was under way when it did; then it waits for recovery.

Recovery is the time from the fault until every task that the part held (a worker: in its in-flight hash; Triton
and the broker: in all of them; a client: submitted, and not ended) has ended.
"""

from __future__ import annotations

import asyncio
import re
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from tests.faults.parts import NothingUnderWayError, continued, killed, sent, stopped, until_async
from tests.faults.stand import ANSWER_TIMEOUT_S, Stand
from tests.support.names import KEYS

RESTART_S = 0.5
"""How long a killed server is away before it is started again: as `samphire up` waits."""
AWAY_S = 1.0
"""How long a server that is known to stand still goes on doing so."""
BROKER_PAUSE_S = 2.0
WEBHOOK_ENDPOINT = "faults"
"""Where the webhooks of a round go."""
UNDER_WAY_META = re.compile(rb'"status": ?"(STARTED|SUCCESS|FAILURE|REVOKED)"')


@dataclass
class Trial:
    """A fault that happened, and what came of it."""

    held: int
    """Tasks under way."""
    recovery_s: float
    times: dict[str, float] = field(default_factory=dict)
    """`returned_s`: until a lost worker's tasks were back in their queue. `running_s`: until all of them were started
    elsewhere, where those that the worker had started wait for their turn to run alone. `resumed_s`: from the return
    of a server until the next task ended. `detected_s`: until a server that stood still had no tasks any more."""

    burned: int = 0
    """Attempts that were counted while a server was away."""


Fault = Callable[[Stand], Awaitable[Trial]]


async def recovered(stand: Stand, held: set[str], began: float, burned: int = 0, **times: float) -> Trial:
    """Wait for the end of what was held."""
    if not held:
        raise NothingUnderWayError
    try:
        ended = await stand.ledger.wait_ended(held, ANSWER_TIMEOUT_S)
    except TimeoutError:
        left = set(stand.ledger.unended()) & held
        if not all(stand.may_be_forgotten(stand.ledger.entries[task_id].accepted_at) for task_id in left):
            raise
        held -= left  # they are counted as lost
        ended = await stand.ledger.wait_ended(held, 0.0)
    return Trial(len(held), max(0.0, ended - began), times, burned)


async def next_end(stand: Stand, since: float) -> float:
    """How long after `since` the next task ended."""

    async def look() -> bool:
        return stand.ledger.last_end > since

    await until_async(look, ANSWER_TIMEOUT_S, "a task to end")
    return stand.ledger.last_end - since


async def emptied(stand: Stand, inflight_key: str) -> None:
    """Wait until somebody has returned what a lost worker held."""

    async def look() -> bool:
        return not await stand.ask("EXISTS", inflight_key)

    await until_async(look, ANSWER_TIMEOUT_S, "a lost worker's tasks to be returned")


async def run_again(stand: Stand, held: set[str]) -> float:
    """When all of a lost worker's tasks, once they are returned, have been started elsewhere, or have ended."""

    async def look() -> bool:
        metas = await stand.ask("MGET", *((KEYS.meta_prefix + task_id) for task_id in held)) if held else []
        return all(meta is not None and UNDER_WAY_META.search(meta) for meta in metas)

    await until_async(look, ANSWER_TIMEOUT_S, "a lost worker's tasks to be started elsewhere")
    return time.monotonic()


# -- workers ----------------------------------------------------------------------------------------


async def worker_kill(stand: Stand) -> Trial:
    """kill -9 of a worker. What it holds is read once it is dead: nobody else has touched it yet."""
    worker = await stand.busy_worker()
    inflight = await stand.inflight_key(worker)
    began = time.monotonic()
    await killed(worker)
    held = await stand.held(worker)
    stand.restart_later(worker)
    await emptied(stand, inflight)
    returned_s = time.monotonic() - began
    running_s = await run_again(stand, held) - began
    return await recovered(stand, held, began, returned_s=returned_s, running_s=running_s)


async def deliverer_kill(stand: Stand) -> Trial:
    """kill -9 of the worker that leads an endpoint of webhooks, with some of them on their way."""
    worker = await stand.delivering_worker(WEBHOOK_ENDPOINT)
    inflight = await stand.inflight_key(worker)
    began = time.monotonic()
    await killed(worker)
    held, on_their_way = await stand.held(worker), await stand.deliveries_of(worker)
    stand.restart_later(worker)
    if not on_their_way:
        raise NothingUnderWayError
    await emptied(stand, inflight)
    returned_s = time.monotonic() - began

    async def delivered() -> bool:
        return all([await stand.ask("HGET", KEYS.delivery(one), "state") == b"delivered" for one in on_their_way])

    await until_async(delivered, ANSWER_TIMEOUT_S, "what a lost worker was delivering to arrive")
    delivered_s = time.monotonic() - began
    if held:
        await stand.ledger.wait_ended(held, ANSWER_TIMEOUT_S)
    return Trial(len(on_their_way), delivered_s, {"returned_s": returned_s})


async def worker_stop(stand: Stand) -> Trial:
    """SIGSTOP of a worker until its lease has lapsed and others have done its work; then SIGCONT.

    Answers of Triton wait in its socket meanwhile: it reads them, and must not settle what is not its own any more.
    """
    worker = await stand.busy_worker()
    inflight = await stand.inflight_key(worker)
    began = time.monotonic()
    await stopped(worker)
    held = await stand.held(worker)
    if not await stand.started(worker):
        await continued(worker)
        raise NothingUnderWayError
    await emptied(stand, inflight)
    returned_s = time.monotonic() - began
    running_s = await run_again(stand, held) - began
    trial = await recovered(stand, held, began, returned_s=returned_s, running_s=running_s)
    await continued(worker)

    async def works() -> bool:
        return bool(await stand.held(worker))

    await until_async(works, ANSWER_TIMEOUT_S, "the worker to claim again")
    return trial


async def worker_restart(stand: Stand) -> Trial:
    """SIGTERM to a worker that has tasks at Triton: it finishes them, and starts nothing more."""
    worker = await stand.busy_worker()
    inflight = await stand.inflight_key(worker)
    held = await stand.held(worker)
    began = time.monotonic()
    status = await sent(worker, signal.SIGTERM)
    assert status == 0, f"the worker ended with {status}"
    assert not await stand.ask("EXISTS", inflight), "a worker that ended in order has left tasks behind"
    stand.restart_later(worker)
    return await recovered(stand, held, began)


# -- Triton -----------------------------------------------------------------------------------------


async def triton_kill(stand: Stand) -> Trial:
    """kill -9 of Triton with tasks in it."""
    held = await stand.all_held()
    began = time.monotonic()
    await killed(stand.triton)
    return await triton_returns(stand, held, began)


async def triton_restart(stand: Stand) -> Trial:
    """SIGTERM to Triton with tasks in it."""
    held = await stand.all_held()
    began = time.monotonic()
    await sent(stand.triton, signal.SIGTERM)
    return await triton_returns(stand, held, began)


async def triton_returns(stand: Stand, held: set[str], began: float) -> Trial:
    """Start Triton again, with its models, and wait until the tasks are done."""
    await asyncio.sleep(RESTART_S)
    burned = await stand.attempts()
    await stand.triton.start()
    resumed_s = await next_end(stand, time.monotonic())
    return await recovered(stand, held, began, burned, resumed_s=resumed_s)


async def triton_stop(stand: Stand) -> Trial:
    """SIGSTOP of Triton until no worker holds anything any more, since it is known to be away; then SIGCONT."""
    held = await stand.all_held()
    began = time.monotonic()
    await stopped(stand.triton)
    held |= await stand.all_held()

    async def given_up() -> bool:
        return not any([await stand.held(worker) for worker in stand.workers])

    await until_async(given_up, ANSWER_TIMEOUT_S, "the workers to notice that Triton stands still")
    detected_s = time.monotonic() - began
    await asyncio.sleep(AWAY_S)
    burned = await stand.attempts()
    since = time.monotonic()
    await continued(stand.triton)
    resumed_s = await next_end(stand, since)
    return await recovered(stand, held, began, burned, resumed_s=resumed_s, detected_s=detected_s)


async def worker_and_triton_kill(stand: Stand) -> Trial:
    """kill -9 of a worker and of Triton at once."""
    worker = await stand.busy_worker()
    inflight = await stand.inflight_key(worker)
    began = time.monotonic()
    await asyncio.gather(killed(worker), killed(stand.triton))
    held = await stand.held(worker)
    if not held:
        stand.restart_later(worker)
        await triton_returns(stand, set(), began)
    stand.restart_later(worker)
    trial = await triton_returns(stand, held, began)
    await emptied(stand, inflight)
    trial.burned = 0  # the worker's tasks have lost an attempt, as they must
    return trial


# -- the broker -------------------------------------------------------------------------------------


async def broker_kill(stand: Stand) -> Trial:
    """kill -9 of Valkey while workers and clients talk to it."""
    return await broker_returns(stand, signal.SIGKILL)


async def broker_restart(stand: Stand) -> Trial:
    """SIGTERM to Valkey while workers and clients talk to it."""
    return await broker_returns(stand, signal.SIGTERM)


async def broker_returns(stand: Stand, number: signal.Signals) -> Trial:
    """End Valkey and start it again; its run id proves that it is another."""
    run = await run_id(stand)
    policy = await stand.ask("CONFIG", "GET", "appendfsync")
    assert policy[b"appendfsync"].decode() == stand.fsync, "not as durable as the trial says"
    held = await stand.all_held()
    began = time.monotonic()
    status = await sent(stand.broker, number)
    if number == signal.SIGKILL:
        assert status == -signal.SIGKILL, f"Valkey ended with {status}, not by SIGKILL"
    await stand.broker.start()
    if number == signal.SIGKILL and stand.fsync == "everysec":
        stand.forgotten.append((began, time.monotonic()))
    assert await run_id(stand) != run, "Valkey was not restarted"
    resumed_s = await next_end(stand, time.monotonic())
    return await recovered(stand, held, began, await stand.attempts(), resumed_s=resumed_s)


async def run_id(stand: Stand) -> str:
    """The name that Valkey gives itself at each start."""
    return str((await stand.ask("INFO", "server"))["run_id"])


async def broker_stop(stand: Stand) -> Trial:
    """SIGSTOP of Valkey for a while, then SIGCONT."""
    held = await stand.all_held()
    began = time.monotonic()
    await stopped(stand.broker)
    await asyncio.sleep(BROKER_PAUSE_S)
    since = time.monotonic()
    await continued(stand.broker)
    resumed_s = await next_end(stand, since)
    return await recovered(stand, held, began, resumed_s=resumed_s)


# -- clients ----------------------------------------------------------------------------------------


async def client_kill(stand: Stand) -> Trial:
    """kill -9 of a client that has tasks under way: they are done although nobody waits for them."""
    client = await stand.busy_client()
    began = time.monotonic()
    await killed(client)
    stand.clients.remove(client)
    stand.ledger.read_files()
    held = set(stand.ledger.unended(client.spec.name))
    await stand.start_client()
    return await recovered(stand, held, began)


async def client_stop(stand: Stand) -> Trial:
    """SIGSTOP of a client until its tasks have ended, then SIGCONT: it reads the results that it has missed."""
    client = await stand.busy_client()
    began = time.monotonic()
    await stopped(client)
    stand.ledger.read_files()
    held = set(stand.ledger.unended(client.spec.name))
    if not held:
        await continued(client)
    trial = await recovered(stand, held, began)
    await continued(client)
    return trial


FAULTS: dict[str, Fault] = {
    "worker-kill": worker_kill,
    "deliverer-kill": deliverer_kill,
    "worker-stop": worker_stop,
    "worker-restart": worker_restart,
    "triton-kill": triton_kill,
    "triton-stop": triton_stop,
    "triton-restart": triton_restart,
    "worker-and-triton-kill": worker_and_triton_kill,
    "valkey-kill-always": broker_kill,
    "valkey-kill-everysec": broker_kill,
    "valkey-stop": broker_stop,
    "valkey-restart": broker_restart,
    "client-kill": client_kill,
    "client-stop": client_stop,
}
"""By the names that reports and options use."""
