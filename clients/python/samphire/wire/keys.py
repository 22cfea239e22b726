"""The Redis key schema, version 1: every key that Samphire reads or writes, on one page, and the names of queues.

Own keys stand under the namespace, `samphire:` by default (`SAMPHIRE_NAMESPACE`). Those that producers write (an ACL
can hold them to these):

    sub:queues                   SET     names of queues: of those that the SDK has submitted to, that workers have
                                         pushed to or found; of what is empty and unused workers take the name out
    sub:blob:<task id>:<n>       STRING  claim check of a task's n-th tensor; expires
    sub:once:<call>              STRING  this submit was carried out; expires after minutes
    sub:key:<digest>             STRING  idempotency key of a tenant and model -> "<task id> <digest of what was asked
                                         for>"; expires
    sub:cancels                  LIST    requests to cancel: "<event stream or nothing> <task id>"
    sub:deletes                  LIST    ids of tasks whose results are read and no longer needed
    sub:follows                  LIST    ids of tasks that somebody follows: their logs are to begin
    sub:letters                  LIST    requests about dead letters: "redrive:<run> <letter id>", "purge:<run> <id>";
                                         without ":<run>" the letter of any run is meant

Those that only workers write:

    schema                       STRING  version of this schema, written by the first worker; who knows another stops
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
    catalogue                    HASH    model -> its signature, JSON, "" while it is not ready; "!<model>" -> why it is
                                         not loaded as its files are; "@<wid>" -> the fields that a worker tells;
                                         "!@<wid>" -> its endpoints, while none of them answers; `*` is there if these
                                         are all models; expires when no worker renews it
    leaders                      HASH    model whose requests must keep their order -> id of the one worker that claims
                                         them
    tried                        SET     ids of the tasks that have a task:<id>; expires
    result:blob:<tenant>:<id>:<n>:<hash>  STRING  claim check of an output; expires
    events:<client>              STREAM  terminal events of one client's tasks, an entry a settled batch: state
                                         and the ids that reached it, separated by spaces; of a task settled alone
                                         also its result, if small; trimmed, expires
    log:<id>                     STREAM  events of a task that streams or is followed (`shared/log.lua`); the id
                                         of an entry is <run * 2^20 + attempt>-<number of its last event>; trimmed,
                                         expires
    logs                         HASH    of each task with a log whose run has not ended: where the log stands; expires
    epoch                        STRING  "<epoch of positions> <run_id of the broker>"
    webhook:names                HASH    what producers may read of endpoints of webhooks: name -> tenant, whether it
                                         is disabled (JSON); "@<tenant>" -> there is a default secret; "*" -> which URLs
                                         are taken
    webhook:config               HASH    the same names -> all that is set, with the secrets, encrypted (JSON)
    webhook:health               HASH    endpoint -> how it fares (JSON), where it does not fare well
    webhook:warned               HASH    endpoint -> the last level at which operators were warned of it
    webhook:marks                HASH    these and more of deliveries: `shared/outbox.lua`
    webhook:tried                SET     as `tried`, of deliveries
    operator                     STREAM  events for operators (JSON); trimmed
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

Celery's keys stand under its own `global_keyprefix`, none by default (`SAMPHIRE_CELERY_KEY_PREFIX`):

    <queue>                      LIST    kombu messages of priority 0 (high), newest at the left
    <queue>\\x06\\x163|6|9         LIST    the same, priorities 3 (normal), 6 (low) and 9
    celery-task-meta-<id>        STRING  state and result, JSON as Celery's; a CHANNEL of the same name gets the
                                         terminal one, which expires. Celery puts a `_` behind a prefix that ends in a
                                         letter
    samphire.namespace           STRING  the namespace of the workers that serve the queues under this prefix; expires
                                         with their leases: workers of another do not start

A queue is `inference.<model>`, `inference.<model>@<tenant>`, the intake `inference`, `samphire.webhooks.<endpoint>`
with the deliveries to an endpoint, or `samphire.webhooks` with those that were asked for by hand. Beside these there
are Celery's own, written by workers and by Celery's producers: celery-taskset-meta-<group>{,.j,.t,.s,.d,.c} (groups and
chords; expire; .b, the body of a chord, is ours) and _kombu.binding.<exchange> (one for each queue name that a next
step names).

Channels and the names of connections belong to the whole server, so they carry the number of the database too:

    <namespace><database>:wake   CHANNEL a queue was empty and no longer is: its name
    <namespace><database>:log:<id>  CHANNEL something was written to a task's log: the entry, or its id
    <namespace><database>:<wid>  a worker's connection, which others look for in CLIENT LIST

What stands in keys and messages (streams, claim checks, queues) is named without namespace and prefix: a message can
name no key of anybody else. Scripts get every key that they touch either as KEYS or as a prefix named in their first
lines; Redis Cluster is not supported.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Literal

from samphire.errors import InvalidInputError

SCHEMA_VERSION = 1
DEFAULT_NAMESPACE = "samphire:"

INTAKE = "inference"
WEBHOOKS = "samphire.webhooks"
"""The queue of deliveries that were asked for by hand; those to an endpoint are in `samphire.webhooks.<endpoint>`."""
BLOB_PREFIX = "sub:blob:"
RESULT_BLOB_PREFIX = "result:blob:"
STREAM_PREFIX = "events:"
CATALOGUE_COMPLETE = "*"
CATALOGUE_TROUBLE = "!"
"""Begins the names of the fields that tell of troubles: no model's name does."""
CATALOGUE_TELLER = "@"
"""Begins the names of the fields that tell what a worker has told."""
CATALOGUE_AWAY = CATALOGUE_TROUBLE + CATALOGUE_TELLER
"""Begins the names of the fields that tell of a worker none of whose endpoints answers."""

