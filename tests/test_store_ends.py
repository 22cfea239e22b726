"""How the store ends tasks: results, duplicates, letters, next steps."""

from __future__ import annotations

import json

from samphire.wire import keys
from samphire_broker.store import (
    Later,
    Letter,
    OtherEnd,
    Settlement,
)
from tests.stacks import Valkey
from tests.support.names import KEYS
from tests.test_store import QUEUE, everywhere, failed, push, run, status, worker


def test_start_and_settle(valkey: Valkey) -> None:
    """A task is running, then done: acknowledged, stored, published, in the stream; all at once."""

    async def test() -> None:
        push(valkey, "a")
        pubsub = valkey.client.pubsub()
        pubsub.subscribe(KEYS.meta_prefix + "a")
        async with worker(valkey) as w:
            (claim,) = await w.claim()
            assert status(valkey, "a") is None
            assert await w.start([claim]) == [0]
            assert status(valkey, "a") == "STARTED"
            assert await w.settle(claim) == 1
        assert status(valkey, "a") == "SUCCESS"
        assert 0 < valkey.client.ttl(KEYS.meta_prefix + "a") <= 3600
        assert everywhere(valkey) == []
        assert not valkey.client.exists("samphire:worker:w1:inflight", "samphire:worker:w1:started")
        ((_, fields),) = valkey.client.xrange("samphire:events:c")
        assert fields == {b"succeeded": b"a", b"result": b'{"status":"SUCCESS"}'}
        messages = [pubsub.get_message(timeout=1) for _ in range(2)]
        assert messages[1] is not None and messages[1]["data"] == b'{"status":"SUCCESS"}'
        pubsub.close()

    run(test)


def test_a_settlement_counts_once(valkey: Valkey) -> None:
    """Repeated after a lost reply it changes nothing and says so."""

    async def test() -> None:
        push(valkey, "a")
        async with worker(valkey) as w:
            (claim,) = await w.claim()
            await w.start([claim])
            assert await w.settle(claim) == 1
            assert await w.settle(claim, '{"status":"FAILURE"}') == 0
        assert status(valkey, "a") == "SUCCESS"
        assert valkey.client.xlen("samphire:events:c") == 1

    run(test)


def test_a_stream_key_of_another_type_does_not_stop_a_settlement(valkey: Valkey) -> None:
    """Types are checked before the first write."""

    async def test() -> None:
        push(valkey, "a")
        valkey.client.set("samphire:events:c", "not a stream")
        async with worker(valkey) as w:
            (claim,) = await w.claim()
            await w.start([claim])
            assert await w.settle(claim) == 1
        assert status(valkey, "a") == "SUCCESS"

    run(test)


def test_a_duplicate_of_an_ended_task_is_dropped(valkey: Valkey) -> None:
    """A terminal state is written once."""

    async def test() -> None:
        push(valkey, "a", "a", "b")
        async with worker(valkey) as w:
            first, second, other = await w.claim()
            await w.start([first])
            await w.settle(first)
            assert await w.start([second, other]) == [-2, 0]
        assert status(valkey, "a") == "SUCCESS"
        assert everywhere(valkey) == ["b"]

    run(test)


def test_two_duplicates_under_way_end_once(valkey: Valkey) -> None:
    """Whoever is second, whatever it says, writes nothing; nor does a release take the result away."""

    async def test() -> None:
        push(valkey, "a", "a", "a", "a")
        async with worker(valkey) as w:
            one, two, three, four = await w.claim()
            assert await w.start([one, two, three, four]) == [0, 0, 0, 0]
            both = [
                Settlement(c.field, "a", "succeeded", f'{{"status":"SUCCESS","n":{n}}}', "events:c")
                for n, c in enumerate((one, two))
            ]
            assert await w.store.settle(both) == [1, 1]
            letter = failed(three, "a", stream="events:c")
            assert await w.store.settle([letter]) == [1]
            assert await w.store.release([four.field]) == 1
        assert json.loads(valkey.client.get(KEYS.meta_prefix + "a"))["n"] == 0
        assert valkey.client.xlen("samphire:events:c") == 1
        assert valkey.client.hlen("samphire:worker:w1:inflight") == 0

    run(test)


def test_a_duplicate_that_was_started_leaves_nothing_when_it_is_dropped(valkey: Valkey) -> None:
    """Its start is repeated after a lost reply; meanwhile the other has ended the task."""

    async def test() -> None:
        push(valkey, "a", "a")
        async with worker(valkey) as w:
            one, two = await w.claim()
            assert await w.start([one, two]) == [0, 0]
            assert await w.settle(one) == 1
            assert await w.start([two]) == [-2]
            assert not valkey.client.exists("samphire:worker:w1:inflight", "samphire:worker:w1:started")

    run(test)


