"""Every transition of the store in any order, on a real Valkey, beside a plain model of what should come of it.

Three workers and a publisher do what lanes and the SDK do. Any script's reply may be lost, and is then repeated as the
lane repeats it; a worker may be reaped and go on as if it had not been. After every step the broker's keys are
read and compared with the model's, all of them, and the invariants of the design are checked on what was
read alone, without the model.

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

from samphire import keys
from samphire.errors import BrokerUnavailableError, IdempotencyConflictError
from samphire.publisher import IdempotencyKey, Publisher
from samphire_broker.settings import Settings
from samphire_broker.store import (
    CANCELLED,
    DUE,
    Claimed,
    Later,
    LeaseLostError,
    Letter,
    OtherEnd,
    Settlement,
    Store,
    Turn,
    WorkerInfo,
)
from tests.faults.lossy import LossyConnection
from tests.faults.model import ATTEMPT, STATE_OF, TERMINAL, End, State, StoreModel, in_order
from tests.stacks import Valkey, running_valkey

LONG = os.environ.get("SAMPHIRE_FAULTS") == "long"
EXAMPLES, STEPS = (4000, 100) if LONG else (90, 50)

QUEUES = (keys.INTAKE, "inference.m", "inference.m@t")
PRIORITIES = (0, 6)
LISTS = [keys.queue_list(queue, priority) for queue in QUEUES for priority in PRIORITIES]
TURNS = [Turn(key, 2, 0) for key in LISTS]
LETTERS_MAX = 3
WORKERS = ("w1", "w2", "w3")
CANCELLED_RESULT = '{"status":"REVOKED","task_id":"","result":{"cancelled":true}}'

T = TypeVar("T")


class Worker:
    """A worker's store, and what the worker believes to hold: also what was taken from it since."""

    def __init__(self, url: str, name: str) -> None:
        self.store = Store(Settings(broker_url=url, lease_s=3600, dead_letters_max=LETTERS_MAX), name)
        for attribute, value in vars(self.store).items():
            if type(value).__name__ == "DirectConnection":
                setattr(self.store, attribute, LossyConnection(url))
        self.info = WorkerInfo(name, f"{name}@host", 1)
        self.named = LossyConnection(url, name=keys.CONNECTION_PREFIX + name)
        self.believed: dict[str, str] = {}

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
        self.publisher = Publisher(valkey.url, queue_limit=0, blob_ttl_s=3600)
        self.publisher.connection = LossyConnection(valkey.url)

    def close(self) -> None:
        """Close all connections."""

        async def close() -> None:
            for worker in self.workers.values():
                await worker.close()
            await self.publisher.close()

        self.runner.run(close())
        self.runner.close()


def meta(state: State, task_id: str) -> str:
    """As the worker stores it."""
    return json.dumps({"status": state.status, "task_id": task_id, "result": state.result}, separators=(",", ":"))


def snapshot(client: redis.Redis) -> dict[str, Any]:
    """Every key of the broker, as the model writes them; what has only a lifetime to tell is left out."""
    names = sorted(key for key in client.keys("*") if not key.startswith(keys.ONCE_PREFIX.encode()))
    pipe = client.pipeline(transaction=False)
    for name in names:
        pipe.type(name)
    kinds = [kind.decode() for kind in pipe.execute()]
    reads: dict[str, Callable[[bytes], Any]] = {
        "string": pipe.get,
        "list": lambda name: pipe.lrange(name, 0, -1),
        "hash": pipe.hgetall,
        "set": pipe.smembers,
        "zset": lambda name: pipe.zrange(name, 0, -1),
        "stream": lambda name: pipe.xrange(name),
    }
    for name, kind in zip(names, kinds, strict=True):
        reads[kind](name)
    return {name.decode(): _plain(name.decode(), value) for name, value in zip(names, pipe.execute(), strict=True)}


