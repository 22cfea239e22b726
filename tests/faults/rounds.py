"""A round: clients submit, a fault happens so many times, clients rest, every task is accounted for."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import psutil
from redis.exceptions import RedisError

from samphire import AsyncClient, ResultTimeoutError, SamphireError
from samphire_broker.embedded.process import PartError
from tests.faults.client import answer
from tests.faults.matrix import FAULTS
from tests.faults.parts import NothingUnderWayError, until_async
from tests.faults.stand import Stand
from tests.faults.streams import StreamReaders
from tests.faults.webhooks import Webhooks

CLIENTS = 2
QUIET_TIMEOUT_S = 15.0
"""For what is left when the clients rest."""
READ_TIMEOUT_S = 5.0
LOST = "lost"


@dataclass
class Round:
    """What came of a round; the counts are of tasks whose submit has returned."""

    fault: str
    trials: int = 0
    met_nobody: int = 0
    """Faults at a moment when nothing was under way: no trials."""
    tasks: int = 0
    lost: int = 0
    """Nothing happens any more, and no end is stored."""
    published_twice: int = 0
    within_bound: int = 0
    """Of these two: submits that had returned, and ends, of the last moments before Valkey was killed in the mode
    `everysec`, which does not promise to have written them."""
    wrong: int = 0
    """Ended as succeeded, with other numbers than the model makes of what was submitted; or not to be read."""
    unheard: int = 0
    """Ended, but the client that waited for it was never told, or no event says so."""
    left_behind: int = 0
    """Messages in a queue or in flight after all tasks had ended."""
    dead_lettered: Counter[str] = field(default_factory=Counter)
    re_executed: int = 0
    """Executions beyond the first."""
    burned: int = 0
    """Attempts that were counted while a server was away: nobody's fault, so there must be none."""
    refused: Counter[str] = field(default_factory=Counter)
    """Submits that raised: the client was told that the task may not be queued."""
    recovery_s: list[float] = field(default_factory=list)
    times: dict[str, list[float]] = field(default_factory=dict)
    held: list[int] = field(default_factory=list)
    streams: int = 0
    """Streams that were read to their end meanwhile."""
    stream_restarts: int = 0
    """Times that a reader was told that outputs begin anew."""
    webhooks: int = 0
    """Tasks whose webhook has arrived meanwhile."""
    webhooks_lost: int = 0
    """Those that have not, though nothing was to be forgotten."""
    webhook_repeats: int = 0
    """Webhooks that arrived again, under the same id."""
    failures: list[str] = field(default_factory=list)
    """Trials, streams and webhooks, that did not end as they must."""
    seconds: float = 0.0

    def __post_init__(self) -> None:
        """As read from a report, where counts are plain objects."""
        self.dead_lettered = Counter(self.dead_lettered)
        self.refused = Counter(self.refused)

    @property
    def broken(self) -> bool:
        """Whether a promise was broken."""
        counts = (
            self.lost
            + self.published_twice
            - self.within_bound
            + self.wrong
            + self.unheard
            + self.left_behind
            + self.burned
        )
        return bool(counts or self.failures)


async def run_round(
    stand: Stand, fault: str, trials: int, *, may_go_on: Callable[[], bool] = lambda: True, clients: int = CLIENTS
) -> Round:
    """Let a fault happen `trials` times under load, and account for every task."""
    began = time.monotonic()
    result = Round(fault)
    await stand.set_fsync("always" if fault.endswith("-always") else "everysec")
    if fault.startswith(("worker", "deliverer")):
        await stand.may_reap()
    await stand.load(clients)
    readers = StreamReaders(stand)
    readers.start()
    webhooks = Webhooks(stand)
    await webhooks.start()
    while result.trials + len(result.failures) < trials and result.met_nobody <= trials and may_go_on():
        await one_trial(stand, fault, result)
    await stand.all_ready()
    await readers.rest()
    result.streams, result.stream_restarts = readers.ended, readers.restarts
    result.failures += readers.untrue
    await webhooks.rest()
    result.webhooks, result.webhooks_lost, result.webhook_repeats = webhooks.arrived, webhooks.lost, webhooks.repeats
    result.failures += webhooks.untrue
    await account(stand, result)
    result.seconds = time.monotonic() - began
    return result


