"""The Redis key schema, version 1: every key that Samphire reads or writes, on one page.

Written by producers (an ACL can hold them to these):

    <queue>                      LIST    kombu messages of priority 0 (high), newest at the left
    <queue>\\x06\\x163|6|9         LIST    the same, priorities 3 (normal), 6 (low) and 9
    sub:queues                   SET     names of the queues that the SDK has submitted to
    sub:blob:<task id>:<n>       STRING  claim check of a task's n-th tensor; expires
    sub:once:<call>              STRING  this submit was carried out; expires after minutes
    sub:key:<digest>             STRING  idempotency key of a tenant and model -> "<task id> <digest of what was asked
                                         for>"; expires
    sub:cancels                  LIST    requests to cancel: "<event stream or nothing> <task id>"
    sub:deletes                  LIST    ids of tasks whose results are read and no longer needed
    sub:letters                  LIST    requests about dead letters: "redrive:<run> <letter id>", "purge:<run> <id>";
                                         without ":<run>" the letter of any run is meant
    sub:wake                     CHANNEL a queue was empty and no longer is

    A queue is `inference.<model>`, `inference.<model>@<tenant>`, or the intake `inference`.

Written by workers only:

    celery-task-meta-<id>        STRING  state and result, JSON as Celery's; a CHANNEL of the same name gets
                                         the terminal one, which expires
    task:<id>                    HASH    of a task tried before and not ended: attempts so far; crashes, those of them
                                         that took a worker or a model's process down; history, a JSON object for
                                         each, comma between; losses: endpoints that died with it, no attempts;
                                         shared: those of the crashes that took down what is everybody's, a model's
                                         process or an endpoint; run, if it is not the first; failed, if it was sent
                                         again: digests of the messages that had failed; expires
    scheduled                    ZSET    ids of tasks that wait for their time, by that time
    scheduled:messages           HASH    task id -> "<queue list> <message>"
    cancelled                    ZSET    ids of tasks that were cancelled before they were claimed, by time, with .5
                                         behind it where their end is written; trimmed
    cancelled:lately             STRING  present for a minute after a cancellation
    cancelled:running            SET     ids of the cancelled tasks that a worker had started; expires
    cancelled:answer:<id>        STRING  what became of a wish to cancel where no result tells: "unknown", or how the
                                         task had ended; expires after seconds
    ended                        HASH    task id -> how it has ended: S(ucceeded), F(ailed), C(ancelled), E(xpired), c
                                         of a cancelled one that has not yet sent what follows; the number of its run,
                                         if not the first; of a failed one 16 digits of the SHA-1 of each message that
                                         did, behind spaces. It becomes ended:before, and a new one begins, when
                                         ended:turn lapses
    ended:before                 HASH    the same, older; expires
    ended:turn                   STRING  present for as long as ends are to be remembered; expires
    alone                        STRING  "<wid> <number of the hold> <model or nothing>": no other worker starts
                                         anything of the model, or of all; expires, and goes when its worker is reaped
    catalogue                    HASH    model -> its signature, JSON, "" while it is not ready; `*` is there if these
                                         are all models; expires when no worker renews it
    leaders                      HASH    model whose requests must keep their order -> id of the one worker that claims
                                         them
    tried                        SET     ids of the tasks that have a task:<id>; expires
    result:blob:<id>:<n>:<hash>  STRING  claim check of an output; expires
    events:<client>              STREAM  terminal events of one client's tasks, an entry a settled batch: state
                                         and the ids that reached it, separated by spaces; of a task settled alone
                                         also its result, if small; trimmed, expires
    workers                      SET     ids of the workers whose in-flight hash may hold something
    worker:<wid>                 STRING  lease: a counter that each heartbeat raises; expires with the lease
    worker:<wid>:info            STRING  host name, process id; expires with the lease
    worker:<wid>:inflight        HASH    <n>:<queue list> -> message, from claim to settlement; <n>!:<queue list> where
                                         no task was tried before when it was claimed
    worker:<wid>:started         HASH    the same field -> task id, from start to settlement
    dead                         ZSET    dead letters by time of death; trimmed
    dead:<letter id>             HASH    message, queue, list, task_id, model, reason, error, attempts, worker,
                                         died_at, history (JSON array), run, stream; ended: MessagePack of the tasks
                                         that ended because of it, [id, stream, run] each; refused, refusals: why it was
                                         not redriven, and how often; expires

Written as Celery does, by workers and by Celery's producers: celery-taskset-meta-<group>{,.j,.t,.s,.d,.c} (groups
and chords; expire; .b, the body of a chord, is ours) and _kombu.binding.<exchange> (one for each queue name that a next
step names).

A worker's connection is named `samphire:<wid>`. Scripts get every key that they touch either as KEYS or
as a prefix named in their first lines; Redis Cluster is not supported.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Literal

INTAKE = "inference"
QUEUES = "sub:queues"
ONCE_PREFIX = "sub:once:"
IDEMPOTENCY_PREFIX = "sub:key:"
CANCELS = "sub:cancels"
DELETES = "sub:deletes"
LETTERS = "sub:letters"
WAKE_CHANNEL = "sub:wake"
BLOB_PREFIX = "sub:blob:"
RESULT_BLOB_PREFIX = "result:blob:"
META_PREFIX = "celery-task-meta-"
TASK_PREFIX = "task:"
STREAM_PREFIX = "events:"
WORKERS = "workers"
WORKER_PREFIX = "worker:"
CONNECTION_PREFIX = "samphire:"
SCHEDULED = "scheduled"
SCHEDULED_MESSAGES = "scheduled:messages"
CANCELLED = "cancelled"
CANCELLED_LATELY = "cancelled:lately"
CANCELLED_RUNNING = "cancelled:running"
ANSWER_PREFIX = "cancelled:answer:"
ENDED = "ended"
ENDED_BEFORE = "ended:before"
ENDED_TURN = "ended:turn"
CATALOGUE = "catalogue"
CATALOGUE_COMPLETE = "*"
TRIED = "tried"
ALONE = "alone"
LEADERS = "leaders"
DEAD = "dead"
DEAD_PREFIX = "dead:"

PRIORITY_STEPS = (0, 3, 6, 9)
"""kombu's `priority_steps` on Redis; 0 is served first."""