_OF_DELIVERIES = f"({WEBHOOKS}"

PRIORITY_STEPS = (0, 3, 6, 9)
"""kombu's `priority_steps` on Redis; 0 is served first."""
PRIORITY_WEIGHTS = {0: 8, 3: 4, 6: 2, 9: 1}
"""Parts of a queue's share that each priority gets first; what one leaves, the next takes."""

_SEPARATOR = "\x06\x16"
_QUEUE_NAME = re.compile(
    r"inference(\.[A-Za-z0-9][A-Za-z0-9_.+-]{0,127}(@[A-Za-z0-9][A-Za-z0-9_.-]{0,63})?)?"
    r"|samphire\.webhooks(\.[A-Za-z0-9][A-Za-z0-9_.-]{0,63})?"
)

Priority = Literal["high", "normal", "low"]
PRIORITIES: dict[str, int] = {"high": 0, "normal": 3, "low": 6}


_NAMESPACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}:?")
_CELERY_KEY_PREFIX = re.compile(r"[A-Za-z0-9_.:-]{0,64}")
_CELERYS_OWN = ("celery-task", "_kombu.", "unacked")
"""Beginnings of keys that Celery and kombu keep state in."""
_MARK = "samphire.namespace"


def checked_namespace(namespace: str) -> str:
    """A namespace with the colon that ends it.

    Raises:
        InvalidInputError: it is none.
    """
    if not _NAMESPACE.fullmatch(namespace):
        raise InvalidInputError(
            f"expected a namespace of 1 to 64 letters, digits, dots, hyphens and underscores, given {namespace[:100]!r}"
        )
    return namespace.rstrip(":") + ":"


def checked_celery_key_prefix(prefix: str) -> str:
    """A `global_keyprefix` as Celery has it.

    Raises:
        InvalidInputError: a lane cannot use it.
    """
    if not _CELERY_KEY_PREFIX.fullmatch(prefix):
        raise InvalidInputError(
            "expected a Celery key prefix of at most 64 letters, digits, dots, colons, hyphens and underscores, given "
            f"{prefix[:100]!r}"
        )
    if prefix.startswith((INTAKE, *_CELERYS_OWN)):
        raise InvalidInputError(
            f"expected a Celery key prefix that does not begin with {INTAKE} or a name of Celery's own "
            f"({', '.join(_CELERYS_OWN)}), given {prefix!r}: its keys could be taken for those of a deployment without"
        )
    return prefix


