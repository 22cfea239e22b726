"""The queues as kombu declarations, for Celery applications that route to them by name."""

from __future__ import annotations

from kombu.entity import Exchange, Queue

from samphire.wire import keys

CONTROL_QUEUE = "samphire.control"
TRAINING = "training"


def control() -> Queue:
    """The stock consumer's own queue; nothing but Celery's control commands needs it."""
    return declared(CONTROL_QUEUE)


def inference_queue(model: str, tenant: str = "") -> Queue:
    """The queue of one model, or of one tenant's tasks for it."""
    return declared(keys.queue_name(model, tenant))


def intake() -> Queue:
    """The queue for producers that do not know models: lanes move its tasks on to the model's queue."""
    return declared(keys.INTAKE)


def refuse_queue(queue: str) -> str | None:
    """Why a stock consumer must not consume from a queue; None where it may."""
    is_of_deliveries = queue == keys.WEBHOOKS or keys.endpoint_of(queue) is not None
    if queue == keys.INTAKE or queue.startswith(f"{keys.INTAKE}.") or queue == TRAINING or is_of_deliveries:
        return (
            f"the queue {queue!r} belongs to Samphire's lanes, which serve it in every worker of samphire_workers: "
            f"the stock consumer loses messages when it is killed. Leave out -Q, or name other queues"
        )
    return None


def declared(name: str) -> Queue:
    """A queue of this name, as kombu declares it."""
    exchange = Exchange(name, type="direct")  # type: ignore[no-untyped-call]
    return Queue(name, exchange, routing_key=name)  # type: ignore[no-untyped-call]