_SEPARATOR = "\x06\x16"
_QUEUE_NAME = re.compile(r"inference(\.[A-Za-z0-9][A-Za-z0-9_.+-]{0,127}(@[A-Za-z0-9][A-Za-z0-9_.-]{0,63})?)?")

Priority = Literal["high", "normal", "low"]
PRIORITIES: dict[str, int] = {"high": 0, "normal": 3, "low": 6}


_OWN_KEYS = {WORKERS, TRIED, ALONE, LEADERS, DEAD, SCHEDULED, CANCELLED, CATALOGUE, ENDED}
_OWN_KEYS |= {"unacked", "unacked_index", "unacked_mutex"}
_OWN_PREFIXES = (
    *("sub:", META_PREFIX, "celery-taskset-meta-", TASK_PREFIX, STREAM_PREFIX, WORKER_PREFIX, DEAD_PREFIX),
    *(RESULT_BLOB_PREFIX, f"{SCHEDULED}:", f"{CANCELLED}:", f"{ENDED}:", "_kombu."),
)


def may_be_queue(name: str) -> bool:
    """Whether a worker may push to a key that a producer has named: never to what holds state."""
    return name not in _OWN_KEYS and not name.startswith(_OWN_PREFIXES)


def queue_name(model: str, tenant: str = "") -> str:
    """Name of the queue of a model, or of one tenant's tasks for it."""
    return f"{INTAKE}.{model}@{tenant}" if tenant else f"{INTAKE}.{model}"


def known_form(name: bytes | str) -> str | None:
    """The queue that a name from the broker means, or None: whoever can write there can write any bytes."""
    if isinstance(name, bytes):
        name = name.decode("ascii", errors="replace")
    queue = name.partition(_SEPARATOR)[0]
    return queue if _QUEUE_NAME.fullmatch(queue) else None


def parse_queue(queue: str) -> tuple[str, str]:
    """Return (model, tenant) of a queue name; the intake has the model ""."""
    model, _, tenant = queue.removeprefix(INTAKE).removeprefix(".").partition("@")
    return model, tenant


def queue_list(queue: str, priority: int) -> str:
    """Key of the list that holds a queue's messages of one kombu priority step."""
    return f"{queue}{_SEPARATOR}{priority}" if priority else queue


@lru_cache(maxsize=1024)
def queue_lists(queue: str) -> tuple[str, ...]:
    """Keys of all lists of a queue, in the order of their priorities."""
    return tuple(queue_list(queue, priority) for priority in PRIORITY_STEPS)


def split_list(key: str) -> tuple[str, int]:
    """Return (queue, priority step) of a list's key."""
    queue, _, priority = key.partition(_SEPARATOR)
    return queue, int(priority or 0)


def meta_key(task_id: str) -> str:
    """Key of a task's state and result."""
    return META_PREFIX + task_id


def stream_key(client_id: str) -> str:
    """Key of the stream with the terminal events of a client's tasks."""
    return STREAM_PREFIX + client_id


def claim_list(field: str) -> str:
    """Key of the list that a claim was made from."""
    return field.partition(":")[2]


def claim_number(field: str) -> int:
    """The number of a claim: a worker's claims are in the order of these."""
    return int(field.partition(":")[0].rstrip("!"))


def is_first_claim(field: str) -> bool:
    """Whether no task was tried before when the claim was made."""
    return field.partition(":")[0].endswith("!")
