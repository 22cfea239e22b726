"""What the store should hold: plain dictionaries and lists, one method a script, with the reply that it should give.

A message is its task's id, so copies of one message (a producer that repeats itself) cannot be told apart, as on a
real queue. Lists have their oldest message first.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from samphire import keys

TERMINAL = {"SUCCESS", "FAILURE", "REVOKED"}
STATE_OF = {"succeeded": "SUCCESS", "failed": "FAILURE", "cancelled": "REVOKED", "expired": "REVOKED"}


class State(NamedTuple):
    """What is stored for a task: Celery's state, and its result as JSON is read."""

    status: str
    result: Any


class End(NamedTuple):
    """One settlement, in the model's words."""

    field: str
    task_id: str
    state: str
    result: Any
    stream: bool
    pushes: tuple[tuple[str, str], ...] = ()
    others: tuple[str, ...] = ()
    blobs: tuple[str, ...] = ()


@dataclass
class WorkerModel:
    """One worker's keys."""

    leased: bool = False
    inflight: dict[str, str] = field(default_factory=dict)
    """Claim -> message."""
    started: dict[str, str] = field(default_factory=dict)
    """Claim -> task id."""


def number_of(claim: str) -> int:
    """The number that a claim begins with: claims are in the order of these."""
    return int(claim.partition(":")[0])


def list_of(claim: str) -> str:
    """The list that a claim came from."""
    return claim.partition(":")[2]


def in_order(claims: Iterable[str]) -> list[str]:
    """Claims, the first first."""
    return sorted(claims, key=number_of)


