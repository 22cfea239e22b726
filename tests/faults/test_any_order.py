"""Any sequence of transitions on a real Valkey, in batches: what must hold whatever has been done.

The model of the protocol (`tests/protocol`) visits every order of events in small scenes, with one task a call. This
adds what it leaves out: many tasks a call, several queues and priorities, claim checks, deleted results, trimmed
letters, and the server itself. Three workers and a publisher do what lanes and the SDK do. Any script's reply may be
lost, and is then repeated as the lane repeats it; a worker may be reaped and go on as if it had not been. After every
step the broker's keys are read, all of them, and looked through.

`SAMPHIRE_FAULTS=long` runs many more examples, and other ones each time.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any, ClassVar, TypeVar

import pytest
import redis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from samphire.errors import BrokerUnavailableError, IdempotencyConflictError
from samphire.transport.address import Address, broker_of
from samphire.transport.publisher import IdempotencyKey, Publisher
from samphire.wire import keys
from samphire_broker.settings import Settings
from samphire_broker.store import (
    Later,
    LeaseLostError,
    Letter,
    OtherEnd,
    Scheduled,
    Settled,
    Settlement,
    Store,
    Turn,
    WorkerInfo,
)
from tests.faults.ends import TERMINAL
from tests.faults.lossy import LossyConnection
from tests.stacks import ENDS_S, Valkey, running_valkey
from tests.support.names import KEYS

LONG = os.environ.get("SAMPHIRE_FAULTS") == "long"
EXAMPLES, STEPS = (4000, 100) if LONG else (60, 50)

QUEUES = (keys.INTAKE, "inference.m", "inference.m@t")
PRIORITIES = (0, 6)
LISTS = [keys.queue_list(queue, priority) for queue in QUEUES for priority in PRIORITIES]
TURNS = [Turn(key, 2, 0) for key in LISTS]
LETTERS_MAX = 3
WORKERS = ("w1", "w2", "w3")
CANCELLED_RESULT = '{"status":"REVOKED","task_id":"","result":{"cancelled":true}}'
ATTEMPT = '{"error":"made up"}'
STATE_OF = {
    "succeeded": "SUCCESS",
    "failed": "FAILURE",
    "cancelled": "REVOKED",
    "expired": "REVOKED",
    "retrying": "RETRY",
}

T = TypeVar("T")


class Worker:
    """A worker's store, and what the worker believes to hold: also what was taken from it since."""

    def __init__(self, url: str, name: str) -> None:
        self.store = Store(Settings(broker_url=url, lease_s=3600, dead_letters_max=LETTERS_MAX), name)
        for attribute, value in vars(self.store).items():
            if type(value).__name__ == "DirectConnection":
                setattr(self.store, attribute, LossyConnection(Address.parse(url)))
        self.info = WorkerInfo(name, f"{name}@host", 1)
        self.named = LossyConnection(Address.parse(url), name=KEYS.connection_prefix + name)
        self.believed: dict[str, str] = {}
        """Claim -> message."""

    @property
    def connections(self) -> list[LossyConnection]:
        """All of its connections."""
        return [value for value in (*vars(self.store).values(), self.named) if isinstance(value, LossyConnection)]

    async def close(self) -> None:
        """Close them."""
        await self.store.close()
        await self.named.close()


class Hands:
    """Who acts on the broker; the same for all examples, since they remember nothing."""

    def __init__(self, valkey: Valkey) -> None:
        self.client = valkey.client
        self.runner = asyncio.Runner()
        self.workers = {name: Worker(valkey.url, name) for name in WORKERS}
        self.publisher = Publisher(broker_of(valkey.url), queue_limit=0, blob_ttl_s=3600)
        self.publisher.connection = LossyConnection(broker_of(valkey.url).address)

    def close(self) -> None:
        """Close all connections."""

        async def close() -> None:
            for worker in self.workers.values():
                await worker.close()
            await self.publisher.close()

        self.runner.run(close())
        self.runner.close()


def task_of(message: str) -> str:
    """The task of a message: what is sent again has a number behind it, and is another message."""
    return message.partition("#")[0]


def meta(state: str, task_id: str) -> str:
    """As the worker stores it."""
    return json.dumps({"status": state, "task_id": task_id, "result": {}}, separators=(",", ":"))


