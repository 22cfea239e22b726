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
STATE_OF = {
    "succeeded": "SUCCESS",
    "failed": "FAILURE",
    "cancelled": "REVOKED",
    "expired": "REVOKED",
    "retrying": "RETRY",
}
ATTEMPT = '{"error":"made up"}'
"""What is written of an attempt."""


class State(NamedTuple):
    """What is stored for a task: Celery's state, and its result as JSON is read."""

    status: str
    result: Any


class End(NamedTuple):
    """One settlement, in the model's words; a state "retrying" ends the attempt, not the task."""

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


def _is_of(claim: str, model: str) -> bool:
    return not model or keys.parse_queue(keys.split_list(list_of(claim))[0])[0] == model


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
        self.tried: dict[str, dict[str, str]] = {}
        """What is kept of tasks that were tried before, or redriven."""
        self.scheduled: dict[str, tuple[str, str]] = {}
        self.ready: set[str] = set()
        """Those of the scheduled tasks whose time has come."""
        self.marks: set[str] = set()
        self.paid: set[str] = set()
        """Those that had ended as cancelled and have paid their steps."""
        self.holder: tuple[str, str] | None = None
        """Who is alone, with what model."""
        self.unknown: set[str] = set()
        """Ids whose cancellation was asked for, and that are nowhere."""
        self.lately = False
        self.letters: dict[str, dict[str, str]] = {}
        self.deaths: dict[str, int] = {}
        """Which call of `settle` wrote a letter."""
        self.settled = 0
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

    def alone(self, wid: str, model: str, for_s: float) -> int:
        """Be the only worker that runs anything of a model."""
        if self.holder and self.holder[0] != wid:
            return -1
        self.holder = (wid, model) if for_s else None
        others = [self.workers[other] for other in self.members if other != wid]
        return sum(_is_of(claim, model) for other in others for claim in other.started) if for_s else 0

    def _must_wait(self, wid: str, claim: str) -> bool:
        return self.holder is not None and self.holder[0] != wid and _is_of(claim, self.holder[1])

    def start(self, wid: str, tasks: Sequence[tuple[str, str]], wait: bool) -> list[int | tuple[int, int, int, int]]:
        """Mark claims as running."""
        worker, started, ended = self.workers[wid], [], []
        reply: list[int | tuple[int, int, int, int]] = []
        for claim, task_id in tasks:
            status = self.status(task_id)
            if claim not in worker.inflight:
                reply.append(-1)
            elif status == "REVOKED" or task_id in self.marks:
                reply.append(-3)
            elif status in ("SUCCESS", "FAILURE"):
                reply.append(-2)
                ended.append(claim)
            elif self._must_wait(wid, claim) and wait and claim not in worker.started:
                reply.append(-4)
            else:
                tried = self.tried.get(task_id, {})
                counts = [int(tried.get(name, 0)) for name in ("attempts", "crashes", "losses", "shared")]
                reply.append((counts[0], counts[1], counts[2], counts[3]) if any(counts) else 0)
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
        self.settled += 1
        worker = self.workers[wid]
        ours = [int(end.field in worker.inflight) for end in ends]
        messages = {end.field: worker.inflight.pop(end.field, "") for end in ends}
        for end in ends:
            worker.started.pop(end.field, None)
        ended_now: set[str] = set()
        for end, still in zip(ends, ours, strict=True):
            if not still:
                continue
            message = messages[end.field]
            before = "ENDED" if end.task_id in ended_now else self.status(end.task_id)
            fresh = before not in {*TERMINAL, "ENDED"}
            if end.state == "retrying":
                if fresh or before == "REVOKED":
                    self._try_again(end, message, now=before == "REVOKED" or end.task_id in self.marks)
                if fresh:
                    self._write(end.task_id, State("RETRY", end.result), "retrying" if end.stream else "")
                continue
            tried = self.tried.pop(end.task_id, {})
            if fresh:
                self._write(end.task_id, State(STATE_OF[end.state], end.result), end.state if end.stream else "")
                ended_now.add(end.task_id)
            marked = end.task_id in self.marks
            self.marks.discard(end.task_id)
            if fresh:
                self.blobs -= set(end.blobs)
            revoked = before == "REVOKED"
            cancelled = (fresh and end.state == "cancelled") or (revoked and (marked or end.state == "cancelled"))
            if (end.pushes or end.others) and (fresh or cancelled) and not (cancelled and end.task_id in self.paid):
                if cancelled:
                    self.paid.add(end.task_id)
                for key, pushed in end.pushes:
                    self.lists[key].append(pushed)
                    self.queues.add(keys.split_list(key)[0])
                for other in end.others:
                    if self.status(other) not in TERMINAL:
                        self._write(other, State("FAILURE", {"of": other}), "failed")
            if end.state == "failed":
                self.deaths[end.task_id] = self.settled
                self.letters[end.task_id] = {
                    "list": list_of(end.field),
                    "message": message,
                    "run": tried.get("run", "1"),
                    "history": f"[{','.join(filter(None, (tried.get('history'), ATTEMPT)))}]",
                    "stream": "events:c" if end.stream else "",
                }
        return ours

    def _write(self, task_id: str, state: State, event: str) -> None:
        self.states[task_id] = state
        self.published.append((task_id, state))
        if event:
            self.events.append((event, task_id))

    def _try_again(self, end: End, message: str, *, now: bool) -> None:
        self.scheduled[end.task_id] = (list_of(end.field), message)
        self.ready.discard(end.task_id)
        if now:
            self.ready.add(end.task_id)
        self._one_attempt_more(end.task_id, crashed=False)

    def _one_attempt_more(self, task_id: str, *, crashed: bool) -> None:
        tried = self.tried.setdefault(task_id, {})
        tried["attempts"] = str(int(tried.get("attempts", 0)) + 1)
        tried["history"] = ",".join(filter(None, (tried.get("history"), ATTEMPT)))
        if crashed:
            tried["crashes"] = str(int(tried.get("crashes", 0)) + 1)

    def release(self, wid: str, fields: Sequence[str], blamed: bool, endpoint_died: bool) -> int:
        """Hand claims back."""
        worker, moved = self.workers[wid], 0
        for claim in reversed(fields):
            if claim in worker.inflight:
                task_id = worker.started.get(claim)
                self._back_to_head(worker, claim, blamed)
                moved += 1
                if blamed and task_id is not None:
                    tried = self.tried[task_id]
                    tried["shared"] = str(int(tried.get("shared", 0)) + 1)
                if endpoint_died and task_id is not None:
                    tried = self.tried.setdefault(task_id, {})
                    tried["losses"] = str(int(tried.get("losses", 0)) + 1)
        return moved

    def _back_to_head(self, worker: WorkerModel, claim: str, blamed: bool) -> bool:
        """Return a claim to the head of its list; whether it had started."""
        self.lists[list_of(claim)].insert(0, worker.inflight.pop(claim))
        task_id = worker.started.pop(claim, None)
        if task_id is None:
            return False
        if blamed:
            self._one_attempt_more(task_id, crashed=True)
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
                self.ready.discard(task_id)
        return reply

    def due(self, task_ids: Sequence[str]) -> int:
        """The time of these has come, of the first first."""
        for task_id in reversed(task_ids):
            key, message = self.scheduled.pop(task_id)
            self.ready.discard(task_id)
            self.lists[key].insert(0, message)
        return len(task_ids)

    def cancel(self, wid: str, requests: Sequence[tuple[bool, str]], revoked: Sequence[str]) -> dict[str, str]:
        """End what clients name (whether with their stream, id) and what a revocation names."""
        reply: dict[str, str] = {}
        for stream, task_id, named in [
            *((*request, True) for request in requests),
            *((False, i, False) for i in revoked),
        ]:
            status = self.status(task_id)
            if named and status is None and task_id not in self.scheduled and not self._is_known(task_id):
                reply[task_id] = "unknown"
                self.unknown.add(task_id)
                continue
            if status in ("STARTED", "SUCCESS", "FAILURE"):
                reply[task_id] = str(status)
                if status == "STARTED":
                    self.marks.add(task_id)
                    self.lately = True
                continue
            reply[task_id] = "REVOKED" if status == "REVOKED" else "marked"
            self.marks.add(task_id)
            self.lately = True
            if status != "REVOKED" and (named or task_id in self.scheduled):
                reply[task_id] = "cancelled"
                self._write(task_id, State("REVOKED", {"cancelled": True}), "cancelled" if stream else "")
            if task_id in self.scheduled:
                self.due([task_id])
        if self.lately:
            reply |= {task_id: "running" for task_id in self.workers[wid].started.values() if task_id in self.marks}
        return reply

    def _is_known(self, task_id: str) -> bool:
        """Whether it is found where the broker looks: queues by name, what members hold, letters; in any message."""
        lists = [key for queue in {*self.queues, keys.INTAKE} for key in keys.queue_lists(queue)]
        messages = [message for key in lists for message in self.lists.get(key, [])]
        messages += [message for wid in self.members for message in self.workers[wid].inflight.values()]
        return task_id in self.letters or any(task_id in message for message in messages)

    def trim(self, most: int) -> tuple[int, int]:
        """Delete the oldest letters beyond a number; how many, and how many are left."""
        over = max(0, len(self.letters) - most)
        # Those of one call have died at the same time; then the name decides.
        for letter in sorted(self.letters, key=lambda letter: (self.deaths[letter], letter))[:over]:
            del self.letters[letter]
        return over, len(self.letters)

    def reap(self, wid: str) -> tuple[int, int, int]:
        """Return a lost worker's messages."""
        worker = self.workers[wid]
        worker.leased = False
        fields = in_order(worker.inflight)
        started = [self._back_to_head(worker, claim, True) for claim in reversed(fields)]
        worker.started.clear()
        self.members.discard(wid)
        if self.holder and self.holder[0] == wid:
            self.holder = None
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
            kept = self.letters.pop(letter)
            if verb == "redrive":
                self.tried[letter] = {"run": str(int(kept["run"]) + 1)}
                if self.status(letter) == "FAILURE":
                    del self.states[letter]
                    self.runs[letter] += 1
                if kept["stream"]:
                    self.events.append(("redriven", letter))
                self.lists[kept["list"]].append(kept["message"])
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
        found |= {f"{keys.TASK_PREFIX}{task_id}": tried for task_id, tried in self.tried.items()}
        found |= {f"{keys.DEAD_PREFIX}{letter}": kept for letter, kept in self.letters.items()}
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
        found |= {f"{keys.UNKNOWN_PREFIX}{task_id}": "1" for task_id in self.unknown}
        found |= {f"{keys.PAID_PREFIX}{task_id}": "1" for task_id in self.paid}
        found[keys.ALONE] = " ".join(self.holder or ())
        found |= {keys.TRIED: set(self.tried), keys.CANCELLED_LATELY: self.lately}
        return {key: value for key, value in found.items() if value}