class Keys:
    """The keys of one deployment, by their names above.

    Args:
        namespace: what every own key begins with.
        celery_prefix: `global_keyprefix` of Celery's broker and result backend; it begins Celery's keys.
        database: number of the database, for what belongs to the whole server.

    Raises:
        InvalidInputError: a namespace or a prefix that cannot be one.
    """

    def __init__(self, namespace: str = DEFAULT_NAMESPACE, celery_prefix: str = "", database: int = 0) -> None:
        own = self.namespace = checked_namespace(namespace)
        self.celery_prefix = checked_celery_key_prefix(celery_prefix)
        if celery_prefix.startswith(own):
            raise InvalidInputError(
                f"expected a Celery key prefix outside the namespace {own!r}, given {celery_prefix!r}: choose another"
            )
        self.queues, self.once_prefix, self.idempotency_prefix = own + "sub:queues", own + "sub:once:", own + "sub:key:"
        self.cancels, self.deletes, self.letters = own + "sub:cancels", own + "sub:deletes", own + "sub:letters"
        self.schema = own + "schema"
        self.workers, self.worker_prefix, self.task_prefix = own + "workers", own + "worker:", own + "task:"
        self.scheduled, self.scheduled_messages = own + "scheduled", own + "scheduled:messages"
        self.cancelled, self.cancelled_lately = own + "cancelled", own + "cancelled:lately"
        self.cancelled_running, self.answer_prefix = own + "cancelled:running", own + "cancelled:answer:"
        self.ended, self.ended_before, self.ended_turn = own + "ended", own + "ended:before", own + "ended:turn"
        self.catalogue, self.tried, self.alone, self.leaders = (
            own + name for name in ("catalogue", "tried", "alone", "leaders")
        )
        self.dead, self.dead_prefix = own + "dead", own + "dead:"
        self.follows, self.logs, self.log_prefix, self.epoch = (
            own + "sub:follows",
            own + "logs",
            own + "log:",
            own + "epoch",
        )
        self.webhook_names, self.webhook_config, self.webhook_health, self.webhook_warned, self.webhook_marks = (
            f"{own}webhook:{name}" for name in ("names", "config", "health", "warned", "marks")
        )
        self.tried_deliveries = own + "webhook:tried"
        self.operator_events = own + "operator"
        self.channel_prefix = self.connection_prefix = f"{own}{database}:"
        self.wake_channel = self.channel_prefix + "wake"
        # As `RedisBackend` does: https://docs.celeryq.dev, result_backend_transport_options, global_keyprefix.
        separator = "_" if celery_prefix and celery_prefix[-1] not in ":_-." else ""
        self.meta_prefix = f"{celery_prefix}{separator}celery-task-meta-"
        self.namespace_mark = mark_of(celery_prefix)

    def waiting_deliveries(self, endpoint: str) -> str:
        """Key of the ids of an endpoint's deliveries that have not ended."""
        return f"{self.namespace}webhook:waiting:{endpoint}"

    def ended_deliveries(self, endpoint: str) -> str:
        """Key of the ids of those that have."""
        return f"{self.namespace}webhook:ended:{endpoint}"

    def order_of_deliveries(self, endpoint: str, task_id: str) -> str:
        """Key of the deliveries of one task to an endpoint that wants them one after the other."""
        return f"{self.namespace}webhook:order:{endpoint}:{task_id}"

    def delivery(self, delivery_id: str) -> str:
        """Key of what is kept of a delivery that has ended."""
        return f"{self.namespace}webhook:delivery:{delivery_id}"

    def own(self, name: str) -> str:
        """Key of what is named without the namespace: a stream, a claim check."""
        return self.namespace + name

    def of_celery(self, name: str) -> str:
        """Key of a list of a queue."""
        return self.celery_prefix + name

    def queue_in(self, key: bytes | str) -> str | None:
        """The queue that one of Celery's keys is of, or None."""
        text = key.decode("ascii", errors="replace") if isinstance(key, bytes) else key
        return known_form(text.removeprefix(self.celery_prefix)) if text.startswith(self.celery_prefix) else None