def _plain(name: str, value: Any) -> Any:
    if name.startswith(keys.META_PREFIX):
        stored = json.loads(value)
        assert stored["task_id"] == name.removeprefix(keys.META_PREFIX)
        return State(stored["status"], stored["result"])
    if name in (keys.DEAD, keys.SCHEDULED, keys.CANCELLED):
        return {member.decode() for member in value}
    if name.startswith(keys.DEAD_PREFIX):
        return {name: value[name.encode()].decode() for name in ("list", "message", "run", "history", "stream")}
    if name.startswith(keys.STREAM_PREFIX):
        entries = [fields for _, fields in value]
        ended = [
            (k.decode(), v.decode()) for fields in entries for k, v in fields.items() if k not in (b"result", b"run")
        ]
        return sorted((state, task_id) for state, ids in ended for task_id in ids.split(" "))
    if name.startswith(keys.WORKER_PREFIX) and not isinstance(value, dict):
        return True
    if name == keys.CANCELLED_LATELY:
        return True
    if isinstance(value, dict):
        return {key.decode(): text.decode() for key, text in value.items()}
    if isinstance(value, list):
        return [text.decode() for text in reversed(value)]
    return {text.decode() for text in value} if isinstance(value, set) else value.decode()


class StoreMachine(RuleBasedStateMachine):
    """What lanes and clients may do, in any order."""

    hands: ClassVar[Hands]

    def __init__(self) -> None:
        super().__init__()
        self.client = self.hands.client
        self.client.flushdb()
        self.pubsub = self.client.pubsub()
        self.pubsub.psubscribe(f"{keys.META_PREFIX}*")
        assert (self.pubsub.get_message(timeout=5) or {})["type"] == "psubscribe"
        self.runner, self.workers, self.publisher = self.hands.runner, self.hands.workers, self.hands.publisher
        for worker in self.workers.values():
            worker.believed.clear()
            for connection in worker.connections:
                connection.lose_next = False
        self.model = StoreModel()
        self.made: Counter[str] = Counter()
        """Messages of each task that were ever pushed."""
        self.heard: list[tuple[str, State]] = []
        self.named_once: set[str] = set()
        """Tasks that were cancelled: these end before their message is dropped."""

    def teardown(self) -> None:
        self.pubsub.close()

    # -- help -------------------------------------------------------------------------------------

    def call(self, call: Callable[[], Awaitable[T]]) -> T:
        async def awaited() -> T:
            return await call()

        return self.runner.run(awaited())

    def persist(self, worker: Worker, lost: bool, call: Callable[[], Awaitable[T]], predict: Callable[[], T]) -> T:
        """Call, and compare with the model; with a reply that is lost, the call is made again, and the model's too."""
        if lost:
            for connection in worker.connections:
                connection.lose_next = True
            with pytest.raises(BrokerUnavailableError, match="thrown away"):
                self.call(call)
            for connection in worker.connections:
                connection.lose_next = False
            predict()
        reply = self.call(call)
        expected = predict()
        assert reply == expected, f"replied {reply}, expected {expected}"
        return reply

    def let_go(self, worker: Worker, fields: Iterable[str]) -> None:
        """The worker has learned that these are done with, or are not its own any more."""
        for claim in fields:
            worker.believed.pop(claim, None)

    def new_task(self) -> str:
        task_id = f"t{len(self.made)}"
        self.made[task_id] += 1
        return task_id

    def some_claims(self, data: st.DataObject, worker: Worker, *, started: bool = True) -> list[str]:
        """Some of what a worker believes to hold, in the order of the claims."""
        known = self.model.workers[worker.store.worker_id].started
        believed = [claim for claim in in_order(worker.believed) if started or claim not in known]
        if not believed:
            return []
        return in_order(data.draw(st.lists(st.sampled_from(believed), min_size=1, max_size=4, unique=True)))

    def some_tasks(self, data: st.DataObject) -> list[str]:
        some = [task_id for task_id in self.made if self.model.status(task_id) not in TERMINAL] or ["t0"]
        return data.draw(st.lists(st.sampled_from([*some, "t0"]), max_size=1))

    def holding(self, data: st.DataObject) -> Worker:
        return self.workers[data.draw(st.sampled_from([n for n, w in self.workers.items() if w.believed]))]

    @property
    def anybody_holds(self) -> bool:
        return any(worker.believed for worker in self.workers.values())

    @property
    def lost_claims(self) -> list[str]:
        """Workers with claims that they do not know of."""
        return [n for n, w in self.workers.items() if self.model.workers[n].inflight.keys() - w.believed.keys()]

    @initialize()
    def begin(self) -> None:
        """Workers that live and tasks that wait: what an example does then reaches further."""
        for name in WORKERS:
            self.beat(name)
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
        blobs = [f"{keys.BLOB_PREFIX}{ids[0]}:0"] if blob else []
        messages = [task_id.encode() for task_id in ids]
        assert self.publish(lost, queue, priority, messages, [(key, b"data") for key in blobs]) == ""
        self.model.submit(queue, priority, ids, blobs)

    @precondition(lambda self: len(self.made) % 3 == 0 or len(self.model.idempotency) == 1)
    @rule(key=st.sampled_from("kl"), digest=st.sampled_from("xy"), lost=st.booleans())
    def submit_with_a_key(self, key: str, digest: str, lost: bool) -> None:
        name = keys.IDEMPOTENCY_PREFIX + key
        known = self.model.idempotency.get(name)
        task_id = f"t{len(self.made)}"
        arguments = (lost, QUEUES[1], 0, [task_id.encode()], [], IdempotencyKey(name, task_id, digest, 3600))
        if known is None:
            self.new_task()
            assert self.publish(*arguments) == ""
            self.model.idempotency[name] = (task_id, digest)
            self.model.submit(QUEUES[1], 0, [task_id])
        elif known[1] == digest:
            assert self.publish(*arguments) == known[0]
        else:
            with pytest.raises(IdempotencyConflictError, match=known[0]):
                self.publish(*arguments)

    @precondition(lambda self: sum(self.made.values()) - len(self.made) < 6)
    @rule(data=st.data(), key=st.sampled_from(LISTS))
    def a_producer_repeats_itself(self, data: st.DataObject, key: str) -> None:
        under_way = [task_id for worker in self.workers.values() for task_id in worker.believed.values()]
        task_id = data.draw(st.sampled_from(under_way or sorted(self.made)))
        self.made[task_id] += 1
        self.client.lpush(key, task_id)
        self.model.lists[key].append(task_id)

    # -- claims -----------------------------------------------------------------------------------

    def beat(self, name: str) -> None:
        worker, new = self.workers[name], not self.model.workers[name].leased
        beat = self.call(lambda: worker.store.beat(worker.info, worker.named))
        assert (beat == 1) == new
        self.model.beat(name)

    @precondition(lambda self: any(self.model.lists.values()))
    @rule(name=st.sampled_from(WORKERS), most=st.integers(1, 8), lost=st.booleans())
    def claim(self, name: str, most: int, lost: bool) -> None:
        worker = self.workers[name]
        before = self.model.workers[name].inflight
        claim = lambda: worker.store.claim(TURNS, [most], most, 10**9)  # noqa: E731
        if not self.model.workers[name].leased:
            with pytest.raises(LeaseLostError):
                self.call(claim)
            self.beat(name)
        claimed: list[Claimed] = []
        if lost:
            for connection in worker.connections:
                connection.lose_next = True
            with pytest.raises(BrokerUnavailableError):
                self.call(claim)
        else:
            claimed = self.call(claim)
        for connection in worker.connections:
            connection.lose_next = False
        stored = self.client.hgetall(f"{keys.WORKER_PREFIX}{name}:inflight")
        fields = {key.decode(): value.decode() for key, value in stored.items() if key.decode() not in before}
        assert len(fields) == min(most, sum(map(len, self.model.lists.values())))
        assert not fields.keys() & worker.believed.keys(), "a claim's number was given twice"
        self.model.claimed(name, fields)
        if not lost:
            assert [(c.field, c.message.decode()) for c in claimed] == [(f, fields[f]) for f in in_order(fields)]
            assert worker.store.some_tried == bool(self.model.tried)
            assert worker.store.some_cancelled == self.model.lately
            worker.believed |= fields

    @precondition(lambda self: self.lost_claims)
    @rule(data=st.data())
    def adopt(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.lost_claims))
        worker = self.workers[name]
        found = self.call(lambda: worker.store.adopt(set(worker.believed)))
        inflight = self.model.workers[name].inflight
        expected = in_order(inflight.keys() - worker.believed.keys())
        assert [(c.field, c.message.decode()) for c in found] == [(claim, inflight[claim]) for claim in expected]
        worker.believed |= {claim: inflight[claim] for claim in expected}
        for claim in expected:
            self.model.workers[worker.store.worker_id].started.pop(claim, None)

    @precondition(lambda self: self.anybody_holds)
    @rule(data=st.data(), lost=st.booleans(), wait=st.booleans())
    def start(self, data: st.DataObject, lost: bool, wait: bool) -> None:
        worker = self.holding(data)
        tasks = [(claim, worker.believed[claim]) for claim in self.some_claims(data, worker)]
        verdicts = self.persist(
            worker,
            lost,
            lambda: worker.store.start(tasks, worker.info, wait=wait),
            lambda: self.model.start(worker.store.worker_id, tasks, wait),
        )
        self.let_go(worker, [claim for (claim, _), verdict in zip(tasks, verdicts, strict=True) if verdict in (-1, -2)])

    @precondition(lambda self: self.anybody_holds)
    @rule(data=st.data(), lost=st.booleans())
    def run(self, data: st.DataObject, lost: bool) -> None:
        """Start and settle, as most tasks go."""
        self.start(data, lost, wait=True)
        if self.anybody_holds:
            self.settle(data, True, False, lost)

    @rule(name=st.sampled_from(WORKERS), model=st.sampled_from(["m", "n", ""]), keep=st.booleans(), lost=st.booleans())
    def alone(self, name: str, model: str, keep: bool, lost: bool) -> None:
        for_s = 3600 if keep else 0
        store = self.workers[name].store
        self.persist(
            self.workers[name], lost, lambda: store.alone(model, for_s), lambda: self.model.alone(name, model, for_s)
        )

    # -- the ways out of a claim ------------------------------------------------------------------

    @precondition(lambda self: self.anybody_holds)
    @rule(data=st.data(), stream=st.booleans(), steps=st.booleans(), lost=st.booleans())
    def settle(self, data: st.DataObject, stream: bool, steps: bool, lost: bool) -> None:
        worker = self.holding(data)
        ends: list[End] = []
        for claim in self.some_claims(data, worker):
            task_id = worker.believed[claim]
            state = data.draw(st.sampled_from(sorted(STATE_OF)))
            pushes = ((QUEUES[2], f"t{len(self.made)}"),) if steps and state != "retrying" else ()
            for _, pushed in pushes:
                self.made[pushed] += 0  # its name is taken, whether or not it is pushed
            others = ("later",) if steps and state == "failed" else ()
            blobs = (f"{keys.BLOB_PREFIX}{task_id}:0",)
            ends.append(
                End(
                    claim, task_id, state, {"of": worker.store.worker_id, "claim": claim}, stream, pushes, others, blobs
                )
            )
        self.persist(
            worker,
            lost,
            lambda: worker.store.settle([self.settlement(end) for end in ends]),
            lambda: self.model.settle(worker.store.worker_id, ends),
        )
        self.let_go(worker, [end.field for end in ends])
        queued = Counter(self.model.lists[QUEUES[2]])
        for end in ends:
            for _, pushed in end.pushes:
                self.made[pushed] = queued[pushed]

    @staticmethod
    def settlement(end: End) -> Settlement:
        stored = State(STATE_OF[end.state], end.result)
        ends = tuple(
            OtherEnd(other, "failed", meta(State("FAILURE", {"of": other}), other), "events:c") for other in end.others
        )
        return Settlement(
            end.field,
            end.task_id,
            end.state,
            meta(stored, end.task_id),
            "events:c" if end.stream else "",
            end.blobs,
            end.pushes,
            ends,
            Letter(end.task_id, "m", "model_fault", "Error: made up", 1, ATTEMPT) if end.state == "failed" else (),
            Later(1e6, ATTEMPT) if end.state == "retrying" else (),
        )

    @precondition(lambda self: self.anybody_holds)
    @rule(data=st.data(), blamed=st.booleans(), died=st.booleans(), lost=st.booleans())
    def release(self, data: st.DataObject, blamed: bool, died: bool, lost: bool) -> None:
        worker = self.holding(data)
        fields = self.some_claims(data, worker)
        self.persist(
            worker,
            lost,
            lambda: worker.store.release(fields, attempt=ATTEMPT if blamed else "", endpoint_died=died),
            lambda: self.model.release(worker.store.worker_id, fields, blamed, died),
        )
        self.let_go(worker, fields)

    @precondition(lambda self: self.anybody_holds)
    @rule(data=st.data(), queue=st.sampled_from(QUEUES), lost=st.booleans())
    def route(self, data: st.DataObject, queue: str, lost: bool) -> None:
        worker = self.holding(data)
        moves = [(claim, queue, queue) for claim in self.some_claims(data, worker, started=False)]
        self.persist(
            worker,
            lost,
            lambda: worker.store.route(moves),
            lambda: self.model.route(worker.store.worker_id, moves),
        )
        self.let_go(worker, [claim for claim, _, _ in moves])

    @precondition(lambda self: self.anybody_holds)
    @rule(data=st.data(), due=st.booleans(), lost=st.booleans())
    def schedule(self, data: st.DataObject, due: bool, lost: bool) -> None:
        worker = self.holding(data)
        tasks = [(claim, worker.believed[claim], due) for claim in self.some_claims(data, worker, started=False)]
        for task_id in {task_id for _, task_id, _ in tasks}:  # a replaced copy is gone, and is missed by nobody
            copies = sum(1 for _, other, _ in tasks if other == task_id) + (task_id in self.model.scheduled)
            if copies > 1:
                self.named_once.add(task_id)
        verdicts = self.persist(
            worker,
            lost,
            lambda: worker.store.schedule([(c, t, 1.0 if past else 4e9) for c, t, past in tasks]),
            lambda: self.model.schedule(worker.store.worker_id, tasks),
        )
        self.let_go(
            worker, [claim for (claim, _, _), v in zip(tasks, verdicts, strict=True) if v not in (DUE, CANCELLED)]
        )

    @precondition(lambda self: self.model.scheduled)
    @rule(data=st.data(), lost=st.booleans())
    def time_goes_by(self, data: st.DataObject, lost: bool) -> None:
        due = data.draw(st.lists(st.sampled_from(sorted(self.model.scheduled)), min_size=1, unique=True))
        self.client.zadd(keys.SCHEDULED, {task_id: second for second, task_id in enumerate(due, 1)})
        due = [*sorted(self.model.ready - set(due)), *due]  # those that were ready stand at the time 0
        worker, left = self.workers["w1"], [due, []]
        self.persist(worker, lost, worker.store.return_due, lambda: self.model.due(left.pop(0)))

    # -- clients ----------------------------------------------------------------------------------

    @precondition(lambda self: self.made)
    @rule(data=st.data(), stream=st.booleans(), lost=st.booleans())
    def cancel(self, data: st.DataObject, stream: bool, lost: bool) -> None:
        requests = [(stream, task_id) for task_id in self.some_tasks(data)]
        revoked = self.some_tasks(data)
        for _, task_id in requests:
            self.client.rpush(keys.CANCELS, f"{'events:c' if stream else ''} {task_id}")
        self.named_once |= {*revoked, *(task_id for _, task_id in requests)}
        worker, left = self.workers["w2"], [requests, []]
        self.persist(
            worker,
            lost,
            lambda: worker.store.cancel(CANCELLED_RESULT, revoked),
            lambda: self.model.cancel("w2", left.pop(0), revoked),
        )

    @precondition(lambda self: self.model.letters)
    @rule(data=st.data(), verb=st.sampled_from(["redrive", "purge"]), lost=st.booleans())
    def serve_letters(self, data: st.DataObject, verb: str, lost: bool) -> None:
        known = sorted({*self.model.letters, "t0"})
        ids = data.draw(st.lists(st.sampled_from(known), min_size=1, max_size=3))
        requests = [(verb, task_id) for task_id in ids]
        for _, letter in requests:
            self.client.rpush(keys.LETTERS, f"{verb} {letter}")
        worker, left = self.workers["w3"], [requests, []]
        self.persist(worker, lost, worker.store.serve_letters, lambda: self.model.serve_letters(left.pop(0)))

    @precondition(lambda self: len(self.model.letters) > 1)
    @rule(lost=st.booleans())
    def trim_letters(self, lost: bool) -> None:
        worker = self.workers["w2"]

        async def trim() -> tuple[int, int]:
            trimmed = await worker.store.trim_letters()
            return trimmed.deleted, trimmed.left

        self.persist(worker, lost, trim, lambda: self.model.trim(LETTERS_MAX))

    @precondition(lambda self: any(state.status == "SUCCESS" for state in self.model.states.values()))
    @rule(data=st.data(), lost=st.booleans())
    def delete_results(self, data: st.DataObject, lost: bool) -> None:
        ids = data.draw(st.lists(st.sampled_from(sorted(self.model.states)), min_size=1, max_size=3))
        for task_id in ids:
            self.client.rpush(keys.DELETES, task_id)
        worker, left = self.workers["w1"], [ids, []]
        self.persist(worker, lost, worker.store.delete_results, lambda: self.model.delete_results(left.pop(0)))

    # -- workers that are lost, and come back -------------------------------------------------------

    @precondition(lambda self: any(worker.inflight for worker in self.model.workers.values()))
    @rule(
        by=st.sampled_from(WORKERS),
        name=st.sampled_from(WORKERS),
        how=st.sampled_from(["lapsed", "connection", "beaten since", "alive", "left"]),
        lost=st.booleans(),
    )
    def reap(self, by: str, name: str, how: str, lost: bool) -> None:
        if how == "left":
            self.call(self.workers[name].store.leave)
            self.model.leave(name)
        lease = keys.WORKER_PREFIX + name
        if not self.model.workers[name].leased:
            how = "lapsed"
        beat = int(self.client.get(lease) or 0)
        if how == "lapsed":
            self.client.delete(lease)
        last_beat = {"lapsed": None, "alive": None, "connection": beat, "beaten since": beat - 1}[how]
        store = self.workers[by].store
        lives = how in ("beaten since", "alive")
        predict = (lambda: (-1, 0, 0)) if lives else (lambda: self.model.reap(name))
        self.persist(self.workers[by], lost, lambda: store.reap(name, last_beat, ATTEMPT), predict)

    # -- what must hold after every step ------------------------------------------------------------

    @invariant()
    def the_broker_holds_what_the_model_holds(self) -> None:
        found, expected = snapshot(self.client), self.model.expected()
        if "events:c" in expected:
            expected["events:c"] = sorted(expected["events:c"])
        assert found == expected, "\n".join(
            f"{key!r}: found {found.get(key)}, expected {expected.get(key)}"
            for key in sorted(found.keys() | expected.keys())
            if found.get(key) != expected.get(key)
        )
        self.everything_is_in_one_place(found)
        for name in WORKERS:
            inflight = found.get(f"{keys.WORKER_PREFIX}{name}:inflight", {})
            started = found.get(f"{keys.WORKER_PREFIX}{name}:started", {})
            assert started.keys() <= inflight.keys(), "a claim is started and not in flight"
            assert all(inflight[claim] == task_id for claim, task_id in started.items())
        assert found.get(keys.SCHEDULED, set()) == set(found.get(keys.SCHEDULED_MESSAGES, {}))

    def everything_is_in_one_place(self, found: dict[str, Any]) -> None:
        """Each task is queued, scheduled, in flight, dead-lettered or done; one of them, if it has one message."""
        queued = Counter(message for key in LISTS for message in found.get(key, []))
        scheduled = Counter(found.get(keys.SCHEDULED_MESSAGES, {}).keys())
        inflight = Counter(
            message for name in WORKERS for message in found.get(f"{keys.WORKER_PREFIX}{name}:inflight", {}).values()
        )
        for task_id, made in self.made.items():
            if not made:
                continue
            places = [queued[task_id], scheduled[task_id], inflight[task_id]]
            state = found.get(keys.meta_key(task_id))
            done = state is not None and state.status in TERMINAL
            dead = f"{keys.DEAD_PREFIX}{task_id}" in found
            assert sum(places) <= made, f"{task_id}: more messages than were sent: {places}"
            assert sum(places) or done or dead, f"{task_id} is lost"
            if made == 1 and task_id not in self.named_once:
                assert sum(places) + (done or dead) == 1, f"{task_id}: {places}, done {done}, dead {dead}"

    @invariant()
    def an_end_is_published_once_a_run(self) -> None:
        self.client.publish(f"{keys.META_PREFIX}#", "")
        while True:
            message = self.pubsub.get_message(timeout=5)
            assert message is not None
            channel = message["channel"].decode().removeprefix(keys.META_PREFIX)
            if channel == "#":
                break
            stored = json.loads(message["data"])
            self.heard.append((channel, State(stored["status"], stored["result"])))
        assert self.heard == self.model.published
        times = Counter(task_id for task_id, state in self.heard if state.status in TERMINAL)
        assert all(count <= 1 + self.model.runs[task_id] for task_id, count in times.items()), (
            "an end was published twice"
        )


@pytest.fixture(scope="module")
def hands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hands]:
    """One server for all examples: each begins with an empty database."""
    with running_valkey(tmp_path_factory.mktemp("valkey"), "--appendfsync", "no") as valkey:
        made = Hands(valkey)
        yield made
        made.close()


@pytest.mark.timeout(0 if LONG else 600)  # of which Hypothesis may take 300 s to find a shorter failure
def test_any_sequence_of_transitions(hands: Hands) -> None:
    """The broker holds what the model holds, and the invariants hold."""

    class Machine(StoreMachine):
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
