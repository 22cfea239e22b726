"""How many bytes the broker moves in one step: it does nothing else meanwhile."""

from __future__ import annotations

import re
from pathlib import Path

from tests.stacks import Valkey
from tests.support.names import KEYS
from tests.test_store import ATTEMPT, META, QUEUE, push, run, worker

INFLIGHT = "samphire:worker:w1:inflight"


def most_mb(valkey: Valkey) -> float:
    """The most memory that the server has had, in MB."""
    status_file = Path(f"/proc/{valkey.process.pid}/status")
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status_file.read_text())[0]) / 1024


def test_a_claim_reads_large_messages_one_at_a_time(valkey: Valkey) -> None:
    """The server does nothing else meanwhile; each is claimed once, in order."""

    async def test() -> None:
        push(valkey, *(f"{number:02}" + "x" * 8 * 2**20 for number in range(24)))
        before = most_mb(valkey)
        async with worker(valkey) as w:
            found = []
            while claims := await w.claim():
                assert len(claims) == 1 and w.store.cut_short
                found += [int(valkey.client.hget(INFLIGHT, claim.field)[:2]) for claim in claims]
            assert not w.store.cut_short
            assert found == list(range(24))
            push(valkey, "small", *("x" * 2**20 for _ in range(40)), "last")
            assert len(await w.claim()) == 17  # 16 MB a call
        assert most_mb(valkey) - before < 80  # not the 192 MB of a full page

    run(test)


def test_a_claim_of_small_messages_reads_full_pages(valkey: Valkey) -> None:
    """Reading the first ones of a list alone costs a few calls, and not one for each message."""

    async def test() -> None:
        push(valkey, *(str(number) for number in range(300)))
        async with worker(valkey) as w:
            await w.claim(1)
            valkey.client.config_resetstat()
            assert [claim.message.decode() for claim in await w.claim(128)] == [str(n) for n in range(1, 129)]
        assert valkey.client.info("commandstats")["cmdstat_lrange"]["calls"] <= 20

    run(test)


def test_a_lost_workers_claims_return_some_megabytes_at_a_time(valkey: Valkey) -> None:
    """What is left is returned by the next call, in order."""

    async def test() -> None:
        names = [f"{number}" + "x" * 6 * 2**20 for number in range(7)]
        push(valkey, *names)
        async with worker(valkey) as lost, worker(valkey, "w2") as other:
            while await lost.claim():
                pass
            beat = (await other.store.others())["w1"]
            found = []
            while not found or found[-1][2]:
                found.append(tuple(await other.store.reap("w1", beat, ATTEMPT)))
            assert found == [(3, 0, 4), (3, 0, 1), (1, 0, 0)]
            assert await other.store.others() == {}
        kept = [message[:1] for message in reversed(valkey.client.lrange(QUEUE, 0, -1))]
        assert kept == [b"%d" % number for number in range(7)]

    run(test)


def test_a_search_for_what_is_cancelled_is_bounded_in_bytes(valkey: Valkey) -> None:
    """Large messages are not all read into the server's memory; then an id is believed."""

    async def test() -> None:
        push(valkey, *("x" * 2**20 for _ in range(200)))
        valkey.client.sadd(KEYS.queues, QUEUE)
        before = most_mb(valkey)
        assert before > 200
        async with worker(valkey) as w:
            valkey.client.rpush(KEYS.cancels, "events:c nobody")
            assert await w.store.cancel(META) == {"nobody": "cancelled"}
        assert most_mb(valkey) - before < 60  # a page and its copies; not the 200 MB that are queued

    run(test)