class Snapshot:
    """All that is on the broker, read at once."""

    def __init__(self, client: redis.Redis) -> None:
        names = sorted(client.keys("*"))
        pipe = client.pipeline(transaction=False)
        for name in names:
            pipe.type(name)
        reads: dict[bytes, Callable[[bytes], Any]] = {
            b"string": pipe.get,
            b"list": lambda name: pipe.lrange(name, 0, -1),
            b"hash": pipe.hgetall,
            b"set": pipe.smembers,
            b"zset": lambda name: pipe.zrange(name, 0, -1),
            b"stream": lambda name: pipe.xrange(name),
        }
        for name, kind in zip(names, pipe.execute(), strict=True):
            reads[kind](name)
        self.keys: dict[str, Any] = {name.decode(): value for name, value in zip(names, pipe.execute(), strict=True)}

    def hash(self, key: str) -> dict[str, bytes]:
        return {field.decode(): value for field, value in self.keys.get(key, {}).items()}

    def members(self, key: str) -> set[str]:
        return {member.decode() for member in self.keys.get(key, ())}

    def state(self, task_id: str) -> str | None:
        raw = self.keys.get(KEYS.meta_prefix + task_id)
        return str(json.loads(raw)["status"]) if raw else None

    def messages(self) -> Counter[str]:
        """Messages that wait or are held, by task."""
        found = Counter(task_of(message.decode()) for key in LISTS for message in self.keys.get(key, ()))
        scheduled = [value.partition(b" ")[2] for value in self.hash(KEYS.scheduled_messages).values()]
        held = [m for name in WORKERS for m in self.hash(f"{KEYS.worker_prefix}{name}:inflight").values()]
        found.update(task_of(message.decode()) for message in (*scheduled, *held))
        return found