def test_a_task_that_ends_in_the_batch_of_its_retry_is_not_remembered_as_tried(valkey: Valkey) -> None:
    """Two messages of it were under way; the lanes are not to look out for it until its lifetime is over."""

    async def test() -> None:
        push(valkey, "a", "a")
        async with worker(valkey) as w:
            one, two = await w.claim()
            await w.start([one, two])
            again = Settlement(one.field, "a", "retrying", "", "", retry=Later(60, "{}"))
            done = Settlement(two.field, "a", "succeeded", '{"status":"SUCCESS"}', "")
            assert await w.store.settle([again, done]) == [1, 1]
        assert not valkey.client.exists(KEYS.tried, "samphire:task:a")

    run(test)


def test_a_settlement_whose_start_was_lost_still_counts(valkey: Valkey) -> None:
    """The claim decides: a result is never thrown away with its message."""

    async def test() -> None:
        push(valkey, "a")
        async with worker(valkey) as w:
            (claim,) = await w.claim()
            assert await w.settle(claim) == 1
        assert status(valkey, "a") == "SUCCESS"

    run(test)


def test_names_that_are_no_queues_are_not_served(valkey: Valkey) -> None:
    """Whoever can write to the broker can write any name."""

    async def test() -> None:
        valkey.client.sadd(KEYS.queues, b"\xff\xfe", "celery", "inference.a@b@c", "inference.", "inference.good@t")
        for key in (b"inference.m\x06\x16x", b"inference.\xff", "inference.plain\x06\x163"):
            valkey.client.lpush(key, "x")
        async with worker(valkey) as w:
            assert await w.store.known_queues() == {"inference.good@t"}
            assert (await w.store.find_queues(0))[1] == {"inference.m", "inference.plain"}

    run(test)


def test_a_failed_task_becomes_a_dead_letter(valkey: Valkey) -> None:
    """With the original bytes, the reason and where it came from."""

    async def test() -> None:
        push(valkey, "a", priority=6)
        async with worker(valkey) as w:
            (claim,) = await w.claim()
            letter = failed(claim, "a", Letter("a", "m", "invalid_input", "Error: bad", 2), stream="events:c")
            assert await w.store.settle([letter]) == [1]
            assert await w.store.settle([letter]) == [0]
        assert status(valkey, "a") == "FAILURE"
        kept = valkey.client.hgetall("samphire:dead:a")
        assert kept.pop(b"died_at")
        assert kept == {
            b"message": b"a",
            b"queue": QUEUE.encode(),
            b"list": keys.queue_list(QUEUE, 6).encode(),
            b"task_id": b"a",
            b"model": b"m",
            b"reason": b"invalid_input",
            b"error": b"Error: bad",
            b"attempts": b"2",
            b"worker": b"w1",
            b"history": b"[{}]",
            b"run": b"1",
            b"stream": b"events:c",
        }
        assert valkey.client.ttl("samphire:dead:a") > 0
        event = {b"failed": b"a", b"result": b'{"status":"FAILURE"}'}  # settled alone, and small
        assert [fields for _, fields in valkey.client.xrange("samphire:events:c")] == [event]

    run(test)


def test_next_steps_and_the_ends_of_others_are_committed_with_the_end(valkey: Valkey) -> None:
    """A lost claim commits none of them; a key of another type loses no message; an end stands once."""

    async def test() -> None:
        push(valkey, "a", "b")
        valkey.client.set("inference.text", "no list")
        valkey.client.set(KEYS.meta_prefix + "ended", '{"status":"SUCCESS"}')
        async with worker(valkey) as w, worker(valkey, "w2") as other:
            one, two = await w.claim()
            step = Settlement(
                one.field,
                "a",
                "succeeded",
                '{"status":"SUCCESS"}',
                "events:c",
                pushes=(("inference.n", "first"), ("inference.n", "second"), ("inference.text", "third")),
                others=(
                    OtherEnd("later", "failed", '{"status":"FAILURE"}', "events:d"),
                    OtherEnd("ended", "failed", '{"status":"FAILURE"}', "events:d"),
                ),
            )
            assert await other.store.settle([step]) == [0]
            assert not valkey.client.exists("inference.n")
            assert await w.store.settle([step]) == [1]
            assert await w.store.settle([step._replace(field=two.field)]) == [1]  # a duplicate owes nothing more
        assert valkey.client.lrange("inference.n", 0, -1) == [b"second", b"first"]
        assert valkey.client.lrange("inference.text:returned", 0, -1) == [b"third"]
        assert (status(valkey, "later"), status(valkey, "ended")) == ("FAILURE", "SUCCESS")
        assert [fields for _, fields in valkey.client.xrange("samphire:events:d")] == [{b"failed": b"later"}]

    run(test)


def test_a_result_to_be_ignored_leaves_nothing(valkey: Valkey) -> None:
    """Not even the running state."""

    async def test() -> None:
        push(valkey, "a")
        async with worker(valkey) as w:
            (claim,) = await w.claim()
            await w.start([claim])
            assert status(valkey, "a") == "STARTED"
            assert await w.settle(claim, "") == 1
        assert status(valkey, "a") is None

    run(test)