class StoreModel:
    """Everything that the broker should hold."""

    def __init__(self) -> None:
        self.lists: defaultdict[str, list[str]] = defaultdict(list)
        self.queues: set[str] = set()
        self.workers: defaultdict[str, WorkerModel] = defaultdict(WorkerModel)
        self.members: set[str] = set()
        self.states: dict[str, State] = {}
        self.attempts: Counter[str] = Counter()
        self.suspects = False
        self.scheduled: dict[str, tuple[str, str]] = {}
        self.marks: set[str] = set()
        self.lately = False
        self.letters: dict[str, tuple[str, str]] = {}
        """Letter id -> (list, message)."""
        self.idempotency: dict[str, tuple[str, str]] = {}
        self.blobs: set[str] = set()
        self.events: list[tuple[str, str]] = []
        self.published: list[tuple[str, State]] = []
        self.runs: Counter[str] = Counter()
        """Runs that a redrive has opened, by task."""

    # -- producers --------------------------------------------------------------------------------

    def submit(self, queue: str, priority: int, messages: Sequence[str], blobs: Iterable[str] = ()) -> None:
        """The SDK's submit."""
        self.queues.add(queue)
        self.blobs.update(blobs)
        self.lists[keys.queue_list(queue, priority)] += messages

    # -- one worker -------------------------------------------------------------------------------

    def beat(self, wid: str) -> None:
        """Renew the lease."""
        self.workers[wid].leased = True
        self.members.add(wid)

    def claimed(self, wid: str, fields: dict[str, str]) -> None:
        """These were claimed: the oldest of their lists, in the order of their numbers."""
        for claim in in_order(fields):
            oldest = self.lists[list_of(claim)].pop(0)
            assert oldest == fields[claim], f"claimed {fields[claim]!r} before {oldest!r}"
        self.workers[wid].inflight |= fields

    def start(self, wid: str, tasks: Sequence[tuple[str, str]]) -> list[int]:
        """Mark claims as running."""
        worker, reply, started, ended = self.workers[wid], [], [], []
        for claim, task_id in tasks:
            status = self.status(task_id)
            if claim not in worker.inflight:
                reply.append(-1)
            elif status == "REVOKED" or task_id in self.marks:
                reply.append(-3)
            elif status in ("SUCCESS", "FAILURE"):
                reply.append(-2)
                ended.append(claim)
            else:
                reply.append(self.attempts[task_id])
                started.append((claim, task_id))
        for claim in ended:
            del worker.inflight[claim]
            worker.started.pop(claim, None)
        for claim, task_id in started:
            self.states[task_id] = State("STARTED", {"hostname": f"{wid}@host", "pid": 1})
            worker.started[claim] = task_id
        return reply

    def settle(self, wid: str, ends: Sequence[End]) -> list[int]:
        """End claims."""
        worker = self.workers[wid]
        ours = [int(end.field in worker.inflight) for end in ends]
        messages = {end.field: worker.inflight.pop(end.field, "") for end in ends}
        for end in ends:
            worker.started.pop(end.field, None)
        for end, still in zip(ends, ours, strict=True):
            if not still:
                continue
            before = self.status(end.task_id)
            fresh = before not in TERMINAL
            if fresh:
                self._finish(end.task_id, State(STATE_OF[end.state], end.result), end.state if end.stream else "")
            marked = end.task_id in self.marks
            self.marks.discard(end.task_id)
            if fresh:
                self.blobs -= set(end.blobs)
            if fresh or ((marked or end.state == "cancelled") and before == "REVOKED"):
                for key, message in end.pushes:
                    self.lists[key].append(message)
                for other in end.others:
                    if self.status(other) not in TERMINAL:
                        self._finish(other, State("FAILURE", {"of": other}), "failed")
            if end.state == "failed":
                self.letters[end.task_id] = (list_of(end.field), messages[end.field])
        return ours

    def _finish(self, task_id: str, state: State, event: str) -> None:
        self.states[task_id] = state
        self.published.append((task_id, state))
        if event:
            self.events.append((event, task_id))

    def release(self, wid: str, fields: Sequence[str], blamed: bool) -> int:
        """Hand claims back."""
        worker, moved = self.workers[wid], 0
        for claim in reversed(fields):
            if claim in worker.inflight:
                self._back_to_head(worker, claim, blamed)
                moved += 1
        return moved

    def _back_to_head(self, worker: WorkerModel, claim: str, blamed: bool) -> bool:
        """Return a claim to the head of its list; whether it had started."""
        self.lists[list_of(claim)].insert(0, worker.inflight.pop(claim))
        task_id = worker.started.pop(claim, None)
        if task_id is None:
            return False
        if blamed:
            self.attempts[task_id] += 1
            self.suspects = True
        if self.status(task_id) == "STARTED":
            del self.states[task_id]
        return True

    def route(self, wid: str, moves: Sequence[tuple[str, str, str]]) -> int:
        """Move claims on to another queue."""
        worker, moved = self.workers[wid], 0
        for claim, queue, key in moves:
            if claim in worker.inflight:
                self.queues.add(queue)
                self.lists[key].append(worker.inflight.pop(claim))
                moved += 1
        return moved

    def schedule(self, wid: str, tasks: Sequence[tuple[str, str, bool]]) -> list[int]:
        """Put claims (field, task id, whether its time has come) aside."""
        worker, reply = self.workers[wid], []
        for claim, task_id, due in tasks:
            if claim not in worker.inflight:
                reply.append(0)
            elif task_id in self.marks:
                reply.append(-3)
            elif due:
                reply.append(2)
            else:
                message = worker.inflight.pop(claim)
                reply.append(3 if task_id in self.scheduled else 1)
                self.scheduled[task_id] = (list_of(claim), message)
        return reply

    def due(self, task_ids: Sequence[str]) -> int:
        """The time of these has come, of the first first."""
        for task_id in reversed(task_ids):
            key, message = self.scheduled.pop(task_id)
            self.lists[key].insert(0, message)
        return len(task_ids)

    def cancel(self, requests: Sequence[tuple[bool, str]], revoked: Sequence[str]) -> dict[str, str]:
        """End what clients name (whether with their stream, id) and what a revocation names."""
        reply: dict[str, str] = {}
        for stream, task_id, named in [
            *((*request, True) for request in requests),
            *((False, i, False) for i in revoked),
        ]:
            status = self.status(task_id)
            if status in ("STARTED", "SUCCESS", "FAILURE"):
                reply[task_id] = str(status)
                continue
            reply[task_id] = "REVOKED" if status == "REVOKED" else "marked"
            self.marks.add(task_id)
            self.lately = True
            if status != "REVOKED" and (named or task_id in self.scheduled):
                reply[task_id] = "cancelled"
                self._finish(task_id, State("REVOKED", {"cancelled": True}), "cancelled" if stream else "")
            if task_id in self.scheduled:
                self.due([task_id])
        return reply

    def reap(self, wid: str) -> tuple[int, int, int]:
        """Return a lost worker's messages."""
        worker = self.workers[wid]
        worker.leased = False
        fields = in_order(worker.inflight)
        started = [self._back_to_head(worker, claim, True) for claim in reversed(fields)]
        worker.started.clear()
        self.members.discard(wid)
        return len(fields), sum(started), 0

    def leave(self, wid: str) -> None:
        """Drop the lease."""
        if not self.workers[wid].inflight:
            self.members.discard(wid)
        self.workers[wid].leased = False

    def serve_letters(self, requests: Sequence[tuple[str, str]]) -> int:
        """Redrive and purge."""
        for verb, letter in requests:
            if letter not in self.letters:
                continue
            key, message = self.letters.pop(letter)
            if verb == "redrive":
                self.attempts.pop(letter, None)
                if self.status(letter) == "FAILURE":
                    del self.states[letter]
                    self.runs[letter] += 1
                self.lists[key].append(message)
        return len(requests)

    def delete_results(self, task_ids: Sequence[str]) -> int:
        """Delete what was read."""
        for task_id in task_ids:
            if self.status(task_id) == "SUCCESS":
                self.states[task_id] = State("SUCCESS", {"deleted": True})
        return len(task_ids)

    def status(self, task_id: str) -> str | None:
        """Celery's state, as it is stored."""
        state = self.states.get(task_id)
        return state and state.status

    # -- the whole --------------------------------------------------------------------------------

    def expected(self) -> dict[str, Any]:
        """Every key that the broker should have, as `snapshot` reads it."""
        found: dict[str, Any] = {key: messages for key, messages in self.lists.items() if messages}
        found |= {keys.meta_key(task_id): state for task_id, state in self.states.items()}
        found |= {f"{keys.TASK_PREFIX}{task_id}": {"attempts": str(n)} for task_id, n in self.attempts.items() if n}
        found |= {f"{keys.DEAD_PREFIX}{letter}": where for letter, where in self.letters.items()}
        found |= {key: f"{task_id} {digest}" for key, (task_id, digest) in self.idempotency.items()}
        found |= dict.fromkeys(self.blobs, "data")
        for wid, worker in self.workers.items():
            lease = keys.WORKER_PREFIX + wid
            if worker.leased:
                found |= {lease: True, f"{lease}:info": True}
            found |= {f"{lease}:inflight": worker.inflight, f"{lease}:started": worker.started}
        found |= {keys.QUEUES: self.queues, keys.WORKERS: self.members, keys.DEAD: set(self.letters)}
        found |= {keys.SCHEDULED: set(self.scheduled), keys.CANCELLED: self.marks, "events:c": self.events}
        found[keys.SCHEDULED_MESSAGES] = {task_id: " ".join(where) for task_id, where in self.scheduled.items()}
        found |= {keys.SUSPECTS: self.suspects, keys.CANCELLED_LATELY: self.lately}
        return {key: value for key, value in found.items() if value}