class AnyOrder(RuleBasedStateMachine):
    """What lanes and clients may do, in any order."""

    hands: ClassVar[Hands]

    def __init__(self) -> None:
        super().__init__()
        self.client = self.hands.client
        self.client.flushdb()
        self.pubsub = self.client.pubsub()
        self.pubsub.psubscribe(f"{KEYS.meta_prefix}*")
        assert (self.pubsub.get_message(timeout=5) or {})["type"] == "psubscribe"
        self.runner, self.workers, self.publisher = self.hands.runner, self.hands.workers, self.hands.publisher
        for worker in self.workers.values():
            worker.believed.clear()
            for connection in worker.connections:
                connection.lose_next = False
        self.made: Counter[str] = Counter()
        """Messages of each task that were ever pushed."""
        self.runs: Counter[str] = Counter()
        """Runs of each task after its first."""
        self.ends: Counter[str] = Counter()
        """How often the end of each task was published."""
        self.asked_to_cancel: set[str] = set()
        self.scheduled_twice: set[str] = set()
        self.ended: dict[str, str] = {}
        """Ends as they were at the last look."""

    def teardown(self) -> None:
        self.pubsub.close()

    # -- help -------------------------------------------------------------------------------------

    def call(self, call: Callable[[], Awaitable[T]]) -> T:
        async def awaited() -> T:
            return await call()

        return self.runner.run(awaited())

    def persist(self, worker: Worker, lost: bool, call: Callable[[], Awaitable[T]]) -> T:
        """Call; with a reply that is lost, the call is made again."""
        if lost:
            for connection in worker.connections:
                connection.lose_next = True
            with pytest.raises(BrokerUnavailableError, match="thrown away"):
                self.call(call)
            for connection in worker.connections:
                connection.lose_next = False
        return self.call(call)

    def let_go(self, worker: Worker, fields: Iterable[str]) -> None:
        for claim in fields:
            worker.believed.pop(claim, None)

    def new_task(self) -> str:
        task_id = f"t{len(self.made)}"
        self.made[task_id] += 1
        return task_id

    def some_claims(self, data: st.DataObject, worker: Worker) -> list[str]:
        """Some of what a worker believes to hold, in the order of the claims."""
        believed = sorted(worker.believed, key=keys.claim_number)
        drawn = data.draw(st.lists(st.sampled_from(believed), min_size=1, max_size=4, unique=True))
        return sorted(drawn, key=keys.claim_number)

    def holding(self, data: st.DataObject) -> Worker:
        return self.workers[data.draw(st.sampled_from([n for n, w in self.workers.items() if w.believed]))]

    @property
    def anybody_holds(self) -> bool:
        return any(worker.believed for worker in self.workers.values())

    @initialize()
    def begin(self) -> None:
        """Workers that live and tasks that wait: what an example does then reaches further."""
        for worker in self.workers.values():
            self.call(lambda worker=worker: worker.store.beat(worker.info, worker.named))  # type: ignore[misc]
        for queue in QUEUES[:2]:
            self.submit(queue, 0, 3, queue != keys.INTAKE, False)

    # -- producers --------------------------------------------------------------------------------

    def publish(self, lost: bool, *arguments: Any) -> str:
        """The publisher repeats a submit by itself; the mark of the call lets it happen once."""
        self.publisher.connection.lose_next = lost  # type: ignore[attr-defined]
        return self.call(lambda: self.publisher.publish(*arguments))

    @rule(
        queue=st.sampled_from(QUEUES),
        priority=st.sampled_from(PRIORITIES),
        count=st.integers(1, 4),
        blob=st.booleans(),
        lost=st.booleans(),
    )
    def submit(self, queue: str, priority: int, count: int, blob: bool, lost: bool) -> None:
        ids = [self.new_task() for _ in range(count)]
        blobs = [(f"{keys.BLOB_PREFIX}{ids[0]}:0", b"data")] if blob else []
        before = self.client.llen(keys.queue_list(queue, priority))
        assert self.publish(lost, queue, priority, [task_id.encode() for task_id in ids], blobs) == ""
        assert self.client.llen(keys.queue_list(queue, priority)) == before + count

    @precondition(lambda self: len(self.made) % 3 == 0)
    @rule(key=st.sampled_from("kl"), digest=st.sampled_from("xy"), lost=st.booleans())
    def submit_with_a_key(self, key: str, digest: str, lost: bool) -> None:
        known = self.client.get(KEYS.idempotency_prefix + key)
        task_id = f"t{len(self.made)}"
        arguments = (lost, QUEUES[1], 0, [task_id.encode()], [], IdempotencyKey(key, task_id, digest, 3600))
        if known is None:
            self.new_task()
            assert self.publish(*arguments) == ""
        elif known.decode().endswith(digest):
            assert self.publish(*arguments) == known.decode().partition(" ")[0]
        else:
            with pytest.raises(IdempotencyConflictError):
                self.publish(*arguments)

    @precondition(lambda self: sum(self.made.values()) - len(self.made) < 6)
    @rule(data=st.data(), key=st.sampled_from(LISTS), again=st.booleans())
    def a_producer_repeats_itself(self, data: st.DataObject, key: str, again: bool) -> None:
        """A copy of a task's message, or the task sent again."""
        task_id = data.draw(st.sampled_from(sorted(self.made)))
        self.made[task_id] += 1
        self.runs[task_id] += again
        self.client.lpush(key, f"{task_id}#{self.made[task_id]}" if again else task_id)

    # -- claims -----------------------------------------------------------------------------------

    @rule(name=st.sampled_from(WORKERS), most=st.integers(1, 8), lost=st.booleans())
    def claim(self, name: str, most: int, lost: bool) -> None:
        worker = self.workers[name]
        before = {key: [m.decode() for m in reversed(self.client.lrange(key, 0, -1))] for key in LISTS}
        if not self.client.exists(KEYS.worker_prefix + name):
            with pytest.raises(LeaseLostError):
                self.call(lambda: worker.store.claim(TURNS, [most], most, 10**9))
            self.call(lambda: worker.store.beat(worker.info, worker.named))
        claimed = self.persist(worker, lost, lambda: worker.store.claim(TURNS, [most], most, 10**9))
        assert len({claim.field for claim in claimed} | worker.believed.keys()) == len(claimed) + len(worker.believed)
        for key in LISTS:
            mine = [claim.message.decode() for claim in claimed if claim.list_key == key]
            first = 0 if not lost else before[key].index(mine[0]) if mine else 0
            assert mine == before[key][first : first + len(mine)], "the oldest first"
        worker.believed |= {claim.field: claim.message.decode() for claim in claimed}

    @rule(name=st.sampled_from(WORKERS))
    def adopt(self, name: str) -> None:
        worker = self.workers[name]
        found = self.call(lambda: worker.store.adopt(set(worker.believed)))
        worker.believed |= {claim.field: claim.message.decode() for claim in found}
        inflight = self.client.hkeys(f"{KEYS.worker_prefix}{name}:inflight")
        assert {field.decode() for field in inflight} <= worker.believed.keys()

    @precondition(lambda self: self.anybody_holds)
    @rule(data=st.data(), lost=st.booleans())
    def start(self, data: st.DataObject, lost: bool) -> None:
        worker = self.holding(data)
        tasks = [(claim, task_of(worker.believed[claim])) for claim in self.some_claims(data, worker)]
        verdicts = self.persist(worker, lost, lambda: worker.store.start(tasks, worker.info))
        self.let_go(worker, [claim for (claim, _), verdict in zip(tasks, verdicts, strict=True) if verdict in (-1, -2)])

    @precondition(lambda self: self.anybody_holds)
    @rule(data=st.data(), lost=st.booleans())
    def run(self, data: st.DataObject, lost: bool) -> None:
        """Start and settle, as most tasks go."""
        self.start(data, lost)
        if self.anybody_holds:
            self.settle(data, True, False, lost)

    @rule(name=st.sampled_from(WORKERS), model=st.sampled_from(["m", "n", ""]), keep=st.booleans(), lost=st.booleans())
    def alone(self, name: str, model: str, keep: bool, lost: bool) -> None:
        store, holder = self.workers[name].store, self.client.get(KEYS.alone)
        others = self.persist(self.workers[name], lost, lambda: store.alone(model, 3600 if keep else 0))
        if holder is not None and not holder.startswith(name.encode()):
            assert others == -1 and self.client.get(KEYS.alone) == holder
        else:
            assert others >= 0 and (self.client.get(KEYS.alone) is not None) == keep

    # -- the ways out of a claim ------------------------------------------------------------------

    @precondition(lambda self: self.anybody_holds)
    @rule(data=st.data(), stream=st.booleans(), steps=st.booleans(), lost=st.booleans())
    def settle(self, data: st.DataObject, stream: bool, steps: bool, lost: bool) -> None:
        worker = self.holding(data)
        ends: list[Settlement] = []
        for claim in self.some_claims(data, worker):
            task_id, state = task_of(worker.believed[claim]), data.draw(st.sampled_from(sorted(STATE_OF)))
            later = f"t{len(self.made)}" if steps and state != "retrying" else ""
            if later:
                self.made[later] += 0  # its name is taken, whether or not it is pushed
            other = OtherEnd("later", "failed", meta("FAILURE", "later"), "events:c")
            ends.append(
                Settlement(
                    claim,
                    task_id,
                    state,
                    meta(STATE_OF[state], task_id),
                    "events:c" if stream else "",
                    (f"{keys.BLOB_PREFIX}{task_id}:0",),
                    ((QUEUES[2], later),) if later else (),
                    (other,) if steps and state == "failed" else (),
                    Letter(task_id, "m", "model_fault", "Error: made up", 1, ATTEMPT) if state == "failed" else (),
                    Later(1e6, ATTEMPT) if state == "retrying" else (),
                )
            )
        verdicts = self.persist(worker, lost, lambda: worker.store.settle(ends))
        settled = zip(ends, verdicts, strict=True)
        self.let_go(worker, [end.field for end, verdict in settled if verdict is not Settled.WAS_CANCELLED])
        pushed = Counter(message.decode() for message in self.client.lrange(QUEUES[2], 0, -1))
        for step in (message for ended in ends for _, message in ended.pushes):
            assert pushed[step] <= 1, "a next step was pushed twice"
            self.made[step] = pushed[step]

    @precondition(lambda self: self.anybody_holds)
    @rule(data=st.data(), blamed=st.booleans(), died=st.booleans(), lost=st.booleans())
    def release(self, data: st.DataObject, blamed: bool, died: bool, lost: bool) -> None:
        worker, attempt = self.holding(data), ATTEMPT if blamed else ""
        fields = self.some_claims(data, worker)
        self.persist(worker, lost, lambda: worker.store.release(fields, attempt=attempt, endpoint_died=died))
        self.let_go(worker, fields)

    @precondition(lambda self: self.anybody_holds)
    @rule(data=st.data(), queue=st.sampled_from(QUEUES), lost=st.booleans())
    def route(self, data: st.DataObject, queue: str, lost: bool) -> None:
        worker = self.holding(data)
        moves = [(claim, queue, queue) for claim in self.not_started(self.some_claims(data, worker), worker)]
        self.persist(worker, lost and bool(moves), lambda: worker.store.route(moves)) if moves else None
        self.let_go(worker, [claim for claim, _, _ in moves])

    def not_started(self, claims: Iterable[str], worker: Worker) -> list[str]:
        started = self.client.hkeys(f"{KEYS.worker_prefix}{worker.store.worker_id}:started")
        return [claim for claim in claims if claim.encode() not in started]

    @precondition(lambda self: self.anybody_holds)
    @rule(data=st.data(), due=st.booleans(), lost=st.booleans())
    def schedule(self, data: st.DataObject, due: bool, lost: bool) -> None:
        worker = self.holding(data)
        claims = self.not_started(self.some_claims(data, worker), worker)
        tasks = [(claim, task_of(worker.believed[claim]), 1.0 if due else 4e9) for claim in claims]
        if not tasks:
            return
        scheduled = {task_id.decode() for task_id in self.client.zrange(KEYS.scheduled, 0, -1)}
        times = Counter([task_id for _, task_id, _ in tasks] + [t for _, t, _ in tasks if t in scheduled])
        self.scheduled_twice |= {task_id for task_id, count in times.items() if count > 1}  # one takes another's place
        verdicts = self.persist(worker, lost, lambda: worker.store.schedule(tasks))
        kept = (Scheduled.DUE, Scheduled.CANCELLED)
        self.let_go(worker, [c for (c, _, _), verdict in zip(tasks, verdicts, strict=True) if verdict not in kept])

    @rule(lost=st.booleans(), data=st.data())
    def time_goes_by(self, data: st.DataObject, lost: bool) -> None:
        waiting = sorted(task_id.decode() for task_id in self.client.zrange(KEYS.scheduled, 0, -1))
        if not waiting:
            return
        due = data.draw(st.lists(st.sampled_from(waiting), min_size=1, unique=True))
        self.client.zadd(KEYS.scheduled, {task_id: second for second, task_id in enumerate(due, 1)})
        self.persist(self.workers["w1"], lost, self.workers["w1"].store.return_due)
        assert not {task_id.encode() for task_id in due} & set(self.client.zrange(KEYS.scheduled, 0, -1))

    # -- clients ----------------------------------------------------------------------------------

    @rule(data=st.data(), stream=st.booleans(), lost=st.booleans())
    def cancel(self, data: st.DataObject, stream: bool, lost: bool) -> None:
        named = data.draw(st.lists(st.sampled_from(sorted(self.made)), max_size=2))
        revoked = data.draw(st.lists(st.sampled_from(sorted(self.made)), max_size=1))
        for task_id in named:
            self.client.rpush(KEYS.cancels, f"{'events:c' if stream else ''} {task_id}")
        self.asked_to_cancel |= {*named, *revoked}
        store = self.workers["w2"].store
        self.persist(self.workers["w2"], lost, lambda: store.cancel(CANCELLED_RESULT, revoked))

    @rule(data=st.data(), verb=st.sampled_from(["redrive", "purge"]), lost=st.booleans())
    def serve_letters(self, data: st.DataObject, verb: str, lost: bool) -> None:
        known = sorted({"t0", *(letter.decode() for letter in self.client.zrange(KEYS.dead, 0, -1))})
        for letter in data.draw(st.lists(st.sampled_from(known), min_size=1, max_size=3)):
            run = self.client.hget(KEYS.dead_prefix + letter, "run")
            self.client.rpush(KEYS.letters, f"{verb}:{run.decode() if run else 1} {letter}")
            if verb == "redrive":
                self.runs[letter] += 1
                self.runs["later"] += 1
        self.persist(self.workers["w3"], lost, self.workers["w3"].store.serve_letters)
        assert not self.client.llen(KEYS.letters)

    @rule(lost=st.booleans())
    def trim_letters(self, lost: bool) -> None:
        trimmed = self.persist(self.workers["w2"], lost, self.workers["w2"].store.trim_letters)
        assert trimmed.left == self.client.zcard(KEYS.dead) <= LETTERS_MAX

    @rule(data=st.data(), lost=st.booleans())
    def delete_results(self, data: st.DataObject, lost: bool) -> None:
        for task_id in data.draw(st.lists(st.sampled_from(sorted(self.made)), min_size=1, max_size=3)):
            self.client.rpush(KEYS.deletes, task_id)
        self.persist(self.workers["w1"], lost, self.workers["w1"].store.delete_results)
        assert not self.client.llen(KEYS.deletes)

    # -- workers that are lost, and come back -------------------------------------------------------

    @rule(
        by=st.sampled_from(WORKERS),
        name=st.sampled_from(WORKERS),
        how=st.sampled_from(["lapsed", "connection", "beaten since", "alive", "left"]),
        lost=st.booleans(),
    )
    def reap(self, by: str, name: str, how: str, lost: bool) -> None:
        if how == "left":
            self.call(self.workers[name].store.leave)
        lease = KEYS.worker_prefix + name
        beat = int(self.client.get(lease) or 0)
        how = how if beat else "lapsed"
        if how == "lapsed":
            self.client.delete(lease)
        last_beat = {"lapsed": None, "alive": None, "connection": beat, "beaten since": beat - 1}[how]
        store, held = self.workers[by].store, self.client.hlen(f"{lease}:inflight")
        reaped = self.persist(self.workers[by], lost, lambda: store.reap(name, last_beat, ATTEMPT))
        if how in ("beaten since", "alive"):
            assert reaped.moved == -1 and self.client.hlen(f"{lease}:inflight") == held
        else:
            assert reaped.left == 0 and not self.client.exists(f"{lease}:inflight", f"{lease}:started")

    # -- what must hold after every step ------------------------------------------------------------

    @invariant()
    def what_is_read_fits_together(self) -> None:
        found = Snapshot(self.client)
        for name in WORKERS:
            inflight = found.hash(f"{KEYS.worker_prefix}{name}:inflight")
            started = found.hash(f"{KEYS.worker_prefix}{name}:started")
            assert started.keys() <= inflight.keys(), "a claim is started and not in flight"
            assert all(task_of(inflight[c].decode()) == task_id.decode() for c, task_id in started.items())
            assert not inflight or name in found.members(KEYS.workers), "nobody will reap it"
        assert found.members(KEYS.scheduled) == found.hash(KEYS.scheduled_messages).keys()
        letters = {key.removeprefix(KEYS.dead_prefix) for key in found.keys if key.startswith(KEYS.dead_prefix)}
        assert letters == found.members(KEYS.dead)
        assert all(f"{KEYS.task_prefix}{task_id}" in found.keys for task_id in found.members(KEYS.tried))
        self.everything_is_in_one_place(found, letters)
        self.no_end_is_written_over(found)

    def everything_is_in_one_place(self, found: Snapshot, letters: set[str]) -> None:
        """Each task is queued, scheduled, in flight, dead-lettered or done; one of them, if it has one message."""
        messages = found.messages()
        for task_id, made in self.made.items():
            if not made:
                continue
            done = found.state(task_id) in TERMINAL
            dead = task_id in letters
            assert messages[task_id] <= made, f"{task_id}: more messages than were sent"
            assert messages[task_id] or done or dead, f"{task_id} is lost"
            if made == 1 and task_id not in self.asked_to_cancel and task_id != "later":
                assert messages[task_id] + (done or dead) == 1, (
                    f"{task_id}: {messages[task_id]}, done {done}, dead {dead}"
                )

    def no_end_is_written_over(self, found: Snapshot) -> None:
        """But a failure, by the next run; and each is remembered."""
        remembered = found.hash(KEYS.ended)
        for task_id, state in self.ended.items():
            assert state == "FAILURE" or found.state(task_id) == state, f"{task_id} was {state}"
        self.ended = {t: state for t in (*self.made, "later") if (state := found.state(t) or "") in TERMINAL}
        letters = {"SUCCESS": b"S", "FAILURE": b"F", "REVOKED": b"CcE"}
        for task_id, state in self.ended.items():
            assert remembered[task_id][:1] in letters[state], f"{task_id}: {state}, remembered {remembered[task_id]!r}"

    @invariant()
    def an_end_is_published_once_a_run(self) -> None:
        self.client.publish(f"{KEYS.meta_prefix}#", "")
        while True:
            message = self.pubsub.get_message(timeout=5)
            assert message is not None
            channel = message["channel"].decode().removeprefix(KEYS.meta_prefix)
            if channel == "#":
                break
            self.ends[channel] += json.loads(message["data"])["status"] in TERMINAL
        for task_id, count in self.ends.items():
            assert count <= 1 + self.runs[task_id], f"the end of {task_id} was published {count} times"


@pytest.fixture(scope="module")
def hands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hands]:
    """One server for all examples: each begins with an empty database."""
    with running_valkey(tmp_path_factory.mktemp("valkey"), "--appendfsync", "no") as valkey:
        made = Hands(valkey)
        yield made
        made.close()


@pytest.mark.timeout(0 if LONG else ENDS_S)  # of which Hypothesis may take 300 s to find a shorter failure
def test_any_sequence_of_transitions(hands: Hands) -> None:
    """What is on the broker fits together, and nothing is lost, done twice or written over."""

    class Machine(AnyOrder):
        pass

    Machine.hands = hands
    profile = settings(
        max_examples=EXAMPLES,
        stateful_step_count=STEPS,
        deadline=None,
        derandomize=not LONG,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    run_state_machine_as_test(Machine, settings=profile)