async def one_trial(stand: Stand, fault: str, result: Round) -> None:
    """Let a fault happen, and note what came of it."""
    try:
        trial = await FAULTS[fault](stand)
        await stand.goes_on()
    except NothingUnderWayError:
        result.met_nobody += 1
    except (AssertionError, TimeoutError, PartError, RedisError) as error:
        result.failures.append(f"{fault}: {error}")
        await repair(stand)
    else:
        result.trials += 1
        result.recovery_s.append(round(trial.recovery_s, 3))
        result.held.append(trial.held)
        result.burned += trial.burned
        for name, seconds in trial.times.items():
            result.times.setdefault(name, []).append(round(seconds, 3))


async def repair(stand: Stand) -> None:
    """After a trial that failed half-way: what stands still goes on, what has ended is started."""
    for part in (stand.broker, stand.triton, *stand.workers):
        if part in stand.starting:
            continue
        process = part.process
        if process is None or process.returncode is not None:
            await part.start()
        elif psutil.Process(process.pid).status() == psutil.STATUS_STOPPED:
            process.send_signal(signal.SIGCONT)


async def account(stand: Stand, result: Round) -> None:
    """Let the clients rest, wait until nothing is under way, and count."""
    await stand.all_ready()
    deaf = await stand.rest()
    result.failures += [f"{name} has ended by itself" for name, by_itself in deaf.items() if by_itself]
    ledger = stand.ledger
    ledger.read_files()
    with contextlib.suppress(TimeoutError):  # who has not ended then is lost
        await ledger.wait_ended(ledger.unended(), QUIET_TIMEOUT_S)
    with contextlib.suppress(TimeoutError):  # what is there then is left behind
        await until_async(lambda: _nothing_left(stand), QUIET_TIMEOUT_S, "empty queues")
    await ledger.hear_all()
    ledger.read_files()
    result.left_behind += await stand.left_behind()
    result.published_twice += ledger.ended_again
    accepted = {task_id: entry.number for task_id, entry in ledger.entries.items() if entry.number is not None}
    unread = {task_id: number for task_id, number in accepted.items() if not ledger.entries[task_id].verdict}
    verdicts = await _read(stand, unread)
    for task_id, entry in ledger.entries.items():
        twice = entry.ends > 1 or entry.published > 1
        result.published_twice += twice
        result.within_bound += twice and stand.may_be_forgotten(entry.first_ended_at)
        if entry.number is None:
            continue  # no submit of it has returned: it may have been done, or not
        result.tasks += 1
        result.re_executed += max(0, ledger.executions[entry.number] - 1)
        deaf_to_it = not entry.verdict and entry.client in deaf
        verdict = entry.verdict or verdicts[task_id]
        if verdict == LOST:
            result.lost += 1
            result.within_bound += stand.may_be_forgotten(entry.accepted_at)
        elif deaf_to_it or not entry.ends:
            result.unheard += 1
        elif entry.state == "failed":
            result.dead_lettered[verdict] += 1
        elif verdict != "right":
            result.wrong += 1
    result.refused.update(ledger.refused)
    ledger.close()
    stand.forgotten.clear()


async def _nothing_left(stand: Stand) -> bool:
    return not await stand.left_behind()


async def _read(stand: Stand, numbers: dict[str, int]) -> dict[str, str]:
    """Read results in the place of clients that were killed; verdicts by task id."""
    async with AsyncClient(stand.broker_url) as client:

        async def read(task_id: str, number: int) -> str:
            try:
                result = await client.task(task_id).result(READ_TIMEOUT_S)
            except ResultTimeoutError:
                return LOST
            except SamphireError as error:
                return type(error).__name__
            return "right" if result.outputs["y"].tolist() == [[answer(number)]] else "wrong"

        verdicts = await asyncio.gather(*(read(task_id, number) for task_id, number in numbers.items()))
    return dict(zip(numbers, verdicts, strict=True))