def mark_of(celery_prefix: str) -> str:
    """Key that tells whose the queues under a prefix are."""
    return celery_prefix + _MARK


def may_be_queue(name: str, namespace: str, celery_prefix: str) -> bool:
    """Whether a worker may push to a queue that a producer has named: never to what holds state."""
    # Celery puts a `_` between some prefixes and its own names.
    holds_state = name.startswith((*_CELERYS_OWN, _MARK)) or name.removeprefix("_").startswith(_CELERYS_OWN)
    holds_state = holds_state or name == WEBHOOKS or name.startswith((f"{WEBHOOKS}.", WEBHOOKS + _SEPARATOR))
    return not ((celery_prefix + name).startswith(namespace) or holds_state)


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
    """Return (model, tenant) of a queue name; the intake has the model "", another queue one that no model can have."""
    if not queue.startswith(INTAKE):
        return f"({queue})", ""
    model, _, tenant = queue.removeprefix(INTAKE).removeprefix(".").partition("@")
    return model, tenant


def delivery_queue(endpoint: str) -> str:
    """Name of the queue with the deliveries to an endpoint."""
    return f"{WEBHOOKS}.{endpoint}"


def is_of_deliveries(model: str) -> bool:
    """Whether what `parse_queue` says of a queue is said of one with deliveries."""
    return model.startswith(_OF_DELIVERIES)


def endpoint_of(queue: str) -> str | None:
    """The endpoint of webhooks that a queue is of, or None."""
    return queue.removeprefix(f"{WEBHOOKS}.") if queue.startswith(f"{WEBHOOKS}.") else None


def queue_list(queue: str, priority: int) -> str:
    """Name of the list that holds a queue's messages of one kombu priority step."""
    return f"{queue}{_SEPARATOR}{priority}" if priority else queue


@lru_cache(maxsize=1024)
def queue_lists(queue: str) -> tuple[str, ...]:
    """Names of all lists of a queue, in the order of their priorities."""
    return tuple(queue_list(queue, priority) for priority in PRIORITY_STEPS)


def split_list(key: str) -> tuple[str, int]:
    """Return (queue, priority step) of a list's name."""
    queue, _, priority = key.partition(_SEPARATOR)
    return queue, int(priority or 0)


def blob_name(task_id: str, number: int) -> str:
    """Name of the claim check of a task's n-th tensor."""
    return f"{BLOB_PREFIX}{task_id}:{number}"


def is_blob_of(name: str, task_id: str) -> bool:
    """Whether a name is that of a claim check of one of the task's own tensors."""
    own = f"{BLOB_PREFIX}{task_id}:"
    number = name.removeprefix(own)
    return number != name and number.isascii() and number.isdecimal()


def result_blobs_of(tenant: str) -> str:
    """How the names of the claim checks of a tenant's outputs begin."""
    return f"{RESULT_BLOB_PREFIX}{tenant}:"


def stream_name(client_id: str) -> str:
    """Name of the stream with the terminal events of a client's tasks."""
    return STREAM_PREFIX + client_id


def claim_list(field: str) -> str:
    """Name of the list that a claim was made from."""
    return field.partition(":")[2]


def claim_number(field: str) -> int:
    """The number of a claim: a worker's claims are in the order of these."""
    return int(field.partition(":")[0].rstrip("!"))


def is_first_claim(field: str) -> bool:
    """Whether no task was tried before when the claim was made."""
    return field.partition(":")[0].endswith("!")
